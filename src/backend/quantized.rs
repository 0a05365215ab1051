//! Frozen weights in 4 and in 8 bits: how they are made on loading, and where their parts lie.
//!
//! NF4 is the double-quantized form of bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314): codes of 4 bits, the
//! first of two in the upper half of a byte; a scale a block of 64, kept as an 8-bit code of a map that is symmetric
//! about the mean of all scales; an f32 scale a group of 256 such codes. Int8 has an f32 scale a row.

use rayon::prelude::*;

use super::{EngineError, Tensor, floats};
use crate::program::{DType, block8};

/// Elements that share a scale.
pub const BLOCK: usize = 64;
/// Scales that share one of their own.
pub const GROUP: usize = 256;

/// What codes of 4 bits stand for: NormalFloat (arXiv 2305.14314, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Halfway points between the levels of NF4, as bitsandbytes' decision tree has them.
const BOUNDS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_4,
    -0.137_911_74,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_45,
    0.642_786_9,
    0.861_478_45,
];

/// Byte offsets of a quantized tensor's parts. Codes come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// One a block (NF4: a byte) or a row (int8: an f32).
    pub scales: u64,
    /// f32, one a group (NF4).
    pub group_scales: u64,
    /// f32 (NF4).
    pub offset: u64,
    pub end: u64,
}

impl Parts {
    /// Of a `[rows, columns]` tensor, each part at a multiple of `alignment` bytes. With 1 it takes what
    /// [`DType::bytes`] says.
    pub fn of(dtype: DType, rows: usize, columns: usize, alignment: u64) -> Parts {
        let elements = rows * columns;
        let whole = |bytes: usize| (bytes as u64).next_multiple_of(alignment);
        if dtype == DType::Int8 {
            let scales = whole(elements);
            let end = scales + 4 * rows as u64;
            return Parts { scales, group_scales: end, offset: end, end };
        }
        let blocks = elements.div_ceil(BLOCK);
        let scales = whole(elements.div_ceil(2));
        let group_scales = scales + whole(blocks);
        let offset = group_scales + 4 * blocks.div_ceil(GROUP) as u64;
        Parts { scales, group_scales, offset, end: offset + 4 }
    }
}

/// Quantizes a tensor into `out`, which has the bytes of its [`Parts`] at that alignment, in any state.
///
/// # Errors
/// When the tensor does not hold floating-point numbers, or the type is neither nf4 nor int8.
pub fn quantize(name: &str, tensor: &Tensor<'_>, to: DType, alignment: u64, out: &mut [u8]) -> Result<(), EngineError> {
    let rows = tensor.shape.first().copied().unwrap_or(1);
    let columns = tensor.shape.iter().skip(1).product();
    let parts = Parts::of(to, rows, columns, alignment);
    let wrong = |what: String| EngineError::Weight { name: name.to_string(), what };
    let taken = tensor.dtype.bytes(&tensor.shape);
    if !floats::is_float(tensor.dtype) || tensor.bytes.len() as u64 != taken || out.len() as u64 != parts.end {
        return Err(wrong(format!("is {} and cannot become {}", tensor.dtype.name(), to.name())));
    }
    match to {
        DType::Nf4 => nf4(tensor, &parts, out),
        DType::Int8 => int8(tensor, &parts, columns.max(1), out),
        other => return Err(wrong(format!("cannot be quantized to {}: there are nf4 and int8", other.name()))),
    }
    Ok(())
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |most, value| most.max(value.abs()))
}

fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// Elements converted at a time: whole blocks.
const PIECE: usize = 4096;

fn nf4(tensor: &Tensor<'_>, parts: &Parts, out: &mut [u8]) {
    let size = tensor.dtype.bytes(&[1]) as usize;
    let blocks = (tensor.bytes.len() / size).div_ceil(BLOCK);
    let mut scales = vec![0.0f32; blocks];
    let (codes, rest) = out.split_at_mut(parts.scales as usize);
    let pieces = tensor.bytes.par_chunks(PIECE * size).zip(codes.par_chunks_mut(PIECE / 2));
    pieces.zip(scales.par_chunks_mut(PIECE / BLOCK)).for_each(|((bytes, codes), scales)| {
        let mut piece = [0.0f32; PIECE];
        let values = &mut piece[..bytes.len() / size];
        floats::unpack(tensor.dtype, bytes, values);
        for ((values, codes), scale) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(scales) {
            *scale = largest(values);
            nf4_block(values, inverse(*scale), codes);
        }
    });
    let offset = (scales.iter().map(|&scale| f64::from(scale)).sum::<f64>() / blocks.max(1) as f64) as f32;
    let base = parts.scales as usize;
    for (group, scales) in scales.chunks(GROUP).enumerate() {
        let centred: Vec<f32> = scales.iter().map(|scale| scale - offset).collect();
        let most = largest(&centred);
        for (i, &value) in centred.iter().enumerate() {
            rest[group * GROUP + i] = block8::Map::Signed.nearest(value * inverse(most));
        }
        let at = parts.group_scales as usize - base + 4 * group;
        rest[at..at + 4].copy_from_slice(&most.to_le_bytes());
    }
    let at = parts.offset as usize - base;
    rest[at..at + 4].copy_from_slice(&offset.to_le_bytes());
}

/// Codes of a block. What comes after its last element is zero.
fn nf4_block(values: &[f32], inverse: f32, codes: &mut [u8]) {
    let mut found = [0u32; BLOCK];
    for bound in BOUNDS {
        for (code, value) in found.iter_mut().zip(values) {
            *code += u32::from(value * inverse > bound);
        }
    }
    for (code, pair) in codes.iter_mut().zip(found.as_chunks::<2>().0) {
        *code = (pair[0] << 4 | pair[1]) as u8;
    }
}

fn int8(tensor: &Tensor<'_>, parts: &Parts, columns: usize, out: &mut [u8]) {
    let size = tensor.dtype.bytes(&[1]) as usize;
    let (codes, scales) = out.split_at_mut(parts.scales as usize);
    let rows = tensor.bytes.par_chunks(columns * size).zip(codes.par_chunks_mut(columns));
    rows.zip(scales.as_chunks_mut::<4>().0).for_each_init(
        || vec![0.0f32; columns],
        |values, ((bytes, codes), scale)| {
            floats::unpack(tensor.dtype, bytes, values);
            let most = largest(values) / 127.0;
            let inverse = inverse(most);
            for (code, &value) in codes.iter_mut().zip(values.iter()) {
                *code = (value * inverse).round() as i8 as u8;
            }
            *scale = most.to_le_bytes();
        },
    );
}
