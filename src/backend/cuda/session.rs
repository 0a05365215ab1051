//! A plan on an open card.

use std::ops::Range;
use std::sync::Arc;

use super::command::{Command, Launch, arguments};
use super::compile::{Kernels, Variant};
use super::driver::{Card, DeviceMemory, Event, Graph, failed, zero};
use super::lower::{Lowering, attention, delta, gated, lora, norm, rotated};
use super::memory::Memory;
use super::product::Products;
use super::tables::Tables;
use super::weights::{Loader, read_buffer, write_buffer};
use crate::backend::{EngineError, Session, WeightSource};
use crate::program::{BufferId, Kind, Op, Plan, Program, Step};

/// Bytes that captured programs may take over what the plan has for them.
const GRAPH_SLACK: u64 = 64 << 20;

/// Files of kernels that convert and quantize weights on their way in.
const LOADING: [&str; 4] = ["cast", "nf4", "int8", "fp8"];

/// How a program runs next.
enum Replay {
    /// Not run yet: the first time its launches go out one by one, so that every library kernel is loaded.
    First,
    /// Run once: the next time it is captured.
    Warm,
    Captured(Graph),
}

/// A launch of a program, timed.
pub struct TimedLaunch {
    /// The kernel's entry, or rows, columns and summed dimension of a product, with the types of its factors.
    pub what: String,
    /// Of a product, floating-point operations; else 0.
    pub flops: u64,
    /// Whether its factors are 8-bit floats.
    pub eight_bit: bool,
    /// The fastest of the repeats.
    pub milliseconds: f32,
}

/// A session of the CUDA engine. Fields are dropped in order: graphs before what they point to.
pub struct CudaSession {
    replays: Vec<Replay>,
    /// Launches by program and step.
    programs: Vec<Vec<Vec<Command>>>,
    kept: Vec<DeviceMemory>,
    /// What captured programs take on the card, as measured.
    captured: Vec<u64>,
    products: Products,
    kernels: Kernels,
    memory: Memory,
    tables: Tables,
    plan: Plan,
    card: Arc<Card>,
}

impl CudaSession {
    /// Opens the card, allocates everything, loads the weights, decides every launch. `tuning`: the table of an earlier
    /// session.
    ///
    /// # Errors
    /// When the card is too old or too full, a weight is missing, or an operation has no kernel.
    pub fn open(
        plan: Plan,
        weights: &dyn WeightSource,
        ordinal: usize,
        tuning: Option<&str>,
    ) -> Result<Self, EngineError> {
        let begun = std::time::Instant::now();
        let passed = |what: &str| tracing::debug!("{what} after {:.2} s", begun.elapsed().as_secs_f64());
        super::require_libraries()?;
        let card = Card::open(ordinal)?;
        passed("card open");
        let mut kernels = Kernels::new(&card)?;
        let used = variants(&card, &plan);
        // Weights are brought with these; the rest is compiled meanwhile.
        let (early, late): (Vec<_>, Vec<_>) = used.into_iter().partition(|variant| LOADING.contains(&variant.file));
        kernels.prepare(&early)?;
        let compiling = kernels.start(late)?;
        let memory = Memory::new(&card, &plan)?;
        passed("memory allocated");
        let tables = Tables::new(&card)?;
        Loader::new(&card, &mut kernels, &memory, &tables)?.load(&plan.workload, weights)?;
        for (id, values) in &plan.workload.constants {
            super::driver::write(&card, memory.address(*id), bytemuck::cast_slice(values))?;
        }
        passed("weights loaded");
        kernels.finish(compiling)?;
        passed("kernels loaded");
        let mut products = Products::new(&card, tuning)?;
        let mut kept = Vec::new();
        fill_noise(&card, &mut kernels, &memory)?;
        let clusters = norm::clusters(&card, &mut kernels, &mut products)?;
        let mut programs = Vec::new();
        for program in &plan.workload.programs {
            let mut lowering =
                Lowering::new(&card, &plan.workload, &memory, &mut kernels, &mut products, &tables, &mut kept)
                    .with_clusters(clusters);
            let steps: Vec<_> =
                (0..program.steps.len()).map(|at| lowering.lower(program, at)).collect::<Result<_, _>>()?;
            lowering.end(&program.name)?;
            programs.push(steps);
        }
        products.keep_tuning();
        // Timing the products left its marks.
        memory.zero_arena(&card)?;
        for kind in [Kind::Gradient, Kind::Output, Kind::Cache] {
            for (id, buffer) in plan.workload.of_kind(kind) {
                zero(&card, memory.address(id), buffer.bytes())?;
            }
        }
        card.synchronize()?;
        passed("launches decided");
        let replays = plan.workload.programs.iter().map(|_| Replay::First).collect();
        Ok(Self { replays, programs, kept, captured: Vec::new(), products, kernels, memory, tables, plan, card })
    }

