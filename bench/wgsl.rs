//! The WGSL engine on a card: `wgsl adapters | check | products [ROW ...] | attention | step MODEL BATCH SEQUENCE STEPS
//! [none|cheap|all] [lora|qlora|full]`.
//!
//! `check` holds the fast paths against the CPU engine on the same f16 inputs; run it before believing a time.
//! `DEVICE` (default `wgpu`) and `PRECISION` (default `auto`) choose, `TRACE=1` prints what was measured of each candidate
//! kernel. Rows of `products` are `square`, `long`, `nf4`, `lora` and `small`; `step` takes 135m, 1b or 8b (Llama shapes,
//! random weights), LoRA of rank 16 on all linear layers or every weight, packed rows of full length.

mod shapes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use half::{bf16, f16};
use tune::backend::{EngineError, Session, Tensor, WeightSource, cpu, inspect, wgpu};
use tune::model::{AdapterOptions, Method, Recompute, TrainingOptions, names, training_workload};
use tune::program::plan::plan;
use tune::program::{
    Access, AttentionShape, BufferId, Columns, DType, Kind, Lora, LoraBackward, Op, Projection, ProjectionBackward,
    Role, Target, Workload, WorkloadBuilder, random,
};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let variable = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_string());
    let options = wgpu::Options::parse(&variable("DEVICE", "wgpu"), &variable("PRECISION", "auto"))?;
    match words.as_slice() {
        ["adapters"] => {
            for adapter in wgpu::adapters() {
                println!("{adapter:?}");
            }
            println!("{:?}", wgpu::target(&options));
            Ok(())
        }
        ["check"] => check(&options),
        ["products", rows @ ..] => products(&options, rows),
        ["attention"] => attention(&options),
        ["step", model, batch, sequence, steps, rest @ ..] => {
            let recompute = match rest.first() {
                None | Some(&"none") => Recompute::None,
                Some(&"cheap") => Recompute::Cheap,
                Some(&"all") => Recompute::All,
                Some(other) => bail!("{other} is not none, cheap or all"),
            };
            step(&options, model, batch.parse()?, sequence.parse()?, steps.parse()?, recompute, rest)
        }
        _ => bail!(
            "usage: wgsl adapters | check | products | attention | step MODEL BATCH SEQUENCE STEPS [RECOMPUTE] [METHOD]"
        ),
    }
}

/// Weights of any name: uniform numbers that f16 and bf16 both hold.
struct Noise {
    values: Vec<bf16>,
    shapes: BTreeMap<String, Vec<usize>>,
}

fn noise(i: usize, size: f32) -> f32 {
    ((random::mix(i as u32) >> 8) as f32 / 8_388_608.0 - 1.0) * size
}

impl Noise {
    fn new(workload: &Workload) -> Self {
        use rayon::prelude::*;
        let shapes: BTreeMap<_, _> =
            workload.of_kind(Kind::Weight).map(|(_, buffer)| (buffer.name.clone(), buffer.shape.clone())).collect();
        let largest = shapes.values().map(|shape| shape.iter().product::<usize>()).max().unwrap_or(1);
        Self { values: (0..largest).into_par_iter().map(|i| bf16::from_f32(noise(i, 0.035))).collect(), shapes }
    }
}

impl WeightSource for Noise {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError> {
        let missing = || EngineError::Weight { name: name.into(), what: "the workload has no such tensor".into() };
        let shape = self.shapes.get(name).ok_or_else(missing)?;
        let bytes = bytemuck::cast_slice(&self.values[..shape.iter().product()]);
        Ok(Tensor { dtype: DType::BF16, shape: shape.clone(), bytes })
    }
}

/// `repeats` times the operations of `write`, as one program.
fn workload(repeats: usize, write: impl Fn(&mut WorkloadBuilder) -> Vec<Op>) -> Workload {
    let mut builder = WorkloadBuilder::new();
    builder.begin("bench", Role::Evaluate, 0);
    let ops = write(&mut builder);
    for _ in 0..repeats {
        for op in &ops {
            builder.push("bench", op.clone());
        }
    }
    builder.end();
    builder.finish()
}

/// A linear layer: forward, and backward with the gradients asked for.
#[derive(Clone, Copy)]
struct Layer<'a> {
    tokens: usize,
    k: usize,
    widths: &'a [usize],
    rank: usize,
    weight: DType,
}

