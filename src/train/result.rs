//! The result of a run: an adapter in PEFT layout, or a model in Hugging Face layout.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use serde_json::json;

use super::TrainError;
use super::checkpoint::publish;
use super::prepare::Prepared;
use super::stepper::Stepper;
use crate::demo;
use crate::model::names;
use crate::program::DType;
use crate::run::RunFolder;

/// Bytes of one file of a model's weights.
const SHARD_BYTES: u64 = 4 << 30;

/// Files of a model folder that are copied beside the trained weights.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// Writes `adapter/` or `model/` of the run folder, whole or not at all.
///
/// # Errors
/// When a file cannot be written or the device fails.
pub(super) fn write(folder: &RunFolder, stepper: &mut Stepper, prepared: &Prepared) -> Result<PathBuf, TrainError> {
    let path = if prepared.adapter.is_some() { folder.adapter() } else { folder.model() };
    let staging = path.with_file_name(format!(".{}.new", path.file_name().unwrap_or_default().to_string_lossy()));
    let _ = std::fs::remove_dir_all(&staging);
    let written = fill(&staging, stepper, prepared).and_then(|()| publish(&staging, &path));
    if let Err(error) = written {
        let _ = std::fs::remove_dir_all(&staging);
        return Err(error);
    }
    Ok(path)
}

fn fill(staging: &Path, stepper: &mut Stepper, prepared: &Prepared) -> Result<(), TrainError> {
    std::fs::create_dir(staging).map_err(fail(staging))?;
    if let Some(like) = &prepared.adapter {
        stepper.read_adapter(like)?.write(staging).map_err(super::unwritten)?;
        return Ok(());
    }
    write_weights(staging, stepper, prepared)?;
    let text = serde_json::to_string_pretty(&prepared.model.config.source).expect("plain JSON");
    let config = staging.join("config.json");
    std::fs::write(&config, text + "\n").map_err(fail(&config))?;
    for name in COMPANIONS {
        let to = staging.join(name);
        match &prepared.model.folder {
            Some(folder) if folder.join(name).exists() => {
                std::fs::copy(folder.join(name), &to).map_err(fail(&to))?;
            }
            Some(_) => {}
            None => {
                if let Some((_, bytes)) = demo::files().iter().find(|(file, _)| file == name) {
                    std::fs::write(&to, bytes).map_err(fail(&to))?;
                }
            }
        }
    }
    Ok(())
}

fn fail(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_path_buf();
    move |source| TrainError::Write { path, source }
}

/// Writes the trained weights in the type that the configuration names, in files of at most [`SHARD_BYTES`].
fn write_weights(staging: &Path, stepper: &mut Stepper, prepared: &Prepared) -> Result<(), TrainError> {
    let config = &prepared.model.config;
    let declared = config.source.get("dtype").or(config.source.get("torch_dtype")).and_then(|value| value.as_str());
    let dtype = match declared {
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        _ => DType::F32,
    };
    let weights = names::weights(config);
    let mut shards: Vec<Vec<&names::WeightName>> = vec![Vec::new()];
    let mut filled = 0;
    for weight in &weights {
        let bytes = dtype.bytes(&weight.shape);
        if filled > 0 && filled + bytes > SHARD_BYTES {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(weight);
        }
    }
    let mut map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let mut stored = Vec::new();
        for weight in shard {
            stored.push((&weight.name, &weight.shape, read_as(stepper, &weight.name, dtype)?));
            map.insert(weight.name.clone(), name.clone().into());
        }
        let kind = match dtype {
            DType::BF16 => safetensors::Dtype::BF16,
            DType::F16 => safetensors::Dtype::F16,
            _ => safetensors::Dtype::F32,
        };
        let views: Vec<(&String, TensorView)> = stored
            .iter()
            .map(|(name, shape, bytes)| TensorView::new(kind, shape.to_vec(), bytes).map(|view| (*name, view)))
            .collect::<Result<_, _>>()
            .expect("bytes fit the shape");
        let path = staging.join(&name);
        let metadata = [("format".to_string(), "pt".to_string())].into();
        safetensors::serialize_to_file(views, Some(metadata), &path)
            .map_err(|error| fail(&path)(std::io::Error::other(error.to_string())))?;
    }
    if shards.len() > 1 {
        let total: u64 = weights.iter().map(|weight| dtype.bytes(&weight.shape)).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let path = staging.join("model.safetensors.index.json");
        std::fs::write(&path, index.to_string() + "\n").map_err(fail(&path))?;
    }
    Ok(())
}

/// A trained weight in another type, rounded to nearest.
fn read_as(stepper: &mut Stepper, name: &str, dtype: DType) -> Result<Vec<u8>, TrainError> {
    let stored = stepper.workload().find(name).map(|id| (id, stepper.workload().buffer(id).clone()));
    let (id, buffer) = stored
        .ok_or_else(|| TrainError::Checkpoint { path: name.into(), what: "the run has no such weight".into() })?;
    let mut bytes = vec![0; buffer.bytes() as usize];
    stepper.session.read(id, &mut bytes)?;
    if buffer.dtype == dtype {
        return Ok(bytes);
    }
    let halves = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    let values: Vec<f32> = match buffer.dtype {
        DType::BF16 => halves().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        DType::F16 => halves().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect(),
    };
    Ok(match dtype {
        DType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}
