//! Watching a run from a terminal: its events as they come, and what Ctrl-C means.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use super::describe::{Line, Narrator};
use super::paint::{Stream, Tone, paint};
use super::report::{Failure, warn};
use crate::run::worker::exit;
use crate::run::{Command, Event, EventReader, Record, RunFolder, control, launch, lock};

/// Who wants to see the events.
pub trait View {
    /// An event, and its line as it stands in the file.
    ///
    /// # Errors
    /// When it cannot be shown; a closed pipe detaches.
    fn event(&mut self, record: &Record, line: &[u8]) -> std::io::Result<()>;

    /// Something that is no event.
    fn note(&mut self, text: &str);
}

/// What the signals of a terminal do to the run that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manners {
    /// Ctrl-C and SIGTERM stop and save, a second Ctrl-C ends the worker at once.
    Owner,
    /// Ctrl-C and SIGTERM only end the watching.
    Visitor,
}

/// How the watching ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The run is over; its exit code.
    Run(u8),
    /// The run goes on without us.
    Detached,
}

/// Signals that reach whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Interrupt,
    Terminate,
    HangUp,
}

/// Time between two looks at the file.
const PULSE: Duration = Duration::from_millis(40);

/// Shows a run's events from byte `from` of its journal until the run is over.
///
/// # Errors
/// When the events cannot be read or shown.
pub fn watch(folder: &RunFolder, from: u64, manners: Manners, view: &mut dyn View) -> anyhow::Result<Ended> {
    let signals = signals()?;
    let mut reader = None;
    let mut stops = 0;
    // Exit code, where the newest event ends the run.
    let mut ending = None;
    loop {
        // Asked before reading: a worker that is gone by now has written all it will.
        let alive = lock::holder(&folder.lock_path()).is_some();
        if reader.is_none() {
            reader = EventReader::open_at(&folder.events_path(), from).ok();
        }
        while let Some(line) = reader.as_mut().map(EventReader::next_line).transpose()?.flatten() {
            let Some(record) = Record::parse(line) else { continue };
            match view.event(&record, line) {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(Ended::Detached),
                other => other?,
            }
            ending = match record.event {
                Event::Finished { .. } => Some(exit::DONE),
                Event::Stopped { .. } => Some(exit::STOPPED),
                Event::Failed { request: true, .. } => Some(exit::REQUEST),
                Event::Failed { .. } => Some(exit::FAILED),
                _ => None,
            };
        }
        if !alive {
            if let Some(code) = ending {
                return Ok(Ended::Run(code));
            }
            let hint = format!("`tune resume {}` starts it again from its last checkpoint", folder.id());
            return Err(Failure::run(format!("the worker of run {} is gone without a word", folder.id()), hint).into());
        }
        match signals.recv_timeout(if ending.is_some() { Duration::from_millis(5) } else { PULSE }) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Signal::HangUp) | Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Detached),
            Ok(_) if manners == Manners::Visitor => return Ok(Ended::Detached),
            Ok(signal) => {
                stops += 1;
                if stops == 1 || signal == Signal::Terminate {
                    view.note("stopping and saving; Ctrl-C once more stops now");
                    // A worker that has just ended needs no command.
                    let _ = control::send(folder, Command::Stop);
                } else {
                    view.note("stopping now");
                    if launch::kill(folder).is_ok() {
                        launch::record_kill(folder)?;
                    }
                }
            }
        }
    }
}

fn signals() -> anyhow::Result<Receiver<Signal>> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    let (sender, receiver) = channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            loop {
                let signal = tokio::select! {
                    _ = interrupt.recv() => Signal::Interrupt,
                    _ = terminate.recv() => Signal::Terminate,
                    _ = hangup.recv() => Signal::HangUp,
                };
                if sender.send(signal).is_err() {
                    return;
                }
            }
        });
    })?;
    Ok(receiver)
}

/// Events as they stand in the file, and nothing else on standard output.
pub struct Json;

impl View for Json {
    fn event(&mut self, _record: &Record, line: &[u8]) -> std::io::Result<()> {
        let mut output = std::io::stdout().lock();
        output.write_all(line)?;
        output.write_all(b"\n")?;
        output.flush()
    }

    fn note(&mut self, text: &str) {
        eprintln!("{text}");
    }
}

/// A line an event; on a terminal updates are written over each other.
pub struct Plain {
    narrator: Narrator,
    /// Columns of the terminal; none for a file or a pipe.
    width: Option<usize>,
    /// A progress line stands unfinished.
    open: bool,
}

impl Plain {
    pub fn new() -> Self {
        let live = std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|name| name != "dumb");
        let width = || crossterm::terminal::size().map_or(80, |(columns, _)| usize::from(columns));
        Self { narrator: Narrator::default(), width: live.then(width), open: false }
    }

    /// For a run whose beginning is not shown.
    pub fn expect(mut self, steps: u64) -> Self {
        self.narrator.expect(steps);
        self
    }

    fn close(&mut self) -> std::io::Result<()> {
        if std::mem::take(&mut self.open) {
            writeln!(std::io::stdout())?;
        }
        Ok(())
    }
}

impl Default for Plain {
    fn default() -> Self {
        Self::new()
    }
}

impl View for Plain {
    fn event(&mut self, record: &Record, _line: &[u8]) -> std::io::Result<()> {
        let line = self.narrator.line(record);
        let mut output = std::io::stdout();
        match (line, self.width) {
            (Line::Progress(text), Some(width)) => {
                let text: String = text.chars().take(width.saturating_sub(1)).collect();
                write!(output, "\r{text}\x1b[K")?;
                self.open = true;
            }
            (Line::Progress(text) | Line::Lasting(text), _) => {
                self.close()?;
                writeln!(output, "{text}")?;
            }
            (Line::Warning(text), _) => {
                self.close()?;
                output.flush()?;
                warn(&text);
            }
            (Line::Error { error, hint }, _) => {
                self.close()?;
                output.flush()?;
                eprintln!("{} {error}", paint(Stream::Error, Tone::Error, "error:"));
                if !hint.is_empty() {
                    eprintln!("{} {hint}", paint(Stream::Error, Tone::Hint, "hint:"));
                }
            }
        }
        output.flush()
    }

    fn note(&mut self, text: &str) {
        let _ = self.close();
        eprintln!("{text}");
    }
}
