//! From examples to rows of tokens with labels.

use rayon::prelude::*;

use super::load::{Located, Progress, no_tokenizer};
use super::mask::{self, MaskMethod, Masked};
use super::message::{Example, Message};
use super::report::{DroppedRow, Report, TruncatedRow};
use super::template::ChatTemplate;
use super::{DataError, IGNORED, Row};
use crate::model::tokenizer::{Encoded, Tokenizer};
use crate::spec::{DataSpec, TooLong};

/// Why rows are dropped that no label survives in.
pub(super) const NO_LABELS: &str = "no token of it would be trained on";

/// What rows of tokens are made with.
pub(super) struct Work<'a> {
    pub spec: &'a DataSpec,
    pub tokenizer: Option<&'a Tokenizer>,
    pub template: Option<&'a ChatTemplate>,
}

enum Made {
    Row {
        input_ids: Vec<u32>,
        labels: Vec<i32>,
        weights: Vec<f32>,
        method: Option<MaskMethod>,
        /// Something of the row is not in its text.
        lossy: bool,
    },
    Document(Vec<u32>),
    Unfit(String),
}

/// Rows tokenized between two progress reports.
const CHUNK: usize = 512;

impl Work<'_> {
    /// Rows of the examples in their order, in parallel; what happens to them goes into the report. Rows that
    /// `too_long = "error"` refuses go into `too_long` with their length.
    pub fn tokenize(
        &self,
        examples: &[Located],
        report: &mut Report,
        too_long: &mut Vec<(String, usize)>,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Vec<Row>, DataError> {
        let mut rows = Vec::with_capacity(examples.len());
        let mut stream = Stream { max_length: self.spec.max_length, tokens: Vec::new(), source: 0, rows: Vec::new() };
        for (chunk, start) in examples.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            progress(Progress { stage: "tokenizing", done: start, total: examples.len() });
            let made: Vec<Result<Made, DataError>> =
                chunk.par_iter().map(|located| self.make(&located.example)).collect();
            for (located, made) in chunk.iter().zip(made) {
                let drop = |reason: String| DroppedRow { place: located.place.clone(), reason };
                let (mut row, method) = match made? {
                    Made::Unfit(reason) => {
                        report.dropped.push(drop(reason));
                        continue;
                    }
                    Made::Document(tokens) => {
                        stream.push(&tokens, located.source);
                        continue;
                    }
                    Made::Row { input_ids, labels, weights, method, lossy } => {
                        if lossy {
                            report.lossy.push(located.place.clone());
                        }
                        (Row { input_ids, labels, weights, source: located.source }, method)
                    }
                };
                let length = row.input_ids.len();
                report.lengths.push(length);
                if let Some(method) = method {
                    *report.mask_methods.entry(method).or_default() += 1;
                }
                if length > self.spec.max_length {
                    match self.spec.too_long {
                        TooLong::Error => too_long.push((located.place.to_string(), length)),
                        TooLong::Drop => {
                            report.dropped.push(drop(format!("longer than max_length = {}", self.spec.max_length)));
                            continue;
                        }
                        TooLong::Truncate => {
                            cut(&mut row, self.spec.max_length);
                            report.truncated.push(TruncatedRow { place: located.place.clone(), length });
                        }
                    }
                }
                // The first token of a row is never a target.
                if row.labels.iter().skip(1).all(|label| *label == IGNORED) {
                    report.dropped.push(drop(NO_LABELS.into()));
                } else {
                    rows.push(row);
                }
            }
        }
        let streamed = stream.finish();
        report.lengths.extend(streamed.iter().map(|row| row.input_ids.len()));
        rows.extend(streamed);
        Ok(rows)
    }

    /// Tokens of one example.
    fn make(&self, example: &Example) -> Result<Made, DataError> {
        match example {
            Example::Tokens { input_ids, labels, weights } => Ok(Made::Row {
                input_ids: input_ids.clone(),
                labels: labels.clone(),
                weights: weights.clone(),
                method: None,
                lossy: false,
            }),
            Example::Text(text) => {
                let tokenizer = self.tokenizer.ok_or_else(no_tokenizer)?;
                let mut tokens = tokenizer.encode(text, true)?;
                // The end of a text is learned too.
                if let Some(end) = tokenizer.eos_id().filter(|end| tokens.last() != Some(end)) {
                    tokens.push(end);
                }
                Ok(Made::Document(tokens))
            }
            Example::Chat { messages, tools } => Ok(match self.render(messages, tools.as_ref())? {
                Err(reason) => Made::Unfit(reason),
                Ok((masked, encoded)) => {
                    let (labels, weights) = mask::labels(&encoded.ids, &encoded.offsets, &masked.answers);
                    let lossy = is_lossy(&masked.text, messages, tools.as_ref());
                    Made::Row { input_ids: encoded.ids, labels, weights, method: Some(masked.method), lossy }
                }
            }),
        }
    }

    /// The text of a conversation with its mask and its tokens, or why the template refuses it.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
    ) -> Result<Result<(Masked, Encoded), String>, DataError> {
        let tokenizer = self.tokenizer.ok_or_else(no_tokenizer)?;
        let Some(template) = self.template else { return Ok(Err("no chat template".into())) };
        let masked = match mask::mask(template, tokenizer, messages, tools, self.spec.loss_on) {
            Ok(masked) => masked,
            Err(DataError::Template { what, .. }) => return Ok(Err(format!("chat template: {what}"))),
            Err(error) => return Err(error),
        };
        let encoded = tokenizer.encode_with_offsets(&masked.text, false)?;
        Ok(Ok((masked, encoded)))
    }
}

