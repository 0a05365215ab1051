//! Model families: configuration, weight names, builders.

pub mod adapter;
mod build;
mod config;
mod family;
mod generation;
mod layer;
pub mod names;
pub mod tokenizer;
mod training;
mod weights;

pub use build::AdapterOptions;
pub use config::{ModelConfig, Rope, RopeScaling};
pub use family::Family;
pub use generation::{GenerationOptions, generation_workload};
pub use training::{Method, Recompute, TrainingOptions, training_workload};
pub use weights::{RandomWeights, SafetensorsWeights};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::WeightSource;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("no model at {path}: {what}")]
    Missing { path: PathBuf, what: String },
    #[error("{path}: {what}")]
    File { path: PathBuf, what: String },
    #[error("{path}: {what}")]
    Config { path: PathBuf, what: String },
    #[error("architecture {found} is not supported; supported are {supported}")]
    Architecture { found: String, supported: String },
    #[error("{path} is a pickle file, which is never read: it can run code. Use a safetensors version of the model")]
    Pickle { path: PathBuf },
    #[error("{0}")]
    Request(String),
}

impl ModelError {
    pub(crate) fn config(what: impl Into<String>) -> Self {
        ModelError::Config { path: "config.json".into(), what: what.into() }
    }

    fn at(self, file: &Path) -> Self {
        match self {
            ModelError::Config { what, .. } => ModelError::Config { path: file.to_path_buf(), what },
            other => other,
        }
    }
}

/// A model opened from a folder or embedded in the binary.
#[derive(Clone)]
pub struct Model {
    /// Where it lies; none for the embedded model.
    pub folder: Option<PathBuf>,
    pub config: ModelConfig,
    pub weights: Arc<dyn WeightSource>,
    /// The folder holds no weights: they were drawn at random.
    pub random_weights: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
}

impl Model {
    /// Opens a folder with `config.json` and safetensors; without weights they are drawn with `seed`.
    ///
    /// # Errors
    /// When the folder is no model, its weights do not fit its configuration, or the architecture is unknown.
    pub fn open(folder: &Path, seed: u64) -> Result<Self, ModelError> {
        if !folder.join("config.json").exists() {
            let what = if folder.exists() { "the folder has no config.json" } else { "there is no such folder" };
            return Err(ModelError::Missing { path: folder.to_path_buf(), what: what.into() });
        }
        let mut config = ModelConfig::read(folder)?;
        let found = SafetensorsWeights::open(folder)?;
        let random_weights = found.is_none();
        let weights: Arc<dyn WeightSource> = match found {
            Some(weights) => {
                weights.check(&config, folder)?;
                config.dtype = stored_dtype(&weights)?;
                Arc::new(weights)
            }
            None => {
                config.dtype = crate::program::DType::F32;
                Arc::new(RandomWeights::new(&config, seed))
            }
        };
        let generation = std::fs::read_to_string(folder.join("generation_config.json")).ok();
        let eos_token_ids = eos_token_ids(generation.as_deref(), &config);
        Ok(Self { folder: Some(folder.to_path_buf()), config, weights, random_weights, eos_token_ids })
    }

    /// Opens a model from files compiled into the binary.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn embedded(files: &[(&str, &'static [u8])]) -> Result<Self, ModelError> {
        let find = |name: &str| files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes);
        let text = |name: &str| find(name).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let missing =
            |name: &str| ModelError::Missing { path: "(embedded model)".into(), what: format!("it has no {name}") };
        let mut config = ModelConfig::parse(text("config.json").ok_or_else(|| missing("config.json"))?)?;
        let weights =
            SafetensorsWeights::embedded(find("model.safetensors").ok_or_else(|| missing("model.safetensors"))?)?;
        weights.check(&config, Path::new("(embedded model)"))?;
        config.dtype = stored_dtype(&weights)?;
        let eos_token_ids = eos_token_ids(text("generation_config.json"), &config);
        Ok(Self { folder: None, config, weights: Arc::new(weights), random_weights: false, eos_token_ids })
    }
}

fn stored_dtype(weights: &SafetensorsWeights) -> Result<crate::program::DType, ModelError> {
    let tensor = weights.tensor(names::EMBEDDING).map_err(|error| ModelError::Request(error.to_string()))?;
    Ok(tensor.dtype)
}

/// Stop tokens of `generation_config.json`, else of `config.json`.
fn eos_token_ids(generation: Option<&str>, config: &ModelConfig) -> Vec<u32> {
    let generation: Option<serde_json::Value> = generation.and_then(|text| serde_json::from_str(text).ok());
    let value = generation.as_ref().and_then(|map| map.get("eos_token_id")).or(config.source.get("eos_token_id"));
    match value {
        Some(serde_json::Value::Number(id)) => id.as_u64().map(|id| id as u32).into_iter().collect(),
        Some(serde_json::Value::Array(ids)) => ids.iter().filter_map(|id| id.as_u64()).map(|id| id as u32).collect(),
        _ => Vec::new(),
    }
}
