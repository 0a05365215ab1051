//! Runs: folder, worker process, events, control socket, registry.

pub mod event;

pub use event::{Event, Record};
