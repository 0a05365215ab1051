//! Times training steps on a card: `step MODEL METHOD BATCH SEQUENCE STEPS [none|cheap|all|free|GIB] [profile]`, or, as
//! `step kernels`, every operation and kernel beside what the card does at most.
//!
//! `none`, `cheap` and `all` say what is recomputed; `free` lets the planner search, and a number gives it that many GiB.
//! SEQUENCE `rows` takes rows of the lengths in bench/alpaca_lengths.json, BATCH of them an update, prompts masked.
//!
//! MODEL: 135m, 1b or 8b (Llama shapes, random weights: speed and memory do not depend on them); METHOD: lora, qlora, int8
//! and fp8 (lora on weights in 8 bits) or full; `qlora@32` for another rank than 16. All linear layers, AdamW with 8-bit
//! states, packed rows of full length, as the rivals are measured.
//! Prints one line of JSON; with `profile`, milliseconds and floor by kind of operation before it.

mod kernels;
mod shapes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use half::bf16;
use tune::backend::{EngineError, Session, Tensor, WeightSource, cuda};
use tune::data::{Row, pack};
use tune::model::{AdapterOptions, Method, ModelConfig, Recompute, TrainingOptions, names, training_workload};
use tune::program::plan::{estimate_op, plan};
use tune::program::{BufferId, DType, Kind, Op, Plan, Role, Target, WorkloadBuilder, random};
use tune::train::Stepper;
use tune::train::planning::{Search, update_tokens};

/// Uniform bf16 numbers, one stretch of memory for all tensors; norms are ones.
struct Noise {
    values: Vec<bf16>,
    ones: Vec<bf16>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Noise {
    fn new(config: &ModelConfig) -> Self {
        use rayon::prelude::*;
        let shapes: BTreeMap<_, _> =
            names::weights(config).into_iter().map(|weight| (weight.name, weight.shape)).collect();
        let largest = shapes.values().map(|shape| shape.iter().product::<usize>()).max().unwrap_or(1);
        let value = |i: usize| bf16::from_f32(((random::mix(i as u32) >> 8) as f32 / 8_388_608.0 - 1.0) * 0.035);
        let values = (0..largest).into_par_iter().map(value).collect();
        Self { values, ones: vec![bf16::ONE; config.hidden_size], shapes }
    }
}

impl WeightSource for Noise {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError> {
        let missing = || EngineError::Weight { name: name.into(), what: "the shape has no such tensor".into() };
        let shape = self.shapes.get(name).ok_or_else(missing)?;
        let from = if shape.len() == 1 { &self.ones } else { &self.values };
        let bytes = bytemuck::cast_slice(&from[..shape.iter().product()]);
        Ok(Tensor { dtype: DType::BF16, shape: shape.clone(), bytes })
    }
}

/// Free bytes on the card with a context and nothing of ours.
fn free_beside_context(target: &Target) -> anyhow::Result<u64> {
    let mut builder = WorkloadBuilder::new();
    let scalar = builder.persistent("x", &[1], DType::F32, Kind::Scalar);
    builder.begin("nothing", Role::Update, 0);
    builder.push("zero", Op::Zero { buffers: vec![scalar] });
    builder.end();
    let plan = plan(builder.finish(), target.clone())?;
    let none = Noise { values: Vec::new(), ones: Vec::new(), shapes: BTreeMap::new() };
    let mut session = cuda::open(plan, Arc::new(none), 0)?;
    session.run(0)?;
    Ok(session.card_memory()?.0 + session.allocated_bytes())
}

/// LoRA on all linear layers, on weights as stored or quantized, or full fine-tuning.
fn method(kind: &str, rank: usize) -> anyhow::Result<Method> {
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    let adapter = AdapterOptions { rank, targets, dropout: 0.0 };
    Ok(match kind {
        "lora" => Method::Lora { adapter, weights: None },
        "qlora" => Method::Lora { adapter, weights: Some(DType::Nf4) },
        "int8" => Method::Lora { adapter, weights: Some(DType::Int8) },
        "fp8" => Method::Lora { adapter, weights: Some(DType::Fp8) },
        "full" => Method::Full,
        _ => bail!("METHOD is lora, qlora, int8, fp8 or full"),
    })
}

/// One micro-batch size, everything kept.
fn options(config: &ModelConfig, method: Method, tokens: usize) -> TrainingOptions {
    TrainingOptions {
        evaluate: false,
        eight_bit: true,
        ..TrainingOptions::new(method, vec![tokens], vec![Recompute::None; config.layers])
    }
}

fn main() -> anyhow::Result<()> {
    // RUST_LOG=tune=debug says what captured programs take, and which algorithms were chosen.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["kernels"] {
        return kernels::run();
    }
    let [model, method, batch, sequence, steps, rest @ ..] = arguments.as_slice() else {
        bail!("usage: step MODEL METHOD BATCH SEQUENCE STEPS [none|cheap|all] [profile]");
    };
    let (batch, steps): (usize, usize) = (batch.parse()?, steps.parse()?);
    let memory = rest.first().map_or("none", String::as_str);
    let recompute = match memory {
        "cheap" => Recompute::Cheap,
        "all" => Recompute::All,
        _ => Recompute::None,
    };
    // None for a choice made by hand.
    let budget: Option<f64> = match memory {
        "none" | "cheap" | "all" => None,
        "free" => Some(f64::INFINITY),
        gib => Some(gib.parse().with_context(|| format!("{gib} is not none, cheap, all, free or a number of GiB"))?),
    };
    let profile = rest.iter().any(|word| word == "profile");
    let config = shapes::config(model)?;
    let (kind, rank) = method.split_once('@').unwrap_or((method, "16"));
    let training = self::method(kind, rank.parse()?)?;
    let rows = sequence == "rows";
    let sequence: usize = if rows { 0 } else { sequence.parse()? };
    let tokens = batch * sequence;
    let recompute = vec![recompute; config.layers];
    let options = TrainingOptions { recompute, ..options(&config, training, tokens) };
    let target = cuda::target(0)?;
    let free = free_beside_context(&target)?;
    let noise = Arc::new(Noise::new(&config));
    let within = |mut target: Target| {
        if let Some(gib) = budget.filter(|gib| gib.is_finite()) {
            let bytes = (gib * f64::from(1 << 30)) as u64;
            target.memory = Some(target.memory.map_or(bytes, |free| free.min(bytes)));
        }
        target
    };
    if rows {
        let case = RowsCase { model, method, batch, updates: steps, free };
        return time_rows(&case, &config, options, &within(target), noise);
    }
    let begun = Instant::now();
    let plan = if budget.is_some() {
        let mut target = within(target.clone());
        target.micro_sizes = vec![tokens];
        search(&config, options, &target, sequence, tokens)?
    } else {
        plan(training_workload(&config, &options, &target)?, target.clone())?
    };
    let host = plan.summary.host_bytes;
    let planned = plan.summary.peak_bytes;
    let mut session = cuda::open(plan, noise, 0)?;
    let opened = begun.elapsed().as_secs_f64();

