//! Columns to spare: room at the end of rows for LoRA branches beside what a product reads.
//!
//! `y = x wᵀ + s (x aᵀ) bᵀ` is one product over longer rows, `[x | s x aᵀ] · [w | b]ᵀ`, where an engine can put the branch
//! there: `y` is then written once, and the branch is added before anything is rounded. Which buffers have such rows is
//! the target's choice; their names and shapes stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use super::{BufferId, DType, Kind, Op, Projection, Target, Workload};

/// Elements of which rows and ranks are multiples, so that they are read 16 bytes at a time.
const CHUNK: usize = 8;

/// Spare columns by buffer; those of rows of another buffer are the other's.
#[derive(Clone, Debug, Default)]
pub struct Spare(BTreeMap<BufferId, usize>);

impl Spare {
    /// What the rows of a workload's buffers have to spare on a target: inputs of linear operations with LoRA branches that
    /// only norms and gated products write, and the plain weights of those operations.
    pub fn new(workload: &Workload, target: &Target) -> Self {
        let mut spare = BTreeMap::new();
        if !target.branches_beside() {
            return Self(spare);
        }
        let steps = || workload.programs.iter().flat_map(|program| &program.steps);
        let mut fixed: BTreeSet<BufferId> = BTreeSet::new();
        for step in steps() {
            let free: Vec<BufferId> = match &step.op {
                Op::RmsNorm { output, .. } | Op::Glu { output, .. } => vec![*output],
                Op::Linear { input, projections } => {
                    if branch_columns(workload, *input, projections).is_none() {
                        fixed.insert(workload.whole(*input));
                        fixed.extend(projections.iter().map(|projection| projection.weight));
                    }
                    projections.iter().map(|projection| projection.weight).chain([*input]).collect()
                }
                Op::LinearBackward { input, projections, .. } => {
                    projections.iter().map(|projection| projection.weight).chain([*input]).collect()
                }
                _ => Vec::new(),
            };
            let touched = step.op.accesses().into_iter().map(|(id, _)| id).filter(|id| !free.contains(id));
            fixed.extend(touched.map(|id| workload.whole(id)));
        }
        let linear = || {
            steps().filter_map(|step| match &step.op {
                Op::Linear { input, projections } => Some((workload.whole(*input), projections)),
                _ => None,
            })
        };
        let is_plain = |weight: &BufferId| !workload.buffer(*weight).dtype.is_quantized();
        let weights =
            |projections: &[Projection]| projections.iter().map(|projection| projection.weight).collect::<Vec<_>>();
        for (input, projections) in linear() {
            if fixed.contains(&input) || !workload.buffer(input).kind.is_transient() {
                fixed.extend(weights(projections));
            }
        }
        for (input, projections) in linear() {
            let Some(columns) = branch_columns(workload, input, projections) else { continue };
            let plain: Vec<BufferId> = weights(projections).into_iter().filter(is_plain).collect();
            let transient = workload.buffer(input).kind.is_transient();
            if !transient || fixed.contains(&input) || plain.iter().any(|weight| fixed.contains(weight)) {
                continue;
            }
            let widest = spare.entry(input).or_insert(0);
            *widest = columns.max(*widest);
            spare.extend(plain.into_iter().map(|weight| (weight, columns)));
        }
        Self(spare)
    }

    /// Spare columns of a buffer.
    pub fn of(&self, workload: &Workload, id: BufferId) -> usize {
        self.0.get(&workload.whole(id)).copied().unwrap_or(0)
    }

    /// Bytes of a buffer with what its rows have to spare.
    pub fn bytes(&self, workload: &Workload, id: BufferId) -> u64 {
        let buffer = workload.buffer(id);
        match self.of(workload, id) {
            0 => buffer.bytes(),
            spare => buffer.dtype.bytes(&[buffer.rows(), buffer.columns() + spare]),
        }
    }
}

/// Columns that the branches of a linear operation take beside its input; none where they cannot lie there: a branch that
/// drops elements reads another input, 8-bit products do not take bf16, and odd sizes cannot be read in one piece.
pub fn branch_columns(workload: &Workload, input: BufferId, projections: &[Projection]) -> Option<usize> {
    let mut columns = 0;
    for projection in projections {
        let weight = workload.buffer(projection.weight);
        if weight.dtype == DType::Fp8 || weight.kind != Kind::Weight {
            return None;
        }
        let Some(lora) = &projection.lora else { continue };
        let rank = lora.middle.width;
        let middle = workload.buffer(lora.middle.buffer).columns();
        let odd = [rank, lora.middle.start, middle].iter().any(|count| !count.is_multiple_of(CHUNK));
        if lora.dropout.is_some() || odd {
            return None;
        }
        columns += rank;
    }
    let whole = workload.buffer(input).columns().is_multiple_of(CHUNK);
    (columns > 0 && whole).then(|| columns.next_multiple_of(2 * CHUNK))
}
