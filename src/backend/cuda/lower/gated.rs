//! The gated product of an MLP together with what the LoRA branches of the next operation sum over its results
//! (`kernels/lora_glu.cu`): nothing passes over the widest activations for the branches' sake.

use super::Lowering;
use super::elementwise::is_gelu;
use super::lora::even;
use super::tiling::{GATED_RANKS, TILE, Tiling, compiled_rank, strip_tiles};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::compile::Variant;
use crate::backend::cuda::product::Matrix;
use crate::program::{Activation, DType, Lora, Op, Projection, ProjectionBackward};

/// Threads of the kernels' blocks.
const THREADS: u32 = 512;

/// What the gradients of gate and up are made from.
pub(super) struct Gated {
    grad_output: Matrix,
    gate_up: Matrix,
    file: Variant,
}

/// The branch of the linear operation after a gated product that takes its result, where it is the only one.
fn branch<'a>(op: &Op, next: &'a Op) -> Option<&'a Lora> {
    let (Op::Glu { output, .. }, Op::Linear { input, projections }) = (op, next) else { return None };
    let [Projection { lora: Some(lora), .. }] = projections.as_slice() else { return None };
    (input == output && lora.dropout.is_none()).then_some(lora)
}

/// The rank of the branches of gate and up, where both have one and the next operation takes their gradients.
fn branches(op: &Op, next: &Op) -> Option<usize> {
    let (Op::GluBackward { grad_gate_up, .. }, Op::LinearBackward { projections, .. }) = (op, next) else {
        return None;
    };
    let [gate, up] = projections.as_slice() else { return None };
    let (of_gate, of_up) = (gate.grad_output, up.grad_output);
    let beside = of_gate.start == 0 && of_up.start == of_gate.width && of_up.width == of_gate.width;
    let rank = |projection: &ProjectionBackward| {
        let lora = projection.lora.as_ref().filter(|lora| lora.dropout.is_none())?;
        (projection.grad_output.buffer == *grad_gate_up).then_some(lora.middle.width)
    };
    rank(gate).filter(|_| beside && rank(gate) == rank(up))
}

/// The kernel file that a gated product takes with the operation after it.
pub(in crate::backend::cuda) fn file(op: &Op, next: Option<&Op>) -> Option<Variant> {
    let next = next?;
    let rank = branch(op, next).map(|lora| lora.middle.width).or(branches(op, next))?;
    let (Op::Glu { activation, .. } | Op::GluBackward { activation, .. }) = op else { return None };
    variant(*activation, rank)
}

fn variant(activation: Activation, rank: usize) -> Option<Variant> {
    let rank = compiled_rank(&GATED_RANKS, rank)?;
    let gelu = u8::from(is_gelu(activation));
    Some(Variant { file: "lora_glu", defines: vec![("RANK", rank.to_string()), ("GELU_GATE", gelu.to_string())] })
}

