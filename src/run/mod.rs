//! Runs: folder, worker process, events, control socket, registry.

pub mod command;
pub mod event;
pub mod folder;
pub mod id;
pub mod journal;

use std::path::PathBuf;

pub use command::Command;
pub use event::{Event, Record};
pub use folder::RunFolder;
pub use journal::{EventReader, EventWriter};

/// What can go wrong with a run outside its training.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("runs cannot be kept in {path}: {source}", path = path.display())]
    NotWritable { path: PathBuf, source: std::io::Error },
    #[error("{path} cannot be read: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
}
