//! Checkpoints: `checkpoints/step-N/`, written under a temporary name, synced, renamed.
//!
//! A checkpoint holds everything that the next update depends on, bit for bit: the trained tensors, the
//! optimizer's moments, and [`State`]. The order of the rows is a function of seed and epoch and needs no storing.

use std::fs::File;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::stepper::Stepper;
use crate::backend::WeightSource;
use crate::model::SafetensorsWeights;
use crate::model::adapter::Adapter;
use crate::program::DType;
use crate::run::RunFolder;

const STATE: &str = "state.json";
const TENSORS: &str = "trained.safetensors";
const MOMENTS: &str = "optimizer.safetensors";

/// What is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Updates done.
    pub step: u64,
    /// Peak of the schedule, as changed during the run.
    pub learning_rate: f64,
    pub best: Option<Best>,
    /// Evaluations since the best.
    pub stale_evaluations: usize,
    /// Sum of the training losses, for the mean at the end.
    pub loss_sum: f64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Step of the last evaluation and its loss.
    pub last_eval: Option<Best>,
    /// The plan's choices, which decide the order of sums: the same on resume, or it is said.
    pub plan: PlanChoice,
    /// The engine's measured choices ([`Session::tuning`](crate::backend::Session::tuning)), which do so too.
    #[serde(default)]
    pub tuning: Option<String>,
    /// The scale of gradients ([`Session::gradient_scale`](crate::backend::Session::gradient_scale)), where one that the engine
    /// began with was too large.
    #[serde(default)]
    pub gradient_scale: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub loss: f64,
}

/// What the planner chose, and for which engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanChoice {
    pub device: String,
    /// Micro-batch sizes in tokens.
    pub sizes: Vec<usize>,
    /// Layers whose norms and gated products are computed again.
    pub cheap_layers: usize,
    /// Layers of which only the input is kept.
    pub recomputed_layers: usize,
    /// Layers, from the first, whose input waits in the host's memory; they are among the recomputed ones.
    #[serde(default)]
    pub offloaded_layers: usize,
    /// Whether a frozen embedding is left in the host's memory.
    #[serde(default)]
    pub host_embedding: bool,
    /// Whether the optimizer's moments are.
    #[serde(default)]
    pub host_optimizer: bool,
    /// Whether the head works in small chunks.
    #[serde(default)]
    pub small_head: bool,
    /// Whether the gradients of trained matrices are summed in bf16 instead of f32.
    #[serde(default)]
    pub half_gradients: bool,
    /// Parts that MLPs cut the largest micro-batch into.
    #[serde(default)]
    pub mlp_chunks: usize,
    /// Whether recomputed layers keep attention's output too.
    #[serde(default)]
    pub kept_attention: bool,
}

impl PlanChoice {
    /// What the plan does to fit, of a model of so many layers.
    pub fn in_words(&self, layers: usize) -> Vec<String> {
        let mut words = vec![match (self.recomputed_layers, self.cheap_layers) {
            (0, 0) => "nothing is computed again".into(),
            (0, cheap) => format!("norms and gated products of {cheap} of {layers} layers are computed again"),
            (all, cheap) if cheap > all => {
                let partly = cheap - all;
                format!("{all} of {layers} layers are computed again, and norms and gated products of {partly} more")
            }
            (all, _) => format!("{all} of {layers} layers are computed again"),
        }];
        let offloaded = format!("inputs of {} layers wait in the host's memory", self.offloaded_layers);
        let chunks = format!("MLPs work through the largest micro-batch in {} chunks", self.mlp_chunks);
        for (moved, what) in [
            (self.kept_attention, "attention is not computed again"),
            (self.offloaded_layers > 0, offloaded.as_str()),
            (self.host_embedding, "the embedding is left in the host's memory"),
            (self.host_optimizer, "optimizer states are kept in the host's memory"),
            (self.mlp_chunks > 1, chunks.as_str()),
            (self.small_head, "the head works in small chunks"),
            (self.half_gradients, "gradients are summed in bf16"),
        ] {
            if moved {
                words.push(what.into());
            }
        }
        words
    }
}

/// Name of a checkpoint's folder.
pub fn name(step: u64) -> String {
    format!("step-{step}")
}

/// Writes a checkpoint; when it returns the folder is whole and on disk.
///
/// # Errors
/// When a file cannot be written: the temporary folder is removed, earlier checkpoints stay.
pub fn write(
    folder: &RunFolder,
    stepper: &mut Stepper,
    adapter: Option<&Adapter>,
    state: &State,
) -> Result<PathBuf, TrainError> {
    let parent = folder.checkpoints();
    let path = parent.join(name(state.step));
    let staging = parent.join(format!(".{}.new", name(state.step)));
    let written = fill(&parent, &staging, stepper, adapter, state).and_then(|()| publish(&staging, &path));
    if let Err(error) = written {
        let _ = std::fs::remove_dir_all(&staging);
        return Err(error);
    }
    Ok(path)
}

fn fill(
    parent: &Path,
    staging: &Path,
    stepper: &mut Stepper,
    adapter: Option<&Adapter>,
    state: &State,
) -> Result<(), TrainError> {
    let fail = |path: &Path| {
        let path = path.to_path_buf();
        move |error: std::io::Error| TrainError::Write { path: path.clone(), source: error }
    };
    std::fs::create_dir_all(parent).map_err(fail(parent))?;
    let _ = std::fs::remove_dir_all(staging);
    std::fs::create_dir(staging).map_err(fail(staging))?;
    let trained = stepper.trained();
    write_tensors(&staging.join(TENSORS), stepper, &trained)?;
    let moments: Vec<String> =
        trained.iter().flat_map(|name| [format!("{name}.exp_avg"), format!("{name}.exp_avg_sq")]).collect();
    write_tensors(&staging.join(MOMENTS), stepper, &moments)?;
    if let Some(like) = adapter {
        let target = staging.join("adapter");
        std::fs::create_dir(&target).map_err(fail(&target))?;
        stepper.read_adapter(like)?.write(&target).map_err(super::unwritten)?;
    }
    let text = serde_json::to_string_pretty(state).expect("plain JSON");
    std::fs::write(staging.join(STATE), text + "\n").map_err(fail(&staging.join(STATE)))
}

