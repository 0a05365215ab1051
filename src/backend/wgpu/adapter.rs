//! Adapters and the device opened on one: what the engine may use there, and how its errors reach the caller.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};

use super::kernel::Kernel;
use super::lower::{Facts, HALF_GRADIENT_FACTOR, SOFTWARE_LOOP_LIMIT};
use super::storage::Limits;
use super::{cache, rate};
use crate::backend::EngineError;
use crate::backend::doctor::{Finding, Report};
use crate::program::{DType, Rates, Target};

pub(super) const ENGINE: &str = "wgpu";

/// Which adapter to open and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Index in [`adapters`]; none takes the first that is hardware.
    pub adapter: Option<usize>,
    /// Type of activations: f32, f16, or none for what suits the adapter.
    pub compute: Option<DType>,
    /// Use no more than core WebGPU promises: no optional feature, 128 MiB bindings, 16 KiB of workgroup memory.
    pub portable: bool,
    /// Use bindings and buffers of no more bytes than these, of which small models have tensors.
    #[serde(default)]
    pub narrow: Option<[u64; 2]>,
}

impl Options {
    /// Reads `wgpu` or `wgpu:N`, and a precision of `auto`, `f32` or `f16`. `TUNE_WGPU_PORTABLE` in the environment asks
    /// for [`Options::portable`]; with `TUNE_WGPU_PLAIN` no adapter has cooperative matrices, as most have none.
    ///
    /// # Errors
    /// When either is none of these.
    pub fn parse(device: &str, precision: &str) -> Result<Options, EngineError> {
        let unsupported = |what: String| EngineError::Unsupported { engine: ENGINE, what };
        let adapter =
            match device.split_once(':') {
                None => None,
                Some((_, number)) => Some(number.parse().map_err(|_| {
                    unsupported(format!("device {device}: write wgpu or wgpu:N, N from `tune doctor`"))
                })?),
            };
        let compute = match precision {
            "auto" => None,
            "f32" => Some(DType::F32),
            "f16" => Some(DType::F16),
            other => return Err(unsupported(format!("precision {other}: it has auto, f32 and f16"))),
        };
        let portable = std::env::var_os("TUNE_WGPU_PORTABLE").is_some_and(|value| !value.is_empty());
        Ok(Options { adapter, compute, portable, narrow: None })
    }
}

/// An adapter as `tune doctor` shows it.
#[derive(Clone, Debug)]
pub struct AdapterReport {
    /// What follows `wgpu:`.
    pub index: usize,
    pub name: String,
    /// `Vulkan`, `Metal`, `Dx12`.
    pub backend: String,
    pub driver: String,
    /// Runs on the processor: never chosen unless named.
    pub software: bool,
    /// Half-precision storage and arithmetic.
    pub f16: bool,
    pub subgroups: bool,
    /// 16x16x16 products of f16 summed in f32.
    pub cooperative_matrices: bool,
    pub largest_binding: u64,
    pub largest_buffer: u64,
    pub workgroup_bytes: u32,
}

/// Keeps a layer of Mesa's from loading that puts a desktop's own device first: this engine has an order of its own, and
/// where there is no desktop the layer complains on standard error at every look. For the start of a program; it does
/// nothing once there are threads.
pub fn quiet_layers() {
    let alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if alone {
        // SAFETY: no other thread is there to read the environment meanwhile.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

fn instance() -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: wgpu::Backends::PRIMARY,
            flags: wgpu::InstanceFlags::empty(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        })
    })
}

