//! Which engine runs a plan: from the words of a run file to a device and its target.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{EngineError, Session, WeightSource, cpu, cuda, wgpu};
use crate::monitor::gpu::Gpus;
use crate::program::{DType, Plan, Target};

/// A device that a plan can be opened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    Cpu,
    /// A card, by the driver's number.
    Cuda(usize),
    /// A Vulkan, Metal or DX12 adapter.
    Wgpu(wgpu::Options),
}

/// A device that was found and not opened: nothing of it is taken, and it may be full.
#[derive(Clone, Debug)]
pub struct Found {
    pub device: Device,
    /// `cpu`, `wgpu` or `cuda`.
    pub engine: &'static str,
    /// Shown to the user: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Which one it is, by whatever engine and under whatever number: runs on one device wait for each other.
    pub identity: String,
    /// Why this device, for the user.
    pub reason: String,
}

/// What `engine.device` and `engine.precision` came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Choice {
    pub device: Device,
    pub target: Target,
    /// What plans are looked at for beside the target, where the engine does.
    #[serde(default)]
    pub facts: Option<wgpu::Facts>,
    /// Why this device, for the user.
    pub reason: String,
}

impl Found {
    /// The device as it is now: with what is free on it.
    ///
    /// # Errors
    /// When it does not open.
    pub fn choice(&self) -> Result<Choice, EngineError> {
        let target = match &self.device {
            Device::Cpu => cpu::target()?,
            Device::Cuda(ordinal) => cuda::target(*ordinal)?,
            Device::Wgpu(options) => wgpu::target(options)?,
        };
        let facts = match &self.device {
            Device::Wgpu(options) => Some(wgpu::facts(options)?),
            _ => None,
        };
        Ok(Choice { device: self.device, target, facts, reason: self.reason.clone() })
    }
}

/// The device for `engine.device` and `engine.precision` as it is now ([`find`]).
///
/// # Errors
/// When the device is not there, does not compute in that precision, or does not open.
pub fn choose(device: &str, precision: &str) -> Result<Choice, EngineError> {
    find(device, precision)?.choice()
}

/// Finds the device for `engine.device` (`auto`, `cpu`, `cuda`, `cuda:N`, `wgpu`, `wgpu:N`) and `engine.precision`
/// (`auto`, `f32`, `f16`, `bf16`, `fp8`). `auto` takes CUDA where a card and its libraries are there, however full the card
/// is; else a hardware adapter through wgpu, else the CPU.
///
/// # Errors
/// When the device is not there, or does not compute in that precision.
pub fn find(device: &str, precision: &str) -> Result<Found, EngineError> {
    Ok(candidates(device, precision)?.swap_remove(0))
}

/// As [`find`]: the device, and after it those that would do as well, each with less free memory than the one before.
///
/// # Errors
/// As [`find`].
pub fn candidates(device: &str, precision: &str) -> Result<Vec<Found>, EngineError> {
    let unsupported = |engine, what| Err(EngineError::Unsupported { engine, what });
    let found = match device {
        "auto" => match find_cuda(precision) {
            Ok(cards) => return Ok(cards),
            // No other engine computes in these.
            Err(cuda) if matches!(precision, "bf16" | "fp8") => unsupported("cuda", cuda),
            Err(cuda) => match find_wgpu("wgpu", precision, &format!("a graphics adapter is there; {cuda}")) {
                Ok(found) => Ok(found),
                Err(wgpu) => find_cpu(precision, format!("{cuda}; {}", wgpu.reason())),
            },
        },
        "cpu" => find_cpu(precision, "asked for".into()),
        "cuda" => cuda_on(0, precision, "asked for".into()),
        "wgpu" => find_wgpu(device, precision, "asked for"),
        _ if device.starts_with("wgpu:") => find_wgpu(device, precision, "asked for"),
        _ => match device.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(ordinal)) => cuda_on(ordinal, precision, "asked for".into()),
            _ => unsupported(
                "this build",
                format!("engine.device = {device:?}; it has auto, cpu, cuda, cuda:N, wgpu and wgpu:N"),
            ),
        },
    };
    found.map(|found| vec![found])
}