    /// Whether a program becomes a graph: where the plan has memory for it, as long as those before kept to it.
    fn becomes_graph(&self, program: usize) -> bool {
        let summary = &self.plan.summary;
        let planned = summary.bytes.get("graphs").copied().unwrap_or(0) + GRAPH_SLACK;
        let next = self.captured.iter().copied().max().unwrap_or(0);
        summary.programs[program].graph_bytes > 0 && self.captured.iter().sum::<u64>() + next <= planned
    }

    fn launch(&self, program: usize, steps: Range<usize>) -> Result<(), EngineError> {
        for commands in &self.programs[program][steps] {
            for command in commands {
                command.run(&self.card, &self.products)?;
            }
        }
        Ok(())
    }

    /// Milliseconds of each step of a program, run alone, the fastest of `repeats`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn profile(&mut self, program: usize, repeats: usize) -> Result<Vec<f32>, EngineError> {
        self.card.bind()?;
        let steps = self.programs[program].len();
        let mut fastest = vec![f32::INFINITY; steps];
        let events: Vec<Event> = (0..=steps).map(|_| Event::new(&self.card)).collect::<Result<_, _>>()?;
        for _ in 0..repeats.max(1) {
            for (step, event) in events.iter().enumerate() {
                event.record()?;
                self.launch(program, step..(step + 1).min(steps))?;
            }
            self.card.synchronize()?;
            for (fastest, pair) in fastest.iter_mut().zip(events.windows(2)) {
                *fastest = fastest.min(pair[0].milliseconds_until(&pair[1])?);
            }
        }
        Ok(fastest)
    }

    /// Times every launch of a program, one after the other on one stream.
    ///
    /// # Errors
    /// When the device fails.
    pub fn profile_launches(&mut self, program: usize, repeats: usize) -> Result<Vec<TimedLaunch>, EngineError> {
        self.card.bind()?;
        let commands: Vec<&Command> = self.programs[program].iter().flatten().collect();
        let events: Vec<Event> = (0..=commands.len()).map(|_| Event::new(&self.card)).collect::<Result<_, _>>()?;
        let mut fastest = vec![f32::INFINITY; commands.len()];
        for _ in 0..repeats.max(1) {
            for (command, event) in commands.iter().zip(&events) {
                event.record()?;
                command.run_alone(&self.card, &self.products)?;
            }
            events[commands.len()].record()?;
            self.card.synchronize()?;
            for (fastest, pair) in fastest.iter_mut().zip(events.windows(2)) {
                *fastest = fastest.min(pair[0].milliseconds_until(&pair[1])?);
            }
        }
        let timed = commands.iter().zip(fastest).filter_map(|(command, milliseconds)| {
            let (what, flops, eight_bit) = command.describe()?;
            Some(TimedLaunch { what, flops, eight_bit, milliseconds })
        });
        Ok(timed.collect())
    }

    /// Free and total bytes of the card.
    ///
    /// # Errors
    /// When the device fails.
    pub fn card_memory(&self) -> Result<(u64, u64), EngineError> {
        self.card.memory()
    }
}