/// Adapters of this machine, discrete cards first and software last, in a stable order.
fn enumerate() -> Vec<wgpu::Adapter> {
    let mut adapters = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::PRIMARY));
    adapters
        .retain(|adapter| adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

fn has_cooperative(adapter: &wgpu::Adapter) -> bool {
    std::env::var_os("TUNE_WGPU_PLAIN").is_none_or(|value| value.is_empty())
        && adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        && adapter.features().contains(wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP)
        // The kernels count on subgroups of 32.
        && (adapter.get_info().subgroup_min_size, adapter.get_info().subgroup_max_size) == (32, 32)
        && adapter.cooperative_matrix_properties().iter().any(|shape| {
            (shape.m_size, shape.n_size, shape.k_size) == (16, 16, 16)
                && shape.ab_type == wgpu::CooperativeScalarType::F16
                && shape.cr_type == wgpu::CooperativeScalarType::F32
        })
}

/// Every adapter, by the index that `wgpu:N` takes.
pub fn adapters() -> Vec<AdapterReport> {
    enumerate()
        .iter()
        .enumerate()
        .map(|(index, adapter)| {
            let (info, limits) = (adapter.get_info(), adapter.limits());
            AdapterReport {
                index,
                name: info.name,
                backend: format!("{:?}", info.backend),
                driver: format!("{} {}", info.driver, info.driver_info),
                software: info.device_type == wgpu::DeviceType::Cpu,
                f16: adapter.features().contains(wgpu::Features::SHADER_F16),
                subgroups: adapter.features().contains(wgpu::Features::SUBGROUP),
                cooperative_matrices: has_cooperative(adapter),
                largest_binding: limits.max_storage_buffer_binding_size,
                largest_buffer: limits.max_buffer_size,
                workgroup_bytes: limits.max_compute_workgroup_storage_size,
            }
        })
        .collect()
}

/// Which device the options come to: where it sits if the driver says so, as for a card under any engine; else its name.
///
/// # Errors
/// When there is no such adapter.
pub fn identity(options: &Options) -> Result<String, EngineError> {
    let info = select(options)?.get_info();
    let place = info.device_pci_bus_id.to_lowercase();
    Ok(if place.is_empty() { format!("wgpu-{}", info.name) } else { format!("pci-{place}") })
}

/// What `tune doctor` says of the engine.
pub fn report() -> Report {
    let adapters = adapters();
    let findings: Vec<Finding> = adapters
        .iter()
        .map(|adapter| {
            let gibibytes = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let abilities = [
                (adapter.cooperative_matrices, "cooperative matrices"),
                (adapter.f16, "f16"),
                (adapter.subgroups, "subgroups"),
            ];
            let abilities: Vec<&str> = abilities.iter().filter(|entry| entry.0).map(|entry| entry.1).collect();
            let detail = format!(
                "{} ({}, {}), {}, bindings of {:.2} GiB, workgroups of {} KiB",
                adapter.name,
                adapter.backend,
                adapter.driver.trim(),
                if abilities.is_empty() { "core features".to_string() } else { abilities.join(", ") },
                gibibytes(adapter.largest_binding),
                adapter.workgroup_bytes >> 10,
            );
            let detail = match rate::measured(adapter.index, adapter.software) {
                Ok(rate) if rate >= 1e12 => format!("{detail}, matrix products {:.1} TFLOP/s (measured)", rate / 1e12),
                Ok(rate) => format!("{detail}, matrix products {:.1} GFLOP/s (measured)", rate / 1e9),
                Err(error) => format!("{detail}; it would not multiply: {error}"),
            };
            let name = format!("wgpu:{}", adapter.index);
            if adapter.software {
                let detail = format!("{detail}; runs on the processor, only when named");
                return Finding::absent(name, detail, "");
            }
            Finding::found(name, detail)
        })
        .collect();
    let usable = adapters.iter().any(|adapter| !adapter.software);
    if !findings.is_empty() {
        return Report { engine: ENGINE, usable, findings };
    }
    let mend = if cfg!(target_os = "linux") {
        "install the Vulkan loader and the card's Vulkan driver (Debian, Ubuntu: apt install libvulkan1 mesa-vulkan-drivers)"
    } else {
        "install the graphics driver"
    };
    let missing = Finding::missing("adapter", "no Vulkan, Metal or DX12 adapter", mend);
    Report { engine: ENGINE, usable, findings: vec![missing] }
}

fn select(options: &Options) -> Result<wgpu::Adapter, EngineError> {
    let unsupported = |what: String| EngineError::Unsupported { engine: ENGINE, what };
    let mut adapters = enumerate();
    if adapters.is_empty() {
        return Err(unsupported("no Vulkan, Metal or DX12 adapter on this machine; `tune doctor` says more".into()));
    }
    match options.adapter {
        Some(index) if index < adapters.len() => Ok(adapters.swap_remove(index)),
        Some(index) => Err(unsupported(format!(
            "there is no adapter {index}: this machine has {}, see `tune doctor`",
            adapters.len()
        ))),
        None => match adapters.iter().position(|adapter| adapter.get_info().device_type != wgpu::DeviceType::Cpu) {
            Some(index) => Ok(adapters.swap_remove(index)),
            None => Err(unsupported(format!(
                "the only adapter runs in software ({}); ask for it by number (wgpu:0) or use the cpu engine, which is \
                 faster",
                adapters[0].get_info().name
            ))),
        },
    }
}

/// What the engine may ask of an adapter under `options`.
struct Abilities {
    limits: wgpu::Limits,
    features: wgpu::Features,
    f16: bool,
    cooperative: bool,
    compute: DType,
}

fn abilities(adapter: &wgpu::Adapter, options: &Options) -> Result<Abilities, EngineError> {
    let offered = adapter.features();
    let f16 = offered.contains(wgpu::Features::SHADER_F16) && !options.portable;
    let cooperative = has_cooperative(adapter) && !options.portable;
    let mut features = wgpu::Features::empty();
    if !options.portable {
        features |= offered
            & (wgpu::Features::SHADER_F16
                | wgpu::Features::SUBGROUP
                | wgpu::Features::PIPELINE_CACHE
                | wgpu::Features::TIMESTAMP_QUERY);
        if cooperative {
            features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        }
    }
    if adapter.get_info().device_type == wgpu::DeviceType::Cpu {
        // A software adapter is for tests: it leaves nothing behind.
        features.remove(wgpu::Features::PIPELINE_CACHE);
    }
    let compute = match options.compute {
        None if cooperative => DType::F16,
        None => DType::F32,
        Some(DType::F16) if !f16 => {
            return Err(EngineError::Unsupported {
                engine: ENGINE,
                what: format!("precision f16: {} has no half-precision arithmetic; use f32", adapter.get_info().name),
            });
        }
        Some(dtype) => dtype,
    };
    let mut limits = if options.portable { wgpu::Limits::default() } else { adapter.limits() };
    if let Some([binding, buffer]) = options.narrow {
        limits.max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size.min(binding);
        limits.max_buffer_size = limits.max_buffer_size.min(buffer);
    }
    Ok(Abilities { limits, features, f16, cooperative, compute })
}

/// What lowering may count on.
fn facts_of(limits: &wgpu::Limits, software: bool, f16: bool, subgroups: bool, cooperative: bool) -> Facts {
    Facts {
        f16,
        subgroups,
        cooperative,
        limits: Limits { binding: binding_limit(limits), buffer: limits.max_buffer_size & !255 },
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
        software,
        workgroups: if software { 4 } else { 256 },
        measures: !software,
        loop_limit: software.then_some(SOFTWARE_LOOP_LIMIT),
        gradient_factor: HALF_GRADIENT_FACTOR,
    }
}

/// What lowering may count on of the adapter that the options come to; it is not opened.
///
/// # Errors
/// As [`target`].
pub fn facts(options: &Options) -> Result<Facts, EngineError> {
    let adapter = select(options)?;
    let Abilities { limits, features, f16, cooperative, .. } = abilities(&adapter, options)?;
    let software = adapter.get_info().device_type == wgpu::DeviceType::Cpu;
    Ok(facts_of(&limits, software, f16, features.contains(wgpu::Features::SUBGROUP), cooperative))
}

/// Share of an adapter's memory that a plan may use: its driver, a desktop and pipelines take some.
const USABLE: f64 = 0.93;

/// Bytes of an adapter's own memory: of the largest heap that Vulkan calls local to the device. None where it is software, and from
/// Metal and DX12, which are not asked.
#[cfg(target_vendor = "apple")]
fn memory(_adapter: &wgpu::Adapter) -> Option<u64> {
    None
}

/// As above.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: what the guard gives is only read here, and nothing of it is destroyed or kept.
    let vulkan = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    // SAFETY: the physical device is one of this very instance.
    let properties = unsafe {
        vulkan.shared_instance().raw_instance().get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
    heaps.iter().filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}

/// Bytes that may be taken where device and host have the same memory and the driver names no share of it, as on Apple's chips:
/// of what is free now, so much that the system and other programs go on.
fn shared_memory(info: &wgpu::AdapterInfo) -> Option<u64> {
    if info.device_type != wgpu::DeviceType::IntegratedGpu {
        return None;
    }
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    Some(system.available_memory() / 4 * 3)
}

/// Whether the adapter runs on the processor.
///
/// # Errors
/// When there is no such adapter.
pub fn is_software(options: &Options) -> Result<bool, EngineError> {
    Ok(select(options)?.get_info().device_type == wgpu::DeviceType::Cpu)
}

/// Largest binding, in whole 256-byte units.
pub(super) fn binding_limit(limits: &wgpu::Limits) -> u64 {
    limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) & !255
}

