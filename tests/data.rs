//! Data: formats, templates, masks, splits, packing.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use tune::data::{self, ChatTemplate, DataError, IGNORED, Loaded, Message, Row};
use tune::model::tokenizer::Tokenizer;
use tune::spec::{DataSource, DataSpec, EvalData, LossOn, TooLong, TrainData};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tiny() -> Tokenizer {
    Tokenizer::open(&fixture("tiny/llama")).unwrap()
}

/// SmolLM2-135M-Instruct, which `tests/run.sh` makes.
fn smollm2() -> Option<Tokenizer> {
    let folder = std::env::var_os("TUNE_SMOLLM2")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m"), PathBuf::from);
    if !folder.join("tokenizer.json").exists() {
        println!("left out: SmolLM2 is not at {}", folder.display());
        return None;
    }
    Some(Tokenizer::open(&folder).unwrap())
}

/// A file of the shared assets, which are too large for the repository.
fn asset(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TUNE_ASSETS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"), PathBuf::from);
    let path = folder.join(name);
    if !path.exists() {
        println!("left out: no {}", path.display());
        return None;
    }
    Some(path)
}

fn spec(path: &Path) -> DataSpec {
    DataSpec {
        train: TrainData::Path(path.display().to_string()),
        eval: EvalData::Fraction(0.0),
        max_length: 128,
        ..DataSpec::default()
    }
}

fn load(spec: &DataSpec, tokenizer: &Tokenizer) -> Result<Loaded, DataError> {
    data::load(spec, 3407, Some(tokenizer), &|_| {})
}

/// Writes a data file, and loads it with the tiny tokenizer.
fn load_text(name: &str, text: &str, change: impl FnOnce(&mut DataSpec)) -> Result<Loaded, DataError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    let mut spec = spec(&path);
    change(&mut spec);
    load(&spec, &tiny())
}

/// The text of a row's targets.
fn trained(row: &Row, tokenizer: &Tokenizer) -> String {
    let ids: Vec<u32> = row.labels.iter().filter(|label| **label != IGNORED).map(|label| *label as u32).collect();
    tokenizer.decode(&ids, false).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    let fields = |turn: &Value| turn.as_object().unwrap().clone();
    value.as_array().unwrap().iter().map(|turn| Message { fields: fields(turn), weight: 1.0 }).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn golden_tokens() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("tokens.json")).unwrap()).unwrap()
}

fn check_tokenizer(tokenizer: &Tokenizer, golden: &Value) {
    for case in golden["strings"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let encoded = tokenizer.encode(text, true).unwrap();
        assert_eq!(encoded, ids(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&encoded, false).unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&encoded, true).unwrap(), case["decoded_skip_special"].as_str().unwrap());
        let mut stream = tokenizer.stream(false);
        let mut streamed: String = encoded.iter().map(|id| stream.push(*id).unwrap()).collect();
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, case["decoded"].as_str().unwrap(), "streamed");
    }
    let template = ChatTemplate::choose("auto", tokenizer).unwrap();
    check_chats(&template, Some(tokenizer), golden);
}

fn check_chats(template: &ChatTemplate, tokenizer: Option<&Tokenizer>, golden: &Value) {
    for case in golden["chats"].as_array().unwrap() {
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let text = template.render(&messages(&case["messages"]), Some(&case["tools"]), prompt).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        if let Some(tokenizer) = tokenizer {
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&case["ids"]));
        }
    }
}

#[test]
fn the_tiny_tokenizer_and_its_template_agree_with_transformers() {
    check_tokenizer(&tiny(), &golden_tokens()["tokenizers"]["tiny/llama"]);
}

#[test]
fn smollm2s_tokenizer_and_template_agree_with_transformers() {
    let Some(tokenizer) = smollm2() else { return };
    check_tokenizer(&tokenizer, &golden_tokens()["tokenizers"]["smollm2-135m"]);
}

