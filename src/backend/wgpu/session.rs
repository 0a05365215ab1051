//! A session: buffers on the device, pipelines, and the dispatches of every program, ready to be sent.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;

use super::adapter::{Compiled, ENGINE, Gpu, Options};
use super::kernel::Kernel;
use super::lower::{Choices, Dispatch, Facts, Lowering, Question};
use super::memory::{Memory, SlabBuffers, TRANSFER_BYTES};
use super::storage::{Cut, Slab, Storage, View};
use super::tuning::Measurement;
use super::{cache, quantized, tables, tuning, upload};
use crate::backend::{EngineError, Session, WeightSource};
use crate::program::{BufferId, DType, Kind, Plan};

/// Uploads in flight are waited for after this many bytes: staging memory holds them until then.
const UPLOAD_BYTES: u64 = 256 << 20;

pub(super) struct Launch {
    pub kernel: usize,
    pub bindings: wgpu::BindGroup,
    pub grid: [u32; 3],
}

/// A program's launches, and where each step's begin.
struct Prepared {
    launches: Vec<Launch>,
    steps: Vec<usize>,
}

pub struct WgpuSession {
    plan: Plan,
    gpu: Arc<Gpu>,
    storage: Storage,
    memory: Memory,
    compiled: Vec<Arc<Compiled>>,
    programs: Vec<Prepared>,
    choices: Choices,
    measurements: Vec<Measurement>,
    allocated: u64,
    facts: Facts,
    parameters: wgpu::Buffer,
    /// Where each dispatch has its own.
    offsets: Vec<u64>,
    scales_gradients: bool,
    notice: Option<String>,
}

/// All programs as dispatches.
struct Lowered {
    kernels: Vec<Kernel>,
    dispatches: Vec<Dispatch>,
    /// Each program's dispatches, and where each step's begin.
    ranges: Vec<(Range<usize>, Vec<usize>)>,
    scratch: u64,
    unpacked: u64,
    questions: Vec<Question>,
    used: Choices,
    scales_gradients: bool,
}

fn lower(plan: &Plan, storage: &Storage, facts: &Facts, choices: &Choices) -> Result<Lowered, EngineError> {
    let mut lowering = Lowering::new(plan, storage, facts.clone(), choices);
    let mut ranges = Vec::new();
    for program in &plan.workload.programs {
        let start = lowering.dispatches.len();
        let mut steps = vec![0];
        for step in &program.steps {
            lowering.op(&step.op).map_err(|error| at_step(error, &program.name, &step.name))?;
            steps.push(lowering.dispatches.len() - start);
        }
        ranges.push((start..lowering.dispatches.len(), steps));
    }
    let Lowering { kernels, dispatches, scratch, unpacked, questions, used, gradient_scale, .. } = lowering;
    let scales_gradients = gradient_scale.is_some();
    Ok(Lowered { kernels, dispatches, ranges, scratch, unpacked, questions, used, scales_gradients })
}

impl Facts {
    fn storage(&self, plan: &Plan) -> Storage {
        Storage::new(plan, self.limits, self.f16 && plan.target.compute == DType::F16)
    }

    /// Bytes that a session of the plan takes on the device beside what the plan counts: partial sums, parameters of launches,
    /// what the host reads through, and where kernels are chosen by measurement what the candidates take.
    ///
    /// # Errors
    /// What opening it would be refused for.
    pub fn workspace(&self, plan: &Plan) -> Result<u64, EngineError> {
        let storage = self.storage(plan);
        let lowered = lower(plan, &storage, self, &Choices::new())?;
        let parameters = pack(&lowered.dispatches).0.len() as u64;
        let scratch = match self.measures {
            true => lowered.scratch.max(tuning::trials(plan, &storage, self, lowered.questions)?.1),
            false => lowered.scratch,
        };
        let persistent = plan.workload.buffers.iter().filter(|buffer| !buffer.kind.is_transient());
        let read = persistent.map(|buffer| buffer.bytes().min(TRANSFER_BYTES)).max().unwrap_or(0);
        Ok(scratch + parameters + read)
    }
}

