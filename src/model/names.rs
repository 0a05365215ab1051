//! Names and shapes of a checkpoint's tensors, and of the adapter's.

use super::ModelConfig;

/// A tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightName {
    pub name: String,
    pub shape: Vec<usize>,
}

impl WeightName {
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";

/// Projections that LoRA can be put on, in the order of a layer.
pub const PROJECTIONS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Those that read what attention is given, normed.
pub(super) const QUERY_KEY_VALUE: &[&str] = &["q_proj", "k_proj", "v_proj"];

/// Those of the MLP, that of its product last.
pub(super) const MLP: &[&str] = &["gate_proj", "up_proj", "down_proj"];

/// A linear module of a layer: `[outputs, inputs]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// `model.layers.3.self_attn.q_proj`.
    pub path: String,
    pub inputs: usize,
    pub outputs: usize,
    pub bias: bool,
}

impl Module {
    /// The last part of the path: `q_proj`.
    pub fn projection(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    pub fn weight(&self) -> String {
        format!("{}.weight", self.path)
    }

    pub fn bias(&self) -> String {
        format!("{}.bias", self.path)
    }

    /// `[rank, inputs]`.
    pub fn lora_a(&self) -> String {
        format!("{}.lora_A.weight", self.path)
    }

    /// `[outputs, rank]`.
    pub fn lora_b(&self) -> String {
        format!("{}.lora_B.weight", self.path)
    }
}

/// The linear modules of a layer, grouped by the input they share.
pub struct LayerModules {
    pub qkv: Vec<Module>,
    pub output: Vec<Module>,
    pub gate_up: Vec<Module>,
    pub down: Vec<Module>,
}

impl LayerModules {
    pub fn new(config: &ModelConfig, layer: usize) -> Self {
        let module = |part: &str, inputs: usize, outputs: usize, bias: bool| Module {
            path: format!("model.layers.{layer}.{part}"),
            inputs,
            outputs,
            bias,
        };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        Self {
            qkv: vec![
                module("self_attn.q_proj", hidden, queries, config.qkv_bias),
                module("self_attn.k_proj", hidden, keys, config.qkv_bias),
                module("self_attn.v_proj", hidden, keys, config.qkv_bias),
            ],
            output: vec![module("self_attn.o_proj", queries, hidden, config.output_bias)],
            gate_up: vec![
                module("mlp.gate_proj", hidden, inner, config.mlp_bias),
                module("mlp.up_proj", hidden, inner, config.mlp_bias),
            ],
            down: vec![module("mlp.down_proj", inner, hidden, config.mlp_bias)],
        }
    }

    pub fn all(&self) -> impl Iterator<Item = &Module> {
        self.qkv.iter().chain(&self.output).chain(&self.gate_up).chain(&self.down)
    }
}

pub fn input_norm(layer: usize) -> String {
    format!("model.layers.{layer}.input_layernorm.weight")
}

pub fn post_attention_norm(layer: usize) -> String {
    format!("model.layers.{layer}.post_attention_layernorm.weight")
}

/// Name of the head's matrix: the embedding's where they are tied.
pub fn head(config: &ModelConfig) -> &'static str {
    if config.tie_word_embeddings { EMBEDDING } else { HEAD }
}

/// Every tensor the model reads from its checkpoint.
pub fn weights(config: &ModelConfig) -> Vec<WeightName> {
    let matrix = |name: String, rows: usize, columns: usize| WeightName { name, shape: vec![rows, columns] };
    let vector = |name: String, size: usize| WeightName { name, shape: vec![size] };
    let mut list = vec![matrix(EMBEDDING.into(), config.vocab_size, config.hidden_size)];
    for layer in 0..config.layers {
        list.push(vector(input_norm(layer), config.hidden_size));
        list.push(vector(post_attention_norm(layer), config.hidden_size));
        for module in LayerModules::new(config, layer).all() {
            list.push(matrix(module.weight(), module.outputs, module.inputs));
            if module.bias {
                list.push(vector(module.bias(), module.outputs));
            }
        }
    }
    list.push(vector(FINAL_NORM.into(), config.hidden_size));
    if !config.tie_word_embeddings {
        list.push(matrix(HEAD.into(), config.vocab_size, config.hidden_size));
    }
    list
}
