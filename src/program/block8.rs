//! Optimizer state in 8 bits: the storage of [`DType::Block8`](super::DType::Block8).
//!
//! Dynamic tree quantization in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861), with the tables of
//! bitsandbytes' `create_dynamic_map`: signed for the first moment, unsigned for the second.
//!
//! Layout: one little-endian f32 scale a block (the largest magnitude in it), then one code an element. All
//! zeros stand for zeros.

use std::sync::LazyLock;

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// Which table codes refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// -1 to 1: first moments.
    Signed,
    /// 0 to 1: second moments.
    Unsigned,
}

static SIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic_map(true));
static UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic_map(false));

impl Map {
    /// The 256 values, ascending.
    pub fn values(self) -> &'static [f32; 256] {
        match self {
            Map::Signed => &SIGNED,
            Map::Unsigned => &UNSIGNED,
        }
    }

    /// Code of the value nearest to `x`, a number divided by its scale.
    pub fn nearest(self, x: f32) -> u8 {
        let values = self.values();
        let above = values.partition_point(|&value| value < x).min(255);
        if above == 0 {
            return 0;
        }
        let below = above - 1;
        if x - values[below] < values[above] - x { below as u8 } else { above as u8 }
    }
}

/// Seven decades, each with twice the values of the one below; 0 and 1 besides. In f32, to the bit as bitsandbytes has them:
/// its boundaries are `torch.linspace`'s, which counts from both ends.
fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let items = if signed { 1usize << decade } else { 2 << decade };
        let step = (1.0f32 - 0.1) / items as f32;
        let boundary = |at: usize| match at < items.div_ceil(2) {
            true => step.mul_add(at as f32, 0.1),
            false => (-step).mul_add((items - at) as f32, 1.0),
        };
        for item in 0..items {
            let mean = (boundary(item) + boundary(item + 1)) / 2.0;
            let value = 10f64.powi(decade - 6) as f32 * mean;
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// Bytes of scales before the codes.
pub fn scale_bytes(elements: usize) -> usize {
    4 * elements.div_ceil(BLOCK)
}

/// Scales and codes of a buffer of `elements`.
pub fn split_mut(bytes: &mut [u8], elements: usize) -> (&mut [u8], &mut [u8]) {
    bytes.split_at_mut(scale_bytes(elements))
}

/// Values of one block.
pub fn unpack(map: Map, scale: &[u8], codes: &[u8], out: &mut [f32]) {
    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
    let values = map.values();
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = values[usize::from(code)] * scale;
    }
}

/// Codes and scale of one block.
pub fn pack(map: Map, values: &[f32], scale: &mut [u8], codes: &mut [u8]) {
    let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    scale.copy_from_slice(&most.to_le_bytes());
    let inverse = if most > 0.0 { 1.0 / most } else { 0.0 };
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = map.nearest(value * inverse);
    }
}

/// A whole buffer as f32.
pub fn decode(map: Map, bytes: &[u8], elements: usize) -> Vec<f32> {
    let (scales, codes) = bytes.split_at(scale_bytes(elements));
    let mut values = vec![0.0; elements];
    for ((out, codes), scale) in values.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)).zip(scales.chunks(4)) {
        unpack(map, scale, codes, out);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_ascend_from_end_to_end() {
        for (map, first) in [(Map::Signed, -0.992_968_75), (Map::Unsigned, 0.0)] {
            let values = map.values();
            assert!(values.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!((values[0], values[255]), (first, 1.0));
            for (code, &value) in values.iter().enumerate() {
                assert_eq!(usize::from(map.nearest(value)), code);
            }
        }
    }

    #[test]
    fn packed_values_are_near() {
        let values: Vec<f32> = (0..256).map(|i| (i as f32 - 100.0) * 0.37).collect();
        let (mut scale, mut codes, mut back) = ([0u8; 4], [0u8; 256], [0.0f32; 256]);
        pack(Map::Signed, &values, &mut scale, &mut codes);
        unpack(Map::Signed, &scale, &codes, &mut back);
        let most = f32::from_le_bytes(scale);
        for (value, back) in values.iter().zip(back) {
            assert!((value - back).abs() <= 0.008 * most, "{value} became {back}");
        }
    }
}
