//! Norms together with what LoRA branches sum over rows that they make or read (`kernels/lora_norm.cu`), on cards whose blocks
//! work in clusters: nothing passes over rows of the hidden size for the branches' sake.
//!
//! Forward, the middles of the branches that read the norm. Backward, the gradients of `a` of these, and both sums of the branch
//! below, of whose output the norm's gradient is that of.

use super::Lowering;
use super::lora::{Branch, MOST_PARTS, even, overlap, words};
use super::tiling::{Tile, WIDEST};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::compile::{Kernels, Variant};
use crate::backend::cuda::driver::{Card, failed};
use crate::backend::cuda::product::{Matrix, Products};
use crate::program::spare::gradient_ranks;
use crate::program::{Access, BufferId, DType, Lora, NormLimits, Op, Program, ProjectionBackward, Step, Workload};

/// Blocks of a cluster that every card with clusters takes.
const MOST_SLICES: usize = 8;

/// Ranks of the branch below: more have no room in registers.
const MOST_BELOW: usize = 16;

/// What the kernels take.
const LIMITS: NormLimits = NormLimits {
    most_slices: MOST_SLICES,
    // More sums than those over so many columns have no room in registers, nor have more ranks.
    widest_slice: WIDEST,
    most_ranks: 48,
    // Rows of fewer bytes are still in the L2 cache when products read them, which is no pass over memory: of 4,096 x 576 on an
    // H100, norm and product take 17 us, the kernel 24, and backward 38 and 44.
    least_bytes: 16 << 20,
};

/// How a kernel works through rows: a cluster of blocks takes them, a slice of their columns each.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Slicing {
    width: usize,
    slices: usize,
    tile: Tile,
    /// Ranks that the kernel is compiled for: of the branches that read the norm, and of that below.
    readers: usize,
    below: usize,
}

impl Slicing {
    /// For rows of so many columns; none where they have no such slices.
    fn new(columns: usize, readers: usize, below: usize, tile: Tile) -> Option<Self> {
        let slices = LIMITS.slices(columns)?;
        let [readers, below] = [readers, below].map(|rank| rank.next_multiple_of(16));
        Some(Self { width: columns / slices, slices, tile, readers, below })
    }

    fn forward(columns: usize, readers: usize) -> Option<Self> {
        Self::new(columns, readers, 0, Tile::HALF).filter(|_| readers <= LIMITS.most_ranks)
    }

    fn backward(columns: usize, readers: usize, below: usize) -> Option<Self> {
        Self::new(columns, readers, below, Tile::WHOLE).filter(|_| readers <= LIMITS.most_ranks && below <= MOST_BELOW)
    }

    /// Clusters that run at once, and no more than there are tiles: one more would run after all others.
    fn clusters(&self, clusters: &Clusters, tokens: usize) -> usize {
        (clusters[self.slices] * self.tile.blocks()).min(tokens.div_ceil(self.tile.rows)).max(1)
    }

    /// Whether as many blocks have room on a multiprocessor as are meant to.
    fn fits(&self, bytes: usize, shared: usize) -> bool {
        bytes * self.tile.blocks() <= shared
    }

    fn tile_bytes(&self) -> usize {
        self.tile.rows * (2 * self.width + 16)
    }

    /// What warps sum over their columns for `rank`.
    fn share_bytes(&self, rank: usize) -> usize {
        self.tile.shares() * self.tile.rows * rank * 4
    }

    /// What blocks of a cluster send each other: statistics of rows, sums for `rank`, barriers.
    fn exchange_bytes(&self, rank: usize) -> usize {
        8 * self.slices * (self.tile.rows + self.tile.rows.div_ceil(self.slices) * rank) + 16 * (self.tile.warps + 1)
    }

    fn forward_bytes(&self) -> usize {
        4 * self.tile_bytes() + self.share_bytes(self.readers) + self.exchange_bytes(self.readers) + 8 * self.tile.rows
    }

