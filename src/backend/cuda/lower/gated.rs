//! The gated product of an MLP together with what LoRA branches sum over its results (`kernels/lora_glu.cu`): nothing passes
//! over the widest activations for the branches' sake. In the backward pass the gradient of `a` of the branch that read
//! the product is among that; where nothing else reads a product that was to be made again, it is not made.

use super::Lowering;
use super::elementwise::is_gelu;
use super::lora::{Branch, Sums, even, only_branch};
use super::tiling::{GATED_RANKS, TILE, Tiling, compiled_rank, strip_tiles};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::compile::Variant;
use crate::backend::cuda::driver::failed;
use crate::backend::cuda::product::Matrix;
use crate::program::spare::gradient_ranks;
use crate::program::{Access, Activation, DType, Lora, Op, Program, ProjectionBackward, Step, Workload};

/// Threads of the kernels' blocks.
const THREADS: u32 = 512;

/// Kernels of `lora_glu.cu`, which are compiled apart: users wait for them.
#[derive(Clone, Copy)]
enum Pass {
    Forward,
    Backward,
    /// With the gradient of `a` of the branch that read the product.
    BackwardReader,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Pass::Forward => "FORWARD",
            Pass::Backward => "BACKWARD",
            Pass::BackwardReader => "BACKWARD_READER",
        }
    }
}

/// What the gradients of gate and up are made from.
pub(super) struct Gated {
    grad_output: Matrix,
    gate_up: Matrix,
    file: Variant,
    reader: Option<Reader>,
}

/// The branch that read a gated product, or what attention gave (`delta.rs`): `grad_a += grad_middleᵀ · product`.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    /// `[T, r]`
    pub(super) grad_middle: Matrix,
    /// f32 `[r, K]`
    pub(super) grad_a: Matrix,
}

impl Reader {
    pub(super) fn rank(&self) -> usize {
        self.grad_middle.columns
    }
}

/// The branch of the linear operation after a gated product that takes its result, where it is the only one.
fn branch<'a>(op: &Op, next: &'a Op) -> Option<&'a Lora> {
    let Op::Glu { output, .. } = op else { return None };
    only_branch(*output, next)
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

/// The kernel file that a gated product takes with the operation after it; in the backward pass most likely, by the operation
/// before it.
pub(in crate::backend::cuda) fn file(
    workload: &Workload,
    before: Option<&Op>,
    op: &Op,
    next: Option<&Op>,
) -> Option<Variant> {
    let next = next?;
    let reads = before.is_some_and(|before| reads(workload, before, op));
    let backward = if reads { Pass::BackwardReader } else { Pass::Backward };
    match op {
        Op::Glu { activation, .. } => variant(*activation, branch(op, next)?.middle.width, Pass::Forward),
        Op::GluBackward { activation, .. } => variant(*activation, branches(op, next)?, backward),
        _ => None,
    }
}

/// Whether the operation before the gradient of a gated product is that of the one that read it, with a branch whose gradient
/// may be left to the next.
fn reads(workload: &Workload, before: &Op, op: &Op) -> bool {
    let (Op::LinearBackward { grad_input, projections, .. }, Op::GluBackward { grad_output, .. }) = (before, op) else {
        return false;
    };
    *grad_input == Some(*grad_output) && projections.len() == 1 && gradient_ranks(workload, projections).is_some()
}

fn variant(activation: Activation, rank: usize, pass: Pass) -> Option<Variant> {
    let rank = compiled_rank(&GATED_RANKS, rank)?;
    let gelu = u8::from(is_gelu(activation));
    let defines = vec![("RANK", rank.to_string()), ("GELU_GATE", gelu.to_string()), (pass.name(), "1".to_string())];
    Some(Variant { file: "lora_glu", defines })
}

