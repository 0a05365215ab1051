//! The run file: everything a run is described by.
//!
//! [`RunSpec`] is `RUN.toml` as typed values. Keys, defaults and meanings are in the design's table; the same
//! definition serves the file, `--set`, the form and the help.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunSpec {
    pub model: ModelSpec,
    pub data: DataSpec,
    pub method: MethodSpec,
    pub train: TrainSpec,
    pub sample: SampleSpec,
    pub engine: EngineSpec,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
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

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSource {
    pub path: String,
    pub subset: String,
    pub split: String,
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
#[serde(default)]
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
#[serde(default)]
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
#[serde(default)]
pub struct TrainSpec {
    pub epochs: f64,
    /// Counts alone when set.
    pub steps: Option<u64>,
    /// Rows an update.
    pub batch: usize,
    /// None: the method's default (2e-4 for LoRA and QLoRA, 2e-5 for full).
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

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleSpec {
    pub prompts: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
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

impl Default for ModelSpec {
    fn default() -> Self {
        Self { id: String::new(), revision: String::new(), weights: "auto".into() }
    }
}

impl Default for DataSpec {
    fn default() -> Self {
        Self {
            train: TrainData::Path(String::new()),
            eval: EvalData::Fraction(0.1),
            format: "auto".into(),
            shuffle: true,
            template: "auto".into(),
            system: String::new(),
            max_length: 2048,
            too_long: TooLong::Truncate,
            packing: true,
            loss_on: LossOn::Responses,
            drop_duplicates: false,
            drop_shared: false,
        }
    }
}

impl Default for MethodSpec {
    fn default() -> Self {
        Self {
            kind: MethodKind::Lora,
            rank: 16,
            alpha: 16.0,
            dropout: 0.0,
            targets: Targets::Named("all-linear".into()),
            rslora: false,
            init: String::new(),
        }
    }
}

impl Default for TrainSpec {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            steps: None,
            batch: 8,
            learning_rate: None,
            schedule: Schedule::Linear,
            warmup: 0.05,
            optimizer: Optimizer::AdamW,
            optimizer_memory: "auto".into(),
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            seed: 3407,
            eval_every: 0.1,
            save_every: 0.1,
            keep: 2,
            patience: 0,
        }
    }
}

impl Default for EngineSpec {
    fn default() -> Self {
        Self { device: "auto".into(), precision: "auto".into(), vram: "auto".into(), recompute: "auto".into() }
    }
}
