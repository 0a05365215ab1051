//! Gradient norm and AdamW.

use rayon::prelude::*;

use super::elementary::vectorized;
use crate::program::block8::{self, BLOCK, Map};

/// Elements of one task; a multiple of the blocks of 8-bit states.
const CHUNK: usize = 16 * BLOCK;

/// `√Σ g²` over all gradients, in f64.
pub fn gradient_norm(gradients: &[&[f32]]) -> f32 {
    let mut total = 0.0f64;
    for gradient in gradients {
        let parts: Vec<f64> = gradient
            .par_chunks(CHUNK)
            .map(|chunk| {
                vectorized(
                    #[inline(always)]
                    || chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>(),
                )
            })
            .collect();
        total += parts.iter().sum::<f64>();
    }
    total.sqrt() as f32
}

/// The numbers of one update.
#[derive(Clone, Copy)]
pub struct Update {
    pub rate: f32,
    pub correction1: f32,
    pub correction2_root: f32,
    pub betas: [f32; 2],
    pub epsilon: f32,
    pub weight_decay: f32,
    /// Factor of the gradient that clips it.
    pub clip: f32,
}

impl Update {
    /// New parameter and moments of one element.
    #[inline(always)]
    fn apply(&self, parameter: f32, gradient: f32, first: f32, second: f32) -> (f32, f32, f32) {
        let g = gradient * self.clip;
        let first = self.betas[0] * first + (1.0 - self.betas[0]) * g;
        let second = self.betas[1] * second + (1.0 - self.betas[1]) * g * g;
        let decayed = parameter - self.rate * self.weight_decay * parameter;
        let step = (self.rate / self.correction1) * first;
        (decayed - step / (second.sqrt() / self.correction2_root + self.epsilon), first, second)
    }
}

pub fn adamw(parameter: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], update: Update) {
    let chunks = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    let chunks = chunks.zip(first.par_chunks_mut(CHUNK)).zip(second.par_chunks_mut(CHUNK));
    chunks.for_each(|(((parameter, gradient), first), second)| {
        vectorized(
            #[inline(always)]
            || {
                for (((p, &g), m), v) in parameter.iter_mut().zip(gradient).zip(first).zip(second) {
                    (*p, *m, *v) = update.apply(*p, g, *m, *v);
                }
            },
        );
    });
}

/// The same with moments in 8 bits: each block is unpacked, updated and packed with a new scale; the parameter
/// sees the moments before they are packed.
pub fn adamw_block8(parameter: &mut [f32], gradient: &[f32], first: &mut [u8], second: &mut [u8], update: Update) {
    let elements = parameter.len();
    let (first_scales, first_codes) = block8::split_mut(first, elements);
    let (second_scales, second_codes) = block8::split_mut(second, elements);
    let firsts = first_scales.par_chunks_mut(4).zip(first_codes.par_chunks_mut(BLOCK));
    let seconds = second_scales.par_chunks_mut(4).zip(second_codes.par_chunks_mut(BLOCK));
    let blocks = parameter.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK));
    blocks.zip(firsts).zip(seconds).with_min_len(16).for_each(|(((parameter, gradient), first), second)| {
        let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        let (m, v) = (&mut m[..parameter.len()], &mut v[..parameter.len()]);
        block8::unpack(Map::Signed, first.0, first.1, m);
        block8::unpack(Map::Unsigned, second.0, second.1, v);
        for (((p, &g), m), v) in parameter.iter_mut().zip(gradient).zip(m.iter_mut()).zip(v.iter_mut()) {
            (*p, *m, *v) = update.apply(*p, g, *m, *v);
        }
        block8::pack(Map::Signed, m, first.0, first.1);
        block8::pack(Map::Unsigned, v, second.0, second.1);
    });
}
