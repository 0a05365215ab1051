//! Golden numbers: PyTorch, Transformers and PEFT in fp32 (`tests/reference/make_golden.py`), reached here within the
//! tolerances of the design.

mod golden_half;
mod support;

use std::collections::BTreeMap;
use std::path::Path;

use support::*;
use tune::backend;
use tune::generate::{Generator, Sampling};
use tune::model::adapter::Adapter;
use tune::model::{GenerationOptions, Method, Model, ModelConfig, Recompute, generation_workload};
use tune::program::{DType, Target, plan};
use tune::train::schedule::RateSchedule;
use tune::train::{StepResult, Stepper};

const LOGITS: f64 = 2e-4;
const LOSS: f64 = 2e-5;
const NORM: f64 = 1e-4;
const PARAMETER: f64 = 1e-3;

fn generation_session(model: &Model, adapter: Option<&Adapter>, sizes: &[usize]) -> Box<dyn backend::Session> {
    let choice = choice();
    let options = GenerationOptions { capacity: 512, prefill_sizes: sizes.to_vec() };
    let shape = adapter.map(Adapter::options);
    let workload =
        generation_workload(&model.config, &options, shape.as_ref(), None, &choice.target).expect("a workload");
    let plan = plan::plan(workload, choice.target.clone()).expect("a plan");
    let mut session = backend::open(plan, model.weights.clone(), &choice.device).expect("a session");
    if let Some(adapter) = adapter {
        let workload = session.plan().workload.clone();
        for (name, tensor) in &adapter.tensors {
            session.write(workload.find(name).expect("a matrix"), bytemuck::cast_slice(&tensor.values)).unwrap();
        }
        session.write(workload.find("lora_scale").unwrap(), bytemuck::bytes_of(&adapter.scale())).unwrap();
        if let Some(refresh) = workload.program("refresh") {
            session.run(refresh).unwrap();
        }
    }
    session
}

fn for_each_tiny(check: impl Fn(&str, &Path, Golden)) {
    for family in ["llama", "qwen2"] {
        let folder = tiny(family);
        check(family, &folder, Golden::open(&folder.join("golden.safetensors")));
    }
}

#[test]
fn both_styles_of_configuration_mean_the_same() {
    for_each_tiny(|family, folder, _| {
        let read = |file: &str| {
            let text = std::fs::read_to_string(folder.join(file)).unwrap();
            ModelConfig { source: Default::default(), ..ModelConfig::parse(&text).unwrap() }
        };
        assert_eq!(read("config.json"), read("config_v5.json"), "{family}");
    });
}

#[test]
fn tiny_models_give_the_golden_logits() {
    for_each_tiny(|family, folder, golden| {
        let model = Model::open(folder, 0).unwrap();
        let ids = golden.rows("input_ids");
        let mut session = generation_session(&model, None, &[ids[0].len()]);
        let mut logits = Vec::new();
        for row in &ids {
            logits.extend(all_logits(&mut *session, row).concat());
        }
        let error = worst(&logits, golden.values("logits"));
        assert!(error <= LOGITS, "{family}: {error:.1e}");
    });
}

#[test]
fn tiny_models_give_the_golden_gradients_however_much_is_recomputed() {
    for_each_tiny(|family, folder, golden| {
        let model = Model::open(folder, 0).unwrap();
        let batch = micro_batch(&golden.rows("input_ids"), &golden.rows("labels"), None, 64);
        // MLPs in chunks, the tail of which is shorter, where that is asked for, and where an allocation has no more room.
        for (recompute, mlp_tokens, largest_segment) in [
            (Recompute::None, usize::MAX, u64::MAX),
            (Recompute::Cheap, usize::MAX, u64::MAX),
            (Recompute::All, usize::MAX, u64::MAX),
            (Recompute::All, 25, u64::MAX),
            (Recompute::None, usize::MAX, 40_000),
            (Recompute::Cheap, usize::MAX, 40_000),
        ] {
            let choice = choice();
            let mut run = Run::new(Method::Full, 64);
            run.recompute = recompute;
            let largest_segment = largest_segment.min(choice.target.largest_segment);
            let logits_bytes = choice.target.logits_bytes.min(largest_segment);
            let target = Target { mlp_tokens, largest_segment, logits_bytes, ..choice.target };
            let mut stepper = run.open(&model, &target, &choice.device);
            let loss = stepper.accumulate(std::slice::from_ref(&batch), 0).unwrap();
            let error = relative(loss, golden.values("loss")[0]);
            assert!(error <= LOSS, "{family} loss {error:.1e}");
            let names: Vec<&String> = golden.names().filter(|name| name.starts_with("grad.")).collect();
            assert!(!names.is_empty());
            for name in names {
                let parameter = name.strip_prefix("grad.").unwrap();
                let gradient = stepper.read_tensor(&format!("{parameter}.grad")).unwrap();
                let error = distance(&gradient, golden.values(name));
                assert!(error <= PARAMETER, "{family} {recompute:?} {parameter}: {error:.1e}");
            }
        }
    });
}

