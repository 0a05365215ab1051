//! `tune worker`: the process that trains. Started by the other verbs, never by hand.

use std::path::PathBuf;

use clap::Args;

use crate::backend;
use crate::run::worker::{End, Failure, Job, exit, run as work};
use crate::run::{Home, RunError, RunFolder, launch};
use crate::spec::{Capabilities, RunSpec};
use crate::train::{self, Controls, Outcome};

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
    Ok(work(&home, &RunFolder::at(path), &Training)?)
}

/// The job of every worker.
struct Training;

impl Job for Training {
    fn device(&self, spec: &RunSpec) -> Result<String, Failure> {
        let request = |error: String, hint: &str| Failure { error, hint: hint.into(), request: true };
        let choice = backend::choose(&spec.engine.device, &spec.engine.precision)
            .map_err(|error| request(error.to_string(), "`tune doctor` says which engines there are"))?;
        if let Some(capabilities) = Capabilities::of(choice.target.engine) {
            capabilities.check(spec).map_err(|error| request(error.to_string(), ""))?;
        }
        // Runs on the CPU share it; of the others each has a number, 0 where none is given.
        let number = spec.engine.device.split_once(':').map_or("0", |(_, number)| number);
        Ok(match choice.target.engine {
            "cpu" => "cpu".into(),
            engine => format!("{engine}-{number}"),
        })
    }

    fn train(&self, spec: &RunSpec, folder: &RunFolder, controls: &mut dyn Controls) -> Result<End, Failure> {
        match train::train(spec, folder, controls) {
            Ok(Outcome::Finished) => Ok(End::Finished),
            Ok(Outcome::Stopped { .. }) => Ok(End::Stopped),
            Err(error) => Err(Failure { error: error.to_string(), hint: error.hint(), request: error.is_request() }),
        }
    }
}
