//! Runs: listing, starting, following, commanding.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use crate::run::{self, Command, EventReader, Home, RunError, RunFolder, Summary, control, launch, lock};
use crate::spec::keys::KEYS;
use crate::spec::{RunSpec, TrainData, resolve};
use crate::tui::history::{History, State};
use crate::tui::message::{Comparison, Message, Request, RunEntry};
use crate::tui::screens::tune::shown_value;

/// How often a followed run's events are looked for.
const PULSE: Duration = Duration::from_millis(100);

/// Carries out what a request about runs asks for.
pub fn perform(request: Request, sender: &Sender<Message>) {
    let answer = match request {
        Request::ListRuns => {
            let _ = sender.send(Message::Runs(list()));
            return;
        }
        Request::Compare(first, second) => compare(&first, &second).map(|view| Message::Compared(Box::new(view))),
        Request::Send { run, command } => send(&run, command).map(Message::Done),
        Request::Start(spec) => {
            tell_started(start(&spec), sender);
            let _ = sender.send(Message::Runs(list()));
            return;
        }
        Request::Resume(run) => {
            tell_started(resume(&run), sender);
            return;
        }
        Request::Remove(run) => remove(&run).map(|()| Message::Done(format!("removed {run}"))),
        Request::StopAt { run, step } => send(&run, Command::StopAt(step))
            .map(|_| Message::Done(format!("the run saves and stops at update {step}, the end of this epoch"))),
        Request::Export { run, to } => {
            export(&run, &to).map(|what| Message::Done(format!("{what} copied to {}", to.display())))
        }
        Request::LoadRun(run) => folder(&run)
            .and_then(|folder| RunSpec::read(&folder.spec_path(), &[]).map_err(|error| error.to_string()))
            .map(|spec| Message::Loaded { path: None, spec: Box::new(spec) }),
        _ => return,
    };
    let removed = matches!(&answer, Ok(Message::Done(text)) if text.starts_with("removed"));
    let _ = sender.send(answer.unwrap_or_else(Message::Wrong));
    if removed {
        let _ = sender.send(Message::Runs(list()));
    }
}

fn words(error: &RunError) -> String {
    match error.hint() {
        hint if hint.is_empty() => error.to_string(),
        hint => format!("{error}; {hint}"),
    }
}

fn folder(run: &str) -> Result<RunFolder, String> {
    Home::find().and_then(|home| home.run(run)).map_err(|error| words(&error))
}

/// Every run, newest first.
fn list() -> Vec<RunEntry> {
    let Ok(home) = Home::find() else { return Vec::new() };
    home.list().iter().rev().map(entry).collect()
}

fn entry(folder: &RunFolder) -> RunEntry {
    let summary = Summary::read(folder);
    let spec = RunSpec::read(&folder.spec_path(), &[]).ok();
    let method = spec.as_ref().map_or(String::new(), |spec| {
        let name = crate::advise::change::method_name(spec.method.kind);
        match spec.method.kind {
            crate::spec::MethodKind::Full => name.to_owned(),
            _ => format!("{name}, rank {}", spec.method.rank),
        }
    });
    let data = spec.as_ref().map_or(String::new(), |spec| match &spec.data.train {
        TrainData::Path(path) => path.clone(),
        TrainData::Sources(sources) => sources.iter().map(|source| source.path.as_str()).collect::<Vec<_>>().join(", "),
    });
    RunEntry {
        state: state(&summary),
        model: spec.map_or(summary.model.clone(), |spec| spec.model.id),
        id: summary.run,
        method,
        data,
        step: summary.step,
        steps: summary.steps,
        loss: summary.loss,
        eval_loss: summary.eval_loss,
        losses: losses(folder),
        started: summary.started,
    }
}

/// Above this many bytes a run's curve is sampled from places in its events.
const WHOLE: u64 = 1 << 20;
/// Places that a long run's curve is sampled at.
const PLACES: u64 = 24;

/// Losses of a run from first to last, few enough for a sparkline.
fn losses(folder: &RunFolder) -> Vec<f64> {
    let path = folder.events_path();
    let length = std::fs::metadata(&path).map_or(0, |file| file.len());
    let loss = |record: run::Record| match record.event {
        run::Event::Step { loss, .. } => Some(loss),
        _ => None,
    };
    if length <= WHOLE {
        let Ok(reader) = EventReader::open(&path) else { return Vec::new() };
        return reader.map_while(Result::ok).filter_map(loss).collect();
    }
    (0..PLACES)
        .filter_map(|place| {
            let reader = EventReader::open_at(&path, length / PLACES * place).ok()?;
            let near: Vec<f64> = reader.map_while(Result::ok).take(8).filter_map(loss).collect();
            (!near.is_empty()).then(|| near.iter().sum::<f64>() / near.len() as f64)
        })
        .collect()
}

