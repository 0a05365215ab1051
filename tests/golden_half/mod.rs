//! The golden runs of PyTorch, Transformers and PEFT in fp32 on a card in bf16 or f16: each loss within 1%, and the fall of
//! the loss on the same batches within 5%. Gradient norms have no agreed bound there: in f16 they are held to 2%, in bf16 to
//! 8%, for PyTorch's own bf16 runs of SmolLM2's 20 steps, sixteen of them from adapters a thousandth apart, are off by 3.6% to
//! 7.5% (`tests/reference/bf16_norms.py`).
//!
//! SmolLM2 and its golden files are there where `TUNE_SMOLLM2` and `TUNE_ASSETS` say (`tests/gpu.sh` unpacks the model
//! where it was carried along).

use tune::backend::Device;
use tune::data::MicroBatch;
use tune::model::adapter::Adapter;
use tune::model::{Method, Model};
use tune::program::{DType, Target};
use tune::train::Stepper;
use tune::train::schedule::RateSchedule;

use crate::support::*;

const LOSS: f64 = 1e-2;
const NORM_F16: f64 = 2e-2;
const NORM_BF16: f64 = 8e-2;
const FALL: f64 = 5e-2;

/// What is wrong with a run beside the golden one, in one line.
struct Compared {
    loss: f64,
    norm: f64,
    norm_bound: f64,
}

impl Compared {
    fn new(target: &Target) -> Self {
        let norm_bound = if target.compute == DType::BF16 { NORM_BF16 } else { NORM_F16 };
        Self { loss: 0.0, norm: 0.0, norm_bound }
    }

    fn add(&mut self, found: (f64, f64), expected: (f64, f64)) {
        // NaN is the worst.
        let apart = |a: f64, b: f64| if a.is_nan() { f64::INFINITY } else { relative(a, b) };
        self.loss = self.loss.max(apart(found.0, expected.0));
        self.norm = self.norm.max(apart(found.1, expected.1));
    }

    /// Adds what is beyond the bounds to the failures.
    fn check(&self, what: &str, failures: &mut Vec<String>) {
        println!("{what}: losses within {:.1e}, norms within {:.1e}", self.loss, self.norm);
        for (kind, off, bound) in [("loss", self.loss, LOSS), ("gradient norm", self.norm, self.norm_bound)] {
            if off > bound {
                failures.push(format!("{what}: a {kind} is off by {off:.1e}, more than {bound:.1e}"));
            }
        }
    }
}

/// The fall of the mean loss on the batches of a run, from before it (the golden losses) to after it.
fn check_fall(what: &str, [found, before, after]: [&[f64]; 3], failures: &mut Vec<String>) {
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (fall, golden) = (mean(before) - mean(found), mean(before) - mean(after));
    println!("{what}: the mean loss falls by {fall:.4}, golden {golden:.4}");
    if relative(fall, golden) > FALL {
        failures.push(format!("{what}: the loss falls by {fall}, golden {golden}"));
    }
}

pub fn tiny_models_take_their_steps(target: &Target, device: &Device) {
    for family in ["llama", "qwen2"] {
        let folder = tiny(family);
        let golden = Golden::open(&folder.join("golden.safetensors"));
        let model = Model::open(&folder, 0).expect("the model opens");
        let reference = json(&folder.join("golden.json"));
        let batch = micro_batch(&golden.rows("input_ids"), &golden.rows("labels"), None, 64);
        let mut run = Run::new(Method::Full, 64);
        run.weight_decay = 0.01;
        let mut stepper = run.open(&model, target, device);
        let mut compared = Compared::new(target);
        for (step, expected) in reference["adamw_5_steps"]["steps"].as_array().expect("steps").iter().enumerate() {
            let result = stepper.update(std::slice::from_ref(&batch), step as u64, 1e-3).expect("an update");
            let number = |key: &str| expected[key].as_f64().expect("a number");
            compared.add((result.loss, result.grad_norm), (number("loss"), number("grad_norm")));
        }
        let mut failures = Vec::new();
        compared.check(&format!("tiny {family}, full"), &mut failures);
        assert!(failures.is_empty(), "{failures:?}");
    }
}

struct Smol {
    golden: std::path::PathBuf,
    model: Model,
    ids: Vec<Vec<i64>>,
    labels: Vec<Vec<i64>>,
    mask: Vec<Vec<i64>>,
}