impl Lowering<'_> {
    /// The launches of a gated product with the sums of the next operation's branches, if the kernels take both.
    pub(super) fn gated_with_branches(&mut self, op: &Op, next: Option<&Op>) -> Result<bool, EngineError> {
        let Some((next, file)) = next.zip(file(self.workload, None, op, next)) else { return Ok(false) };
        if let Some(lora) = branch(op, next) {
            return self.glu_with_middle(op, lora, file);
        }
        self.glu_backward_with_sums(op, next)
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
        let given = arguments![
            from.pointer,
            from.stride as i64,
            to.pointer,
            to.stride as i64,
            a.pointer,
            a.stride as i64,
            self.products.workspace().0,
            to.rows as i32,
            to.columns as i32,
            middle.columns as i32,
            strip_tiles as i32,
        ];
        self.launch_variant(&file, "lora_glu", [strips, token_tiles, 1], THREADS, shared, given)?;
        self.finish_middle(middle, parts)?;
        self.summed = Some(*output);
        Ok(true)
    }

    /// The branch of the operation at `at`, the gradient of a linear one, if its gradient of `a` is left to the next, the
    /// gradient of the gated product that it read.
    pub(super) fn reader(&self, program: &Program, at: usize) -> Result<Option<Reader>, EngineError> {
        let op = |at: usize| program.steps.get(at).map(|step| &step.op);
        let Some(Op::LinearBackward { input, grad_input: Some(grad_input), projections }) = op(at) else {
            return Ok(None);
        };
        let (Some(backward @ Op::GluBackward { grad_output, gate_up, activation, .. }), Some(next)) =
            (op(at + 1), op(at + 2))
        else {
            return Ok(None);
        };
        let [ProjectionBackward { lora: Some(lora), .. }] = projections.as_slice() else { return Ok(None) };
        let made_from = program.steps[..at].iter().rev().find_map(|step| match &step.op {
            Op::Glu { gate_up, output, activation } if output == input => Some((*gate_up, *activation)),
            _ => None,
        });
        // Beside the gradient of the output what the branch sums over it outlives this operation.
        let Some(below) = self.room_below(projections) else { return Ok(None) };
        if grad_output != grad_input || made_from != Some((*gate_up, *activation)) {
            return Ok(None);
        }
        let reader = Reader { grad_middle: below.middles(projections)[0], grad_a: self.matrix(lora.grad_a) };
        Ok(self.gated_backward(backward, next, Some(reader))?.map(|_| reader))
    }

    /// Whether the operation at `at` is a gated product made for nothing but the gradient of `a` that is had without it.
    pub(super) fn is_left_out(&self, program: &Program, at: usize) -> Result<bool, EngineError> {
        let Op::Glu { output, .. } = &program.steps[at].op else { return Ok(false) };
        let reads =
            |step: &Step| step.op.accesses().iter().any(|&(id, access)| id == *output && access != Access::Write);
        let mut rest = program.steps[at + 1..].iter();
        let only =
            rest.next().is_some_and(|step| matches!(&step.op, Op::LinearBackward { input, .. } if input == output));
        let only = only && self.workload.buffer(*output).kind.is_transient() && !rest.any(reads);
        Ok(only && self.reader(program, at + 1)?.is_some())
    }

    fn glu_backward_with_sums(&mut self, op: &Op, next: &Op) -> Result<bool, EngineError> {
        let Op::GluBackward { grad_gate_up, .. } = op else { return Ok(false) };
        let reader = self.reader.take();
        let Some((branches, tiling, gated)) = self.gated_backward(op, next, reader)? else {
            return match reader {
                Some(_) => Err(failed("the gradient of a gated product without that of its reader".to_string())),
                None => Ok(false),
            };
        };
        self.output_sums(&branches, &Sums::Gated(&tiling, &gated))?;
        self.summed = Some(*grad_gate_up);
        Ok(true)
    }

    /// How the gradients of gate and up are made with the sums of their branches, and with the gradient of `a` of the branch
    /// that read the product; none where the kernels do not take them.
    fn gated_backward(
        &self,
        op: &Op,
        next: &Op,
        reader: Option<Reader>,
    ) -> Result<Option<(Vec<Branch>, Tiling, Gated)>, EngineError> {
        let (
            Op::GluBackward { grad_output, gate_up, grad_gate_up, activation },
            Op::LinearBackward { grad_input, projections, .. },
        ) = (op, next)
        else {
            return Ok(None);
        };
        let pass = if reader.is_some() { Pass::BackwardReader } else { Pass::Backward };
        let Some(file) = branches(op, next).and_then(|rank| variant(*activation, rank, pass)) else { return Ok(None) };
        self.expect("glu_backward", &[*grad_output, *gate_up, *grad_gate_up], DType::BF16)?;
        let (middles, beside) = self.grad_middles(*grad_input, projections);
        let branches = self.branches(projections, &middles)?;
        let gated = Gated { grad_output: self.matrix(*grad_output), gate_up: self.matrix(*gate_up), file, reader };
        let Gated { grad_output, gate_up, .. } = gated;
        let size = (grad_output.columns, branches[0].rank());
        let whole = |reader: &Reader| reader.grad_a.stride == reader.grad_a.columns && even(reader.grad_middle);
        let is_even = branches.iter().all(|branch| branch.is_even())
            && [grad_output, gate_up].into_iter().all(even)
            && reader.as_ref().is_none_or(whole);
        // A buffer of the next operation may lie over what this one reads: all of it is read before the first is written.
        let reads_first = |tiling: &Tiling| beside || tiling.tokens >= grad_output.rows;
        let rank = reader.map(|reader| reader.rank());
        let tiling = Tiling::gated(grad_output.rows, size, rank, &self.room()).filter(reads_first);
        Ok(tiling.filter(|_| is_even).map(|tiling| (branches, tiling, gated)))
    }

    /// The launches over `tokens` rows from `first` on; `parts` is the kernel's table of branches, `partial` where there is room
    /// for the reader's partial sums.
    pub(super) fn gated_sums(
        &mut self,
        gated: &Gated,
        tiling: &Tiling,
        parts: Box<[u64]>,
        partial: u64,
        (first, tokens): (usize, usize),
    ) -> Result<(), EngineError> {
        let from = |matrix: Matrix| matrix.slice_rows(first, tokens).pointer;
        let Gated { grad_output, gate_up, file, reader } = gated;
        let product = arguments![
            from(*grad_output),
            grad_output.stride as i64,
            from(*gate_up),
            gate_up.stride as i64,
            tokens as i32,
        ];
        let blocks = tiling.token_blocks(tokens);
        let grid = [tiling.strips(grad_output.columns), blocks, 1];
        let shared = match tiling.lean {
            true => Tiling::lean_shared_bytes(tiling.rank),
            false => Tiling::gated_shared_bytes(tiling.rank, tiling.tiles, reader.is_some()),
        };
        let mut given = arguments![parts];
        let Some(reader) = reader else {
            given.extend(product);
            return self.launch_variant(
                file,
                &format!("lora_glu_backward_{}", tiling.tiles),
                grid,
                THREADS,
                shared,
                given,
            );
        };
        let (grad_middle, rank) = (from(reader.grad_middle), reader.rank());
        let table: Box<[u64]> = [grad_middle, reader.grad_middle.stride as u64, partial, rank as u64].into();
        given.extend(arguments![table]);
        given.extend(product);
        let kind = if tiling.lean { "lean".to_string() } else { tiling.tiles.to_string() };
        let entry = format!("lora_glu_backward_reader_{kind}");
        self.launch_variant(file, &entry, grid, THREADS, shared, given)?;
        self.add_up(blocks, &[(partial, &[reader.grad_a])], tiling.rank)
    }
}