    let programs = set_up(&mut session, batch, sequence)?;
    let put = |session: &mut cuda::CudaSession, name: &str, bytes: &[u8]| -> anyhow::Result<()> {
        let id = find(session, name)?;
        Ok(session.write(id, bytes)?)
    };
    let loss_sum = find(&session, "loss_sum")?;
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    let mut first_step = 0.0;
    // A very long step is not run more often than it is timed.
    let warm = if steps < 3 { 1 } else { steps.min(3) };
    for step in 0..steps + warm {
        let count = step as i32 + 1;
        let hyper = [2e-4f32, 1.0 - 0.9f32.powi(count), (1.0 - 0.999f32.powi(count)).sqrt(), 0.0];
        let start = Instant::now();
        put(&mut session, "hyper", bytemuck::cast_slice(&hyper))?;
        put(&mut session, "random_key", bytemuck::cast_slice(&[3407u32, 0, step as u32, 0]))?;
        for &program in &programs {
            session.run(program)?;
        }
        let mut loss = [0u8; 4];
        session.read(loss_sum, &mut loss)?;
        if step >= warm {
            times.push(start.elapsed().as_secs_f64());
        }
        if step == 0 {
            first_step = begun.elapsed().as_secs_f64();
        }
        losses.push(f32::from_le_bytes(loss));
    }
    let used = free.saturating_sub(session.card_memory()?.0);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    if profile {
        print_profile(&mut session, &programs, &target)?;
    }
    let workload = &session.plan().workload;
    let floor: f64 = programs
        .iter()
        .flat_map(|&program| &workload.programs[program].steps)
        .map(|step| estimate_op(workload, &step.op, &target) - target.rates.per_op)
        .sum();
    let gib = |bytes: u64| (bytes as f64 / f64::from(1 << 30) * 100.0).round() / 100.0;
    let result = serde_json::json!({
        "peer": "tune", "model": model, "method": method, "batch": batch, "seq": sequence,
        "recompute": memory, "host_gib": gib(host),
        "tok_s": (tokens as f64 / median).round(), "step_ms": (median * 1e5).round() / 100.0,
        "min_ms": (times[0] * 1e5).round() / 100.0, "floor_ms": (floor * 1e5).round() / 100.0,
        "share_of_floor": (floor / median * 1000.0).round() / 1000.0,
        "used_gib": gib(used), "allocated_gib": gib(session.allocated_bytes()), "planned_gib": gib(planned),
        "open_s": (opened * 100.0).round() / 100.0, "first_step_s": (first_step * 100.0).round() / 100.0,
        "loss": [losses[0], losses[losses.len() - 1]],
    });
    println!("RESULT {result}");
    Ok(())
}

