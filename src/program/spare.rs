//! Room for LoRA branches beside what a product reads: columns at the end of rows, and rows below the last.
//!
//! `y = x wᵀ + s (x aᵀ) bᵀ` is one product over longer rows, `[x | s x aᵀ] · [w | b]ᵀ`, and with `g = s grad_y b` the gradient
//! of its input is `[grad_y | g] · [w; a]`, where an engine can put the branch there: each result is then written once, and
//! the branch is added before anything is rounded. Which buffers have such room is the target's choice; their names and
//! shapes stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use super::{BufferId, Columns, DType, Kind, Lora, LoraBackward, Op, Program, Projection, ProjectionBackward};
use super::{Target, Workload};

/// Elements of which rows and ranks are multiples, so that they are read 16 bytes at a time.
const CHUNK: usize = 8;

/// Spare columns are multiples of this many, so that long rows begin at multiples of 128 bytes: a step of an 8B model takes 2%
/// longer where they begin at multiples of 32.
const LINE: usize = 64;

/// Spare columns and rows by buffer; those of rows of another buffer are the other's.
#[derive(Clone, Debug, Default)]
pub struct Spare {
    columns: BTreeMap<BufferId, usize>,
    rows: BTreeMap<BufferId, usize>,
}

impl Spare {
    /// The room that a workload's buffers have on a target: beside inputs and output gradients of linear operations with
    /// LoRA branches, where all that touches them takes rows that lie apart, beside the plain weights of those operations,
    /// and below the last of them.
    pub fn new(workload: &Workload, target: &Target) -> Self {
        let mut spare = Self::default();
        if !target.branches_beside() {
            return spare;
        }
        let mut fixed = touched_as_one_piece(workload);
        let is_plain = |weight: &BufferId| !workload.buffer(*weight).dtype.is_quantized();
        let may_grow =
            |id: BufferId, fixed: &BTreeSet<BufferId>| workload.buffer(id).kind.is_transient() && !fixed.contains(&id);
        let linear = || {
            steps(workload).filter_map(|op| match op {
                Op::Linear { input, projections } => Some((workload.whole(*input), projections)),
                _ => None,
            })
        };
        // Weights have room beside them only where every operation that multiplies them puts a branch there.
        for (input, projections) in linear() {
            if branch_columns(workload, projections).is_none() || !may_grow(input, &fixed) {
                fixed.extend(projections.iter().map(|projection| projection.weight));
            }
        }
        for (input, projections) in linear() {
            let Some(columns) = branch_columns(workload, projections) else { continue };
            let weights = projections.iter().map(|projection| projection.weight);
            let plain: Vec<BufferId> = weights.filter(is_plain).collect();
            if may_grow(input, &fixed) && !plain.iter().any(|weight| fixed.contains(weight)) {
                spare.widen(input, columns);
                plain.into_iter().for_each(|weight| spare.widen(weight, columns));
            }
        }
        // A gradient over what it was made from has rows of the same length.
        let in_place: BTreeMap<BufferId, BufferId> = steps(workload)
            .filter_map(|op| match op {
                Op::GluBackward { gate_up, grad_gate_up, .. } => Some((*grad_gate_up, *gate_up)),
                _ => None,
            })
            .collect();
        for op in steps(workload) {
            let Op::LinearBackward { grad_input: Some(_), projections, .. } = op else { continue };
            let Some(ranks) = gradient_ranks(workload, projections) else { continue };
            let columns = ranks.next_multiple_of(LINE);
            let Some(last) = projections.last() else { continue };
            let gradient = workload.whole(last.grad_output.buffer);
            let origin = in_place.get(&gradient).copied();
            if !may_grow(gradient, &fixed) || origin.is_some_and(|origin| !may_grow(origin, &fixed)) {
                continue;
            }
            spare.widen(gradient, columns);
            if let Some(origin) = origin {
                spare.widen(origin, columns);
            }
            if is_plain(&last.weight) {
                let rows = spare.rows.entry(last.weight).or_insert(0);
                *rows = ranks.max(*rows);
            }
        }
        spare
    }

    fn widen(&mut self, id: BufferId, columns: usize) {
        let widest = self.columns.entry(id).or_insert(0);
        *widest = columns.max(*widest);
    }

    /// Spare columns of a buffer.
    pub fn columns(&self, workload: &Workload, id: BufferId) -> usize {
        self.columns.get(&workload.whole(id)).copied().unwrap_or(0)
    }

    /// Spare rows below a buffer.
    pub fn rows(&self, id: BufferId) -> usize {
        self.rows.get(&id).copied().unwrap_or(0)
    }

