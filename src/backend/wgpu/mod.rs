//! The WGSL engine: the programs of a plan on any Vulkan, Metal or DX12 adapter, through wgpu.
//!
//! ```text
//! adapter    which adapters there are, what they may do, their errors
//! storage    where buffers lie: arena segments and slabs
//! lower      operations -> dispatches
//! kernel     a shader file with constants, bindings and parameters -> WGSL
//! template   the directives in shader files
//! rate       how fast an adapter multiplies, for `tune doctor`
//! tuning     which kernel, by measurement
//! memory     wgpu buffers, and copies to and from the host
//! session    pipelines and launches on an open device
//! ```
//!
//! The shaders are in `shaders/`, one file an operation, each with its formula.

mod adapter;
mod cache;
#[cfg(test)]
mod emulated;
mod kernel;
mod lower;
#[cfg(test)]
mod measured;
mod memory;
mod quantized;
mod rate;
mod session;
mod storage;
mod tables;
mod template;
mod tuning;
mod upload;

use std::sync::Arc;

pub use adapter::{AdapterReport, Options, adapters, facts, identity, is_software, quiet_layers, report, target};
pub use lower::{Facts, HALF_GRADIENT_FACTOR};
pub use session::WgpuSession;
pub use tuning::{Measurement, Verdict};

use super::{EngineError, WeightSource};
use crate::program::Plan;

/// Opens a plan made for [`target`] of the same options.
///
/// # Errors
/// When the adapter is not there, the plan is beyond it, or memory runs out.
pub fn open(plan: Plan, weights: Arc<dyn WeightSource>, options: &Options) -> Result<WgpuSession, EngineError> {
    WgpuSession::open(plan, weights, options, None)
}

/// As [`open`], with the choices that [`Session::tuning`](super::Session::tuning) gave.
///
/// # Errors
/// As [`open`].
pub fn open_tuned(
    plan: Plan,
    weights: Arc<dyn WeightSource>,
    options: &Options,
    table: Option<&str>,
) -> Result<WgpuSession, EngineError> {
    WgpuSession::open(plan, weights, options, table)
}