/// The adapter as plain data for the planner.
///
/// # Errors
/// When there is no such adapter, or it lacks the precision.
pub fn target(options: &Options) -> Result<Target, EngineError> {
    let adapter = select(options)?;
    let info = adapter.get_info();
    let abilities = abilities(&adapter, options)?;
    let software = info.device_type == wgpu::DeviceType::Cpu;
    let rates = match (info.device_type, abilities.cooperative && abilities.compute == DType::F16) {
        (wgpu::DeviceType::Cpu, _) => Rates { flops: 15e9, attention_flops: 5e9, bandwidth: 8e9, per_op: 5e-5 },
        (wgpu::DeviceType::DiscreteGpu, true) => {
            Rates { flops: 150e12, attention_flops: 50e12, bandwidth: 1.5e12, per_op: 1e-5 }
        }
        (wgpu::DeviceType::DiscreteGpu, false) => {
            Rates { flops: 10e12, attention_flops: 4e12, bandwidth: 5e11, per_op: 1e-5 }
        }
        _ => Rates { flops: 1e12, attention_flops: 4e11, bandwidth: 6e10, per_op: 2e-5 },
    };
    let largest = binding_limit(&abilities.limits);
    Ok(Target {
        name: match options.portable {
            true => format!("{} ({:?}, core WebGPU)", info.name, info.backend),
            false => format!("{} ({:?})", info.name, info.backend),
        },
        engine: ENGINE,
        memory: memory(&adapter)
            .filter(|_| !software)
            .map(|bytes| (bytes as f64 * USABLE) as u64)
            .or_else(|| shared_memory(&info)),
        largest_segment: largest,
        alignment: 256,
        compute: abilities.compute,
        trainable: DType::F32,
        gradients: DType::F32,
        micro_sizes: if software {
            vec![64, 128, 256, 512, 1024, 2048]
        } else {
            vec![256, 512, 1024, 2048, 4096, 8192]
        },
        rates,
        fp8_flops: None,
        library_workspace: 0,
        graph_bytes: 0,
        bus_bandwidth: 24e9,
        host_memory: None,
        logits_bytes: largest.min(if software { 64 << 20 } else { 512 << 20 }),
        mlp_tokens: usize::MAX,
        gated_rank: 0,
        norms: None,
    })
}

