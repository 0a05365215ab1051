//! Live changes of a run, to be made again when it is repeated or resumed.

use std::collections::VecDeque;

use super::{Event, EventReader, RunFolder};
use crate::spec::Change;

/// The changes recorded in a run's events, in the order of the steps after which they were made.
pub fn recorded(folder: &RunFolder) -> Vec<Change> {
    let Ok(reader) = EventReader::open(&folder.events_path()) else { return Vec::new() };
    let mut changes: Vec<Change> = Vec::new();
    for record in reader.map_while(Result::ok) {
        if let Event::Changed { step, key, to, .. } = record.event
            && let Some(value) = to.as_f64()
        {
            let change = Change { step, key, value };
            // A change that an earlier resume made again is one change.
            if !changes.contains(&change) {
                changes.push(change);
            }
        }
    }
    changes.sort_by_key(|change| change.step);
    changes
}

/// Hands changes out as their steps come.
#[derive(Debug, Default)]
pub struct Replay {
    waiting: VecDeque<Change>,
}

impl Replay {
    pub fn new(changes: Vec<Change>) -> Self {
        Self { waiting: changes.into() }
    }

    /// The next change that was made after `step` or an earlier one.
    pub fn due(&mut self, step: u64) -> Option<Change> {
        if self.waiting.front()?.step > step {
            return None;
        }
        self.waiting.pop_front()
    }
}
