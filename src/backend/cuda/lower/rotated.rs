//! The backward pass of rotary position embedding together with what LoRA branches sum over the gradients of queries, keys and
//! values (`kernels/lora_rope.cu`): nothing passes over these for the branches' sake.

use super::Lowering;
use super::lora::{Branch, MOST_PARTS, Sums};
use super::tiling::{Slice, Slices};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::compile::Variant;
use crate::program::{Columns, DType, Direction, Op};

/// What turns the gradients of queries and keys.
pub(super) struct Rotated {
    file: Variant,
    positions: u64,
    inverse_frequency: u64,
    scale: f32,
    turned: usize,
}

/// The branches of the linear operation after a rotation, of which that takes the gradients.
struct Branches {
    /// The largest.
    rank: usize,
    /// Projections, from the first on, whose gradients are turned.
    turned: usize,
}

/// The branches, where all projections have one and the rotation turns some of their gradients from end to end.
fn branches(op: &Op, next: &Op) -> Option<Branches> {
    let Op::Rope { tensor, head_dim, rotary_dim, direction: Direction::Backward, .. } = op else { return None };
    let Op::LinearBackward { projections, .. } = next else { return None };
    if tensor.start != 0 || tensor.width == 0 || rotary_dim != head_dim || projections.len() > MOST_PARTS {
        return None;
    }
    let (mut next, mut found) = (0, Branches { rank: 0, turned: 0 });
    for projection in projections {
        let Columns { buffer, start, width } = projection.grad_output;
        let lora = projection.lora.as_ref().filter(|lora| lora.dropout.is_none())?;
        let (turns, end) = (start < tensor.width, start + width);
        let whole = !turns || (width.is_multiple_of(*head_dim) && end <= tensor.width);
        if buffer != tensor.buffer || start != next || !whole {
            return None;
        }
        next = end;
        found.rank = found.rank.max(lora.middle.width);
        found.turned += usize::from(turns);
    }
    (next >= tensor.width).then_some(found)
}

/// The kernel file that a rotation takes with the operation after it.
pub(in crate::backend::cuda) fn file(shared_bytes: usize, op: &Op, next: Option<&Op>) -> Option<Variant> {
    let Op::Rope { head_dim, .. } = op else { return None };
    Slice::of_rope(*head_dim, branches(op, next?)?.rank, shared_bytes).map(|slice| slice.variant("lora_rope"))
}

impl Lowering<'_> {
    /// The launches of a rotation with the sums of the next operation's branches, if the kernel takes both.
    pub(super) fn rotated_with_branches(&mut self, op: &Op, next: Option<&Op>) -> Result<bool, EngineError> {
        let (
            Op::Rope { tensor, positions, inverse_frequency, head_dim, scale, .. },
            Some(next @ Op::LinearBackward { grad_input, projections, .. }),
        ) = (op, next)
        else {
            return Ok(false);
        };
        let Some(Branches { rank, turned }) = branches(op, next) else { return Ok(false) };
        let Some(slice) = Slice::of_rope(*head_dim, rank, self.card.shared_bytes) else { return Ok(false) };
        self.expect("rope", &[tensor.buffer], DType::BF16)?;
        self.expect("rope", &[*inverse_frequency], DType::F32)?;
        let (middles, beside) = self.grad_middles(*grad_input, projections);
        let branches = self.branches(projections, &middles)?;
        let (rows, sizes) = (self.rows(tensor.buffer), branches.iter().map(Branch::size).collect::<Vec<_>>());
        // A buffer of the next operation may lie over what this one reads: all of it is read before the first is written.
        let reads_first = |slices: &Slices| beside || slices.tokens >= rows;
        let is_even = branches.iter().all(Branch::is_even);
        let slices = Slices::both(slice, rows, &sizes, &self.room()).filter(|slices| is_even && reads_first(slices));
        let Some(slices) = slices else { return Ok(false) };
        let (positions, inverse_frequency) = (self.address(*positions), self.address(*inverse_frequency));
        let rotated = Rotated { file: slice.variant("lora_rope"), positions, inverse_frequency, scale: *scale, turned };
        self.output_sums(&branches, &Sums::Rotated(&slices, &rotated))?;
        self.summed = Some(tensor.buffer);
        Ok(true)
    }

    /// The launch over `tokens` rows from `first` on; `parts` is the kernel's table of branches, of so many slices together.
    pub(super) fn rotated_sums(
        &mut self,
        rotated: &Rotated,
        slices: &Slices,
        parts: Box<[u64]>,
        strips: usize,
        (first, tokens): (usize, usize),
    ) -> Result<(), EngineError> {
        let Rotated { file, positions, inverse_frequency, scale, turned } = rotated;
        let positions = positions + 4 * first as u64;
        let given = arguments![parts, positions, *inverse_frequency, *scale, *turned as i32, tokens as i32];
        let (grid, shared) = ([strips, slices.groups(tokens), 1], slices.slice.rope_shared_bytes());
        self.launch_variant(file, "lora_rope", grid, slices.slice.tile.threads(), shared, given)
    }
}
