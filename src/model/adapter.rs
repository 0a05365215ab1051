//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::names::{LayerModules, Module, PROJECTIONS};
use super::{AdapterOptions, ModelConfig, ModelError, SafetensorsWeights};
use crate::backend::WeightSource;
use crate::program::{DType, random};

const PREFIX: &str = "base_model.model.";

/// A LoRA adapter in host memory. Tensor names are those of the workload's buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub rank: usize,
    pub alpha: f64,
    /// Scale by alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732) instead of alpha / rank.
    pub rslora: bool,
    pub dropout: f64,
    pub targets: BTreeSet<String>,
    /// The base model's id or folder, as PEFT records it.
    pub base: String,
    /// f32, row-major.
    pub tensors: BTreeMap<String, AdapterTensor>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AdapterTensor {
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

/// The modules of the model that an adapter with these targets sits on.
pub fn modules(config: &ModelConfig, targets: &BTreeSet<String>) -> Vec<Module> {
    (0..config.layers)
        .flat_map(|layer| LayerModules::new(config, layer).all().cloned().collect::<Vec<_>>())
        .filter(|module| targets.contains(module.projection()))
        .collect()
}

impl Adapter {
    /// A new adapter as PEFT makes it: A uniform in ±1/√inputs (Kaiming with a = √5), B zero.
    pub fn new(config: &ModelConfig, options: &AdapterOptions, alpha: f64, rslora: bool, seed: u64) -> Self {
        let key = [seed as u32, (seed >> 32) as u32, 0, 0];
        let mut tensors = BTreeMap::new();
        for module in modules(config, &options.targets) {
            let bound = 1.0 / (module.inputs as f32).sqrt();
            let stream = random::stream(&module.lora_a());
            let values = (0..options.rank * module.inputs)
                .map(|index| {
                    let (row, column) = (index / module.inputs, index % module.inputs);
                    bound * (2.0 * random::uniform(key, stream, row as u32, column as u32) - 1.0)
                })
                .collect();
            tensors.insert(module.lora_a(), AdapterTensor { shape: [options.rank, module.inputs], values });
            let values = vec![0.0; module.outputs * options.rank];
            tensors.insert(module.lora_b(), AdapterTensor { shape: [module.outputs, options.rank], values });
        }
        Self {
            rank: options.rank,
            alpha,
            rslora,
            dropout: f64::from(options.dropout),
            targets: options.targets.clone(),
            base: String::new(),
            tensors,
        }
    }

    /// What the LoRA branch is multiplied by.
    pub fn scale(&self) -> f32 {
        scale(self.alpha, self.rank, self.rslora)
    }

    pub fn options(&self) -> AdapterOptions {
        AdapterOptions { rank: self.rank, targets: self.targets.clone(), dropout: self.dropout as f32 }
    }

    /// Reads a PEFT folder and checks it against the model.
    ///
    /// # Errors
    /// When a file is missing or broken, the adapter is of another kind or for another model, or uses what is not
    /// implemented (named).
    pub fn read(folder: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let path = folder.join("adapter_config.json");
        let fail = |what: String| ModelError::File { path: path.clone(), what };
        let text = std::fs::read_to_string(&path).map_err(|error| fail(error.to_string()))?;
        let map: Value = serde_json::from_str(&text).map_err(|error| fail(error.to_string()))?;
        let kind = map.get("peft_type").and_then(Value::as_str).unwrap_or("unknown");
        if kind != "LORA" {
            return Err(fail(format!("peft_type is {kind}; only LORA is read")));
        }
        refuse(&map).map_err(fail)?;
        let rank = map.get("r").and_then(Value::as_u64).ok_or_else(|| fail("no rank (\"r\")".into()))? as usize;
        let alpha = map.get("lora_alpha").and_then(Value::as_f64).unwrap_or(rank as f64);
        let file = folder.join("adapter_model.safetensors");
        if !file.exists() && folder.join("adapter_model.bin").exists() {
            return Err(ModelError::Pickle { path: folder.join("adapter_model.bin") });
        }
        let weights = SafetensorsWeights::open_files(std::slice::from_ref(&file))?;
        let fail = |what: String| ModelError::File { path: file.clone(), what };
        let targets: BTreeSet<String> = PROJECTIONS
            .iter()
            .filter(|name| weights.names().any(|tensor| tensor.contains(&format!(".{name}.lora_"))))
            .map(|name| name.to_string())
            .collect();
        let mut tensors = BTreeMap::new();
        for module in modules(config, &targets) {
            let shapes = [[rank, module.inputs], [module.outputs, rank]];
            for (name, shape) in [module.lora_a(), module.lora_b()].into_iter().zip(shapes) {
                let stored = format!("{PREFIX}{name}");
                if !weights.contains(&stored) {
                    return Err(fail(format!("there is no tensor {stored}")));
                }
                let tensor = weights.tensor(&stored).map_err(|error| fail(error.to_string()))?;
                if tensor.shape != shape {
                    let found = tensor.shape;
                    return Err(fail(format!("{stored} has shape {found:?}, this model and rank need {shape:?}")));
                }
                let values = to_f32(tensor.dtype, tensor.bytes);
                tensors.insert(name, AdapterTensor { shape, values });
            }
        }
        let unknown =
            weights.names().find(|name| name.strip_prefix(PREFIX).is_none_or(|name| !tensors.contains_key(name)));
        if let Some(unknown) = unknown {
            return Err(fail(format!("{unknown} belongs to no projection of this model")));
        }
        if tensors.is_empty() {
            return Err(fail("it holds no LoRA matrices".into()));
        }
        Ok(Self {
            rank,
            alpha,
            rslora: map.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            dropout: map.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
            targets,
            base: map.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or("").to_string(),
            tensors,
        })
    }

    /// Writes the two files into a folder that exists. The caller makes the folder appear at once by renaming.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), ModelError> {
        let fail = |name: &str| {
            let path = folder.join(name);
            move |what: String| ModelError::File { path: path.clone(), what }
        };
        let views: Vec<(String, TensorView)> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                TensorView::new(safetensors::Dtype::F32, tensor.shape.to_vec(), bytemuck::cast_slice(&tensor.values))
                    .map(|view| (format!("{PREFIX}{name}"), view))
            })
            .collect::<Result<_, _>>()
            .map_err(|error| fail("adapter_model.safetensors")(error.to_string()))?;
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let file = folder.join("adapter_model.safetensors");
        safetensors::serialize_to_file(views, Some(metadata), &file)
            .map_err(|error| fail("adapter_model.safetensors")(error.to_string()))?;
        let text = serde_json::to_string_pretty(&self.config()).expect("plain JSON");
        std::fs::write(folder.join("adapter_config.json"), text + "\n")
            .map_err(|error| fail("adapter_config.json")(error.to_string()))
    }

    fn config(&self) -> Value {
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": if self.alpha.fract() == 0.0 { json!(self.alpha as i64) } else { json!(self.alpha) },
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": self.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
            "use_dora": false,
        })
    }
}

/// What the LoRA branch is multiplied by.
pub fn scale(alpha: f64, rank: usize, rslora: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if rslora { rank.sqrt() } else { rank }) as f32
}

/// Settings that change the mathematics and are not implemented.
fn refuse(map: &Value) -> Result<(), String> {
    for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"] {
        if map.get(key).and_then(Value::as_bool).unwrap_or(false) {
            return Err(format!("{key} is not implemented"));
        }
    }
    for key in ["rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication"] {
        let empty = match map.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(_) => false,
        };
        if !empty {
            return Err(format!("{key} is not implemented"));
        }
    }
    match map.get("bias").and_then(Value::as_str) {
        None | Some("none") => Ok(()),
        Some(other) => Err(format!("bias = \"{other}\" is not implemented")),
    }
}

fn to_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let halves = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match dtype {
        DType::F16 => halves.map(|pair| half::f16::from_le_bytes(pair).to_f32()).collect(),
        DType::BF16 => halves.map(|pair| half::bf16::from_le_bytes(pair).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect(),
    }
}