    /// Bytes of a buffer, held as `dtype`, with the room that it has.
    pub fn bytes(&self, workload: &Workload, id: BufferId, dtype: DType) -> u64 {
        let buffer = workload.buffer(id);
        match (self.columns(workload, id), self.rows(id)) {
            (0, 0) => dtype.bytes(&buffer.shape),
            (columns, rows) => dtype.bytes(&[buffer.rows() + rows, buffer.columns() + columns]),
        }
    }
}

fn steps(workload: &Workload) -> impl Iterator<Item = &Op> {
    workload.programs.iter().flat_map(|program: &Program| &program.steps).map(|step| &step.op)
}

/// Buffers that some operation takes only with rows end to end.
fn touched_as_one_piece(workload: &Workload) -> BTreeSet<BufferId> {
    let mut fixed = BTreeSet::new();
    for op in steps(workload) {
        let apart: Vec<BufferId> = match op {
            Op::RmsNorm { output, .. } | Op::Attention { output, .. } | Op::CachedAttention { output, .. } => {
                vec![*output]
            }
            Op::RmsNormBackward { residual_grad, grad_input, .. } => {
                residual_grad.iter().copied().chain([*grad_input]).collect()
            }
            Op::Rope { tensor, .. } => vec![tensor.buffer],
            Op::AttentionBackward { output, grad_qkv, .. } => vec![*output, *grad_qkv],
            Op::Glu { gate_up, output, .. } => vec![*gate_up, *output],
            Op::GluBackward { gate_up, grad_gate_up, .. } => vec![*gate_up, *grad_gate_up],
            // What drops elements reads the input end to end.
            Op::Linear { input, projections } => {
                let drops = projections.iter().filter_map(|p| p.lora.as_ref()).any(|lora| lora.dropout.is_some());
                let buffers = projections.iter().flat_map(|p| [p.weight, p.output.buffer]);
                buffers.chain((!drops).then_some(*input)).collect()
            }
            Op::LinearBackward { input, projections, .. } => {
                let drops = projections.iter().filter_map(|p| p.lora.as_ref()).any(|lora| lora.dropout.is_some());
                let buffers = projections.iter().flat_map(|p| [p.weight, p.grad_output.buffer]);
                buffers.chain((!drops).then_some(*input)).collect()
            }
            _ => Vec::new(),
        };
        let touched = op.accesses().into_iter().map(|(id, _)| id).filter(|id| !apart.contains(id));
        fixed.extend(touched.map(|id| workload.whole(id)));
    }
    fixed
}

/// Columns that the branches of a linear operation take beside its input; none where they cannot lie there: a branch that
/// drops elements reads another input, 8-bit products do not take bf16, and odd sizes cannot be read in one piece.
pub fn branch_columns(workload: &Workload, projections: &[Projection]) -> Option<usize> {
    let parts = projections.iter().map(|projection| {
        let lora = projection.lora.as_ref();
        (projection.weight, lora.map(|lora: &Lora| (lora.middle, lora.dropout.is_some())))
    });
    ranks(workload, parts).map(|columns| columns.next_multiple_of(LINE))
}

/// The branches' ranks together, for columns beside the gradient of the output and rows below the weights: where that gradient is a whole buffer and nothing
/// but branches is trained.
pub fn gradient_ranks(workload: &Workload, projections: &[ProjectionBackward]) -> Option<usize> {
    let mut next = 0;
    let buffer = projections.first()?.grad_output.buffer;
    for projection in projections {
        let Columns { buffer: own, start, width } = projection.grad_output;
        if own != buffer || start != next || projection.grad_weight.is_some() || projection.grad_bias.is_some() {
            return None;
        }
        next = start + width;
    }
    let parts = projections.iter().map(|projection| {
        let lora = projection.lora.as_ref();
        (projection.weight, lora.map(|lora: &LoraBackward| (lora.middle, lora.dropout.is_some())))
    });
    ranks(workload, parts).filter(|_| next == workload.buffer(buffer).columns() && next.is_multiple_of(CHUNK))
}

/// The sum of the branches' ranks; none where a weight or a branch does not fit. Parts are weights
/// with the columns of the branch's middle, and whether it drops elements.
fn ranks(workload: &Workload, parts: impl Iterator<Item = (BufferId, Option<(Columns, bool)>)>) -> Option<usize> {
    let mut columns = 0;
    for (weight, branch) in parts {
        let weight = workload.buffer(weight);
        let even = weight.columns().is_multiple_of(CHUNK);
        if weight.dtype == DType::Fp8 || weight.kind != Kind::Weight || !even {
            return None;
        }
        let Some((middle, drops)) = branch else { continue };
        let sizes = [middle.width, middle.start, workload.buffer(middle.buffer).columns()];
        if drops || sizes.iter().any(|count| !count.is_multiple_of(CHUNK)) {
            return None;
        }
        columns += middle.width;
    }
    (columns > 0).then_some(columns)
}
