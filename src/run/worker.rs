//! The worker: the process that trains, apart from any terminal.
//!
//! It holds `worker.lock` while it lives, listens on the control socket, waits for the device, and hands the trainer
//! its [`Controls`].

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::changes::Replay;
use super::control::{self, Status};
use super::lock::{Holder, Lock, holder};
use super::{Command, Event, EventWriter, Home, RunError, RunFolder, runtime};
use crate::advise::{Warning, Watch};
use crate::monitor::throttle::ThrottleWatch;
use crate::spec::RunSpec;
use crate::train::Controls;

/// How a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    Stopped,
}

/// Why a run ended with one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub error: String,
    /// The next step; may be empty.
    pub hint: String,
    /// The request was wrong, rather than the run.
    pub request: bool,
}

/// What the worker is given to do: which device it needs, and the training itself.
pub trait Job {
    /// A name of the device that the spec will use, the same for all runs that would get in each other's way.
    ///
    /// # Errors
    /// When there is no such device.
    fn device(&self, spec: &RunSpec) -> Result<String, Failure>;

    /// Trains until the end or a stop.
    ///
    /// # Errors
    /// Why the run failed.
    fn train(&self, spec: &RunSpec, folder: &RunFolder, controls: &mut dyn Controls) -> Result<End, Failure>;
}

/// Exit codes of a worker, and of whoever waits for one.
pub mod exit {
    pub const DONE: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const REQUEST: u8 = 2;
    pub const STOPPED: u8 = 3;
}

/// Runs a run to its end in this process; gives the exit code. Everything that goes wrong becomes an event.
///
/// # Errors
/// When the run cannot be taken: another worker has it, or its files cannot be written.
pub fn run(home: &Home, folder: &RunFolder, job: &dyn Job) -> Result<u8, RunError> {
    let process = std::process::id();
    let socket = runtime::socket_path(&format!("{}-{process}.sock", folder.id()));
    let entry = Holder { run: folder.id(), process, socket: socket.as_ref().ok().cloned() };
    let unwritable = |source| RunError::NotWritable { path: folder.path().to_owned(), source };
    // Whoever sees the lock may send signals.
    let (sender, commands) = channel();
    listen_to_signals(sender.clone())?;
    let Some(lock) = Lock::take(&folder.lock_path(), &entry).map_err(unwritable)? else {
        return Err(RunError::Busy { id: folder.id() });
    };
    let journal = EventWriter::open(&folder.events_path()).map_err(unwritable)?;
    let status = Status { run: folder.id(), process, state: "preparing".into(), step: 0, steps: 0 };
    let mut controls = WorkerControls {
        journal,
        commands,
        status: Arc::new(Mutex::new(status)),
        lost: None,
        step: 0,
        replay: Replay::default(),
        watch: Watch::default(),
        throttle: ThrottleWatch::default(),
        stop_at: None,
        deferred: VecDeque::new(),
        backlog: VecDeque::new(),
    };
    let server = match socket.and_then(|path| control::Server::start(path, sender, controls.status.clone())) {
        Ok(server) => Some(server),
        Err(error) => {
            controls.emit(Event::Warning {
                rule: "control".into(),
                message: format!("there is no control socket: {error}"),
                advice: format!("the run goes on; `kill {process}` stops and saves it"),
            });
            None
        }
    };
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| work(home, folder, job, &mut controls)));
    let ended = ended.unwrap_or_else(|_| {
        Err(Failure {
            error: "internal error: the worker panicked".into(),
            hint: format!("worker.log has the place; `tune resume {}` goes on from the last checkpoint", folder.id()),
            request: false,
        })
    });
    let code = match ended {
        Ok(End::Finished) => exit::DONE,
        Ok(End::Stopped) => exit::STOPPED,
        Err(Failure { error, hint, request }) => {
            eprintln!("error: {error}");
            controls.emit(Event::Failed { error, hint, request });
            if request { exit::REQUEST } else { exit::FAILED }
        }
    };
    let code = match controls.lost {
        Some(error) if code == exit::DONE || code == exit::STOPPED => {
            eprintln!("error: events.jsonl could not be written: {error}");
            exit::FAILED
        }
        _ => code,
    };
    drop(server);
    drop(lock);
    Ok(code)
}

fn work(home: &Home, folder: &RunFolder, job: &dyn Job, controls: &mut WorkerControls) -> Result<End, Failure> {
    let spec = RunSpec::read(&folder.spec_path(), &[]).map_err(|error| Failure {
        error: error.to_string(),
        hint: "run.toml in the run's folder was changed; `tune new` shows what is allowed".into(),
        request: true,
    })?;
    let changed = crate::spec::resolve::changed_data(&spec);
    if !changed.is_empty() && !folder.checkpoint_steps().is_empty() {
        let message = format!("the data is not what it was when the run was made: {}", changed.join(", "));
        let advice = "the run goes on with other rows than an uninterrupted one would have seen".into();
        controls.emit(Event::Warning { rule: "data".into(), message, advice });
    }
    if let Some(resolved) = &spec.resolved {
        controls.replay = Replay::new(resolved.changes.clone());
    }
    let device = job.device(&spec)?;
    let Some(_device) = wait_for_device(home, folder, &device, controls)? else {
        controls.emit(Event::Stopped { step: 0, path: None, reason: "asked to stop while waiting".into() });
        return Ok(End::Stopped);
    };
    controls.throttle = ThrottleWatch::of_device(&device);
    job.train(&spec, folder, controls)
}

