//! Chooses micro-batch sizes and what is recomputed: the fastest plan that fits the budget.

use super::checkpoint::PlanChoice;
use crate::model::{ModelConfig, ModelError, Recompute, TrainingOptions, training_workload};
use crate::program::{Plan, PlanError, Role, Target, plan};

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
    /// Tokens of a typical update; a micro-batch need not be larger.
    pub update_tokens: usize,
    /// `[engine] recompute`: searched, nothing, everything.
    pub recompute: RecomputeChoice,
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
            (Some((_, plan, choice)), _) => Ok((plan, choice)),
            (None, Some(error)) => Err(error.into()),
            (None, None) => Err(ModelError::Request("no micro-batch size fits the rows".into()).into()),
        }
    }

    /// The plan of a choice made before, as on resume.
    ///
    /// # Errors
    /// When it does not fit any more.
    pub fn repeat(&self, choice: &PlanChoice) -> Result<Plan, PlanningError> {
        self.build(&choice.sizes, choice.cheap_layers, choice.recomputed_layers)
    }

    fn with_top(&self, top: usize) -> Result<(Plan, PlanChoice), PlanningError> {
        let mut sizes: Vec<usize> = self.target.micro_sizes.iter().copied().filter(|&size| size < top).collect();
        sizes.push(top);
        let layers = self.config.layers;
        // From fastest to leanest: more and more layers give up first the cheap values, then all.
        let stages: Vec<(usize, usize)> = match self.recompute {
            RecomputeChoice::None => vec![(0, 0)],
            RecomputeChoice::All => vec![(layers, layers)],
            RecomputeChoice::Auto => {
                (0..=layers).map(|cheap| (cheap, 0)).chain((1..=layers).map(|all| (layers, all))).collect()
            }
        };
        // Memory falls along the stages: find the first that fits.
        let (mut low, mut high) = (0, stages.len() - 1);
        let build = |index: usize| {
            let (cheap, all) = stages[index];
            self.build(&sizes, cheap, all)
        };
        if let Ok(plan) = build(0) {
            return Ok((plan, self.choice(sizes, stages[0])));
        }
        let mut found = build(high)?;
        while low + 1 < high {
            let middle = usize::midpoint(low, high);
            match build(middle) {
                Ok(plan) => {
                    found = plan;
                    high = middle;
                }
                Err(PlanningError::Plan(_)) => low = middle,
                Err(other) => return Err(other),
            }
        }
        Ok((found, self.choice(sizes, stages[high])))
    }

    fn choice(&self, sizes: Vec<usize>, (cheap_layers, recomputed_layers): (usize, usize)) -> PlanChoice {
        PlanChoice { device: self.target.name.clone(), sizes, cheap_layers, recomputed_layers }
    }

    fn build(&self, sizes: &[usize], cheap: usize, all: usize) -> Result<Plan, PlanningError> {
        let mut options = self.options.clone();
        options.sizes = sizes.to_vec();
        options.recompute = (0..self.config.layers)
            .map(|layer| match layer {
                _ if layer < all => Recompute::All,
                _ if layer < cheap => Recompute::Cheap,
                _ => Recompute::None,
            })
            .collect();
        let workload = training_workload(self.config, &options, self.target)?;
        Ok(plan::plan(workload, self.target.clone())?)
    }
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
