//! Rules about a run that goes on, judged from its events alone.
//!
//! Each rule is a pure function of a few numbers. [`Watch`] keeps the numbers that they need, a bounded window,
//! and gives every warning once.

use std::collections::VecDeque;

use super::{Fix, Source, Warning};
use crate::run::Event;

/// Updates that the window of [`Watch`] keeps.
const WINDOW: usize = 4096;

/// One update, as far as the rules need it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    pub step: u64,
    pub epoch: f64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
}

/// An evaluation and the mean training loss around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    pub step: u64,
    pub loss: f64,
    pub train_loss: f64,
}

/// The two latest evaluations are more than 1% above the best one while the training loss fell.
pub fn overfitting(evaluations: &[Evaluation]) -> Option<Warning> {
    let [earlier @ .., second, last] = evaluations else { return None };
    let best = earlier.iter().min_by(|a, b| a.loss.total_cmp(&b.loss))?;
    let rises = second.loss > best.loss * 1.01 && last.loss > best.loss * 1.01;
    (rises && last.train_loss < best.train_loss).then(|| Warning {
        rule: "overfitting",
        key: "",
        message: format!(
            "overfitting since step {}: evaluation loss {:.3} then, {:.3} now, while the training loss falls",
            best.step, best.loss, last.loss
        ),
        advice: "stop and keep the best checkpoint".into(),
        sources: &[Source::Practice],
        fix: Some(Fix::Stop),
    })
}

/// Mean training loss of the last 10 updates under 0.2.
pub fn memorised(recent: &[f64]) -> Option<Warning> {
    let last = recent.len().checked_sub(10).map(|from| &recent[from..])?;
    let mean = mean(last);
    (mean < 0.2).then(|| Warning {
        rule: "memorised",
        key: "",
        message: format!("training loss {mean:.3}: near memorised"),
        advice: "evaluate now, to see whether it still helps on rows it has not seen".into(),
        sources: &[Source::Guide],
        fix: Some(Fix::Evaluate),
    })
}

/// Loss before and after an epoch's edge: a fall of 20% or more is memory, not learning.
pub fn epoch_edge(before: &[f64], after: &[f64], epoch: u64, end_of_epoch: u64) -> Option<Warning> {
    if before.is_empty() || after.is_empty() {
        return None;
    }
    let (from, to) = (mean(before), mean(after));
    (to <= 0.8 * from).then(|| Warning {
        rule: "epoch-edge",
        key: "",
        message: format!("loss fell from {from:.3} to {to:.3} at the start of epoch {}: memorising", epoch + 1),
        advice: "finish this epoch and stop".into(),
        sources: &[Source::Practice],
        fix: Some(Fix::FinishEpoch { at_step: end_of_epoch }),
    })
}

/// Loss that does not move over `window`, the last 20% of the run.
pub fn flat(window: &[f64], learning_rate: f64) -> Option<Warning> {
    if window.len() < 30 {
        return None;
    }
    let third = window.len() / 3;
    let (first, last) = (&window[..third], &window[window.len() - third..]);
    let fall = (mean(first) - mean(last)) / mean(first).abs().max(1e-12);
    // Within the noise of the two means, and under 1%.
    let noise = (deviation(first).powi(2) + deviation(last).powi(2)).sqrt() / (third as f64).sqrt();
    let still = fall.abs() < 0.01 && (mean(first) - mean(last)).abs() <= 2.0 * noise + 1e-9;
    (still && mean(last) > 0.2).then(|| Warning {
        rule: "flat",
        key: "",
        message: format!("loss is flat at {:.3} for {} updates: not learning", mean(last), window.len()),
        advice: "double the learning rate".into(),
        sources: &[Source::Guide],
        fix: Some(Fix::LearningRate(learning_rate * 2.0)),
    })
}

/// Three of the last ten gradient norms at least ten times the median.
pub fn unstable(grad_norms: &[f64], learning_rate: f64) -> Option<Warning> {
    if grad_norms.len() < 20 {
        return None;
    }
    let median = median(grad_norms);
    let peaks = grad_norms[grad_norms.len() - 10..].iter().filter(|&&norm| norm >= 10.0 * median).count();
    (median > 0.0 && peaks >= 3).then(|| Warning {
        rule: "unstable",
        key: "",
        message: format!("grad norm ten times its median of {median:.3}, {peaks} times: unstable"),
        advice: "halve the learning rate".into(),
        sources: &[Source::Practice],
        fix: Some(Fix::LearningRate(learning_rate / 2.0)),
    })
}