#[test]
fn tiny_models_take_the_golden_adamw_steps() {
    for_each_tiny(|family, folder, golden| {
        let model = Model::open(folder, 0).unwrap();
        let reference = json(&folder.join("golden.json"));
        let batch = micro_batch(&golden.rows("input_ids"), &golden.rows("labels"), None, 64);
        let choice = choice();
        let mut run = Run::new(Method::Full, 64);
        run.weight_decay = 0.01;
        let mut stepper = run.open(&model, &choice.target, &choice.device);
        for (step, expected) in reference["adamw_5_steps"]["steps"].as_array().unwrap().iter().enumerate() {
            let result = stepper.update(std::slice::from_ref(&batch), step as u64, 1e-3).unwrap();
            let loss = relative(result.loss, expected["loss"].as_f64().unwrap());
            let norm = relative(result.grad_norm, expected["grad_norm"].as_f64().unwrap());
            assert!(loss <= LOSS && norm <= NORM, "{family} step {step}: {loss:.1e} {norm:.1e}");
        }
    });
}

#[test]
fn tiny_models_answer_as_the_golden_ones() {
    for_each_tiny(|family, folder, golden| {
        let model = Model::open(folder, 0).unwrap();
        let mut session = generation_session(&model, None, &[4, 8]);
        let expected: Vec<u32> = golden.values("generated").iter().map(|&id| id as u32).collect();
        let mut generator = Generator::new(&session.plan().workload, &[], 512).unwrap();
        let go_on = |_| std::ops::ControlFlow::Continue(());
        let answer = generator.generate(&mut *session, &expected[..8], &Sampling::default(), 16, go_on).unwrap();
        assert_eq!(answer.tokens, expected[8..], "{family}");
    });
}

/// SmolLM2's golden files and the model, unless they are not there.
fn smol(test: &str) -> Option<(std::path::PathBuf, Model)> {
    let assets = assets(test)?;
    let folder = smollm2(test)?;
    Some((assets.join("golden"), Model::open(&folder, 0).expect("the model opens")))
}

#[test]
fn smollm2_gives_the_golden_logits_and_token_losses() {
    let Some((folder, model)) = smol("smollm2_gives_the_golden_logits_and_token_losses") else { return };
    let golden = Golden::open(&folder.join("prompts.safetensors"));
    let prompts: Vec<Vec<i64>> =
        (0..4).map(|i| golden.values(&format!("p{i}.input_ids")).iter().map(|&id| id as i64).collect()).collect();
    let mut sizes: Vec<usize> = prompts.iter().map(Vec::len).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut session = generation_session(&model, None, &sizes);
    let choice = choice();
    let adapter = tune::model::AdapterOptions { rank: 1, targets: ["q_proj".to_string()].into(), dropout: 0.0 };
    let run = Run::new(Method::Lora { adapter, weights: None }, 64);
    let mut stepper = run.open(&model, &choice.target, &choice.device);
    for (index, ids) in prompts.iter().enumerate() {
        let logits = logits_at(&mut *session, ids, ids.len() - 1);
        let error = worst(&logits, golden.values(&format!("p{index}.last_logits")));
        println!("prompt {index}: logits within {error:.1e}");
        assert!(error <= LOGITS, "prompt {index}: {error:.1e}");
        let batch = micro_batch(std::slice::from_ref(ids), std::slice::from_ref(ids), None, 64);
        let losses = stepper.token_losses(&batch).unwrap();
        let error = worst(&losses[..ids.len() - 1], golden.values(&format!("p{index}.token_loss")));
        assert!(error <= LOGITS, "prompt {index} losses: {error:.1e}");
    }
}

struct Batches {
    ids: Vec<Vec<i64>>,
    labels: Vec<Vec<i64>>,
    mask: Vec<Vec<i64>>,
}

impl Batches {
    fn open(folder: &Path) -> Self {
        let golden = Golden::open(&folder.join("batches.safetensors"));
        Self { ids: golden.rows("input_ids"), labels: golden.rows("labels"), mask: golden.rows("attention_mask") }
    }

    fn batch(&self, index: usize) -> tune::data::MicroBatch {
        let rows = 2 * index..2 * index + 2;
        micro_batch(&self.ids[rows.clone()], &self.labels[rows.clone()], Some(&self.mask[rows]), 256)
    }
}