impl WgpuSession {
    /// Opens the adapter, loads the weights and prepares every program.
    ///
    /// # Errors
    /// When the adapter is not there, the plan is beyond it, or memory runs out.
    pub fn open(
        plan: Plan,
        weights: Arc<dyn WeightSource>,
        options: &Options,
        table: Option<&str>,
    ) -> Result<WgpuSession, EngineError> {
        let gpu = Gpu::shared(options)?;
        let software = gpu.info.device_type == wgpu::DeviceType::Cpu;
        let mut choices = if software { Choices::new() } else { cache::load_choices(&gpu.info) };
        choices.extend(table.map(|table| tuning::given(table, &cache::made_with(&gpu.info))).unwrap_or_default());
        if software {
            return Self::open_on(gpu, plan, weights, choices, false);
        }
        match Self::open_on(gpu, plan.clone(), Arc::clone(&weights), choices.clone(), true) {
            // A candidate may have taken the device or its memory with it: rules decide on a new one.
            Err(error @ (EngineError::Device { .. } | EngineError::OutOfMemory { .. })) => {
                let mut session = Self::open_on(Gpu::shared(options)?, plan, weights, choices, false)?;
                let what =
                    "kernels are chosen by rules and not by measurement, for the device was lost while it was measured";
                session.notice = Some(format!("{what}: {error}"));
                Ok(session)
            }
            opened => opened,
        }
    }

