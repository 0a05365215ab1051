//! `tune plan`: the memory and time of a run, from the very workload that would run.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::describe::{duration, grouped};
use super::paint::{Stream, Tone, paint};
use super::report::Failure;
use super::request::Request;
use super::train::{check_engine, resolved, resolved_for};
use crate::backend::cuda::{KNOWN_CARDS, KnownCard, NoCard};
use crate::backend::{self, Choice, Device, EngineError, Session};
use crate::program::{Plan, Role, plan};
use crate::run::worker::exit;
use crate::spec::size;
use crate::train::{self, Prepared};

/// Say what a run needs: memory by kind, time, micro-batch sizes; nothing is allocated
#[derive(Args, Debug)]
pub struct Arguments {
    #[command(flatten)]
    request: Request,
    /// Plan for a card that is not here, as "RTX 4090"
    #[arg(long, value_name = "NAME", conflicts_with_all = ["measure", "device"])]
    card: Option<String>,
    /// Open the device and time every operation
    #[arg(long)]
    measure: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Serialize)]
struct Answer {
    model: String,
    device: String,
    reason: String,
    rows: usize,
    eval_rows: usize,
    steps: u64,
    /// Everything the plan takes on the device.
    peak_bytes: u64,
    bytes: BTreeMap<&'static str, u64>,
    /// Page-locked memory of the host beside.
    host_bytes: u64,
    /// Bytes that the plan may take; none when only the machine limits it.
    available_bytes: Option<u64>,
    /// Of the host's memory; none where it is not known or not used.
    available_host_bytes: Option<u64>,
    /// What the plan does to fit.
    choice: Vec<String>,
    micro_sizes: Vec<usize>,
    recomputed_layers: usize,
    offloaded_layers: usize,
    host_embedding: bool,
    host_optimizer: bool,
    half_gradients: bool,
    mlp_chunks: usize,
    small_head: bool,
    kept_attention: bool,
    partly_recomputed_layers: usize,
    /// Of an update of the mean length, from the target's rates.
    estimated_step_seconds: f64,
    estimated_run_seconds: f64,
    step_flops: f64,
    programs: Vec<plan::ProgramSummary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Vec<Measured>>,
}

/// One operation, timed on the device, all steps of its kind in the program together.
#[derive(Serialize)]
struct Measured {
    program: String,
    operation: &'static str,
    count: usize,
    /// Fastest of the repeats.
    milliseconds: f64,
    /// What the target's rates allow.
    floor_milliseconds: f64,
    /// Of the program's time.
    share: f64,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let (spec, choice) = match &arguments.card {
        None => {
            let spec = resolved(&arguments.request)?;
            let choice = check_engine(&spec)?.choice().map_err(|error| {
                Failure::run(error.to_string(), "end other programs that use the device; `tune doctor` looks at it")
            })?;
            (spec, choice)
        }
        Some(name) => {
            let target = known_card(name)?.target();
            let spec = resolved_for(&arguments.request, Some(target.engine))?;
            let device = spec.engine.device.as_str();
            if device != "auto" && device.split(':').next() != Some(target.engine) {
                return Err(Failure::request(
                    format!("--card plans for the CUDA engine, and engine.device = {device:?}"),
                    "leave --card out, or add --set engine.device=auto",
                )
                .into());
            }
            (
                spec,
                Choice {
                    device: Device::Cuda(0),
                    target,
                    facts: None,
                    reason: "known by name, with nothing else on it".into(),
                },
            )
        }
    };
    let prepared = train::prepare(&spec, &|_| {})?;
    let lengths: Vec<usize> =
        prepared.data.train.iter().chain(&prepared.data.eval).map(|row| row.input_ids.len()).collect();
    let search = train::search(&spec, &prepared.model.config, &lengths, &choice)?;
    let target = &search.target;
    let (plan, chosen) = search.run().map_err(train::TrainError::from)?;
    let (flops, seconds) = update_cost(&plan, &prepared);
    let measured = arguments.measure.then(|| measure(plan.clone(), &prepared, &choice)).transpose()?;
    let answer = Answer {
        model: spec.model.id.clone(),
        device: target.name.clone(),
        reason: choice.reason.clone(),
        rows: prepared.data.train.len(),
        eval_rows: prepared.data.eval.len(),
        steps: prepared.steps,
        peak_bytes: plan.summary.peak_bytes,
        bytes: plan.summary.bytes.clone(),
        host_bytes: plan.summary.host_bytes,
        available_bytes: target.memory,
        available_host_bytes: target.host_memory,
        choice: chosen.in_words(prepared.model.config.layers),
        micro_sizes: chosen.sizes.clone(),
        recomputed_layers: chosen.recomputed_layers,
        offloaded_layers: chosen.offloaded_layers,
        host_embedding: chosen.host_embedding,
        host_optimizer: chosen.host_optimizer,
        half_gradients: chosen.half_gradients,
        mlp_chunks: chosen.mlp_chunks,
        small_head: chosen.small_head,
        kept_attention: chosen.kept_attention,
        partly_recomputed_layers: chosen.cheap_layers.saturating_sub(chosen.recomputed_layers),
        estimated_step_seconds: seconds,
        estimated_run_seconds: seconds * prepared.steps as f64,
        step_flops: flops,
        programs: plan.summary.programs.clone(),
        measured,
    };
    match arguments.json {
        true => println!("{}", serde_json::to_string(&answer)?),
        false => print(&answer),
    }
    Ok(exit::DONE)
}

