//! Tables that kernels look values up in.

use std::sync::Arc;

use super::driver::{Card, DeviceMemory};
use crate::backend::EngineError;
use crate::program::block8::Map;

/// The dynamic codes of 8-bit quantization on the card.
pub(super) struct Tables {
    memory: DeviceMemory,
}

impl Tables {
    pub fn new(card: &Arc<Card>) -> Result<Self, EngineError> {
        let tables = [*Map::Signed.values(), *Map::Unsigned.values()];
        Ok(Self { memory: DeviceMemory::with(card, bytemuck::cast_slice(&tables), "code tables")? })
    }

    /// 512 f32: the signed code, then the unsigned one.
    pub fn pointer(&self) -> u64 {
        self.memory.pointer
    }
}