impl Smol {
    fn open() -> Option<Self> {
        let golden = assets("SmolLM2's golden runs on a card")?.join("golden");
        let model = Model::open(&smollm2("SmolLM2's golden runs on a card")?, 0).expect("the model opens");
        let batches = Golden::open(&golden.join("batches.safetensors"));
        let (ids, labels) = (batches.rows("input_ids"), batches.rows("labels"));
        Some(Self { golden, model, ids, labels, mask: batches.rows("attention_mask") })
    }

    fn batch(&self, index: usize) -> MicroBatch {
        let rows = 2 * index..2 * index + 2;
        micro_batch(&self.ids[rows.clone()], &self.labels[rows.clone()], Some(&self.mask[rows]), 256)
    }

    fn stepper(&self, adapter: &str, target: &Target, device: &Device, change: impl FnOnce(&mut Run)) -> Stepper {
        let adapter = Adapter::read(&self.golden.join(adapter), &self.model.config).expect("an adapter");
        let mut run = Run::new(Method::Lora { adapter: adapter.options(), weights: None }, 256);
        change(&mut run);
        let mut stepper = run.open(&self.model, target, device);
        stepper.load_adapter(&adapter).expect("it loads");
        stepper
    }

    /// Mean losses of the first batches, evaluated.
    fn losses(&self, stepper: &mut Stepper, count: usize) -> Vec<f64> {
        let loss = |index| stepper.evaluate(&[self.batch(index)], || true).expect("an evaluation").expect("to the end");
        (0..count).map(loss).collect()
    }
}

/// The golden LoRA, `schedule` and full runs; false where the model or the files are not there.
pub fn smollm2_takes_its_steps(target: &Target, device: &Device) -> bool {
    let Some(smol) = Smol::open() else { return false };
    let mut failures = Vec::new();
    let reference = json(&smol.golden.join("lora.json"));
    let (losses, norms) = (numbers(&reference["losses"]), numbers(&reference["grad_norms"]));
    let mut stepper = smol.stepper("lora_init", target, device, |_| ());
    let mut compared = Compared::new(target);
    let after = numbers(&reference["losses_after_training_same_batches"]);
    let before = smol.losses(&mut stepper, after.len());
    for step in 0..20 {
        let result = stepper.update(&[smol.batch(step)], step as u64, 2e-4).expect("an update");
        compared.add((result.loss, result.grad_norm), (losses[step], norms[step]));
    }
    compared.check("SmolLM2, LoRA", &mut failures);
    let found = smol.losses(&mut stepper, after.len());
    check_fall("SmolLM2, LoRA", [&found, &before, &after], &mut failures);
    drop(stepper);

    let reference = json(&smol.golden.join("schedule.json"));
    let (losses, norms) = (numbers(&reference["losses"]), numbers(&reference["grad_norms_before_clipping"]));
    let mut stepper = smol.stepper("lora_final", target, device, |run| {
        run.betas = [0.9, 0.95];
        run.weight_decay = 0.1;
        run.max_grad_norm = 0.5;
    });
    let mut compared = Compared::new(target);
    let after = numbers(&reference["losses_after_training_same_batches"]);
    let before = smol.losses(&mut stepper, after.len());
    let schedule = RateSchedule::new(tune::spec::Schedule::Cosine, 3.0, 10);
    for step in 0..10 {
        let pair = [smol.batch(2 * step), smol.batch(2 * step + 1)];
        let result = stepper.update(&pair, step as u64, 1e-3 * schedule.factor(step as u64)).expect("an update");
        compared.add((result.loss, result.grad_norm), (losses[step], norms[step]));
    }
    compared.check("SmolLM2, schedule", &mut failures);
    let found = smol.losses(&mut stepper, after.len());
    check_fall("SmolLM2, schedule", [&found, &before, &after], &mut failures);
    drop(stepper);

    let reference = json(&smol.golden.join("full.json"));
    let (losses, norms) = (numbers(&reference["losses"]), numbers(&reference["grad_norms"]));
    let mut stepper = Run::new(Method::Full, 256).open(&smol.model, target, device);
    let mut compared = Compared::new(target);
    for step in 0..5 {
        let result = stepper.update(&[smol.batch(step)], step as u64, 1e-5).expect("an update");
        compared.add((result.loss, result.grad_norm), (losses[step], norms[step]));
    }
    compared.check("SmolLM2, full", &mut failures);
    assert!(failures.is_empty(), "{failures:#?}");
    true
}