/// The card that `--card` names.
fn known_card(name: &str) -> Result<&'static KnownCard, Failure> {
    KnownCard::named(name).map_err(|none| match none {
        NoCard::TooOld((major, minor)) => Failure::request(
            format!(
                "--card {name:?}: compute capability {major}.{minor} has no bf16 matrix products, 8.0 and newer have"
            ),
            "there the WGSL engine trains: `tune plan --device wgpu` on that machine answers for it",
        ),
        NoCard::Unknown => {
            let names: Vec<&str> = KNOWN_CARDS.iter().map(|card| card.name).collect();
            Failure::request(
                format!("--card {name:?} is no card that is known here"),
                format!("there are {}", names.join(", ")),
            )
        }
    })
}

/// FLOPs and estimated seconds of an update of mean length: its tokens at the price of the largest micro-batch.
fn update_cost(plan: &Plan, prepared: &Prepared) -> (f64, f64) {
    let tokens: usize = prepared.data.train.iter().map(|row| row.input_ids.len()).sum();
    let per_update = tokens as f64 / prepared.steps_per_epoch as f64;
    let programs = &plan.summary.programs;
    let micro = programs.iter().filter(|program| program.role == Role::Micro).max_by_key(|program| program.tokens);
    let share = micro.map_or(0.0, |micro| per_update / micro.tokens.max(1) as f64);
    let (flops, seconds) = micro.map_or((0.0, 0.0), |micro| (micro.flops as f64, micro.estimated_seconds));
    let update = programs.iter().filter(|program| program.role == Role::Update);
    update.fold((flops * share, seconds * share), |(flops, seconds), program| {
        (flops + program.flops as f64, seconds + program.estimated_seconds)
    })
}

