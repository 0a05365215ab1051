//! Values that codes stand for: signed and unsigned maps of 8-bit optimizer states, then the sixteen of NF4.

use super::storage::{Place, View};
use crate::backend::quantized::NF4;
use crate::program::{DType, block8};

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
