//! The CPU engine: plain Rust, f32 arithmetic, all cores.
//!
//! Frozen weights stay where the checkpoint is mapped, in bf16, f16 or f32, or are held in NF4 or 8-bit integers; they are
//! converted block by block inside the products. Work is cut by shapes, never by threads, so the same plan gives the same bits.

mod attention;
mod cross_entropy;
mod elementary;
mod embedding;
mod execute;
mod glu;
mod kernel;
mod linear;
mod memory;
mod norm;
mod optimizer;
mod product;
mod quantized;
mod rope;

use std::ops::Range;
use std::sync::Arc;

use super::{EngineError, Session, WeightSource};
use crate::program::plan::lives;
use crate::program::{BufferId, DType, Kind, Op, Plan, Rates, Target};
use memory::Memory;

const ENGINE: &str = "cpu";

fn device(what: String) -> EngineError {
    EngineError::Device { engine: ENGINE, what }
}

/// How transient buffers are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// As planned, sharing arena segments.
    #[default]
    Arena,
    /// Each in an allocation of its own: to test the plan.
    Apart,
}

/// What happens to a transient buffer when its life ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dead {
    #[default]
    Left,
    /// Filled with NaN: to test that nothing reads it.
    Poisoned,
}

/// Choices for tests; the default is what runs use.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub layout: Layout,
    pub dead: Dead,
}

/// The CPU of this machine. Rates are rough figures for its vector instructions, times the threads.
///
/// # Errors
/// None so far.
pub fn target() -> Result<Target, EngineError> {
    let threads = rayon::current_num_threads();
    // Where the system does not say, its own refusal is the only limit.
    let memory = sysinfo::System::new().ok().map(|mut system| {
        system.refresh_memory();
        system.available_memory()
    });
    let sizes = |from: usize, to: usize, step: usize| (from..=to).step_by(step);
    let flops = kernel::Instructions::best().rate() * threads as f64;
    Ok(Target {
        name: format!("CPU, {threads} thread{}", if threads == 1 { "" } else { "s" }),
        engine: ENGINE,
        memory,
        largest_segment: u64::MAX,
        alignment: 64,
        compute: DType::F32,
        trainable: DType::F32,
        gradients: DType::F32,
        micro_sizes: sizes(16, 256, 16)
            .chain(sizes(288, 512, 32))
            .chain(sizes(640, 2048, 128))
            .chain(sizes(2560, 16_384, 512))
            .collect(),
        rates: Rates { flops, attention_flops: flops / 3.0, bandwidth: 8e9 * (threads as f64).min(8.0), per_op: 10e-6 },
        fp8_flops: None,
        library_workspace: 0,
        graph_bytes: 0,
        bus_bandwidth: 24e9,
        host_memory: None,
        logits_bytes: 64 << 20,
        mlp_tokens: usize::MAX,
        gated_rank: 0,
        norms: None,
    })
}

/// Opens a session as runs use it.
///
/// # Errors
/// When a storage type is not supported, a weight is missing or wrong, or memory is short.
pub fn open(plan: Plan, weights: Arc<dyn WeightSource>) -> Result<CpuSession, EngineError> {
    open_with(plan, weights, Options::default())
}

/// Opens a session with the options of tests.
///
/// # Errors
/// As [`open`].
pub fn open_with(plan: Plan, weights: Arc<dyn WeightSource>, options: Options) -> Result<CpuSession, EngineError> {
    supported(&plan)?;
    let mut memory = Memory::new(&plan, weights, options.layout)?;
    let mut deaths = Vec::new();
    if options.dead == Dead::Poisoned {
        for program in &plan.workload.programs {
            let mut ends = vec![Vec::new(); program.steps.len()];
            for life in lives(&plan.workload, program) {
                ends[life.last].push(life.buffer);
                memory.poison(life.buffer);
            }
            deaths.push(ends);
        }
    }
    Ok(CpuSession { plan, memory, deaths })
}

fn supported(plan: &Plan) -> Result<(), EngineError> {
    let refuse = |what: String| Err(EngineError::Unsupported { engine: ENGINE, what });
    for buffer in &plan.workload.buffers {
        let fits = match buffer.kind {
            Kind::Weight => {
                matches!(buffer.dtype, DType::F32 | DType::BF16 | DType::F16 | DType::Nf4 | DType::Int8)
            }
            Kind::Optimizer => matches!(buffer.dtype, DType::F32 | DType::Block8),
            _ => matches!(buffer.dtype, DType::F32 | DType::I32 | DType::U32),
        };
        if !fits {
            return refuse(format!("{} {} in {}", buffer.kind.name(), buffer.name, buffer.dtype.name()));
        }
    }
    for step in plan.workload.programs.iter().flat_map(|program| &program.steps) {
        let Op::AdamW { parts, .. } = &step.op else { continue };
        for part in parts {
            let parameter = plan.workload.buffer(part.parameter);
            if parameter.dtype != DType::F32 {
                return refuse(format!("training {} in {}", parameter.name, parameter.dtype.name()));
            }
        }
    }
    Ok(())
}

/// Programs open on the CPU.
pub struct CpuSession {
    plan: Plan,
    memory: Memory,
    /// Buffers that die after each step of each program, where they are to be poisoned.
    deaths: Vec<Vec<Vec<BufferId>>>,
}

impl Session for CpuSession {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), EngineError> {
        self.memory.write(buffer, bytes)
    }

    fn read(&mut self, buffer: BufferId, bytes: &mut [u8]) -> Result<(), EngineError> {
        self.memory.read(buffer, bytes)
    }

    fn run(&mut self, program: usize) -> Result<(), EngineError> {
        let steps = self.plan.workload.programs[program].steps.len();
        self.run_steps(program, 0..steps)?;
        product::grow_scratch_everywhere();
        Ok(())
    }

    fn run_steps(&mut self, program: usize, steps: Range<usize>) -> Result<(), EngineError> {
        for index in steps {
            let step = &self.plan.workload.programs[program].steps[index];
            execute::execute(&step.op, &self.memory.views()).map_err(|error| match error {
                EngineError::Device { engine, what } => {
                    EngineError::Device { engine, what: format!("{} ({}): {what}", step.name, step.op.name()) }
                }
                other => other,
            })?;
            if let Some(program) = self.deaths.get(program) {
                for &buffer in &program[index] {
                    self.memory.poison(buffer);
                }
            }
        }
        Ok(())
    }

    fn synchronize(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    fn allocated_bytes(&self) -> u64 {
        self.memory.allocated()
    }
}
