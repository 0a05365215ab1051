//! Reading golden files and driving programs: shared by the tests.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tune::backend::{self, Device, Session};
use tune::data::{MicroBatch, Row, pack};
use tune::model::{Method, Model, Recompute, TrainingOptions, training_workload};
use tune::program::{Target, plan};
use tune::train::Stepper;

/// A safetensors file as f32 values or integers.
pub struct Golden {
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Golden {
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let tensors = file
            .iter()
            .map(|(name, view)| {
                let data = view.data();
                let values = match view.dtype() {
                    safetensors::Dtype::F32 => {
                        data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
                    }
                    safetensors::Dtype::I64 => {
                        data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
                    }
                    other => panic!("{name} is {other:?}"),
                };
                (name.to_string(), (view.shape().to_vec(), values))
            })
            .collect();
        Self { tensors }
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    pub fn values(&self, name: &str) -> &[f64] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    pub fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].0
    }

    /// Rows of a `[rows, columns]` (or `[batches, rows, columns]`, flattened) integer tensor.
    pub fn rows(&self, name: &str) -> Vec<Vec<i64>> {
        let (shape, values) = &self.tensors[name];
        let columns = *shape.last().unwrap();
        values.chunks_exact(columns).map(|row| row.iter().map(|&v| v as i64).collect()).collect()
    }
}

pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

pub fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

pub fn crate_root() -> PathBuf {
    PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| ".".into()))
}

/// The golden numbers' folder, or one line that says which test is left out.
pub fn assets(test: &str) -> Option<PathBuf> {
    let found = std::env::var_os("TUNE_ASSETS").map(PathBuf::from).unwrap_or(crate_root().join("../shared/assets"));
    if found.join("golden").exists() {
        return Some(found);
    }
    println!("left out: {test} needs the golden files (set TUNE_ASSETS)");
    None
}

/// The folder of SmolLM2-135M-Instruct, or one line that says which test is left out.
pub fn smollm2(test: &str) -> Option<PathBuf> {
    let found = std::env::var_os("TUNE_SMOLLM2").map(PathBuf::from).unwrap_or(crate_root().join("models/smollm2-135m"));
    if found.join("config.json").exists() {
        return Some(found);
    }
    println!("left out: {test} needs SmolLM2 (tests/run.sh fetches it; or set TUNE_SMOLLM2)");
    None
}

pub fn tiny(family: &str) -> PathBuf {
    crate_root().join("tests/fixtures/tiny").join(family)
}

/// Device for golden runs: `TUNE_TEST_DEVICE`, else the CPU.
pub fn choice() -> tune::backend::Choice {
    let device = std::env::var("TUNE_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    let precision = std::env::var("TUNE_TEST_PRECISION").unwrap_or_else(|_| "auto".into());
    backend::choose(&device, &precision).expect("the device is there")
}

pub struct Run {
    pub method: Method,
    pub size: usize,
    pub recompute: Recompute,
    pub betas: [f32; 2],
    pub weight_decay: f32,
    pub max_grad_norm: f32,
}

impl Run {
    pub fn new(method: Method, size: usize) -> Self {
        Self { method, size, recompute: Recompute::None, betas: [0.9, 0.999], weight_decay: 0.0, max_grad_norm: 0.0 }
    }

    pub fn options(&self, layers: usize) -> TrainingOptions {
        TrainingOptions {
            betas: self.betas,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            ..TrainingOptions::new(self.method.clone(), vec![self.size], vec![self.recompute; layers])
        }
    }

    pub fn open(&self, model: &Model, target: &Target, device: &Device) -> Stepper {
        let options = self.options(model.config.layers);
        let workload = training_workload(&model.config, &options, target).expect("a workload");
        let plan = plan::plan(workload, target.clone()).expect("a plan");
        let session = backend::open(plan, Arc::clone(&model.weights), device).expect("a session");
        Stepper::new(session, 1, self.betas.map(f64::from), model.config.padding_token).expect("a training workload")
    }
}

/// Rows of ids and labels as one micro-batch of `size` tokens, cut where `mask` ends.
pub fn micro_batch(ids: &[Vec<i64>], labels: &[Vec<i64>], mask: Option<&[Vec<i64>]>, size: usize) -> MicroBatch {
    let rows: Vec<Row> = ids
        .iter()
        .zip(labels)
        .enumerate()
        .map(|(index, (ids, labels))| {
            let length = mask.map_or(ids.len(), |mask| mask[index].iter().sum::<i64>() as usize);
            Row {
                input_ids: ids[..length].iter().map(|&id| id as u32).collect(),
                labels: labels[..length].iter().map(|&label| label as i32).collect(),
                weights: Vec::new(),
                source: index,
            }
        })
        .collect();
    let rows: Vec<&Row> = rows.iter().collect();
    let mut batches = pack(&rows, &[size], |_| 1.0, true).expect("they fit");
    assert_eq!(batches.len(), 1, "the rows fit one micro-batch");
    batches.remove(0)
}

/// Largest absolute difference over the largest absolute expected value.
pub fn worst(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    let difference = actual.iter().zip(expected).fold(0.0f64, |most, (a, e)| most.max((f64::from(*a) - e).abs()));
    assert!(actual.iter().all(|value| value.is_finite()), "a value is not finite");
    difference / scale
}

/// Norm of the difference over the norm of the expected values.
pub fn distance(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    assert!(actual.iter().all(|value| value.is_finite()), "a value is not finite");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = square(&mut actual.iter().zip(expected).map(|(a, e)| f64::from(*a) - e));
    difference / (square(&mut expected.iter().copied()) + 1e-12)
}

pub fn relative(actual: f64, expected: f64) -> f64 {
    ((actual - expected) / expected).abs()
}

/// Logits of every position of a sequence, through the prefill program.
pub fn all_logits(session: &mut dyn Session, ids: &[i64]) -> Vec<Vec<f32>> {
    (0..ids.len()).map(|row| logits_at(session, ids, row)).collect()
}

pub fn logits_at(session: &mut dyn Session, ids: &[i64], row: usize) -> Vec<f32> {
    let workload = session.plan().workload.clone();
    let tokens = ids.len();
    let find = |part: &str| workload.find(&format!("inputs.{tokens}.{part}")).expect("a generation workload");
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let positions: Vec<i32> = (0..tokens as i32).collect();
    session.write(find("ids"), bytemuck::cast_slice(&ids)).expect("written");
    session.write(find("positions"), bytemuck::cast_slice(&positions)).expect("written");
    session.write(find("rows"), bytemuck::cast_slice(&[row as i32])).expect("written");
    session.write(find("start"), bytemuck::cast_slice(&[0i32])).expect("written");
    session.run(workload.program(&format!("prefill.{tokens}")).expect("a program")).expect("it runs");
    let logits = workload.find("logits").expect("logits");
    backend::read_values(session, logits).expect("read")
}