    /// Opens with `choices` made; `measures` those that are not.
    pub(super) fn open_on(
        gpu: Arc<Gpu>,
        plan: Plan,
        weights: Arc<dyn WeightSource>,
        mut choices: Choices,
        measures: bool,
    ) -> Result<WgpuSession, EngineError> {
        let software = gpu.info.device_type == wgpu::DeviceType::Cpu;
        let facts = Facts { measures, ..gpu.facts() };
        let storage = facts.storage(&plan);
        let mut lowered = lower(&plan, &storage, &facts, &choices)?;
        let mut allocated = 0;
        let mut allocate = |label: String, size: u64, usage: wgpu::BufferUsages| {
            let size = size.next_multiple_of(256).max(256);
            if size > gpu.limits.max_buffer_size {
                let limit = gpu.limits.max_buffer_size;
                let what = format!("{label} takes {size} bytes, the adapter's buffers at most {limit}");
                return Err(EngineError::Unsupported { engine: ENGINE, what });
            }
            allocated += size;
            let scope = gpu.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let descriptor = wgpu::BufferDescriptor { label: Some(&label), size, usage, mapped_at_creation: false };
            let buffer = gpu.device.create_buffer(&descriptor);
            match pollster::block_on(scope.pop()) {
                None => Ok(buffer),
                Some(_) => {
                    let what = format!(
                        "{label} of {size} bytes, after {} others; lower data.max_length, set engine.recompute = \"all\" \
                         or method.kind = \"qlora\"",
                        allocated - size
                    );
                    Err(EngineError::OutOfMemory { engine: ENGINE, what })
                }
            }
        };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let mut all = |name: &str, sizes: &[u64]| -> Result<Vec<wgpu::Buffer>, EngineError> {
            sizes.iter().enumerate().map(|(index, &size)| allocate(format!("{name} {index}"), size, usage)).collect()
        };
        let values = tables::values();
        let table = all("tables", &[4 * values.len() as u64])?.remove(0);
        gpu.queue.write_buffer(&table, 0, bytemuck::cast_slice(&values));
        let segments = all("arena segment", &storage.segments)?;
        let unpacked = if lowered.unpacked > 0 { all("unpacked weight", &[lowered.unpacked])?.pop() } else { None };
        let mut buffers = |slab: &Slab| -> Result<SlabBuffers, EngineError> {
            let bytes = slab.cut.map_or(slab.bytes, |cut| cut.bytes);
            let sizes: Vec<u64> =
                (0..slab.bytes).step_by(bytes as usize).map(|first| bytes.min(slab.bytes - first)).collect();
            Ok(SlabBuffers { bytes, buffers: all("slab", &sizes)? })
        };
        let mut memory = Memory {
            tables: table,
            segments,
            pieces: storage.pieces.clone(),
            slabs: storage.slabs.iter().map(&mut buffers).collect::<Result<_, _>>()?,
            scratch: None,
            unpacked,
            staging: None,
        };
        let mut measurements = Vec::new();
        if !lowered.questions.is_empty() {
            let begun = Instant::now();
            let (trials, scratch) = tuning::trials(&plan, &storage, &facts, lowered.questions)?;
            memory.scratch = Some(gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("scratch of trials"),
                size: scratch.next_multiple_of(256).max(256),
                usage,
                mapped_at_creation: false,
            }));
            let (chosen, found) = tuning::measure(&gpu, &memory, &plan, &storage, &trials)?;
            tracing::debug!("{} choices by measurement in {:.1} s", chosen.len(), begun.elapsed().as_secs_f64());
            choices.extend(chosen);
            measurements = found;
            if !software {
                cache::save_choices(&gpu.info, &choices);
            }
            lowered = lower(&plan, &storage, &facts, &choices)?;
        }
        let Lowered { kernels, dispatches, ranges, scratch, used, scales_gradients, .. } = lowered;
        memory.scratch = all("scratch", &[scratch])?.pop();
        let (packed, offsets) = pack(&dispatches);
        let uniform = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let parameters = allocate("parameters".into(), packed.len() as u64, uniform)?;
        gpu.queue.write_buffer(&parameters, 0, &packed);
        let (before, begun) = (gpu.compiled.lock().map_or(0, |compiled| compiled.len()), Instant::now());
        let compiled = kernels.par_iter().map(|kernel| compile(&gpu, kernel)).collect::<Result<Vec<_>, _>>()?;
        gpu.failure.check()?;
        tracing::debug!("{} kernels ready in {:.1} s", kernels.len(), begun.elapsed().as_secs_f64());
        if gpu.compiled.lock().map_or(0, |compiled| compiled.len()) > before {
            gpu.keep_pipelines();
        }
        let mut launches = dispatches.iter().zip(&offsets).map(|(dispatch, &offset)| Launch {
            kernel: dispatch.kernel,
            bindings: bind_group(&gpu, &compiled[dispatch.kernel], &memory, &parameters, dispatch, offset),
            grid: dispatch.grid,
        });
        let mut programs = Vec::new();
        for (range, steps) in ranges {
            programs.push(Prepared { launches: launches.by_ref().take(range.len()).collect(), steps });
        }
        drop(launches);
        gpu.failure.check()?;
        let mut session = WgpuSession {
            plan,
            gpu,
            storage,
            memory,
            compiled,
            programs,
            choices: used,
            measurements,
            allocated,
            facts,
            parameters,
            offsets,
            scales_gradients,
            notice: None,
        };
        let begun = Instant::now();
        session.load(weights.as_ref())?;
        tracing::debug!("weights loaded in {:.1} s", begun.elapsed().as_secs_f64());
        Ok(session)
    }

    /// What was measured of each candidate kernel when the session opened; nothing where choices were known.
    pub fn measurements(&self) -> &[Measurement] {
        &self.measurements
    }

    /// Writes weights and constants.
    fn load(&mut self, weights: &dyn WeightSource) -> Result<(), EngineError> {
        let mut waiting = 0;
        for index in 0..self.plan.workload.buffers.len() {
            let buffer = &self.plan.workload.buffers[index];
            if buffer.kind != Kind::Weight {
                continue;
            }
            let view = self.storage.view(BufferId(index as u32));
            let tensor = weights.tensor(&buffer.name)?;
            if tensor.shape != buffer.shape {
                let what =
                    format!("has shape {:?} in the checkpoint, the model wants {:?}", tensor.shape, buffer.shape);
                return Err(EngineError::Weight { name: buffer.name.clone(), what });
            }
            let mut bytes = upload::converted(&buffer.name, tensor.dtype, view.dtype, &buffer.shape, tensor.bytes)?;
            if let Some(cut) = self.storage.cut(view.place).filter(|_| view.dtype.is_quantized()) {
                bytes = quantized::cut(&bytes, view.dtype, [view.rows, view.stride], cut.rows).into();
            }
            self.memory.upload(&self.gpu, view.place, view.offset, &bytes)?;
            waiting += bytes.len() as u64;
            if waiting > UPLOAD_BYTES {
                self.gpu.queue.submit([]);
                self.gpu.wait()?;
                waiting = 0;
            }
        }
        for (id, values) in &self.plan.workload.constants {
            let view = self.storage.view(*id);
            self.memory.upload(&self.gpu, view.place, view.offset, bytemuck::cast_slice(values))?;
        }
        self.gpu.queue.submit([]);
        self.gpu.wait()
    }

    /// How a tensor is cut whose bytes lie otherwise in its pieces.
    fn rearranging_cut(&self, view: &View) -> Option<Cut> {
        self.storage.cut(view.place).filter(|cut| cut.rearranges(view))
    }

    fn submit(&self, launches: &[Launch]) -> Result<(), EngineError> {
        let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        dispatch_all(&mut encoder, &self.compiled, launches);
        self.gpu.queue.submit([encoder.finish()]);
        self.gpu.failure.check()
    }

    fn check_length(&self, buffer: BufferId, given: usize) -> Result<(), EngineError> {
        let entry = self.plan.workload.buffer(buffer);
        if entry.bytes() == given as u64 && !entry.dtype.is_quantized() {
            return Ok(());
        }
        let (name, dtype) = (&entry.name, entry.dtype.name());
        let what = format!("{name} is {} bytes of {dtype}, the caller's buffer {given}", entry.bytes());
        Err(EngineError::Unsupported { engine: ENGINE, what })
    }
}