fn lora_stepper(model: &Model, adapter: &Adapter, change: impl FnOnce(&mut Run)) -> Stepper {
    let choice = choice();
    let mut run = Run::new(Method::Lora { adapter: adapter.options(), weights: None }, 256);
    change(&mut run);
    let mut stepper = run.open(model, &choice.target, &choice.device);
    stepper.load_adapter(adapter).unwrap();
    stepper
}

/// Compares an update with its golden loss and norm.
fn close(what: &str, step: usize, result: StepResult, loss: f64, norm: f64) {
    let (loss_error, norm_error) = (relative(result.loss, loss), relative(result.grad_norm, norm));
    assert!(result.applied);
    println!("{what} {step}: loss within {loss_error:.1e}, norm within {norm_error:.1e}");
    assert!(loss_error <= LOSS, "{what} {step}: loss {} is not {loss} ({loss_error:.1e})", result.loss);
    assert!(norm_error <= NORM, "{what} {step}: norm {} is not {norm} ({norm_error:.1e})", result.grad_norm);
}

/// Compares gradients in place with golden ones: whole tensors, and norms of the rest.
fn close_gradients(stepper: &mut Stepper, tensors: &Golden, norms: &serde_json::Value) {
    let mut most = (0.0f64, String::new());
    for name in stepper.trained() {
        let gradient = stepper.read_tensor(&format!("{name}.grad")).unwrap();
        let stored = format!("base_model.model.{name}");
        let expected = norms[&stored].as_f64().unwrap_or_else(|| norms[&name].as_f64().expect("a norm"));
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let error = (norm - expected).abs() / (expected + 1e-12);
        assert!(error <= PARAMETER || (expected == 0.0 && norm == 0.0), "{name}: norm {norm}, golden {expected}");
        if tensors.has(&stored) && expected > 0.0 {
            let error = distance(&gradient, tensors.values(&stored));
            if error > most.0 {
                most = (error, name.clone());
            }
            assert!(error <= PARAMETER, "{name}: {error:.1e}");
        }
    }
    println!("gradients: within {:.1e} ({})", most.0, most.1);
}

#[test]
fn smollm2_takes_the_golden_lora_steps() {
    let Some((folder, model)) = smol("smollm2_takes_the_golden_lora_steps") else { return };
    let reference = json(&folder.join("lora.json"));
    let batches = Batches::open(&folder);
    let start = Adapter::read(&folder.join("lora_init"), &model.config).unwrap();
    let mut stepper = lora_stepper(&model, &start, |_| ());
    stepper.accumulate(&[batches.batch(0)], 0).unwrap();
    let tensors = Golden::open(&folder.join("lora_step0_grads.safetensors"));
    close_gradients(&mut stepper, &tensors, &reference["step0_grad_norm_per_parameter"]);
    let (losses, norms) = (numbers(&reference["losses"]), numbers(&reference["grad_norms"]));
    // A slow device takes the first few.
    let steps = std::env::var("TUNE_TEST_STEPS").map_or(20, |steps| steps.parse().expect("a number of steps"));
    for step in 0..steps {
        let result = stepper.update(&[batches.batch(step)], step as u64, 2e-4).unwrap();
        close("step", step, result, losses[step], norms[step]);
    }
    if steps < 20 {
        println!("{steps} of 20 steps, as TUNE_TEST_STEPS says");
        return;
    }
    let after = numbers(&reference["losses_after_training_same_batches"]);
    for (index, expected) in after.iter().enumerate() {
        let loss = stepper.evaluate(&[batches.batch(index)], || true).unwrap().unwrap();
        assert!(relative(loss, *expected) <= LOSS, "after training, batch {index}: {loss} is not {expected}");
    }
    let trained = stepper.read_adapter(&start).unwrap();
    let golden = Adapter::read(&folder.join("lora_final"), &model.config).unwrap();
    let all =
        |adapter: &Adapter| adapter.tensors.values().flat_map(|tensor| tensor.values.clone()).collect::<Vec<f32>>();
    let expected: Vec<f64> = all(&golden).into_iter().map(f64::from).collect();
    let error = distance(&all(&trained), &expected);
    assert!(error <= PARAMETER, "the final adapter: {error:.1e}");
}

