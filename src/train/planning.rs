//! Chooses micro-batch sizes and what is recomputed: the fastest plan that fits the budget.

use super::checkpoint::PlanChoice;
use crate::model::{Method, ModelConfig, ModelError, Recompute, TrainingOptions, training_workload};
use crate::program::{DType, Plan, PlanError, Role, Target, plan};

/// Why no plan came out.
#[derive(Debug, thiserror::Error)]
pub enum PlanningError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// What the search may choose from.
#[derive(Clone, Debug)]
pub struct Search<'a> {
    pub config: &'a ModelConfig,
    /// `sizes` and `recompute` are the search's to fill in.
    pub options: TrainingOptions,
    pub target: &'a Target,
    /// Tokens of the longest row: the largest micro-batch must hold it.
    pub longest_row: usize,
    /// Tokens that most updates stay below ([`update_tokens`]); a micro-batch need not be larger.
    pub update_tokens: usize,
    /// `[engine] recompute`: searched, nothing, everything.
    pub recompute: RecomputeChoice,
    /// Whether the optimizer's moments lie in the host's memory; none: where nothing else helps.
    pub host_optimizer: Option<bool>,
}

/// A step from fast to lean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Stage {
    cheap: usize,
    all: usize,
    offloaded: usize,
    host_embedding: bool,
    host_optimizer: bool,
    small_head: bool,
    half_gradients: bool,
    /// Parts that MLPs cut the largest micro-batch into.
    mlp_chunks: usize,
}

