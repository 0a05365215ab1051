//! Weights that the card quantizes as they arrive: their codes are the nearest, and both passes of a linear operation
//! multiply with them as an f64 twin does on the same codes.

use super::twin::quantized::{LEVELS, unpack_nf4};
use super::*;

/// Codes of blocks of 64: the level nearest to the value over the block's largest magnitude.
fn codes(values: &[f32]) -> Vec<u8> {
    let block = |block: &[f32]| {
        let scale = block.iter().fold(0.0f32, |top, x| top.max(x.abs()));
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let near =
            |x: f32| (0..15).filter(move |&i| f64::from(x) > (f64::from(LEVELS[i]) + f64::from(LEVELS[i + 1])) / 2.0);
        block.iter().map(|x| near(x * inverse).count() as u8).collect::<Vec<_>>()
    };
    values.chunks(64).flat_map(block).collect()
}

/// Value of an e4m3 code.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size =
        if exponent == 0 { mantissa / 8.0 * 2f64.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if code & 0x80 == 0 { size } else { -size }
}

/// Shapes: two projections of one input; rows of a multiple of 64 and not.
const SHAPES: [(usize, usize, [usize; 2]); 3] = [(37, 576, [192, 64]), (130, 4096, [1024, 512]), (5, 96, [32, 48])];

/// A linear operation on quantized weights, forward and backward, as the card ran it.
struct Ran {
    /// Of each projection: the weight as the engine gives it out, and what it was made from.
    weights: Vec<(Vec<u8>, Vec<f32>)>,
    input: Vec<f64>,
    grad_output: Vec<f64>,
    output: Vec<f64>,
    grad_input: Vec<f64>,
}