fn linear(builder: &mut WorkloadBuilder, target: &Target, layer: Layer, forward: bool, trained: bool) -> Op {
    let Layer { tokens, k, widths, rank, weight } = layer;
    let compute = target.compute;
    let total: usize = widths.iter().sum();
    let name = if forward { "out" } else { "grad_out" };
    let input = builder.persistent("input", &[tokens, k], compute, Kind::Output);
    let output = builder.persistent(name, &[tokens, total], compute, Kind::Output);
    let ranks = rank * widths.len();
    let lora = (rank > 0).then(|| {
        let middle = builder.persistent("middle", &[tokens, ranks], compute, Kind::Output);
        let grad = builder.persistent("grad_middle", &[tokens, ranks], compute, Kind::Output);
        (middle, grad, builder.persistent("lora_scale", &[1], DType::F32, Kind::Scalar))
    });
    let (mut ahead, mut back, mut start) = (Vec::new(), Vec::new(), 0);
    for (i, &n) in widths.iter().enumerate() {
        let weight = builder.persistent(&format!("{i}.weight"), &[n, k], weight, Kind::Weight);
        let columns = Columns { buffer: output, start, width: n };
        start += n;
        let mut part =
            |name: &str, shape: &[usize], dtype| builder.persistent(&format!("{i}.{name}"), shape, dtype, Kind::Output);
        let branch = lora.map(|(middle, grad, scale)| {
            let columns = |buffer| Columns { buffer, start: rank * i, width: rank };
            let (a, b) = (part("a", &[rank, k], compute), part("b", &[n, rank], compute));
            let (grad_a, grad_b) = (part("grad_a", &[rank, k], DType::F32), part("grad_b", &[n, rank], DType::F32));
            let (middle, grad_middle) = (columns(middle), columns(grad));
            (
                Lora { a, b, middle, scale, dropout: None },
                LoraBackward { a, b, middle, grad_middle, grad_a, grad_b, scale, dropout: None },
            )
        });
        let grad_weight = trained.then(|| part("grad_weight", &[n, k], DType::F32));
        let (ahead_lora, back_lora) = branch.unzip();
        ahead.push(Projection { weight, bias: None, output: columns, lora: ahead_lora });
        back.push(ProjectionBackward { weight, grad_output: columns, grad_weight, grad_bias: None, lora: back_lora });
    }
    if forward {
        return Op::Linear { input, projections: ahead };
    }
    let grad_input = (!trained).then(|| builder.persistent("grad_input", &[tokens, k], compute, Kind::Output));
    Op::LinearBackward { input, grad_input, projections: back }
}

fn attention_ops(builder: &mut WorkloadBuilder, target: &Target, tokens: usize, shape: AttentionShape) -> [Op; 2] {
    let compute = target.compute;
    let mut buffer =
        |name: &str, columns: usize, dtype| builder.persistent(name, &[tokens, columns], dtype, Kind::Output);
    let (qkv, grad_qkv) = (buffer("qkv", shape.columns(), compute), buffer("grad_qkv", shape.columns(), compute));
    let output = buffer("output", shape.query_columns(), compute);
    let grad_output = buffer("grad_output", shape.query_columns(), compute);
    let (log_sum_exp, delta) =
        (buffer("log_sum_exp", shape.heads, DType::F32), buffer("delta", shape.heads, DType::F32));
    let document_start = builder.persistent("document_start", &[tokens], DType::I32, Kind::Input);
    let document_end = builder.persistent("document_end", &[tokens], DType::I32, Kind::Input);
    [
        Op::Attention { qkv, document_start, document_end, output, log_sum_exp, shape },
        Op::AttentionBackward {
            grad_output,
            qkv,
            output,
            log_sum_exp,
            document_start,
            document_end,
            delta,
            grad_qkv,
            shape,
        },
    ]
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window: None, softcap: None }
}

fn to_bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
    }
}

