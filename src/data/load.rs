//! From the run file's `[data]` to rows of tokens, with a count of everything that happened on the way.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use rayon::prelude::*;

use super::format::{self, Format, Mapping};
use super::mask::{self, MaskMethod};
use super::message::Example;
use super::normalise::normalise;
use super::order::{draw, held_out};
use super::report::{DroppedRow, Place, Report, SourceReport, TruncatedRow};
use super::template::ChatTemplate;
use super::{DataError, IGNORED, Row, read};
use crate::model::tokenizer::Tokenizer;
use crate::spec::{DataSource, DataSpec, EvalData, TooLong, TrainData};

/// How far the work is, for a progress line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub stage: &'static str,
    pub done: usize,
    pub total: usize,
}

/// Rows ready to train on.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// In the order of the sources; [`order`](super::order) shuffles.
    pub train: Vec<Row>,
    pub eval: Vec<Row>,
    pub report: Report,
}

/// An example and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Located {
    pub example: Example,
    pub place: Place,
    pub hash: u64,
}

/// Reads, normalises, holds out, tokenizes. `seed` decides which rows are held out and drawn.
///
/// # Errors
/// When a file cannot be read or understood, or when nothing is left to train on.
pub fn load(
    spec: &DataSpec,
    seed: u64,
    tokenizer: Option<&Tokenizer>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Loaded, DataError> {
    check(spec)?;
    let fraction = match &spec.eval {
        EvalData::Fraction(fraction) => *fraction,
        EvalData::Path(_) => 0.0,
    };
    let mut report = Report { max_length: spec.max_length, ..Report::default() };
    let (mut train, mut eval) = (Vec::new(), Vec::new());
    for (index, source) in sources(spec).iter().enumerate() {
        let examples = gather(source, spec, Split::Train, &mut report, progress)?;
        // Held out before rows are repeated, so that no repeat of a held-out row is trained on.
        let held = if hold_out_documents(&examples, fraction) {
            held_out(examples.len(), fraction, seed.wrapping_add(index as u64))
        } else {
            vec![false; examples.len()]
        };
        let (mut kept, mut out) = (Vec::new(), Vec::new());
        for (example, held) in examples.into_iter().zip(held) {
            if held { out.push(example) } else { kept.push(example) }
        }
        train.extend(weigh(kept, source, seed, index));
        eval.extend(out);
    }
    if let EvalData::Path(path) = &spec.eval {
        let source = DataSource { path: path.clone(), ..DataSource::default() };
        eval = gather(&source, spec, Split::Eval, &mut report, progress)?;
    }
    if train.is_empty() {
        return Err(nothing_left(&report));
    }
    let hashes: HashSet<u64> = train.iter().map(|example| example.hash).collect();
    report.overlap = eval.iter().filter(|example| hashes.contains(&example.hash)).count();

    let chat = train.iter().chain(&eval).any(|located| matches!(located.example, Example::Chat { .. }));
    let template = match (chat, tokenizer) {
        (false, _) => None,
        (true, Some(tokenizer)) => Some(ChatTemplate::choose(&spec.template, tokenizer)?),
        (true, None) => return Err(no_tokenizer(&report)),
    };
    let work = Work { spec, tokenizer, template: template.as_ref(), progress };
    let mut train_rows = work.tokenize(&train, &mut report)?;
    let mut eval_rows = work.tokenize(&eval, &mut report)?;
    if fraction > 0.0 && eval_rows.is_empty() && train_rows.len() > 1 {
        // One long text: its documents are too few to hold any out, so rows of the stream are.
        let held = held_out(train_rows.len(), fraction, seed);
        let mut keep = Vec::new();
        for (row, held) in train_rows.into_iter().zip(held) {
            if held { eval_rows.push(row) } else { keep.push(row) }
        }
        train_rows = keep;
        report.held_out_of_stream = true;
    }
    if train_rows.is_empty() {
        return Err(nothing_left(&report));
    }
    report.template = template.map(|template| template.origin);
    report.finish(&train_rows, &eval_rows, tokenizer);
    if train_rows.iter().all(|row| row.labels.iter().skip(1).all(|label| *label == IGNORED)) {
        return Err(DataError::AllMasked { rows: train_rows.len() });
    }
    Ok(Loaded { train: train_rows, eval: eval_rows, report })
}

fn check(spec: &DataSpec) -> Result<(), DataError> {
    if spec.max_length < 2 {
        return Err(DataError::Value {
            key: "data.max_length",
            value: spec.max_length.to_string(),
            allowed: "at least 2 tokens: a token is learned from the one before it".into(),
        });
    }
    if let EvalData::Fraction(fraction) = spec.eval
        && !(0.0..1.0).contains(&fraction)
    {
        return Err(DataError::Value {
            key: "data.eval",
            value: fraction.to_string(),
            allowed: "a fraction from 0 to below 1 held out of the training rows, or a file".into(),
        });
    }
    Ok(())
}

/// An error when rows may be longer than the model can attend to.
///
/// # Errors
/// When `max_length` is over `context`.
pub fn check_context(max_length: usize, context: usize) -> Result<(), DataError> {
    if max_length > context { Err(DataError::OverContext { max_length, context }) } else { Ok(()) }
}

/// The sources of `data.train`, however it is written.
pub(super) fn sources(spec: &DataSpec) -> Vec<DataSource> {
    match &spec.train {
        TrainData::Path(path) => vec![DataSource { path: path.clone(), ..DataSource::default() }],
        TrainData::Sources(sources) => sources.clone(),
    }
}

/// The data compiled into the binary: questions about this program, and as `data.eval` other phrasings of them.
const DEMO: &str = "demo";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    Train,
    Eval,
}

