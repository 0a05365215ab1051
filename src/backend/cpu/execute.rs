//! Runs one operation: borrows its buffers and calls the code for it.

use super::attention::{self, AttentionBackward, CachedAttention};
use super::cross_entropy::{CrossEntropy, cross_entropy};
use super::linear::{self, Mask};
use super::memory::Views;
use super::norm::{self, RmsNorm, RmsNormBackward};
use super::optimizer::{self, Update};
use super::{device, embedding, glu, rope};
use crate::backend::EngineError;
use crate::program::{AdamWPart, BufferId, DType, Dropout, Op, Projection, ProjectionBackward};

pub fn execute(op: &Op, views: &Views) -> Result<(), EngineError> {
    match op {
        Op::Embedding { ids, weight, output, scale } => {
            embedding::embedding(views.i32(*ids)?, views.weight(*weight)?, views.f32_mut(*output)?, *scale)?;
        }
        Op::EmbeddingBackward { ids, grad_output, grad_weight, scale } => {
            let grad_weight = views.matrix_mut(*grad_weight)?;
            embedding::embedding_backward(views.i32(*ids)?, views.f32(*grad_output)?, &grad_weight, *scale)?;
        }
        Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon, weight_offset } => {
            let mut converted = Vec::new();
            let residual = match (residual, sum) {
                (Some(residual), Some(sum)) => Some((views.f32(*residual)?, views.f32_mut(*sum)?)),
                (None, None) => None,
                _ => return Err(device("a norm has a residual without a sum, or a sum without a residual".into())),
            };
            norm::rms_norm(RmsNorm {
                input: views.f32(*input)?,
                residual,
                weight: vector(views, *weight, &mut converted)?,
                output: views.f32_mut(*output)?,
                inverse_rms: views.f32_mut(*inverse_rms)?,
                epsilon: *epsilon,
                weight_offset: *weight_offset,
            });
        }
        Op::RmsNormBackward {
            grad_output,
            input,
            weight,
            inverse_rms,
            residual_grad,
            grad_input,
            grad_weight,
            weight_offset,
        } => {
            let mut converted = Vec::new();
            norm::rms_norm_backward(RmsNormBackward {
                grad_output: views.f32(*grad_output)?,
                input: views.f32(*input)?,
                weight: vector(views, *weight, &mut converted)?,
                inverse_rms: views.f32(*inverse_rms)?,
                residual_grad: residual_grad.map(|id| views.f32(id)).transpose()?,
                grad_input: views.f32_mut(*grad_input)?,
                grad_weight: grad_weight.map(|id| views.f32_mut(id)).transpose()?,
                weight_offset: *weight_offset,
            });
        }
        Op::Linear { input, projections } => linear_forward(views, *input, projections)?,
        Op::LinearBackward { input, grad_input, projections } => {
            linear_backward(views, *input, *grad_input, projections)?;
        }
        Op::Rope { tensor, positions, inverse_frequency, head_dim, rotary_dim, scale, direction } => {
            let inverse_frequency = views.f32(*inverse_frequency)?;
            if 2 * inverse_frequency.len() != *rotary_dim || rotary_dim > head_dim {
                return Err(device(format!("rotary dimension {rotary_dim} does not fit its frequencies or heads")));
            }
            rope::rope(rope::Rope {
                tensor: views.columns_mut(*tensor)?,
                positions: views.i32(*positions)?,
                inverse_frequency,
                head_dim: *head_dim,
                scale: *scale,
                direction: *direction,
            });
        }
        Op::Attention { qkv, document_start, output, log_sum_exp, shape, .. } => {
            let (output, log_sum_exp) = (views.matrix_mut(*output)?, views.matrix_mut(*log_sum_exp)?);
            attention::attention(views.matrix(*qkv)?, views.i32(*document_start)?, &output, &log_sum_exp, shape)?;
        }
        Op::AttentionBackward {
            grad_output, qkv, output, log_sum_exp, document_start, delta, grad_qkv, shape, ..
        } => attention::attention_backward(AttentionBackward {
            grad_output: views.matrix(*grad_output)?,
            qkv: views.matrix(*qkv)?,
            output: views.matrix(*output)?,
            log_sum_exp: views.matrix(*log_sum_exp)?,
            document_start: views.i32(*document_start)?,
            delta: views.matrix_mut(*delta)?,
            grad_qkv: views.matrix_mut(*grad_qkv)?,
            shape,
        })?,
        Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape } => {
            let start = views.i32(*start)?.first().copied().ok_or_else(|| device("an empty start".into()))?;
            attention::cached_attention(CachedAttention {
                qkv: views.matrix(*qkv)?,
                cache_key: views.matrix_mut(*cache_key)?,
                cache_value: views.matrix_mut(*cache_value)?,
                start,
                output: views.matrix_mut(*output)?,
                shape,
            })?;
        }
        Op::Glu { gate_up, output, activation } => {
            let width = views.columns_of(*output);
            glu::glu(views.f32(*gate_up)?, views.f32_mut(*output)?, width, *activation);
        }
        Op::GluBackward { grad_output, gate_up, grad_gate_up, activation } => {
            let width = views.columns_of(*grad_output);
            let (grad_output, gate_up) = (views.f32(*grad_output)?, views.f32(*gate_up)?);
            glu::glu_backward(grad_output, gate_up, views.f32_mut(*grad_gate_up)?, width, *activation);
        }
        Op::GatherRows { input, rows, output } => {
            embedding::gather_rows(views.f32(*input)?, views.i32(*rows)?, views.f32_mut(*output)?)?;
        }
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
            softcap,
        } => cross_entropy(CrossEntropy {
            input: views.matrix(*input)?,
            weight: views.weight(*weight)?,
            targets: views.i32(*targets)?,
            token_weights: views.f32(*token_weights)?,
            scale: views.scalar(*scale)?,
            losses: views.f32_mut(*losses)?,
            loss_sum: views.f32_mut(*loss_sum)?.first_mut().ok_or_else(|| device("an empty loss sum".into()))?,
            grad_input: grad_input.map(|id| views.matrix_mut(id)).transpose()?,
            grad_weight: grad_weight.map(|id| views.matrix_mut(id)).transpose()?,
            logits: views.matrix_mut(*logits)?,
            softcap: *softcap,
        })?,
        Op::Cast { pairs } => {
            for (from, to) in pairs {
                let (from, to) = (views.flat(*from)?, views.f32_mut(*to)?);
                from.convert(0, 0..from.columns, to);
            }
        }
        // Copies are done when they return.
        Op::Wait { .. } => {}
        Op::Zero { buffers } => {
            for id in buffers {
                views.bytes_mut(*id)?.fill(0);
            }
        }
        Op::GradientNorm { gradients, norm } => {
            let gradients = gradients.iter().map(|id| views.f32(*id)).collect::<Result<Vec<_>, _>>()?;
            views.f32_mut(*norm)?.fill(optimizer::gradient_norm(&gradients));
        }
        Op::AdamW { parts, norm, hyper, betas, epsilon, weight_decay, max_grad_norm, .. } => {
            let norm = views.scalar(*norm)?;
            if !norm.is_finite() {
                return Ok(());
            }
            let &[rate, correction1, correction2_root, _] = views.f32(*hyper)? else {
                return Err(device("the optimizer wants four numbers".into()));
            };
            let clip = if *max_grad_norm > 0.0 { (max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let update = Update {
                rate,
                correction1,
                correction2_root,
                betas: *betas,
                epsilon: *epsilon,
                weight_decay: *weight_decay,
                clip,
            };
            for part in parts {
                adamw(views, part, update)?;
            }
        }
    }
    Ok(())
}