    fn backward_bytes(&self) -> usize {
        let thin = |rank: usize| if rank > 0 { 2 * self.tile.rows * (2 * rank + 16) } else { 0 };
        // Shares go over a tile where they fit.
        let shares = Some(self.share_bytes(self.below)).filter(|&bytes| bytes > self.tile_bytes()).unwrap_or(0);
        6 * self.tile_bytes() + thin(self.below) + thin(self.readers) + shares + self.exchange_bytes(self.below)
    }

    fn variant(&self, pass: &'static str, weight: DType) -> Variant {
        let numbers = [
            (pass, 1),
            ("WIDTH", self.width),
            ("SLICES", self.slices),
            ("READERS", self.readers),
            ("RANK", self.below),
        ];
        let numbers = numbers.into_iter().chain(self.tile.defines());
        let mut defines: Vec<_> = numbers.map(|(name, value)| (name, value.to_string())).collect();
        defines.push(("WEIGHT", if weight == DType::F32 { "float" } else { "bf16" }.to_string()));
        Variant { file: "lora_norm", defines }
    }
}

/// Norms whose result the backward pass does without; none on cards that have no clusters, or too little shared memory.
pub(in crate::backend::cuda) fn limits(has_clusters: bool, shared: usize) -> Option<NormLimits> {
    let widest = Slicing::backward(WIDEST * MOST_SLICES, LIMITS.most_ranks, MOST_BELOW);
    let fits = widest.is_some_and(|slicing| slicing.fits(slicing.backward_bytes(), shared));
    (has_clusters && fits).then_some(LIMITS)
}

pub(in crate::backend::cuda) fn has_clusters(card: &Card) -> bool {
    card.capability >= (9, 0)
}

/// Clusters that run at once, by their blocks, where a block has a multiprocessor to itself.
pub(in crate::backend::cuda) type Clusters = [usize; MOST_SLICES + 1];

/// Those of a card: multiprocessors that are left over are in no whole cluster. An H100's 132 take 15 clusters of 8 blocks and 30 of 4.
///
/// # Errors
/// When the kernel that is asked about does not load.
pub(in crate::backend::cuda) fn clusters(
    card: &Card,
    kernels: &mut Kernels,
    products: &mut Products,
) -> Result<Clusters, EngineError> {
    let mut clusters = [0; MOST_SLICES + 1];
    if has_clusters(card) {
        let kernel = kernels.function(&"cast".into(), "fill_noise")?;
        for (blocks, count) in clusters.iter_mut().enumerate().skip(1) {
            let about = || card.multiprocessors as usize * 10 / 11 / blocks;
            *count = products.clusters(blocks, || card.clusters(kernel, blocks).unwrap_or_else(about));
        }
        tracing::debug!("clusters at once, by blocks: {:?}", &clusters[1..]);
    }
    Ok(clusters)
}

/// The branches of the linear operation that reads a norm, if they are all without dropout and of ranks that kernels take.
fn readers<'a>(op: &Op, next: Option<&'a Op>) -> Option<Vec<&'a Lora>> {
    let (Op::RmsNorm { output, .. }, Some(Op::Linear { input, projections })) = (op, next) else { return None };
    let loras: Vec<&Lora> = projections.iter().filter_map(|projection| projection.lora.as_ref()).collect();
    let takes = |lora: &&Lora| lora.dropout.is_none() && lora.middle.width.is_multiple_of(8);
    let all = input == output && loras.iter().all(takes) && (1..=MOST_PARTS).contains(&loras.len());
    all.then_some(loras)
}

/// The gradient of the linear operation that read a norm, if that of the norm at `at` comes directly after.
fn read_by(program: &Program, at: usize) -> Option<&[ProjectionBackward]> {
    let Op::RmsNormBackward { grad_output, input: normed, weight: of_norm, grad_weight: None, .. } =
        &program.steps.get(at)?.op
    else {
        return None;
    };
    let Op::LinearBackward { input, grad_input: Some(grad_input), projections } = &program.steps[at.checked_sub(1)?].op
    else {
        return None;
    };
    let made = program.steps[..at].iter().rev().find_map(|step| match &step.op {
        Op::RmsNorm { input: given, sum, weight, output, .. } if output == input => {
            Some((sum.unwrap_or(*given), *weight))
        }
        _ => None,
    });
    (grad_input == grad_output && made == Some((*normed, *of_norm))).then_some(projections)
}

