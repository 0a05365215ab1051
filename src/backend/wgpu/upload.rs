//! Conversion between the type a tensor has at its source and the type it has on the device.

use std::borrow::Cow;

use half::{bf16, f16};

use super::quantized;
use crate::backend::EngineError;
use crate::program::DType;

/// `bytes` of type `from` as type `to`.
///
/// # Errors
/// When there is no such conversion, or the bytes do not fit the shape.
pub fn converted<'a>(
    name: &str,
    from: DType,
    to: DType,
    shape: &[usize],
    bytes: &'a [u8],
) -> Result<Cow<'a, [u8]>, EngineError> {
    let wrong = |what: String| EngineError::Weight { name: name.to_string(), what };
    if bytes.len() as u64 != from.bytes(shape) {
        return Err(wrong(format!(
            "has {} bytes, its shape {shape:?} of {} {}",
            bytes.len(),
            from.name(),
            from.bytes(shape)
        )));
    }
    if from == to {
        return Ok(Cow::Borrowed(bytes));
    }
    let values: Vec<f32> = match from {
        DType::F32 => words(bytes).map(f32::from_le_bytes).collect(),
        DType::F16 => words(bytes).map(|word| f16::from_le_bytes(word).to_f32()).collect(),
        DType::BF16 => words(bytes).map(|word| bf16::from_le_bytes(word).to_f32()).collect(),
        _ => return Err(wrong(format!("is {} and cannot become {}", from.name(), to.name()))),
    };
    let converted: Vec<u8> = match to {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F16 => {
            if let Some(large) = values.iter().find(|value| value.abs() > 65504.0) {
                return Err(wrong(format!("holds {large}, beyond f16; use precision f32")));
            }
            values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
        }
        DType::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        DType::Nf4 | DType::Int8 | DType::Fp8 => {
            let rows = shape.first().copied().unwrap_or(1);
            quantized::quantize(name, to, &values, rows, shape.iter().skip(1).product())?
        }
        _ => return Err(wrong(format!("is {} and cannot become {}", from.name(), to.name()))),
    };
    Ok(Cow::Owned(converted))
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}
