//! Conversion between the type a tensor has at its source and the type it has on the device.

use std::borrow::Cow;

use half::{bf16, f16};
use rayon::prelude::*;

use super::quantized;
use crate::backend::floats::{is_float, unpack};
use crate::backend::{EngineError, Tensor};
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
    let size = |dtype: DType| dtype.bytes(&[1]) as usize;
    if !is_float(from) || !(is_float(to) || to.is_quantized()) {
        return Err(wrong(format!("is {} and cannot become {}", from.name(), to.name())));
    }
    if to.is_quantized() {
        let tensor = Tensor { dtype: from, shape: shape.to_vec(), bytes };
        return Ok(Cow::Owned(quantized::quantize(name, &tensor, to)?));
    }
    let mut converted = vec![0; to.bytes(shape) as usize];
    let parts = converted.par_chunks_mut(PART * size(to)).zip(bytes.par_chunks(PART * size(from)));
    let largest = parts
        .map(|(output, bytes)| {
            let mut values = vec![0.0; bytes.len() / size(from)];
            unpack(from, bytes, &mut values);
            pack(to, &values, output);
            values.iter().fold(0.0f32, |most, value| most.max(value.abs()))
        })
        .reduce(|| 0.0, f32::max);
    if to == DType::F16 && largest > f16::MAX.to_f32() {
        return Err(wrong(format!("holds {largest}, beyond f16; use precision f32")));
    }
    Ok(Cow::Owned(converted))
}

/// Elements converted at a time.
const PART: usize = 8192;

fn pack(to: DType, values: &[f32], bytes: &mut [u8]) {
    match to {
        DType::F16 => put(bytes, values.iter().map(|&value| f16::from_f32(value).to_le_bytes())),
        DType::BF16 => put(bytes, values.iter().map(|&value| bf16::from_f32(value).to_le_bytes())),
        _ => put(bytes, values.iter().map(|value| value.to_le_bytes())),
    }
}

fn put<const N: usize>(bytes: &mut [u8], words: impl Iterator<Item = [u8; N]>) {
    bytes.as_chunks_mut::<N>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word);
}
