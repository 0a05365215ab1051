//! Quantized weights: how they lie in device memory, and the dispatch that unpacks them.

use super::lower::Lowering;
use super::storage::View;
use crate::backend::EngineError;
use crate::program::DType;

/// Bytes that a quantized weight takes on the device.
pub fn device_bytes(dtype: DType, rows: usize, columns: usize) -> u64 {
    dtype.bytes(&[rows, columns]).next_multiple_of(256)
}

impl Lowering<'_> {
    pub(super) fn dequantize(&mut self, weight: &View) -> Result<View, EngineError> {
        Err(EngineError::Unsupported {
            engine: super::adapter::ENGINE,
            what: format!("{} weights", weight.dtype.name()),
        })
    }
}
