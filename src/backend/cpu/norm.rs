//! Root-mean-square norm, forward and backward.

use rayon::prelude::*;

use super::elementary::{sum, vectorized};
use super::product::{Matrix, blocks};

/// Rows of one task.
const ROWS: usize = 16;

pub struct RmsNorm<'a> {
    pub input: &'a [f32],
    /// What is added to the input, and where the sum goes.
    pub residual: Option<(&'a [f32], &'a mut [f32])>,
    pub weight: &'a [f32],
    pub output: &'a mut [f32],
    pub inverse_rms: &'a mut [f32],
    pub epsilon: f32,
    pub weight_offset: f32,
}

pub fn rms_norm(op: RmsNorm) {
    let width = op.weight.len();
    let (weight, offset, epsilon) = (op.weight, op.weight_offset, op.epsilon);
    let normalize = |x: &[f32], output: &mut [f32]| {
        let mean = sum(width, |i| x[i] * x[i]) / width as f32;
        let inverse = 1.0 / (mean + epsilon).sqrt();
        for ((output, &x), &weight) in output.iter_mut().zip(x).zip(weight) {
            *output = x * inverse * (offset + weight);
        }
        inverse
    };
    let rows = op.output.par_chunks_mut(width).zip(op.inverse_rms).zip(op.input.par_chunks(width)).with_min_len(ROWS);
    match op.residual {
        None => rows.for_each(|((output, inverse), input)| {
            vectorized(
                #[inline(always)]
                || *inverse = normalize(input, output),
            )
        }),
        Some((residual, total)) => {
            rows.zip(residual.par_chunks(width)).zip(total.par_chunks_mut(width)).for_each(
                |((((output, inverse), input), residual), total)| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for ((total, &a), &b) in total.iter_mut().zip(input).zip(residual) {
                                *total = a + b;
                            }
                            *inverse = normalize(total, output);
                        },
                    );
                },
            );
        }
    }
}

pub struct RmsNormBackward<'a> {
    pub grad_output: &'a [f32],
    pub input: &'a [f32],
    pub weight: &'a [f32],
    pub inverse_rms: &'a [f32],
    pub residual_grad: Option<&'a [f32]>,
    pub grad_input: &'a mut [f32],
    pub grad_weight: Option<&'a mut [f32]>,
    pub weight_offset: f32,
}

pub fn rms_norm_backward(op: RmsNormBackward) {
    let width = op.weight.len();
    let RmsNormBackward { grad_output, input, weight, inverse_rms, residual_grad, weight_offset: offset, .. } = op;
    op.grad_input.par_chunks_mut(width).enumerate().with_min_len(ROWS).for_each(|(row, grad_input)| {
        let range = row * width..(row + 1) * width;
        let (grad, x, inverse) = (&grad_output[range.clone()], &input[range.clone()], inverse_rms[row]);
        let residual = residual_grad.map(|residual| &residual[range]);
        vectorized(
            #[inline(always)]
            || {
                let (grad, x, weight) = (&grad[..width], &x[..width], &weight[..width]);
                // mean(d · n), with d = grad · (offset + weight) and n = x · inverse.
                let mean = sum(width, |i| grad[i] * (offset + weight[i]) * x[i]) * inverse / width as f32;
                for i in 0..width {
                    grad_input[i] = inverse * (grad[i] * (offset + weight[i]) - x[i] * inverse * mean);
                }
                if let Some(residual) = residual {
                    for (value, residual) in grad_input.iter_mut().zip(residual) {
                        *value += residual;
                    }
                }
            },
        );
    });
    if let Some(grad_weight) = op.grad_weight {
        let (grad, x) = (Matrix::new(grad_output, width), Matrix::new(input, width));
        let size = blocks(width, 128).next().map_or(1, |block| block.len());
        grad_weight.par_chunks_mut(size).enumerate().for_each(|(block, out)| {
            let columns = block * size..block * size + out.len();
            let (grad, x) = (grad.columns(columns.clone()), x.columns(columns));
            for (row, &inverse) in inverse_rms.iter().enumerate() {
                let (grad, x) = (grad.row(row), x.row(row));
                for ((out, &grad), &x) in out.iter_mut().zip(grad).zip(x) {
                    *out += grad * x * inverse;
                }
            }
        });
    }
}