/// The gradient of the linear operation of whose output that of the norm at `at` is the gradient, where the middle of its branch
/// is there by then.
fn below<'a>(workload: &Workload, program: &'a Program, at: usize) -> Option<&'a [ProjectionBackward]> {
    let Op::RmsNormBackward { grad_input, grad_weight: None, .. } = &program.steps.get(at)?.op else { return None };
    let mut later = program.steps[at + 1..].iter().enumerate();
    let (distance, projections) = later.find_map(|(distance, step)| match &step.op {
        Op::LinearBackward { grad_input: Some(_), projections, .. } => {
            let takes = |projection: &ProjectionBackward| projection.grad_output.buffer == *grad_input;
            projections.iter().any(takes).then_some((distance, projections))
        }
        _ => None,
    })?;
    let [ProjectionBackward { lora: Some(lora), grad_output, .. }] = projections.as_slice() else { return None };
    let writes = |op: &Op| op.accesses().iter().any(|&(id, access)| id == lora.middle.buffer && access != Access::Read);
    let (before, between) = (&program.steps[..at], &program.steps[at + 1..=at + distance]);
    let given = !workload.buffer(lora.middle.buffer).kind.is_transient();
    let ready = (given || before.iter().any(|step| writes(&step.op))) && !between.iter().any(|step| writes(&step.op));
    (ready && grad_output.start == 0).then_some(projections)
}

/// Ranks of branches over which a norm's gradient sums: of those that read it together, and of that below.
fn backward_ranks(workload: &Workload, program: &Program, at: usize) -> (usize, usize) {
    let ranks = |projections: Option<&[ProjectionBackward]>| {
        projections.and_then(|projections| gradient_ranks(workload, projections)).unwrap_or(0)
    };
    let readers = ranks(read_by(program, at).filter(|projections| projections.len() <= MOST_PARTS));
    let below = Some(ranks(below(workload, program, at))).filter(|&rank| rank <= MOST_BELOW).unwrap_or(0);
    (if readers <= LIMITS.most_ranks { readers } else { 0 }, below)
}

/// Kernel files that the norms of a program most likely take.
pub(in crate::backend::cuda) fn files(card: &Card, workload: &Workload, program: &Program) -> Vec<Variant> {
    if !has_clusters(card) {
        return Vec::new();
    }
    let stored = |weight: BufferId| match workload.buffer(weight).dtype {
        DType::F16 => DType::F32,
        dtype => dtype,
    };
    let file = |at: usize| match &program.steps[at].op {
        op @ Op::RmsNorm { input, weight, .. } => {
            let loras = readers(op, program.steps.get(at + 1).map(|next| &next.op))?;
            let rank = loras.iter().map(|lora| lora.middle.width).sum();
            let slicing = Slicing::forward(workload.buffer(*input).columns(), rank)?;
            let fits = slicing.fits(slicing.forward_bytes(), card.shared_bytes);
            (fits && 2 * workload.buffer(*input).elements() >= LIMITS.least_bytes)
                .then(|| slicing.variant("FORWARD", stored(*weight)))
        }
        Op::RmsNormBackward { input, weight, .. } => {
            let (readers, below) = backward_ranks(workload, program, at);
            let slicing = Slicing::backward(workload.buffer(*input).columns(), readers, below)?;
            let fits = readers + below > 0 && slicing.fits(slicing.backward_bytes(), card.shared_bytes);
            (fits && 2 * workload.buffer(*input).elements() >= LIMITS.least_bytes)
                .then(|| slicing.variant("BACKWARD", stored(*weight)))
        }
        _ => None,
    };
    (0..program.steps.len()).filter_map(file).collect()
}