/// Compiles what sessions on these plans need, on all cores at once, into the cache of kernels: each opens sooner then.
///
/// # Errors
/// When there is no such card, or a kernel does not compile.
pub fn compile_ahead<'a>(ordinal: usize, plans: impl IntoIterator<Item = &'a Plan>) -> Result<(), EngineError> {
    let card = Card::open(ordinal)?;
    let mut used: Vec<Variant> = Vec::new();
    for plan in plans {
        let new: Vec<Variant> = variants(&card, plan).into_iter().filter(|variant| !used.contains(variant)).collect();
        used.extend(new);
    }
    Kernels::new(&card)?.prepare(&used)
}

/// Kernel files that a plan most likely needs on a card.
fn variants(card: &Card, plan: &Plan) -> Vec<Variant> {
    let files: Vec<&'static str> = super::compile::SOURCES.iter().map(|source| source.name).collect();
    let mut used: Vec<Variant> = used_files(plan, &files).into_iter().map(Variant::from).collect();
    let mut add = |wanted: Vec<Variant>| {
        let new: Vec<Variant> = wanted.into_iter().filter(|variant| !used.contains(variant)).collect();
        used.extend(new);
    };
    for program in &plan.workload.programs {
        for (before, op, next) in with_neighbours(program) {
            add(attention::files(card, plan, op, next));
            add(lora::files(op));
            add(gated::file(&plan.workload, before, op, next).into_iter().collect());
            add(rotated::file(card.shared_bytes, op, next).into_iter().collect());
            add(delta::file(&plan.workload, card.shared_bytes, op, next).into_iter().collect());
        }
        add(norm::files(card, &plan.workload, program));
    }
    used
}

/// A program's operations, each with those before and after it.
fn with_neighbours(program: &Program) -> impl Iterator<Item = (Option<&Op>, &Op, Option<&Op>)> {
    let op = |at: Option<usize>| at.and_then(|at| program.steps.get(at)).map(|step| &step.op);
    program.steps.iter().enumerate().map(move |(at, step)| (op(at.checked_sub(1)), &step.op, op(Some(at + 1))))
}