fn state(summary: &Summary) -> State {
    let reason = || summary.reason.clone().unwrap_or_default();
    match summary.state {
        run::State::New | run::State::Preparing => State::Starting,
        run::State::Queued => State::Queued { behind: "another run".into() },
        run::State::Training => State::Running,
        run::State::Paused => State::Paused,
        run::State::Stopped => State::Stopped { reason: reason() },
        run::State::Finished => State::Finished,
        run::State::Failed => State::Failed { error: reason(), hint: summary.hint.clone().unwrap_or_default() },
        run::State::Dead => State::Dead,
    }
}

/// The run's id, then what the user should know about its life.
fn tell_started(started: Result<(String, Option<String>), String>, sender: &Sender<Message>) {
    let (started, advice) = match started {
        Ok((id, advice)) => (Ok(id), advice),
        Err(error) => (Err(error), None),
    };
    let _ = sender.send(Message::Started(started));
    if let Some(advice) = advice {
        let _ = sender.send(Message::Wrong(advice));
    }
}

/// Makes a run and starts its worker; gives the run's id and what the user should know.
fn start(spec: &RunSpec) -> Result<(String, Option<String>), String> {
    let mut complete = resolve::resolve(spec).map_err(|error| error.to_string())?;
    super::forecast::choose(&complete)?;
    if let Some(resolved) = &mut complete.resolved {
        resolved.version = env!("CARGO_PKG_VERSION").into();
    }
    let home = Home::find().map_err(|error| words(&error))?;
    let folder = RunFolder::create(&home.runs(), &complete.resolved_toml()).map_err(|error| words(&error))?;
    let advice = launch::start(&folder).map_err(|error| words(&error))?;
    Ok((folder.id(), advice))
}

fn resume(run: &str) -> Result<(String, Option<String>), String> {
    let folder = folder(run)?;
    let advice = launch::start(&folder).map_err(|error| words(&error))?;
    Ok((folder.id(), advice))
}

fn send(run: &str, command: Command) -> Result<String, String> {
    control::send(&folder(run)?, command).map_err(|error| words(&error))?;
    Ok(match command {
        Command::Pause => "pauses after this update".into(),
        Command::Continue => "goes on".into(),
        Command::Save => "saves after this update".into(),
        Command::Evaluate => "evaluates after this update".into(),
        Command::Stop => "saves and stops after this update".into(),
        Command::SetLearningRate(rate) => {
            format!("learning rate {} from the next update on", crate::advise::change::short(rate))
        }
        Command::StopAt(step) => format!("saves and stops at update {step}"),
    })
}

fn remove(run: &str) -> Result<(), String> {
    let folder = folder(run)?;
    if lock::holder(&folder.lock_path()).is_some() {
        return Err(words(&RunError::Busy { id: folder.id() }));
    }
    // Renamed first: what is half removed is no run any more.
    let doomed = folder.path().with_file_name(format!(".{}.removed", folder.id()));
    std::fs::rename(folder.path(), &doomed)
        .and_then(|()| std::fs::remove_dir_all(&doomed))
        .map_err(|error| format!("{run} was not removed: {error}"))
}

/// Copies the result, or else the newest checkpoint's, under a temporary name and renames it.
fn export(run: &str, to: &Path) -> Result<&'static str, String> {
    let folder = folder(run)?;
    let newest = folder.checkpoint_steps().last().map(|step| folder.checkpoints().join(format!("step-{step}")));
    let mut places = vec![("the adapter", folder.adapter()), ("the model", folder.model())];
    if let Some(checkpoint) = newest {
        places.push(("the newest checkpoint's adapter", checkpoint.join("adapter")));
        places.push(("the newest checkpoint's model", checkpoint.join("model")));
    }
    let (what, from) = places
        .into_iter()
        .find(|(_, path)| path.is_dir())
        .ok_or_else(|| format!("run {run} has saved nothing yet; s on Train writes a checkpoint"))?;
    if to.exists() {
        return Err(format!("{} is there already; name another folder", to.display()));
    }
    let mut staging = to.as_os_str().to_owned();
    staging.push(".new");
    let staging = Path::new(&staging);
    let failed = |error: std::io::Error| format!("{}: {error}", to.display());
    let _ = std::fs::remove_dir_all(staging);
    copy_folder(&from, staging).and_then(|()| std::fs::rename(staging, to)).map_err(failed)?;
    Ok(what)
}

fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

fn compare(first: &str, second: &str) -> Result<Comparison, String> {
    let (a, b) = (folder(first)?, folder(second)?);
    let read = |folder: &RunFolder| RunSpec::read(&folder.spec_path(), &[]).map_err(|error| error.to_string());
    let (spec_a, spec_b) = (read(&a)?, read(&b)?);
    let differences = KEYS
        .iter()
        .filter(|key| spec_a.get(key) != spec_b.get(key))
        .map(|key| (key.path(), shown_value(&spec_a, key), shown_value(&spec_b, key)))
        .collect();
    Ok(Comparison { names: [a.id(), b.id()], histories: [history(&a), history(&b)], differences })
}

/// A run's whole history as it stands.
pub fn history(folder: &RunFolder) -> History {
    let mut history = History::default();
    if let Ok(reader) = EventReader::open(&folder.events_path()) {
        reader.map_while(Result::ok).for_each(|record| history.take(record));
    }
    history
}

/// Follows one run at a time.
#[derive(Default)]
pub struct Follower {
    current: Option<Arc<AtomicBool>>,
}

impl Follower {
    /// Reads the run's events and goes on reading; the run followed before is let go.
    pub fn open(&mut self, run: String, sender: Sender<Message>) {
        if let Some(current) = self.current.take() {
            current.store(false, Ordering::Relaxed);
        }
        let wanted = Arc::new(AtomicBool::new(true));
        self.current = Some(wanted.clone());
        let _ = std::thread::Builder::new().name("follower".into()).spawn(move || {
            if let Err(error) = follow(&run, &wanted, &sender) {
                let _ = sender.send(Message::Wrong(error));
            }
        });
    }
}

/// Above this many bytes of events the two ends are shown before the whole is read.
const LONG: u64 = 16 << 20;
/// Bytes of each end.
const END: u64 = 1 << 20;

/// The beginning and the latest updates of a very long run.
fn glance(folder: &RunFolder) -> Option<History> {
    let path = folder.events_path();
    let length = std::fs::metadata(&path).ok().filter(|file| file.len() > LONG)?.len();
    let mut history = History::default();
    let mut start = EventReader::open(&path).ok()?;
    while start.offset() < END
        && let Some(record) = start.next_record().ok()?
    {
        history.take(record);
    }
    for record in EventReader::open_at(&path, length - END).ok()?.map_while(Result::ok) {
        history.take(record);
    }
    Some(history)
}

fn follow(run: &str, wanted: &AtomicBool, sender: &Sender<Message>) -> Result<(), String> {
    let folder = folder(run)?;
    let failed = |error: std::io::Error| format!("{}: {error}", folder.events_path().display());
    let spec = RunSpec::read(&folder.spec_path(), &[]).ok().map(Box::new);
    if let Some(history) = glance(&folder) {
        let history = Box::new(history);
        let _ = sender.send(Message::History { run: run.to_owned(), history, spec: spec.clone(), whole: false });
    }
    let mut reader = None;
    let mut history = Some(Box::new(History::default()));
    let mut quiet = 0u32;
    let mut told = false;
    while wanted.load(Ordering::Relaxed) {
        if reader.is_none() {
            match EventReader::open(&folder.events_path()) {
                Ok(opened) => reader = Some(opened),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let mut records = Vec::new();
        if let Some(reader) = &mut reader {
            while let Some(record) = reader.next_record().map_err(failed)? {
                match &mut history {
                    Some(history) => history.take(record),
                    None => records.push(record),
                }
            }
        }
        if let Some(history) = history.take_if(|_| reader.is_some()) {
            let run = run.to_owned();
            let _ = sender.send(Message::History { run, history, spec: spec.clone(), whole: true });
        } else if !records.is_empty() {
            (quiet, told) = (0, false);
            if sender.send(Message::Events { run: run.to_owned(), records }).is_err() {
                return Ok(());
            }
        }
        // The lock is asked now and then: a dead worker says nothing.
        quiet += 1;
        if quiet.is_multiple_of(10) && !told && lock::holder(&folder.lock_path()).is_none() {
            told = true;
            let _ = sender.send(Message::Died { run: run.to_owned() });
        }
        std::thread::sleep(PULSE);
    }
    Ok(())
}