#[test]
fn the_built_in_qwen_template_renders_tools_as_transformers_does() {
    let template = ChatTemplate::choose("qwen2.5", &tiny()).unwrap();
    check_chats(&template, None, &golden_tokens()["tokenizers"]["qwen2.5-coder-0.5b"]);
}

#[test]
fn labels_of_the_golden_batches_are_reproduced_from_the_raw_rows() {
    let (Some(tokenizer), Some(raw), Some(batches)) =
        (smollm2(), asset("data/llamafactory/alpaca_en_demo.json"), asset("golden/batches.safetensors"))
    else {
        return;
    };
    let loaded = load(&spec(&raw), &tokenizer).unwrap();
    let bytes = std::fs::read(batches).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |name: &str| -> Vec<i64> {
        let bytes = tensors.tensor(name).unwrap().data();
        bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (input_ids, labels, mask) = (numbers("input_ids"), numbers("labels"), numbers("attention_mask"));
    for (i, source) in numbers("row").into_iter().enumerate() {
        let row = loaded.train.iter().find(|row| row.source == source as usize).unwrap();
        let length = mask[i * 128..][..128].iter().sum::<i64>() as usize;
        let wide = |values: &[i32]| values.iter().map(|v| i64::from(*v)).collect::<Vec<_>>();
        assert_eq!(row.input_ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>(), input_ids[i * 128..][..length]);
        assert_eq!(wide(&row.labels), labels[i * 128..][..length], "row {source}");
    }
    assert_eq!(loaded.report.read, 999);
}

const TWO_TURNS: &str = r#"{"messages":[{"role":"user","content":"one"},{"role":"assistant","content":"first"},{"role":"user","content":"two"},{"role":"assistant","content":"second"}]}"#;

#[test]
fn loss_is_on_every_answer_the_last_one_or_everything() {
    let tokenizer = tiny();
    let on = |loss_on| {
        let loaded = load_text("rows.jsonl", TWO_TURNS, |spec| spec.loss_on = loss_on).unwrap();
        trained(&loaded.train[0], &tokenizer)
    };
    assert_eq!(on(LossOn::Responses), "first<|im_end|>second<|im_end|>");
    assert_eq!(on(LossOn::Last), "second<|im_end|>");
    assert_eq!(
        on(LossOn::All),
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n\
         <|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nsecond<|im_end|>\n"
    );
}

#[test]
fn every_format_is_recognised_and_trains_its_answers() {
    let tokenizer = tiny();
    let cases = [
        ("a.json", r#"[{"instruction":"Add","input":"1 2","output":"3"}]"#, "alpaca", "3<|im_end|>"),
        (
            "b.jsonl",
            r#"{"conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"Yo"}]}"#,
            "sharegpt",
            "Yo<|im_end|>",
        ),
        ("c.jsonl", TWO_TURNS, "messages", "first<|im_end|>second<|im_end|>"),
        ("d.csv", "question,answer\n\"a, b\",\"c\nd\"\n", "prompt-completion", "c\nd<|im_end|>"),
        ("e.txt", "Some text.", "text", "Some text.<|im_end|>"),
        ("f.jsonl", r#"{"text":"Some text."}"#, "text", "Some text.<|im_end|>"),
    ];
    for (name, text, format, answer) in cases {
        let loaded = load_text(name, text, |_| {}).unwrap();
        assert_eq!(loaded.report.sources[0].mapping.format.name(), format, "{name}");
        assert_eq!(trained(&loaded.train[0], &tokenizer), answer, "{name}");
    }
    let tokens = r#"{"input_ids":[5,6,7,2,2],"labels":[-100,6,7,-100,-100],"attention_mask":[1,1,1,0,0]}"#;
    let loaded = load_text("g.jsonl", tokens, |_| {}).unwrap();
    assert_eq!(loaded.train[0].input_ids, [5, 6, 7]);
    assert_eq!(loaded.train[0].labels, [-100, 6, 7]);
}

fn row(length: usize, labelled: bool) -> Row {
    let input_ids: Vec<u32> = (0..length as u32).map(|t| 1000 + t).collect();
    let labels = input_ids.iter().map(|id| if labelled { *id as i32 } else { IGNORED }).collect();
    Row { input_ids, labels, weights: Vec::new(), source: 0 }
}

#[test]
fn packing_takes_the_cheapest_cover() {
    let rows: Vec<Row> = [100, 200, 300, 10].iter().map(|n| row(*n, true)).collect();
    let rows: Vec<&Row> = rows.iter().collect();
    let sizes = |cost: fn(usize) -> f64| -> Vec<usize> {
        data::pack(&rows, &[512, 1024], cost, true).unwrap().iter().map(|batch| batch.size).collect()
    };
    assert_eq!(sizes(|size| size as f64 + 600.0), [1024]);
    assert_eq!(sizes(|size| (size * size) as f64), [512, 512]);
    let apart = data::pack(&rows, &[512, 1024], |size| size as f64, false).unwrap();
    assert_eq!(apart.iter().map(|batch| batch.rows.clone()).collect::<Vec<_>>(), [[0], [1], [2], [3]]);
    let long = row(2000, true);
    assert!(matches!(data::pack(&[&long], &[1024], |_| 1.0, true), Err(DataError::DoesNotFit { length: 2000, .. })));
}

proptest! {
    #[test]
    fn packed_rows_keep_their_tokens_and_documents(
        lengths in prop::collection::vec(1_usize..64, 1..24),
        labelled in prop::collection::vec(any::<bool>(), 24),
        packing in any::<bool>(),
    ) {
        let rows: Vec<Row> = lengths.iter().zip(&labelled).map(|(n, labelled)| row(*n, *labelled)).collect();
        let given: Vec<&Row> = rows.iter().collect();
        let batches = data::pack(&given, &[64, 96, 160], |size| size as f64 + 10.0, packing).unwrap();
        let order: Vec<usize> = batches.iter().flat_map(|batch| batch.rows.clone()).collect();
        prop_assert_eq!(order, (0..rows.len()).collect::<Vec<_>>(), "every row once, in order");
        for batch in &batches {
            let mut at = 0;
            let mut label_tokens = 0;
            for &index in &batch.rows {
                let row = &rows[index];
                let end = at + row.input_ids.len();
                for (t, position) in (at..end).zip(0..) {
                    prop_assert_eq!(batch.ids[t], row.input_ids[position] as i32);
                    prop_assert_eq!(batch.positions[t], position as i32);
                    prop_assert_eq!((batch.document_start[t], batch.document_end[t]), (at as i32, end as i32));
                    let target = if t + 1 < end { row.labels[position + 1] } else { IGNORED };
                    prop_assert_eq!(batch.targets[t], target);
                    prop_assert_eq!(batch.token_weights[t], if target == IGNORED { 0.0 } else { 1.0 });
                    label_tokens += usize::from(target != IGNORED);
                }
                at = end;
            }
            prop_assert_eq!(batch.label_tokens, label_tokens);
            prop_assert_eq!(batch.padding, batch.size - at);
            for (t, position) in (at..batch.size).zip(0..) {
                prop_assert_eq!((batch.positions[t], batch.targets[t]), (position, IGNORED));
                prop_assert_eq!((batch.document_start[t], batch.document_end[t]), (at as i32, batch.size as i32));
            }
            for array in [&batch.ids, &batch.positions, &batch.document_start, &batch.document_end, &batch.targets] {
                prop_assert_eq!(array.len(), batch.size);
            }
        }
    }

    #[test]
    fn shuffles_are_permutations_that_seed_and_epoch_decide(n in 0_usize..200, seed in any::<u64>(), epoch in 0_u64..9) {
        let order = data::order(n, seed, epoch, true);
        prop_assert_eq!(&order, &data::order(n, seed, epoch, true));
        let mut sorted = order;
        sorted.sort_unstable();
        prop_assert_eq!(sorted, data::order(n, seed, epoch, false));
    }
}

#[test]
fn held_out_rows_are_a_fixed_share_and_never_trained_on() {
    let text: String =
        (0..50).map(|i| format!("{{\"prompt\":\"question {i}\",\"completion\":\"answer {i}\"}}\n")).collect();
    let load = || load_text("rows.jsonl", &text, |spec| spec.eval = EvalData::Fraction(0.1)).unwrap();
    let (first, second) = (load(), load());
    assert_eq!((first.train.len(), first.eval.len()), (45, 5));
    assert_eq!(first.eval, second.eval);
    assert_eq!(first.report.overlap, 0);
    assert_ne!(data::order(50, 1, 0, true), data::order(50, 2, 0, true));
    assert_ne!(data::order(50, 1, 0, true), data::order(50, 1, 1, true));
}

#[test]
fn long_rows_are_cut_dropped_or_refused_and_counted() {
    let text = format!(
        "{{\"prompt\":\"hi\",\"completion\":\"{}\"}}\n{{\"prompt\":\"hi\",\"completion\":\"no\"}}\n",
        "word ".repeat(200)
    );
    let with = |too_long| load_text("rows.jsonl", &text, |spec| spec.too_long = too_long);
    let cut = with(TooLong::Truncate).unwrap();
    assert_eq!((cut.train.len(), cut.train[0].input_ids.len()), (2, 128));
    assert_eq!(cut.report.truncated[0].place.line, 1);
    let dropped = with(TooLong::Drop).unwrap();
    assert_eq!((dropped.train.len(), dropped.report.dropped.len()), (1, 1));
    assert!(matches!(with(TooLong::Error), Err(DataError::TooLong { rows: 1, .. })));
}

#[test]
fn plain_text_is_cut_into_rows_with_an_end_between_documents() {
    let text: String = (0..40).map(|i| format!("{{\"text\":\"Document number {i} says something.\"}}\n")).collect();
    let loaded = load_text("rows.jsonl", &text, |_| {}).unwrap();
    let (last, whole) = loaded.train.split_last().unwrap();
    assert!(whole.iter().all(|row| row.input_ids.len() == 128) && last.input_ids.len() <= 128);
    let all: Vec<u32> = loaded.train.iter().flat_map(|row| row.input_ids.clone()).collect();
    let ends = all.iter().filter(|id| **id == tiny().eos_id().unwrap()).count();
    assert_eq!(ends, 40);
}

#[test]
fn bad_data_is_refused_with_file_line_and_reason() {
    let broken =
        load_text("rows.jsonl", "{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\": \n", |_| {}).unwrap_err();
    assert!(broken.to_string().contains("rows.jsonl line 2: broken JSON"), "{broken}");
    let empty = load_text("rows.jsonl", "\n", |_| {}).unwrap_err();
    assert!(matches!(empty, DataError::Empty { .. }));
    let masked = r#"{"input_ids":[1,2,3],"labels":[-100,-100,-100]}"#;
    assert!(matches!(load_text("rows.jsonl", masked, |_| {}).unwrap_err(), DataError::AllMasked { rows: 1 }));
    let unknown = load_text("rows.jsonl", r#"{"spam":1,"eggs":2}"#, |_| {}).unwrap_err();
    assert!(unknown.to_string().contains("spam, eggs"), "{unknown}");
    let preference = load_text("rows.jsonl", r#"{"prompt":"a","chosen":"b","rejected":"c"}"#, |_| {}).unwrap_err();
    assert!(preference.to_string().contains("DPO"), "{preference}");
    assert!(matches!(
        data::load(&spec(Path::new("no/such.file.json")), 0, None, &|_| {}),
        Err(DataError::NotFound { .. })
    ));
    assert!(data::check_context(4096, 2048).unwrap_err().to_string().contains("2048"));
}

#[test]
fn columns_map_any_file() {
    let source = |path: &Path| DataSource {
        path: path.display().to_string(),
        columns: [("prompt".to_owned(), "ask".to_owned()), ("response".to_owned(), "say".to_owned())].into(),
        ..DataSource::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, r#"{"ask":"a","say":"b","note":"c"}"#).unwrap();
    let mut spec = spec(&path);
    spec.train = TrainData::Sources(vec![source(&path)]);
    let loaded = load(&spec, &tiny()).unwrap();
    assert_eq!(trained(&loaded.train[0], &tiny()), "b<|im_end|>");
    assert_eq!(loaded.report.sources[0].mapping.unmapped, ["note"]);
}

#[test]
fn the_embedded_data_loads_with_the_embedded_model() {
    let tokenizer = Tokenizer::from_files(tune::demo::files()).unwrap();
    let mut spec = spec(Path::new("demo"));
    spec.eval = EvalData::Path("demo".into());
    let loaded = load(&spec, &tokenizer).unwrap();
    assert!(loaded.train.len() >= 150 && !loaded.eval.is_empty());
    assert!(loaded.report.dropped.is_empty() && loaded.report.truncated.is_empty());
    assert_eq!(loaded.report.overlap, 0);
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden: Value = serde_json::from_slice(&std::fs::read(fixture("templates.json")).unwrap()).unwrap();
    let tokenizer = tiny();
    let mut wrong = String::new();
    for entry in golden["templates"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let template = match entry["source"].as_str() {
            Some(source) => ChatTemplate::new(name, source, &tokenizer),
            None => ChatTemplate::choose(name, &tokenizer),
        };
        let template = match template {
            Ok(template) => template,
            Err(error) => {
                wrong += &format!("{name} does not compile: {error}\n");
                continue;
            }
        };
        for case in entry["cases"].as_array().unwrap() {
            let chat = messages(&golden["chats"][case["chat"].as_str().unwrap()]);
            let tools = case["tools"].as_bool().unwrap().then_some(&golden["tools"]);
            let rendered = template.render(&chat, tools, case["add_generation_prompt"].as_bool().unwrap());
            match (case["text"].as_str(), rendered) {
                (Some(expected), Ok(text)) if text == expected => {}
                (None, Err(_)) => {}
                (expected, rendered) => wrong += &format!("{name} {}:\n  {expected:?}\n  {rendered:?}\n", case["chat"]),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The mask of a conversation under a template of the tiny tokenizer.
fn masked(source: &str, chat: Value) -> (String, data::MaskMethod) {
    let tokenizer = tiny();
    let template = ChatTemplate::new("test", source, &tokenizer).unwrap();
    let masked = data::mask(&template, &tokenizer, &messages(&chat), None, LossOn::Responses).unwrap();
    let marked = masked.answers.iter().map(|(answer, _)| format!("[{}]", &masked.text[answer.clone()]));
    (marked.collect::<Vec<_>>().join(" "), masked.method)
}

#[test]
fn answers_are_found_in_templates_that_rewrite_earlier_turns() {
    let chat = serde_json::json!([
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>hm</think>first"},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "<think>so</think>second"},
    ]);
    let turn = "'<|im_start|>' + message.role + '\n'";
    // Reasoning is kept in the last answer only, as Qwen3 and DeepSeek do.
    let strips = format!(
        "{{% for message in messages %}}{{{{ {turn} + (message.content if loop.last else \
         message.content.split('</think>')[-1]) + '<|im_end|>\n' }}}}{{% endfor %}}\
         {{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
    );
    let (answers, method) = masked(&strips, chat.clone());
    assert_eq!(answers, "[first<|im_end|>] [<think>so</think>second<|im_end|>]");
    assert_eq!(method, data::MaskMethod::Sentinel);
    // With the template's own marks nothing has to be guessed.
    let tags = "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}\
                {% generation %}{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\
                {% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}";
    let (answers, method) = masked(tags, chat.clone());
    assert_eq!(answers, "[first<|im_end|>] [<think>so</think>second<|im_end|>]");
    assert_eq!(method, data::MaskMethod::GenerationTags);
    // No generation prompt: the blank before the answer is the template's.
    let plain = serde_json::json!([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]);
    let mistral = "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]\
                   {% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}";
    assert_eq!(masked(mistral, plain).0, "[two<|im_end|>]");
}

#[test]
fn every_built_in_template_trains_the_answers_alone() {
    let tokenizer = tiny();
    for name in data::built_in_templates() {
        let template = ChatTemplate::choose(name, &tokenizer).unwrap();
        let chat: Value = serde_json::from_str(TWO_TURNS).unwrap();
        let chat = messages(&chat["messages"]);
        let masked = data::mask(&template, &tokenizer, &chat, None, LossOn::Responses).unwrap();
        let answers: Vec<&str> =
            masked.answers.iter().map(|(answer, _)| masked.text[answer.clone()].trim_start()).collect();
        assert!(answers[0].starts_with("first") && answers[1].starts_with("second"), "{name}: {answers:?}");
        assert!(answers.iter().all(|answer| !answer.contains("two")), "{name}: {answers:?}");
    }
}

#[test]
fn weights_of_messages_reach_the_tokens() {
    let text = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","loss_weight":0.5},{"role":"user","content":"c"},{"role":"assistant","content":"d","weight":0}]}"#;
    let loaded = load_text("rows.jsonl", text, |_| {}).unwrap();
    let row = &loaded.train[0];
    assert_eq!(trained(row, &tiny()), "b<|im_end|>");
    let batch = &data::pack(&[row], &[64], |size| size as f64, true).unwrap()[0];
    assert_eq!(batch.label_tokens, 2);
    assert_eq!(batch.token_weights.iter().sum::<f32>(), 1.0);
}

#[test]
fn rows_that_cannot_be_trained_on_are_listed_with_file_and_line() {
    let text = "{\"prompt\":\"a\",\"completion\":\"b\"}\n\n{\"prompt\":\"a\",\"completion\":\"\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}\n";
    let report = load_text("rows.jsonl", text, |_| {}).unwrap().report;
    let [dropped] = report.dropped.as_slice() else { panic!("{:?}", report.dropped) };
    assert_eq!((dropped.place.line, dropped.reason.as_str()), (3, "an answer is empty"));
    assert_eq!(report.duplicates[0].line, 4);
    assert_eq!(report.place(2).unwrap().line, 4);
    assert!(report.lint.iter().any(|lint| lint.rule == "duplicates"));
}

#[test]
fn tool_calls_that_a_template_cannot_show_are_pointed_out() {
    let text = r#"{"conversations":[{"from":"human","value":"weather?"},{"from":"function_call","value":"{\"name\":\"look\",\"arguments\":{\"city\":\"Bern\"}}"},{"from":"observation","value":"sun"},{"from":"gpt","value":"Sun."}],"tools":"[{\"name\":\"look\"}]"}"#;
    let lint = |template: &str| {
        let report = load_text("rows.jsonl", text, |spec| {
            spec.template = template.into();
            spec.max_length = 1024;
        });
        report.unwrap().report.lint
    };
    assert!(lint("auto").iter().any(|lint| lint.rule == "template-leaves-out"));
    assert!(lint("qwen2.5").is_empty());
}

#[test]
fn a_preview_shows_the_row_as_it_will_be_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, "{\"prompt\":\"Größe? 🙂\",\"completion\":\"groß 🙂 und so weiter und so fort\"}\n").unwrap();
    let mut spec = spec(&path);
    spec.max_length = 40;
    let preview = data::Preview::open(&spec, 0, &tiny(), &|_| {}).unwrap();
    let row = preview.row(preview.find(1).unwrap()).unwrap().unwrap();
    let text = |keep: fn(&data::TokenSpan) -> bool| -> String {
        row.spans.iter().filter(|span| keep(span)).map(|span| span.text.as_str()).collect()
    };
    assert_eq!(
        text(|_| true),
        "<|im_start|>user\nGröße? 🙂<|im_end|>\n<|im_start|>assistant\ngroß 🙂 und so weiter und so fort<|im_end|>\n"
    );
    let trained = text(|span| span.trained);
    assert!(trained.starts_with("groß 🙂") && !trained.contains("fort"), "{trained}");
    assert!(row.spans.iter().skip(40).all(|span| span.cut));
    assert_eq!(row.label_tokens, row.spans.iter().filter(|span| span.trained).count());
    assert_eq!(preview.histogram.over, 1);
    assert_eq!(preview.histogram.bins.iter().map(|bin| bin.rows).sum::<usize>(), 1);
}

#[test]
fn several_sources_are_mixed_by_rows_and_weight() {
    let folder = tempfile::tempdir().unwrap();
    let source = |name: &str, count: usize, rows: Option<usize>, weight: f64| {
        let path = folder.path().join(name);
        let text: String =
            (0..count).map(|i| format!("{{\"prompt\":\"{name} {i}\",\"completion\":\"{i}\"}}\n")).collect();
        std::fs::write(&path, text).unwrap();
        DataSource { path: path.display().to_string(), rows, weight, ..DataSource::default() }
    };
    let mut spec = spec(folder.path());
    spec.train = TrainData::Sources(vec![source("a.jsonl", 20, Some(10), 0.0), source("b.jsonl", 10, None, 2.0)]);
    let loaded = load(&spec, &tiny()).unwrap();
    assert_eq!(loaded.train.len(), 10 + 20);
    assert_eq!(loaded.report.left_out, 10);
    assert!(loaded.report.lint.iter().all(|lint| lint.rule != "duplicates"));
    spec.train = TrainData::Path(folder.path().display().to_string());
    assert_eq!(load(&spec, &tiny()).unwrap().train.len(), 30, "a folder of files");
}

#[test]
fn parquet_gives_the_rows_that_json_lines_give() {
    let folder = fixture("parquet");
    let expected = load(&spec(&folder.join("rows.jsonl")), &tiny()).unwrap().train;
    assert_eq!(expected.len(), 40);
    for compression in ["none", "snappy", "gzip", "zstd", "lz4"] {
        let loaded = load(&spec(&folder.join(format!("{compression}.parquet"))), &tiny()).unwrap();
        assert_eq!(loaded.train, expected, "{compression}");
    }
    let beside = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("rows.jsonl"), beside.path().join("train.jsonl")).unwrap();
    std::fs::copy(folder.join("zstd.parquet"), beside.path().join("train.parquet")).unwrap();
    assert_eq!(load(&spec(beside.path()), &tiny()).unwrap().train.len(), 40, "one table in two formats");
    // Brotli, which nobody's tools write by default, is refused with the way out.
    let error = load(&spec(&folder.join("brotli.parquet")), &tiny()).unwrap_err();
    assert!(error.to_string().contains("brotli") && error.hint().contains("zstd"), "{error}");
    let cut = beside.path().join("cut.parquet");
    std::fs::write(&cut, &std::fs::read(folder.join("none.parquet")).unwrap()[..2000]).unwrap();
    let error = load(&spec(&cut), &tiny()).unwrap_err().to_string();
    assert!(error.contains("cut.parquet") && error.contains("not a whole parquet file"), "{error}");
}

#[test]
fn a_split_and_a_subset_choose_files_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("en")).unwrap();
    for name in ["train-00000-of-00001.jsonl", "test.jsonl", "en/train.jsonl"] {
        std::fs::write(folder.path().join(name), format!("{{\"prompt\":\"{name}\",\"completion\":\"x\"}}\n")).unwrap();
    }
    let rows = |subset: &str, split: &str| {
        let mut spec = spec(folder.path());
        spec.train = TrainData::Sources(vec![DataSource {
            path: folder.path().display().to_string(),
            subset: subset.into(),
            split: split.into(),
            ..DataSource::default()
        }]);
        load(&spec, &tiny()).map(|loaded| loaded.train.len())
    };
    assert_eq!((rows("", "").unwrap(), rows("", "train").unwrap(), rows("en", "train").unwrap()), (3, 2, 1));
    assert!(rows("", "validation").unwrap_err().to_string().contains("test.jsonl"));
}