/// Takes the device's lock, waiting for the run that has it; none when asked to stop meanwhile.
fn wait_for_device(
    home: &Home,
    folder: &RunFolder,
    device: &str,
    controls: &mut WorkerControls,
) -> Result<Option<Lock>, Failure> {
    let path = home.device_lock(device);
    let entry = Holder { run: folder.id(), process: std::process::id(), socket: None };
    let mut told = None;
    loop {
        let taken = Lock::take_within(&path, &entry, Duration::from_millis(50)).map_err(|error| Failure {
            error: format!("{} cannot be locked: {error}", path.display()),
            hint: "look at the permissions of $TUNE_HOME".into(),
            request: false,
        })?;
        if let Some(lock) = taken {
            return Ok(Some(lock));
        }
        let behind = holder(&path).map(|holder| holder.run).unwrap_or_default();
        if told.as_ref() != Some(&behind) && !behind.is_empty() {
            controls.emit(Event::Queued { behind: behind.clone() });
            told = Some(behind);
        }
        // Nothing but a stop can be obeyed before the run has begun; the rest is for its first step.
        match controls.wait(Duration::from_millis(200)) {
            Some(Command::Stop) => return Ok(None),
            Some(command) => controls.deferred.push_back(command),
            None => {}
        }
    }
}

/// SIGTERM and SIGINT stop and save; SIGHUP is not for a process that has no terminal.
fn listen_to_signals(commands: Sender<Command>) -> Result<(), RunError> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            loop {
                let stop = tokio::select! {
                    _ = terminate.recv() => true,
                    _ = interrupt.recv() => true,
                    _ = hangup.recv() => false,
                };
                if stop && commands.send(Command::Stop).is_err() {
                    return;
                }
            }
        });
    })?;
    Ok(())
}

struct WorkerControls {
    journal: EventWriter,
    commands: Receiver<Command>,
    status: Arc<Mutex<Status>>,
    /// Why an event could not be written.
    lost: Option<std::io::Error>,
    /// Updates done.
    step: u64,
    /// Changes of the run that this one repeats.
    replay: Replay,
    /// Gives the warnings about a run that goes on.
    watch: Watch,
    /// Gives the warning about a card that is held back.
    throttle: ThrottleWatch,
    /// Updates after which the run stops, where somebody asked for that.
    stop_at: Option<u64>,
    /// Commands that came before the run began.
    deferred: VecDeque<Command>,
    /// Events that found no room, oldest first.
    backlog: VecDeque<Event>,
}

/// Events kept for when there is room again.
const BACKLOG: usize = 10_000;

impl WorkerControls {
    fn note(&mut self, event: &Event) {
        let state = match event {
            Event::Started { .. } | Event::Plan { .. } => "preparing",
            Event::Queued { .. } => "queued",
            Event::Paused { .. } => "paused",
            Event::Step { .. } | Event::Eval { .. } | Event::Continued { .. } | Event::Resumed { .. } => "training",
            Event::Stopped { .. } | Event::Failed { .. } | Event::Finished { .. } => "ending",
            _ => "",
        };
        if let Event::Resumed { step, .. } = event {
            // What was changed before the checkpoint is in it; what was changed right after it is not.
            while step.checked_sub(1).and_then(|before| self.replay.due(before)).is_some() {}
        }
        if let Event::Step { step, .. } | Event::Resumed { step, .. } = event {
            self.step = *step;
        }
        if let Ok(mut status) = self.status.lock() {
            if !state.is_empty() {
                status.state = state.into();
            }
            if let Event::Started { steps, .. } = event {
                status.steps = *steps;
            }
            status.step = self.step;
        }
    }

    /// Writes what is waiting, oldest first.
    fn flush(&mut self) {
        while let Some(event) = self.backlog.front() {
            match self.journal.append(event.clone()) {
                Ok(_) => {
                    self.backlog.pop_front();
                    self.lost = None;
                }
                Err(error) => {
                    if self.lost.is_none() {
                        eprintln!("error: events.jsonl could not be written: {error}");
                    }
                    self.lost = Some(error);
                    return;
                }
            }
        }
    }
}

impl Controls for WorkerControls {
    fn emit(&mut self, event: Event) {
        self.note(&event);
        let mut warnings = self.watch.observe(&event);
        if matches!(event, Event::Step { .. }) {
            warnings.extend(self.throttle.look());
        }
        for event in std::iter::once(event).chain(warnings.iter().map(Warning::event)) {
            if self.backlog.len() < BACKLOG {
                self.backlog.push_back(event);
            }
        }
        self.flush();
    }

    fn next(&mut self) -> Option<Command> {
        if self.backlog.len() >= BACKLOG {
            // A run that nobody can follow is stopped and saved.
            return Some(Command::Stop);
        }
        while let Some(command) = self.deferred.pop_front().or_else(|| self.commands.try_recv().ok()) {
            match command {
                Command::StopAt(step) => self.stop_at = Some(step),
                command => return Some(command),
            }
        }
        if self.stop_at.is_some_and(|step| self.step >= step) {
            return Some(Command::Stop);
        }
        let change = self.replay.due(self.step)?;
        (change.key == "train.learning_rate").then_some(Command::SetLearningRate(change.value))
    }

    fn wait(&mut self, patience: Duration) -> Option<Command> {
        match self.commands.recv_timeout(patience) {
            Ok(Command::StopAt(step)) => {
                self.stop_at = Some(step);
                None
            }
            Ok(command) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            // The signal thread holds a sender for as long as the process lives.
            Err(RecvTimeoutError::Disconnected) => Some(Command::Stop),
        }
    }
}
