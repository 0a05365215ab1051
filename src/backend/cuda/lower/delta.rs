//! What the gradient of attention needs first together with the gradient of `a` of the branch that read attention's output
//! (`kernels/lora_delta.cu`): one pass over the output in place of two.

use super::Lowering;
use super::gated::Reader;
use super::lora::{even, overlap};
use super::tiling::{Slice, Slices};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::compile::Variant;
use crate::backend::cuda::driver::failed;
use crate::program::spare::gradient_ranks;
use crate::program::{DType, Op, ProjectionBackward, Workload};

/// The only branch of a linear operation before the gradient of attention whose output it read.
fn branch<'a>(op: &'a Op, next: &Op) -> Option<&'a [ProjectionBackward]> {
    let Op::LinearBackward { input, grad_input: Some(_), projections } = op else { return None };
    let Op::AttentionBackward { output, .. } = next else { return None };
    (input == output && projections.len() == 1).then_some(projections)
}

/// The kernel file that such a pair most likely takes.
pub(in crate::backend::cuda) fn file(
    workload: &Workload,
    shared_bytes: usize,
    op: &Op,
    next: Option<&Op>,
) -> Option<Variant> {
    let next = next?;
    let rank = gradient_ranks(workload, branch(op, next)?)?;
    let Op::AttentionBackward { shape, .. } = next else { return None };
    Slice::of_delta(shape.head_dim, rank, shared_bytes).map(|slice| slice.variant("lora_delta"))
}

impl Lowering<'_> {
    /// The branch of the gradient of a linear operation, if its gradient of `a` is left to the next, that of attention.
    pub(super) fn attention_reader(&self, op: &Op, next: Option<&Op>) -> Option<Reader> {
        let next = next?;
        let projections = branch(op, next)?;
        let [ProjectionBackward { lora: Some(lora), .. }] = projections else { return None };
        let Op::AttentionBackward { delta, .. } = next else { return None };
        // Beside the gradient of the output what the branch sums over it outlives this operation, if nothing is written over
        // that where it is not needed any more.
        let below = self.room_below(projections)?;
        let reader = Reader { grad_middle: below.middles(projections)[0], grad_a: self.matrix(lora.grad_a) };
        let lives = !overlap(reader.grad_middle, self.matrix(*delta));
        self.delta_slices(next, &reader).filter(|_| lives).map(|_| reader)
    }

    /// How the kernel works through the output; none where it does not take it.
    fn delta_slices(&self, op: &Op, reader: &Reader) -> Option<Slices> {
        let Op::AttentionBackward { grad_output, output, shape, .. } = op else { return None };
        let (gradient, output) = (self.matrix(*grad_output), self.matrix(*output));
        let Reader { grad_middle, grad_a } = *reader;
        let is_even = [gradient, output, grad_middle, grad_a].into_iter().all(even) && reader.rank().is_multiple_of(8);
        let takes = is_even
            && [gradient, output, grad_middle].iter().all(|matrix| matrix.dtype == DType::BF16)
            && grad_a.dtype == DType::F32
            && grad_a.stride == output.columns
            && output.columns == shape.query_columns();
        let slice = Slice::of_delta(shape.head_dim, reader.rank(), self.card.shared_bytes).filter(|_| takes)?;
        Slices::one(slice, output.rows, (output.columns, reader.rank()), &self.room())
    }

    /// `delta` of the gradient of attention, and the gradient of `a` of the branch that read its output.
    pub(super) fn delta_with_branch(&mut self, op: &Op, reader: &Reader) -> Result<(), EngineError> {
        let (Some(slices), Op::AttentionBackward { grad_output, output, delta, .. }) =
            (self.delta_slices(op, reader), op)
        else {
            return Err(failed("the gradient of attention without that of its reader".to_string()));
        };
        let (gradient, output) = (self.matrix(*grad_output), self.matrix(*output));
        let (partial, groups) = (self.products.workspace().0, slices.groups(output.rows));
        let given = arguments![
            self.address(*delta),
            partial,
            gradient.pointer,
            gradient.stride as i64,
            output.pointer,
            output.stride as i64,
            reader.grad_middle.pointer,
            reader.grad_middle.stride as i64,
            output.rows as i32,
            output.columns as i32,
            reader.rank() as i32,
        ];
        let slice = slices.slice;
        let (grid, file) = ([slice.strips(output.columns), groups, 1], slice.variant("lora_delta"));
        self.launch_variant(&file, "lora_delta", grid, slice.tile.threads(), slice.tiles_bytes(), given)?;
        self.add_up(groups, &[(partial, &[reader.grad_a])], slice.rank)
    }
}