impl Session for WgpuSession {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), EngineError> {
        self.check_length(buffer, bytes.len())?;
        let (view, entry) = (self.storage.view(buffer), self.plan.workload.buffer(buffer));
        let mut bytes = upload::converted(&entry.name, entry.dtype, view.dtype, &entry.shape, bytes)?;
        if let Some(cut) = self.rearranging_cut(&view) {
            bytes = cut.arranged(view.dtype, [view.rows, view.stride], &bytes).into();
        }
        self.memory.upload(&self.gpu, view.place, view.offset, &bytes)
    }

    fn read(&mut self, buffer: BufferId, bytes: &mut [u8]) -> Result<(), EngineError> {
        self.check_length(buffer, bytes.len())?;
        let (view, entry) = (self.storage.view(buffer), self.plan.workload.buffer(buffer));
        let (name, from, to, shape) = (entry.name.clone(), view.dtype, entry.dtype, entry.shape.clone());
        if let Some(cut) = self.rearranging_cut(&view) {
            let mut pieces = vec![0; cut.total(from, [view.rows, view.stride])];
            self.memory.download(&self.gpu, &name, view.place, view.offset, &mut pieces)?;
            let held = cut.gathered(from, [view.rows, view.stride], &pieces);
            bytes.copy_from_slice(&upload::converted(&name, from, to, &shape, &held)?);
            return Ok(());
        }
        if from == to {
            return self.memory.download(&self.gpu, &name, view.place, view.offset, bytes);
        }
        let mut held = vec![0; from.bytes(&shape) as usize];
        self.memory.download(&self.gpu, &name, view.place, view.offset, &mut held)?;
        bytes.copy_from_slice(&upload::converted(&name, from, to, &shape, &held)?);
        Ok(())
    }

    fn run(&mut self, program: usize) -> Result<(), EngineError> {
        self.submit(&self.programs[program].launches)
    }

    fn run_steps(&mut self, program: usize, steps: Range<usize>) -> Result<(), EngineError> {
        let prepared = &self.programs[program];
        self.submit(&prepared.launches[prepared.steps[steps.start]..prepared.steps[steps.end]])
    }

    fn synchronize(&mut self) -> Result<(), EngineError> {
        self.gpu.wait()
    }

    fn tuning(&self) -> Option<String> {
        (!self.choices.is_empty()).then(|| tuning::table(&self.choices, &cache::made_with(&self.gpu.info)))
    }

    fn notice(&self) -> Option<String> {
        self.notice.clone()
    }

    fn allocated_bytes(&self) -> u64 {
        self.allocated
    }

    fn gradient_scale(&self) -> Option<f32> {
        self.scales_gradients.then_some(self.facts.gradient_factor)
    }

    fn set_gradient_scale(&mut self, scale: f32) -> Result<(), EngineError> {
        if !self.scales_gradients {
            return Ok(());
        }
        // The scale is among the parameters of launches, and changes nothing else.
        let facts = Facts { gradient_factor: scale, ..self.facts.clone() };
        let lowered = lower(&self.plan, &self.storage, &facts, &self.choices)?;
        let mut packed = vec![0; self.parameters.size() as usize];
        for (dispatch, &offset) in lowered.dispatches.iter().zip(&self.offsets) {
            packed[offset as usize..][..dispatch.parameters.len()].copy_from_slice(&dispatch.parameters);
        }
        self.gpu.queue.write_buffer(&self.parameters, 0, &packed);
        self.facts = facts;
        self.gpu.failure.check()
    }
}