fn print(answer: &Answer) {
    let heading = |text: &str| println!("\n{}", paint(Stream::Out, Tone::Strong, text));
    println!("model   {}", answer.model);
    println!("device  {} ({})", answer.device, answer.reason);
    println!(
        "data    {} rows, {} held out; {} updates",
        grouped(answer.rows as u64),
        grouped(answer.eval_rows as u64),
        grouped(answer.steps)
    );
    heading("memory on the device");
    let mut kinds: Vec<_> = answer.bytes.iter().filter(|(_, bytes)| **bytes > 0).collect();
    kinds.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
    for (kind, bytes) in kinds {
        println!("  {kind:12} {:>10}", size::format(*bytes));
    }
    let of = answer.available_bytes.map(|bytes| format!(" of {}", size::format(bytes))).unwrap_or_default();
    println!("  {:12} {:>10}{of}", "peak", size::format(answer.peak_bytes));
    if answer.host_bytes > 0 {
        let of = answer.available_host_bytes.map(|bytes| format!(" of {}", size::format(bytes))).unwrap_or_default();
        println!("  {:12} {:>10}{of}", "on the host", size::format(answer.host_bytes));
    }
    heading("programs, estimated");
    println!("  {:16} {:>10} {:>12} {:>12} {:>10}", "PROGRAM", "OPERATIONS", "GFLOP", "MOVED", "TIME");
    for program in &answer.programs {
        println!(
            "  {:16} {:>10} {:>12.1} {:>12} {:>10}",
            program.name,
            program.operations,
            program.flops as f64 / 1e9,
            size::format(program.bytes_moved),
            duration(program.estimated_seconds)
        );
    }
    let sizes = answer.micro_sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    println!("\nmicro-batches of {sizes} tokens");
    answer.choice.iter().for_each(|words| println!("{words}"));
    println!("an update, estimated: {}, {:.1} GFLOP", duration(answer.estimated_step_seconds), answer.step_flops / 1e9);
    println!("the run, estimated: {} without evaluations", duration(answer.estimated_run_seconds));
    if let Some(measured) = &answer.measured {
        heading("operations, measured on the device");
        println!("  {:16} {:24} {:>5} {:>10} {:>10} {:>6}", "PROGRAM", "OPERATION", "COUNT", "MS", "FLOOR MS", "SHARE");
        for row in measured {
            println!(
                "  {:16} {:24} {:>5} {:>10.3} {:>10.3} {:>5.1}%",
                row.program,
                row.operation,
                row.count,
                row.milliseconds,
                row.floor_milliseconds,
                row.share * 100.0
            );
        }
    }
}

/// Runs of each program; the fastest time of an operation counts.
const REPEATS: usize = 3;

/// Times every operation of the largest micro-batch and of the update.
fn measure(plan: Plan, prepared: &Prepared, choice: &Choice) -> Result<Vec<Measured>, EngineError> {
    let mut session = backend::open(plan, prepared.model.weights.clone(), &choice.device)?;
    let workload = session.plan().workload.clone();
    let target = session.plan().target.clone();
    let largest = |role: Role| {
        let programs = workload.programs.iter().enumerate().filter(|(_, program)| program.role == role);
        programs.max_by_key(|(_, program)| program.tokens).map(|(index, _)| index)
    };
    let mut rows: Vec<Measured> = Vec::new();
    for index in [Role::Micro, Role::Update].into_iter().filter_map(largest) {
        let program = &workload.programs[index];
        let mut best = vec![f64::INFINITY; program.steps.len()];
        for _ in 0..REPEATS {
            time_steps(&mut *session, index, &mut best)?;
        }
        let total: f64 = best.iter().sum();
        let first = rows.len();
        for (at, (step, seconds)) in program.steps.iter().zip(best).enumerate() {
            if session.leaves_out(index, at) {
                continue;
            }
            let name = step.op.name();
            let floor = plan::estimate_op(&workload, &step.op, &target);
            let at = rows[first..].iter().position(|row| row.operation == name).map(|at| first + at);
            let at = at.unwrap_or_else(|| {
                let program = program.name.clone();
                rows.push(Measured {
                    program,
                    operation: name,
                    count: 0,
                    milliseconds: 0.0,
                    floor_milliseconds: 0.0,
                    share: 0.0,
                });
                rows.len() - 1
            });
            rows[at].count += 1;
            rows[at].milliseconds += seconds * 1e3;
            rows[at].floor_milliseconds += floor * 1e3;
            rows[at].share += seconds / total;
        }
        rows[first..].sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
    }
    Ok(rows)
}

fn time_steps(session: &mut dyn Session, program: usize, best: &mut [f64]) -> Result<(), EngineError> {
    for (step, best) in best.iter_mut().enumerate() {
        session.synchronize()?;
        let started = Instant::now();
        session.run_steps(program, step..step + 1)?;
        session.synchronize()?;
        *best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(())
}