fn from_bytes(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// Inputs that both engines hold exactly; gradients of outputs up to `gradients`.
fn write_inputs(session: &mut dyn Session, documents: usize, gradients: f32) -> anyhow::Result<()> {
    let buffers = session.plan().workload.buffers.clone();
    for (index, buffer) in buffers.iter().enumerate() {
        let seed: usize = buffer.name.bytes().fold(7, |seed, byte| seed * 31 % 65_521 + usize::from(byte));
        let count = buffer.elements();
        let length = count.div_ceil(documents).max(1);
        let value = |i: usize| match buffer.name.as_str() {
            "document_start" => (i / length * length) as f32,
            "document_end" => ((i / length + 1) * length).min(count) as f32,
            "lora_scale" => 2.0,
            "qkv" => f16::from_f32(noise(i + seed * 7919, 2.0)).to_f32(),
            "grad_out" => f16::from_f32(noise(i + seed * 7919, gradients)).to_f32(),
            _ => f16::from_f32(noise(i + seed * 7919, 0.5)).to_f32(),
        };
        if buffer.kind != Kind::Weight {
            let values: Vec<f32> = (0..count).map(value).collect();
            session.write(BufferId(index as u32), &to_bytes(buffer.dtype, &values))?;
        }
    }
    Ok(())
}

/// Runs every step on the CPU engine's inputs and compares what it wrote.
fn compare(
    what: &str,
    options: &wgpu::Options,
    (documents, gradients): (usize, f32),
    write: impl Fn(&mut WorkloadBuilder, &Target) -> Vec<Op>,
) -> anyhow::Result<bool> {
    let open = |target: &Target| {
        let workload = workload(1, |builder| write(builder, target));
        let weights = Arc::new(Noise::new(&workload));
        Ok::<_, anyhow::Error>((plan(workload, target.clone())?, weights))
    };
    let (cpu_plan, weights) = open(&cpu::target()?)?;
    let mut reference = cpu::open(cpu_plan, weights)?;
    let (gpu_plan, weights) = open(&wgpu::target(options)?)?;
    let mut session = wgpu::open(gpu_plan, weights, options)?;
    write_inputs(&mut reference, documents, gradients)?;
    write_inputs(&mut session, documents, gradients)?;
    let mut good = true;
    let steps = session.plan().workload.programs[0].steps.clone();
    let dtype = |session: &dyn Session, id: BufferId| session.plan().workload.buffer(id).dtype;
    for (number, step) in steps.iter().enumerate() {
        for (id, access) in step.op.accesses() {
            let buffer = reference.plan().workload.buffer(id).clone();
            if access == Access::Write || buffer.kind == Kind::Weight || buffer.dtype == DType::I32 {
                continue;
            }
            let mut bytes = vec![0; buffer.bytes() as usize];
            reference.read(id, &mut bytes)?;
            let half = to_bytes(dtype(&session, id), &from_bytes(buffer.dtype, &bytes));
            session.write(id, &half)?;
            let rounded = from_bytes(dtype(&session, id), &half);
            reference.write(id, &to_bytes(buffer.dtype, &rounded))?;
        }
        reference.run_steps(0, number..number + 1)?;
        session.run_steps(0, number..number + 1)?;
        for (id, access) in step.op.accesses() {
            if access == Access::Read {
                continue;
            }
            let (want, got) =
                (reference.plan().workload.buffer(id).clone(), session.plan().workload.buffer(id).clone());
            let (mut a, mut b) = (vec![0; want.bytes() as usize], vec![0; got.bytes() as usize]);
            reference.read(id, &mut a)?;
            session.read(id, &mut b)?;
            let (a, b) = (from_bytes(want.dtype, &a), from_bytes(got.dtype, &b));
            let norm: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum();
            let difference: f64 = a.iter().zip(&b).map(|(&x, &y)| f64::from(x - y).powi(2)).sum();
            let error = (difference / norm.max(1e-30)).sqrt();
            let fine = error <= 2e-3;
            good &= fine;
            println!("{} {what}: {} {} {error:.1e}", if fine { "ok " } else { "BAD" }, step.op.name(), want.name);
        }
    }
    Ok(good)
}

fn check(options: &wgpu::Options) -> anyhow::Result<()> {
    let mut good = true;
    let layers = [
        ("qkv 256x576", Layer { tokens: 256, k: 576, widths: &[576, 192, 192], rank: 16, weight: DType::BF16 }),
        ("gate_up 512x576", Layer { tokens: 512, k: 576, widths: &[1536, 1536], rank: 16, weight: DType::BF16 }),
        ("large 512x1024", Layer { tokens: 512, k: 1024, widths: &[1024, 1024], rank: 16, weight: DType::BF16 }),
        ("ragged 200x100", Layer { tokens: 200, k: 100, widths: &[84], rank: 8, weight: DType::BF16 }),
        ("plain 2048x512", Layer { tokens: 2048, k: 512, widths: &[2048], rank: 0, weight: DType::BF16 }),
        ("nf4 512x1024", Layer { tokens: 512, k: 1024, widths: &[1024, 256], rank: 16, weight: DType::Nf4 }),
        ("nf4 300x576", Layer { tokens: 300, k: 576, widths: &[192], rank: 0, weight: DType::Nf4 }),
        ("int8 512x320", Layer { tokens: 512, k: 320, widths: &[448], rank: 8, weight: DType::Int8 }),
    ];
    for (name, layer) in layers {
        good &= compare(name, options, (1, 0.5), |builder, target| vec![linear(builder, target, layer, true, false)])?;
        good &= compare(name, options, (1, 0.5), |builder, target| vec![linear(builder, target, layer, false, false)])?;
        if layer.weight.is_quantized() {
            continue;
        }
        good &= compare(name, options, (1, 0.5), |builder, target| vec![linear(builder, target, layer, false, true)])?;
    }
    // All below 2^-14: halves without a leading 1, which some ways of reading them flush to 0.
    for (name, layer) in [layers[2], layers[4]] {
        let write = |builder: &mut WorkloadBuilder, target: &Target| vec![linear(builder, target, layer, false, true)];
        good &= compare(&format!("{name}, subnormal gradients"), options, (1, 3e-5), write)?;
    }
    for (name, shape) in
        [("9 heads of 64", shape(9, 3, 64)), ("4 heads of 128", shape(4, 1, 128)), ("2 of 32", shape(2, 2, 32))]
    {
        for (tokens, documents) in [(64, 1), (256, 1), (320, 3)] {
            let write =
                |builder: &mut WorkloadBuilder, target: &Target| attention_ops(builder, target, tokens, shape).to_vec();
            good &=
                compare(&format!("{name}, {tokens} tokens, {documents} documents"), options, (documents, 0.5), write)?;
        }
    }
    ensure!(good, "the fast paths disagree with the CPU engine");
    println!("all agree");
    Ok(())
}

/// Seconds of one operation: the best of five programs of `repeats`.
fn time(
    options: &wgpu::Options,
    repeats: usize,
    write: impl Fn(&mut WorkloadBuilder, &Target) -> Op,
) -> anyhow::Result<f64> {
    let target = wgpu::target(options)?;
    let workload = workload(repeats, |builder| vec![write(builder, &target)]);
    let weights = Arc::new(Noise::new(&workload));
    let mut session = wgpu::open(plan(workload, target)?, weights, options)?;
    trace(&session);
    write_inputs(&mut session, 2, 0.5)?;
    best_of(&mut session, repeats)
}

/// Seconds of one of `repeats` in the program, the best of six runs after the card is warm: idle it runs at a fraction
/// of its clock.
fn best_of(session: &mut wgpu::WgpuSession, repeats: usize) -> anyhow::Result<f64> {
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < 0.3 {
        session.run(0)?;
        session.synchronize()?;
    }
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        let start = Instant::now();
        session.run(0)?;
        session.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / repeats as f64);
    }
    Ok(best)
}

