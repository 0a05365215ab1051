//! Weights in safetensors files, memory-mapped: one file or shards with an index.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use rayon::prelude::*;
use safetensors::SafeTensors;

use super::names::{self, WeightName};
use super::{ModelConfig, ModelError};
use crate::backend::{EngineError, Tensor, WeightSource};
use crate::program::{DType, random};

/// Memory-mapped safetensors files. Tensors are slices of the maps; nothing is copied.
pub struct SafetensorsWeights {
    files: Vec<Bytes>,
    tensors: HashMap<String, Entry>,
}

enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
        }
    }
}

struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl SafetensorsWeights {
    /// Opens the weights of a model folder; none when it holds none at all.
    ///
    /// # Errors
    /// When a file is missing, truncated, or its header does not fit its length; when the weights are pickled.
    pub fn open(folder: &Path) -> Result<Option<Self>, ModelError> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if index.exists() {
            return Self::open_files(&shards(&index)?).map(Some);
        }
        if single.exists() {
            return Self::open_files(&[single]).map(Some);
        }
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt"];
        if let Some(name) = pickled.iter().find(|name| folder.join(name).exists()) {
            return Err(ModelError::Pickle { path: folder.join(name) });
        }
        Ok(None)
    }

    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// As [`SafetensorsWeights::open`].
    pub fn open_files(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new() };
        for path in paths {
            let fail = |what: String| ModelError::File { path: path.clone(), what };
            let file = File::open(path).map_err(|error| fail(error.to_string()))?;
            // SAFETY: the map is read-only and lives as long as the weights. A file that another process
            // truncates meanwhile would fault; checkpoints are replaced by renaming, never rewritten in place.
            let map = unsafe { Mmap::map(&file) }.map_err(|error| fail(error.to_string()))?;
            weights.add(Bytes::Mapped(map)).map_err(fail)?;
        }
        Ok(weights)
    }

    /// Weights compiled into the binary.
    ///
    /// # Errors
    /// When the bytes are not a safetensors file.
    pub fn embedded(bytes: &'static [u8]) -> Result<Self, ModelError> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new() };
        weights
            .add(Bytes::Embedded(bytes))
            .map_err(|what| ModelError::File { path: "(embedded model)".into(), what })?;
        Ok(weights)
    }

    fn add(&mut self, bytes: Bytes) -> Result<(), String> {
        let data = bytes.get();
        let base = data.as_ptr() as usize;
        let parsed = SafeTensors::deserialize(data)
            .map_err(|error| format!("not a whole safetensors file ({error}); download or copy it again"))?;
        let file = self.files.len();
        for (name, view) in parsed.iter() {
            let dtype = match view.dtype() {
                safetensors::Dtype::F32 => DType::F32,
                safetensors::Dtype::F16 => DType::F16,
                safetensors::Dtype::BF16 => DType::BF16,
                // Other types may lie beside the weights; asking for one of them is the error.
                _ => continue,
            };
            let start = view.data().as_ptr() as usize - base;
            let entry = Entry { file, dtype, shape: view.shape().to_vec(), start, end: start + view.data().len() };
            self.tensors.insert(name.to_string(), entry);
        }
        self.files.push(bytes);
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Checks that every tensor the model needs is there, in its shape.
    ///
    /// # Errors
    /// Naming the first that is not.
    pub fn check(&self, config: &ModelConfig, folder: &Path) -> Result<(), ModelError> {
        for WeightName { name, shape } in names::weights(config) {
            let what = match self.tensors.get(&name) {
                None => format!("there is no tensor {name}"),
                Some(entry) if entry.shape != shape => {
                    format!("{name} has shape {:?}, the configuration says {shape:?}", entry.shape)
                }
                Some(_) => continue,
            };
            return Err(ModelError::File { path: folder.to_path_buf(), what });
        }
        Ok(())
    }
}

impl WeightSource for SafetensorsWeights {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError> {
        let entry = self.tensors.get(name).ok_or_else(|| EngineError::Weight {
            name: name.to_string(),
            what: "not in the checkpoint, or stored in a type that is not read".into(),
        })?;
        let bytes = &self.files[entry.file].get()[entry.start..entry.end];
        Ok(Tensor { dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Some(entry) = self.tensors.get(name)
            && let Bytes::Mapped(map) = &self.files[entry.file]
        {
            // SAFETY: the map is of a file and read-only: pages that go are read from the file again when touched.
            let advised =
                unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.start, entry.end - entry.start) };
            // Advice that is not taken costs memory, nothing else.
            let _ = advised;
        }
    }
}

/// Files named by an index, each once.
fn shards(index: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let fail = |what: String| ModelError::File { path: index.to_path_buf(), what };
    let text = std::fs::read_to_string(index).map_err(|error| fail(error.to_string()))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| fail(error.to_string()))?;
    let map = value.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| fail("no weight_map".into()))?;
    let mut files: Vec<&str> = map.values().filter_map(|file| file.as_str()).collect();
    files.sort_unstable();
    files.dedup();
    let folder = index.parent().unwrap_or(Path::new("."));
    for file in &files {
        // A shard lies beside its index: a name that leads elsewhere is not followed.
        if Path::new(file).components().count() != 1 || *file == ".." {
            return Err(fail(format!("the shard name \"{file}\" is not a plain file name")));
        }
    }
    Ok(files.into_iter().map(|file| folder.join(file)).collect())
}

/// Random initial weights: normal with the configuration's `initializer_range`, norms 1, biases 0. A function
/// of the seed and each tensor's name; made when asked for.
pub struct RandomWeights {
    seed: u64,
    deviation: f32,
    tensors: HashMap<String, (Vec<usize>, OnceLock<Vec<f32>>)>,
}

impl RandomWeights {
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        let shapes = names::weights(config).into_iter();
        let tensors = shapes.map(|WeightName { name, shape }| (name, (shape, OnceLock::new()))).collect();
        Self { seed, deviation: config.initializer_range, tensors }
    }

    fn values(&self, name: &str, elements: usize) -> Vec<f32> {
        if name.ends_with("norm.weight") {
            vec![1.0; elements]
        } else if name.ends_with(".bias") {
            vec![0.0; elements]
        } else {
            normal(name, self.seed, elements, self.deviation)
        }
    }
}

impl WeightSource for RandomWeights {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError> {
        let (shape, values) = self.tensors.get(name).ok_or_else(|| EngineError::Weight {
            name: name.to_string(),
            what: "the model has no such tensor".into(),
        })?;
        let values = values.get_or_init(|| self.values(name, shape.iter().product()));
        Ok(Tensor { dtype: DType::F32, shape: shape.clone(), bytes: bytemuck::cast_slice(values) })
    }
}

/// Normal numbers by the Box-Muller transform.
fn normal(name: &str, seed: u64, elements: usize, deviation: f32) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32, 0, 0];
    let stream = random::stream(name);
    (0..elements)
        .into_par_iter()
        .map(|index| {
            let (row, column) = ((index >> 16) as u32, (index & 0xffff) as u32);
            let radius = (-2.0 * (1.0 - random::uniform(key, stream, row, column)).ln()).sqrt();
            let angle = 2.0 * std::f32::consts::PI * random::uniform(key, stream ^ 0x5bd1_e995, row, column);
            deviation * radius * angle.cos()
        })
        .collect()
}
