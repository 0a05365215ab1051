//! Rows taken from a table, and gradients added to them.

use rayon::prelude::*;

use super::device;
use super::product::{MatrixMut, Weight};
use crate::backend::EngineError;

fn check(rows: &[i32], limit: usize, what: &str) -> Result<(), EngineError> {
    match rows.iter().position(|&row| row < 0 || row as usize >= limit) {
        None => Ok(()),
        Some(at) => Err(device(format!("{what} {} at position {at} is not in 0..{limit}", rows[at]))),
    }
}

/// `output[t] = scale · weight[ids[t]]`.
pub fn embedding(ids: &[i32], weight: Weight, output: &mut [f32], scale: f32) -> Result<(), EngineError> {
    check(ids, weight.rows, "token id")?;
    output.par_chunks_mut(weight.columns).zip(ids).with_min_len(16).for_each(|(output, &id)| {
        weight.convert(id as usize, 0..weight.columns, output);
        if scale != 1.0 {
            output.iter_mut().for_each(|value| *value *= scale);
        }
    });
    Ok(())
}

/// `grad_weight[ids[t]] += scale · grad_output[t]` where `ids[t] >= 0`; each task has its own columns and takes tokens
/// in order.
pub fn embedding_backward(
    ids: &[i32],
    grad_output: &[f32],
    grad_weight: &MatrixMut,
    scale: f32,
) -> Result<(), EngineError> {
    if let Some(&id) = ids.iter().find(|&&id| id >= grad_weight.rows as i32) {
        return Err(device(format!("token id {id} is not below {}", grad_weight.rows)));
    }
    let width = grad_weight.columns;
    let blocks: Vec<_> = super::product::blocks(width, 64).collect();
    blocks.into_par_iter().for_each(|columns| {
        // SAFETY: each task writes its own columns.
        let mut out = unsafe { grad_weight.part(0..grad_weight.rows, columns.clone()) };
        for (&id, grad) in ids.iter().zip(grad_output.chunks_exact(width)) {
            if id < 0 {
                continue;
            }
            for (value, grad) in out.row(id as usize).iter_mut().zip(&grad[columns.clone()]) {
                *value += scale * grad;
            }
        }
    });
    Ok(())
}

/// `output[i] = input[rows[i]]`.
pub fn gather_rows(input: &[f32], rows: &[i32], output: &mut [f32]) -> Result<(), EngineError> {
    let width = output.len() / rows.len().max(1);
    check(rows, input.len() / width.max(1), "row")?;
    for (output, &row) in output.chunks_exact_mut(width.max(1)).zip(rows) {
        output.copy_from_slice(&input[row as usize * width..(row as usize + 1) * width]);
    }
    Ok(())
}
