//! A run at a glance, folded from its events.

use std::path::PathBuf;

use serde::Serialize;

use super::{Event, EventReader, Record, RunFolder, lock};

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Made; no worker has said anything yet.
    #[default]
    New,
    /// Waiting for the device.
    Queued,
    /// Reading model and data.
    Preparing,
    Training,
    Paused,
    /// Ended by request, with a checkpoint; can be resumed.
    Stopped,
    Finished,
    Failed,
    /// Its worker is gone without a word; can be resumed.
    Dead,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::New => "new",
            State::Queued => "queued",
            State::Preparing => "preparing",
            State::Training => "training",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Finished => "finished",
            State::Failed => "failed",
            State::Dead => "dead",
        }
    }

    /// No further event comes unless the run is resumed.
    pub fn is_over(self) -> bool {
        matches!(self, State::Stopped | State::Finished | State::Failed | State::Dead)
    }
}

/// A run at a glance.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    pub run: String,
    pub state: State,
    pub model: String,
    pub device: String,
    /// Updates done and planned.
    pub step: u64,
    pub steps: u64,
    pub epoch: f64,
    /// Of the last update.
    pub loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
    /// Before the first update, the newest, and the lowest.
    pub first_eval_loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub best_eval_loss: Option<f64>,
    /// Times of the first and the newest event, RFC 3339.
    pub started: String,
    pub updated: String,
    /// Why it stopped or failed.
    pub reason: Option<String>,
    pub hint: Option<String>,
    /// It failed because the request was wrong.
    pub request: bool,
    /// The result, once there is one.
    pub path: Option<PathBuf>,
    /// The worker's process, while it lives.
    pub process: Option<u32>,
}

/// Above this size only the two ends of `events.jsonl` are read for a list.
const WHOLE: u64 = 4 << 20;
const END: u64 = 256 << 10;

impl Summary {
    /// Reads a run's state. Of a very long run only the first and the newest events are read.
    pub fn read(folder: &RunFolder) -> Self {
        let mut summary = Self { run: folder.id(), ..Self::default() };
        let path = folder.events_path();
        let length = std::fs::metadata(&path).map(|file| file.len()).unwrap_or(0);
        // Asked first: a worker that ends meanwhile has then written its last event.
        let holder = lock::holder(&folder.lock_path());
        if let Ok(reader) = EventReader::open(&path) {
            if length <= WHOLE {
                reader.map_while(Result::ok).for_each(|record| summary.apply(&record));
            } else {
                let mut reader = reader;
                while reader.offset() < END
                    && let Ok(Some(record)) = reader.next_record()
                {
                    summary.apply(&record);
                }
                if let Ok(reader) = EventReader::open_at(&path, length - END) {
                    reader.map_while(Result::ok).for_each(|record| summary.apply(&record));
                }
            }
        }
        summary.settle(holder);
        summary
    }

    /// Takes one more event into account.
    pub fn apply(&mut self, record: &Record) {
        if self.started.is_empty() {
            self.started.clone_from(&record.time);
        }
        self.updated.clone_from(&record.time);
        match &record.event {
            Event::Started { model, device, steps, .. } => {
                (self.model, self.device, self.steps) = (model.clone(), device.clone(), *steps);
                self.begin(State::Preparing);
            }
            Event::Queued { .. } => self.begin(State::Queued),
            Event::Plan { .. } => self.begin(State::Preparing),
            Event::Resumed { step, .. } => {
                self.step = *step;
                self.begin(State::Training);
            }
            Event::Step { step, epoch, loss, tokens_per_second, .. } => {
                (self.step, self.epoch) = (*step, *epoch);
                (self.loss, self.tokens_per_second) = (Some(*loss), Some(*tokens_per_second));
                self.begin(State::Training);
            }
            Event::Eval { loss, .. } => {
                self.first_eval_loss.get_or_insert(*loss);
                self.eval_loss = Some(*loss);
                if self.best_eval_loss.is_none_or(|best| *loss < best) {
                    self.best_eval_loss = Some(*loss);
                }
            }
            Event::Paused { .. } => self.state = State::Paused,
            Event::Continued { .. } => self.state = State::Training,
            Event::Stopped { step, reason, .. } => {
                self.state = State::Stopped;
                self.step = *step;
                self.reason = Some(reason.clone());
            }
            Event::Failed { error, hint, request } => {
                self.state = State::Failed;
                self.request = *request;
                (self.reason, self.hint) = (Some(error.clone()), Some(hint.clone()));
            }
            Event::Finished { path, .. } => {
                self.state = State::Finished;
                self.path = Some(path.clone());
            }
            Event::Sample { .. } | Event::Warning { .. } | Event::Checkpoint { .. } | Event::Changed { .. } => {}
        }
    }

    fn begin(&mut self, state: State) {
        self.state = state;
        (self.reason, self.hint, self.path, self.request) = (None, None, None, false);
    }

    /// Sets what the lock says about the worker: a run that is not over and has none is dead.
    pub fn settle(&mut self, holder: Option<lock::Holder>) {
        self.process = holder.as_ref().map(|holder| holder.process).filter(|&process| process != 0);
        if holder.is_none() && !self.state.is_over() {
            self.state = State::Dead;
        }
        if holder.is_some() && self.state.is_over() {
            // Resumed, and the worker has not said so yet.
            self.begin(State::Preparing);
        }
    }
}