/// With `TRACE` set: each candidate kernel's time, as it was measured when the session opened.
fn trace(session: &wgpu::WgpuSession) {
    if std::env::var_os("TRACE").is_none() {
        return;
    }
    for found in session.measurements() {
        let numbers: Vec<f64> = found.key.split(' ').nth(1).unwrap_or("").split('x').flat_map(str::parse).collect();
        let rate = |seconds: f64| match numbers.as_slice() {
            [m, n, k] => format!("{:7.1} TFLOP/s, {:.3} ms", 2e-12 * m * n * k / seconds, seconds * 1e3),
            _ => format!("{:.3} ms", seconds * 1e3),
        };
        let verdict = match found.verdict {
            wgpu::Verdict::Refused => "does not compile".to_string(),
            wgpu::Verdict::Differs(by) => format!("WRONG by {by:.1e}"),
            wgpu::Verdict::Slow(seconds) => format!("{} (once)", rate(seconds)),
            wgpu::Verdict::Took(seconds) => rate(seconds),
        };
        println!("  {}: {}: {verdict}", found.key, found.candidate);
    }
}

fn products(options: &wgpu::Options, rows: &[&str]) -> anyhow::Result<()> {
    println!(
        "tokens x K x N, rank, weight: forward (NT; quantized NN), gradient of the input (NN), of the weight (TN), TFLOP/s"
    );
    for (row, tokens, k, n, rank, weight) in [
        ("square", 4096, 4096, 4096, 0, DType::BF16),
        ("long", 4096, 4096, 14336, 0, DType::BF16),
        ("long", 4096, 14336, 4096, 0, DType::BF16),
        ("nf4", 4096, 4096, 4096, 0, DType::Nf4),
        ("nf4", 4096, 14336, 4096, 0, DType::Nf4),
        ("lora", 4096, 4096, 4096, 16, DType::BF16),
        ("small", 4096, 576, 1536, 0, DType::BF16),
        ("small", 4096, 1536, 576, 0, DType::BF16),
        ("small", 4096, 576, 1536, 16, DType::BF16),
    ] {
        if !rows.is_empty() && !rows.contains(&row) {
            continue;
        }
        let widths = [n];
        let layer = Layer { tokens, k, widths: &widths, rank, weight };
        let flops = 2.0 * tokens as f64 * k as f64 * n as f64 / 1e12;
        let forward = time(options, 10, |builder, target| linear(builder, target, layer, true, false))?;
        let input = time(options, 10, |builder, target| linear(builder, target, layer, false, false))?;
        let mut line =
            format!("{tokens} x {k} x {n}, {rank}, {}: {:.1} {:.1}", weight.name(), flops / forward, flops / input);
        // A quantized weight is frozen.
        if !weight.is_quantized() {
            let layer = Layer { rank: 0, ..layer };
            let trained = time(options, 10, |builder, target| linear(builder, target, layer, false, true))?;
            line += &format!(" {:.1}", flops / trained);
        }
        println!("{line} TFLOP/s");
    }
    Ok(())
}