/// Kernel files that a plan's operations need.
fn used_files(plan: &Plan, files: &[&'static str]) -> Vec<&'static str> {
    use crate::program::DType;
    let mut wanted: Vec<&str> = vec!["cast"];
    for step in plan.workload.programs.iter().flat_map(|program| &program.steps) {
        wanted.extend::<&[&str]>(match &step.op {
            Op::Embedding { .. } | Op::EmbeddingBackward { .. } | Op::GatherRows { .. } => &["embedding"],
            Op::RmsNorm { .. } => &["rms_norm"],
            Op::RmsNormBackward { .. } => &["rms_norm", "column_sum"],
            Op::Rope { .. } => &["rope"],
            Op::Glu { .. } | Op::GluBackward { .. } => &["glu"],
            Op::LinearCrossEntropy { .. } => &["cross_entropy"],
            Op::GradientNorm { .. } | Op::AdamW { .. } => &["adamw"],
            Op::CachedAttention { .. } => &["cached_attention"],
            Op::Linear { projections, .. } if projections.iter().any(|p| p.bias.is_some()) => &["bias"],
            _ => &[],
        });
    }
    for (dtype, file) in [(DType::Nf4, "nf4"), (DType::Int8, "int8"), (DType::Fp8, "fp8")] {
        if plan.workload.buffers.iter().any(|buffer| buffer.dtype == dtype) {
            wanted.push(file);
        }
    }
    files.iter().filter(|file| wanted.contains(file)).copied().collect()
}

/// Fills the arena with numbers on which products take as long as on real ones.
fn fill_noise(card: &Arc<Card>, kernels: &mut Kernels, memory: &Memory) -> Result<(), EngineError> {
    let function = kernels.function(&"cast".into(), "fill_noise")?;
    for (pointer, bytes) in memory.segments() {
        let arguments = arguments![pointer, (bytes / 4) as i64];
        let grid = [1024, 1, 1];
        Launch { function, grid, threads: 256, shared_bytes: 0, arguments, entry: "fill_noise".into() }.run(card)?;
    }
    Ok(())
}

impl Session for CudaSession {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), EngineError> {
        self.card.bind()?;
        let (kernels, workload) = (&mut self.kernels, &self.plan.workload);
        write_buffer(&self.card, kernels, &self.memory, &self.tables, workload, buffer, bytes)
    }

    fn read(&mut self, buffer: BufferId, bytes: &mut [u8]) -> Result<(), EngineError> {
        self.card.bind()?;
        read_buffer(&self.card, &self.memory, &self.plan.workload, buffer, bytes)
    }

    fn run(&mut self, program: usize) -> Result<(), EngineError> {
        self.card.bind()?;
        if program >= self.programs.len() {
            return Err(failed(format!("there is no program {program}")));
        }
        let steps = 0..self.programs[program].len();
        match &self.replays[program] {
            Replay::First => {
                self.launch(program, steps)?;
                self.replays[program] = Replay::Warm;
                Ok(())
            }
            Replay::Warm if steps.is_empty() => Ok(()),
            Replay::Warm if !self.becomes_graph(program) => self.launch(program, steps),
            Replay::Warm => {
                let (before, _) = self.card.memory()?;
                let graph = match Graph::capture(&self.card, || self.launch(program, steps.clone())) {
                    // Launches go without the memory that it takes.
                    Err(EngineError::OutOfMemory { .. }) => return self.launch(program, steps),
                    captured => captured?,
                };
                graph.launch()?;
                let (after, _) = self.card.memory()?;
                let taken = before.saturating_sub(after);
                let launches: usize = self.programs[program].iter().map(Vec::len).sum();
                let (planned, name) =
                    (&self.plan.summary.programs[program], &self.plan.workload.programs[program].name);
                tracing::debug!(
                    "captured {name}: {launches} launches take {:.1} MiB, planned {:.1}",
                    taken as f64 / f64::from(1 << 20),
                    planned.graph_bytes as f64 / f64::from(1 << 20)
                );
                self.captured.push(taken);
                self.replays[program] = Replay::Captured(graph);
                Ok(())
            }
            Replay::Captured(graph) => graph.launch(),
        }
    }

    fn run_steps(&mut self, program: usize, steps: Range<usize>) -> Result<(), EngineError> {
        self.card.bind()?;
        if program >= self.programs.len() || steps.end > self.programs[program].len() {
            return Err(failed(format!("program {program} has no steps {steps:?}")));
        }
        self.launch(program, steps)
    }

    fn leaves_out(&self, program: usize, step: usize) -> bool {
        let made_again = |step: &Step| matches!(step.op, Op::Glu { .. } | Op::RmsNorm { .. });
        self.plan.workload.programs[program].steps.get(step).is_some_and(made_again)
            && self.programs[program][step].is_empty()
    }

    fn synchronize(&mut self) -> Result<(), EngineError> {
        self.card.bind()?;
        self.card.synchronize()
    }

    fn tuning(&self) -> Option<String> {
        Some(self.products.tuning())
    }

    fn allocated_bytes(&self) -> u64 {
        let kept: u64 = self.kept.iter().map(|memory| memory.bytes).sum();
        self.memory.allocated() + kept + self.products.allocated()
    }
}

impl Drop for CudaSession {
    fn drop(&mut self) {
        // Nothing may be freed under a running kernel; an error here was reported by the call that met it.
        let _ = self.card.bind();
        let _ = self.card.synchronize();
    }
}
