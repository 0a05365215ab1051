//! The families: which architectures are built, and how each differs.

use serde::Serialize;
use serde_json::{Map, Value};

use super::ModelError;

/// A group of architectures with one builder. All so far are pre-norm decoders with rotary positions, grouped
/// queries and a gated MLP; [`ModelConfig`](super::ModelConfig) carries what differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
}

const ARCHITECTURES: &[(&str, Family)] = &[
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("Qwen2ForCausalLM", Family::Qwen2),
];

impl Family {
    /// The family of a `config.json`.
    ///
    /// # Errors
    /// When the architecture is missing or none of those supported, which are named.
    pub fn of(config: &Map<String, Value>) -> Result<Self, ModelError> {
        let named = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let Some(architecture) = named else {
            return Err(ModelError::config("it names no architecture (\"architectures\")"));
        };
        ARCHITECTURES
            .iter()
            .find(|(name, _)| *name == architecture)
            .map(|(_, family)| *family)
            .ok_or_else(|| ModelError::Architecture { found: architecture.to_string(), supported: Self::supported() })
    }

    /// Names of the architectures that are built, for messages.
    pub fn supported() -> String {
        ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::Llama => "Llama",
            Family::Mistral => "Mistral",
            Family::Qwen2 => "Qwen2",
        })
    }
}
