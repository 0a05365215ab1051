//! The run file: everything a run is described by.
//!
//! [`RunSpec`] is `RUN.toml` as typed values. [`keys::KEYS`] defines every key once: type, range, default, meaning
//! and the names that other trainers have for it; the parser, `--set`, `tune new`, the form and the documentation
//! come from that table.

pub mod check;
pub mod domain;
pub mod keys;
pub mod parse;
pub mod resolve;
pub mod size;
pub mod suggest;
#[cfg(test)]
mod tests;
pub mod write;

use serde::{Deserialize, Serialize};

pub use check::Capabilities;
pub use parse::{Problem, SpecError};
pub use size::parse as parse_size;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    pub model: ModelSpec,
    pub data: DataSpec,
    pub method: MethodSpec,
    pub train: TrainSpec,
    pub sample: SampleSpec,
    pub engine: EngineSpec,
    /// What was found when the run was made; only in a run's own `run.toml`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<Resolved>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    pub id: String,
    pub revision: String,
    /// `auto`, `nf4`, `int8`, `fp8`.
    pub weights: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TrainData {
    Path(String),
    Sources(Vec<DataSource>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSource {
    pub path: String,
    pub subset: String,
    pub split: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    pub weight: f64,
    pub format: String,
    /// Role to column: `{ prompt = "question", response = "answer" }`.
    pub columns: std::collections::BTreeMap<String, String>,
}

/// A fraction held out of the training rows, or a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EvalData {
    Fraction(f64),
    Path(String),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    pub train: TrainData,
    pub eval: EvalData,
    pub format: String,
    pub shuffle: bool,
    pub template: String,
    pub system: String,
    pub max_length: usize,
    pub too_long: TooLong,
    pub packing: bool,
    pub loss_on: LossOn,
    /// Leaves out training rows that repeat an earlier one.
    pub drop_duplicates: bool,
    /// Leaves out training rows that are evaluation rows too.
    pub drop_shared: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    Truncate,
    Drop,
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    Responses,
    Last,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodKind {
    Lora,
    Qlora,
    Full,
}

/// `"all-linear"` or a list of projection names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    Named(String),
    List(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodSpec {
    pub kind: MethodKind,
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f64,
    pub targets: Targets,
    pub rslora: bool,
    /// A PEFT folder to continue from; empty for a new adapter.
    pub init: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    Linear,
    Cosine,
    Constant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    AdamW,
    #[serde(rename = "adamw8bit")]
    AdamW8bit,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    pub epochs: f64,
    /// Counts alone when set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Rows an update.
    pub batch: usize,
    /// None: the method's default (2e-4 for LoRA and QLoRA, 2e-5 for full).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    pub schedule: Schedule,
    /// A fraction of the run below 1, or updates.
    pub warmup: f64,
    pub optimizer: Optimizer,
    /// `auto`, `device`, `host`.
    pub optimizer_memory: String,
    pub betas: [f64; 2],
    pub epsilon: f64,
    pub weight_decay: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    pub seed: u64,
    /// Below 1 a fraction of the run, from 1 updates; 0: only before the first and at the end.
    pub eval_every: f64,
    pub save_every: f64,
    pub keep: usize,
    /// Evaluations without improvement before stopping; 0: never.
    pub patience: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleSpec {
    pub prompts: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineSpec {
    /// `auto`, `cpu`, `wgpu`, `wgpu:N`, `cuda`, `cuda:N`.
    pub device: String,
    /// `auto`, `f32`, `f16`, `bf16`, `fp8`.
    pub precision: String,
    /// `auto` or a size such as `22GiB`.
    pub vram: String,
    /// `auto`, `none`, `all`.
    pub recompute: String,
}

/// What `run.toml` pins beside the spec itself, so that the run can be repeated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resolved {
    /// Version of `tune` that made the run.
    pub version: String,
    /// RFC 3339, UTC.
    pub created: String,
    /// SHA-256 of every data file, by its path.
    pub data: std::collections::BTreeMap<String, String>,
    /// Live changes of the run that this one repeats, made again after the same steps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
}

/// A live change: after `step`, the key had a new value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    pub step: u64,
    pub key: String,
    pub value: f64,
}

impl RunSpec {
    /// The learning rate, or where none is set the default of the method.
    pub fn learning_rate(&self) -> f64 {
        self.train.learning_rate.unwrap_or(match self.method.kind {
            MethodKind::Lora | MethodKind::Qlora => 2e-4,
            MethodKind::Full => 2e-5,
        })
    }
}

impl EngineSpec {
    /// `vram` in bytes; none for what is free.
    pub fn budget(&self) -> Option<u64> {
        size::parse(&self.vram)
    }
}

impl Default for DataSource {
    fn default() -> Self {
        Self {
            path: String::new(),
            subset: String::new(),
            split: String::new(),
            rows: None,
            weight: 1.0,
            format: "auto".into(),
            columns: std::collections::BTreeMap::new(),
        }
    }
}

impl Default for RunSpec {
    fn default() -> Self {
        parse::typed(keys::defaults())
    }
}

/// Each section's defaults are the table's.
macro_rules! section_defaults {
    ($($section:ty => $field:ident),*) => {
        $(impl Default for $section {
            fn default() -> Self {
                RunSpec::default().$field
            }
        })*
    };
}

section_defaults!(
    ModelSpec => model,
    DataSpec => data,
    MethodSpec => method,
    TrainSpec => train,
    SampleSpec => sample,
    EngineSpec => engine
);
