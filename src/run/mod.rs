//! Runs: folder, worker process, events, control socket, registry.

pub mod changes;
pub mod command;
pub mod control;
pub mod event;
pub mod folder;
pub mod home;
mod id;
pub mod journal;
pub mod launch;
pub mod lock;
pub mod runtime;
pub mod summary;
pub mod worker;

use std::path::PathBuf;

pub use command::Command;
pub use event::{Event, Record};
pub use folder::RunFolder;
pub use home::Home;
pub use journal::{EventReader, EventWriter};
pub use summary::{State, Summary};

/// What can go wrong with a run outside its training.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("there is no folder to keep runs in: neither $TUNE_HOME nor a home folder is known")]
    NoHome,
    #[error("runs cannot be kept in {path}: {source}", path = path.display())]
    NotWritable { path: PathBuf, source: std::io::Error },
    #[error("there are no runs in {path}", path = path.display())]
    NoRuns { path: PathBuf },
    #[error("no run {name}")]
    NoSuchRun { name: String },
    #[error("{name} could be any of {ids}")]
    Ambiguous { name: String, ids: String },
    #[error("run {id} has no living worker")]
    NotRunning { id: String },
    #[error("run {id} already has a worker")]
    Busy { id: String },
    #[error("the worker of run {id} did not start")]
    NoWorker { id: String, log: PathBuf },
    #[error("run {id} refused: {what}")]
    Refused { id: String, what: String },
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl RunError {
    /// The next step.
    pub fn hint(&self) -> String {
        match self {
            RunError::NoHome => "set TUNE_HOME to a folder of yours".into(),
            RunError::NotWritable { .. } => "make it writable, or set TUNE_HOME to a folder of yours".into(),
            RunError::NoRuns { .. } => "`tune demo` makes one".into(),
            RunError::NoSuchRun { .. } => "`tune runs` lists them".into(),
            RunError::Ambiguous { .. } => "give more of the id".into(),
            RunError::NotRunning { id } => format!("`tune resume {id}` starts it again from its last checkpoint"),
            RunError::Busy { id } => format!("`tune attach {id}` shows it, `tune stop {id}` stops and saves it"),
            RunError::NoWorker { log, .. } => format!("{} may say why", log.display()),
            RunError::Refused { .. } | RunError::Io(_) => String::new(),
        }
    }
}
