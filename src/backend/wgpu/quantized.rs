//! Quantized weights: how they lie in device memory, and the dispatch that unpacks them.

use super::kernel::Element;
use super::lower::{Call, Lowering};
use super::storage::{Place, View};
use super::tables;
use crate::backend::quantized::{self, Parts};
use crate::backend::{EngineError, Tensor};
use crate::program::DType;

/// Rows and columns that a group of threads unpacks the other way round.
const TRANSPOSED: usize = 64;

/// Every part starts at a word.
const ALIGNMENT: u64 = 4;

fn parts(dtype: DType, rows: usize, columns: usize) -> Parts {
    Parts::of(dtype, rows, columns, ALIGNMENT)
}

/// Bytes that a quantized weight takes on the device.
pub fn device_bytes(dtype: DType, rows: usize, columns: usize) -> u64 {
    parts(dtype, rows, columns).end.next_multiple_of(256)
}

/// Rows of which some fill whole groups of scales, so that what follows can be packed by itself.
pub fn whole_rows(columns: usize) -> usize {
    let group = quantized::BLOCK * quantized::GROUP;
    // The power of two in the number of columns.
    group / (1usize << columns.trailing_zeros().min(14)).min(group)
}

/// A packed tensor cut after every `rows` rows, a multiple of [`whole_rows`]: each piece packed by itself, end to end at
/// multiples of [`device_bytes`] of so many rows.
pub fn cut(packed: &[u8], dtype: DType, shape: [usize; 2], rows: usize) -> Vec<u8> {
    let [all, columns] = shape;
    let whole = parts(dtype, all, columns);
    let step = device_bytes(dtype, rows, columns) as usize;
    let mut pieces = vec![0; all.div_ceil(rows) * step];
    for (piece, first) in pieces.chunks_mut(step).zip((0..all).step_by(rows)) {
        let count = rows.min(all - first);
        let own = parts(dtype, count, columns);
        let mut copy = |from: u64, to: u64, bytes: usize| {
            piece[to as usize..][..bytes].copy_from_slice(&packed[from as usize..][..bytes]);
        };
        let (begin, elements) = ((first * columns) as u64, count * columns);
        if dtype == DType::Int8 {
            copy(begin, 0, elements);
            copy(whole.scales + 4 * first as u64, own.scales, 4 * count);
            continue;
        }
        let (block, group) = (quantized::BLOCK as u64, (quantized::BLOCK * quantized::GROUP) as u64);
        copy(begin / 2, 0, elements.div_ceil(2));
        copy(whole.scales + begin / block, own.scales, elements.div_ceil(quantized::BLOCK));
        let groups = elements.div_ceil(quantized::BLOCK * quantized::GROUP);
        copy(whole.group_scales + 4 * (begin / group), own.group_scales, 4 * groups);
        copy(whole.offset, own.offset, 4);
    }
    let last = (all - 1) % rows + 1;
    pieces.truncate((all - last) / rows * step + device_bytes(dtype, last, columns) as usize);
    pieces
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
        let columns = weight.width;
        let unpacked = self.scratch_for(weight.rows, columns);
        let (mut call, first) = self.unpacking(weight);
        let count = weight.rows * columns;
        let eights = [first, count, columns].iter().all(|number| number.is_multiple_of(8));
        let words = eights && unpacked.dtype == DType::F16;
        if words {
            self.bind_element(&mut call, "output", &unpacked, Element::F16Words, 16);
        } else {
            self.bind_as(&mut call, "output", &unpacked, eights);
        }
        call.flag("EIGHTS", eights).flag("WORDS", words).number("count", count);
        let each = if eights { 4 * 2048 } else { 256 };
        self.launch(call, [count.div_ceil(each).min(16384), 1, 1]).map(|()| unpacked)
    }

    /// Whether a weight can be unpacked `[K, N]`: quantized, to f16, in whole tiles.
    pub(super) fn transposes(&self, weight: &View) -> bool {
        weight.dtype.is_quantized()
            && self.unpacked_type() == DType::F16
            && [weight.rows, weight.width].iter().all(|count| count.is_multiple_of(TRANSPOSED))
    }

    /// Where [`Lowering::dequantize_transposed`] unpacks to.
    pub(super) fn transposed(&mut self, weight: &View) -> View {
        self.scratch_for(weight.width, weight.rows)
    }

    /// Unpacks the rows of a quantized weight that a view names as the columns of `unpacked`.
    pub(super) fn dequantize_transposed(&mut self, weight: &View, unpacked: &View) -> Result<(), EngineError> {
        let (mut call, _) = self.unpacking(weight);
        self.bind_element(&mut call, "output", unpacked, Element::F16Words, 16);
        call.flag("TRANSPOSED", true).number("rows", weight.rows);
        self.launch(call, [weight.width / TRANSPOSED, weight.rows / TRANSPOSED, 1])
    }

    fn scratch_for(&mut self, rows: usize, columns: usize) -> View {
        let (place, dtype) = (Place::Unpacked, self.unpacked_type());
        let unpacked = View { place, offset: 0, dtype, rows, stride: columns, start: 0, width: columns };
        self.reserve_unpacked(&unpacked);
        unpacked
    }

    /// A launch of `dequantize` with the weight bound, and the weight's first element in the piece that it lies in.
    fn unpacking(&self, weight: &View) -> (Call, usize) {
        let (mut rows, columns) = self.whole(weight);
        let (mut offset, mut first) = (weight.offset, weight.start);
        if let Some(cut) = self.cut(weight) {
            let piece = weight.start / columns / cut.rows;
            rows = cut.rows.min(rows - piece * cut.rows);
            offset += piece as u64 * cut.bytes;
            first -= piece * cut.rows * columns;
        }
        let parts = parts(weight.dtype, rows, columns);
        let all = (parts.end / 4) as usize;
        let tensor = View { offset, dtype: DType::U32, rows: 1, stride: all, start: 0, width: all, ..*weight };
        let mut call = self.call("dequantize");
        self.bind(&mut call, "weight", &tensor);
        if weight.dtype == DType::Int8 {
            call.constant("INT8", 1);
        } else {
            self.bind(&mut call, "table", &tables::view());
        }
        call.number("first", first).number("columns", columns).number("scales", (parts.scales / 4) as usize);
        call.number("group_scales", (parts.group_scales / 4) as usize).number("offset", (parts.offset / 4) as usize);
        (call, first)
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
    fn product(types: (DType, DType), weight: &[f32], input: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        product_within(None, types, weight, input, rows, columns)
    }

    /// The same with bindings and buffers of at most so many bytes.
    fn product_within(
        narrow: Option<[u64; 2]>,
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
        let options =
            super::super::Options { adapter, compute: Some(compute), portable: compute == DType::F32, narrow };
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

    /// A packed weight above a binding lies in pieces, each packed by itself, and is worth the same.
    #[test]
    fn a_quantized_weight_above_a_binding_is_cut() {
        // Whole groups of scales begin every 256 rows; the last piece is no whole one.
        for (rows, columns) in [(4100, 64), (4200, 192)] {
            let number = |i: usize| crate::program::random::uniform([5, 6, 7, 8], 9, i as u32, 0) - 0.5;
            let weight: Vec<f32> = (0..rows * columns).map(number).collect();
            let input: Vec<f32> = (0..2 * columns).map(|i| number(i + 77_777)).collect();
            for dtype in [DType::Nf4, DType::Int8] {
                for compute in [DType::F32, DType::F16] {
                    let whole = product((dtype, compute), &weight, &input, rows, columns);
                    let narrow = Some([100 << 10, 200 << 10]);
                    let cut = product_within(narrow, (dtype, compute), &weight, &input, rows, columns);
                    assert_eq!(whole, cut, "{rows}x{columns} in {} computing in {}", dtype.name(), compute.name());
                }
            }
        }
    }
}