/// Whether a template leaves out what a message says, a tool call or the tools: many know neither system prompts nor
/// tools.
fn is_lossy(text: &str, messages: &[Message], tools: Option<&serde_json::Value>) -> bool {
    let name = |call: &serde_json::Value| {
        let function = call.get("function").unwrap_or(call);
        function.get("name").and_then(serde_json::Value::as_str).map(str::to_owned)
    };
    let named = |list: Option<&serde_json::Value>| -> Vec<String> {
        list.and_then(serde_json::Value::as_array).into_iter().flatten().filter_map(name).collect()
    };
    let said = messages.iter().all(|message| {
        // Templates may cut the reasoning out of an answer, and what they keep is its end.
        let content = message.content().rsplit("</think>").next().unwrap_or_default();
        text.contains(content.trim()) && named(message.fields.get("tool_calls")).iter().all(|name| text.contains(name))
    });
    !said || !named(tools).iter().all(|name| text.contains(name))
}

fn cut(row: &mut Row, length: usize) {
    row.input_ids.truncate(length);
    row.labels.truncate(length);
    row.weights.truncate(length);
}

/// Documents end to end, cut into rows of `max_length` tokens; the last one may be shorter.
struct Stream {
    max_length: usize,
    tokens: Vec<u32>,
    /// The example that the row under way began in.
    source: usize,
    rows: Vec<Row>,
}

impl Stream {
    fn push(&mut self, document: &[u32], source: usize) {
        if self.tokens.is_empty() {
            self.source = source;
        }
        self.tokens.extend(document);
        let whole = self.tokens.len() / self.max_length * self.max_length;
        let rest = self.tokens.split_off(whole);
        for tokens in std::mem::replace(&mut self.tokens, rest).chunks(self.max_length) {
            self.rows.push(plain_row(tokens, self.source));
            self.source = source;
        }
    }

    fn finish(mut self) -> Vec<Row> {
        // A single token has nothing to predict.
        if self.tokens.len() > 1 {
            self.rows.push(plain_row(&self.tokens, self.source));
        }
        self.rows
    }
}

fn plain_row(tokens: &[u32], source: usize) -> Row {
    Row {
        input_ids: tokens.to_vec(),
        labels: tokens.iter().map(|id| *id as i32).collect(),
        weights: Vec::new(),
        source,
    }
}