/// Syncs a folder's files and gives it its final name, in place of an older folder of that name.
///
/// # Errors
/// When a file cannot be synced or renamed.
pub(super) fn publish(staging: &Path, path: &Path) -> Result<(), TrainError> {
    let fail = |error: std::io::Error| TrainError::Write { path: path.to_path_buf(), source: error };
    sync_tree(staging).map_err(fail)?;
    if path.exists() {
        // The old folder makes way by a rename too, so that at every moment one of the two is whole.
        let old = path.with_file_name(format!(".{}.old", path.file_name().unwrap_or_default().to_string_lossy()));
        let _ = std::fs::remove_dir_all(&old);
        std::fs::rename(path, &old).map_err(fail)?;
        std::fs::rename(staging, path).map_err(fail)?;
        let _ = std::fs::remove_dir_all(&old);
    } else {
        std::fs::rename(staging, path).map_err(fail)?;
    }
    File::open(path.parent().unwrap_or(Path::new("."))).and_then(|parent| parent.sync_all()).map_err(fail)
}

fn sync_tree(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

fn write_tensors(path: &Path, stepper: &mut Stepper, names: &[String]) -> Result<(), TrainError> {
    let mut stored = Vec::new();
    for name in names {
        let Some(id) = stepper.workload().find(name) else { continue };
        let buffer = stepper.workload().buffer(id).clone();
        let mut bytes = vec![0; buffer.bytes() as usize];
        stepper.session.read(id, &mut bytes)?;
        let (dtype, shape) = match buffer.dtype {
            DType::F32 => (safetensors::Dtype::F32, buffer.shape),
            DType::BF16 => (safetensors::Dtype::BF16, buffer.shape),
            DType::F16 => (safetensors::Dtype::F16, buffer.shape),
            _ => (safetensors::Dtype::U8, vec![bytes.len()]),
        };
        stored.push((name, dtype, shape, bytes));
    }
    let views: Vec<(&String, TensorView)> = stored
        .iter()
        .map(|(name, dtype, shape, bytes)| TensorView::new(*dtype, shape.clone(), bytes).map(|view| (*name, view)))
        .collect::<Result<_, _>>()
        .expect("bytes fit the shape");
    safetensors::serialize_to_file(views, None, path).map_err(|error| {
        let source = match error {
            safetensors::SafeTensorError::IoError(error) => error,
            other => std::io::Error::other(other.to_string()),
        };
        TrainError::Write { path: path.to_path_buf(), source }
    })
}

/// Reads the state of a checkpoint.
///
/// # Errors
/// When it is missing or broken.
pub fn read_state(checkpoint: &Path) -> Result<State, TrainError> {
    let path = checkpoint.join(STATE);
    let fail = |what: String| TrainError::Checkpoint { path: path.clone(), what };
    let text = std::fs::read_to_string(&path).map_err(|error| fail(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| fail(error.to_string()))
}

/// Puts trained tensors and moments back on the device.
///
/// # Errors
/// When a file is broken or does not fit the run, or the device fails.
pub fn restore(checkpoint: &Path, stepper: &mut Stepper) -> Result<(), TrainError> {
    for file in [TENSORS, MOMENTS] {
        let path = checkpoint.join(file);
        let fail = |what: String| TrainError::Checkpoint { path: path.clone(), what };
        let bytes = std::fs::read(&path).map_err(|error| fail(error.to_string()))?;
        let tensors = safetensors::SafeTensors::deserialize(&bytes).map_err(|error| fail(error.to_string()))?;
        for (name, view) in tensors.iter() {
            let id = stepper.workload().find(name).ok_or_else(|| fail(format!("{name} is not part of this run")))?;
            let expected = stepper.workload().buffer(id).bytes();
            if view.data().len() as u64 != expected {
                return Err(fail(format!("{name} has {} bytes, this run needs {expected}", view.data().len())));
            }
            stepper.session.write(id, view.data())?;
        }
    }
    Ok(stepper.refresh()?)
}

/// Trained weights of a checkpoint, for writing the result from the best one.
///
/// # Errors
/// When the file is broken.
pub fn tensors(checkpoint: &Path) -> Result<impl WeightSource, TrainError> {
    Ok(SafetensorsWeights::open_files(&[checkpoint.join(TENSORS)])?)
}

/// Removes checkpoints beyond the last `keep`, the best one excepted, and what a killed worker left half-written.
///
/// # Errors
/// When a folder cannot be removed.
pub fn prune(folder: &RunFolder, keep: usize, best: Option<u64>) -> std::io::Result<()> {
    let parent = folder.checkpoints();
    let steps = folder.checkpoint_steps();
    let surplus = steps.len().saturating_sub(keep.max(1));
    for step in steps[..surplus].iter().filter(|step| Some(**step) != best) {
        // It loses its name first: a half-removed checkpoint must not look like one.
        std::fs::rename(parent.join(name(*step)), parent.join(format!(".{}.old", name(*step))))?;
    }
    for entry in std::fs::read_dir(&parent)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
