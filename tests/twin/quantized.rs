//! What a weight is worth after it was quantized: 4-bit NormalFloat as bitsandbytes makes it (blocks of 64, scales in 8
//! bits), and 8-bit integers with a scale a row. One element after the other, straight from the definitions.

#![allow(dead_code)]

use tune::program::{DType, block8};

/// Dettmers et al. 2023, arXiv 2305.14314, appendix E.
pub const LEVELS: [f32; 16] = [
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

/// Of a tensor with rows of `columns`.
///
/// # Panics
/// For types that are not quantized so.
pub fn rounded(dtype: DType, values: &[f32], columns: usize) -> Vec<f64> {
    match dtype {
        DType::Nf4 => nf4(values),
        DType::Int8 => values.chunks(columns).flat_map(int8).collect(),
        other => panic!("{} has no twin", other.name()),
    }
}

fn top(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |top, value| top.max(value.abs()))
}

/// The value of `table` that is nearest.
fn nearest(table: &[f32], value: f32) -> f64 {
    let distance = |level: &f32| (f64::from(*level) - f64::from(value)).abs();
    f64::from(table.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0.0))
}

fn nf4(values: &[f32]) -> Vec<f64> {
    let tops: Vec<f32> = values.chunks(64).map(top).collect();
    let mean = (tops.iter().map(|&top| f64::from(top)).sum::<f64>() / tops.len() as f64) as f32;
    let mut scales = Vec::new();
    for group in tops.chunks(256) {
        let centred: Vec<f32> = group.iter().map(|top| top - mean).collect();
        let most = top(&centred);
        let inverse = if most > 0.0 { 1.0 / most } else { 0.0 };
        let codes = centred.iter().map(|value| nearest(block8::Map::Signed.values(), value * inverse));
        scales.extend(codes.map(|code| code * f64::from(most) + f64::from(mean)));
    }
    let mut rounded = Vec::new();
    for ((block, top), scale) in values.chunks(64).zip(tops).zip(scales) {
        let inverse = if top > 0.0 { 1.0 / top } else { 0.0 };
        rounded.extend(block.iter().map(|value| nearest(&LEVELS, value * inverse) * scale));
    }
    rounded
}

fn int8(row: &[f32]) -> Vec<f64> {
    let scale = top(row) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    row.iter().map(|value| f64::from((value * inverse).round()) * f64::from(scale)).collect()
}

/// What the bytes of a 4-bit weight say, as engines give them out: codes, codes of scales, scales of those, the offset.
pub fn unpack_nf4(bytes: &[u8], elements: usize) -> Vec<f64> {
    let blocks = elements.div_ceil(64);
    let (codes, rest) = bytes.split_at(elements.div_ceil(2));
    let (scale_codes, rest) = rest.split_at(blocks);
    let float = |bytes: &[u8]| f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let offset = float(&rest[4 * blocks.div_ceil(256)..]);
    let table = block8::Map::Signed.values();
    (0..elements)
        .map(|i| {
            let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
            let block = i / 64;
            let scale = f64::from(table[usize::from(scale_codes[block])]) * float(&rest[4 * (block / 256)..]) + offset;
            f64::from(LEVELS[usize::from(code)]) * scale
        })
        .collect()
}
