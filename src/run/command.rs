//! What can be asked of a living worker; carried out at the next safe step.

use serde::{Deserialize, Serialize};

/// A command to the trainer. On the control socket: `{"command": "pause"}`,
/// `{"command": "set_learning_rate", "value": 1e-4}`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", content = "value", rename_all = "snake_case")]
pub enum Command {
    Pause,
    Continue,
    /// Write a checkpoint now.
    Save,
    /// Evaluate (and sample) now.
    Evaluate,
    /// Write a checkpoint and end.
    Stop,
    /// The same, once this many updates are done: the end of an epoch.
    StopAt(u64),
    /// The peak of the schedule from the next update on; warmup and decay keep their shape.
    SetLearningRate(f64),
}