/// One pass of launches.
pub(super) fn dispatch_all(encoder: &mut wgpu::CommandEncoder, compiled: &[Arc<Compiled>], launches: &[Launch]) {
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    let mut current = usize::MAX;
    for launch in launches {
        if launch.kernel != current {
            pass.set_pipeline(&compiled[launch.kernel].pipeline);
            current = launch.kernel;
        }
        pass.set_bind_group(0, &launch.bindings, &[]);
        pass.dispatch_workgroups(launch.grid[0], launch.grid[1], launch.grid[2]);
    }
}

fn at_step(error: EngineError, program: &str, step: &str) -> EngineError {
    match error {
        EngineError::Unsupported { engine, what } => {
            EngineError::Unsupported { engine, what: format!("{program}, {step}: {what}") }
        }
        other => other,
    }
}

/// The parameters of all dispatches end to end, equal ones once; offsets are multiples of 256.
pub(super) fn pack(dispatches: &[Dispatch]) -> (Vec<u8>, Vec<u64>) {
    let mut packed = Vec::new();
    let mut known = std::collections::HashMap::new();
    let offsets = dispatches
        .iter()
        .map(|dispatch| {
            // What has the same parameters now has them at another scale of gradients too.
            *known.entry((&dispatch.parameters, dispatch.scaled)).or_insert_with(|| {
                let offset = packed.len();
                packed.extend_from_slice(&dispatch.parameters);
                packed.resize(packed.len().next_multiple_of(256), 0);
                offset as u64
            })
        })
        .collect();
    (packed, offsets)
}

pub(super) fn compile(gpu: &Gpu, kernel: &Kernel) -> Result<Arc<Compiled>, EngineError> {
    let known = gpu.compiled.lock().ok().and_then(|compiled| compiled.get(kernel).cloned());
    if let Some(known) = known {
        return Ok(known);
    }
    let failed = |what: String| EngineError::Device { engine: ENGINE, what: format!("shader {}: {what}", kernel.file) };
    let source = kernel.wgsl().map_err(failed)?;
    #[cfg(test)]
    let source = if gpu.emulates && source.contains("coop_mat") { super::emulated::rewrite(&source) } else { source };
    let scope = gpu.device.push_error_scope(wgpu::ErrorFilter::Validation);
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(kernel.file), source: wgpu::ShaderSource::Wgsl(source.into()) };
    // SAFETY: the shaders index their buffers within the extents that lowering passes beside them, which are those
    // of the bound ranges; token ids, rows and positions that come from data are clamped or compared in the shader.
    // Loops are bounded by those extents.
    let module = unsafe { gpu.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let entry = |binding: usize, ty: wgpu::BufferBindingType| wgpu::BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
    entries.extend(
        kernel.bindings.iter().enumerate().map(|(index, binding)| {
            entry(index + 1, wgpu::BufferBindingType::Storage { read_only: !binding.writable })
        }),
    );
    let layout =
        gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
    let pipeline_layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(kernel.file),
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..Default::default()
        },
        cache: gpu.cache.as_ref(),
    });
    match pollster::block_on(scope.pop()) {
        None => {
            let compiled = Arc::new(Compiled { pipeline, layout });
            if let Ok(mut known) = gpu.compiled.lock() {
                known.insert(kernel.clone(), Arc::clone(&compiled));
            }
            Ok(compiled)
        }
        Some(error) => Err(failed(error.to_string())),
    }
}

