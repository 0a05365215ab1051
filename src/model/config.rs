//! `config.json` as one structure for every family.
//!
//! Both styles are read: the older (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of Transformers 5
//! (`rope_parameters`, `dtype`, `layer_types`). A value that changes the mathematics and is not implemented is
//! refused by name.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Family, ModelError};
use crate::program::{Activation, DType};

/// What the builders need to know about a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_epsilon: f32,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub rope: Rope,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    #[serde(skip)]
    pub activation: Activation,
    /// Sliding window of each layer; none for full attention.
    pub windows: Vec<Option<usize>>,
    /// Type of the stored weights.
    pub dtype: DType,
    /// The embedding row of this token has no gradient from the input side, as with PyTorch's `padding_idx`.
    pub padding_token: Option<u32>,
    /// Standard deviation of random initial weights.
    pub initializer_range: f32,
    /// The file's own text, copied beside exported weights.
    #[serde(skip)]
    pub source: Map<String, Value>,
}

/// Rotary embedding: base frequency and its scaling.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    Default,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Frequencies stretched by wavelength (Llama 3.1's `llama3` type in Transformers' `modeling_rope_utils`).
    Llama3 {
        factor: f64,
        low_frequency_factor: f64,
        high_frequency_factor: f64,
        original_context: f64,
    },
}

impl Rope {
    /// Inverse frequencies `[head_dim / 2]`, computed in f64 and rounded once.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|index| {
                // Transformers takes the power in f32; following it keeps the last bits equal.
                let exponent = (2 * index) as f32 / head_dim as f32;
                let plain = f64::from(1.0 / (self.theta as f32).powf(exponent));
                self.scaling.apply(plain) as f32
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_context } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength > original_context / low_frequency_factor {
                    frequency / factor
                } else if wavelength < original_context / high_frequency_factor {
                    frequency
                } else {
                    let smooth = (original_context / wavelength - low_frequency_factor)
                        / (high_frequency_factor - low_frequency_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Keys that no implemented family uses, with the value at which they change nothing.
const NEUTRAL: &[(&str, f64)] = &[
    ("attention_dropout", 0.0),
    ("attention_multiplier", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("clip_qkv", 0.0),
    ("embedding_multiplier", 1.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("logits_scaling", 1.0),
    ("mup_enabled", 0.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("partial_rotary_factor", 1.0),
    ("qk_layernorm", 0.0),
    ("residual_multiplier", 1.0),
    ("rope_interleaved", 0.0),
    ("use_qk_norm", 0.0),
];

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// When the file is missing or broken, the architecture unknown, or a value not implemented.
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| ModelError::File { path: path.clone(), what: error.to_string() })?;
        Self::parse(&text).map_err(|error| error.at(&path))
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_str(text).map_err(|error| ModelError::config(error.to_string()))?;
        let Value::Object(map) = value else {
            return Err(ModelError::config("not a JSON object"));
        };
        let fields = Fields(&map);
        let family = Family::of(&map)?;
        for &(key, neutral) in NEUTRAL {
            let value = match map.get(key) {
                None | Some(Value::Null) => continue,
                Some(Value::Bool(value)) => f64::from(u8::from(*value)),
                Some(value) => value.as_f64().unwrap_or(f64::NAN),
            };
            if value != neutral {
                return Err(ModelError::config(format!("{key} = {} is not implemented", map[key])));
            }
        }
        if let Some(quantization) = map.get("quantization_config").filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            return Err(ModelError::config(format!(
                "quantization_config ({method}) is not implemented: use the unquantized model"
            )));
        }
        let heads = fields.size("num_attention_heads")?;
        let hidden_size = fields.size("hidden_size")?;
        let layers = fields.size("num_hidden_layers")?;
        let activation = match fields.text("hidden_act").or(fields.text("hidden_activation")).unwrap_or("silu") {
            "silu" | "swish" => Activation::Silu,
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => return Err(ModelError::config(format!("hidden_act = \"{other}\" is not implemented"))),
        };
        let bias = fields.flag("attention_bias");
        let config = Self {
            family,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: fields.size_or("num_key_value_heads", heads)?,
            head_dim: fields.size_or("head_dim", hidden_size / heads)?,
            norm_epsilon: fields.number("rms_norm_eps").unwrap_or(1e-6) as f32,
            max_position_embeddings: fields.size_or("max_position_embeddings", 2048)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings"),
            rope: rope(&fields, family)?,
            qkv_bias: family == Family::Qwen2 || bias,
            output_bias: family == Family::Llama && bias,
            mlp_bias: fields.flag("mlp_bias"),
            activation,
            windows: windows(&fields, family, layers)?,
            dtype: match fields.text("dtype").or(fields.text("torch_dtype")).unwrap_or("float32") {
                "float32" => DType::F32,
                "float16" => DType::F16,
                "bfloat16" => DType::BF16,
                other => return Err(ModelError::config(format!("dtype = \"{other}\" is not implemented"))),
            },
            padding_token: fields.number("pad_token_id").filter(|id| *id >= 0.0).map(|id| id as u32),
            initializer_range: fields.number("initializer_range").unwrap_or(0.02) as f32,
            source: map.clone(),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ModelError> {
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::config(format!(
                "num_attention_heads = {} is not a multiple of num_key_value_heads = {}",
                self.heads, self.kv_heads
            )));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::config(format!("head_dim = {} is not an even number", self.head_dim)));
        }
        Ok(())
    }

    /// Number of parameters, tied tensors counted once.
    pub fn parameters(&self) -> u64 {
        super::names::weights(self).iter().map(|weight| weight.elements()).sum()
    }
}

