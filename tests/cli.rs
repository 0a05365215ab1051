//! The command line: bad requests are refused with a clear message and exit code 2, and leave nothing behind.

mod workbench;

use std::path::Path;

use workbench::{Bench, Output};

/// A request that must be refused: exit code 2, an `error:` line with these parts, no run left behind.
fn refused(bench: &Bench, output: &Output, parts: &[&str]) {
    assert_eq!(output.code, 2, "{}", output.all());
    assert!(output.err.starts_with("error: "), "{}", output.all());
    for part in parts {
        assert!(output.err.contains(part), "`{part}` is missing in:\n{}", output.err);
    }
    assert!(!output.err.contains('\x1b'), "colour without a terminal:\n{}", output.err);
    assert_eq!(bench.run_folders(), Vec::<std::path::PathBuf>::new(), "a refused request left a run behind");
}

fn train(bench: &Bench, settings: &[&str]) -> Output {
    let mut arguments = vec!["train", "--json"];
    let model = bench.model();
    let data = bench.data();
    arguments.extend(["--model", &model, "--data", &data]);
    for setting in settings {
        arguments.extend(["--set", setting]);
    }
    bench.tune(&arguments)
}

#[test]
fn an_unknown_key_names_the_nearest_one_and_the_line() {
    let bench = Bench::new();
    let file = bench.write("run.toml", "[model]\nid = \"demo\"\n\n[train]\nlearning_rat = 1e-4\n");
    let output = bench.tune(&["train", &file]);
    refused(
        &bench,
        &output,
        &["run.toml:5: unknown key train.learning_rat", "hint: did you mean train.learning_rate?"],
    );
}

#[test]
fn names_of_other_trainers_are_translated() {
    let bench = Bench::new();
    let file = bench.write("run.toml", "[method]\nlora_r = 8\n\n[train]\nnum_train_epochs = 3\n");
    let output = bench.tune(&["train", &file]);
    refused(&bench, &output, &["run.toml:2: unknown key method.lora_r", "method.rank", "run.toml:5", "train.epochs"]);
    refused(&bench, &train(&bench, &["gradient_accumulation_steps=4"]), &["train.batch"]);
}

#[test]
fn a_value_out_of_range_or_of_the_wrong_type_names_key_value_and_what_is_allowed() {
    let bench = Bench::new();
    refused(
        &bench,
        &train(&bench, &["learning_rate=-1"]),
        &["train.learning_rate = -1", "a number above 0, at most 1"],
    );
    refused(&bench, &train(&bench, &["batch=eight"]), &["train.batch = \"eight\"", "a whole number from 1"]);
    refused(&bench, &train(&bench, &["schedule=cosin"]), &["linear, cosine, constant", "did you mean \"cosine\"?"]);
    refused(&bench, &train(&bench, &["nonsense"]), &["`nonsense` is no setting", "key=value"]);
}

#[test]
fn the_device_has_a_flag_of_its_own() {
    let bench = Bench::new();
    let (model, data) = (bench.model(), bench.data());
    let output = bench.tune(&["train", "--model", &model, "--data", &data, "--device", "gpu"]);
    refused(&bench, &output, &["engine.device = \"gpu\"", "auto, cpu, wgpu, wgpu:N, cuda, cuda:N"]);
    assert!(!output.err.contains("--set"), "{}", output.err);
    let output = bench.tune(&["plan", "--model", &model, "--data", &data, "--device", "cpu"]);
    assert!(output.code == 0 && output.out.contains("(asked for)"), "{}", output.all());
    let output = bench.tune(&["new", "--device", "wgpu:1", "--out", "-"]);
    assert!(output.code == 0 && output.out.contains("device = \"wgpu:1\""), "{}", output.all());
}