/// Reads the files of a source and makes examples of their rows.
pub(super) fn gather(
    source: &DataSource,
    spec: &DataSpec,
    split: Split,
    report: &mut Report,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Vec<Located>, DataError> {
    let mut examples = Vec::new();
    let mut seen = HashMap::new();
    let mut read_any = false;
    for (key, value) in [("subset", &source.subset), ("split", &source.split)] {
        if !value.is_empty() {
            return Err(DataError::Unsupported {
                path: source.path.clone(),
                what: format!("{key} = \"{value}\" is for datasets of the hub, which are not read yet"),
                hint: format!("leave {key} out and give the file that holds it"),
            });
        }
    }
    let embedded = source.path == DEMO;
    let files = if embedded { vec![DEMO.into()] } else { read::files(Path::new(&source.path))? };
    for (done, path) in files.iter().enumerate() {
        progress(Progress { stage: "reading", done, total: files.len() });
        let records = match (embedded, split) {
            (true, Split::Train) => read::read_lines(path, crate::demo::questions())?,
            (true, Split::Eval) => read::read_lines(path, crate::demo::held_out())?,
            (false, _) => read::read(path)?,
        };
        if records.is_empty() && files.len() > 1 {
            continue;
        }
        if records.is_empty() {
            return Err(DataError::Empty { path: path.display().to_string() });
        }
        read_any = true;
        let wanted = if source.format.is_empty() { &spec.format } else { &source.format };
        let mapping = format::detect(path, &records, Format::named(wanted)?, &source.columns)?;
        report.read += records.len();
        let mut kept = 0;
        for record in &records {
            let place = Place { file: path.clone(), line: record.line };
            match normalise(record, &mapping, &spec.system) {
                Ok(example) => {
                    let hash = hash(&example);
                    if let Some(first) = seen.insert(hash, place.clone()) {
                        report.duplicates.push(place.clone());
                        seen.insert(hash, first);
                    }
                    kept += 1;
                    examples.push(Located { example, place, hash });
                }
                Err(reason) => report.dropped.push(DroppedRow { place, reason: reason.0 }),
            }
        }
        report.sources.push(source_report(path, split, mapping, records.len(), kept));
    }
    if !read_any {
        return Err(DataError::Empty { path: source.path.clone() });
    }
    if let Some(rows) = source.rows {
        examples.truncate(rows);
    }
    Ok(examples)
}

fn source_report(path: &Path, split: Split, mapping: Mapping, rows: usize, kept: usize) -> SourceReport {
    SourceReport { path: path.to_owned(), eval: split == Split::Eval, mapping, rows, kept }
}

/// The rows of a source as often as its weight says: 2 is every row twice, 0.5 half of them.
fn weigh(examples: Vec<Located>, source: &DataSource, seed: u64, index: usize) -> Vec<Located> {
    if source.weight <= 0.0 || source.weight == 1.0 {
        return examples;
    }
    let count = (examples.len() as f64 * source.weight).round().max(1.0) as usize;
    draw(examples.len(), count, seed, index).into_iter().map(|row| examples[row].clone()).collect()
}

/// Documents of plain text are held out whole when there are enough of them.
fn hold_out_documents(examples: &[Located], fraction: f64) -> bool {
    let text = examples.iter().all(|located| matches!(located.example, Example::Text(_)));
    fraction > 0.0 && examples.len() > 1 && (!text || examples.len() as f64 * fraction >= 1.0)
}

fn hash(example: &Example) -> u64 {
    let mut hasher = DefaultHasher::new();
    match example {
        Example::Text(text) => text.hash(&mut hasher),
        Example::Tokens { input_ids, labels, .. } => (input_ids, labels).hash(&mut hasher),
        Example::Chat { messages, tools } => {
            for message in messages {
                serde_json::Value::Object(message.fields.clone()).to_string().hash(&mut hasher);
            }
            tools.as_ref().map(ToString::to_string).hash(&mut hasher);
        }
    }
    hasher.finish()
}

fn no_tokenizer(report: &Report) -> DataError {
    let path = report.sources.first().map(|source| source.path.display().to_string()).unwrap_or_default();
    DataError::Unsupported {
        path,
        what: "text needs a tokenizer, and the model's folder has none".into(),
        hint: "put the model's tokenizer.json into its folder, or give rows of input_ids and labels".into(),
    }
}

fn nothing_left(report: &Report) -> DataError {
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for dropped in &report.dropped {
        *reasons.entry(dropped.reason.as_str()).or_default() += 1;
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let why = reasons.iter().take(3).map(|(reason, count)| format!("{count}: {reason}")).collect::<Vec<_>>().join("; ");
    let masked = report.dropped.iter().filter(|dropped| dropped.reason == NO_LABELS).count();
    if masked > 0 && masked == report.dropped.len() {
        return DataError::AllMasked { rows: masked };
    }
    DataError::NothingLeft { read: report.read, why }
}

/// Why rows are dropped that no label survives in.
const NO_LABELS: &str = "no token of it would be trained on";

struct Work<'a> {
    spec: &'a DataSpec,
    tokenizer: Option<&'a Tokenizer>,
    template: Option<&'a ChatTemplate>,
    progress: &'a (dyn Fn(Progress) + Sync),
}

enum Made {
    Row(Row, Option<MaskMethod>),
    Document(Vec<u32>),
    Unfit(String),
}

/// Rows tokenized between two progress reports.
const CHUNK: usize = 512;

impl Work<'_> {
    fn tokenize(&self, examples: &[Located], report: &mut Report) -> Result<Vec<Row>, DataError> {
        let mut rows = Vec::with_capacity(examples.len());
        let mut stream = Stream { max_length: self.spec.max_length, tokens: Vec::new(), source: 0, rows: Vec::new() };
        let mut too_long: Vec<(usize, usize)> = Vec::new();
        for (chunk, start) in examples.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            (self.progress)(Progress { stage: "tokenizing", done: start, total: examples.len() });
            let made: Vec<Result<Made, DataError>> =
                chunk.par_iter().enumerate().map(|(i, located)| self.make(&located.example, start + i)).collect();
            for (i, (located, made)) in chunk.iter().zip(made).enumerate() {
                let drop = |reason: String| DroppedRow { place: located.place.clone(), reason };
                match made? {
                    Made::Unfit(reason) => report.dropped.push(drop(reason)),
                    Made::Document(tokens) => stream.push(&tokens, start + i),
                    Made::Row(mut row, method) => {
                        let length = row.input_ids.len();
                        report.lengths.push(length);
                        if let Some(method) = method {
                            *report.mask_methods.entry(method).or_default() += 1;
                        }
                        if length > self.spec.max_length {
                            match self.spec.too_long {
                                TooLong::Error => too_long.push((located.place.line, length)),
                                TooLong::Drop => {
                                    report.dropped.push(drop("longer than max_length".into()));
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
            }
        }
        if let Some(&(first, length)) = too_long.first() {
            return Err(DataError::TooLong { rows: too_long.len(), first, length, max_length: self.spec.max_length });
        }
        let streamed = stream.finish();
        report.lengths.extend(streamed.iter().map(|row| row.input_ids.len()));
        rows.extend(streamed);
        Ok(rows)
    }

    fn make(&self, example: &Example, source: usize) -> Result<Made, DataError> {
        let tokenizer = || self.tokenizer.ok_or_else(|| no_tokenizer(&Report::default()));
        match example {
            Example::Tokens { input_ids, labels, weights } => Ok(Made::Row(
                Row { input_ids: input_ids.clone(), labels: labels.clone(), weights: weights.clone(), source },
                None,
            )),
            Example::Text(text) => {
                let tokenizer = tokenizer()?;
                let mut tokens = tokenizer.encode(text, true)?;
                // The end of a text is learned too.
                if let Some(end) = tokenizer.eos_id().filter(|end| tokens.last() != Some(end)) {
                    tokens.push(end);
                }
                Ok(Made::Document(tokens))
            }
            Example::Chat { messages, tools } => {
                let tokenizer = tokenizer()?;
                let Some(template) = self.template else { return Ok(Made::Unfit("no chat template".into())) };
                let masked = match mask::mask(template, tokenizer, messages, tools.as_ref(), self.spec.loss_on) {
                    Ok(masked) => masked,
                    Err(DataError::Template { what, .. }) => return Ok(Made::Unfit(format!("chat template: {what}"))),
                    Err(error) => return Err(error),
                };
                let encoded = tokenizer.encode_with_offsets(&masked.text, false)?;
                let (labels, weights) = mask::labels(&encoded.ids, &encoded.offsets, &masked.answers);
                Ok(Made::Row(Row { input_ids: encoded.ids, labels, weights, source }, Some(masked.method)))
            }
        }
    }
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
