//! `step kernels`: every operation, product and kernel of a step at the shapes of Llama 8B, 2 rows of 2048 tokens, two
//! layers, each beside what the card does at most, measured in the same run.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use tune::backend::cuda::{self, Ceilings};
use tune::model::{Method, TrainingOptions, training_workload};
use tune::program::plan::plan;
use tune::program::{BufferId, DType, Op, Workload};

use super::shapes::config;
use super::{Noise, method, options, set_up};

const BATCH: usize = 2;
const SEQUENCE: usize = 2048;

/// What an operation or launch took, over all of its kind.
#[derive(Default)]
struct Row {
    count: usize,
    milliseconds: f64,
    flops: u64,
    fp8_flops: u64,
    bytes: u64,
}

impl Row {
    /// Time that the card's ceilings allow over the time taken.
    fn share(&self, ceilings: &Ceilings) -> f64 {
        let bf16 = (self.flops - self.fp8_flops) as f64 / ceilings.bf16;
        let fp8 = self.fp8_flops as f64 / ceilings.fp8.unwrap_or(ceilings.bf16);
        (bf16 + fp8).max(self.bytes as f64 / ceilings.copy) / (self.milliseconds * 1e-3)
    }

    fn print(&self, name: &str, ceilings: &Ceilings) {
        let rate = match (self.flops, self.bytes) {
            (0, 0) => String::new(),
            (0, bytes) => format!("{:7.0} GB/s", bytes as f64 / self.milliseconds * 1e-6),
            (flops, _) => format!("{:4.0} TFLOP/s", flops as f64 / self.milliseconds * 1e-9),
        };
        let share =
            if self.flops + self.bytes > 0 { format!("{:5.1}%", self.share(ceilings) * 100.0) } else { String::new() };
        let each = self.milliseconds / self.count as f64;
        println!("  {name:<58} {:3} x {each:9.4} ms {rate:>13} {share:>7}", self.count);
    }
}

pub fn run() -> anyhow::Result<()> {
    let ceilings = cuda::ceilings(0)?;
    let fp8 = ceilings.fp8.map_or("none".into(), |rate| format!("{:.0} TFLOP/s", rate * 1e-12));
    println!(
        "ceilings: copy {:.2} TB/s, bf16 product {:.0} TFLOP/s, fp8 product {fp8}",
        ceilings.copy * 1e-12,
        ceilings.bf16 * 1e-12
    );
    println!("share: of what copy and products allow for the operation's arithmetic and bytes, each operand once");
    let mut cases = vec![("lora", true), ("qlora", true), ("int8", true), ("full", true), ("full", false)];
    if ceilings.fp8.is_some() {
        cases.insert(3, ("fp8", true));
    }
    for (name, eight_bit) in cases {
        println!("{name}, AdamW with {}-bit states", if eight_bit { 8 } else { 32 });
        case(&ceilings, method(name, 16)?, eight_bit)?;
    }
    Ok(())
}