#[test]
fn what_no_engine_can_do_is_refused_by_name() {
    let bench = Bench::new();
    let cpu = "engine.device=cpu";
    refused(&bench, &train(&bench, &[cpu, "optimizer_memory=host"]), &["train.optimizer_memory = \"host\"", "cpu"]);
    refused(&bench, &train(&bench, &[cpu, "precision=fp8"]), &["engine.precision = \"fp8\"", "cpu"]);
}

#[test]
fn without_model_and_data_there_is_nothing_to_train() {
    let bench = Bench::new();
    refused(&bench, &bench.tune(&["train"]), &["there is nothing to train", "--model"]);
    refused(&bench, &bench.tune(&["train", "--model", "demo"]), &["data.train is not set"]);
    refused(&bench, &bench.tune(&["train", "missing.toml"]), &["missing.toml", "cannot be read", "tune new"]);
    refused(&bench, &bench.tune(&["train", "--model", "nowhere", "--data", &bench.data()]), &["no model nowhere"]);
    refused(&bench, &bench.tune(&["train", "--model", "own/er", "--data", &bench.data()]), &["own/er", "cache"]);
    refused(&bench, &bench.tune(&["train", "--model", &bench.model(), "--data", "gone.jsonl"]), &["gone.jsonl"]);
}

#[test]
fn a_model_that_is_not_there_is_named_with_what_to_do() {
    let bench = Bench::new();
    for model in ["no/such/folder", "nobody/no-such-model-1b"] {
        let output = bench
            .prepare(std::process::Command::new(env!("CARGO_BIN_EXE_tune")), &bench.home(), &[])
            .args(["train", "--json", "--model", model, "--data", &bench.data()])
            .env("HF_HUB_OFFLINE", "1")
            .spawn()
            .unwrap();
        refused(&bench, &workbench::finish(output), &[model, "hint: "]);
    }
}

