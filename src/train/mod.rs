//! The training loop, schedules, checkpoints, methods.

pub mod checkpoint;
pub mod controls;
mod nearest;
pub mod planning;
pub mod prepare;
mod result;
pub mod schedule;
pub mod stepper;
mod trainer;

pub use controls::{Controls, Recorder};
pub use prepare::{Prepared, open_model, prepare, search};
pub use stepper::{StepResult, Stepper};
pub use trainer::{Outcome, train};

use std::path::PathBuf;

use crate::backend::EngineError;
use crate::data::DataError;
use crate::generate::GenerateError;
use crate::hub::HubError;
use crate::model::ModelError;
use crate::model::tokenizer::TokenizerError;
use crate::program::PlanError;

/// Why a run could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Planning(#[from] planning::PlanningError),
    #[error(transparent)]
    Sample(#[from] GenerateError),
    /// A setting that does not fit the model, the data or the engine.
    #[error("{key} = {value}: {what}")]
    Setting { key: &'static str, value: String, what: String },
    #[error("{path} could not be written: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path}: {what}")]
    Checkpoint { path: PathBuf, what: String },
    #[error(
        "the gradient norm of update {step} is {norm}: {place}. Nothing was changed; the state before this update \
         is in {checkpoint}"
    )]
    NonFinite { step: u64, norm: f64, place: String, checkpoint: PathBuf },
}

/// A result that cannot be written is the disk's fault, not the request's.
fn unwritten(error: ModelError) -> TrainError {
    match error {
        ModelError::File { path, what } => TrainError::Write { path, source: std::io::Error::other(what) },
        other => TrainError::Model(other),
    }
}

impl TrainError {
    /// Whether the request was wrong (exit code 2) rather than the run (exit code 1).
    pub fn is_request(&self) -> bool {
        matches!(
            self,
            TrainError::Model(_)
                | TrainError::Hub(_)
                | TrainError::Data(_)
                | TrainError::Tokenizer(_)
                | TrainError::Planning(_)
                | TrainError::Setting { .. }
                | TrainError::Engine(EngineError::Unsupported { .. })
        )
    }

    /// What to do next, where the message does not say it.
    pub fn hint(&self) -> String {
        match self {
            TrainError::Planning(planning::PlanningError::Plan(
                PlanError::DoesNotFit { fits, .. } | PlanError::HostTooSmall { fits, .. } | PlanError::Refused { fits, .. },
            )) => match fits.as_slice() {
                [] => "no setting makes this model fit: choose a smaller one, or a machine with more memory".into(),
                [one] => format!("this would fit: {one}"),
                several => format!("any one of these would fit: {}", several.join("; ")),
            },
            TrainError::Planning(planning::PlanningError::Plan(PlanError::BufferTooLarge { .. })) => {
                "lower data.max_length, for a row is computed whole, or choose another device".into()
            }
            TrainError::Data(error) => error.hint(),
            TrainError::Write { .. } => "free space on that disk, then `tune resume` the run".into(),
            TrainError::NonFinite { .. } => {
                "lower train.learning_rate, set engine.precision = \"f32\" where the run is in f16, or look at the rows named; \
                 then `tune resume` the run, or start it again"
                    .into()
            }
            TrainError::Engine(EngineError::OutOfMemory { .. }) => {
                "end other programs that use the device, or set engine.vram in the run's run.toml, then `tune resume` the run".into()
            }
            TrainError::Engine(EngineError::Device { .. }) => {
                "`tune resume` the run; `tune doctor` looks at the device".into()
            }
            TrainError::Hub(error) => error.hint(),
            _ => String::new(),
        }
    }
}