/// Why an adapter gave no device. Drivers call a device whose memory others hold lost before it was there.
pub(super) fn would_not_open(adapter: &str, error: &str) -> EngineError {
    let what = format!("{adapter} would not open: {error}");
    let words = error.to_lowercase();
    if words.contains("lost") || words.contains("memory") {
        let what = format!("{what}; drivers say so where other programs hold all of its memory");
        return EngineError::OutOfMemory { engine: ENGINE, what };
    }
    EngineError::Device { engine: ENGINE, what }
}

/// The first thing that went wrong on a device, kept until it is asked for.
#[derive(Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Option<(bool, String)>>>);

impl Failure {
    fn set(&self, memory: bool, what: String) {
        if let Ok(mut slot) = self.0.lock() {
            slot.get_or_insert((memory, what));
        }
    }

    /// The device is gone. Memory that runs out inside of a submission takes it along.
    pub(super) fn lost(&self, message: &str) {
        let memory = message.to_lowercase().contains("out of memory");
        self.set(memory, format!("the device was lost: {message}"));
    }

    /// The error, if there was one; it stays.
    pub fn check(&self) -> Result<(), EngineError> {
        let slot =
            self.0.lock().map_err(|_| EngineError::Device { engine: ENGINE, what: "a thread panicked".into() })?;
        match slot.as_ref() {
            None => Ok(()),
            Some((true, what)) => Err(EngineError::OutOfMemory { engine: ENGINE, what: what.clone() }),
            Some((false, what)) => Err(EngineError::Device { engine: ENGINE, what: what.clone() }),
        }
    }
}

