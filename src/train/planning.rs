//! Chooses micro-batch sizes and what is recomputed: the fastest plan that fits the budget.

use super::checkpoint::PlanChoice;
use super::nearest::settings_that_fit;
use crate::backend::{EngineError, Facts};
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
    /// With the memory that the run may take.
    pub target: Target,
    /// Bytes that the device has where the run may take less.
    pub device_memory: Option<u64>,
    /// What the engine knows of the device beyond the target; none where plans need no look at their launches.
    pub facts: Option<Facts>,
    /// Tokens of the shortest row: micro-batches that none fills need no program. 1 where it is not known.
    pub shortest_row: usize,
    /// Tokens of the longest row: the largest micro-batch must hold it.
    pub longest_row: usize,
    /// Tokens that most updates stay below ([`update_tokens`]); a micro-batch need not be larger.
    pub update_tokens: usize,
    /// `[engine] recompute`: searched, nothing, everything.
    pub recompute: RecomputeChoice,
    /// Whether the optimizer's moments lie in the host's memory; none: where nothing else helps.
    pub host_optimizer: Option<bool>,
    /// Whether rows above `data.max_length` are cut.
    pub truncates: bool,
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
    kept_attention: bool,
}

/// From fast to lean.
struct Stages {
    list: Vec<Stage>,
    /// How many of them only compute values again. The others work as the route says and move more and more to the host.
    plain: usize,
}

/// How a plan works where computing everything again is not enough.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Route {
    mlp_chunks: usize,
    small_head: bool,
    kept_attention: bool,
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
            kept_attention: choice.kept_attention,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecomputeChoice {
    Auto,
    None,
    All,
}