/// A small weight in f32.
fn vector<'m: 'c, 'c>(views: &Views<'m>, id: BufferId, converted: &'c mut Vec<f32>) -> Result<&'c [f32], EngineError> {
    if views.dtype(id) == DType::F32 {
        return views.f32(id);
    }
    let weight = views.flat(id)?;
    converted.resize(weight.columns, 0.0);
    weight.convert(0, 0..weight.columns, converted);
    Ok(converted)
}

fn mask(views: &Views, dropout: Option<Dropout>) -> Result<Option<Mask>, EngineError> {
    let Some(Dropout { probability, key, stream }) = dropout.filter(|dropout| dropout.probability > 0.0) else {
        return Ok(None);
    };
    Ok(Some(Mask { probability, key: views.key(key)?, stream }))
}

fn linear_forward(views: &Views, input: BufferId, projections: &[Projection]) -> Result<(), EngineError> {
    let mut biases: Vec<Vec<f32>> = vec![Vec::new(); projections.len()];
    let mut borrowed = Vec::with_capacity(projections.len());
    for (projection, converted) in projections.iter().zip(&mut biases) {
        let branch = match &projection.lora {
            None => None,
            Some(lora) => Some(linear::Branch {
                a: views.matrix(lora.a)?,
                b: views.matrix(lora.b)?,
                middle: views.columns_mut(lora.middle)?,
                scale: views.scalar(lora.scale)?,
                mask: mask(views, lora.dropout)?,
            }),
        };
        borrowed.push(linear::Projection {
            weight: views.weight(projection.weight)?,
            bias: projection.bias.map(|id| vector(views, id, converted)).transpose()?,
            output: views.columns_mut(projection.output)?,
            branch,
        });
    }
    linear::forward(views.matrix(input)?, &borrowed);
    Ok(())
}

