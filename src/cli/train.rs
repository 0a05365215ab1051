//! `tune train`: makes a run, starts its worker, and watches it.

use clap::Args;

use super::report::{Failure, warn};
use super::request::Request;
use super::watch::{Ended, Json, Manners, Plain, View, watch};
use crate::backend;
use crate::run::worker::exit;
use crate::run::{Event, EventReader, Home, RunFolder, changes, launch};
use crate::spec::{Capabilities, RunSpec, resolve};
use crate::train;

/// Train: make a run, start its worker, watch it
#[derive(Args, Debug)]
#[command(after_help = "Ctrl-C stops and saves, twice stops now; closing the terminal leaves the run going.\n\
    Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 3 stopped and saved")]
pub struct Arguments {
    #[command(flatten)]
    pub request: Request,
    /// Start the run and return at once
    #[arg(long)]
    pub detach: bool,
    /// Print events, one JSON object a line, and nothing else
    #[arg(long)]
    pub json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let spec = resolved(&arguments.request)?;
    let folder = RunFolder::create(&Home::find()?.runs(), &spec.resolved_toml())?;
    start_and_watch(&folder, &Start { from: 0, steps: 0, detach: arguments.detach, json: arguments.json })
}

/// How a run is started and shown.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Byte of the journal from which events are new; 0 for a new run.
    pub from: u64,
    /// Updates of the run, where its `started` event is not shown again.
    pub steps: u64,
    pub detach: bool,
    pub json: bool,
}

/// The spec that is asked for, complete, and known to be within the engine's powers.
///
/// # Errors
/// When anything about it is wrong. Nothing has been written.
pub fn resolved(request: &Request) -> anyhow::Result<RunSpec> {
    resolved_for(request, None)
}

/// As [`resolved`], for an engine that need not be here.
///
/// # Errors
/// As [`resolved`].
pub fn resolved_for(request: &Request, engine: Option<&str>) -> anyhow::Result<RunSpec> {
    let mut spec = request.spec()?;
    if let (Some(file), Some(resolved)) = (&request.file, &mut spec.resolved)
        && let Some(folder) = file.canonicalize()?.parent()
    {
        // A run's own file: what was changed while it ran is changed again.
        resolved.changes.extend(changes::recorded(&RunFolder::at(folder)));
        resolved.changes.sort_by_key(|change| change.step);
        resolved.changes.dedup();
    }
    let changed = resolve::changed_data(&spec);
    let mut complete = resolve::resolve(&spec)?;
    if !changed.is_empty() {
        warn(&format!("the data is not what it was when that run was made: {}", changed.join(", ")));
    }
    match engine.and_then(Capabilities::of) {
        Some(capabilities) => capabilities.check(&complete)?,
        None => {
            check_engine(&complete)?;
        }
    }
    // Opening maps the files and checks their headers; nothing is read yet.
    let context = train::open_model(&complete)?.0.config.max_position_embeddings;
    if complete.data.max_length > context && !request.names("data", "max_length") {
        // Only the default is fitted; a length that was asked for is refused further on.
        complete.data.max_length = context;
    }
    if let Some(resolved) = &mut complete.resolved {
        resolved.version = env!("CARGO_PKG_VERSION").into();
    }
    Ok(complete)
}

/// Refuses what the chosen engine cannot do. The device is not opened: another run may have all of it.
///
/// # Errors
/// When the device is not there, or cannot do what the spec asks.
pub fn check_engine(spec: &RunSpec) -> anyhow::Result<backend::Found> {
    let engine = spec.engine.device.split(':').next().unwrap_or_default();
    if let Some(capabilities) = Capabilities::of(engine) {
        capabilities.check(spec)?;
    }
    let found = backend::find(&spec.engine.device, &spec.engine.precision).map_err(|error| {
        Failure::request(error.to_string(), "`tune doctor` says which engines there are and what is missing")
    })?;
    if let Some(capabilities) = Capabilities::of(found.engine) {
        capabilities.check(spec)?;
    }
    Ok(found)
}

/// Starts a run's worker and shows its events; gives the exit code.
///
/// # Errors
/// When the worker cannot be started or is gone without a word.
pub fn start_and_watch(folder: &RunFolder, start: &Start) -> anyhow::Result<u8> {
    let Start { from, steps, detach, json } = *start;
    if let Some(advice) = launch::start(folder)? {
        warn(&advice);
    }
    let id = folder.id();
    if detach {
        match json {
            true => println!("{}", serde_json::json!({ "run": id, "path": folder.path() })),
            false => println!("{id}"),
        }
        return Ok(exit::DONE);
    }
    let mut plain = Plain::new().expect(steps);
    let view: &mut dyn View = if json { &mut Json } else { &mut plain };
    match watch(folder, from, Manners::Owner, view)? {
        Ended::Detached => {
            if !json {
                view.note(&format!("run {id} goes on; `tune attach {id}` shows it"));
            }
            Ok(exit::DONE)
        }
        Ended::Run(code) => {
            if code == exit::REQUEST && from == 0 {
                discard_unstarted(folder);
            }
            Ok(code)
        }
    }
}

/// Removes a run that was refused before it began: it has nothing that the error has not said.
fn discard_unstarted(folder: &RunFolder) {
    let Ok(reader) = EventReader::open(&folder.events_path()) else { return };
    let began =
        reader.map_while(Result::ok).any(|record| matches!(record.event, Event::Step { .. } | Event::Eval { .. }));
    if !began && folder.checkpoint_steps().is_empty() {
        let _ = std::fs::remove_dir_all(folder.path());
    }
}
