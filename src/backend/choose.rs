//! Which engine runs a plan: from the words of a run file to a device and its target.

use std::sync::Arc;

use super::{EngineError, Session, WeightSource, cpu};
use crate::program::{Plan, Target};

/// A device that a plan can be opened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
}

/// What `engine.device` and `engine.precision` came to.
#[derive(Clone, Debug)]
pub struct Choice {
    pub device: Device,
    pub target: Target,
    /// Why this device, for the user.
    pub reason: String,
}

/// Finds the device for `engine.device` (`auto`, `cpu`) and `engine.precision` (`auto`, `f32`).
///
/// # Errors
/// When the device is not there, or does not compute in that precision.
pub fn choose(device: &str, precision: &str) -> Result<Choice, EngineError> {
    let unsupported = |engine, what| Err(EngineError::Unsupported { engine, what });
    let reason = match device {
        "auto" => "no other engine was found",
        "cpu" => "asked for",
        _ => return unsupported("this build", format!("engine.device = {device:?}; it has auto and cpu")),
    };
    match precision {
        "auto" | "f32" => {}
        _ => return unsupported("cpu", format!("engine.precision = {precision:?}; it computes in f32")),
    }
    Ok(Choice { device: Device::Cpu, target: cpu::target()?, reason: reason.to_string() })
}

/// Opens a plan on a device.
///
/// # Errors
/// When the device cannot run it, or memory is short.
pub fn open(plan: Plan, weights: Arc<dyn WeightSource>, device: &Device) -> Result<Box<dyn Session>, EngineError> {
    match device {
        Device::Cpu => Ok(Box::new(cpu::open(plan, weights)?)),
    }
}
