//! From logits to a token: small pure functions, applied in the order of Transformers' logits processors.

use crate::program::random;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token always.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Only tokens at least this many times as likely as the most likely one; 0: all.
    pub min_p: f32,
    /// Above 1: tokens of the prompt and of the answer so far become less likely; 1: no penalty.
    pub repetition_penalty: f32,
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 3407 }
    }
}

/// What Transformers takes when a model samples and does not say how many tokens it chooses from.
const TRANSFORMERS_TOP_K: usize = 50;

impl Sampling {
    /// What a model's own `generation_config.json` asks for: greedy unless it says `do_sample`.
    pub fn of_generation_config(config: &serde_json::Value) -> Self {
        let number = |key: &str| config.get(key).and_then(serde_json::Value::as_f64).map(|value| value as f32);
        let repetition_penalty = number("repetition_penalty").unwrap_or(1.0);
        let mut sampling = Self { repetition_penalty, ..Self::default() };
        if config.get("do_sample").and_then(serde_json::Value::as_bool) == Some(true) {
            sampling.temperature = number("temperature").unwrap_or(1.0);
            sampling.top_k = number("top_k").map_or(TRANSFORMERS_TOP_K, |value| value as usize);
            sampling.top_p = number("top_p").unwrap_or(1.0);
            sampling.min_p = number("min_p").unwrap_or(0.0);
        }
        sampling
    }
}

/// A setting outside of what it may be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{setting} is {value}; it must be {allowed}")]
pub struct SamplingError {
    pub setting: &'static str,
    pub value: String,
    pub allowed: &'static str,
}

impl Sampling {
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn check(&self) -> Result<(), SamplingError> {
        let checks = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "from 0 to 100"),
            ("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            (
                "repetition penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
                "above 0",
            ),
        ];
        match checks.into_iter().find(|(_, _, fine, _)| !fine) {
            Some((setting, value, _, allowed)) => Err(SamplingError { setting, value: value.to_string(), allowed }),
            None => Ok(()),
        }
    }

    /// The next token after `history` (prompt and answer so far); `drawn` counts the tokens drawn with this seed
    /// before. `logits` is `[V]`; the repetition penalty changes it.
    pub fn choose(&self, logits: &mut [f32], history: &[u32], drawn: u32) -> u32 {
        penalize_repetition(logits, history, self.repetition_penalty);
        if self.temperature == 0.0 {
            return most_likely(logits);
        }
        let mut candidates = candidates(logits, self.top_k, self.temperature);
        keep_top_p(&mut candidates, self.top_p);
        keep_min_p(&mut candidates, self.min_p);
        let key = [self.seed as u32, (self.seed >> 32) as u32, 0, 0];
        draw(&candidates, random::uniform(key, random::stream("sampling"), drawn, 0))
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub token: u32,
    pub probability: f32,
}

/// The token with the largest logit; the first one where several are as large.
pub fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Divides positive and multiplies negative logits of the tokens in `history` by `penalty`, each token once
/// (Keskar et al. 2019, arXiv 1909.05858).
pub fn penalize_repetition(logits: &mut [f32], history: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = vec![false; logits.len()];
    for &token in history {
        let token = token as usize;
        if token < logits.len() && !std::mem::replace(&mut seen[token], true) {
            logits[token] = if logits[token] > 0.0 { logits[token] / penalty } else { logits[token] * penalty };
        }
    }
}

/// Softmax of `logits / temperature` over the `top_k` largest (0: all), most likely first; of equal ones the
/// lower token first.
pub fn candidates(logits: &[f32], top_k: usize, temperature: f32) -> Vec<Candidate> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if (1..order.len()).contains(&top_k) {
        order.select_nth_unstable_by(top_k - 1, by_logit);
        order.truncate(top_k);
    }
    order.sort_unstable_by(by_logit);
    let Some(&first) = order.first() else { return Vec::new() };
    let largest = logits[first as usize];
    let mut list: Vec<Candidate> = order
        .into_iter()
        .map(|token| Candidate { token, probability: ((logits[token as usize] - largest) / temperature).exp() })
        .collect();
    normalize(&mut list);
    list
}

/// Nucleus sampling: the fewest most likely candidates whose probabilities reach `top_p`
/// (Holtzman et al. 2019, arXiv 1904.09751). `candidates` is in order, most likely first.
pub fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let mut total = 0.0;
    let kept = candidates
        .iter()
        .position(|candidate| {
            total += candidate.probability;
            total >= top_p
        })
        .map_or(candidates.len(), |last| last + 1);
    candidates.truncate(kept);
    normalize(candidates);
}

/// Candidates at least `min_p` times as likely as the most likely one (Nguyen et al. 2024, arXiv 2407.01082).
/// `candidates` is in order, most likely first.
pub fn keep_min_p(candidates: &mut Vec<Candidate>, min_p: f32) {
    let Some(first) = candidates.first() else { return };
    let least = min_p * first.probability;
    candidates.retain(|candidate| candidate.probability >= least);
    normalize(candidates);
}

/// The candidate on which `uniform` (in `[0, 1)`) falls when their probabilities are laid end to end.
///
/// # Panics
/// When there is no candidate.
pub fn draw(candidates: &[Candidate], uniform: f32) -> u32 {
    let mut total = 0.0;
    for candidate in candidates {
        total += candidate.probability;
        if uniform < total {
            return candidate.token;
        }
    }
    // Rounding may leave the sum a little below one.
    candidates.last().expect("there is a candidate").token
}

