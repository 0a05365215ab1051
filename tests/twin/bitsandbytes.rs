//! What bitsandbytes makes of the same weights and gradients: `tests/fixtures/bitsandbytes.safetensors`, written by
//! `tests/reference/make_bitsandbytes.py`.

use std::path::Path;
use std::sync::LazyLock;

use safetensors::SafeTensors;
use tune::program::{AdamWPart, Columns, Projection, Role, WorkloadBuilder, random};

use super::*;

static FIXTURE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    // Where this was built, or run: the folder of the project.
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if built.is_dir() { built } else { Path::new(".") };
    let path = root.join("tests/fixtures/bitsandbytes.safetensors");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
});

fn fixture() -> SafeTensors<'static> {
    SafeTensors::deserialize(&FIXTURE).expect("the fixture")
}

fn bytes(name: &str) -> Vec<u8> {
    fixture().tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data().to_vec()
}

fn values(name: &str) -> Vec<f32> {
    let bytes = bytes(name);
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// How many of two lists' entries differ.
fn differing<T: PartialEq>(found: &[T], expected: &[T]) -> usize {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).filter(|(found, expected)| found != expected).count()
}

/// The one weight of a fixture, under the name of the buffer that asks for it.
struct One(&'static str);

impl WeightSource for One {
    fn tensor(&self, _: &str) -> Result<Tensor<'_>, EngineError> {
        let tensors: SafeTensors<'static> = fixture();
        let view = tensors.tensor(&format!("nf4.{}.weight", self.0)).expect("a weight");
        let dtype = if view.dtype() == safetensors::Dtype::BF16 { DType::BF16 } else { DType::F32 };
        Ok(Tensor { dtype, shape: view.shape().to_vec(), bytes: view.data() })
    }
}

/// Weights in NF4 with double quantization: its codes, its codes of scales, its scales of those, its offset.
///
/// # Panics
/// When a code differs.
pub fn check_nf4(target: &Target, open: Opener) {
    for name in ["f32", "bf16"] {
        let shape = One(name).tensor("").expect("a weight").shape;
        let (rows, columns) = (shape[0], shape[1]);
        let mut builder = WorkloadBuilder::new();
        builder.begin("case", Role::Evaluate, 1);
        let input = builder.persistent("input", &[1, columns], target.compute, Kind::Input);
        let output = builder.persistent("output", &[1, rows], target.compute, Kind::Output);
        let weight = builder.persistent("weight", &shape, DType::Nf4, Kind::Weight);
        let columns_of = Columns { buffer: output, start: 0, width: rows };
        let projection = Projection { weight, bias: None, output: columns_of, lora: None };
        builder.push("forward", Op::Linear { input, projections: vec![projection] });
        builder.end();
        let plan = plan(builder.finish(), target.clone()).expect("a plan");
        let taken = plan.workload.buffer(weight).bytes() as usize;
        let mut session = open(plan, Arc::new(One(name))).expect("a session");
        let mut found = vec![0; taken];
        session.read(weight, &mut found).expect("read");

        let (elements, blocks) = (rows * columns, (rows * columns).div_ceil(64));
        let part = |part: &str| bytes(&format!("nf4.{name}.{part}"));
        let (codes, rest) = found.split_at(elements.div_ceil(2));
        let (scale_codes, rest) = rest.split_at(blocks);
        assert_eq!(differing(codes, &part("codes")), 0, "codes of {name}");
        assert_eq!(differing(scale_codes, &part("scale_codes")), 0, "codes of the scales of {name}");
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        };
        let expected: Vec<f32> =
            [values(&format!("nf4.{name}.group_scales")), values(&format!("nf4.{name}.offset"))].concat();
        for (found, expected) in floats(rest).into_iter().zip(&expected) {
            assert!(
                (found / expected - 1.0).abs() < 1e-5,
                "{name}: a scale of scales or the offset is {found}, not {expected}"
            );
        }
        // It gives back values of the weight's own type.
        let digits = if name == "bf16" { 2f64.powi(-8) } else { 1e-6 };
        let expected = values(&format!("nf4.{name}.values"));
        for (worth, expected) in
            quantized::unpack_nf4(&found, elements).into_iter().zip(expected.into_iter().map(f64::from))
        {
            assert!((worth - expected).abs() <= digits * expected.abs() + 1e-6, "{name}: {worth}, not {expected}");
        }
        println!("NF4 of {rows}x{columns} in {name}: {elements} codes and {blocks} scales are those of bitsandbytes");
    }
}