impl Ran {
    fn new(target: &Target, dtype: DType, tokens: usize, inputs: usize, outputs: [usize; 2]) -> Self {
        let mut builder = WorkloadBuilder::new();
        builder.begin("case", Role::Micro, tokens);
        let width = outputs.iter().sum();
        let input = builder.persistent("input", &[tokens, inputs], DType::BF16, Kind::Input);
        let grad = builder.persistent("grad_output", &[tokens, width], DType::BF16, Kind::Input);
        let output = builder.persistent("output", &[tokens, width], DType::BF16, Kind::Output);
        let grad_input = builder.persistent("grad_input", &[tokens, inputs], DType::BF16, Kind::Output);
        let mut tensors = HashMap::new();
        let (mut forward, mut backward, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        for (index, &rows) in outputs.iter().enumerate() {
            let name = format!("{index}.weight");
            let weight = builder.persistent(&name, &[rows, inputs], dtype, Kind::Weight);
            let values: Vec<f32> = uniform(&name, rows * inputs).iter().map(|v| v * v * v * 0.1).collect();
            tensors.insert(name, (vec![rows, inputs], values));
            let columns = |buffer| Columns { buffer, start, width: rows };
            forward.push(Projection { weight, bias: None, output: columns(output), lora: None });
            let grad_output = columns(grad);
            backward.push(ProjectionBackward { weight, grad_output, grad_weight: None, grad_bias: None, lora: None });
            ids.push(weight);
            start += rows;
        }
        builder.push("forward", Op::Linear { input, projections: forward });
        builder.push("backward", Op::LinearBackward { input, grad_input: Some(grad_input), projections: backward });
        builder.end();
        let plan = plan(builder.finish(), target.clone()).expect("a plan");
        let tensors = Arc::new(Tensors(tensors));
        let mut session = open(plan, tensors.clone()).expect("a session");
        let (x, g) = (uniform("x", tokens * inputs), uniform("g", tokens * width));
        session.write(input, &bf16_bytes(&x)).expect("write");
        session.write(grad, &bf16_bytes(&g)).expect("write");
        session.run(0).expect("run");
        let weight = |id: BufferId, session: &mut dyn Session| {
            let buffer = session.plan().workload.buffer(id).clone();
            let mut bytes = vec![0; buffer.bytes() as usize];
            session.read(id, &mut bytes).expect("read");
            (bytes, tensors.0[&buffer.name].1.clone())
        };
        let weights = ids.into_iter().map(|id| weight(id, session.as_mut())).collect();
        let rounded = |values: &[f32]| values.iter().map(|&v| bf16::from_f32(v).to_f64()).collect();
        Self {
            weights,
            input: rounded(&x),
            grad_output: rounded(&g),
            output: bf16_values(session.as_mut(), output),
            grad_input: bf16_values(session.as_mut(), grad_input),
        }
    }

    /// Both passes beside the twin on the weights that the codes stand for, `[width, inputs]`.
    fn check(&self, what: &str, weights: &[f64], inputs: usize, allowed: f64) {
        let (width, tokens) = (weights.len() / inputs, self.input.len() / inputs);
        let mut expected_output = vec![0.0; tokens * width];
        let mut expected_grad = vec![0.0; tokens * inputs];
        for t in 0..tokens {
            for n in 0..width {
                let row = &weights[n * inputs..(n + 1) * inputs];
                let products = row.iter().zip(&self.input[t * inputs..]).map(|(w, x)| w * x);
                expected_output[t * width + n] = products.sum();
                for (to, w) in expected_grad[t * inputs..(t + 1) * inputs].iter_mut().zip(row) {
                    *to += self.grad_output[t * width + n] * w;
                }
            }
        }
        for (part, found, expected) in
            [("output", &self.output, expected_output), ("gradient", &self.grad_input, expected_grad)]
        {
            let error = relative(found, &expected);
            println!("{what}, {tokens}x{inputs}: the {part} is off by {error:.4}");
            assert!(error < allowed, "{what}, {tokens}x{inputs}: the {part} is off by {error}");
        }
    }
}

#[test]
fn four_bit_weights_are_those_of_bitsandbytes_and_multiply_right() {
    let Some(target) = card() else { return };
    for (tokens, inputs, outputs) in SHAPES {
        let ran = Ran::new(&target, DType::Nf4, tokens, inputs, outputs);
        let mut weights = Vec::new();
        for (bytes, values) in &ran.weights {
            let expected = codes(values);
            let found = (0..values.len()).map(|i| if i % 2 == 0 { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 });
            let differing = found.zip(&expected).filter(|(a, b)| a != *b).count();
            assert!(differing * 100_000 <= values.len(), "{differing} of {} codes differ", values.len());
            let unpacked = unpack_nf4(bytes, values.len());
            let original: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            let loss = relative(&unpacked, &original);
            assert!(loss < 0.13, "4 bits lose {loss}");
            weights.extend(unpacked);
        }
        ran.check("4 bits", &weights, inputs, 1e-2);
    }
}

/// One scale a row, which takes its largest magnitude to 127, and the nearest code.
#[test]
fn eight_bit_integer_weights_are_the_nearest_and_multiply_right() {
    let Some(target) = card() else { return };
    // Rows of 36: not a multiple of the eight values that are read at once.
    for (tokens, inputs, outputs) in SHAPES.into_iter().chain([(7, 36, [24, 8])]) {
        let ran = Ran::new(&target, DType::Int8, tokens, inputs, outputs);
        let mut weights = Vec::new();
        for (bytes, values) in &ran.weights {
            let (codes, scales) = bytes.split_at(values.len());
            let rows = values.chunks(inputs).zip(codes.chunks(inputs)).zip(scales.as_chunks::<4>().0);
            for ((values, codes), scale) in rows {
                let scale = f64::from(f32::from_le_bytes(*scale));
                let top = values.iter().fold(0.0f32, |top, v| top.max(v.abs()));
                assert!((scale * 127.0 / f64::from(top) - 1.0).abs() < 1e-6, "{scale} for {top}");
                for (&code, &value) in codes.iter().zip(values) {
                    let stands_for = f64::from(code as i8) * scale;
                    assert!((stands_for - f64::from(value)).abs() <= 0.5001 * scale, "{value} became {stands_for}");
                    weights.push(stands_for);
                }
            }
        }
        ran.check("8-bit integers", &weights, inputs, 1e-2);
    }
}

/// The weights of an operation share a scale, which takes the largest magnitude to 448.
#[test]
fn eight_bit_float_weights_are_the_nearest_and_multiply_right() {
    let Some(target) = card() else { return };
    if target.fp8_flops.is_none() {
        println!("left out: {} has no 8-bit products", target.name);
        return;
    }
    let largest = (0..=0x7e).map(e4m3).fold(0.0, f64::max);
    assert_eq!(largest, 448.0);
    for (tokens, inputs, outputs) in SHAPES.into_iter().chain([(1, 96, [32, 48])]) {
        let ran = Ran::new(&target, DType::Fp8, tokens, inputs, outputs);
        let (mut weights, mut scales, mut top) = (Vec::new(), Vec::new(), 0.0f32);
        for (bytes, values) in &ran.weights {
            let (codes, scale) = bytes.split_at(values.len());
            let scale = f64::from(f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]));
            scales.push(scale);
            top = values.iter().fold(top, |top, v| top.max(v.abs()));
            for (&code, &value) in codes.iter().zip(values) {
                // The neighbours of the code are no nearer, but for the last digit of the division.
                let off = |code: u8| (e4m3(code) * scale - f64::from(value)).abs();
                let (below, above) =
                    (code.saturating_sub(u8::from(code & 0x7f > 0)), code + u8::from(code & 0x7f < 0x7e));
                assert!(off(code) <= off(below).min(off(above)) + 1e-6, "{value} became {}", e4m3(code) * scale);
                weights.push(e4m3(code) * scale);
            }
        }
        assert_eq!(scales[0], scales[1], "the weights of an operation share a scale");
        assert!((scales[0] * 448.0 / f64::from(top) - 1.0).abs() < 1e-6);
        ran.check("8-bit floats", &weights, inputs, 5e-2);
    }
}