fn normalize(candidates: &mut [Candidate]) {
    let total: f32 = candidates.iter().map(|candidate| candidate.probability).sum();
    for candidate in candidates {
        candidate.probability /= total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(probabilities: &[f32]) -> Vec<Candidate> {
        probabilities
            .iter()
            .enumerate()
            .map(|(token, &probability)| Candidate { token: token as u32, probability })
            .collect()
    }

    fn tokens(candidates: &[Candidate]) -> Vec<u32> {
        candidates.iter().map(|candidate| candidate.token).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_equal_logits() {
        assert_eq!(most_likely(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert_eq!(Sampling::default().choose(&mut [0.5, 2.0, -1.0, 2.0], &[], 0), 1);
    }

    #[test]
    fn repetition_penalty_touches_each_seen_token_once() {
        let mut logits = [2.0, -2.0, 4.0, 1.0];
        penalize_repetition(&mut logits, &[0, 1, 0, 0, 99], 2.0);
        assert_eq!(logits, [1.0, -4.0, 4.0, 1.0]);
    }

    #[test]
    fn repetition_penalty_applies_to_greedy_choice() {
        let sampling = Sampling { repetition_penalty: 3.0, ..Sampling::default() };
        assert_eq!(sampling.choose(&mut [2.0, 1.0], &[0], 0), 1);
    }

    #[test]
    fn candidates_are_a_softmax_in_order() {
        let list = candidates(&[0.0, 2.0f32.ln(), 5.0f32.ln()], 0, 1.0);
        assert_eq!(tokens(&list), [2, 1, 0]);
        for (candidate, expected) in list.iter().zip([0.625, 0.25, 0.125]) {
            assert!((candidate.probability - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn temperature_flattens_and_sharpens() {
        let at = |temperature| candidates(&[0.0, 1.0], 0, temperature)[0].probability;
        assert!(at(0.5) > at(1.0) && at(1.0) > at(2.0));
        assert!((at(2.0) - 1.0 / (1.0 + (-0.5f32).exp())).abs() < 1e-6);
    }

    #[test]
    fn top_k_keeps_the_k_most_likely_and_breaks_ties_by_token() {
        assert_eq!(tokens(&candidates(&[1.0, 3.0, 1.0, 2.0], 3, 1.0)), [1, 3, 0]);
        assert_eq!(candidates(&[1.0, 3.0], 9, 1.0).len(), 2);
    }

    #[test]
    fn top_p_keeps_the_candidate_that_reaches_it() {
        let mut list = of(&[0.5, 0.3, 0.15, 0.05]);
        keep_top_p(&mut list, 0.7);
        assert_eq!(tokens(&list), [0, 1]);
        assert!((list[0].probability - 0.625).abs() < 1e-6);
        keep_top_p(&mut list, 1e-6);
        assert_eq!(tokens(&list), [0]);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let mut list = of(&[0.5, 0.3, 0.15, 0.05]);
        keep_min_p(&mut list, 0.25);
        assert_eq!(tokens(&list), [0, 1, 2]);
        assert!((list.iter().map(|c| c.probability).sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn draw_follows_the_probabilities() {
        let list = of(&[0.5, 0.3, 0.2]);
        assert_eq!([0.0, 0.49, 0.5, 0.79, 0.81, 0.999_999].map(|u| draw(&list, u)), [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn a_seed_repeats_its_tokens_and_another_draws_others() {
        let logits: Vec<f32> = (0..64).map(|i| (i as f32 * 0.37).sin()).collect();
        let run = |seed| -> Vec<u32> {
            let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            (0..32).map(|drawn| sampling.choose(&mut logits.clone(), &[], drawn)).collect()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_ne!(run(1), run(1 << 32));
    }

    #[test]
    fn frequencies_come_near_the_probabilities() {
        let mut counts = [0u32; 3];
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        for drawn in 0..20_000 {
            let mut logits = [0.2f32.ln(), 0.5f32.ln(), 0.3f32.ln()];
            counts[sampling.choose(&mut logits, &[], drawn) as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([0.2, 0.5, 0.3]) {
            assert!((f64::from(count) / 20_000.0 - expected).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn a_generation_config_counts_only_where_it_samples() {
        let of = |text: &str| Sampling::of_generation_config(&serde_json::from_str(text).unwrap());
        assert_eq!(of(r#"{"temperature": 0.6, "top_p": 0.9}"#), Sampling::default());
        let sampling = of(r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}"#);
        assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.7, 50, 0.8));
        assert_eq!(sampling.repetition_penalty, 1.1);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let error = Sampling { top_p: 0.0, ..Sampling::default() }.check().unwrap_err();
        assert_eq!(error.to_string(), "top-p is 0; it must be above 0 and at most 1");
        assert!(Sampling { temperature: f32::NAN, ..Sampling::default() }.check().is_err());
        assert!(Sampling { min_p: -0.1, ..Sampling::default() }.check().is_err());
        assert!(Sampling { repetition_penalty: 0.0, ..Sampling::default() }.check().is_err());
        assert!(Sampling::default().check().is_ok());
    }
}