fn rope(fields: &Fields, family: Family) -> Result<Rope, ModelError> {
    let new = fields.0.get("rope_parameters").and_then(Value::as_object);
    let old = fields.0.get("rope_scaling").and_then(Value::as_object);
    let theta = new
        .and_then(|map| map.get("rope_theta"))
        .and_then(Value::as_f64)
        .or(fields.number("rope_theta"))
        .unwrap_or(10_000.0);
    let Some(map) = new.or(old) else {
        return Ok(Rope { theta, scaling: RopeScaling::Default });
    };
    let scaling = Fields(map);
    if let Some(part) = scaling.number("partial_rotary_factor").filter(|part| *part != 1.0) {
        return Err(ModelError::config(format!("partial_rotary_factor = {part} is not implemented for {family}")));
    }
    let need =
        |key: &str| scaling.number(key).ok_or_else(|| ModelError::config(format!("rope scaling has no number {key}")));
    let scaling = match scaling.text("rope_type").or(scaling.text("type")).unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_frequency_factor: need("low_freq_factor")?,
            high_frequency_factor: need("high_freq_factor")?,
            original_context: need("original_max_position_embeddings")?,
        },
        other => return Err(ModelError::config(format!("rope type \"{other}\" is not implemented"))),
    };
    Ok(Rope { theta, scaling })
}

/// Sliding windows as Transformers assigns them: by `layer_types` where given, else by the family's rule.
fn windows(fields: &Fields, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let window = fields.number("sliding_window").map(|window| window as usize);
    let used = match family {
        Family::Llama => false,
        Family::Mistral => true,
        Family::Qwen2 => fields.flag("use_sliding_window"),
    };
    let window = window.filter(|_| used);
    if let Some(types) = fields.0.get("layer_types").and_then(Value::as_array) {
        if types.len() != layers {
            return Err(ModelError::config(format!("layer_types has {} entries for {layers} layers", types.len())));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(window),
                other => Err(ModelError::config(format!("layer type {other:?} is not implemented"))),
            })
            .collect();
    }
    let first = if family == Family::Qwen2 { fields.number("max_window_layers").unwrap_or(0.0) as usize } else { 0 };
    Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn number(&self, key: &str) -> Option<f64> {
        self.0.get(key).and_then(Value::as_f64)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }

    fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        match self.0.get(key).and_then(Value::as_u64) {
            Some(value) if value > 0 && value < 1 << 31 => Ok(value as usize),
            _ => Err(ModelError::config(format!("{key} is missing or not a positive number"))),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.size(key),
        }
    }
}