/// The cards that can train, those with the most free memory first; or why there is none.
fn find_cuda(precision: &str) -> Result<Vec<Found>, String> {
    if !computes_on_cuda(precision) {
        return Err(format!("precision {precision} was asked for, which CUDA does not compute in"));
    }
    let cards = cuda::cards().map_err(|error| error.reason())?;
    if cards.is_empty() {
        return Err("no NVIDIA card was found".into());
    }
    let (mut usable, mut why) = (Vec::new(), String::new());
    for card in &cards {
        match cuda_on(card.ordinal, precision, "an NVIDIA card is there".into()) {
            Ok(found) => usable.push(found),
            Err(error) => why = format!("{} cannot be used: {}", card.name, error.reason()),
        }
    }
    if usable.is_empty() {
        return Err(why);
    }
    let count = usable.len();
    if count > 1 {
        let gpus = Gpus::open();
        // Of equals the first; a difference that a process on its way makes is none.
        let free = |found: &Found| gpus.as_ref().and_then(|gpus| gpus.free_bytes(&found.identity)).unwrap_or(0) >> 30;
        usable.sort_by_key(|found| std::cmp::Reverse(free(found)));
        for found in &mut usable {
            found.reason = format!("of {count} NVIDIA cards, by free memory and other runs");
        }
    }
    Ok(usable)
}

fn computes_on_cuda(precision: &str) -> bool {
    matches!(precision, "auto" | "bf16" | "fp8")
}

fn cuda_on(ordinal: usize, precision: &str, reason: String) -> Result<Found, EngineError> {
    let unsupported = |what| Err(EngineError::Unsupported { engine: "cuda", what });
    if !computes_on_cuda(precision) {
        return unsupported(format!("engine.precision = {precision:?}; it computes in bf16 and fp8"));
    }
    let card = cuda::usable(ordinal)?;
    if precision == "fp8" && !card.has_fp8() {
        return unsupported(format!(
            "engine.precision = \"fp8\" on {}, which has no 8-bit products (Ada, Hopper and newer have); use bf16",
            card.name
        ));
    }
    Ok(Found { device: Device::Cuda(ordinal), engine: "cuda", name: card.name, identity: card.identity, reason })
}

fn find_wgpu(device: &str, precision: &str, reason: &str) -> Result<Found, EngineError> {
    let options = wgpu::Options::parse(device, precision)?;
    let target = wgpu::target(&options)?;
    // The precision is settled here, so that plan and session agree.
    let options = wgpu::Options { compute: Some(target.compute), ..options };
    let reason = if wgpu::is_software(&options)? {
        format!("{reason}, though it runs on the processor")
    } else {
        reason.to_string()
    };
    let reason = match target.compute {
        DType::F16 => format!(
            "{reason}; f16, in which gradients of activations are {} times those of a loss summed over tokens",
            wgpu::HALF_GRADIENT_FACTOR
        ),
        _ => reason,
    };
    let identity = wgpu::identity(&options)?;
    Ok(Found { device: Device::Wgpu(options), engine: "wgpu", name: target.name, identity, reason })
}

fn find_cpu(precision: &str, reason: String) -> Result<Found, EngineError> {
    if !matches!(precision, "auto" | "f32") {
        let what = format!("engine.precision = {precision:?}; it computes in f32");
        return Err(EngineError::Unsupported { engine: "cpu", what });
    }
    // Runs on the CPU share it.
    Ok(Found { device: Device::Cpu, engine: "cpu", name: cpu::target()?.name, identity: "cpu".into(), reason })
}

/// Opens a plan on a device.
///
/// # Errors
/// When the device cannot run it, or memory is short.
pub fn open(plan: Plan, weights: Arc<dyn WeightSource>, device: &Device) -> Result<Box<dyn Session>, EngineError> {
    match device {
        Device::Cpu => Ok(Box::new(cpu::open(plan, weights)?)),
        Device::Cuda(ordinal) => Ok(Box::new(cuda::open(plan, weights, *ordinal)?)),
        Device::Wgpu(options) => Ok(Box::new(wgpu::open(plan, weights, options)?)),
    }
}

/// As [`open`], with the measured choices of an earlier session ([`Session::tuning`]).
///
/// # Errors
/// As [`open`].
pub fn open_tuned(
    plan: Plan,
    weights: Arc<dyn WeightSource>,
    device: &Device,
    tuning: Option<&str>,
) -> Result<Box<dyn Session>, EngineError> {
    match device {
        Device::Cuda(ordinal) => Ok(Box::new(cuda::open_tuned(plan, weights, *ordinal, tuning)?)),
        Device::Wgpu(options) => Ok(Box::new(wgpu::open_tuned(plan, weights, options, tuning)?)),
        _ => open(plan, weights, device),
    }
}
