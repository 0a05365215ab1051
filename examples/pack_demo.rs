//! Stores a trained model's weights as the embedded model's: bf16, in one safetensors file.
//!
//! ```text
//! cargo run --release --example pack_demo -- RUN/model assets/demo/model
//! ```

use std::path::PathBuf;

use anyhow::{Context, bail};
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tune::backend::WeightSource;
use tune::model::{ModelConfig, SafetensorsWeights, names};
use tune::program::DType;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(from), Some(to), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        bail!("usage: pack_demo MODEL_FOLDER OUT");
    };
    let config = ModelConfig::read(&from)?;
    let weights = SafetensorsWeights::open(&from)?.with_context(|| format!("{} holds no weights", from.display()))?;
    weights.check(&config, &from)?;
    let mut tensors = Vec::new();
    for names::WeightName { name, shape } in names::weights(&config) {
        let tensor = weights.tensor(&name)?;
        let bytes: Vec<u8> = match tensor.dtype {
            DType::BF16 => tensor.bytes.to_vec(),
            DType::F32 => tensor
                .bytes
                .chunks_exact(4)
                .flat_map(|word| bf16::from_f32(f32::from_le_bytes([word[0], word[1], word[2], word[3]])).to_le_bytes())
                .collect(),
            other => bail!("{name} is {}; only f32 and bf16 are packed", other.name()),
        };
        tensors.push((name, shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let out = to.join("model.safetensors");
    let partial = to.join("model.safetensors.partial");
    safetensors::serialize_to_file(views, None, &partial)?;
    std::fs::rename(&partial, &out)?;
    println!("wrote {}, {} bytes", out.display(), std::fs::metadata(&out)?.len());
    Ok(())
}
