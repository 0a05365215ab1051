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
        #[serde(deserialize_with = "null_is_nan")]
        loss: f64,
        /// Before clipping.
        #[serde(deserialize_with = "null_is_nan")]
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
        #[serde(deserialize_with = "null_is_nan")]
        loss: f64,
        #[serde(deserialize_with = "null_is_nan")]
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
        #[serde(default)]
        device: String,
        /// Why that device was chosen, and how it computes.
        #[serde(default)]
        reason: String,
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
        /// The request was wrong, rather than the run.
        #[serde(default)]
        request: bool,
    },
    Finished {
        steps: u64,
        seconds: f64,
        #[serde(deserialize_with = "null_is_nan")]
        train_loss: f64,
        eval_loss: Option<f64>,
        path: PathBuf,
    },
}

/// Now, as [`Record::time`] has it.
pub fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}

/// JSON has no NaN and no infinity; both are written as null.
fn null_is_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

impl Record {
    /// A line of `events.jsonl`; none when it is no event that this version knows.
    pub fn parse(line: &[u8]) -> Option<Self> {
        Self::parse_step(line).or_else(|| serde_json::from_slice(line).ok())
    }

    /// `step` lines as [`EventWriter`](super::EventWriter) writes them, without the detour through a JSON tree:
    /// a long run has a million of them.
    fn parse_step(line: &[u8]) -> Option<Self> {
        let rest = std::str::from_utf8(line).ok()?.strip_prefix("{\"time\":\"")?;
        let (time, rest) = rest.split_once('"')?;
        let mut fields = Fields(rest.strip_prefix(",\"event\":\"step\"")?);
        let event = Event::Step {
            step: fields.next("step")?.parse().ok()?,
            epoch: fields.number("epoch")?,
            loss: fields.number("loss")?,
            grad_norm: fields.number("grad_norm")?,
            learning_rate: fields.number("learning_rate")?,
            tokens: fields.next("tokens")?.parse().ok()?,
            label_tokens: fields.next("label_tokens")?.parse().ok()?,
            padding: fields.next("padding")?.parse().ok()?,
            tokens_per_second: fields.number("tokens_per_second")?,
            seconds: fields.number("seconds")?,
            vram_bytes: fields.next("vram_bytes")?.parse().ok()?,
        };
        (fields.0 == "}").then(|| Self { time: time.to_owned(), event })
    }
}

/// What is left of an object: `,"name":value` again and again, then `}`.
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn next(&mut self, name: &str) -> Option<&'a str> {
        let value = self.0.strip_prefix(",\"")?.strip_prefix(name)?.strip_prefix("\":")?;
        let end = value.bytes().position(|byte| byte == b',' || byte == b'}')?;
        let (value, rest) = value.split_at(end);
        self.0 = rest;
        Some(value)
    }

    fn number(&mut self, name: &str) -> Option<f64> {
        match self.next(name)? {
            "null" => Some(f64::NAN),
            value => value.parse().ok(),
        }
    }
}
