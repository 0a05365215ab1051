//! Data as a user looks at it before training: what was recognised, how long rows are, and any row as the model will
//! see it, token by token. `tune data` and the workbench's Data screen both show this.

use serde::Serialize;

use super::load::{Located, Progress, assemble};
use super::mask::{self, MaskMethod};
use super::message::Example;
use super::report::{Place, Report};
use super::template::ChatTemplate;
use super::tokenize::Work;
use super::{DataError, IGNORED};
use crate::model::tokenizer::Tokenizer;
use crate::spec::DataSpec;

/// Data opened for looking at.
#[derive(Clone)]
pub struct Preview {
    /// Format and columns of each file, counts, lint.
    pub report: Report,
    pub histogram: Histogram,
    /// Why a run would refuse this data.
    pub problem: Option<DataError>,
    spec: DataSpec,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    examples: Vec<Located>,
}

/// Row lengths in tokens, as bars.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Histogram {
    pub bins: Vec<Bin>,
    pub max_length: usize,
    /// Rows longer than `max_length`.
    pub over: usize,
}

/// Rows of `from..to` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bin {
    pub from: usize,
    pub to: usize,
    pub rows: usize,
}

/// One row as the model will see it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowView {
    pub place: Place,
    pub held_out: bool,
    pub spans: Vec<TokenSpan>,
    /// Tokens of the whole row; of a long text, of the part shown.
    pub tokens: usize,
    pub label_tokens: usize,
    /// How its answers were found, for conversations.
    pub method: Option<MaskMethod>,
    /// Why it is not trained on, or what of it is not shown.
    pub note: Option<String>,
}

/// One token of a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenSpan {
    pub id: u32,
    /// What it adds to the text; empty for the first parts of a character that takes several tokens.
    pub text: String,
    pub trained: bool,
    /// A control token: begin, end, role marker.
    pub special: bool,
    /// Past `max_length`: it never reaches the model.
    pub cut: bool,
}

impl Preview {
    /// Reads and tokenizes all of it, so that counts and lengths are exact.
    ///
    /// # Errors
    /// When a file cannot be read or understood. Data that is understood and cannot be trained on opens, with a
    /// [`problem`](Preview::problem).
    pub fn open(
        spec: &DataSpec,
        seed: u64,
        tokenizer: &Tokenizer,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Self, DataError> {
        let assembled = assemble(spec, seed, Some(tokenizer), progress)?;
        let report = assembled.loaded.report;
        Ok(Self {
            histogram: Histogram::of(&report.lengths, spec.max_length),
            report,
            problem: assembled.problem,
            spec: spec.clone(),
            tokenizer: tokenizer.clone(),
            template: assembled.template,
            examples: assembled.examples,
        })
    }

    /// Rows that can be looked at: those that became an example, in the order of the files.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// The index of the row on that line (or at that place of the list) of the first file.
    pub fn find(&self, line: usize) -> Option<usize> {
        let file = &self.report.sources.first()?.path;
        self.examples.iter().position(|located| located.place.file == *file && located.place.line == line)
    }

    /// A row by index; `None` past the end.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn row(&self, index: usize) -> Result<Option<RowView>, DataError> {
        let Some(located) = self.examples.get(index) else { return Ok(None) };
        let mut view = RowView {
            place: located.place.clone(),
            held_out: located.held_out,
            spans: Vec::new(),
            tokens: 0,
            label_tokens: 0,
            method: None,
            note: self.dropped(&located.place),
        };
        match &located.example {
            Example::Tokens { input_ids, labels, .. } => {
                let mut stream = self.tokenizer.stream(false);
                for (id, label) in input_ids.iter().zip(labels) {
                    let text = stream.push(*id)?;
                    view.spans.push(self.span(*id, text, *label != IGNORED));
                }
            }
            Example::Text(text) => {
                // A book need not be tokenized to show its first page.
                let shown: String = text.chars().take(self.spec.max_length.saturating_mul(6)).collect();
                let encoded = self.tokenizer.encode_with_offsets(&shown, true)?;
                let texts = pieces(&shown, &encoded.offsets);
                view.spans = encoded.ids.iter().zip(texts).map(|(id, text)| self.span(*id, text, true)).collect();
                if shown.len() < text.len() {
                    view.spans.truncate(self.spec.max_length);
                    view.note = Some(format!("the beginning of a document of {} characters", text.chars().count()));
                } else if let Some(end) = self.tokenizer.eos_id() {
                    view.spans.push(self.span(end, self.tokenizer.eos_token().unwrap_or_default().into(), true));
                }
            }
            Example::Chat { messages, tools } => {
                let work =
                    Work { spec: &self.spec, tokenizer: Some(&self.tokenizer), template: self.template.as_ref() };
                match work.render(messages, tools.as_ref())? {
                    Err(reason) => view.note = Some(reason),
                    Ok((masked, encoded)) => {
                        let (labels, _) = mask::labels(&encoded.ids, &encoded.offsets, &masked.answers);
                        let texts = pieces(&masked.text, &encoded.offsets);
                        view.method = Some(masked.method);
                        view.spans = encoded
                            .ids
                            .iter()
                            .zip(texts)
                            .zip(labels)
                            .map(|((id, text), label)| self.span(*id, text, label != IGNORED))
                            .collect();
                    }
                }
            }
        }
        view.tokens = view.spans.len();
        if !matches!(located.example, Example::Text(_)) {
            for span in view.spans.iter_mut().skip(self.spec.max_length) {
                (span.cut, span.trained) = (true, false);
            }
        }
        // Nothing predicts the first token.
        if let Some(first) = view.spans.first_mut() {
            first.trained = false;
        }
        view.label_tokens = view.spans.iter().filter(|span| span.trained).count();
        Ok(Some(view))
    }

    fn span(&self, id: u32, text: String, trained: bool) -> TokenSpan {
        TokenSpan { id, text, trained, special: self.tokenizer.is_special(id), cut: false }
    }

    fn dropped(&self, place: &Place) -> Option<String> {
        self.report.dropped.iter().find(|dropped| dropped.place == *place).map(|dropped| dropped.reason.clone())
    }
}

/// The text between the end of one token and the end of the next, so that the pieces together are the text.
fn pieces(text: &str, offsets: &[(usize, usize)]) -> Vec<String> {
    let mut at = 0;
    let mut pieces: Vec<String> = Vec::with_capacity(offsets.len());
    for &(_, end) in offsets {
        let end = end.max(at);
        pieces.push(text.get(at..end).unwrap_or_default().to_owned());
        at = end;
    }
    if let (Some(last), Some(rest)) = (pieces.last_mut(), text.get(at..)) {
        last.push_str(rest);
    }
    pieces
}

/// Bars that a histogram has at most.
const BINS: usize = 16;

impl Histogram {
    fn of(lengths: &[usize], max_length: usize) -> Self {
        let over = lengths.iter().filter(|length| **length > max_length).count();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let width = round_up(longest.div_ceil(BINS).max(1));
        let mut bins: Vec<Bin> =
            (0..=longest / width).map(|i| Bin { from: i * width, to: (i + 1) * width, rows: 0 }).collect();
        for length in lengths {
            bins[length / width].rows += 1;
        }
        if lengths.is_empty() {
            bins.clear();
        }
        Self { bins, max_length, over }
    }
}

/// The next of 1, 2, 5, 10, 20, 50 ...
fn round_up(width: usize) -> usize {
    let mut unit = 1;
    loop {
        for step in [1, 2, 5] {
            if step * unit >= width {
                return step * unit;
            }
        }
        unit *= 10;
    }
}