impl<'a> Search<'a> {
    /// A search in which a run file asks for nothing in particular, on all of the target's memory.
    pub fn new(
        config: &'a ModelConfig,
        options: TrainingOptions,
        target: Target,
        longest_row: usize,
        update_tokens: usize,
    ) -> Self {
        Self {
            config,
            options,
            target,
            device_memory: None,
            facts: None,
            shortest_row: 1,
            longest_row,
            update_tokens,
            recompute: RecomputeChoice::Auto,
            host_optimizer: None,
            truncates: true,
        }
    }
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
        let smallest = smallest.max(self.longest_micro());
        let largest = cover(self.update_tokens).or(sizes.last().copied()).unwrap_or(smallest).max(smallest);
        let mut tops: Vec<usize> = sizes.iter().copied().filter(|&s| s > smallest && s <= largest).collect();
        tops.insert(0, smallest);
        // Sizes that differ little from each other are not worth a search of their own.
        let tops = thin(&tops);
        let mut best: Option<(f64, Plan, PlanChoice)> = None;
        let mut failure = None;
        for top in tops {
            let found = match self.with_top(top) {
                // Inputs of layers may have taken the host's memory that the optimizer's states need.
                Err(PlanningError::Plan(PlanError::HostTooSmall { .. })) if self.host_optimizer.is_none() => {
                    self.with_host_optimizer().with_top(top)
                }
                found => found,
            };
            match found {
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
                if let PlanError::DoesNotFit { fits, .. }
                | PlanError::HostTooSmall { fits, .. }
                | PlanError::Refused { fits, .. } = &mut error
                {
                    *fits = settings_that_fit(self);
                }
                if let PlanError::DoesNotFit { target, .. } = &mut error
                    && self.device_memory.is_some_and(|all| self.target.memory.is_some_and(|budget| budget < all))
                {
                    *target = "engine.vram".into();
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
    /// and then all, then the plan goes its route and inputs of layers wait on the host, at last the optimizer's states do.
    fn stages(&self, route: Route) -> Stages {
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
        let table = self.target.compute.bytes(&[self.config.vocab_size, self.config.hidden_size]);
        if host && self.target.host_memory.is_none_or(|memory| table <= memory) {
            then(&|stage| stage.host_embedding = true);
        }
        if self.options.method == Method::Full && self.target.trainable == DType::BF16 {
            then(&|stage| stage.half_gradients = true);
        }
        if self.recompute == RecomputeChoice::Auto {
            (1..=layers).for_each(|cheap| then(&|stage| stage.cheap = cheap));
            (1..=layers).for_each(|all| then(&|stage| stage.all = all));
        }
        let plain = stages.len();
        let mut then = |change: &dyn Fn(&mut Stage)| {
            let mut stage = stages[stages.len() - 1];
            (stage.mlp_chunks, stage.small_head) = (route.mlp_chunks, route.small_head);
            stage.kept_attention = route.kept_attention;
            change(&mut stage);
            stages.push(stage);
        };
        then(&|_| {});
        if self.recompute == RecomputeChoice::Auto && host {
            // The last layer's input is wanted at once.
            (1..layers).for_each(|offloaded| then(&|stage| stage.offloaded = offloaded));
        }
        if host && self.host_optimizer.is_none() {
            then(&|stage| stage.host_optimizer = true);
        }
        Stages { list: stages, plain }
    }

    /// MLPs work through the tokens in chunks, which shortens products and unpacks weights anew for each; the head works in
    /// small chunks, each a pass over its weight; attention's output is kept, which takes as much memory as the inputs.
    fn routes(&self, top: usize) -> Vec<Route> {
        let mut chunks = vec![0];
        if self.chunks_mlp() {
            // So many tokens fill the card.
            chunks.extend((1..6).map(|power| 1 << power).take_while(|parts| top / parts >= 2048));
        }
        let mut routes = Vec::new();
        for mlp_chunks in chunks {
            let route = Route { mlp_chunks, ..Route::default() };
            routes.push(route);
            if self.recompute == RecomputeChoice::Auto && self.target.reaches_host() {
                routes.push(Route { kept_attention: true, ..route });
            }
            routes.push(Route { small_head: true, ..route });
        }
        routes
    }

    /// Of the routes on which the largest micro-batch fits, the fastest by the estimate; the leanest where it fits on none.
    fn route(&self, top: usize) -> Result<Route, PlanningError> {
        let routes = self.routes(top);
        let mut best: Option<(f64, Route)> = None;
        for alike in routes.chunk_by(|a, b| a.mlp_chunks == b.mlp_chunks) {
            let before = best;
            for &route in alike {
                let Stages { list, plain } = self.stages(route);
                let Some((plan, _)) = self.first_that_fits(&[top], &list, plain)? else { continue };
                let time = plan.summary.programs.iter().map(|program| program.estimated_seconds).sum::<f64>();
                if best.is_none_or(|(least, _)| time < least) {
                    best = Some((time, route));
                }
            }
            // Smaller chunks would be slower still.
            if before.is_some() && before == best {
                break;
            }
        }
        Ok(best.map(|(_, route)| route).or(routes.last().copied()).unwrap_or_default())
    }

    /// The plan of the first stage from `from` on with which these sizes fit, with its index; none where even the last does
    /// not. The device's share falls along the stages and the host's rises: where the first that fits the device is too much
    /// for the host, so are those after it.
    fn first_that_fits(
        &self,
        sizes: &[usize],
        stages: &[Stage],
        from: usize,
    ) -> Result<Option<(Plan, usize)>, PlanningError> {
        // Whether the device has room, and the plan where the host has it too.
        let fitting = |index: usize| match self.build(sizes, stages[index]) {
            Ok(plan) => Ok((true, Some(plan))),
            Err(PlanningError::Plan(PlanError::HostTooSmall { .. })) => Ok((true, None)),
            Err(PlanningError::Plan(_)) => Ok((false, None)),
            Err(other) => Err(other),
        };
        let found = |plan: Option<Plan>, index: usize| Ok(plan.map(|plan| (plan, index)));
        if let (true, plan) = fitting(from)? {
            return found(plan, from);
        }
        let (mut low, mut high) = (from, stages.len() - 1);
        // Of many sizes the largest fits at the first stage already, and the others add little.
        if sizes.len() > 1 && low + 1 < high {
            low += 1;
            if let (true, plan) = fitting(low)? {
                return found(plan, low);
            }
        }
        if low == high {
            return Ok(None);
        }
        let (true, mut plan) = fitting(high)? else { return Ok(None) };
        while low + 1 < high {
            let middle = usize::midpoint(low, high);
            match fitting(middle)? {
                (true, leaner) => (plan, high) = (leaner, middle),
                (false, _) => low = middle,
            }
        }
        found(plan, high)
    }

    fn with_top(&self, top: usize) -> Result<(Plan, PlanChoice), PlanningError> {
        let mut sizes: Vec<usize> = self.target.micro_sizes.iter().copied().filter(|&size| size < top).collect();
        sizes.push(top);
        let mut sizes = within_reach(&sizes, self.shortest_row, self.longest_row);
        // The largest micro-batch decides, for all programs share the arena.
        let Stages { list, plain } = self.stages(Route::default());
        let (stages, from) = match self.first_that_fits(&[top], &list[..plain], 0)? {
            Some((_, index)) => (list, index),
            None => {
                let Stages { list, plain } = self.stages(self.route(top)?);
                let index = self.first_that_fits(&[top], &list, plain)?.map_or(list.len() - 1, |(_, index)| index);
                (list, index)
            }
        };
        // The smaller ones add their inputs, and what captured programs take; at the end there are fewer of them.
        loop {
            if let Some((plan, index)) = self.first_that_fits(&sizes, &stages, from)? {
                return Ok((plan, self.choice(sizes, stages[index])));
            }
            if sizes.len() == 1 {
                let last = stages[stages.len() - 1];
                return Ok((self.build(&sizes, last)?, self.choice(sizes, last)));
            }
            sizes = every_second(&sizes);
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
            kept_attention: stage.kept_attention,
        }
    }

    fn build(&self, sizes: &[usize], stage: Stage) -> Result<Plan, PlanningError> {
        let mut options = self.options.clone();
        options.sizes = sizes.to_vec();
        options.recompute = (0..self.config.layers)
            .map(|layer| match layer {
                _ if layer < stage.offloaded && stage.kept_attention => Recompute::OffloadWithAttention,
                _ if layer < stage.offloaded => Recompute::Offload,
                _ if layer < stage.all && stage.kept_attention => Recompute::AllButAttention,
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
        let plan = plan::plan_with_host(workload, target, host)?;
        let Some(facts) = &self.facts else { return Ok(plan) };
        let refused = |error: EngineError| PlanError::Refused { what: error.to_string(), fits: Vec::new() };
        let bytes = facts.workspace(&plan).map_err(refused)?;
        Ok(plan.with_workspace(bytes)?)
    }

    /// Tokens of a micro-batch for the longest row, where that is beyond the usual sizes.
    fn longest_micro(&self) -> usize {
        self.longest_row.next_multiple_of(self.target.token_unit())
    }

    /// Whether the longest row fits somehow: the way that takes the least, and what the host can hold of it.
    pub(super) fn fits_somehow(&self) -> bool {
        let sizes = &self.target.micro_sizes;
        let top = sizes.iter().copied().find(|&size| size >= self.longest_row).unwrap_or(self.longest_micro());
        let route = self.routes(top).last().copied().unwrap_or_default();
        let fits = |search: &Self| matches!(search.first_that_fits(&[top], &search.stages(route).list, 0), Ok(Some(_)));
        fits(self) || self.host_optimizer.is_none() && fits(&self.with_host_optimizer())
    }

    /// The search with the optimizer's states on the host before anything else goes there.
    fn with_host_optimizer(&self) -> Self {
        Self { host_optimizer: Some(true), ..self.clone() }
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

/// Those of ascending sizes that rows of these lengths ever fill: a number of rows that has its place in one size, but not in the size
/// before. The last among them.
fn within_reach(sizes: &[usize], shortest: usize, longest: usize) -> Vec<usize> {
    let longest = longest.max(1);
    let shortest = shortest.clamp(1, longest);
    let below = [0].into_iter().chain(sizes.iter().copied());
    let mut reached: Vec<usize> = below
        .zip(sizes)
        // The fewest rows that may be more than the size before.
        .filter(|&(before, &size)| (before / longest + 1) * shortest <= size)
        .map(|(_, &size)| size)
        .collect();
    if reached.last() != sizes.last() {
        reached.extend(sizes.last());
    }
    reached
}

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

#[cfg(test)]
mod tests {
    use super::within_reach;

    #[test]
    fn only_sizes_that_rows_fill_have_programs() {
        let sizes = [256, 512, 1024, 2048, 2560, 3072, 4096];
        assert_eq!(within_reach(&sizes, 2048, 2048), [2048, 4096]);
        assert_eq!(within_reach(&sizes, 1, 2048), sizes);
        // One row, or two, or three.
        assert_eq!(within_reach(&sizes, 1000, 1100), [1024, 2048, 2560, 3072, 4096]);
        assert_eq!(within_reach(&sizes, 4000, 4096), [4096]);
        // The longest row decides the last, whatever else is known.
        assert_eq!(within_reach(&sizes, 5000, 100), sizes);
    }

    /// Every number of tokens that rows can add up to has the smallest size that takes it.
    #[test]
    fn rows_find_the_sizes_that_they_had() {
        let sizes: Vec<usize> = (1..=16).map(|tiles| 128 * tiles).collect();
        for (shortest, longest) in [(1, 128), (100, 130), (129, 129), (300, 700), (2048, 2048)] {
            let reached = within_reach(&sizes, shortest, longest);
            let smallest = |sizes: &[usize], tokens: usize| sizes.iter().copied().find(|&size| size >= tokens);
            for rows in 1..=16 {
                for tokens in rows * shortest..=(rows * longest).min(2048) {
                    assert_eq!(
                        smallest(&reached, tokens),
                        smallest(&sizes, tokens),
                        "{tokens} of {shortest} to {longest}"
                    );
                }
            }
        }
    }
}
