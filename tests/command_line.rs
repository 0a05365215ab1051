//! The golden LoRA runs through the command line alone: `tune train --json` on rows of tokens, from an adapter of PEFT's.

mod support;
mod workbench;

use std::path::Path;

use serde_json::{Value, json};
use support::{Golden, assets, distance, numbers, relative, smollm2};
use tune::model::Model;
use tune::model::adapter::Adapter;
use workbench::{Bench, of_kind};

const LOSS: f64 = 2e-5;
const NORM: f64 = 1e-4;

/// The rows of the golden batches without their padding, in the format `tokens`.
fn rows(golden: &Path) -> String {
    let batches = Golden::open(&golden.join("batches.safetensors"));
    let (ids, labels, masks) = (batches.rows("input_ids"), batches.rows("labels"), batches.rows("attention_mask"));
    let row = |((ids, labels), mask): ((&Vec<i64>, &Vec<i64>), &Vec<i64>)| {
        let length = mask.iter().filter(|&&kept| kept != 0).count();
        format!("{}\n", json!({ "input_ids": ids[..length], "labels": labels[..length] }))
    };
    ids.iter().zip(&labels).zip(&masks).map(row).collect()
}

/// Trains from an adapter of the golden folder; gives the updates' events and the adapter at the end.
fn train(bench: &Bench, golden: &Path, model: &Path, start: &str, settings: &[&str]) -> (Vec<Value>, Adapter) {
    let data = bench.write("golden.jsonl", &rows(golden));
    let text = |path: &Path| path.canonicalize().unwrap().to_str().unwrap().to_owned();
    let mut arguments = vec!["train".to_owned(), "--json".into(), "--model".into(), text(model), "--data".into(), data];
    let start = format!("method.init={}", text(&golden.join(start)));
    let common = [
        "engine.device=cpu",
        "data.format=tokens",
        "data.shuffle=false",
        "data.eval=0",
        "data.max_length=128",
        "method.kind=lora",
        "method.rank=8",
        "method.alpha=16",
        "train.eval_every=0",
        "train.save_every=0",
        start.as_str(),
    ];
    for setting in common.iter().chain(settings) {
        arguments.extend(["--set".to_owned(), (*setting).to_owned()]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut command = bench.command(&arguments);
    command.env_remove("RAYON_NUM_THREADS");
    let output = workbench::finish(command.spawn().unwrap());
    assert_eq!(output.code, 0, "{}", output.all());
    let updates = of_kind(&output.events(), "step").into_iter().cloned().collect();
    let config = Model::open(model, 0).unwrap().config;
    (updates, Adapter::read(&bench.only_run().join("adapter"), &config).unwrap())
}

fn agree(updates: &[Value], losses: &Value, norms: &Value) {
    let (losses, norms) = (numbers(losses), numbers(norms));
    assert_eq!(updates.len(), losses.len());
    let mut most = (0.0f64, 0.0f64);
    for (update, (loss, norm)) in updates.iter().zip(losses.into_iter().zip(norms)) {
        let error = relative(update["loss"].as_f64().unwrap(), loss);
        let norm_error = relative(update["grad_norm"].as_f64().unwrap(), norm);
        assert!(
            error <= LOSS && norm_error <= NORM,
            "{update}: loss {loss} ({error:.1e}), norm {norm} ({norm_error:.1e})"
        );
        most = (most.0.max(error), most.1.max(norm_error));
    }
    println!("{} updates: losses within {:.1e}, norms within {:.1e}", updates.len(), most.0, most.1);
}

#[test]
fn the_command_line_takes_the_golden_lora_steps() {
    let name = "the_command_line_takes_the_golden_lora_steps";
    let (Some(assets), Some(model)) = (assets(name), smollm2(name)) else { return };
    let golden = assets.join("golden");
    let bench = Bench::new();
    let settings = [
        "train.steps=20",
        "train.batch=2",
        "train.learning_rate=2e-4",
        "train.schedule=constant",
        "train.warmup=0",
        "train.weight_decay=0",
        "train.max_grad_norm=0",
    ];
    let (updates, adapter) = train(&bench, &golden, &model, "lora_init", &settings);
    let reference = support::json(&golden.join("lora.json"));
    agree(&updates, &reference["losses"], &reference["grad_norms"]);
    let config = Model::open(&model, 0).unwrap().config;
    let expected = Adapter::read(&golden.join("lora_final"), &config).unwrap();
    let all = |adapter: &Adapter| -> Vec<f32> {
        adapter.tensors.values().flat_map(|tensor| tensor.values.iter().copied()).collect()
    };
    let expected: Vec<f64> = all(&expected).into_iter().map(f64::from).collect();
    let error = distance(&all(&adapter), &expected);
    println!("the adapter: within {error:.1e}");
    assert!(error <= 1e-3, "the adapter: {error:.1e}");
}

#[test]
fn the_command_line_takes_the_golden_steps_with_schedule_clipping_and_decay() {
    let name = "the_command_line_takes_the_golden_steps_with_schedule_clipping_and_decay";
    let (Some(assets), Some(model)) = (assets(name), smollm2(name)) else { return };
    let golden = assets.join("golden");
    let bench = Bench::new();
    let settings = [
        "train.steps=10",
        "train.batch=4",
        "train.learning_rate=1e-3",
        "train.schedule=cosine",
        "train.warmup=3",
        "train.weight_decay=0.1",
        "train.betas=[0.9, 0.95]",
        "train.max_grad_norm=0.5",
    ];
    let (updates, _) = train(&bench, &golden, &model, "lora_final", &settings);
    let reference = support::json(&golden.join("schedule.json"));
    agree(&updates, &reference["losses"], &reference["grad_norms_before_clipping"]);
    for (update, rate) in updates.iter().zip(numbers(&reference["learning_rates"])) {
        let found = update["learning_rate"].as_f64().unwrap();
        assert!((found - rate).abs() <= 1e-9, "{update}: the rate is not {rate}");
    }
}
