//! Rotary position embedding, in place.

use rayon::prelude::*;

use super::elementary::vectorized;
use super::product::{MatrixMut, with_scratch};
use crate::program::Direction;

/// Rows of one task.
const ROWS: usize = 16;

pub struct Rope<'a> {
    pub tensor: MatrixMut<'a>,
    pub positions: &'a [i32],
    pub inverse_frequency: &'a [f32],
    pub head_dim: usize,
    pub scale: f32,
    pub direction: Direction,
}

pub fn rope(op: Rope) {
    let half = op.inverse_frequency.len();
    let sign = if op.direction == Direction::Forward { 1.0 } else { -1.0 };
    let (tensor, head_dim) = (&op.tensor, op.head_dim);
    op.positions.par_iter().enumerate().with_min_len(ROWS).for_each(|(row, &position)| {
        // SAFETY: each task writes its own row.
        let mut part = unsafe { tensor.part(row..row + 1, 0..tensor.columns) };
        with_scratch(2 * half, |scratch| {
            let (cosine, sine) = scratch.split_at_mut(half);
            for ((cosine, sine), &frequency) in cosine.iter_mut().zip(sine.iter_mut()).zip(op.inverse_frequency) {
                // The angle is rounded to f32 as in Transformers; its functions are taken in f64.
                let angle = f64::from(position as f32 * frequency);
                *cosine = angle.cos() as f32 * op.scale;
                *sine = angle.sin() as f32 * op.scale * sign;
            }
            vectorized(
                #[inline(always)]
                || {
                    for head in part.row(0).chunks_exact_mut(head_dim) {
                        let (first, second) = head[..2 * half].split_at_mut(half);
                        for (((a, b), &cosine), &sine) in first.iter_mut().zip(second).zip(&*cosine).zip(&*sine) {
                            let (x, y) = (*a, *b);
                            *a = x * cosine - y * sine;
                            *b = y * cosine + x * sine;
                        }
                    }
                },
            );
        });
    });
}
