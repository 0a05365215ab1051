//! The shapes that steps are timed on: Llama's, as the rivals are measured.

use anyhow::bail;
use tune::model::ModelConfig;
use tune::program::DType;

/// The configuration of `135m`, `1b` or `8b`, in bf16.
///
/// # Errors
/// For another name.
pub fn config(model: &str) -> anyhow::Result<ModelConfig> {
    let (hidden, intermediate, layers, heads, kv_heads, vocabulary, tied) = match model {
        "135m" => (576, 1536, 30, 9, 3, 49152, true),
        "1b" => (2048, 8192, 16, 32, 8, 128256, true),
        "8b" => (4096, 14336, 32, 32, 8, 128256, false),
        _ => bail!("MODEL is 135m, 1b or 8b"),
    };
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden / heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": tied, "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    let mut config = ModelConfig::parse(&json.to_string())?;
    config.dtype = DType::BF16;
    Ok(config)
}
