//! Quantized weights: how they are made on loading, how they lie in device memory, and the dispatch that unpacks them.

use rayon::prelude::*;

use super::adapter::ENGINE;
use super::kernel::Element;
use super::lower::Lowering;
use super::storage::{Place, View};
use super::tables;
use crate::backend::EngineError;
use crate::program::{DType, block8};

/// Elements that share a scale, and scales that share one of their own.
const BLOCK: usize = 64;
const GROUP: usize = 256;

/// Halfway points between the levels of NF4, as bitsandbytes' decision tree has them.
const BOUNDS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_4,
    -0.137_911_74,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_45,
    0.642_786_9,
    0.861_478_45,
];

/// Byte offsets of a quantized tensor's parts; each starts at a multiple of four. Codes come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// One a block (NF4: a byte) or a row (int8: an f32).
    pub scales: u64,
    /// f32, one a group (NF4).
    pub group_scales: u64,
    /// f32 (NF4).
    pub offset: u64,
    pub end: u64,
}

impl Parts {
    pub fn of(dtype: DType, rows: usize, columns: usize) -> Parts {
        let elements = rows * columns;
        let four = |bytes: usize| (bytes as u64).next_multiple_of(4);
        if dtype == DType::Int8 {
            let scales = four(elements);
            let end = scales + 4 * rows as u64;
            return Parts { scales, group_scales: end, offset: end, end };
        }
        let blocks = elements.div_ceil(BLOCK);
        let scales = four(elements.div_ceil(2));
        let group_scales = scales + four(blocks);
        let offset = group_scales + 4 * blocks.div_ceil(GROUP) as u64;
        Parts { scales, group_scales, offset, end: offset + 4 }
    }
}

/// Bytes that a quantized weight takes on the device.
pub fn device_bytes(dtype: DType, rows: usize, columns: usize) -> u64 {
    Parts::of(dtype, rows, columns).end.next_multiple_of(256)
}

/// Quantizes a `[rows, columns]` tensor.
///
/// # Errors
/// For types that the engine does not quantize to.
pub fn quantize(name: &str, dtype: DType, values: &[f32], rows: usize, columns: usize) -> Result<Vec<u8>, EngineError> {
    match dtype {
        DType::Nf4 => Ok(quantize_nf4(values, rows, columns)),
        DType::Int8 => Ok(quantize_int8(values, rows, columns)),
        other => {
            let what = format!("{name} as {}: it has nf4 and int8", other.name());
            Err(EngineError::Unsupported { engine: ENGINE, what })
        }
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |most, value| most.max(value.abs()))
}

fn quantize_nf4(values: &[f32], rows: usize, columns: usize) -> Vec<u8> {
    let parts = Parts::of(DType::Nf4, rows, columns);
    let mut bytes = vec![0; parts.end as usize];
    let blocks = values.len().div_ceil(BLOCK);
    let mut scales = vec![0.0f32; blocks];
    let (codes, rest) = bytes.split_at_mut(parts.scales as usize);
    values.par_chunks(BLOCK).zip(codes.par_chunks_mut(BLOCK / 2)).zip(scales.par_iter_mut()).for_each(
        |((values, codes), scale)| {
            *scale = largest(values);
            let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
            for (i, &value) in values.iter().enumerate() {
                let code = BOUNDS.iter().filter(|&&bound| value * inverse > bound).count() as u8;
                codes[i / 2] |= if i % 2 == 0 { code << 4 } else { code };
            }
        },
    );
    let offset = (scales.iter().map(|&scale| f64::from(scale)).sum::<f64>() / blocks.max(1) as f64) as f32;
    let base = parts.scales as usize;
    for (group, scales) in scales.chunks(GROUP).enumerate() {
        let centred: Vec<f32> = scales.iter().map(|scale| scale - offset).collect();
        let most = largest(&centred);
        let inverse = if most > 0.0 { 1.0 / most } else { 0.0 };
        for (i, &value) in centred.iter().enumerate() {
            rest[group * GROUP + i] = block8::Map::Signed.nearest(value * inverse);
        }
        let at = parts.group_scales as usize - base + 4 * group;
        rest[at..at + 4].copy_from_slice(&most.to_le_bytes());
    }
    let at = parts.offset as usize - base;
    rest[at..at + 4].copy_from_slice(&offset.to_le_bytes());
    bytes
}

fn quantize_int8(values: &[f32], rows: usize, columns: usize) -> Vec<u8> {
    let parts = Parts::of(DType::Int8, rows, columns);
    let mut bytes = vec![0; parts.end as usize];
    let (codes, scales) = bytes.split_at_mut(parts.scales as usize);
    let columns = columns.max(1);
    for ((values, codes), scale) in
        values.chunks(columns).zip(codes.chunks_mut(columns)).zip(scales.as_chunks_mut::<4>().0)
    {
        let most = largest(values) / 127.0;
        let inverse = if most > 0.0 { 1.0 / most } else { 0.0 };
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = (value * inverse).round() as i8 as u8;
        }
        *scale = most.to_le_bytes();
    }
    bytes
}

impl Lowering<'_> {
    /// Unpacks the rows of a quantized weight that a view names, in the compute type.
    pub(super) fn dequantize(&mut self, weight: &View) -> Result<View, EngineError> {
        let (rows, columns) = self.whole(weight);
        let parts = Parts::of(weight.dtype, rows, columns);
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
        let each = if eights { 2048 } else { 256 };
        self.launch(call, [count.div_ceil(each).min(16384), 1, 1]).map(|()| unpacked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(bytes: &[u8], rows: usize, columns: usize) -> Vec<f32> {
        let parts = Parts::of(DType::Nf4, rows, columns);
        let float = |at: usize| f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (0..rows * columns)
            .map(|i| {
                let code = (bytes[i / 2] >> (4 - (i % 2) * 4)) & 15;
                let block = i / BLOCK;
                let scale = block8::Map::Signed.values()[usize::from(bytes[parts.scales as usize + block])]
                    * float(parts.group_scales as usize + 4 * (block / GROUP))
                    + float(parts.offset as usize);
                tables::NF4[usize::from(code)] * scale
            })
            .collect()
    }

    #[test]
    fn four_bits_keep_a_normal_tensor_within_a_tenth() {
        let (rows, columns) = (96, 200);
        // A sum of uniform numbers is near enough to normal.
        let uniform = |i: usize, j: u32| crate::program::random::uniform([1, 2, 3, 4], j, i as u32, 0) - 0.5;
        let values: Vec<f32> = (0..rows * columns).map(|i| (0..6).map(|j| uniform(i, j)).sum::<f32>() * 0.05).collect();
        let found = unpack(&quantize_nf4(&values, rows, columns), rows, columns);
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
            let unpacked = unpack(&quantize_nf4(&weight, rows, columns), rows, columns);
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
