//! Engines: each runs the programs of a plan on one kind of device.
//!
//! `cpu` is plain Rust and the reference; `wgpu` runs the WGSL in `shaders/`; `cuda` the CUDA C++ in `kernels/`.

mod choose;
pub mod cpu;
pub mod cuda;
pub mod doctor;
mod floats;
pub mod inspect;
mod quantized;
pub mod wgpu;

pub use self::wgpu::Facts;
pub use choose::{Choice, Device, Found, candidates, choose, find, open, open_tuned};

use crate::program::{BufferId, DType, Plan};

/// What can go wrong on a device. After any error but [`EngineError::Unsupported`] the session is dead.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{engine} cannot run this: {what}")]
    Unsupported { engine: &'static str, what: String },
    #[error("{engine} ran out of memory: {what}")]
    OutOfMemory { engine: &'static str, what: String },
    #[error("{engine} failed: {what}")]
    Device { engine: &'static str, what: String },
    #[error("weight {name}: {what}")]
    Weight { name: String, what: String },
}

impl EngineError {
    /// What it says beside the engine that says it, for a sentence that names the device.
    pub fn reason(&self) -> String {
        match self {
            EngineError::Unsupported { what, .. } => what.clone(),
            other => other.to_string(),
        }
    }
}

/// A tensor as it lies in the checkpoint.
pub struct Tensor<'a> {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub bytes: &'a [u8],
}

/// Where an engine gets the weights from: usually memory-mapped safetensors files.
pub trait WeightSource: Send + Sync {
    /// The tensor of a [`Kind::Weight`](crate::program::Kind::Weight) buffer, by the buffer's name.
    ///
    /// # Errors
    /// When there is none.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError>;

    /// Says that a tensor was copied and its own memory may go, where it can be had again.
    fn release(&self, _name: &str) {}
}

/// A program's operations on an open device. Buffers are addressed by the ids of the plan's workload.
pub trait Session {
    fn plan(&self) -> &Plan;

    /// Writes a whole buffer in its storage type (never a quantized one).
    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), EngineError>;

    /// Reads a whole buffer in its storage type, after all work so far. A transient buffer holds what the last
    /// program left there, as long as nothing else has taken its place.
    fn read(&mut self, buffer: BufferId, bytes: &mut [u8]) -> Result<(), EngineError>;

    /// Runs a program; may return before the device is done.
    fn run(&mut self, program: usize) -> Result<(), EngineError>;

    /// Runs some of a program's operations one after the other, without any graph. Where an engine takes some together
    /// ([`Op::may_join`](crate::program::Op::may_join)), a later one is only whole with those before it.
    fn run_steps(&mut self, program: usize, steps: std::ops::Range<usize>) -> Result<(), EngineError>;

    /// Whether the engine does without an operation: nothing reads what it would write, for the engine has what is made of it
    /// another way.
    fn leaves_out(&self, _program: usize, _step: usize) -> bool {
        false
    }

    /// Waits for the device.
    fn synchronize(&mut self) -> Result<(), EngineError>;

    /// The engine's measured choices that decide the bits of results, as text to save: a session opened with it
    /// ([`open_tuned`]) on the same device repeats them. None where nothing is chosen by measurement.
    fn tuning(&self) -> Option<String> {
        None
    }

    /// What the user should know of how the session opened.
    fn notice(&self) -> Option<String> {
        None
    }

    /// Bytes that the session holds on the device, as the engine counts them.
    fn allocated_bytes(&self) -> u64;

    /// What gradients of activations are multiplied by, over those of a loss summed over tokens, where they are held in a type
    /// of narrow range; none where they need no scale. Parameters' gradients have it taken out again.
    fn gradient_scale(&self) -> Option<f32> {
        None
    }

    /// Changes [`Session::gradient_scale`]; nothing where there is none.
    fn set_gradient_scale(&mut self, _scale: f32) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Reads a buffer of 4-byte elements.
pub fn read_values<T: bytemuck::Pod + Default>(
    session: &mut dyn Session,
    buffer: BufferId,
) -> Result<Vec<T>, EngineError> {
    let elements = session.plan().workload.buffer(buffer).elements();
    let mut values = vec![T::default(); elements];
    session.read(buffer, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}
