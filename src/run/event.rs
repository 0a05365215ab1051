//! Events: the append-only record of a run, one JSON object a line. Everything shown on screen comes from it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    #[serde(flatten)]
    pub event: Event,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Started {
        run: String,
        model: String,
        device: String,
        /// Why that device was chosen.
        reason: String,
        version: String,
        process: u32,
        rows: usize,
        eval_rows: usize,
        steps: u64,
        epochs: f64,
        trainable_parameters: u64,
        parameters: u64,
    },
    Plan {
        peak_bytes: u64,
        bytes: std::collections::BTreeMap<String, u64>,
        micro_sizes: Vec<usize>,
        estimated_step_seconds: f64,
        recompute: String,
    },
    Step {
        step: u64,
        epoch: f64,
        loss: f64,
        /// Before clipping.
        grad_norm: f64,
        learning_rate: f64,
        /// Tokens of the update, padding not counted.
        tokens: u64,
        label_tokens: u64,
        padding: u64,
        tokens_per_second: f64,
        seconds: f64,
        vram_bytes: u64,
    },
    Eval {
        step: u64,
        loss: f64,
        perplexity: f64,
        tokens: u64,
    },
    Sample {
        step: u64,
        prompt: String,
        text: String,
    },
    Warning {
        rule: String,
        message: String,
        advice: String,
    },
    Checkpoint {
        step: u64,
        path: PathBuf,
        best: bool,
    },
    Changed {
        step: u64,
        key: String,
        from: serde_json::Value,
        to: serde_json::Value,
    },
    Queued {
        behind: String,
    },
    Paused {
        step: u64,
    },
    Continued {
        step: u64,
    },
    Resumed {
        step: u64,
        process: u32,
    },
    Stopped {
        step: u64,
        path: Option<PathBuf>,
        reason: String,
    },
    Failed {
        error: String,
        hint: String,
    },
    Finished {
        steps: u64,
        seconds: f64,
        train_loss: f64,
        eval_loss: Option<f64>,
        path: PathBuf,
    },
}
