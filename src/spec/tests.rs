use super::*;

fn problem(text: &str) -> Problem {
    let error = RunSpec::parse(text, "run.toml").expect_err("the file is wrong");
    assert_eq!(error.problems.len(), 1, "{error}");
    error.problems[0].clone()
}

#[test]
fn every_key_of_the_table_is_a_field_of_the_spec_and_the_other_way_round() {
    let mut spec = RunSpec::default();
    spec.train.steps = Some(60);
    spec.train.learning_rate = Some(2e-4);
    let file = spec.table();
    for key in keys::KEYS {
        assert!(file[key.section].get(key.name).is_some(), "{} is in the table and in no struct", key.path());
        if let Some(value) = key.default_value() {
            assert!(key.domain.accepts(&value), "the default of {} is not allowed", key.path());
        }
    }
    for (section, values) in &file {
        for name in values.as_table().unwrap().keys() {
            assert!(keys::find(section, name).is_some(), "{section}.{name} is in a struct and not in the table");
        }
    }
}

#[test]
fn no_synonym_is_a_key_or_means_two_keys_of_a_section() {
    let mut seen = std::collections::BTreeSet::new();
    for key in keys::KEYS {
        for synonym in key.synonyms {
            assert!(keys::find(key.section, synonym).is_none(), "{synonym} is a key of [{}]", key.section);
            assert!(seen.insert((key.section, *synonym)), "{synonym} means two keys of [{}]", key.section);
        }
    }
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let mut spec = RunSpec::default();
    spec.model.id = "a \"quoted\" folder".into();
    spec.data.train = TrainData::Sources(vec![DataSource {
        path: "rows.jsonl".into(),
        columns: [("prompt".to_owned(), "question".to_owned())].into(),
        ..DataSource::default()
    }]);
    spec.data.eval = EvalData::Path("held.jsonl".into());
    spec.data.system = "two\nlines".into();
    spec.method.targets = Targets::List(vec!["q_proj".into(), "v_proj".into()]);
    spec.train.learning_rate = Some(3.3e-5);
    assert_eq!(RunSpec::parse(&spec.commented(), "").unwrap(), spec);
    spec.resolved = Some(Resolved {
        version: "1".into(),
        created: "now".into(),
        data: [("/a b/rows.jsonl".to_owned(), "00ff".to_owned())].into(),
        changes: vec![Change { step: 3, key: "learning_rate".into(), value: 1e-5 }],
    });
    assert_eq!(RunSpec::parse(&spec.resolved_toml(), "").unwrap(), spec);
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_one_and_its_line() {
    let problem = problem("[model]\nid = \"demo\"\n[train]\nlearning_rat = 1e-4\n");
    assert_eq!(problem.line, Some(4));
    assert_eq!(problem.message, "unknown key train.learning_rat");
    assert_eq!(problem.hint.as_deref(), Some("did you mean train.learning_rate?"));
}

#[test]
fn names_of_other_trainers_are_known() {
    for (section, name, key) in [
        ("method", "lora_r", "method.rank"),
        ("method", "target_modules", "method.targets"),
        ("train", "per_device_train_batch_size", "train.batch"),
        ("train", "gradient_accumulation_steps", "train.batch"),
        ("train", "num_train_epochs", "train.epochs"),
        ("train", "lr_scheduler_type", "train.schedule"),
        ("data", "sequence_len", "data.max_length"),
        ("data", "cutoff_len", "data.max_length"),
        ("data", "val_set_size", "data.eval"),
        ("engine", "gradient_checkpointing", "engine.recompute"),
        ("model", "base_model", "model.id"),
    ] {
        let hint = problem(&format!("[{section}]\n{name} = 1\n")).hint.unwrap();
        assert!(hint.contains(&format!("here it is {key}:")), "{name}: {hint}");
    }
    let hint = problem("lora_r = 8\n").hint.unwrap();
    assert!(hint.contains("method.rank"), "{hint}");
    assert!(problem("[train]\noutput_dir = \"x\"\n").hint.unwrap().contains("TUNE_HOME"));
    assert_eq!(problem("[lora]\nr = 8\n").hint.unwrap(), "here it is [method]");
    assert_eq!(problem("[train]\nrank = 8\n").hint.unwrap(), "it belongs under [method]: method.rank");
}

#[test]
fn a_value_out_of_range_names_key_value_and_what_is_allowed() {
    let problem = problem("[train]\nlearning_rate = -1.0\n");
    assert_eq!(problem.message, "train.learning_rate = -1.0 is not allowed: a number above 0, at most 1");
    assert_eq!(problem.line, Some(2));
}

#[test]
fn wrong_types_and_wrong_words_are_refused() {
    for (text, part) in [
        ("[train]\nbatch = \"eight\"\n", "train.batch = \"eight\" is not allowed: a whole number from 1 to 65536"),
        ("[train]\nbatch = 0\n", "a whole number from 1"),
        ("[train]\nbatch = 99999999999999999999\n", "a whole number from 1"),
        ("[train]\nschedule = \"cosin\"\n", "linear, cosine, constant"),
        ("[train]\nbetas = [0.9]\n", "two numbers"),
        ("[train]\nwarmup = 1.5\n", "a fraction from 0 to below 1"),
        ("[train]\nepochs = nan\n", "a number above 0"),
        ("[data]\npacking = 1\n", "true or false"),
        ("[data]\neval = 1.0\n", "a fraction from 0 to below 1"),
        ("[method]\ntargets = []\n", "all-linear"),
        ("[method]\ntargets = \"everything\"\n", "all-linear"),
        ("[engine]\nvram = \"much\"\n", "22GiB"),
        ("[engine]\ndevice = \"tpu\"\n", "auto, cpu, wgpu"),
        ("[data]\ntrain = [{ file = \"x\" }]\n", "unknown key data.train.file"),
        ("[data]\ntrain = []\n", "an empty list"),
        ("train = 3\n", "train is a section"),
        ("[train\n", "is not TOML"),
    ] {
        let problem = problem(text);
        assert!(problem.message.contains(part), "{text}: {}", problem.message);
        assert!(problem.line.is_some(), "{text}");
    }
    assert_eq!(problem("[train]\nschedule = \"cosin\"\n").hint.unwrap(), "did you mean \"cosine\"?");
}

#[test]
fn all_problems_are_told_at_once_in_the_order_of_the_file() {
    let error = RunSpec::parse("[train]\nbatch = 0\n[method]\nrang = 8\n[train2]\n", "x.toml").unwrap_err();
    let lines: Vec<_> = error.problems.iter().map(|problem| problem.line.unwrap()).collect();
    assert_eq!(lines, [2, 4, 5]);
}

#[test]
fn settings_need_no_quotes_and_no_section_where_the_name_is_unique() {
    let mut spec = RunSpec::default();
    let settings = [
        "learning_rate=1e-4",
        "model.id=some folder",
        "method.targets=q_proj,v_proj",
        "data.eval=0",
        "eval=held.jsonl",
        "sample.prompts=[\"a\", \"b\"]",
        "engine.vram=\"22GiB\"",
        "steps=3",
        "alpha=32",
    ];
    // `train` is a section and a key: `data.train` alone has a value.
    spec.apply(&settings.map(String::from)).unwrap();
    assert_eq!(spec.train.learning_rate, Some(1e-4));
    assert_eq!(spec.model.id, "some folder");
    assert_eq!(spec.method.targets, Targets::List(vec!["q_proj".into(), "v_proj".into()]));
    assert_eq!(spec.data.eval, EvalData::Path("held.jsonl".into()));
    assert_eq!(spec.sample.prompts, ["a", "b"]);
    assert_eq!(spec.engine.vram, "22GiB");
    assert_eq!(spec.method.alpha, 32.0);
    let error = spec.apply(&["lora_r=8".into(), "nothing".into(), "batch=x".into()]).unwrap_err();
    assert_eq!(error.problems.len(), 3);
    assert!(error.to_string().contains("method.rank"), "{error}");
    assert_eq!(spec.train.batch, 8);
}

#[test]
fn each_engine_refuses_by_name_what_it_cannot_do() {
    let mut spec = RunSpec::default();
    let cpu = Capabilities::of("cpu").unwrap();
    cpu.check(&spec).unwrap();
    spec.engine.precision = "fp8".into();
    let message = cpu.check(&spec).unwrap_err().to_string();
    assert_eq!(message, "engine.precision = \"fp8\": the cpu engine cannot do that yet (it does auto, f32)");
}

#[test]
fn every_engine_holds_weights_in_four_and_eight_bits_and_only_one_in_8_bit_floats() {
    for (engine, eight_bit_floats) in [("cpu", false), ("wgpu", false), ("cuda", true)] {
        let engine = Capabilities::of(engine).unwrap();
        for (setting, allowed) in [
            ("method.kind=qlora", true),
            ("model.weights=nf4", true),
            ("model.weights=int8", true),
            ("model.weights=fp8", eight_bit_floats),
        ] {
            let mut spec = RunSpec::default();
            spec.apply(&[setting.into()]).unwrap();
            assert_eq!(engine.check(&spec).is_ok(), allowed, "{} with {setting}", engine.engine);
        }
    }
}

#[test]
fn fp8_is_for_frozen_weights_of_one_kind() {
    let cases = [
        (["method.kind=full", "engine.precision=fp8"], "engine.precision"),
        (["method.kind=qlora", "engine.precision=fp8"], "engine.precision"),
        (["model.weights=nf4", "engine.precision=fp8"], "model.weights"),
        (["model.weights=fp8", "engine.precision=bf16"], "engine.precision"),
    ];
    for (settings, key) in cases {
        let mut spec = RunSpec::default();
        spec.apply(&["model.id=demo".into(), "data.train=demo".into()]).unwrap();
        check::consistent(&spec).unwrap();
        spec.apply(&settings.map(String::from)).unwrap();
        let error = check::consistent(&spec).unwrap_err();
        assert_eq!((error.problems.len(), error.problems[0].key.as_str()), (1, key), "{error}");
        assert!(error.to_string().contains("fp8"), "{error}");
    }
}

#[test]
fn contradictions_are_refused() {
    let mut spec = RunSpec::default();
    let message = check::consistent(&spec).unwrap_err().to_string();
    assert!(message.contains("model.id is not set") && message.contains("data.train is not set"), "{message}");
    spec.model.id = "demo".into();
    spec.data.train = TrainData::Path("demo".into());
    check::consistent(&spec).unwrap();
    spec.method.kind = MethodKind::Full;
    spec.method.init = "adapter".into();
    assert!(check::consistent(&spec).unwrap_err().to_string().contains("method.init"));
}
