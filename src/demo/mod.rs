//! What is compiled into the binary for the id `demo`: a small model with its tokenizer, and questions about
//! `tune`. How they were made is in `assets/demo/README.md`.

use crate::spec::{EvalData, RunSpec, TrainData};

/// Files of the embedded model, `(name, bytes)` as they would lie in a model folder.
pub fn files() -> &'static [(&'static str, &'static [u8])] {
    &[
        ("config.json", include_bytes!("../../assets/demo/model/config.json")),
        ("generation_config.json", include_bytes!("../../assets/demo/model/generation_config.json")),
        ("model.safetensors", include_bytes!("../../assets/demo/model/model.safetensors")),
        ("tokenizer.json", include_bytes!("../../assets/demo/model/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../../assets/demo/model/tokenizer_config.json")),
    ]
}

/// Training rows: questions with answers, one JSON object a line with `prompt` and `completion`.
pub fn questions() -> &'static str {
    include_str!("../../assets/demo/questions.jsonl")
}

/// Evaluation rows: other phrasings of the same questions, in the same format.
pub fn held_out() -> &'static str {
    include_str!("../../assets/demo/held_out.jsonl")
}

/// Questions whose answers `tune demo` shows before and after; all three are held out.
pub const SHOWN: [&str; 3] =
    ["What programming language is tune written in?", "Can I use tune without a GPU?", "How can I stop a run?"];

/// The run that `tune demo` starts.
pub fn spec() -> RunSpec {
    let mut spec = RunSpec::default();
    spec.model.id = "demo".into();
    spec.data.train = TrainData::Path("demo".into());
    spec.data.eval = EvalData::Path("demo".into());
    spec.data.max_length = 256;
    spec.method.rank = 16;
    spec.method.alpha = 32.0;
    spec.train.epochs = 28.0;
    spec.train.batch = 16;
    spec.train.learning_rate = Some(5e-3);
    spec.train.eval_every = 0.0;
    spec.train.save_every = 0.0;
    spec.sample.prompts = SHOWN.map(String::from).to_vec();
    spec
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::model::Model;

    fn rows(text: &str) -> Vec<(String, String)> {
        let text_of = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_string();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .map(|row| (text_of(&row, "prompt"), text_of(&row, "completion")))
            .collect()
    }

    #[test]
    fn the_embedded_files_take_four_megabytes_at_most() {
        let model: usize = files().iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(model + questions().len() + held_out().len() <= 4_000_000);
    }

    #[test]
    fn the_embedded_model_opens() {
        let model = Model::embedded(files()).unwrap();
        assert_eq!(model.eos_token_ids, [2]);
    }

    #[test]
    fn held_out_questions_are_never_trained_on_but_their_answers_are() {
        let (trained, held_out) = (rows(questions()), rows(held_out()));
        assert!(trained.len() >= 150);
        let plain = |text: &str| text.to_lowercase().replace(|c: char| !c.is_alphanumeric(), "");
        let asked: HashSet<String> = trained.iter().map(|(prompt, _)| plain(prompt)).collect();
        let answers: HashSet<&String> = trained.iter().map(|(_, completion)| completion).collect();
        for (prompt, completion) in &held_out {
            assert!(!asked.contains(&plain(prompt)), "trained on: {prompt}");
            assert!(answers.contains(completion), "never taught: {completion}");
        }
    }

    #[test]
    fn the_questions_shown_are_held_out() {
        let held_out: HashSet<String> = rows(held_out()).into_iter().map(|(prompt, _)| prompt).collect();
        assert!(SHOWN.iter().all(|question| held_out.contains(*question)));
    }

    #[test]
    fn no_question_has_two_answers() {
        let mut answers = HashMap::new();
        for (prompt, completion) in rows(questions()).into_iter().chain(rows(held_out())) {
            let first = answers.entry(prompt.clone()).or_insert_with(|| completion.clone());
            assert_eq!(*first, completion, "{prompt}");
        }
    }
}
