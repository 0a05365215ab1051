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
    let training = Training { home: home.clone(), found: OnceCell::new() };
    Ok(work(&home, &RunFolder::at(path), &training)?)
}

/// The job of every worker.
struct Training {
    home: Home,
    /// The device whose lock the worker has: looked for once, for another may be the better one later.
    found: OnceCell<Found>,
}

impl Job for Training {
    fn device(&self, spec: &RunSpec) -> Result<String, Failure> {
        let request = |error: String, hint: &str| Failure { error, hint: hint.into(), request: true };
        let mut found = backend::candidates(&spec.engine.device, &spec.engine.precision)
            .map_err(|error| request(error.to_string(), "`tune doctor` says which engines there are"))?;
        // One that another run has is as good as none, however much memory that run leaves.
        let free = found.iter().position(|found| self.home.has_free_device(&found.identity));
        let found = found.swap_remove(free.unwrap_or(0));
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
