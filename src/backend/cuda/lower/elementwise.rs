//! Operations bound by memory: one or two kernels each.

use std::rc::Rc;

use super::{Lowering, row_threads, vector};
use crate::backend::EngineError;
use crate::backend::cuda::command::{Command, arguments};
use crate::backend::cuda::driver::{Event, Lane, unsupported};
use crate::program::plan::PARTIAL_SUMS;
use crate::program::{Activation, BufferId, DType, Direction, Kind, Op};

/// Elements of a piece in the kernels of `cast.cu`.
const CAST_PIECE: usize = 2048;

impl Lowering<'_> {
    /// Name of the type of a small read-only tensor, as kernel entries spell it.
    fn type_name(&self, op: &str, id: BufferId) -> Result<&'static str, EngineError> {
        match self.memory.stored(id) {
            DType::BF16 => Ok("bf16"),
            DType::F32 => Ok("f32"),
            other => Err(unsupported(format!("{op} with {} in {}", self.workload.buffer(id).name, other.name()))),
        }
    }

    pub(super) fn elementwise(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Embedding { ids, weight, output, scale } => {
                self.expect("embedding", &[*output], DType::BF16)?;
                let kind = self.type_name("embedding", *weight)?;
                self.gather(*ids, *weight, *output, kind, *scale)
            }
            Op::GatherRows { input, rows, output } => {
                self.expect("gather_rows", &[*input, *output], DType::BF16)?;
                self.gather(*rows, *input, *output, "bf16", 1.0)
            }
            Op::EmbeddingBackward { ids, grad_output, grad_weight, scale } => {
                self.expect("embedding_backward", &[*grad_output], DType::BF16)?;
                let kind = self.type_name("embedding_backward", *grad_weight)?;
                let (tokens, columns) = (self.rows(*ids), self.width(*grad_weight));
                let arguments = arguments![
                    self.address(*ids),
                    self.address(*grad_output),
                    self.address(*grad_weight),
                    tokens as i32,
                    columns as i32,
                    self.rows(*grad_weight) as i32,
                    *scale,
                ];
                let entry = format!("embedding_backward_{kind}");
                self.launch("embedding", &entry, [tokens, columns.div_ceil(256), 1], 256, arguments)
            }
            Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon, weight_offset } => {
                self.expect("rms_norm", &[*input, *output], DType::BF16)?;
                self.expect("rms_norm", residual.as_slice(), DType::BF16)?;
                self.expect("rms_norm", sum.as_slice(), DType::BF16)?;
                let columns = self.width(*input);
                let pointers = [*input, *output, *weight].map(|id| self.address(id));
                let (residual, sum) = (self.optional(*residual), self.optional(*sum));
                let width = vector(columns, &pointers).min(vector(columns, &[residual, sum]));
                let entry = format!("rms_norm_{width}_{}", self.type_name("rms_norm", *weight)?);
                let arguments = arguments![
                    self.address(*input),
                    residual,
                    sum,
                    self.address(*weight),
                    self.address(*output),
                    self.matrix(*output).stride as i64,
                    self.address(*inverse_rms),
                    columns as i32,
                    *epsilon,
                    *weight_offset,
                ];
                self.launch("rms_norm", &entry, [self.rows(*input), 1, 1], row_threads(columns, width), arguments)
            }
            Op::RmsNormBackward { .. } => self.rms_norm_backward(op),
            Op::Rope { tensor, positions, inverse_frequency, head_dim, rotary_dim, scale, direction } => {
                self.expect("rope", &[tensor.buffer], DType::BF16)?;
                self.expect("rope", &[*inverse_frequency], DType::F32)?;
                let matrix = self.columns(*tensor);
                let (heads, half) = (tensor.width / head_dim, rotary_dim / 2);
                if half == 0 || matrix.rows == 0 {
                    return Ok(());
                }
                let aligned = head_dim.is_multiple_of(8) && matrix.stride.is_multiple_of(8);
                let width = if aligned { vector(half, &[matrix.pointer]) } else { 1 };
                let sign = if *direction == Direction::Forward { 1.0f32 } else { -1.0 };
                let arguments = arguments![
                    matrix.pointer,
                    matrix.stride as i64,
                    self.address(*positions),
                    self.address(*inverse_frequency),
                    heads as i32,
                    *head_dim as i32,
                    half as i32,
                    *scale,
                    sign,
                ];
                let entry = format!("rope_{width}");
                self.launch_variant(&"rope".into(), &entry, [matrix.rows, 1, 1], 256, half * 8, arguments)
            }
            Op::Glu { gate_up, output, activation } => {
                self.expect("glu", &[*gate_up, *output], DType::BF16)?;
                let columns = self.width(*output);
                let width = vector(columns, &[self.address(*gate_up), self.address(*output)]);
                let entry = format!("glu_{width}_{}", activation_name(*activation));
                let arguments = arguments![
                    self.address(*gate_up),
                    self.matrix(*gate_up).stride as i64,
                    self.address(*output),
                    self.matrix(*output).stride as i64,
                    columns as i32,
                ];
                let grid = [self.rows(*output), columns.div_ceil(256 * width), 1];
                self.launch("glu", &entry, grid, 256, arguments)
            }
            Op::GluBackward { grad_output, gate_up, grad_gate_up, activation } => {
                self.expect("glu_backward", &[*grad_output, *gate_up, *grad_gate_up], DType::BF16)?;
                let columns = self.width(*grad_output);
                let pointers = [*grad_output, *gate_up, *grad_gate_up].map(|id| self.address(id));
                let width = vector(columns, &pointers);
                let entry = format!("glu_backward_{width}_{}", activation_name(*activation));
                let arguments = arguments![
                    pointers[0],
                    pointers[1],
                    self.matrix(*gate_up).stride as i64,
                    pointers[2],
                    self.matrix(*grad_gate_up).stride as i64,
                    columns as i32,
                ];
                let grid = [self.rows(*grad_output), columns.div_ceil(256 * width), 1];
                self.launch("glu", &entry, grid, 256, arguments)
            }
            Op::Cast { pairs } => self.cast(pairs),
            Op::Zero { buffers } => {
                let mut ranges: Vec<(u64, u64)> = buffers
                    .iter()
                    .map(|&id| {
                        let start = self.address(id);
                        (start, start + self.workload.buffer(id).bytes())
                    })
                    .collect();
                ranges.sort_unstable();
                ranges.dedup();
                // Neighbours are zeroed together where nothing else lies between them.
                let persistent = buffers.iter().all(|&id| !self.workload.buffer(id).kind.is_transient());
                let others = self.memory.others(self.workload, buffers);
                let mut joined: Vec<(u64, u64)> = Vec::new();
                for (start, end) in ranges {
                    match joined.last_mut() {
                        Some(last)
                            if persistent && start < last.1 + 256 && others.range(last.0..start).next().is_none() =>
                        {
                            last.1 = last.1.max(end);
                        }
                        _ => joined.push((start, end)),
                    }
                }
                for (start, end) in joined {
                    self.zero(start, end - start);
                }
                Ok(())
            }
            _ => Err(unsupported(format!("{} as an element-wise operation", op.name()))),
        }
    }

    fn gather(
        &mut self,
        ids: BufferId,
        from: BufferId,
        output: BufferId,
        kind: &str,
        scale: f32,
    ) -> Result<(), EngineError> {
        let columns = self.width(output);
        let width = vector(columns, &[self.address(from), self.address(output)]);
        let arguments = arguments![
            self.address(ids),
            self.address(from),
            self.address(output),
            columns as i32,
            self.rows(from) as i32,
            scale,
        ];
        let entry = format!("embedding_{width}_{kind}");
        self.launch("embedding", &entry, [self.rows(output), 1, 1], row_threads(columns, width), arguments)
    }

    fn rms_norm_backward(&mut self, op: &Op) -> Result<(), EngineError> {
        let Op::RmsNormBackward {
            grad_output,
            input,
            weight,
            inverse_rms,
            residual_grad,
            grad_input,
            grad_weight,
            weight_offset,
        } = op
        else {
            return Ok(());
        };
        self.expect("rms_norm_backward", &[*grad_output, *input, *grad_input], DType::BF16)?;
        self.expect("rms_norm_backward", residual_grad.as_slice(), DType::BF16)?;
        self.expect("rms_norm_backward", grad_weight.as_slice(), DType::F32)?;
        let (rows, columns) = (self.rows(*input), self.width(*input));
        let residual = self.optional(*residual_grad);
        let pointers = [*grad_output, *input, *weight, *grad_input].map(|id| self.address(id));
        let width = vector(columns, &pointers).min(vector(columns, &[residual]));
        let entry = format!("rms_norm_backward_{width}_{}", self.type_name("rms_norm_backward", *weight)?);
        let arguments = arguments![
            pointers[0],
            pointers[1],
            pointers[2],
            self.address(*inverse_rms),
            residual,
            residual_grad.map_or(0, |id| self.matrix(id).stride) as i64,
            pointers[3],
            self.matrix(*grad_input).stride as i64,
            columns as i32,
            *weight_offset,
        ];
        self.launch("rms_norm", &entry, [rows, 1, 1], row_threads(columns, width), arguments)?;
        let Some(grad_weight) = grad_weight else {
            return Ok(());
        };
        let (chunks, rows_per_chunk) = row_chunks(self.memory.scratch.bytes, rows, columns);
        let scratch = self.memory.scratch.pointer;
        let arguments = arguments![
            pointers[0],
            pointers[1],
            self.address(*inverse_rms),
            scratch,
            rows as i32,
            columns as i32,
            rows_per_chunk as i32,
        ];
        let grid = [columns.div_ceil(128), chunks, 1];
        self.launch("rms_norm", "rms_norm_grad_weight", grid, 128, arguments)?;
        self.column_sum_finish(*grad_weight, chunks, columns)
    }

    /// `result += column sums of a matrix of partial sums in scratch`.
    fn column_sum_finish(&mut self, result: BufferId, chunks: usize, columns: usize) -> Result<(), EngineError> {
        let arguments = arguments![self.memory.scratch.pointer, self.address(result), chunks as i32, columns as i32];
        self.launch("column_sum", "column_sum_finish", [columns.div_ceil(128), 1, 1], 128, arguments)
    }

    /// `result += column sums` of a bf16 matrix.
    pub(super) fn column_sum(
        &mut self,
        matrix: crate::backend::cuda::product::Matrix,
        result: BufferId,
    ) -> Result<(), EngineError> {
        self.expect("the gradient of a bias", &[result], DType::F32)?;
        let (chunks, rows_per_chunk) = row_chunks(self.memory.scratch.bytes, matrix.rows, matrix.columns);
        let arguments = arguments![
            matrix.pointer,
            matrix.stride as i64,
            self.memory.scratch.pointer,
            matrix.rows as i32,
            matrix.columns as i32,
            rows_per_chunk as i32,
        ];
        let grid = [matrix.columns.div_ceil(128), chunks, 1];
        self.launch("column_sum", "column_sum_partial", grid, 128, arguments)?;
        self.column_sum_finish(result, chunks, matrix.columns)
    }

    fn cast(&mut self, pairs: &[(BufferId, BufferId)]) -> Result<(), EngineError> {
        // To and from the host the copy engines are faster than a kernel.
        let crosses = |from: BufferId, to: BufferId| {
            self.memory.stored(from) == self.memory.stored(to) && self.memory.on_host(from) != self.memory.on_host(to)
        };
        let (copies, pairs): (Vec<_>, Vec<_>) = pairs.iter().copied().partition(|&(from, to)| crosses(from, to));
        for (from, to) in copies {
            let bytes = self.memory.stored(from).bytes(&self.workload.buffer(from).shape);
            let (source, target) = (self.address(from), self.address(to));
            let offload = [from, to].into_iter().find(|&id| self.workload.buffer(id).kind == Kind::Offload);
            let Some(offload) = offload else {
                self.commands.push(Command::Copy { from: source, to: target, bytes, lane: Lane::Main });
                continue;
            };
            self.order(Lane::Main, Lane::Copies)?;
            self.commands.push(Command::Copy { from: source, to: target, bytes, lane: Lane::Copies });
            let arrived = Rc::new(Event::mark(self.card)?);
            self.commands.push(Command::Mark(arrived.clone(), Lane::Copies));
            self.copying.insert(offload, arrived);
        }
        let pairs = &pairs;
        let mut kinds: Vec<(DType, DType)> =
            pairs.iter().map(|&(from, to)| (self.memory.stored(from), self.memory.stored(to))).collect();
        kinds.sort_by_key(|(from, to)| (from.name(), to.name()));
        kinds.dedup();
        for (from, to) in kinds {
            if !matches!((from, to), (DType::F32 | DType::BF16, DType::F32 | DType::BF16)) {
                return Err(unsupported(format!("a cast from {} to {}", from.name(), to.name())));
            }
            let (mut parts, mut pieces) = (Vec::new(), Vec::new());
            for &(source, target) in pairs {
                if (self.memory.stored(source), self.memory.stored(target)) != (from, to) {
                    continue;
                }
                let elements = self.workload.buffer(source).elements();
                push_pieces(&mut pieces, (parts.len() / 3) as u32, elements, CAST_PIECE);
                parts.extend([self.address(source), self.address(target), elements as u64]);
            }
            let blocks = pieces.len() / 2;
            let parts = self.keep(bytemuck::cast_slice(&parts), "a table of tensors")?;
            let pieces = self.keep(bytemuck::cast_slice(&pieces), "a table of pieces")?;
            let entry = format!("cast_{}_{}", from.name(), to.name());
            self.launch("cast", &entry, [blocks, 1, 1], 256, arguments![parts, pieces])?;
        }
        Ok(())
    }
}

pub(super) fn is_gelu(activation: Activation) -> bool {
    activation == Activation::GeluTanh
}

fn activation_name(activation: Activation) -> &'static str {
    if is_gelu(activation) { "gelu" } else { "silu" }
}

/// Adds the pieces of a tensor: (part, index) pairs.
pub(super) fn push_pieces(pieces: &mut Vec<u32>, part: u32, elements: usize, piece: usize) {
    for index in 0..elements.div_ceil(piece) {
        pieces.extend([part, index as u32]);
    }
}

/// Chunks of rows for partial column sums, and the rows of each.
fn row_chunks(scratch: u64, rows: usize, columns: usize) -> (usize, usize) {
    let most = (scratch as usize / (4 * columns.max(1))).clamp(1, PARTIAL_SUMS);
    let per_chunk = rows.div_ceil(most).max(16);
    (rows.div_ceil(per_chunk).max(1), per_chunk)
}