#[test]
fn a_peft_adapter_gives_the_golden_logits() {
    let Some((folder, model)) = smol("a_peft_adapter_gives_the_golden_logits") else { return };
    let adapter = Adapter::read(&folder.join("lora_final"), &model.config).unwrap();
    let prompts = Golden::open(&folder.join("prompts.safetensors"));
    let golden = Golden::open(&folder.join("lora_after_logits.safetensors"));
    let all: BTreeMap<usize, Vec<i64>> = (0..4)
        .map(|i| (i, prompts.values(&format!("p{i}.input_ids")).iter().map(|&id| id as i64).collect::<Vec<_>>()))
        .collect();
    let mut sizes: Vec<usize> = all.values().map(Vec::len).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut session = generation_session(&model, Some(&adapter), &sizes);
    for (index, ids) in &all {
        let logits = logits_at(&mut *session, ids, ids.len() - 1);
        let error = worst(&logits, golden.values(&format!("p{index}.last_logits")));
        assert!(error <= LOGITS, "prompt {index}: {error:.1e}");
    }
}

#[test]
fn smollm2_takes_the_golden_steps_with_schedule_clipping_and_decay() {
    let Some((folder, model)) = smol("smollm2_takes_the_golden_steps_with_schedule_clipping_and_decay") else {
        return;
    };
    let reference = json(&folder.join("schedule.json"));
    let batches = Batches::open(&folder);
    let start = Adapter::read(&folder.join("lora_final"), &model.config).unwrap();
    let mut stepper = lora_stepper(&model, &start, |run| {
        run.betas = [0.9, 0.95];
        run.weight_decay = 0.1;
        run.max_grad_norm = 0.5;
    });
    let tensors = Golden::open(&folder.join("schedule_step0_grads.safetensors"));
    stepper.accumulate(&[batches.batch(0), batches.batch(1)], 0).unwrap();
    close_gradients(&mut stepper, &tensors, &reference["step0_grad_norm_per_parameter"]);
    let (losses, norms) = (numbers(&reference["losses"]), numbers(&reference["grad_norms_before_clipping"]));
    let rates = numbers(&reference["learning_rates"]);
    let schedule = RateSchedule::new(tune::spec::Schedule::Cosine, 3.0, 10);
    for step in 0..10 {
        let rate = 1e-3 * schedule.factor(step as u64);
        assert!((rate - rates[step]).abs() <= 1e-12, "rate {step}: {rate} is not {}", rates[step]);
        let pair = [batches.batch(2 * step), batches.batch(2 * step + 1)];
        let result = stepper.update(&pair, step as u64, rate).unwrap();
        close("update", step, result, losses[step], norms[step]);
    }
    let after = numbers(&reference["losses_after_training_same_batches"]);
    for (index, expected) in after.iter().enumerate() {
        let loss = stepper.evaluate(&[batches.batch(index)], || true).unwrap().unwrap();
        assert!(relative(loss, *expected) <= LOSS, "after training, batch {index}: {loss} is not {expected}");
    }
}

#[test]
fn smollm2_takes_the_golden_full_steps() {
    let Some((folder, model)) = smol("smollm2_takes_the_golden_full_steps") else { return };
    let reference = json(&folder.join("full.json"));
    let batches = Batches::open(&folder);
    let choice = choice();
    let mut stepper = Run::new(Method::Full, 256).open(&model, &choice.target, &choice.device);
    stepper.accumulate(&[batches.batch(0)], 0).unwrap();
    let none = Golden::open(&folder.join("lora_step0_grads.safetensors"));
    close_gradients(&mut stepper, &none, &reference["step0_grad_norm_per_parameter"]);
    let (losses, norms) = (numbers(&reference["losses"]), numbers(&reference["grad_norms"]));
    for step in 0..5 {
        let result = stepper.update(&[batches.batch(step)], step as u64, 1e-5).unwrap();
        close("step", step, result, losses[step], norms[step]);
    }
}

/// An engine that computes in 16 bits (`TUNE_TEST_DEVICE=wgpu:0 TUNE_TEST_PRECISION=f16`) has bounds of its own.
fn half(test: &str) -> Option<backend::Choice> {
    let choice = choice();
    if choice.target.compute != DType::F32 {
        return Some(choice);
    }
    println!("left out: {test} is for TUNE_TEST_PRECISION=f16 on a device that has it");
    None
}

#[test]
fn half_precision_takes_the_golden_steps_of_tiny_models() {
    let Some(choice) = half("half_precision_takes_the_golden_steps_of_tiny_models") else { return };
    golden_half::tiny_models_take_their_steps(&choice.target, &choice.device);
}

#[test]
fn half_precision_takes_the_golden_steps_of_smollm2() {
    let Some(choice) = half("half_precision_takes_the_golden_steps_of_smollm2") else { return };
    golden_half::smollm2_takes_its_steps(&choice.target, &choice.device);
}
