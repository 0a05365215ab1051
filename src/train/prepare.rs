//! From a spec to what a run needs in memory: model, tokenizer, rows, adapter, and the search for a plan.

use std::collections::BTreeSet;
use std::path::Path;

use super::TrainError;
use super::planning::{self, RecomputeChoice, Search};
use crate::backend::Choice;
use crate::data::{self, Loaded, Progress};
use crate::demo;
use crate::hub::{self, Location};
use crate::model::adapter::Adapter;
use crate::model::names::PROJECTIONS;
use crate::model::tokenizer::Tokenizer;
use crate::model::{AdapterOptions, GenerationOptions, Method, Model, ModelConfig, TrainingOptions};
use crate::spec::{MethodKind, Optimizer, RunSpec, Targets, TooLong};

/// Everything of a run that does not depend on the device.
pub struct Prepared {
    pub model: Model,
    pub tokenizer: Tokenizer,
    pub data: Loaded,
    /// None in full fine-tuning.
    pub adapter: Option<Adapter>,
    /// Updates of one pass over the rows.
    pub steps_per_epoch: u64,
    pub steps: u64,
    pub learning_rate: f64,
}

/// Opens the model of a spec: "demo", a folder, or an id in the local cache.
///
/// # Errors
/// When there is none, or it cannot be read.
pub fn open_model(spec: &RunSpec) -> Result<(Model, Tokenizer), TrainError> {
    match hub::locate_model(&spec.model.id, &spec.model.revision)? {
        Location::Embedded => Ok((Model::embedded(demo::files())?, Tokenizer::from_files(demo::files())?)),
        Location::Folder { path, .. } => Ok((Model::open(&path, spec.train.seed)?, Tokenizer::open(&path)?)),
    }
}

/// Opens model, tokenizer and data of a spec, and makes or reads the adapter.
///
/// # Errors
/// When one of them is missing, broken, or does not fit the others.
pub fn prepare(spec: &RunSpec, progress: &(dyn Fn(Progress) + Sync)) -> Result<Prepared, TrainError> {
    let (model, tokenizer) = open_model(spec)?;
    let context = model.config.max_position_embeddings;
    if spec.data.max_length > context {
        return Err(TrainError::Setting {
            key: "data.max_length",
            value: spec.data.max_length.to_string(),
            what: format!("the model's context is {context} tokens; use {context} or less"),
        });
    }
    let data = data::load(&spec.data, spec.train.seed, Some(&tokenizer), progress)?;
    let vocabulary = model.config.vocab_size;
    if let Some(row) = data.train.iter().chain(&data.eval).find(|row| {
        row.input_ids.iter().any(|&id| id as usize >= vocabulary)
            || row.labels.iter().any(|&label| label >= 0 && label as usize >= vocabulary)
    }) {
        return Err(TrainError::Setting {
            key: "data.train",
            value: format!("row {}", row.source),
            what: format!("it has a token id beyond the model's vocabulary of {vocabulary}"),
        });
    }
    let adapter = match spec.method.kind {
        MethodKind::Full => None,
        MethodKind::Lora | MethodKind::Qlora => Some(make_adapter(spec, &model.config)?),
    };
    let steps_per_epoch = (data.train.len() as u64).div_ceil(spec.train.batch.max(1) as u64).max(1);
    let steps = spec.train.steps.unwrap_or_else(|| (spec.train.epochs * steps_per_epoch as f64).ceil() as u64).max(1);
    let learning_rate = spec.train.learning_rate.unwrap_or(match spec.method.kind {
        MethodKind::Full => 2e-5,
        _ => 2e-4,
    });
    Ok(Prepared { model, tokenizer, data, adapter, steps_per_epoch, steps, learning_rate })
}

fn make_adapter(spec: &RunSpec, config: &ModelConfig) -> Result<Adapter, TrainError> {
    let mut adapter = if spec.method.init.is_empty() {
        let options = AdapterOptions {
            rank: spec.method.rank,
            targets: targets(&spec.method.targets)?,
            dropout: spec.method.dropout as f32,
        };
        Adapter::new(config, &options, spec.method.alpha, spec.method.rslora, spec.train.seed)
    } else {
        let mut adapter = Adapter::read(Path::new(&spec.method.init), config)?;
        let wanted = targets(&spec.method.targets)?;
        if adapter.rank != spec.method.rank || adapter.alpha != spec.method.alpha || adapter.targets != wanted {
            return Err(TrainError::Setting {
                key: "method.init",
                value: spec.method.init.clone(),
                what: format!(
                    "that adapter has rank {}, alpha {} and targets {}; the run file says {}, {} and {}. Set \
                     method.rank, method.alpha and method.targets to the adapter's",
                    adapter.rank,
                    adapter.alpha,
                    list(&adapter.targets),
                    spec.method.rank,
                    spec.method.alpha,
                    list(&wanted)
                ),
            });
        }
        adapter.dropout = spec.method.dropout;
        adapter
    };
    adapter.base.clone_from(&spec.model.id);
    Ok(adapter)
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
}