fn find(session: &cuda::CudaSession, name: &str) -> anyhow::Result<BufferId> {
    session.plan().workload.find(name).with_context(|| format!("no buffer {name}"))
}

/// Fills adapter, rows and scalars; gives the programs of an update in order.
fn set_up(session: &mut cuda::CudaSession, batch: usize, sequence: usize) -> anyhow::Result<Vec<usize>> {
    let tokens = batch * sequence;
    let put = |session: &mut cuda::CudaSession, name: &str, bytes: &[u8]| -> anyhow::Result<()> {
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
        let values: Vec<f32> =
            (0..elements).map(|i| ((random::mix(i as u32 ^ id.0) >> 8) as f32 / 8_388_608.0 - 1.0) * size).collect();
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
        put(session, &format!("inputs.{tokens}.{part}"), bytemuck::cast_slice(&values))?;
    }
    put(session, &format!("inputs.{tokens}.token_weights"), bytemuck::cast_slice(&vec![1.0f32; tokens]))?;
    put(session, "loss_scale", bytemuck::cast_slice(&[1.0 / (tokens - batch) as f32]))?;
    if session.plan().workload.find("lora_scale").is_some() {
        put(session, "lora_scale", bytemuck::cast_slice(&[1.0f32]))?;
    }
    ["begin".to_string(), format!("micro.{tokens}"), "update".to_string()]
        .iter()
        .map(|name| session.plan().workload.program(name).with_context(|| format!("no program {name}")))
        .collect()
}

/// The planner's choice, said in one line.
fn search(
    config: &ModelConfig,
    options: TrainingOptions,
    target: &Target,
    longest_row: usize,
    update_tokens: usize,
) -> anyhow::Result<Plan> {
    let search = Search::new(config, options, target.clone(), longest_row, update_tokens);
    let (plan, choice) = search.run()?;
    println!("{}", serde_json::to_string(&choice)?);
    Ok(plan)
}

struct RowsCase<'a> {
    model: &'a str,
    method: &'a str,
    /// Rows an update.
    batch: usize,
    updates: usize,
    /// Bytes free on the card before.
    free: u64,
}