impl Lowering<'_> {
    /// The launches of a gated product with the sums of the next operation's branches, if the kernels take both.
    pub(super) fn gated_with_branches(&mut self, op: &Op, next: Option<&Op>) -> Result<bool, EngineError> {
        let Some((next, file)) = next.zip(file(op, next)) else { return Ok(false) };
        if let Some(lora) = branch(op, next) {
            return self.glu_with_middle(op, lora, file);
        }
        self.glu_backward_with_sums(op, next, file)
    }

    fn glu_with_middle(&mut self, op: &Op, lora: &Lora, file: Variant) -> Result<bool, EngineError> {
        let Op::Glu { gate_up, output, .. } = op else { return Ok(false) };
        self.expect("glu", &[*gate_up, *output, lora.a, lora.middle.buffer], DType::BF16)?;
        let (from, to) = (self.matrix(*gate_up), self.matrix(*output));
        let (a, middle, room) = (self.matrix(lora.a), self.columns(lora.middle), self.room());
        let (column_tiles, token_tiles) = (to.columns.div_ceil(TILE), to.rows.div_ceil(TILE));
        let strip_tiles = strip_tiles(column_tiles, token_tiles, room.multiprocessors);
        let strips = column_tiles.div_ceil(strip_tiles);
        let parts = 2 * strips;
        let partial_bytes = parts * to.rows * middle.columns * 4;
        let Some(compiled) = compiled_rank(&GATED_RANKS, middle.columns) else { return Ok(false) };
        // A tile of the result, and of a.
        let shared = 2 * TILE * TILE + compiled * (2 * TILE + 16);
        // Of fewer tokens, as in generation, a block would be mostly empty.
        let takes = to.rows >= TILE
            && [from, to, a, middle].into_iter().all(even)
            && [to.columns, middle.columns].iter().all(|size| size.is_multiple_of(8))
            && shared <= room.shared
            && partial_bytes <= room.workspace.min(2 * to.rows * to.columns);
        if !takes {
            return Ok(false);
        }
        let partial = self.products.workspace().0;
        let (tokens, rank) = (to.rows as i32, middle.columns as i32);
        let given = arguments![
            from.pointer,
            from.stride as i64,
            to.pointer,
            to.stride as i64,
            a.pointer,
            a.stride as i64,
            partial,
            tokens,
            to.columns as i32,
            rank,
            strip_tiles as i32,
        ];
        self.launch_variant(&file, "lora_glu", [strips, token_tiles, 1], THREADS, shared, given)?;
        let given = arguments![partial, parts as i32, middle.pointer, middle.stride as i64, tokens, rank];
        let blocks = (to.rows * middle.columns / 4).div_ceil(256);
        self.launch_variant(&file, "lora_glu_finish", [blocks, 1, 1], 256, 0, given)?;
        self.summed = Some(*output);
        Ok(true)
    }

    fn glu_backward_with_sums(&mut self, op: &Op, next: &Op, file: Variant) -> Result<bool, EngineError> {
        let (
            Op::GluBackward { grad_output, gate_up, grad_gate_up, .. },
            Op::LinearBackward { grad_input, projections, .. },
        ) = (op, next)
        else {
            return Ok(false);
        };
        self.expect("glu_backward", &[*grad_output, *gate_up, *grad_gate_up], DType::BF16)?;
        let below = grad_input.and_then(|_| self.room_below(projections));
        let beside = below.is_some();
        let middles = match below {
            Some(below) => below.middles(projections),
            None => {
                let loras = projections.iter().filter_map(|projection| projection.lora.as_ref());
                loras.map(|lora| self.columns(lora.grad_middle)).collect()
            }
        };
        let branches = self.branches(projections, &middles)?;
        let gated = Gated { grad_output: self.matrix(*grad_output), gate_up: self.matrix(*gate_up), file };
        let Gated { grad_output, gate_up, .. } = gated;
        let size = (grad_output.columns, branches[0].rank());
        let is_even = branches.iter().all(|branch| branch.is_even()) && even(grad_output) && even(gate_up);
        // A buffer of the next operation may lie over what this one reads: all of it is read before the first is written.
        let reads_first = |tiling: &Tiling| beside || tiling.tokens >= grad_output.rows;
        let tiling = Tiling::gated(grad_output.rows, size, &self.room()).filter(reads_first).filter(|_| is_even);
        let Some(tiling) = tiling else { return Ok(false) };
        self.output_sums(&branches, &tiling, Some(&gated))?;
        self.summed = Some(*grad_gate_up);
        Ok(true)
    }

    /// The launch over `tokens` rows from `first` on; `parts` is the kernel's table of branches.
    pub(super) fn gated_sums(
        &mut self,
        gated: &Gated,
        tiling: &Tiling,
        parts: Box<[u64]>,
        (first, tokens): (usize, usize),
    ) -> Result<(), EngineError> {
        let from = |matrix: Matrix| matrix.slice_rows(first, tokens).pointer;
        let given = arguments![
            parts,
            from(gated.grad_output),
            gated.grad_output.stride as i64,
            from(gated.gate_up),
            gated.gate_up.stride as i64,
            tokens as i32,
        ];
        let grid = [tiling.strips(gated.grad_output.columns), tiling.token_blocks(tokens), 1];
        let shared = Tiling::gated_shared_bytes(tiling.rank, tiling.tiles);
        self.launch_variant(&gated.file, &format!("lora_glu_backward_{}", tiling.tiles), grid, THREADS, shared, given)
    }
}