fn linear_backward(
    views: &Views,
    input: BufferId,
    grad_input: Option<BufferId>,
    projections: &[ProjectionBackward],
) -> Result<(), EngineError> {
    let mut borrowed = Vec::with_capacity(projections.len());
    for projection in projections {
        let branch = match &projection.lora {
            None => None,
            Some(lora) => Some(linear::BranchBackward {
                a: views.matrix(lora.a)?,
                b: views.matrix(lora.b)?,
                middle: views.columns(lora.middle)?,
                grad_middle: views.columns_mut(lora.grad_middle)?,
                grad_a: views.matrix_mut(lora.grad_a)?,
                grad_b: views.matrix_mut(lora.grad_b)?,
                scale: views.scalar(lora.scale)?,
                mask: mask(views, lora.dropout)?,
            }),
        };
        borrowed.push(linear::ProjectionBackward {
            weight: views.weight(projection.weight)?,
            grad_output: views.columns(projection.grad_output)?,
            grad_weight: projection.grad_weight.map(|id| views.matrix_mut(id)).transpose()?,
            grad_bias: projection.grad_bias.map(|id| views.matrix_mut(id)).transpose()?,
            branch,
        });
    }
    let grad_input = grad_input.map(|id| views.matrix_mut(id)).transpose()?;
    let trains = borrowed.iter().any(|projection| projection.grad_weight.is_some() || projection.branch.is_some());
    let input = trains.then(|| views.matrix(input)).transpose()?;
    linear::backward(input, grad_input.as_ref(), &borrowed);
    Ok(())
}

fn adamw(views: &Views, part: &AdamWPart, update: Update) -> Result<(), EngineError> {
    let (parameter, gradient) = (views.f32_mut(part.parameter)?, views.f32(part.gradient)?);
    if views.dtype(part.first_moment) == DType::Block8 {
        let (first, second) = (views.bytes_mut(part.first_moment)?, views.bytes_mut(part.second_moment)?);
        optimizer::adamw_block8(parameter, gradient, first, second, update);
    } else {
        let (first, second) = (views.f32_mut(part.first_moment)?, views.f32_mut(part.second_moment)?);
        optimizer::adamw(parameter, gradient, first, second, update);
    }
    Ok(())
}