/// A loss or gradient norm that is no number.
pub fn non_finite(update: &Update) -> Option<Warning> {
    (!update.loss.is_finite() || !update.grad_norm.is_finite()).then(|| Warning {
        rule: "non-finite",
        key: "",
        message: format!("step {}: loss {}, grad norm {}", update.step, update.loss, update.grad_norm),
        advice: "the run halts and names the op, the layer and the rows".into(),
        sources: &[Source::Measured],
        fix: None,
    })
}

/// The median speed of the last five updates under half the run's.
pub fn slow(tokens_per_second: &[f64]) -> Option<Warning> {
    if tokens_per_second.len() < 20 {
        return None;
    }
    let usual = median(tokens_per_second);
    let now = median(&tokens_per_second[tokens_per_second.len() - 5..]);
    (now < 0.5 * usual).then(|| Warning {
        rule: "slow",
        key: "",
        message: format!("{now:.0} tokens per second, under half of the usual {usual:.0}"),
        advice: "see what else runs on this machine".into(),
        sources: &[Source::Practice],
        fix: None,
    })
}

/// What the driver says that holds the GPU back. `reasons` are NVML's, in words.
pub fn throttled(reasons: &[&str]) -> Option<Warning> {
    (!reasons.is_empty()).then(|| Warning {
        rule: "throttled",
        key: "",
        message: format!("the GPU throttles: {}", reasons.join(", ")),
        advice: "check cooling and power limit".into(),
        sources: &[Source::Practice, Source::Measured],
        fix: None,
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    let middle = sorted.len() / 2;
    match sorted.is_empty() {
        true => 0.0,
        false => *sorted.select_nth_unstable_by(middle, f64::total_cmp).1,
    }
}

/// Follows the events of a run and gives each warning once, when it first holds.
#[derive(Debug, Default)]
pub struct Watch {
    updates: VecDeque<Update>,
    evaluations: Vec<Evaluation>,
    /// Updates of the whole run.
    total: u64,
    epochs: f64,
    given: Vec<&'static str>,
}

impl Watch {
    /// Takes one event; the warnings that it brings about. `slow` may come again after speed recovered.
    pub fn observe(&mut self, event: &Event) -> Vec<Warning> {
        match event {
            Event::Started { steps, epochs, .. } => {
                (self.total, self.epochs) = (*steps, *epochs);
                Vec::new()
            }
            Event::Resumed { step, .. } => {
                self.updates.retain(|update| update.step <= *step);
                self.evaluations.retain(|evaluation| evaluation.step <= *step);
                Vec::new()
            }
            Event::Step { step, epoch, loss, grad_norm, learning_rate, tokens_per_second, .. } => {
                let update = Update {
                    step: *step,
                    epoch: *epoch,
                    loss: *loss,
                    grad_norm: *grad_norm,
                    learning_rate: *learning_rate,
                    tokens_per_second: *tokens_per_second,
                };
                self.update(update)
            }
            Event::Eval { step, loss, .. } => {
                let recent: Vec<f64> = self.updates.iter().rev().take(20).map(|update| update.loss).collect();
                let train_loss = if recent.is_empty() { f64::INFINITY } else { mean(&recent) };
                self.evaluations.push(Evaluation { step: *step, loss: *loss, train_loss });
                let warning = overfitting(&self.evaluations);
                self.once(warning)
            }
            Event::Changed { key, .. } if key.ends_with("learning_rate") => {
                // A new rate deserves a new judgement.
                self.given.retain(|rule| !["flat", "unstable"].contains(rule));
                self.updates.clear();
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn update(&mut self, update: Update) -> Vec<Warning> {
        let broken = non_finite(&update);
        if broken.is_some() {
            return self.once(broken);
        }
        if self.updates.len() == WINDOW {
            self.updates.pop_front();
        }
        self.updates.push_back(update);
        let rate = update.learning_rate;
        let peak_rate = self.updates.iter().map(|update| update.learning_rate).fold(0.0, f64::max);
        let mut found = Vec::new();
        found.extend(self.once(memorised(&self.last(10, |update| update.loss))));
        found.extend(self.once(unstable(&self.last(100, |update| update.grad_norm), rate)));
        let speeds = self.last(200, |update| update.tokens_per_second);
        match slow(&speeds) {
            None => self.given.retain(|rule| *rule != "slow"),
            warning => found.extend(self.once(warning)),
        }
        // A rate still warming up or nearly spent explains a flat loss.
        let window = (self.total as usize / 5).min(WINDOW);
        if window >= 30 && self.updates.len() >= window && rate > 0.3 * peak_rate {
            found.extend(self.once(flat(&self.last(window, |update| update.loss), rate)));
        }
        found.extend(self.edge(update));
        found
    }

    /// Judges an epoch's edge once a few updates after it are known.
    fn edge(&mut self, update: Update) -> Vec<Warning> {
        if self.epochs <= 0.0 || self.total == 0 {
            return Vec::new();
        }
        let per_epoch = self.total as f64 / self.epochs;
        let edge = update.epoch.floor();
        let width = ((per_epoch / 4.0) as usize).clamp(1, 10);
        let after: Vec<f64> = self.updates.iter().filter(|other| other.epoch > edge).map(|other| other.loss).collect();
        if edge < 1.0 || after.len() != width {
            return Vec::new();
        }
        let before: Vec<f64> =
            self.updates.iter().filter(|other| other.epoch <= edge).map(|other| other.loss).collect();
        let before = &before[before.len().saturating_sub(width)..];
        let end = (((edge + 1.0) * per_epoch).round() as u64).min(self.total);
        self.once(epoch_edge(before, &after, edge as u64, end))
    }

    fn last(&self, count: usize, value: impl Fn(&Update) -> f64) -> Vec<f64> {
        let from = self.updates.len().saturating_sub(count);
        self.updates.range(from..).map(value).collect()
    }

    fn once(&mut self, warning: Option<Warning>) -> Vec<Warning> {
        match warning {
            Some(warning) if !self.given.contains(&warning.rule) => {
                self.given.push(warning.rule);
                vec![warning]
            }
            _ => Vec::new(),
        }
    }
}

/// The fix of a live warning that an event names, where one key can apply it now.
pub fn fix_for(rule: &str, learning_rate: f64, end_of_epoch: u64) -> Option<Fix> {
    match rule {
        "overfitting" => Some(Fix::Stop),
        "memorised" => Some(Fix::Evaluate),
        "epoch-edge" => Some(Fix::FinishEpoch { at_step: end_of_epoch }),
        "flat" => Some(Fix::LearningRate(learning_rate * 2.0)),
        "unstable" => Some(Fix::LearningRate(learning_rate / 2.0)),
        _ => None,
    }
}

impl Warning {
    /// The warning as an event of the run.
    pub fn event(&self) -> Event {
        let fix = self.fix.as_ref().map(|fix| format!(" ({})", fix.describe())).unwrap_or_default();
        Event::Warning {
            rule: self.rule.into(),
            message: self.message.clone(),
            advice: format!("{}{fix}", self.advice),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(step: u64, loss: f64, train_loss: f64) -> Evaluation {
        Evaluation { step, loss, train_loss }
    }

    fn step(step: u64, epoch: f64, loss: f64, grad_norm: f64, tokens_per_second: f64) -> Event {
        Event::Step {
            step,
            epoch,
            loss,
            grad_norm,
            learning_rate: 2e-4,
            tokens: 100,
            label_tokens: 50,
            padding: 0,
            tokens_per_second,
            seconds: 1.0,
            vram_bytes: 0,
        }
    }

    fn started(steps: u64, epochs: f64) -> Event {
        Event::Started {
            run: "r".into(),
            model: "m".into(),
            device: "cpu".into(),
            reason: String::new(),
            version: String::new(),
            process: 1,
            rows: 800,
            eval_rows: 80,
            steps,
            epochs,
            trainable_parameters: 1,
            parameters: 1,
        }
    }

    #[test]
    fn overfitting_needs_two_rises_and_a_falling_training_loss() {
        let rising = [evaluation(10, 1.0, 1.0), evaluation(20, 1.02, 0.8), evaluation(30, 1.05, 0.6)];
        let warning = overfitting(&rising).unwrap();
        assert!(warning.message.contains("since step 10"), "{}", warning.message);
        assert_eq!(warning.fix, Some(Fix::Stop));
        assert_eq!(overfitting(&rising[..2]), None);
        let both = [evaluation(10, 1.0, 1.0), evaluation(20, 1.02, 1.1), evaluation(30, 1.05, 1.2)];
        assert_eq!(overfitting(&both), None);
        let little = [evaluation(10, 1.0, 1.0), evaluation(20, 1.005, 0.8), evaluation(30, 1.009, 0.6)];
        assert_eq!(overfitting(&little), None);
    }

    #[test]
    fn a_loss_under_a_fifth_is_near_memorised() {
        assert!(memorised(&[0.19; 10]).is_some());
        assert_eq!(memorised(&[0.21; 10]), None);
        assert_eq!(memorised(&[0.1; 9]), None);
    }

    #[test]
    fn a_fall_of_a_fifth_at_the_edge_is_memory() {
        let warning = epoch_edge(&[1.0; 5], &[0.79; 5], 1, 200).unwrap();
        assert_eq!(warning.fix, Some(Fix::FinishEpoch { at_step: 200 }));
        assert_eq!(epoch_edge(&[1.0; 5], &[0.81; 5], 1, 200), None);
    }

    #[test]
    fn a_flat_loss_is_told_from_a_slow_one() {
        let noise = |index: usize| ((index * 7919) % 13) as f64 / 130.0;
        let still: Vec<f64> = (0..60).map(|index| 2.0 + noise(index)).collect();
        assert_eq!(flat(&still, 1e-4).unwrap().fix, Some(Fix::LearningRate(2e-4)));
        let falling: Vec<f64> = (0..60).map(|index| 2.0 - 0.005 * index as f64 + noise(index)).collect();
        assert_eq!(flat(&falling, 1e-4), None);
    }

    #[test]
    fn three_tall_gradients_are_unstable_and_two_are_not() {
        let mut norms = vec![1.0; 40];
        (norms[33], norms[36]) = (12.0, 11.0);
        assert_eq!(unstable(&norms, 2e-4), None);
        norms[39] = 10.0;
        assert_eq!(unstable(&norms, 2e-4).unwrap().fix, Some(Fix::LearningRate(1e-4)));
    }

    #[test]
    fn half_the_usual_speed_is_slow() {
        let mut speeds = vec![1000.0; 30];
        speeds[25..].fill(499.0);
        assert!(slow(&speeds).is_some());
        speeds[25..].fill(501.0);
        assert_eq!(slow(&speeds), None);
    }

    #[test]
    fn throttling_names_the_drivers_reasons() {
        assert!(throttled(&["power cap"]).unwrap().message.contains("power cap"));
        assert_eq!(throttled(&[]), None);
    }

    #[test]
    fn a_watch_gives_each_warning_once() {
        let mut watch = Watch::default();
        watch.observe(&started(400, 2.0));
        let mut found = Vec::new();
        for index in 1..=400u64 {
            // Two epochs; the second starts 40% lower, and the speed sags in the middle of it.
            let loss = if index <= 200 { 1.0 - 0.001 * index as f64 } else { 0.45 - 0.0005 * (index - 200) as f64 };
            let speed = if (300..310).contains(&index) { 100.0 } else { 1000.0 };
            found.extend(watch.observe(&step(index, index as f64 / 200.0, loss, 1.0, speed)));
        }
        let rules: Vec<_> = found.iter().map(|warning| warning.rule).collect();
        assert_eq!(rules, ["epoch-edge", "slow"]);
        let Some(Fix::FinishEpoch { at_step }) = found[0].fix else { panic!("a fix") };
        assert_eq!(at_step, 400);
    }

    #[test]
    fn each_rule_names_its_source() {
        let update =
            Update { step: 1, epoch: 0.1, loss: f64::NAN, grad_norm: 1.0, learning_rate: 1e-4, tokens_per_second: 1.0 };
        let mut peaks = vec![1.0; 30];
        peaks[25..29].fill(20.0);
        let mut sagging = vec![1000.0; 30];
        sagging[25..].fill(100.0);
        let rises = [evaluation(0, 1.0, 2.0), evaluation(10, 1.1, 1.5), evaluation(20, 1.2, 1.0)];
        let given = [
            (overfitting(&rises), Source::Practice),
            (memorised(&[0.1; 10]), Source::Guide),
            (epoch_edge(&[1.0; 5], &[0.5; 5], 1, 100), Source::Practice),
            (flat(&[1.0; 60], 1e-4), Source::Guide),
            (unstable(&peaks, 1e-4), Source::Practice),
            (non_finite(&update), Source::Measured),
            (slow(&sagging), Source::Practice),
            (throttled(&["power cap"]), Source::Practice),
        ];
        for (warning, source) in given {
            let warning = warning.unwrap();
            assert_eq!(warning.sources.first(), Some(&source), "{}", warning.rule);
            assert!(!warning.message.is_empty() && !warning.advice.is_empty(), "{}", warning.rule);
        }
    }

    #[test]
    fn a_watch_sees_what_is_not_finite() {
        let mut watch = Watch::default();
        let found = watch.observe(&step(1, 0.1, f64::NAN, 1.0, 1.0));
        assert_eq!(found[0].rule, "non-finite");
    }
}
