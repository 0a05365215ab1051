//! Gated linear unit, forward and backward.

use rayon::prelude::*;

use super::elementary::{sigmoid, vectorized};
use crate::program::Activation;

/// Rows of one task.
const ROWS: usize = 8;

/// `√(2/π)` and the cubic factor of the tanh approximation of GELU.
const GELU: (f32, f32) = (0.797_884_6, 0.044_715);

/// Value and derivative of the activation.
#[inline(always)]
fn value_and_slope(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let s = sigmoid(x);
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::GeluTanh => {
            // 0.5 (1 + tanh u) is the logistic function of 2u, which keeps precision where tanh is near -1.
            let u = GELU.0 * (x + GELU.1 * x * x * x);
            let s = sigmoid(2.0 * u);
            let slope = 2.0 * s * (1.0 - s) * GELU.0 * (1.0 + 3.0 * GELU.1 * x * x);
            (x * s, s + x * slope)
        }
    }
}

/// `output = activation(gate) · up`, `width` columns each.
pub fn glu(gate_up: &[f32], output: &mut [f32], width: usize, activation: Activation) {
    let rows = output.par_chunks_mut(width).zip(gate_up.par_chunks(2 * width)).with_min_len(ROWS);
    rows.for_each(|(output, gate_up)| {
        let (gate, up) = gate_up.split_at(width);
        vectorized(
            #[inline(always)]
            || {
                for ((output, &gate), &up) in output.iter_mut().zip(gate).zip(up) {
                    *output = value_and_slope(activation, gate).0 * up;
                }
            },
        );
    });
}

pub fn glu_backward(
    grad_output: &[f32],
    gate_up: &[f32],
    grad_gate_up: &mut [f32],
    width: usize,
    activation: Activation,
) {
    let rows = grad_gate_up.par_chunks_mut(2 * width).zip(gate_up.par_chunks(2 * width));
    rows.zip(grad_output.par_chunks(width)).with_min_len(ROWS).for_each(|((out, gate_up), grad)| {
        let (gate, up) = gate_up.split_at(width);
        let (grad_gate, grad_up) = out.split_at_mut(width);
        let (gate, up, grad) = (&gate[..width], &up[..width], &grad[..width]);
        let (grad_gate, grad_up) = (&mut grad_gate[..width], &mut grad_up[..width]);
        vectorized(
            #[inline(always)]
            || {
                for i in 0..width {
                    let (value, slope) = value_and_slope(activation, gate[i]);
                    grad_gate[i] = grad[i] * up[i] * slope;
                    grad_up[i] = grad[i] * value;
                }
            },
        );
    });
}
