//! Quantized weights: how they lie in device memory, and the dispatch that unpacks them.

use super::kernel::Element;
use super::lower::Lowering;
use super::storage::{Place, View};
use super::tables;
use crate::backend::quantized::{self, Parts};
use crate::backend::{EngineError, Tensor};
use crate::program::DType;

/// Every part starts at a word.
const ALIGNMENT: u64 = 4;

fn parts(dtype: DType, rows: usize, columns: usize) -> Parts {
    Parts::of(dtype, rows, columns, ALIGNMENT)
}

/// Bytes that a quantized weight takes on the device.
pub fn device_bytes(dtype: DType, rows: usize, columns: usize) -> u64 {
    parts(dtype, rows, columns).end.next_multiple_of(256)
}

/// A tensor quantized to nf4 or int8.
///
/// # Errors
/// For other types.
pub fn quantize(name: &str, tensor: &Tensor<'_>, to: DType) -> Result<Vec<u8>, EngineError> {
    let rows = tensor.shape.first().copied().unwrap_or(1);
    let mut bytes = vec![0; parts(to, rows, tensor.shape.iter().skip(1).product()).end as usize];
    quantized::quantize(name, tensor, to, ALIGNMENT, &mut bytes)?;
    Ok(bytes)
}

impl Lowering<'_> {
    /// Unpacks the rows of a quantized weight that a view names, in the compute type.
    pub(super) fn dequantize(&mut self, weight: &View) -> Result<View, EngineError> {
        let (rows, columns) = self.whole(weight);
        let parts = parts(weight.dtype, rows, columns);
        let dtype = self.unpacked_type();
        let place = Place::Unpacked;
        let unpacked = View { place, offset: 0, dtype, rows: weight.rows, stride: columns, start: 0, width: columns };
        self.reserve_unpacked(&unpacked);
        let all = (parts.end / 4) as usize;
        let tensor = View { dtype: DType::U32, rows: 1, stride: all, start: 0, width: all, ..*weight };
        let mut call = self.call("dequantize");
        self.bind(&mut call, "weight", &tensor);
        let count = weight.rows * columns;
        let eights = [weight.start, count, columns].iter().all(|number| number.is_multiple_of(8));
        let words = eights && dtype == DType::F16;
        if words {
            self.bind_element(&mut call, "output", &unpacked, Element::F16Words, 16);
        } else {
            self.bind_as(&mut call, "output", &unpacked, eights);
        }
        call.flag("EIGHTS", eights).flag("WORDS", words);
        if weight.dtype == DType::Int8 {
            call.constant("INT8", 1);
        } else {
            self.bind(&mut call, "table", &tables::view());
        }
        call.number("first", weight.start).number("count", count).number("columns", columns);
        call.number("scales", (parts.scales / 4) as usize).number("group_scales", (parts.group_scales / 4) as usize);
        call.number("offset", (parts.offset / 4) as usize);
        let each = if eights { 4 * 2048 } else { 256 };
        self.launch(call, [count.div_ceil(each).min(16384), 1, 1]).map(|()| unpacked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::quantized::{BLOCK, GROUP, NF4};
    use crate::program::block8;

    fn nf4(values: &[f32], rows: usize, columns: usize) -> Vec<u8> {
        let tensor = Tensor { dtype: DType::F32, shape: vec![rows, columns], bytes: bytemuck::cast_slice(values) };
        quantize("weight", &tensor, DType::Nf4).expect("quantized")
    }

    fn unpack(bytes: &[u8], rows: usize, columns: usize) -> Vec<f32> {
        let parts = parts(DType::Nf4, rows, columns);
        let float = |at: usize| f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (0..rows * columns)
            .map(|i| {
                let code = (bytes[i / 2] >> (4 - (i % 2) * 4)) & 15;
                let block = i / BLOCK;
                let scale = block8::Map::Signed.values()[usize::from(bytes[parts.scales as usize + block])]
                    * float(parts.group_scales as usize + 4 * (block / GROUP))
                    + float(parts.offset as usize);
                NF4[usize::from(code)] * scale
            })
            .collect()
    }

    #[test]
    fn four_bits_keep_a_normal_tensor_within_a_tenth() {
        let (rows, columns) = (96, 200);
        // A sum of uniform numbers is near enough to normal.
        let uniform = |i: usize, j: u32| crate::program::random::uniform([1, 2, 3, 4], j, i as u32, 0) - 0.5;
        let values: Vec<f32> = (0..rows * columns).map(|i| (0..6).map(|j| uniform(i, j)).sum::<f32>() * 0.05).collect();
        let found = unpack(&nf4(&values, rows, columns), rows, columns);
        let norm: f32 = values.iter().map(|x| x * x).sum::<f32>().sqrt();
        let error: f32 = values.iter().zip(&found).map(|(x, y)| (x - y).powi(2)).sum::<f32>().sqrt();
        assert!(error / norm < 0.11, "{}", error / norm);
    }

    /// A checkpoint of one tensor.
    struct One(Vec<f32>, Vec<usize>);

    impl crate::backend::WeightSource for One {
        fn tensor(&self, _: &str) -> Result<crate::backend::Tensor<'_>, EngineError> {
            let bytes = bytemuck::cast_slice(&self.0);
            Ok(crate::backend::Tensor { dtype: DType::F32, shape: self.1.clone(), bytes })
        }
    }

    /// `input · weightᵀ` on the software adapter, with the weight held as `dtype` and unpacked to `compute`.
    fn product(
        (dtype, compute): (DType, DType),
        weight: &[f32],
        input: &[f32],
        rows: usize,
        columns: usize,
    ) -> Vec<f32> {
        use crate::backend::Session;
        use crate::program::{Columns, Kind, Op, Projection, Role, WorkloadBuilder};
        let tokens = input.len() / columns;
        let adapter = super::super::adapters().iter().find(|adapter| adapter.software).map(|adapter| adapter.index);
        assert!(adapter.is_some(), "no software Vulkan adapter: run tests/mesa.sh");
        let options = super::super::Options { adapter, compute: Some(compute), portable: compute == DType::F32 };
        let mut builder = WorkloadBuilder::new();
        let from = builder.persistent("input", &[tokens, columns], DType::F32, Kind::Output);
        let to = builder.persistent("output", &[tokens, rows], DType::F32, Kind::Output);
        let weight_id = builder.persistent("weight", &[rows, columns], dtype, Kind::Weight);
        builder.begin("linear", Role::Evaluate, tokens);
        let output = Columns { buffer: to, start: 0, width: rows };
        let projection = Projection { weight: weight_id, bias: None, output, lora: None };
        builder.push("linear", Op::Linear { input: from, projections: vec![projection] });
        builder.end();
        let target = super::super::target(&options).expect("a target");
        let plan = crate::program::plan::plan(builder.finish(), target).expect("a plan");
        let source = std::sync::Arc::new(One(weight.to_vec(), vec![rows, columns]));
        let mut session = super::super::open(plan, source, &options).expect("opens");
        session.write(from, bytemuck::cast_slice(input)).expect("written");
        session.run(0).expect("runs");
        crate::backend::read_values(&mut session, to).expect("read")
    }

    #[test]
    fn a_quantized_weight_multiplies_as_its_unpacked_self() {
        // Rows of whole eights are unpacked eight at a time.
        for (rows, columns) in [(72, 100), (24, 192)] {
            let number = |i: usize| crate::program::random::uniform([5, 6, 7, 8], 9, i as u32, 0) - 0.5;
            let weight: Vec<f32> = (0..rows * columns).map(number).collect();
            let input: Vec<f32> = (0..3 * columns).map(|i| number(i + 77_777)).collect();
            let unpacked = unpack(&nf4(&weight, rows, columns), rows, columns);
            for (compute, tolerance) in [(DType::F32, 1e-4), (DType::F16, 1e-2)] {
                let want = product((DType::F32, compute), &unpacked, &input, rows, columns);
                let found = product((DType::Nf4, compute), &weight, &input, rows, columns);
                assert!(want.iter().zip(&found).all(|(a, b)| (a - b).abs() < tolerance), "{want:?} {found:?}");
                let exact = product((DType::F32, compute), &weight, &input, rows, columns);
                let rounded = product((DType::Int8, compute), &weight, &input, rows, columns);
                assert!(exact.iter().zip(&rounded).all(|(a, b)| (a - b).abs() < 0.05), "{exact:?} {rounded:?}");
            }
        }
    }
}