fn attention(options: &wgpu::Options) -> anyhow::Result<()> {
    for (tokens, documents, shape) in
        [(4096, 2, shape(32, 32, 128)), (4096, 2, shape(32, 8, 128)), (4096, 8, shape(9, 3, 64))]
    {
        let length = (tokens / documents) as f64;
        // Causal: half of the square.
        let flops = 2.0 * documents as f64 * length * length * shape.query_columns() as f64 / 1e12;
        let timed = |number: usize| {
            let target = wgpu::target(options)?;
            let workload = workload(10, |builder| vec![attention_ops(builder, &target, tokens, shape)[number].clone()]);
            let weights = Arc::new(Noise::new(&workload));
            let mut session = wgpu::open(plan(workload, target)?, weights, options)?;
            trace(&session);
            write_inputs(&mut session, documents, 0.5)?;
            best_of(&mut session, 10)
        };
        let (forward, backward) = (timed(0)?, timed(1)?);
        println!(
            "attention {documents} x {length}, {} heads of {} ({}): forward {:.1} TFLOP/s ({:.3} ms), backward {:.1} ({:.3} ms)",
            shape.heads,
            shape.head_dim,
            shape.kv_heads,
            flops / forward,
            forward * 1e3,
            2.5 * flops / backward,
            backward * 1e3
        );
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn step(
    engine: &wgpu::Options,
    model: &str,
    batch: usize,
    sequence: usize,
    steps: usize,
    recompute: Recompute,
    words: &[&str],
) -> anyhow::Result<()> {
    let config = shapes::config(model)?;
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    let tokens = batch * sequence;
    let method = ["qlora", "full"].into_iter().find(|name| words.contains(name)).unwrap_or("lora");
    let options = TrainingOptions {
        evaluate: false,
        ..TrainingOptions::new(
            match method {
                "full" => Method::Full,
                _ => Method::Lora {
                    adapter: AdapterOptions { rank: 16, targets, dropout: 0.0 },
                    weights: (method == "qlora").then_some(DType::Nf4),
                },
            },
            vec![tokens],
            vec![recompute; config.layers],
        )
    };
    let target = wgpu::target(engine)?;
    let workload = training_workload(&config, &options, &target)?;
    let weights = Arc::new(Noise::new(&workload));
    let begun = Instant::now();
    let plan = plan(workload, target)?;
    let mut session = wgpu::open(plan, weights, engine)?;
    trace(&session);
    println!("opened in {:.1} s, {:.2} GiB", begun.elapsed().as_secs_f64(), session.allocated_bytes() as f64 / 1.074e9);
    let find = |session: &wgpu::WgpuSession, name: &str| {
        session.plan().workload.find(name).with_context(|| format!("no buffer {name}"))
    };
    let put = |session: &mut wgpu::WgpuSession, name: &str, bytes: &[u8]| -> anyhow::Result<()> {
        let id = find(session, name)?;
        Ok(session.write(id, bytes)?)
    };
    let adapters: Vec<_> = session
        .plan()
        .workload
        .of_kind(Kind::Adapter)
        .filter(|(_, buffer)| buffer.dtype == DType::F32)
        .map(|(id, buffer)| (id, buffer.elements(), buffer.name.contains("lora_A")))
        .collect();
    for (id, elements, is_a) in adapters {
        let size = if is_a { 0.02 } else { 0.0 };
        let values: Vec<f32> = (0..elements).map(|i| noise(i ^ id.index() << 12, size)).collect();
        session.write(id, bytemuck::cast_slice(&values))?;
    }
    if let Some(refresh) = session.plan().workload.program("refresh") {
        session.run(refresh)?;
    }
    let row = |t: usize| t / sequence * sequence;
    let ids: Vec<i32> = (0..tokens).map(|t| (random::mix(t as u32) % 297 + 3) as i32).collect();
    let values = |f: &dyn Fn(usize) -> i32| (0..tokens).map(f).collect::<Vec<i32>>();
    let last = |t: usize| t + 1 == row(t) + sequence;
    let parts = [
        ("ids", ids.clone()),
        ("positions", values(&|t| (t - row(t)) as i32)),
        ("document_start", values(&|t| row(t) as i32)),
        ("document_end", values(&|t| (row(t) + sequence) as i32)),
        ("targets", values(&|t| if last(t) { -100 } else { ids[t + 1] })),
    ];
    for (part, values) in parts {
        put(&mut session, &format!("inputs.{tokens}.{part}"), bytemuck::cast_slice(&values))?;
    }
    put(&mut session, &format!("inputs.{tokens}.token_weights"), bytemuck::cast_slice(&vec![1.0f32; tokens]))?;
    put(&mut session, "loss_scale", bytemuck::cast_slice(&[1.0 / (tokens - batch) as f32]))?;
    if method != "full" {
        put(&mut session, "lora_scale", bytemuck::cast_slice(&[1.0f32]))?;
    }
    let programs: Vec<usize> = ["begin".to_string(), format!("micro.{tokens}"), "update".to_string()]
        .iter()
        .map(|name| session.plan().workload.program(name).with_context(|| format!("no program {name}")))
        .collect::<Result<_, _>>()?;
    let (loss_sum, grad_norm) = (find(&session, "loss_sum")?, find(&session, "grad_norm")?);
    let mut times = Vec::new();
    for step in 0..steps + 2 {
        let count = step as i32 + 1;
        let hyper = [2e-4f32, 1.0 - 0.9f32.powi(count), (1.0 - 0.999f32.powi(count)).sqrt(), 0.0];
        let start = Instant::now();
        put(&mut session, "hyper", bytemuck::cast_slice(&hyper))?;
        put(&mut session, "random_key", bytemuck::cast_slice(&[3407u32, 0, step as u32, 0]))?;
        for &program in &programs {
            session.run(program)?;
        }
        let (mut loss, mut norm) = ([0u8; 4], [0u8; 4]);
        session.read(loss_sum, &mut loss)?;
        session.read(grad_norm, &mut norm)?;
        if step >= 2 {
            times.push(start.elapsed().as_secs_f64());
        }
        println!("loss {:.5} grad norm {:.5}", f32::from_le_bytes(loss), f32::from_le_bytes(norm));
    }
    if words.contains(&"profile") {
        let times = inspect::profile(&mut session, programs[1], 2)?;
        let mut table: BTreeMap<(String, &str), (usize, f64)> = BTreeMap::new();
        for time in &times {
            let place: Vec<&str> = time.name.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
            let entry = table.entry((place.join("."), time.op)).or_default();
            entry.0 += 1;
            entry.1 += time.milliseconds;
        }
        let mut rows: Vec<_> = table.into_iter().collect();
        rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        for ((place, op), (count, milliseconds)) in rows {
            println!("{place:<40} {op:<24} {count:4} x {milliseconds:9.3} ms in all");
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).context("STEPS is at least 1")?;
    println!(
        "{model} {method} {batch}x{sequence}: {:.0} tokens/s, {:.2} ms a step",
        tokens as f64 / median,
        median * 1e3
    );
    Ok(())
}
