//! Training through the command line on the tiny model: where its weights come from, and when a run ends.

#[path = "twin/quantized.rs"]
mod quantized;
mod workbench;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tune::program::DType;
use workbench::{Bench, Output, of_kind};

/// Trains a model of this folder with a few settings.
fn train(bench: &Bench, model: &Path, settings: &[&str]) -> Output {
    let data = bench.data();
    let mut arguments = vec!["train", "--json", "--model", model.to_str().unwrap(), "--data", &data];
    for setting in ["engine.device=cpu", "data.max_length=64", "train.batch=4"].iter().chain(settings) {
        arguments.extend(["--set", setting]);
    }
    bench.tune(&arguments)
}

fn losses(output: &Output) -> Vec<f64> {
    assert_eq!(output.code, 0, "{}", output.all());
    of_kind(&output.events(), "step").iter().map(|step| step["loss"].as_f64().unwrap()).collect()
}

fn copy(bench: &Bench, name: &str) -> PathBuf {
    let folder = bench.path().join(name);
    bench.copy_model(&folder);
    folder
}

#[test]
fn shards_and_one_file_are_the_same_model() {
    let bench = Bench::new();
    let settings = ["train.steps=3", "data.eval=0"];
    let whole = losses(&train(&bench, Path::new(&bench.model()), &settings));

    let folder = copy(&bench, "sharded");
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    for shard in 0..2 {
        let name = format!("model-{:05}-of-00002.safetensors", shard + 1);
        let part: Vec<_> = file.iter().enumerate().filter(|(index, _)| index % 2 == shard).map(|(_, t)| t).collect();
        map.extend(part.iter().map(|(tensor, _)| ((*tensor).to_owned(), Value::from(name.clone()))));
        safetensors::serialize_to_file(part, None, &folder.join(name)).unwrap();
    }
    let index = json!({ "metadata": {}, "weight_map": map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    assert_eq!(losses(&train(&bench, &folder, &settings)), whole);
}

#[test]
fn a_folder_without_weights_starts_from_random_ones_and_says_so() {
    let bench = Bench::new();
    let folder = copy(&bench, "random");
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let settings = ["method.kind=full", "train.steps=20", "train.learning_rate=1e-3", "data.eval=0"];
    let found = losses(&train(&bench, &folder, &settings));
    // A vocabulary of 512, all words alike at the start.
    assert!((found[0] - 512f64.ln()).abs() < 0.5 && found[19] < found[0] - 0.3, "{found:?}");
    let adapter = train(&bench, &folder, &["train.steps=1"]);
    assert!(of_kind(&adapter.events(), "warning").iter().any(|event| event["rule"] == "random weights"));
}

/// A copy of the model with the matrices of its projections at the values that quantized ones have.
fn rounded_copy(bench: &Bench, dtype: DType) -> PathBuf {
    let folder = copy(bench, dtype.name());
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut held: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, tensor) in file.iter() {
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
        let mut bytes = tensor.data().to_vec();
        if name.ends_with("_proj.weight") {
            let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
            let rounded = quantized::rounded(dtype, &values, tensor.shape()[1]);
            bytes = rounded.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect();
        }
        held.insert(name.to_owned(), (tensor.shape().to_vec(), bytes));
    }
    let views = held.iter().map(|(name, (shape, bytes))| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    folder
}

/// LoRA on 4 or 8 bits takes the very steps that it takes on the values which those bits stand for, in less memory.
#[test]
fn a_run_on_quantized_weights_is_one_on_the_values_they_stand_for() {
    let bench = Bench::new();
    let settings = ["train.steps=12", "train.learning_rate=1e-2", "train.eval_every=6", "data.eval=0.2"];
    let planned = |output: &Output| {
        let events = output.events();
        let plan = of_kind(&events, "plan")[0];
        (plan["bytes"]["weights"].as_u64().unwrap(), plan["peak_bytes"].as_u64().unwrap())
    };
    for (dtype, kind) in [(DType::Nf4, "method.kind=qlora"), (DType::Int8, "model.weights=int8")] {
        let whole = train(&bench, &rounded_copy(&bench, dtype), &settings);
        let packed = train(&bench, Path::new(&bench.model()), &[&settings[..], &[kind]].concat());
        let (expected, found) = (losses(&whole), losses(&packed));
        assert!(found[11] < found[0] - 0.3, "{kind}: {found:?}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found / expected - 1.0).abs() < 2e-5, "{kind}: {found} beside {expected}");
        }
        let evaluations = |output: &Output| of_kind(&output.events(), "eval").remove(0)["loss"].as_f64().unwrap();
        assert!((evaluations(&packed) / evaluations(&whole) - 1.0).abs() < 2e-5, "{kind}");
        let ((whole, whole_peak), (packed, packed_peak)) = (planned(&whole), planned(&packed));
        assert!(packed < whole && whole_peak - packed_peak == whole - packed, "{kind}: {packed} of {whole} bytes");
    }
}

#[test]
fn a_cpu_has_no_8_bit_floats_and_full_training_no_quantized_weights() {
    let bench = Bench::new();
    for (settings, words) in [
        (&["model.weights=fp8"][..], "model.weights = \"fp8\""),
        (&["engine.precision=fp8"], "engine.precision = \"fp8\""),
        (&["method.kind=full", "model.weights=nf4"], "model.weights = \"nf4\""),
        (&["method.kind=qlora", "model.weights=int8"], "model.weights = \"int8\""),
    ] {
        let output = train(&bench, Path::new(&bench.model()), settings);
        assert_eq!(output.code, 2, "{}", output.all());
        assert!(output.err.contains(words), "{words}: {}", output.err);
    }
    assert_eq!(bench.run_folders(), Vec::<PathBuf>::new());
}

#[test]
fn a_configuration_that_means_other_mathematics_is_refused_by_name() {
    let bench = Bench::new();
    for (key, value) in [
        ("hidden_act", json!("relu")),
        ("rope_scaling", json!({ "rope_type": "no_such_kind", "factor": 2.0 })),
        ("quantization_config", json!({ "quant_method": "gptq" })),
    ] {
        let folder = copy(&bench, key);
        let path = folder.join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let output = train(&bench, &folder, &["train.steps=1"]);
        assert_eq!(output.code, 2, "{}", output.all());
        assert!(output.err.contains(key.trim_end_matches("_scaling")), "{key}: {}", output.err);
        assert_eq!(bench.run_folders(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_run_that_no_longer_improves_ends_early_with_its_best_state() {
    let bench = Bench::new();
    // Held-out rows that contradict the others: learning these makes those worse.
    let held_out = bench.write("held_out.jsonl", &"{\"prompt\": \"x\", \"completion\": \" 7 7 7 7 7 7\"}\n".repeat(8));
    let settings = [
        format!("data.eval={held_out}"),
        "train.steps=200".into(),
        "train.eval_every=5".into(),
        "train.patience=3".into(),
        "train.learning_rate=5e-2".into(),
    ];
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let output = train(&bench, Path::new(&bench.model()), &settings);
    assert_eq!(output.code, 0, "{}", output.all());
    let shown = output.events();
    let finished = shown.last().unwrap();
    assert_eq!(finished["event"], "finished");
    assert!(finished["steps"].as_u64().unwrap() < 200, "{finished}");
    let evaluations = of_kind(&shown, "eval");
    let best = evaluations.iter().map(|eval| eval["loss"].as_f64().unwrap()).fold(f64::INFINITY, f64::min);
    let last = evaluations.last().unwrap();
    assert!(last["loss"].as_f64().unwrap() > best, "{evaluations:?}");
    let told = of_kind(&shown, "checkpoint").into_iter().filter(|event| event["best"] == true).count();
    // A best state before the first update has no checkpoint to go back to.
    if told > 0 {
        assert_eq!(finished["eval_loss"].as_f64().unwrap(), best);
    }
}

#[test]
fn samples_show_what_the_model_answers_on_the_way() {
    let bench = Bench::new();
    let settings = ["train.steps=4", "train.eval_every=2", "sample.prompts=[\"alpha 0?\", \"beta\"]", "data.eval=0.2"];
    let output = train(&bench, Path::new(&bench.model()), &settings);
    assert_eq!(output.code, 0, "{}", output.all());
    let shown = output.events();
    let samples = of_kind(&shown, "sample");
    assert!(samples.len() >= 4 && samples.iter().any(|sample| sample["prompt"] == "beta"), "{samples:?}");
    assert!(samples.iter().any(|sample| sample["step"] == 4), "{samples:?}");
}

/// A run has programs only for micro-batches that its rows fill.
#[test]
fn rows_of_one_length_need_few_sizes() {
    let bench = Bench::new();
    let row = |length: usize| format!("{}\n", json!({ "input_ids": vec![7; length] }));
    let sizes = |name: &str, lengths: [usize; 2]| {
        let data = bench.write(name, &lengths.map(row).concat().repeat(8));
        let settings = ["data.max_length=64", "train.batch=2", "train.steps=2", "data.eval=0", "engine.device=cpu"];
        let model = bench.model();
        let mut arguments = vec!["train", "--json", "--model", &model, "--data", &data];
        settings.iter().for_each(|setting| arguments.extend(["--set", setting]));
        let output = bench.tune(&arguments);
        assert_eq!(losses(&output).len(), 2);
        let plan = of_kind(&output.events(), "plan")[0].clone();
        plan["micro_sizes"].as_array().unwrap().iter().map(|size| size.as_u64().unwrap()).collect::<Vec<_>>()
    };
    let alike = sizes("alike.jsonl", [64, 64]);
    assert!(alike.iter().all(|size| size % 64 == 0) && alike.last() == Some(&128), "{alike:?}");
    let mixed = sizes("mixed.jsonl", [9, 64]);
    assert!(mixed.len() > alike.len() && mixed[0] < 64, "{mixed:?}");
}
