//! `tune worker`: the process that trains. Started by the other verbs, never by hand.

use std::cell::OnceCell;
use std::path::PathBuf;

use clap::Args;

use crate::backend::{self, Found};
use crate::run::worker::{End, Failure, Job, exit, run as work};
use crate::run::{Home, RunError, RunFolder, launch};
use crate::spec::{Capabilities, RunSpec};
use crate::train::{self, Controls, Outcome, TrainError};

/// Train a run in this process
#[derive(Args, Debug)]
pub struct Arguments {
    folder: PathBuf,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let path = arguments.folder.canonicalize()?;
    if launch::leave_session(&path)? == launch::Session::Delegated {
        return Ok(exit::DONE);
    }
    // Runs are two folders below the home.
    let home = path.ancestors().nth(2).map(Home::at).ok_or(RunError::NoHome)?;
    Ok(work(&home, &RunFolder::at(path), &Training::default())?)
}

/// The job of every worker.
#[derive(Default)]
struct Training {
    /// The device whose lock the worker has: looked for once, for another may be the better one later.
    found: OnceCell<Found>,
}

impl Job for Training {
    fn device(&self, spec: &RunSpec) -> Result<String, Failure> {
        let request = |error: String, hint: &str| Failure { error, hint: hint.into(), request: true };
        let found = backend::find(&spec.engine.device, &spec.engine.precision)
            .map_err(|error| request(error.to_string(), "`tune doctor` says which engines there are"))?;
        if let Some(capabilities) = Capabilities::of(found.engine) {
            capabilities.check(spec).map_err(|error| request(error.to_string(), ""))?;
        }
        Ok(self.found.get_or_init(|| found).identity.clone())
    }

    fn train(&self, spec: &RunSpec, folder: &RunFolder, controls: &mut dyn Controls) -> Result<End, Failure> {
        let found = match self.found.get() {
            Some(found) => Ok(found.clone()),
            None => backend::find(&spec.engine.device, &spec.engine.precision).map_err(TrainError::from),
        };
        match found.and_then(|found| train::train(spec, &found, folder, controls)) {
            Ok(Outcome::Finished) => Ok(End::Finished),
            Ok(Outcome::Stopped { .. }) => Ok(End::Stopped),
            Err(error) => Err(Failure { error: error.to_string(), hint: error.hint(), request: error.is_request() }),
        }
    }
}
