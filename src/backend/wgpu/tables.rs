//! Values that codes stand for: signed and unsigned maps of 8-bit optimizer states, then the sixteen of NF4.

use super::storage::{Place, View};
use crate::program::{DType, block8};

/// NormalFloat of 4 bits (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
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

/// The whole table.
pub fn values() -> Vec<f32> {
    let mut values = block8::Map::Signed.values().to_vec();
    values.extend_from_slice(block8::Map::Unsigned.values());
    values.extend_from_slice(&NF4);
    values
}

/// Where it lies.
pub fn view() -> View {
    let elements = 528;
    View { place: Place::Tables, offset: 0, dtype: DType::F32, rows: 1, stride: elements, start: 0, width: elements }
}