/// Updates of rows of real lengths, as a run makes them: packed into the plan's micro-batches.
fn time_rows(
    case: &RowsCase<'_>,
    config: &ModelConfig,
    mut options: TrainingOptions,
    target: &Target,
    noise: Arc<Noise>,
) -> anyhow::Result<()> {
    let lengths: Vec<(usize, usize)> = serde_json::from_str(&std::fs::read_to_string("bench/alpaca_lengths.json")?)?;
    let rows: Vec<Row> = lengths
        .iter()
        .enumerate()
        .map(|(source, &(prompt, length))| {
            let length = length.min(2048);
            let id = |t: usize| random::mix((source * 2048 + t) as u32) % 297 + 3;
            let input_ids: Vec<u32> = (0..length).map(id).collect();
            let prompt = prompt.min(length - 1);
            let labels = input_ids.iter().enumerate().map(|(t, &id)| if t < prompt { -100 } else { id as i32 });
            Row { labels: labels.collect(), weights: Vec::new(), input_ids, source }
        })
        .collect();
    options.evaluate = false;
    let longest = rows.iter().map(|row| row.input_ids.len()).max().unwrap_or(1);
    let all: Vec<usize> = rows.iter().map(|row| row.input_ids.len()).collect();
    let begun = Instant::now();
    let plan = search(config, options, target, longest, update_tokens(&all, case.batch))?;
    let planned = plan.summary.peak_bytes;
    let programs = &plan.summary.programs;
    let micro = programs.iter().filter(|program| program.role == Role::Micro);
    let costs: BTreeMap<usize, f64> = micro.map(|program| (program.tokens, program.estimated_seconds)).collect();
    let sizes: Vec<usize> = costs.keys().copied().collect();
    let mut stepper = Stepper::new(Box::new(cuda::open(plan, noise, 0)?), 3407, [0.9, 0.999], None)?;
    let adapters: Vec<(String, usize)> = stepper
        .workload()
        .of_kind(Kind::Adapter)
        .filter(|(_, buffer)| buffer.dtype == DType::F32 && buffer.name.contains("lora_A"))
        .map(|(_, buffer)| (buffer.name.clone(), buffer.elements()))
        .collect();
    for (name, elements) in adapters {
        let stream = random::stream(&name);
        let value = |i: usize| ((random::mix(i as u32 ^ stream) >> 8) as f32 / 8_388_608.0 - 1.0) * 0.02;
        stepper.write_tensor(&name, &(0..elements).map(value).collect::<Vec<f32>>())?;
    }
    stepper.set_lora_scale(1.0)?;
    stepper.refresh()?;
    let (mut times, mut tokens, mut padding) = (Vec::new(), 0, 0);
    let mut first_step = 0.0;
    // Every program runs twice before it is replayed as a graph: the first updates fill one size each.
    let full: Vec<Row> = sizes
        .iter()
        .map(|&size| Row { input_ids: vec![5; size], labels: vec![5; size], weights: Vec::new(), source: 0 })
        .collect();
    let warm = 2 * sizes.len();
    // Small updates are short.
    let timed = if case.batch <= 16 { 4 * case.updates } else { case.updates };
    for step in 0..timed + warm {
        let start = Instant::now();
        let chosen: Vec<&Row> = match full.get(step / 2) {
            Some(row) => vec![row],
            None => (0..case.batch).map(|i| &rows[((step - warm) * case.batch + i) % rows.len()]).collect(),
        };
        let batches = pack(&chosen, &sizes, |size| costs[&size], true)?;
        stepper.update(&batches, step as u64, 2e-4)?;
        if step == 0 {
            first_step = begun.elapsed().as_secs_f64();
        } else if step >= warm {
            times.push(start.elapsed().as_secs_f64());
            tokens += chosen.iter().map(|row| row.input_ids.len()).sum::<usize>();
            padding += batches.iter().map(|batch| batch.padding).sum::<usize>();
        }
    }
    let used = case.free.saturating_sub(cuda::target(0)?.memory.unwrap_or(0) + (150 << 20));
    let seconds: f64 = times.iter().sum();
    times.sort_by(f64::total_cmp);
    let gib = |bytes: u64| (bytes as f64 / f64::from(1 << 30) * 100.0).round() / 100.0;
    let result = serde_json::json!({
        "peer": "tune", "model": case.model, "method": case.method, "batch": case.batch, "sizes": sizes,
        "step_ms": (times[times.len() / 2] * 1e5).round() / 100.0,
        "rows_s": ((times.len() * case.batch) as f64 / seconds * 100.0).round() / 100.0,
        "tok_s": (tokens as f64 / seconds).round(), "padding": padding as f64 / (tokens + padding) as f64,
        "used_gib": gib(used), "planned_gib": gib(planned), "first_step_s": (first_step * 100.0).round() / 100.0,
    });
    println!("ROWS {result}");
    Ok(())
}

/// Milliseconds, floor and share by kind of operation.
fn print_profile(session: &mut cuda::CudaSession, programs: &[usize], target: &Target) -> anyhow::Result<()> {
    let mut table: BTreeMap<String, (usize, f64, f64, u64, u64)> = BTreeMap::new();
    let mut total = 0.0;
    for &program in programs {
        let times = session.profile(program, 3)?;
        let workload = &session.plan().workload;
        for (at, (step, milliseconds)) in workload.programs[program].steps.iter().zip(times).enumerate() {
            if session.leaves_out(program, at) {
                continue;
            }
            // The same place in every layer counts together.
            let place: Vec<&str> = step.name.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
            let entry = table.entry(format!("{:<28} {}", step.op.name(), place.join("."))).or_default();
            entry.0 += 1;
            entry.1 += f64::from(milliseconds);
            entry.2 += (estimate_op(workload, &step.op, target) - target.rates.per_op) * 1e3;
            entry.3 += step.op.flops(workload);
            entry.4 += step.op.bytes_moved(workload);
            total += f64::from(milliseconds);
        }
    }
    let mut rows: Vec<_> = table.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    for (name, (count, milliseconds, floor, flops, bytes)) in rows {
        println!(
            "{name:<64} {count:4} x {milliseconds:9.3} ms  floor {floor:9.3}  {:5.1}%  {:6.0} TFLOP/s {:6.0} GB/s",
            milliseconds / total * 100.0,
            flops as f64 / milliseconds * 1e-9,
            bytes as f64 / milliseconds * 1e-6
        );
    }
    println!("{total:.3} ms in all, one launch after the other");
    Ok(())
}
