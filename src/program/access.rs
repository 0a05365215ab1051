//! What each operation reads, writes and updates, and what it costs.

use super::{Access, AttentionShape, BufferId, DType, Op, Workload};
use Access::{Read, Update, Write};

impl Op {
    /// Every buffer the operation touches, with how. A buffer may be listed more than once.
    pub fn accesses(&self) -> Vec<(BufferId, Access)> {
        let mut list = Accesses::default();
        match self {
            Op::Embedding { ids, weight, output, .. } => list.read([*ids, *weight]).write([*output]),
            Op::EmbeddingBackward { ids, grad_output, grad_weight, .. } => {
                list.read([*ids, *grad_output]).update([*grad_weight])
            }
            Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, .. } => {
                list.read([*input, *weight]).read(*residual).write(*sum).write([*output, *inverse_rms])
            }
            Op::RmsNormBackward {
                grad_output,
                input,
                weight,
                inverse_rms,
                residual_grad,
                grad_input,
                grad_weight,
                ..
            } => list
                .read([*grad_output, *input, *weight, *inverse_rms])
                .read(*residual_grad)
                .write([*grad_input])
                .update(*grad_weight),
            Op::Linear { input, projections } => {
                list.read([*input]);
                for projection in projections {
                    list.read([projection.weight]).read(projection.bias).write([projection.output.buffer]);
                    if let Some(lora) = &projection.lora {
                        list.read([lora.a, lora.b, lora.scale])
                            .read(lora.dropout.map(|dropout| dropout.key))
                            .write([lora.middle.buffer]);
                    }
                }
                &mut list
            }
            Op::LinearBackward { input, grad_input, projections } => {
                let trains = |p: &super::ProjectionBackward| p.grad_weight.is_some() || p.lora.is_some();
                list.read(projections.iter().any(trains).then_some(*input)).write(*grad_input);
                for projection in projections {
                    list.read([projection.weight, projection.grad_output.buffer])
                        .update(projection.grad_weight)
                        .update(projection.grad_bias);
                    if let Some(lora) = &projection.lora {
                        list.read([lora.a, lora.b, lora.scale, lora.middle.buffer])
                            .read(lora.dropout.map(|dropout| dropout.key))
                            .write([lora.grad_middle.buffer])
                            .update([lora.grad_a, lora.grad_b]);
                    }
                }
                &mut list
            }
            Op::Rope { tensor, positions, inverse_frequency, .. } => {
                list.read([*positions, *inverse_frequency]).update([tensor.buffer])
            }
            Op::Attention { qkv, document_start, document_end, output, log_sum_exp, .. } => {
                list.read([*qkv, *document_start, *document_end]).write([*output, *log_sum_exp])
            }
            Op::AttentionBackward {
                grad_output,
                qkv,
                output,
                log_sum_exp,
                document_start,
                document_end,
                delta,
                grad_qkv,
                ..
            } => list
                .read([*grad_output, *qkv, *output, *log_sum_exp, *document_start, *document_end])
                .write([*delta, *grad_qkv]),
            Op::CachedAttention { qkv, cache_key, cache_value, start, output, .. } => {
                list.read([*qkv, *start]).update([*cache_key, *cache_value]).write([*output])
            }
            Op::Glu { gate_up, output, .. } => list.read([*gate_up]).write([*output]),
            Op::GluBackward { grad_output, gate_up, grad_gate_up, .. } => {
                list.read([*grad_output, *gate_up]).write([*grad_gate_up])
            }
            Op::GatherRows { input, rows, output } => list.read([*input, *rows]).write([*output]),
            Op::LinearCrossEntropy {
                input,
                weight,
                targets,
                token_weights,
                scale,
                losses,
                loss_sum,
                grad_input,
                grad_weight,
                logits,
                ..
            } => list
                .read([*input, *weight, *targets, *token_weights, *scale])
                .write([*losses, *logits])
                .write(*grad_input)
                .update([*loss_sum])
                .update(*grad_weight),
            Op::Cast { pairs } => {
                for (from, to) in pairs {
                    list.read([*from]).write([*to]);
                }
                &mut list
            }
            Op::Wait { buffers } => list.read(buffers.iter().copied()),
            Op::Zero { buffers } => list.write(buffers.iter().copied()),
            Op::GradientNorm { gradients, norm } => list.read(gradients.iter().copied()).write([*norm]),
            Op::AdamW { parts, norm, hyper, key, .. } => {
                list.read([*norm, *hyper, *key]);
                for part in parts {
                    list.read([part.gradient]).update([part.parameter, part.first_moment, part.second_moment]);
                }
                &mut list
            }
        };
        list.0
    }

    /// Whether an engine may take this operation together with the next, whose sums over its result come from the same pass over
    /// memory: a gated product before a linear operation, and all of both in the backward pass. The CUDA engine leaves more sums
    /// of LoRA branches to operations that need not be neighbours: of its programs only the whole is what it says.
    pub fn may_join(&self, next: &Op) -> bool {
        match (self, next) {
            (Op::Glu { output, .. }, Op::Linear { input, .. } | Op::LinearBackward { input, .. }) => output == input,
            (Op::LinearBackward { grad_input, .. }, Op::GluBackward { grad_output, .. }) => {
                *grad_input == Some(*grad_output)
            }
            (Op::GluBackward { grad_gate_up, .. }, Op::LinearBackward { projections, .. }) => {
                projections.iter().any(|projection| projection.grad_output.buffer == *grad_gate_up)
            }
            _ => false,
        }
    }

    /// A short name for tables: `linear`, `attention_backward`.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding { .. } => "embedding",
            Op::EmbeddingBackward { .. } => "embedding_backward",
            Op::RmsNorm { .. } => "rms_norm",
            Op::RmsNormBackward { .. } => "rms_norm_backward",
            Op::Linear { .. } => "linear",
            Op::LinearBackward { .. } => "linear_backward",
            Op::Rope { .. } => "rope",
            Op::Attention { .. } => "attention",
            Op::AttentionBackward { .. } => "attention_backward",
            Op::CachedAttention { .. } => "cached_attention",
            Op::Glu { .. } => "glu",
            Op::GluBackward { .. } => "glu_backward",
            Op::GatherRows { .. } => "gather_rows",
            Op::LinearCrossEntropy { .. } => "linear_cross_entropy",
            Op::Cast { .. } => "cast",
            Op::Wait { .. } => "wait",
            Op::Zero { .. } => "zero",
            Op::GradientNorm { .. } => "gradient_norm",
            Op::AdamW { .. } => "adamw",
        }
    }

    /// Floating-point operations in matrix products and attention (a multiply-add counts as two), with every
    /// token attending to half of the longest document. Element-wise work is bound by memory and counts as none.
    pub fn flops(&self, workload: &Workload) -> u64 {
        let size = |id: BufferId| workload.buffer(id).elements() as u64;
        let rows = |id: BufferId| workload.buffer(id).rows() as u64;
        match self {
            Op::Linear { input, projections } => {
                let tokens = rows(*input);
                let weights =
                    projections.iter().map(|p| size(p.weight) + p.lora.as_ref().map_or(0, |l| size(l.a) + size(l.b)));
                2 * tokens * weights.sum::<u64>()
            }
            Op::LinearBackward { input, grad_input, projections } => {
                let tokens = rows(*input);
                let products = projections.iter().map(|p| {
                    let weight =
                        size(p.weight) * (u64::from(grad_input.is_some()) + u64::from(p.grad_weight.is_some()));
                    let lora = p
                        .lora
                        .as_ref()
                        .map_or(0, |l| 2 * size(l.b) + size(l.a) * (1 + u64::from(grad_input.is_some())));
                    weight + lora
                });
                2 * tokens * products.sum::<u64>()
            }
            Op::Attention { qkv, shape, .. } => {
                let tokens = rows(*qkv);
                let span = span(workload, shape, tokens);
                2 * tokens * span * shape.query_columns() as u64
            }
            Op::AttentionBackward { qkv, shape, .. } => {
                let tokens = rows(*qkv);
                let span = span(workload, shape, tokens);
                5 * tokens * span * shape.query_columns() as u64
            }
            Op::CachedAttention { qkv, cache_key, shape, .. } => {
                4 * rows(*qkv) * rows(*cache_key) * shape.query_columns() as u64
            }
            Op::LinearCrossEntropy { input, weight, grad_input, grad_weight, .. } => {
                let products = 1 + u64::from(grad_input.is_some()) + u64::from(grad_weight.is_some());
                2 * rows(*input) * size(*weight) * products
            }
            _ => 0,
        }
    }

    /// Those among [`Op::flops`] that are products with weights in 8-bit floats.
    pub fn fp8_flops(&self, workload: &Workload) -> u64 {
        let size = |id: BufferId| {
            let buffer = workload.buffer(id);
            if buffer.dtype == DType::Fp8 { buffer.elements() as u64 } else { 0 }
        };
        let (input, weights): (_, u64) = match self {
            Op::Linear { input, projections } => (input, projections.iter().map(|p| size(p.weight)).sum()),
            Op::LinearBackward { input, grad_input: Some(_), projections } => {
                (input, projections.iter().map(|p| size(p.weight)).sum())
            }
            _ => return 0,
        };
        2 * workload.buffer(*input).rows() as u64 * weights
    }

    /// The fewest bytes that must move through memory: each operand read once, each result written once.
    /// Workspace and tables are not counted; of an embedding only the rows used.
    pub fn bytes_moved(&self, workload: &Workload) -> u64 {
        let bytes = |id: BufferId| workload.buffer(id).bytes();
        match self {
            Op::Embedding { output, .. } => 2 * bytes(*output),
            Op::EmbeddingBackward { grad_output, .. } => 3 * bytes(*grad_output),
            Op::GatherRows { output, .. } => 2 * bytes(*output),
            Op::Wait { .. } => 0,
            _ => {
                let mut seen = Vec::new();
                self.accesses()
                    .into_iter()
                    .filter(|(id, _)| workload.buffer(*id).kind != super::Kind::Workspace)
                    .filter(|entry| {
                        let new = !seen.contains(entry);
                        seen.push(*entry);
                        new
                    })
                    .map(|(id, access)| bytes(id) * if access == Update { 2 } else { 1 })
                    .sum()
            }
        }
    }
}

/// Twice the tokens that a token attends to on average: all of the micro-batch, of its longest document or of the
/// window, whichever is least.
fn span(workload: &Workload, shape: &AttentionShape, tokens: u64) -> u64 {
    let longest = workload.longest_document.map_or(tokens, |longest| tokens.min(longest as u64));
    shape.window.map_or(longest, |window| longest.min(2 * window as u64))
}

#[derive(Default)]
struct Accesses(Vec<(BufferId, Access)>);

impl Accesses {
    fn add(&mut self, buffers: impl IntoIterator<Item = BufferId>, access: Access) -> &mut Self {
        self.0.extend(buffers.into_iter().map(|id| (id, access)));
        self
    }

    fn read(&mut self, buffers: impl IntoIterator<Item = BufferId>) -> &mut Self {
        self.add(buffers, Read)
    }

    fn write(&mut self, buffers: impl IntoIterator<Item = BufferId>) -> &mut Self {
        self.add(buffers, Write)
    }

    fn update(&mut self, buffers: impl IntoIterator<Item = BufferId>) -> &mut Self {
        self.add(buffers, Update)
    }
}
