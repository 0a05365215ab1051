//! `tune pause`, `continue`, `save`, `set`, `stop`: commands to a run's worker, carried out at its next safe step.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::describe::{Line, Narrator};
use super::report::Failure;
use crate::run::worker::exit;
use crate::run::{Command, Event, EventReader, Home, Record, RunFolder, State, Summary, control, launch, lock};
use crate::spec::keys;

/// Pause a run after its current update
#[derive(Args, Debug)]
pub struct Pause {
    /// Id, unique prefix of it, or @last
    run: String,
}

/// Go on with a paused run
#[derive(Args, Debug)]
pub struct Continue {
    /// Id, unique prefix of it, or @last
    run: String,
}

/// Write a checkpoint now
#[derive(Args, Debug)]
pub struct Save {
    /// Id, unique prefix of it, or @last
    run: String,
}

/// Change a running run: learning_rate=1e-4
#[derive(Args, Debug)]
pub struct Set {
    /// Id, unique prefix of it, or @last
    run: String,
    /// The learning rate is what can be changed while a run goes on
    #[arg(value_name = "KEY=VALUE")]
    setting: String,
}

/// Stop a run and save it
#[derive(Args, Debug)]
pub struct Stop {
    /// Id, unique prefix of it, or @last
    run: String,
    /// Stop at once, without saving: what is not in a checkpoint is lost
    #[arg(long)]
    now: bool,
}

pub fn pause(arguments: Pause) -> anyhow::Result<u8> {
    send(&arguments.run, Command::Pause, |event| matches!(event, Event::Paused { .. }))
}

pub fn go_on(arguments: Continue) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(&arguments.run)?;
    let status = control::status(&folder)?;
    if status.state != "paused" {
        let hint = format!("`tune pause {}` pauses it", status.run);
        return Err(Failure::request(format!("run {} is not paused; it is {}", status.run, status.state), hint).into());
    }
    send(&arguments.run, Command::Continue, |event| matches!(event, Event::Continued { .. }))
}

pub fn save(arguments: Save) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(&arguments.run)?;
    let step = control::status(&folder)?.step;
    if folder.checkpoint_steps().contains(&step) && is_at(&folder, step) {
        println!("checkpoint at step {step} is there already");
        return Ok(exit::DONE);
    }
    send(&arguments.run, Command::Save, |event| {
        matches!(event, Event::Checkpoint { .. })
            || matches!(event, Event::Warning { rule, .. } if rule == "checkpoint")
    })
}

/// Whether the run stands still at this step.
fn is_at(folder: &RunFolder, step: u64) -> bool {
    control::status(folder).is_ok_and(|status| status.state == "paused" && status.step == step)
}

pub fn set(arguments: Set) -> anyhow::Result<u8> {
    let (name, value) = arguments.setting.split_once('=').ok_or_else(|| {
        Failure::request(format!("`{}` is no setting", arguments.setting), "write learning_rate=1e-4")
    })?;
    let key = keys::find_path(name.trim()).map(|key| key.path());
    if key.as_deref() != Some("train.learning_rate") {
        let message = match &key {
            Some(key) => format!("{key} cannot be changed while a run goes on"),
            None => format!("unknown key {name}"),
        };
        return Err(Failure::request(message, "learning_rate is what can be changed").into());
    }
    let number: f64 = value.trim().parse().map_err(|_| {
        Failure::request(format!("train.learning_rate = {value} is no number"), "write learning_rate=1e-4")
    })?;
    let command = Command::SetLearningRate(number);
    control::check(command).map_err(|message| Failure::request(format!("train.{message}"), ""))?;
    send(&arguments.run, command, |event| matches!(event, Event::Changed { .. }))
}

pub fn stop(arguments: Stop) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(&arguments.run)?;
    if arguments.now {
        launch::kill(&folder)?;
        launch::record_kill(&folder)?;
        let summary = Summary::read(&folder);
        println!("run {} {}", summary.run, summary.reason.unwrap_or_default());
        return Ok(exit::DONE);
    }
    send(&arguments.run, Command::Stop, |_| false)
}

/// Time between two looks at the events.
const PULSE: Duration = Duration::from_millis(20);

/// Sends a command and waits for the event that shows it done, or the end of the run.
fn send(run: &str, command: Command, done: impl Fn(&Event) -> bool) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(run)?;
    let from = length(&folder.events_path());
    control::send(&folder, command)?;
    let mut reader = EventReader::open_at(&folder.events_path(), from)?;
    loop {
        let alive = lock::holder(&folder.lock_path()).is_some();
        while let Some(record) = reader.next_record()? {
            if done(&record.event) {
                return Ok(show(&record));
            }
        }
        if !alive {
            return over(&folder, command);
        }
        std::thread::sleep(PULSE);
    }
}

/// The run ended before, or by, the command.
fn over(folder: &RunFolder, command: Command) -> anyhow::Result<u8> {
    let summary = Summary::read(folder);
    let (run, state) = (&summary.run, summary.state.name());
    match (summary.state, command) {
        (State::Stopped, Command::Stop) => {
            println!("run {run} stopped and saved after step {}", summary.step);
            Ok(exit::DONE)
        }
        (State::Finished, Command::Stop) => {
            println!("run {run} finished before it could be stopped");
            Ok(exit::DONE)
        }
        _ => {
            let hint = summary.hint.unwrap_or_default();
            let why = summary.reason.map(|reason| format!(": {reason}")).unwrap_or_default();
            Err(Failure::run(format!("run {run} is {state}{why}"), hint).into())
        }
    }
}

fn show(record: &Record) -> u8 {
    match Narrator::default().line(record) {
        Line::Progress(text) | Line::Lasting(text) => {
            println!("{text}");
            exit::DONE
        }
        Line::Warning(text) | Line::Error { error: text, .. } => {
            super::report::warn(&text);
            exit::FAILED
        }
    }
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map(|file| file.len()).unwrap_or(0)
}
