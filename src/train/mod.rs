//! The training loop, schedules, checkpoints, methods.

pub mod controls;

pub use controls::{Controls, Recorder};
