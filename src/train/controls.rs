//! What the trainer needs from whoever runs it: a place for events, and commands from outside.

use std::time::Duration;

use crate::run::{Command, Event};

/// The trainer's only way to the world outside its run folder.
///
/// The trainer emits everything from `started` to `finished` or `stopped`, and `resumed` when it went on from a
/// checkpoint; whoever called it emits `queued` before and `failed` for the error it returns.
pub trait Controls {
    /// Records an event. Never blocks for long and never fails: a record that cannot be written is kept as a reason
    /// to stop, which [`next`](Self::next) then hands out.
    fn emit(&mut self, event: Event);

    /// The next command, if there is one. Asked between updates and between the micro-batches of an evaluation.
    fn next(&mut self) -> Option<Command>;

    /// Waits for a command, at most `patience`: what a paused trainer does instead of asking in a loop.
    fn wait(&mut self, patience: Duration) -> Option<Command>;
}

/// For tests and for callers that only want the events.
#[derive(Debug, Default)]
pub struct Recorder {
    pub events: Vec<Event>,
    /// Handed out first to last.
    pub commands: std::collections::VecDeque<Command>,
}

impl Controls for Recorder {
    fn emit(&mut self, event: Event) {
        self.events.push(event);
    }

    fn next(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    fn wait(&mut self, _patience: Duration) -> Option<Command> {
        // Nobody will ever continue a paused recorder.
        Some(self.next().unwrap_or(Command::Continue))
    }
}
