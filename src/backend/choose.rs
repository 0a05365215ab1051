//! Which engine runs a plan: from the words of a run file to a device and its target.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{EngineError, Session, WeightSource, cpu, cuda, wgpu};
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

/// What `engine.device` and `engine.precision` came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Choice {
    pub device: Device,
    pub target: Target,
    /// Why this device, for the user.
    pub reason: String,
}

/// Finds the device for `engine.device` (`auto`, `cpu`, `cuda`, `cuda:N`, `wgpu`, `wgpu:N`) and `engine.precision`
/// (`auto`, `f32`, `f16`, `bf16`, `fp8`). `auto` takes CUDA where a card and its libraries are there, else a hardware
/// adapter through wgpu, else the CPU.
///
/// # Errors
/// When the device is not there, or does not compute in that precision.
pub fn choose(device: &str, precision: &str) -> Result<Choice, EngineError> {
    let unsupported = |engine, what| Err(EngineError::Unsupported { engine, what });
    match device {
        "auto" => match choose_cuda(precision) {
            Ok(choice) => Ok(choice),
            Err(cuda) => match choose_wgpu("wgpu", precision, "a graphics adapter is there, and no CUDA") {
                Ok(choice) => Ok(choice),
                Err(wgpu) => choose_cpu(precision, format!("{cuda}; {wgpu}")),
            },
        },
        "cpu" => choose_cpu(precision, "asked for".into()),
        "cuda" => cuda_on(0, precision, "asked for".into()),
        "wgpu" => choose_wgpu(device, precision, "asked for"),
        _ if device.starts_with("wgpu:") => choose_wgpu(device, precision, "asked for"),
        _ => match device.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(ordinal)) => cuda_on(ordinal, precision, "asked for".into()),
            _ => unsupported(
                "this build",
                format!("engine.device = {device:?}; it has auto, cpu, cuda, cuda:N, wgpu and wgpu:N"),
            ),
        },
    }
}

/// The first card that can train, or why there is none.
fn choose_cuda(precision: &str) -> Result<Choice, String> {
    if !matches!(precision, "auto" | "bf16" | "fp8") {
        return Err(format!("precision {precision} was asked for, which CUDA does not compute in"));
    }
    let cards = cuda::cards().map_err(|error| error.to_string())?;
    if cards.is_empty() {
        return Err("no other engine was found".into());
    }
    let mut why = String::new();
    for card in cards {
        match cuda_on(card.ordinal, precision, "an NVIDIA card is there".into()) {
            Ok(choice) => return Ok(choice),
            Err(error) => why = format!("{} cannot be used: {error}", card.name),
        }
    }
    Err(why)
}

fn cuda_on(ordinal: usize, precision: &str, reason: String) -> Result<Choice, EngineError> {
    if !matches!(precision, "auto" | "bf16" | "fp8") {
        let what = format!("engine.precision = {precision:?}; it computes in bf16 and fp8");
        return Err(EngineError::Unsupported { engine: "cuda", what });
    }
    let target = cuda::target(ordinal)?;
    if precision == "fp8" && target.fp8_flops.is_none() {
        let what = format!(
            "engine.precision = \"fp8\" on {}, which has no 8-bit products (Ada, Hopper and newer have); use bf16",
            target.name
        );
        return Err(EngineError::Unsupported { engine: "cuda", what });
    }
    Ok(Choice { device: Device::Cuda(ordinal), target, reason })
}

fn choose_wgpu(device: &str, precision: &str, reason: &str) -> Result<Choice, EngineError> {
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
    Ok(Choice { device: Device::Wgpu(options), target, reason })
}

fn choose_cpu(precision: &str, reason: String) -> Result<Choice, EngineError> {
    if !matches!(precision, "auto" | "f32") {
        let what = format!("engine.precision = {precision:?}; it computes in f32");
        return Err(EngineError::Unsupported { engine: "cpu", what });
    }
    Ok(Choice { device: Device::Cpu, target: cpu::target()?, reason })
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