/// The branches that read a norm, whose gradients of `a` come with its own.
#[derive(Clone)]
pub(super) struct Above {
    /// `[T, ranks]`, of the branches beside each other.
    grad_middles: Matrix,
    /// f32 `[r, K]` each.
    grad_a: Vec<Matrix>,
}

/// How the gradient of a norm is made with sums of branches.
struct Summed {
    slicing: Slicing,
    above: Option<Above>,
    /// Whether what `above` needs lies where the result is written.
    aside: bool,
    below: Option<Branch>,
}

impl Lowering<'_> {
    /// The launch of a norm with the middles of the branches that read it, if the kernel takes both.
    pub(super) fn norm_with_branches(&mut self, op: &Op, next: Option<&Op>) -> Result<bool, EngineError> {
        let Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon, weight_offset } = op else {
            return Ok(false);
        };
        let Some(loras) = readers(op, next).filter(|_| has_clusters(self.card)) else { return Ok(false) };
        let (from, to) = (self.matrix(*input), self.matrix(*output));
        let rank: usize = loras.iter().map(|lora| lora.middle.width).sum();
        let Some(slicing) = Slicing::forward(to.columns, rank) else { return Ok(false) };
        let others: Vec<Matrix> = residual.iter().chain(sum).map(|&id| self.matrix(id)).collect();
        let factors = loras.iter().flat_map(|lora| [self.matrix(lora.a), self.columns(lora.middle)]);
        let all: Vec<Matrix> = [from, to].into_iter().chain(others.iter().copied()).chain(factors).collect();
        let takes = 2 * to.rows * to.columns >= LIMITS.least_bytes
            && all.iter().all(|&matrix| even(matrix) && matrix.dtype == DType::BF16)
            && loras.iter().all(|lora| self.matrix(lora.a).stride == to.columns)
            && others.iter().chain([&from]).all(|matrix| matrix.stride == to.columns)
            && self.clusters[slicing.slices] > 0
            && slicing.fits(slicing.forward_bytes(), self.card.shared_bytes);
        let Some(weight_type) = self.norm_weight(*weight).filter(|_| takes) else { return Ok(false) };
        // The next operation's buffers may lie over what this one reads.
        let middles: Vec<Matrix> = loras.iter().map(|lora| self.columns(lora.middle)).collect();
        let touched: Vec<Matrix> = others.iter().copied().chain([from, self.matrix(*inverse_rms)]).collect();
        let aside = middles.iter().any(|&middle| touched.iter().any(|&matrix| overlap(middle, matrix)));
        let whole = Matrix { pointer: self.products.workspace().0, stride: rank, columns: rank, ..middles[0] };
        if aside && 2 * to.rows * rank > self.products.workspace().1 as usize {
            return Ok(false);
        }
        let (mut table, mut first, mut places) = (Vec::new(), 0, Vec::new());
        for (lora, middle) in loras.iter().zip(&middles) {
            let place = if aside { whole.slice_columns(first, middle.columns) } else { *middle };
            table.extend([self.address(lora.a), place.pointer, place.stride as u64, words(first, middle.columns)]);
            first += middle.columns;
            places.push(place);
        }
        table.resize(4 * MOST_PARTS, 0);
        let given = arguments![
            from.pointer,
            self.optional(*residual),
            self.optional(*sum),
            self.address(*weight),
            to.pointer,
            to.stride as i64,
            self.address(*inverse_rms),
            table.into_boxed_slice(),
            to.rows as i32,
            *epsilon,
            *weight_offset,
        ];
        let clusters = slicing.clusters(&self.clusters, to.rows);
        let (grid, threads) = ([slicing.slices, clusters, 1], slicing.tile.threads());
        let file = slicing.variant("FORWARD", weight_type);
        self.launch_variant(&file, "lora_norm", grid, threads, slicing.forward_bytes(), given)?;
        if aside {
            for (&place, &middle) in places.iter().zip(&middles) {
                self.copy_rows(place, middle, middle.columns)?;
            }
        }
        self.summed = Some(*output);
        Ok(true)
    }

    /// The type of a norm's weight, if kernels take it.
    fn norm_weight(&self, weight: BufferId) -> Option<DType> {
        let dtype = self.memory.stored(weight);
        (matches!(dtype, DType::BF16 | DType::F32) && self.address(weight).is_multiple_of(16)).then_some(dtype)
    }

    /// The branches of the operation at `at`, the gradient of a linear one, if their gradients of `a` are left to the next, that
    /// of the norm which they read.
    pub(super) fn above(&self, program: &Program, at: usize) -> Result<Option<Above>, EngineError> {
        let above = self.candidates(program, at + 1);
        Ok(self.norm_backward_with(program, at + 1, above)?.and_then(|summed| summed.above))
    }

    fn candidates(&self, program: &Program, at: usize) -> Option<Above> {
        let projections = read_by(program, at).filter(|projections| projections.len() <= MOST_PARTS)?;
        let middles = self.room_below(projections)?.middles(projections);
        let loras = projections.iter().filter_map(|projection| projection.lora.as_ref());
        let grad_a: Vec<Matrix> = loras.map(|lora| self.matrix(lora.grad_a)).collect();
        let columns = middles.iter().map(|middle| middle.columns).sum();
        let first = middles.first()?;
        Some(Above { grad_middles: Matrix { columns, ..*first }, grad_a })
    }

    /// How the gradient of the norm at `at` is made with sums of the branches `above` and of that below it; none where there is
    /// neither, or the kernel does not take them.
    fn norm_backward_with(
        &self,
        program: &Program,
        at: usize,
        above: Option<Above>,
    ) -> Result<Option<Summed>, EngineError> {
        let Some(Op::RmsNormBackward {
            grad_output, input, weight, residual_grad, grad_input, grad_weight: None, ..
        }) = program.steps.get(at).map(|step| &step.op)
        else {
            return Ok(None);
        };
        if !has_clusters(self.card) || self.norm_weight(*weight).is_none() {
            return Ok(None);
        }
        let [gradient, normed, result] = [*grad_output, *input, *grad_input].map(|id| self.matrix(id));
        let below = match below(self.workload, program, at).and_then(|below| Some((below, self.room_below(below)?))) {
            Some((projections, room)) => {
                let whole = |branch: &Branch| branch.is_even() && branch.rank() <= MOST_BELOW;
                self.branches(projections, &room.middles(projections))?.pop().filter(whole)
            }
            None => None,
        };
        let readers = above.as_ref().map_or(0, |above| above.grad_middles.columns);
        let rank = below.as_ref().map_or(0, Branch::rank);
        let Some(slicing) = Slicing::backward(result.columns, readers, rank).filter(|_| readers + rank > 0) else {
            return Ok(None);
        };
        let clusters = slicing.clusters(&self.clusters, result.rows);
        let partial = 4 * clusters * result.columns * (readers + rank);
        let passes = usize::from(readers > 0) + usize::from(rank > 0);
        let aside = above.as_ref().is_some_and(|above| overlap(above.grad_middles, result));
        let copied = if aside { 2 * result.rows * readers } else { 0 };
        let rows = [gradient, normed];
        let takes = rows.iter().all(|matrix| matrix.stride == matrix.columns)
            && rows.into_iter().chain([result]).all(|matrix| even(matrix) && matrix.dtype == DType::BF16)
            && residual_grad.is_none_or(|id| even(self.matrix(id)) && self.matrix(id).dtype == DType::BF16)
            && above.as_ref().is_none_or(|above| above.takes(result.columns))
            && 2 * result.rows * result.columns >= LIMITS.least_bytes
            && partial <= passes * 2 * result.rows * result.columns
            && partial + copied + 256 <= self.products.workspace().1 as usize
            && self.clusters[slicing.slices] > 0
            && slicing.fits(slicing.backward_bytes(), self.card.shared_bytes);
        Ok(takes.then_some(Summed { slicing, above, aside, below }))
    }

    /// The launches of the gradient of the norm at `at` with sums of branches, if there are such.
    pub(super) fn norm_backward_with_sums(&mut self, program: &Program, at: usize) -> Result<bool, EngineError> {
        let Op::RmsNormBackward {
            grad_output,
            input,
            weight,
            inverse_rms,
            residual_grad,
            grad_input,
            weight_offset,
            ..
        } = &program.steps[at].op
        else {
            return Ok(false);
        };
        let above = self.above.take();
        let is_left = above.is_some();
        let Some(Summed { slicing, above, aside, below }) = self.norm_backward_with(program, at, above)? else {
            return match is_left {
                true => Err(failed("the gradient of a norm without those of the branches that read it")),
                false => Ok(false),
            };
        };
        let result = self.matrix(*grad_input);
        let rank = below.as_ref().map_or(0, Branch::rank);
        let clusters = slicing.clusters(&self.clusters, result.rows);
        let (workspace, mut partial_a) = (self.products.workspace().0, self.products.workspace().0);
        let mut of_below = vec![0u64; 8];
        if let Some(branch) = &below {
            of_below = branch.below_norm(workspace);
            partial_a += (4 * clusters * result.columns * branch.rank()) as u64;
        }
        let mut of_above = vec![0u64; 4];
        if let Some(above) = &above {
            let mut g = above.grad_middles;
            if aside {
                let end = partial_a + (4 * clusters * result.columns * g.columns) as u64;
                let to = Matrix { pointer: end.next_multiple_of(256), stride: g.columns, ..g };
                self.copy_rows(g, to, rank.max(above.grad_a[0].rows))?;
                g = to;
            }
            of_above = vec![g.pointer, partial_a, g.stride as u64, g.columns as u64];
        }
        let given = arguments![
            self.address(*grad_output),
            self.address(*input),
            self.address(*weight),
            self.address(*inverse_rms),
            self.optional(*residual_grad),
            residual_grad.map_or(0, |id| self.matrix(id).stride) as i64,
            result.pointer,
            result.stride as i64,
            of_below.into_boxed_slice(),
            of_above.into_boxed_slice(),
            result.rows as i32,
            *weight_offset,
        ];
        let file = slicing.variant("BACKWARD", self.memory.stored(*weight));
        let (grid, threads) = ([slicing.slices, clusters, 1], slicing.tile.threads());
        self.launch_variant(&file, "lora_norm_backward", grid, threads, slicing.backward_bytes(), given)?;
        if below.is_some() {
            self.summed_below = Some(*grad_input);
        }
        let grad_a = above.map(|above| above.grad_a).unwrap_or_default();
        let grad_b: Vec<Matrix> = below.iter().map(Branch::grad_b).collect();
        let rank = grad_a.iter().map(|matrix| matrix.rows).max().unwrap_or(0).max(rank);
        self.add_up(clusters, &[(workspace, &grad_b), (partial_a, &grad_a)], rank)?;
        Ok(true)
    }

    /// Whether the operation at `at` is a norm made for nothing but gradients of `a` that are had without it.
    pub(super) fn norm_is_left_out(&self, program: &Program, at: usize) -> Result<bool, EngineError> {
        let Op::RmsNorm { output, residual: None, inverse_rms, .. } = &program.steps[at].op else { return Ok(false) };
        if !self.workload.buffer(*output).kind.is_transient() {
            return Ok(false);
        }
        let touches = |step: &Step| step.op.accesses().iter().any(|&(id, _)| id == *output || id == *inverse_rms);
        let mut later = (at + 1..program.steps.len()).filter(|&later| touches(&program.steps[later]));
        let (Some(reader), None) = (later.next(), later.next()) else { return Ok(false) };
        let is_gradient = matches!(&program.steps[reader].op, Op::LinearBackward { input, .. } if input == output);
        Ok(is_gradient && self.above(program, reader)?.is_some())
    }
}

impl Above {
    fn takes(&self, columns: usize) -> bool {
        let whole = |matrix: &Matrix| {
            matrix.dtype == DType::F32 && matrix.stride == columns && matrix.columns == columns && even(*matrix)
        };
        even(self.grad_middles) && self.grad_a.iter().all(whole)
    }
}