#[test]
fn model_folders_that_cannot_be_used_are_refused() {
    let bench = Bench::new();
    let with = |name: &str, change: &dyn Fn(&Path)| {
        let folder = bench.path().join(name);
        bench.copy_model(&folder);
        change(&folder);
        bench.tune(&["train", "--json", "--model", folder.to_str().unwrap(), "--data", &bench.data()])
    };
    let weights = "model.safetensors";
    let output = with("empty", &|folder| std::fs::remove_file(folder.join("config.json")).unwrap());
    refused(&bench, &output, &["config.json"]);
    let output = with("pickle", &|folder| {
        std::fs::rename(folder.join(weights), folder.join("pytorch_model.bin")).unwrap();
    });
    refused(&bench, &output, &["pytorch_model.bin", "pickle"]);
    let output = with("truncated", &|folder| {
        let whole = std::fs::read(folder.join(weights)).unwrap();
        std::fs::write(folder.join(weights), &whole[..whole.len() / 2]).unwrap();
    });
    refused(&bench, &output, &[weights]);
    let output = with("lying", &|folder| {
        let mut whole = std::fs::read(folder.join(weights)).unwrap();
        whole[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(folder.join(weights), whole).unwrap();
    });
    refused(&bench, &output, &[weights]);
    let output = with("unknown", &|folder| {
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        std::fs::write(
            folder.join("config.json"),
            config.replace("LlamaForCausalLM", "WhaleForCausalLM").replace("\"llama\"", "\"whale\""),
        )
        .unwrap();
    });
    refused(&bench, &output, &["WhaleForCausalLM", "Llama"]);
}

#[test]
fn data_that_cannot_be_used_is_refused() {
    let bench = Bench::new();
    let with = |name: &str, text: &str, settings: &[&str]| {
        let file = bench.write(name, text);
        let model = bench.model();
        let mut arguments = vec!["train", "--json", "--model", &model, "--data", &file];
        settings.iter().for_each(|setting| arguments.extend(["--set", setting]));
        bench.tune(&arguments)
    };
    let output = with("broken.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"\n{\"text\": \"three\"}\n", &[]);
    refused_in_run(&bench, &output, &["broken.jsonl line 2", "mend or delete that line"]);
    refused_in_run(&bench, &with("none.jsonl", "", &[]), &["none.jsonl"]);
    let masked = "{\"input_ids\": [1, 2, 3, 4], \"labels\": [-100, -100, -100, -100]}\n".repeat(8);
    refused_in_run(&bench, &with("masked.jsonl", &masked, &["format=tokens"]), &["mask"]);
    let output = with("long.jsonl", "{\"text\": \"one two three\"}\n{\"text\": \"four\"}\n", &["max_length=4000000"]);
    refused_in_run(&bench, &output, &["max_length", "4000000"]);
}

/// A request that the worker refused: the events tell of it, and the run is gone again.
fn refused_in_run(bench: &Bench, output: &Output, parts: &[&str]) {
    assert_eq!(output.code, 2, "{}", output.all());
    let text = output.all();
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    assert_eq!(bench.run_folders(), Vec::<std::path::PathBuf>::new(), "a refused request left a run behind");
}

#[test]
fn a_home_that_cannot_be_written_is_named() {
    let bench = Bench::new();
    // A file in the place of the folder: permissions do not bind root.
    let file = bench.write("file", "");
    let output = bench.tune_at(Path::new(&file), &["train", "--model", &bench.model(), "--data", &bench.data()]);
    assert_eq!(output.code, 2, "{}", output.all());
    assert!(output.err.contains("runs cannot be kept in"), "{}", output.err);
    assert!(output.err.contains("hint: ") && output.err.contains("TUNE_HOME"), "{}", output.err);
}

#[test]
fn verbs_that_do_not_exist_are_not_shown() {
    let bench = Bench::new();
    let help = bench.tune(&["--help"]);
    assert_eq!(help.code, 0);
    for verb in ["train", "plan", "runs", "logs", "wait", "stop", "resume", "new", "doctor", "compare", "rm"] {
        assert!(help.out.lines().any(|line| line.trim_start().starts_with(verb)), "{verb} is missing:\n{}", help.out);
    }
    for verb in ["eval", "export", "serve", "push", "worker", "help"] {
        assert!(!help.out.lines().any(|line| line.trim_start().starts_with(verb)), "{verb} is shown:\n{}", help.out);
    }
    refused(&bench, &bench.tune(&["trian"]), &["trian is neither a verb nor a file", "did you mean `tune train`?"]);
}

#[test]
fn a_run_that_is_not_there_is_said_with_what_to_do() {
    let bench = Bench::new();
    assert_eq!(bench.tune(&["runs", "--json"]).json()["runs"], serde_json::json!([]));
    for verb in ["logs", "wait", "stop", "resume", "attach", "pause", "continue", "save", "rm"] {
        let output = bench.tune(&[verb, "@last"]);
        refused(&bench, &output, &["there are no runs in", "hint: `tune demo` makes one"]);
    }
    refused(&bench, &bench.tune(&["set", "@last", "learning_rate=1e-4"]), &["there are no runs"]);
    refused(&bench, &bench.tune(&["set", "@last", "rank=3"]), &["method.rank cannot be changed while a run goes on"]);
    refused(&bench, &bench.tune(&["set", "@last", "learning_rate=7"]), &["a number above 0, at most 1"]);
}

#[test]
fn new_writes_a_file_that_train_reads_and_never_writes_over_one() {
    let bench = Bench::new();
    let file = bench.path().join("run.toml");
    let name = file.to_str().unwrap();
    let output = bench.tune(&["new", "--model", &bench.model(), "--data", &bench.data(), "--out", name]);
    assert_eq!(output.code, 0, "{}", output.all());
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("[train]") && text.contains("# peak of the schedule"), "{text}");
    let spec = tune::spec::RunSpec::read(&file, &[]).unwrap();
    assert_eq!(spec.model.id, bench.model());
    assert!(spec.data.max_length < 2048, "the data's longest row decides");
    let output = bench.tune(&["new", "--out", name]);
    refused(&bench, &output, &["is there already", "--force"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
}

#[test]
fn a_plan_is_made_without_a_run_and_says_every_figure() {
    let bench = Bench::new();
    let (model, data) = (bench.model(), bench.data());
    let arguments = ["plan", "--model", &model, "--data", &data, "--set", "device=cpu", "--set", "eval=0.25"];
    let table = bench.tune(&arguments);
    assert_eq!(table.code, 0, "{}", table.all());
    for part in ["weights", "optimizer", "activations", "peak", "micro-batches of", "GFLOP", "estimated"] {
        assert!(table.out.contains(part), "`{part}` is missing in:\n{}", table.out);
    }
    let output = bench.tune(&[&arguments[..], &["--json", "--measure"]].concat()).json();
    let bytes = output["bytes"].as_object().unwrap();
    let sum: u64 = bytes.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(output["peak_bytes"].as_u64().unwrap(), sum);
    let measured = output["measured"].as_array().unwrap();
    let share: f64 = measured.iter().map(|row| row["share"].as_f64().unwrap()).sum();
    assert!((share - 2.0).abs() < 1e-6, "shares of micro and update add up to 1 each, not {share}");
    assert!(bench.run_folders().is_empty());
}

#[test]
fn a_reader_that_has_enough_is_no_failure() {
    let bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let (model, data) = (bench.model(), bench.data());
    let mut command = bench.command(&["plan", "--model", &model, "--data", &data, "--device", "cpu"]);
    let output = command.stdout(writer).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("panicked"), "{}: {said}", output.status);
}

#[test]
fn a_plan_that_does_not_fit_is_refused_before_anything_starts() {
    let bench = Bench::new();
    let output = train(&bench, &["device=cpu", "vram=10KiB"]);
    refused_in_run(&bench, &output, &["needs"]);
}

#[test]
fn a_card_is_planned_for_by_its_whole_name() {
    let bench = Bench::new();
    let plan = |card: &str, more: &[&str]| {
        let (model, data) = (bench.model(), bench.data());
        bench.tune(&[&["plan", "--model", &model, "--data", &data, "--card", card][..], more].concat())
    };
    let output = plan("NVIDIA GeForce RTX 4060 Ti 8GB", &[]);
    assert!(output.code == 0 && output.out.contains("RTX 4060 Ti (known by name"), "{}", output.all());
    refused(&bench, &plan("RTX A1000", &[]), &["RTX A1000", "no card that is known here", "RTX 4090"]);
    refused(&bench, &plan("Tesla T4", &[]), &["compute capability 7.5", "8.0 and newer", "WGSL engine"]);
    let output = plan("RTX 4090", &["--set", "engine.device=cpu"]);
    refused(&bench, &output, &["--card plans for the CUDA engine", "engine.device = \"cpu\""]);
}

#[test]
fn doctor_names_engines_and_folders() {
    let bench = Bench::new();
    let output = bench.tune(&["doctor", "--json"]);
    assert_eq!(output.code, 0, "{}", output.all());
    let diagnosis = output.json();
    let engines = diagnosis["engines"].as_array().unwrap();
    let cpu = engines.iter().find(|engine| engine["engine"] == "cpu").unwrap();
    assert_eq!(cpu["usable"], true);
    // Adapters by the number that `wgpu:N` takes, or what to install.
    let wgpu = engines.iter().find(|engine| engine["engine"] == "wgpu").unwrap();
    for finding in wgpu["findings"].as_array().unwrap() {
        let adapter = finding["name"].as_str().unwrap().starts_with("wgpu:");
        assert!(adapter || finding["mend"].as_str().unwrap().contains("install"), "{finding}");
    }
    let table = bench.tune(&["doctor"]);
    assert!(table.out.contains("cpu can be used") && table.out.contains("runs"), "{}", table.out);
}