fn case(ceilings: &Ceilings, method: Method, eight_bit: bool) -> anyhow::Result<()> {
    let mut config = config("8b")?;
    config.layers = 2;
    let target = cuda::target(0)?;
    let options = TrainingOptions { eight_bit, ..options(&config, method, BATCH * SEQUENCE) };
    let mut workload = training_workload(&config, &options, &target)?;
    workload.longest_document = Some(SEQUENCE);
    let mut session = cuda::open(plan(workload, target)?, Arc::new(Noise::new(&config)), 0)?;
    let programs = set_up(&mut session, BATCH, SEQUENCE)?;
    use tune::backend::Session;
    for (name, values) in [
        ("hyper", bytemuck::cast_slice(&[2e-5f32, 0.1, 0.0316, 0.0])),
        ("random_key", bytemuck::cast_slice(&[7u32, 0, 0, 0])),
    ] {
        let id = session.plan().workload.find(name).with_context(|| format!("no buffer {name}"))?;
        session.write(id, values)?;
    }
    for _ in 0..2 {
        programs.iter().try_for_each(|&program| session.run(program))?;
    }
    session.synchronize()?;
    let (mut operations, mut launches) = (BTreeMap::<String, Row>::new(), BTreeMap::<String, Row>::new());
    for &program in &programs {
        let times = session.profile(program, 5)?;
        let timed = session.profile_launches(program, 5)?;
        let workload = &session.plan().workload;
        let listed = &workload.programs[program];
        for (at, (step, milliseconds)) in listed.steps.iter().zip(times).enumerate() {
            if listed.does_without(workload, at, &session.plan().target) {
                continue;
            }
            let place: Vec<&str> = step.name.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
            let row = operations.entry(format!("{:<21} {}", step.op.name(), place.join("."))).or_default();
            row.count += 1;
            row.milliseconds += f64::from(milliseconds);
            row.flops += step.op.flops(workload);
            row.fp8_flops += step.op.fp8_flops(workload);
            row.bytes += step.op.bytes_moved(workload);
        }
        for launch in timed {
            let row = launches.entry(launch.what).or_default();
            row.count += 1;
            row.milliseconds += f64::from(launch.milliseconds);
            row.flops += launch.flops;
            row.fp8_flops += if launch.eight_bit { launch.flops } else { 0 };
        }
        for (entry, bytes) in quantized_bytes(workload, program) {
            if let Some(row) = launches.get_mut(entry) {
                row.bytes += bytes;
            }
        }
    }
    for (title, rows) in [("operations", operations), ("products, and kernels around quantized weights", launches)] {
        println!(" {title}");
        let mut rows: Vec<(String, Row)> = rows.into_iter().filter(|(_, row)| row.flops + row.bytes > 0).collect();
        rows.sort_by(|a, b| b.1.milliseconds.total_cmp(&a.1.milliseconds));
        rows.iter().for_each(|(name, row)| row.print(name, ceilings));
    }
    Ok(())
}

/// Bytes that the kernels which unpack, quantize and transpose move in a program, by kernel.
fn quantized_bytes(workload: &Workload, program: usize) -> Vec<(&'static str, u64)> {
    let (mut nf4, mut int8, mut operands, mut transposed) = (0, 0, 0, 0);
    let held = |id: BufferId, dtype: DType| {
        let buffer = workload.buffer(id);
        if buffer.dtype == dtype { buffer.elements() as u64 } else { 0 }
    };
    for step in &workload.programs[program].steps {
        let (weights, columns, rows, backward): (Vec<BufferId>, usize, usize, bool) = match &step.op {
            Op::Linear { input, projections } => {
                let input = workload.buffer(*input);
                (projections.iter().map(|p| p.weight).collect(), input.columns(), input.rows(), false)
            }
            Op::LinearBackward { grad_input: Some(input), projections, .. } => {
                let columns = projections.iter().map(|p| p.grad_output.width).sum();
                (projections.iter().map(|p| p.weight).collect(), columns, workload.buffer(*input).rows(), true)
            }
            _ => continue,
        };
        nf4 += weights.iter().map(|&id| held(id, DType::Nf4)).sum::<u64>();
        int8 += weights.iter().map(|&id| held(id, DType::Int8)).sum::<u64>();
        let eight_bit: u64 = weights.iter().map(|&id| held(id, DType::Fp8)).sum();
        if eight_bit > 0 {
            operands += (rows * columns) as u64;
            transposed += if backward { eight_bit } else { 0 };
        }
    }
    vec![
        // Half a byte and 1/64 + 1/4096 of scales in, two bytes out.
        ("nf4_dequantize", nf4 * 5 / 2 + nf4 / 64 + nf4 / 4096),
        ("int8_dequantize_8", 3 * int8),
        ("fp8_largest", 2 * operands),
        ("fp8_quantize", 3 * operands),
        ("fp8_transpose", 2 * transposed),
    ]
}