/// Updates of its 8-bit AdamW, each from the state in which it was before.
///
/// # Panics
/// When a parameter or a moment differs.
pub fn check_adamw8bit(target: &Target, open: Opener) {
    let maps = [("first", block8::Map::Signed), ("second", block8::Map::Unsigned)];
    for (moment, map) in maps {
        let expected = values(&format!("adamw8bit.{moment}_map"));
        assert_eq!(differing(map.values(), &expected), 0, "the {moment} map: {:?}, not {expected:?}", map.values());
    }
    for name in ["whole", "ragged"] {
        let count = values(&format!("adamw8bit.{name}.start")).len();
        let mut builder = WorkloadBuilder::new();
        builder.begin("update", Role::Update, 0);
        let buffer =
            |builder: &mut WorkloadBuilder, name: &str, dtype, kind| builder.persistent(name, &[count], dtype, kind);
        let parameter = buffer(&mut builder, "parameter", DType::F32, Kind::Adapter);
        let gradient = buffer(&mut builder, "gradient", DType::F32, Kind::Gradient);
        let first_moment = buffer(&mut builder, "first", DType::Block8, Kind::Optimizer);
        let second_moment = buffer(&mut builder, "second", DType::Block8, Kind::Optimizer);
        let norm = builder.persistent("norm", &[1], DType::F32, Kind::Scalar);
        let hyper = builder.persistent("hyper", &[4], DType::F32, Kind::Scalar);
        let key = builder.persistent("key", &[4], DType::U32, Kind::Scalar);
        let parts = vec![AdamWPart { parameter, gradient, first_moment, second_moment, stream: random::stream(name) }];
        let betas = [0.9, 0.999];
        let (epsilon, weight_decay, max_grad_norm) = (1e-8, 0.01, 0.0);
        builder.push("update", Op::AdamW { parts, norm, hyper, key, betas, epsilon, weight_decay, max_grad_norm });
        builder.end();
        let plan = plan(builder.finish(), target.clone()).expect("a plan");
        let mut session = open(plan, Arc::new(One("f32"))).expect("a session");
        let part = |part: &str, step: usize| bytes(&format!("adamw8bit.{name}.{part}.{step}"));
        let state = |moment: &str, step: usize| {
            [part(&format!("{moment}_scales"), step), part(&format!("{moment}_codes"), step)].concat()
        };
        let (mut codes_off, mut codes) = (0, 0);
        for step in 0..5 {
            let before =
                if step == 0 { bytes(&format!("adamw8bit.{name}.start")) } else { part("parameter", step - 1) };
            session.write(parameter, &before).expect("write");
            session.write(gradient, &part("gradient", step)).expect("write");
            for (id, moment) in [(first_moment, "first"), (second_moment, "second")] {
                let zeros = vec![0; block8::scale_bytes(count) + count];
                session.write(id, &if step == 0 { zeros } else { state(moment, step - 1) }).expect("write");
            }
            let corrections = betas.map(|beta: f32| 1.0 - f64::from(beta).powi(step as i32 + 1));
            let settings = [1e-2, corrections[0] as f32, corrections[1].sqrt() as f32, 0.0];
            session.write(hyper, bytemuck::cast_slice(&settings)).expect("write");
            session.write(norm, &1.0f32.to_le_bytes()).expect("write");
            session.write(key, bytemuck::cast_slice(&[0u32; 4])).expect("write");
            session.run(0).expect("run");

            let mut found = vec![0; 4 * count];
            session.read(parameter, &mut found).expect("read");
            let floats = |bytes: &[u8]| -> Vec<f32> {
                bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
            };
            let expected = values(&format!("adamw8bit.{name}.parameter.{step}"));
            for ((found, expected), before) in floats(&found).into_iter().zip(expected).zip(floats(&before)) {
                // It decays the weight after the step and not before: by rate x decay of the step. Where the second moment was
                // rounded to nothing steps are large, and their last digits with them.
                let allowed = 3e-4 * (expected - before).abs() + 1e-6;
                let off = (found - expected).abs();
                assert!(off < allowed, "{name}, update {step}: {before} became {found}, not {expected}");
            }
            for (id, moment) in [(first_moment, "first"), (second_moment, "second")] {
                let expected = state(moment, step);
                let mut found = vec![0; expected.len()];
                session.read(id, &mut found).expect("read");
                let at = block8::scale_bytes(count);
                let pairs = found[..at].as_chunks::<4>().0.iter().zip(expected[..at].as_chunks::<4>().0);
                for (found, expected) in pairs.map(|(a, b)| (f32::from_le_bytes(*a), f32::from_le_bytes(*b))) {
                    assert!(
                        (found / expected - 1.0).abs() < 1e-5,
                        "{name}, update {step}: a scale is {found}, not {expected}"
                    );
                }
                let apart = found[at..].iter().zip(&expected[at..]).map(|(a, b)| a.abs_diff(*b)).max();
                assert!(apart <= Some(1), "{name}, update {step}: a code of the {moment} moment is off by {apart:?}");
                codes_off += differing(&found[at..], &expected[at..]);
                codes += count;
            }
        }
        println!(
            "AdamW in 8 bits, {count} parameters: {codes_off} of {codes} codes are the neighbours of bitsandbytes'"
        );
        assert!(codes_off * 200 <= codes, "{codes_off} of {codes} codes differ");
    }
}