pub(super) fn bind_group(
    gpu: &Gpu,
    compiled: &Compiled,
    memory: &Memory,
    parameters: &wgpu::Buffer,
    dispatch: &Dispatch,
    offset: u64,
) -> wgpu::BindGroup {
    let binding = |buffer, offset, size: u64| {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
    };
    let size = (dispatch.parameters.len() as u64).next_multiple_of(16);
    let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: binding(parameters, offset, size) }];
    entries.extend(dispatch.bindings.iter().enumerate().map(|(index, &(place, offset, size))| wgpu::BindGroupEntry {
        binding: index as u32 + 1,
        resource: {
            let (buffer, offset) = memory.at(place, offset);
            binding(buffer, offset, size)
        },
    }));
    gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &compiled.layout,
        entries: &entries,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Tensor;
    use crate::program::{Op, Role, WorkloadBuilder, plan::plan};

    struct Nothing;

    impl WeightSource for Nothing {
        fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError> {
            Err(EngineError::Weight { name: name.into(), what: "is not there".into() })
        }
    }

    /// A session of one operation on a device of its own, and the number that it zeroes.
    fn session() -> (WgpuSession, BufferId) {
        let options = Options { adapter: Some(0), compute: Some(DType::F32), portable: true, narrow: None };
        let target = super::super::target(&options).expect("a software Vulkan adapter: run tests/mesa.sh");
        let mut builder = WorkloadBuilder::new();
        let scalar = builder.persistent("x", &[1], DType::F32, Kind::Scalar);
        builder.begin("nothing", Role::Update, 0);
        builder.push("zero", Op::Zero { buffers: vec![scalar] });
        builder.end();
        let plan = plan(builder.finish(), target).expect("a plan");
        let gpu = Arc::new(Gpu::open(&options).expect("opens"));
        (WgpuSession::open_on(gpu, plan, Arc::new(Nothing), Choices::new(), false).expect("opens"), scalar)
    }

    #[test]
    fn a_lost_device_is_an_error_that_stays_and_a_new_one_opens() {
        let (mut session, scalar) = session();
        session.write(scalar, &1.0f32.to_le_bytes()).expect("writes");
        session.run(0).expect("runs");
        session.gpu.device.destroy();
        let lost = |result: Result<(), EngineError>| {
            assert!(matches!(&result, Err(EngineError::Device { what, .. }) if what.contains("lost")), "{result:?}");
        };
        lost(session.run(0).and_then(|()| session.synchronize()));
        lost(session.read(scalar, &mut [0; 4]));
        lost(session.write(scalar, &[0; 4]));
        let (mut session, scalar) = self::session();
        session.run(0).expect("runs");
        let mut bytes = [1; 4];
        session.read(scalar, &mut bytes).expect("reads");
        assert_eq!(bytes, [0; 4]);
    }

    #[test]
    fn an_invalid_use_of_the_device_is_an_error_of_the_session() {
        let (mut session, _) = session();
        let buffer = session.memory.slabs[0].buffers[0].clone();
        session.gpu.queue.write_buffer(&buffer, buffer.size(), &[0; 4]);
        let error = session.synchronize();
        assert!(matches!(&error, Err(EngineError::Device { .. })), "{error:?}");
        assert!(session.run(0).is_err(), "the session goes on");
    }

    #[test]
    fn memory_that_runs_out_under_way_is_named() {
        let failure = super::super::adapter::Failure::default();
        failure.lost("Out of memory");
        assert!(matches!(failure.check(), Err(EngineError::OutOfMemory { .. })));
        // As NVIDIA's Vulkan driver says it of a card that another process has filled.
        let full = super::super::adapter::would_not_open("NVIDIA H200", "Parent device is lost");
        assert!(matches!(&full, EngineError::OutOfMemory { what, .. } if what.contains("other programs")), "{full}");
        let other = super::super::adapter::would_not_open("NVIDIA H200", "Limit exceeded");
        assert!(matches!(other, EngineError::Device { .. }));
    }
}