impl Stage {
    fn of(choice: &PlanChoice) -> Self {
        Self {
            cheap: choice.cheap_layers,
            all: choice.recomputed_layers,
            offloaded: choice.offloaded_layers,
            host_embedding: choice.host_embedding,
            host_optimizer: choice.host_optimizer,
            small_head: choice.small_head,
            half_gradients: choice.half_gradients,
            mlp_chunks: choice.mlp_chunks,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecomputeChoice {
    Auto,
    None,
    All,
}

impl Search<'_> {
    /// The fastest plan that fits: among the largest micro-batch sizes worth having, each with as little recomputation
    /// as fits, the one with the shortest estimated time a token.
    ///
    /// # Errors
    /// When even the smallest micro-batch with everything recomputed does not fit; the error names its need.
    pub fn run(&self) -> Result<(Plan, PlanChoice), PlanningError> {
        let sizes = &self.target.micro_sizes;
        let cover = |tokens: usize| sizes.iter().copied().find(|&size| size >= tokens);
        let Some(smallest) = cover(self.longest_row).or(sizes.last().copied()) else {
            return Err(ModelError::Request("the target names no micro-batch sizes".into()).into());
        };
        let smallest = smallest.max(self.longest_row);
        let largest = cover(self.update_tokens).or(sizes.last().copied()).unwrap_or(smallest).max(smallest);
        let mut tops: Vec<usize> = sizes.iter().copied().filter(|&s| s > smallest && s <= largest).collect();
        tops.insert(0, smallest);
        // Sizes that differ little from each other are not worth a search of their own.
        let tops = thin(&tops);
        let mut best: Option<(f64, Plan, PlanChoice)> = None;
        let mut failure = None;
        for top in tops {
            match self.with_top(top) {
                Ok((plan, choice)) => {
                    let time = seconds_per_token(&plan);
                    if best.as_ref().is_none_or(|(least, ..)| time < *least) {
                        best = Some((time, plan, choice));
                    }
                }
                Err(PlanningError::Plan(error)) => failure = failure.or(Some(error)),
                Err(other) => return Err(other),
            }
        }
        match (best, failure) {
            (Some((_, plan, choice)), _) => Ok(self.give_back(plan, choice)),
            (None, Some(mut error)) => {
                if let PlanError::DoesNotFit { fits, .. } = &mut error {
                    *fits = self.settings_that_fit();
                }
                Err(error.into())
            }
            (None, None) => Err(ModelError::Request("no micro-batch size fits the rows".into()).into()),
        }
    }

    /// The plan of a choice made before, as on resume.
    ///
    /// # Errors
    /// When it does not fit any more.
    pub fn repeat(&self, choice: &PlanChoice) -> Result<Plan, PlanningError> {
        self.build(&choice.sizes, Stage::of(choice))
    }

    /// Takes back moves that earlier ones have made needless: what lowers one peak is no help once another is higher.
    fn give_back(&self, mut plan: Plan, choice: PlanChoice) -> (Plan, PlanChoice) {
        let sizes = choice.sizes.clone();
        let mut stage = Stage::of(&choice);
        let mut without = |change: &dyn Fn(&mut Stage)| {
            let mut less = stage;
            change(&mut less);
            if less == stage {
                return;
            }
            if let Ok(fitting) = self.build(&sizes, less) {
                (plan, stage) = (fitting, less);
            }
        };
        without(&|stage| stage.small_head = false);
        for parts in [8, 4, 2, 0] {
            without(&|stage| stage.mlp_chunks = stage.mlp_chunks.min(parts));
        }
        without(&|stage| stage.host_embedding = false);
        without(&|stage| stage.half_gradients = false);
        (plan, self.choice(sizes, stage))
    }

    /// Whether MLPs may work through a micro-batch in chunks of tokens: where values are computed again, on engines that
    /// share memory between buffers, and without dropout, whose masks count tokens from the start of an operation.
    fn chunks_mlp(&self) -> bool {
        let drops = matches!(&self.options.method, Method::Lora { adapter, .. } if adapter.dropout > 0.0);
        self.recompute != RecomputeChoice::None && self.target.reaches_host() && !drops
    }

    /// From fastest to leanest: first the embedding goes to the host and the gradients of trained matrices are summed in
    /// bf16 (as the weights are held, which costs digits and no time), then more and more layers give up the cheap values
    /// and then all, then MLPs work through the tokens in chunks, then the head works in small chunks, then inputs of
    /// layers wait on the host, at last the optimizer's states do.
    fn stages(&self, top: usize) -> Vec<Stage> {
        let layers = self.config.layers;
        let host = self.target.reaches_host();
        let first = match self.recompute {
            RecomputeChoice::All => layers,
            _ => 0,
        };
        let optimizer = host && self.host_optimizer == Some(true);
        let mut stages = vec![Stage { cheap: first, all: first, host_optimizer: optimizer, ..Stage::default() }];
        let mut then = |change: &dyn Fn(&mut Stage)| {
            let mut stage = stages[stages.len() - 1];
            change(&mut stage);
            stages.push(stage);
        };
        if host {
            then(&|stage| stage.host_embedding = true);
        }
        if self.options.method == Method::Full && self.target.trainable == DType::BF16 {
            then(&|stage| stage.half_gradients = true);
        }
        if self.recompute == RecomputeChoice::Auto {
            (1..=layers).for_each(|cheap| then(&|stage| stage.cheap = cheap));
            (1..=layers).for_each(|all| then(&|stage| stage.all = all));
        }
        let chunks = |tokens: usize| (1..6).map(|power| 1 << power).take_while(move |parts| top / parts >= tokens);
        if self.chunks_mlp() {
            // So many tokens fill the card, and weights are unpacked a few times more.
            chunks(4096).for_each(|parts| then(&|stage| stage.mlp_chunks = parts));
        }
        then(&|stage| stage.small_head = true);
        if self.chunks_mlp() {
            chunks(2048).last().into_iter().for_each(|parts| then(&|stage| stage.mlp_chunks = parts));
        }
        if self.recompute == RecomputeChoice::Auto && host {
            // The last layer's input is wanted at once.
            (1..layers).for_each(|offloaded| then(&|stage| stage.offloaded = offloaded));
        }
        if host && self.host_optimizer.is_none() {
            then(&|stage| stage.host_optimizer = true);
        }
        stages
    }

    fn with_top(&self, top: usize) -> Result<(Plan, PlanChoice), PlanningError> {
        let mut sizes: Vec<usize> = self.target.micro_sizes.iter().copied().filter(|&size| size < top).collect();
        sizes.push(top);
        let stages = self.stages(top);
        // Memory falls along the stages: find the first that fits. The largest micro-batch decides, for all programs share
        // the arena.
        let (mut low, mut high) = (0, stages.len() - 1);
        let build = |index: usize| self.build(&[top], stages[index]);
        match build(0) {
            Ok(_) => high = 0,
            Err(PlanningError::Plan(_)) => {}
            Err(other) => return Err(other),
        }
        while low + 1 < high {
            let middle = usize::midpoint(low, high);
            match build(middle) {
                Ok(_) => high = middle,
                Err(PlanningError::Plan(_)) => low = middle,
                Err(other) => return Err(other),
            }
        }
        // The smaller ones add their inputs, and what captured programs take; at the end there are fewer of them.
        loop {
            let (mut low, mut high) = (high, stages.len() - 1);
            match self.build(&sizes, stages[low]) {
                Err(PlanningError::Plan(_)) if low < high => {}
                Err(PlanningError::Plan(_)) if sizes.len() > 1 => {
                    sizes = every_second(&sizes);
                    continue;
                }
                outcome => return Ok((outcome?, self.choice(sizes, stages[low]))),
            }
            let mut found = match self.build(&sizes, stages[high]) {
                Err(PlanningError::Plan(_)) if sizes.len() > 1 => {
                    sizes = every_second(&sizes);
                    continue;
                }
                outcome => outcome?,
            };
            while low + 1 < high {
                let middle = usize::midpoint(low, high);
                match self.build(&sizes, stages[middle]) {
                    Ok(plan) => (found, high) = (plan, middle),
                    Err(PlanningError::Plan(_)) => low = middle,
                    Err(other) => return Err(other),
                }
            }
            return Ok((found, self.choice(sizes, stages[high])));
        }
    }

    fn choice(&self, sizes: Vec<usize>, stage: Stage) -> PlanChoice {
        PlanChoice {
            device: self.target.name.clone(),
            sizes,
            cheap_layers: stage.cheap,
            recomputed_layers: stage.all,
            offloaded_layers: stage.offloaded,
            host_embedding: stage.host_embedding,
            host_optimizer: stage.host_optimizer,
            small_head: stage.small_head,
            half_gradients: stage.half_gradients,
            mlp_chunks: stage.mlp_chunks,
        }
    }

    fn build(&self, sizes: &[usize], stage: Stage) -> Result<Plan, PlanningError> {
        let mut options = self.options.clone();
        options.sizes = sizes.to_vec();
        options.recompute = (0..self.config.layers)
            .map(|layer| match layer {
                _ if layer < stage.offloaded => Recompute::Offload,
                _ if layer < stage.all => Recompute::All,
                _ if layer < stage.cheap => Recompute::Cheap,
                _ => Recompute::None,
            })
            .collect();
        let mut target = self.target.clone();
        if stage.small_head {
            target.logits_bytes = target.logits_bytes.min(SMALL_HEAD_BYTES);
        }
        if stage.half_gradients {
            target.gradients = DType::BF16;
        }
        if stage.mlp_chunks > 1 {
            let largest = sizes.iter().copied().max().unwrap_or(1);
            target.mlp_tokens = largest.div_ceil(stage.mlp_chunks).next_multiple_of(128);
        }
        let mut workload = training_workload(self.config, &options, &target)?;
        workload.longest_document = Some(self.longest_row);
        let mut host = std::collections::BTreeSet::new();
        if stage.host_embedding {
            host.extend(plan::frozen_embeddings(&workload));
        }
        if stage.host_optimizer {
            host.extend(plan::optimizer_states(&workload));
        }
        Ok(plan::plan_with_host(workload, target, host)?)
    }

    /// Changes of one setting with which a plan fits, nearest first, as the run file spells them.
    fn settings_that_fit(&self) -> Vec<String> {
        let mut fits = Vec::new();
        let leanest = |search: &Search<'_>| {
            let sizes = &search.target.micro_sizes;
            let top = sizes.iter().copied().find(|&size| size >= search.longest_row).unwrap_or(search.longest_row);
            let stages = search.stages(top);
            search.build(&[top], stages[stages.len() - 1]).is_ok()
        };
        let cuda = self.target.engine == "cuda";
        if self.recompute != RecomputeChoice::Auto
            && leanest(&Search { recompute: RecomputeChoice::Auto, ..self.clone() })
        {
            fits.push("engine.recompute = \"auto\"".to_string());
        }
        if cuda && !self.options.eight_bit {
            let options = TrainingOptions { eight_bit: true, ..self.options.clone() };
            if leanest(&Search { options, ..self.clone() }) {
                fits.push("train.optimizer = \"adamw8bit\"".to_string());
            }
        }
        let mut length = self.longest_row;
        while length > 64 {
            length /= 2;
            if leanest(&Search { longest_row: length, ..self.clone() }) {
                fits.push(format!("data.max_length = {length}"));
                break;
            }
        }
        let smaller = [(DType::Fp8, "engine.precision = \"fp8\""), (DType::Nf4, "method.kind = \"qlora\"")];
        for (dtype, setting) in smaller {
            if let Method::Lora { adapter, weights } = &self.options.method
                && cuda
                && weights.is_none_or(|held| held == DType::Fp8 && dtype == DType::Nf4)
            {
                let method = Method::Lora { adapter: adapter.clone(), weights: Some(dtype) };
                let options = TrainingOptions { method, ..self.options.clone() };
                if leanest(&Search { options, ..self.clone() }) {
                    fits.push(setting.to_string());
                }
            }
        }
        fits
    }
}

/// Tokens that nine of ten updates stay below, of `batch` rows drawn from these lengths: by their mean and spread.
pub fn update_tokens(lengths: &[usize], batch: usize) -> usize {
    let count = lengths.len().max(1) as f64;
    let mean = lengths.iter().sum::<usize>() as f64 / count;
    let variance = lengths.iter().map(|&length| (length as f64 - mean).powi(2)).sum::<f64>() / count;
    (mean * batch as f64 + 1.28 * (variance * batch as f64).sqrt()).ceil() as usize
}

/// Bytes of logits in a small chunk of the head: 256 rows of the largest vocabularies, under which a pass over the head's
/// weight takes longer than its product.
const SMALL_HEAD_BYTES: u64 = 64 << 20;

/// Every second of ascending sizes, the last among them.
fn every_second(sizes: &[usize]) -> Vec<usize> {
    let mut kept: Vec<usize> = sizes.iter().rev().step_by(2).copied().collect();
    kept.reverse();
    kept
}

/// Keeps the first, the last, and between them sizes at least half as large again as the one before.
fn thin(sizes: &[usize]) -> Vec<usize> {
    let mut kept: Vec<usize> = Vec::new();
    for &size in sizes {
        if kept.last().is_none_or(|&last| 2 * size >= 3 * last) {
            kept.push(size);
        }
    }
    if let Some(&last) = sizes.last()
        && kept.last() != Some(&last)
    {
        kept.push(last);
    }
    kept
}

/// Estimated time a token of the largest micro-batch.
fn seconds_per_token(plan: &Plan) -> f64 {
    plan.summary
        .programs
        .iter()
        .filter(|program| program.role == Role::Micro)
        .max_by_key(|program| program.tokens)
        .map_or(f64::INFINITY, |program| program.estimated_seconds / program.tokens as f64)
}
