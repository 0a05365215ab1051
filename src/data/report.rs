//! What happened to the data: every row that was dropped, cut or doubled is counted and can be listed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::format::{Format, Mapping};
use super::mask::MaskMethod;
use super::{IGNORED, Row};
use crate::model::tokenizer::Tokenizer;

/// A row of a file: its line, or its place in the list, counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    pub file: PathBuf,
    pub line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DroppedRow {
    pub place: Place,
    pub reason: String,
}

/// A row that was longer than `max_length`, with its whole length in tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TruncatedRow {
    pub place: Place,
    pub length: usize,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceReport {
    pub path: PathBuf,
    /// Whether `data.eval` names it.
    pub eval: bool,
    pub mapping: Mapping,
    pub rows: usize,
    /// Rows that became an example.
    pub kept: usize,
    /// Number of its first row over all files.
    #[serde(skip)]
    pub first: usize,
    /// Line of each row.
    #[serde(skip)]
    pub lines: Vec<usize>,
}

/// Something about the data that is allowed and seldom meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lint {
    pub rule: String,
    pub message: String,
    pub advice: String,
}

/// The account of one load.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub sources: Vec<SourceReport>,
    /// The chat template used; none for plain text and tokens.
    pub template: Option<String>,
    /// How the answers were found in the rendered rows, and in how many.
    pub mask_methods: BTreeMap<MaskMethod, usize>,
    /// Rows in the files.
    pub read: usize,
    /// Rows that are trained on.
    pub train_rows: usize,
    pub eval_rows: usize,
    /// Whether the held-out rows are pieces of one stream of text.
    pub held_out_of_stream: bool,
    pub dropped: Vec<DroppedRow>,
    pub truncated: Vec<TruncatedRow>,
    /// Rows that a source's `rows` leaves out.
    pub left_out: usize,
    /// Rows equal to an earlier row.
    pub duplicates: Vec<Place>,
    /// Conversations of which the template leaves something out.
    pub lossy: Vec<Place>,
    /// Evaluation rows that are trained on, word for word.
    pub overlap: usize,
    /// Tokens of each row before `max_length` cut it; in order of the rows.
    pub lengths: Vec<usize>,
    pub max_length: usize,
    /// Tokens of the rows that are trained on, and those of them that are targets.
    pub tokens: usize,
    pub label_tokens: usize,
    pub lint: Vec<Lint>,
}

impl Report {
    /// Where a row stands, by [`Row::source`].
    pub fn place(&self, source: usize) -> Option<Place> {
        let file = self.sources.iter().rfind(|file| file.first <= source)?;
        Some(Place { file: file.path.clone(), line: *file.lines.get(source - file.first)? })
    }

    /// Dropped rows by reason, the commonest first.
    pub fn dropped_by_reason(&self) -> Vec<(&str, usize)> {
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for dropped in &self.dropped {
            *reasons.entry(dropped.reason.as_str()).or_default() += 1;
        }
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        reasons
    }

    /// The length that `fraction` of the rows do not pass (nearest rank); 0 without rows.
    pub fn percentile(&self, fraction: f64) -> usize {
        let mut lengths = self.lengths.clone();
        lengths.sort_unstable();
        let rank = (lengths.len() as f64 * fraction).ceil() as usize;
        lengths.get(rank.max(1) - 1).copied().unwrap_or(0)
    }

    pub(super) fn finish(&mut self, train: &[Row], eval: &[Row], tokenizer: Option<&Tokenizer>) {
        self.train_rows = train.len();
        self.eval_rows = eval.len();
        self.tokens = train.iter().map(|row| row.input_ids.len()).sum();
        self.label_tokens =
            train.iter().map(|row| row.labels.iter().skip(1).filter(|label| **label != IGNORED).count()).sum();
        self.lint = self.look_for_lint(train, tokenizer);
    }

    fn look_for_lint(&self, train: &[Row], tokenizer: Option<&Tokenizer>) -> Vec<Lint> {
        let mut lint = Vec::new();
        let mut add = |rule: &str, message: String, advice: &str| {
            lint.push(Lint { rule: rule.into(), message, advice: advice.into() });
        };
        let share = |count: usize| count as f64 / self.read.max(1) as f64;
        if let Some(bos) = tokenizer.and_then(Tokenizer::bos_id) {
            let doubled = train.iter().filter(|row| row.input_ids.starts_with(&[bos, bos])).count();
            if doubled > 0 {
                add(
                    "double-bos",
                    format!("{doubled} rows begin with the begin-of-text token twice"),
                    "take it out of the rows or the template: the model never saw it doubled",
                );
            }
        }
        if let Some(tokenizer) = tokenizer {
            let text = self.sources.iter().any(|source| source.mapping.format == Format::Text);
            if text && tokenizer.eos_id().is_none() {
                add(
                    "no-end-of-text",
                    "the tokenizer names no end-of-text token, so documents run into each other".into(),
                    "add eos_token to the model's tokenizer_config.json",
                );
            }
            let begins = |row: &Row| row.input_ids.first().copied() == tokenizer.bos_id();
            if self.template.is_some() && tokenizer.adds_bos() && !train.iter().any(begins) {
                add(
                    "missing-bos",
                    "the tokenizer begins texts with its begin-of-text token, and the chat template does not".into(),
                    "use the model's own template, or begin yours with {{ bos_token }}",
                );
            }
            let trained_end = |row: &&Row| {
                row.labels.iter().skip(1).any(|label| *label != IGNORED && tokenizer.is_special(*label as u32))
            };
            let chat = self.mask_methods.keys().any(|method| *method != MaskMethod::Whole);
            let endless = train.iter().filter(|row| !trained_end(row)).count();
            if chat && endless > self.truncated.len() {
                add(
                    "no-end-of-turn",
                    format!("{endless} rows train no end-of-turn token"),
                    "the model would not learn to stop: use a template whose answers end with a special token",
                );
            }
        }
        if let Some(first) = self.lossy.first() {
            add(
                "template-leaves-out",
                format!(
                    "{} conversations lose something in the chat template (a message, a tool call or the tools), \
                     the first is {first}",
                    self.lossy.len()
                ),
                "look at that row with --row; a template that knows tools and system prompts is data.template = \
                 \"qwen2.5\", if the model has its tokens",
            );
        }
        if share(self.duplicates.len()) > 0.01 {
            add(
                "duplicates",
                format!("{} rows repeat an earlier row", self.duplicates.len()),
                "repeats overfit: drop them",
            );
        }
        if self.overlap > 0 {
            add(
                "overlap",
                format!("{} evaluation rows are trained on", self.overlap),
                "remove them: the evaluation loss will flatter",
            );
        }
        if share(self.truncated.len()) > 0.01 {
            let length = self.percentile(0.99);
            add(
                "truncated",
                format!("{} rows are cut at {} tokens and lose their endings", self.truncated.len(), self.max_length),
                &format!("set data.max_length to the 99th percentile, {length}"),
            );
        }
        for source in &self.sources {
            const PROMPTS: [&str; 8] =
                ["prompt", "question", "query", "instruction", "input", "system", "context", "messages"];
            let lost: Vec<&str> = source
                .mapping
                .unmapped
                .iter()
                .map(String::as_str)
                .filter(|column| PROMPTS.contains(&column.to_ascii_lowercase().as_str()))
                .collect();
            if !lost.is_empty() && source.mapping.format != Format::Tokens {
                add(
                    "unmapped-prompt",
                    format!("{}: the column {} never reaches the model", source.path.display(), lost.join(", ")),
                    "map it with columns in [[data.train]] if the model should see it",
                );
            }
        }
        lint
    }
}
