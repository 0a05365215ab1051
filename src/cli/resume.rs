//! `tune resume`: starts a stopped or dead run again from its last checkpoint.

use clap::Args;

use super::report::Failure;
use super::train::{Start, check_engine, start_and_watch};
use crate::run::{Home, RunError, State, Summary};
use crate::spec::RunSpec;

/// Start a stopped or dead run again from its last checkpoint
#[derive(Args, Debug)]
pub struct Arguments {
    /// Id, unique prefix of it, or @last
    run: String,
    /// Start the run and return at once
    #[arg(long)]
    detach: bool,
    /// Print events, one JSON object a line, and nothing else
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(&arguments.run)?;
    let summary = Summary::read(&folder);
    if summary.process.is_some() || !summary.state.is_over() {
        return Err(RunError::Busy { id: summary.run }.into());
    }
    if summary.state == State::Finished {
        let hint = format!("`tune train {}` repeats it", folder.spec_path().display());
        return Err(
            Failure::request(format!("run {} is finished; there is nothing to resume", summary.run), hint).into()
        );
    }
    check_engine(&RunSpec::read(&folder.spec_path(), &[])?)?;
    if folder.checkpoint_steps().is_empty() {
        eprintln!("run {} has no checkpoint and starts from the beginning", summary.run);
    }
    let from = std::fs::metadata(folder.events_path()).map(|file| file.len()).unwrap_or(0);
    start_and_watch(&folder, &Start { from, steps: summary.steps, detach: arguments.detach, json: arguments.json })
}
