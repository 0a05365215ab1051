//! `tune logs` prints what happened in a run; `tune attach` shows it and goes on live.

use std::io::Write;

use clap::Args;

use super::describe::{Line, Narrator};
use super::watch::{Ended, Json, Manners, Plain, View, watch};
use crate::run::worker::exit;
use crate::run::{EventReader, Home, Record, RunFolder};

/// Print what happened in a run
#[derive(Args, Debug)]
pub struct Arguments {
    /// Id, unique prefix of it, or @last
    run: String,
    /// Go on as more happens, until the run is over
    #[arg(short, long)]
    follow: bool,
    /// Print the events, one JSON object a line
    #[arg(long, conflicts_with = "worker")]
    json: bool,
    /// Print the worker's own log: errors of libraries, panics
    #[arg(long, conflicts_with = "follow")]
    worker: bool,
}

/// Show a run and go on live; Ctrl-C leaves it running
#[derive(Args, Debug)]
pub struct Attach {
    /// Id, unique prefix of it, or @last
    run: String,
    /// Print events line by line instead of opening the workbench
    #[arg(long)]
    plain: bool,
}

pub fn attach(arguments: Attach) -> anyhow::Result<u8> {
    if !arguments.plain && super::tui::has_terminal() {
        return super::tui::attach(&arguments.run);
    }
    let folder = Home::find()?.run(&arguments.run)?;
    follow(&folder, &mut Plain::new())
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(&arguments.run)?;
    if arguments.worker {
        let log = std::fs::read(folder.log_path()).unwrap_or_default();
        std::io::stdout().lock().write_all(&log)?;
        return Ok(exit::DONE);
    }
    let mut timed = Timed::default();
    let view: &mut dyn View = if arguments.json { &mut Json } else { &mut timed };
    if arguments.follow {
        return follow(&folder, view);
    }
    let mut reader = match EventReader::open(&folder.events_path()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(exit::DONE),
        other => other?,
    };
    while let Some(line) = reader.next_line()? {
        if let Some(record) = Record::parse(line) {
            view.event(&record, line)?;
        }
    }
    Ok(exit::DONE)
}

/// A visitor's exit code says how the watching went, not how the run did.
fn follow(folder: &RunFolder, view: &mut dyn View) -> anyhow::Result<u8> {
    if watch(folder, 0, Manners::Visitor, view)? == Ended::Detached {
        let id = folder.id();
        view.note(&format!("run {id} goes on; `tune stop {id}` stops and saves it"));
    }
    Ok(exit::DONE)
}

/// A line an event, with its time of day.
#[derive(Default)]
struct Timed {
    narrator: Narrator,
}

impl View for Timed {
    fn event(&mut self, record: &Record, _line: &[u8]) -> std::io::Result<()> {
        let text = match self.narrator.line(record) {
            Line::Progress(text) | Line::Lasting(text) => text,
            Line::Warning(text) => format!("warning: {text}"),
            Line::Error { error, hint } if hint.is_empty() => format!("error: {error}"),
            Line::Error { error, hint } => format!("error: {error}\nhint: {hint}"),
        };
        let time = chrono::DateTime::parse_from_rfc3339(&record.time);
        let time = time.map(|time| time.with_timezone(&chrono::Local).format("%Y-%m-%d %H:%M:%S").to_string());
        let time = time.unwrap_or_else(|_| record.time.clone());
        writeln!(std::io::stdout().lock(), "{time}  {}", text.replace('\n', "\n                     "))
    }

    fn note(&mut self, text: &str) {
        eprintln!("{text}");
    }
}
