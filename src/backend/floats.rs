//! Floating-point numbers as they lie in a checkpoint.

use half::{bf16, f16};

use crate::program::DType;

/// Whether elements of this type are floating-point numbers of their own.
pub fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Numbers of type `from`, one a value, in f32.
pub fn unpack(from: DType, bytes: &[u8], values: &mut [f32]) {
    match from {
        DType::F16 => {
            values.iter_mut().zip(words(bytes)).for_each(|(value, word)| *value = f16::from_le_bytes(word).to_f32())
        }
        DType::BF16 => {
            values.iter_mut().zip(words(bytes)).for_each(|(value, word)| *value = bf16::from_le_bytes(word).to_f32());
        }
        _ => values.iter_mut().zip(words(bytes)).for_each(|(value, word)| *value = f32::from_le_bytes(word)),
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}