/// A compiled kernel.
pub(super) struct Compiled {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// An open device, with the kernels compiled so far. Sessions in one process share it.
pub(super) struct Gpu {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub info: wgpu::AdapterInfo,
    pub limits: wgpu::Limits,
    pub f16: bool,
    pub subgroups: bool,
    pub cooperative: bool,
    pub failure: Failure,
    pub compiled: Mutex<HashMap<Kernel, Arc<Compiled>>>,
    /// The driver's compiled pipelines, kept from run to run.
    pub cache: Option<wgpu::PipelineCache>,
    /// Cooperative matrices are emulated.
    #[cfg(test)]
    pub emulates: bool,
}

/// Devices that this process has opened and that have not failed.
static OPEN: Mutex<Vec<(Options, Arc<Gpu>)>> = Mutex::new(Vec::new());

impl Gpu {
    pub(super) fn facts(&self) -> Facts {
        let software = self.info.device_type == wgpu::DeviceType::Cpu;
        facts_of(&self.limits, software, self.f16, self.subgroups, self.cooperative)
    }

    /// The device that `options` name: the one that is open already, as long as nothing went wrong on it.
    pub fn shared(options: &Options) -> Result<Arc<Gpu>, EngineError> {
        let poisoned = |_| EngineError::Device { engine: ENGINE, what: "a thread panicked".into() };
        let mut open = OPEN.lock().map_err(poisoned)?;
        open.retain(|(_, gpu)| gpu.failure.check().is_ok());
        if let Some((_, gpu)) = open.iter().find(|(known, _)| known == options) {
            return Ok(Arc::clone(gpu));
        }
        let gpu = Arc::new(Gpu::open(options)?);
        open.push((*options, Arc::clone(&gpu)));
        Ok(gpu)
    }

    pub(super) fn open(options: &Options) -> Result<Gpu, EngineError> {
        let adapter = select(options)?;
        let Abilities { limits, features, f16, cooperative, .. } = abilities(&adapter, options)?;
        let experimental = if cooperative {
            // SAFETY: the experimental feature used is cooperative matrices, on the shape and types that the
            // adapter lists; the shaders that use it keep every load and store inside its buffer.
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("tune"),
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: experimental,
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        }))
        .map_err(|error| would_not_open(&adapter.get_info().name, &error.to_string()))?;
        let failure = Failure::default();
        let uncaptured = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error| match error {
            wgpu::Error::OutOfMemory { source } => uncaptured.set(true, source.to_string()),
            other => uncaptured.set(false, other.to_string()),
        }));
        let lost = failure.clone();
        device.set_device_lost_callback(move |_, message| lost.lost(&message));
        let (info, compiled) = (adapter.get_info(), Mutex::default());
        let cache = features.contains(wgpu::Features::PIPELINE_CACHE).then(|| {
            let data = cache::load(&info);
            let descriptor = wgpu::PipelineCacheDescriptor { label: None, data: data.as_deref(), fallback: true };
            // SAFETY: the data is what `get_data` gave on this adapter and driver: the file is named for both, lies in
            // the user's private folder, and agrees with its checksum.
            unsafe { device.create_pipeline_cache(&descriptor) }
        });
        Ok(Gpu {
            device,
            queue,
            info,
            limits,
            f16,
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            cooperative,
            failure,
            compiled,
            cache,
            #[cfg(test)]
            emulates: false,
        })
    }

    /// Writes the pipeline cache.
    pub fn keep_pipelines(&self) {
        if let Some(data) = self.cache.as_ref().and_then(wgpu::PipelineCache::get_data) {
            cache::save(&self.info, &data);
        }
    }

    /// Waits for everything submitted so far.
    pub fn wait(&self) -> Result<(), EngineError> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|error| EngineError::Device { engine: ENGINE, what: error.to_string() })?;
        self.failure.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_says_how_much_memory_it_has() {
        for adapter in enumerate() {
            let info = adapter.get_info();
            if info.backend == wgpu::Backend::Vulkan {
                let bytes = memory(&adapter);
                assert!(bytes.is_some_and(|bytes| bytes >= 64 << 20), "{}: {bytes:?}", info.name);
            }
        }
    }
}
