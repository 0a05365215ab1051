//! Head and cross-entropy in chunks of tokens.

use rayon::prelude::*;

use super::device;
use super::elementary::{exp, maximum, sum, tanh, vectorized};
use super::linear::{times, times_transposed};
use super::product::{Into, Matrix, MatrixMut, Weight, blocks, multiply, with_scratch};
use crate::backend::EngineError;

/// Vocabulary rows of one forward task.
const VOCABULARY: usize = 256;
/// Hidden columns of one backward task.
const HIDDEN: usize = 128;

pub struct CrossEntropy<'a> {
    pub input: Matrix<'a>,
    pub weight: Weight<'a>,
    pub targets: &'a [i32],
    pub token_weights: &'a [f32],
    pub scale: f32,
    pub losses: &'a mut [f32],
    pub loss_sum: &'a mut f32,
    pub grad_input: Option<MatrixMut<'a>>,
    pub grad_weight: Option<MatrixMut<'a>>,
    /// `[chunk, V]`.
    pub logits: MatrixMut<'a>,
    pub softcap: Option<f32>,
}

pub fn cross_entropy(mut op: CrossEntropy) -> Result<(), EngineError> {
    let (vocabulary, hidden) = (op.weight.rows, op.weight.columns);
    if let Some(at) = op.targets.iter().position(|&target| target >= vocabulary as i32) {
        return Err(device(format!("target {} of token {at} is not in 0..{vocabulary}", op.targets[at])));
    }
    op.losses.fill(0.0);
    if let Some(grad_input) = &mut op.grad_input {
        grad_input.fill(0.0);
    }
    // Rows without a target take no part.
    let labelled: Vec<usize> = (0..op.targets.len()).filter(|&token| op.targets[token] >= 0).collect();
    let chunk = op.logits.rows.max(1);
    with_scratch(2 * chunk.min(labelled.len()) * hidden, |scratch| {
        for tokens in labelled.chunks(chunk) {
            let (rows, grad_rows) = scratch[..2 * tokens.len() * hidden].split_at_mut(tokens.len() * hidden);
            for (row, &token) in rows.chunks_exact_mut(hidden).zip(tokens) {
                row.copy_from_slice(op.input.row(token));
            }
            one_chunk(&mut op, tokens, Matrix::new(rows, hidden), MatrixMut::new(grad_rows, hidden));
        }
    });
    let weighted = labelled.iter().map(|&token| f64::from(op.token_weights[token]) * f64::from(op.losses[token]));
    *op.loss_sum += (f64::from(op.scale) * weighted.sum::<f64>()) as f32;
    Ok(())
}

fn one_chunk(op: &mut CrossEntropy, tokens: &[usize], rows: Matrix, grad_rows: MatrixMut) {
    let (vocabulary, hidden, weight) = (op.weight.rows, op.weight.columns, op.weight);
    let logits = &op.logits;
    let columns: Vec<_> = blocks(vocabulary, VOCABULARY).collect();
    columns.par_iter().for_each(|columns| {
        // SAFETY: each task writes its own columns.
        let mut out = unsafe { logits.part(0..tokens.len(), columns.clone()) };
        times_transposed(&mut out, rows, weight, columns.clone());
    });

    let backward = op.grad_input.is_some() || op.grad_weight.is_some();
    let (targets, token_weights, scale, softcap) = (op.targets, op.token_weights, op.scale, op.softcap);
    let losses: Vec<f32> = tokens
        .par_iter()
        .enumerate()
        .map(|(row, &token)| {
            // SAFETY: each task writes its own row.
            let mut out = unsafe { logits.part(row..row + 1, 0..vocabulary) };
            let factor = backward.then_some(scale * token_weights[token]);
            loss_and_gradient(out.row(0), targets[token] as usize, factor, softcap)
        })
        .collect();
    for (&token, loss) in tokens.iter().zip(losses) {
        op.losses[token] = loss;
    }

    // SAFETY: nothing writes the logits from here on.
    let gradient = unsafe { op.logits.part(0..tokens.len(), 0..vocabulary) };
    let gradient = gradient.as_matrix();
    if let Some(grad_input) = &mut op.grad_input {
        let columns: Vec<_> = blocks(hidden, HIDDEN).collect();
        columns.into_par_iter().for_each(|columns| {
            // SAFETY: each task writes its own columns.
            let mut out = unsafe { grad_rows.part(0..tokens.len(), columns.clone()) };
            times(&mut out, gradient, weight, columns, Into::Replace);
        });
        for (row, &token) in tokens.iter().enumerate() {
            grad_input.row(token).copy_from_slice(grad_rows.as_matrix().row(row));
        }
    }
    if let Some(grad_weight) = &op.grad_weight {
        columns.into_par_iter().for_each(|columns| {
            // SAFETY: each task writes its own rows of the gradient.
            let mut out = unsafe { grad_weight.part(columns.clone(), 0..hidden) };
            multiply(&mut out, gradient.columns(columns).transposed(), rows, 1.0, Into::Add);
        });
    }
}

/// The loss of one row of logits; with a `factor` the row becomes the gradient of `factor · loss` by the logits
/// before the cap.
fn loss_and_gradient(logits: &mut [f32], target: usize, factor: Option<f32>, softcap: Option<f32>) -> f32 {
    vectorized(
        #[inline(always)]
        || {
            if let Some(cap) = softcap {
                for value in logits.iter_mut() {
                    *value = cap * tanh(*value / cap);
                }
            }
            let most = maximum(logits);
            let logits = &mut *logits;
            let total = sum(logits.len(), |i| exp(logits[i] - most));
            let log_sum_exp = f64::from(most) + f64::from(total).ln();
            let loss = (log_sum_exp - f64::from(logits[target])) as f32;
            if let Some(factor) = factor {
                let inverse = factor / total;
                let at_target = logits[target];
                match softcap {
                    None => {
                        for value in logits.iter_mut() {
                            *value = exp(*value - most) * inverse;
                        }
                        logits[target] -= factor;
                    }
                    Some(cap) => {
                        let slope = |z: f32| 1.0 - (z / cap) * (z / cap);
                        for value in logits.iter_mut() {
                            *value = exp(*value - most) * inverse * slope(*value);
                        }
                        logits[target] -= factor * slope(at_target);
                    }
                }
            }
            loss
        },
    )
}