/// The projections that a spec names.
///
/// # Errors
/// When a name is no projection.
fn targets(targets: &Targets) -> Result<BTreeSet<String>, TrainError> {
    let fail = |value: &str| TrainError::Setting {
        key: "method.targets",
        value: value.to_string(),
        what: format!("allowed are \"all-linear\" or a list of {}", PROJECTIONS.join(", ")),
    };
    match targets {
        Targets::Named(name) if name == "all-linear" => Ok(PROJECTIONS.iter().map(|name| name.to_string()).collect()),
        Targets::Named(name) => Err(fail(name)),
        Targets::List(names) if names.is_empty() => Err(fail("[]")),
        Targets::List(names) => match names.iter().find(|name| !PROJECTIONS.contains(&name.as_str())) {
            Some(unknown) => Err(fail(unknown)),
            None => Ok(names.iter().cloned().collect()),
        },
    }
}

/// Tokens that samples during training may take, prompt included.
pub(super) const SAMPLE_CAPACITY: usize = 1024;

/// The search for a plan of this run on a device, within `engine.vram`. `rows` are what an epoch holds: their lengths decide the sizes.
///
/// # Errors
/// When a setting of the spec does not fit the method.
pub fn search<'a>(
    spec: &RunSpec,
    config: &'a ModelConfig,
    lengths: &[usize],
    choice: &Choice,
) -> Result<Search<'a>, TrainError> {
    let method = match spec.method.kind {
        MethodKind::Full => Method::Full,
        MethodKind::Lora | MethodKind::Qlora => Method::Lora {
            adapter: AdapterOptions {
                rank: spec.method.rank,
                targets: targets(&spec.method.targets)?,
                dropout: spec.method.dropout as f32,
            },
            weights: weights_type(spec),
        },
    };
    let capacity = SAMPLE_CAPACITY.min(config.max_position_embeddings);
    let generation = (!spec.sample.prompts.is_empty())
        .then(|| GenerationOptions { capacity, prefill_sizes: vec![64.min(capacity), 256.min(capacity)] });
    let options = TrainingOptions {
        method,
        sizes: Vec::new(),
        evaluate: true,
        recompute: Vec::new(),
        betas: spec.train.betas.map(|beta| beta as f32),
        epsilon: spec.train.epsilon as f32,
        weight_decay: spec.train.weight_decay as f32,
        max_grad_norm: spec.train.max_grad_norm as f32,
        eight_bit: spec.train.optimizer == Optimizer::AdamW8bit,
        generation,
    };
    let shortest_row = lengths.iter().copied().min().unwrap_or(1);
    let longest_row = lengths.iter().copied().max().unwrap_or(1);
    let update_tokens = match spec.data.packing {
        true => planning::update_tokens(lengths, spec.train.batch).max(longest_row),
        false => longest_row,
    };
    let recompute = match spec.engine.recompute.as_str() {
        "none" => RecomputeChoice::None,
        "all" => RecomputeChoice::All,
        _ => RecomputeChoice::Auto,
    };
    let host_optimizer = match spec.train.optimizer_memory.as_str() {
        "device" => Some(false),
        "host" => Some(true),
        _ => None,
    };
    let mut target = choice.target.clone();
    let truncates = spec.data.too_long == TooLong::Truncate;
    let (device_memory, facts) = (target.memory, choice.facts.clone());
    if let Some(budget) = spec.engine.budget() {
        target.memory = Some(target.memory.map_or(budget, |free| free.min(budget)));
    }
    Ok(Search {
        device_memory,
        facts,
        shortest_row,
        recompute,
        host_optimizer,
        truncates,
        ..Search::new(config, options, target, longest_row, update_tokens)
    })
}

/// Type that frozen weights are quantized to; none for as stored.
fn weights_type(spec: &RunSpec) -> Option<crate::program::DType> {
    use crate::program::DType;
    match (spec.model.weights.as_str(), spec.method.kind) {
        ("auto", _) if spec.engine.precision == "fp8" => Some(DType::Fp8),
        ("nf4", _) | ("auto", MethodKind::Qlora) => Some(DType::Nf4),
        ("int8", _) => Some(DType::Int8),
        ("fp8", _) => Some(DType::Fp8),
        _ => None,
    }
}
