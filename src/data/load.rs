//! From the run file's `[data]` to rows of tokens, with a count of everything that happened on the way.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::format::{self, Format};
use super::message::Example;
use super::normalise::normalise;
use super::order::{draw, held_out};
use super::report::{DroppedRow, Place, Report, SourceReport};
use super::template::ChatTemplate;
use super::tokenize::{NO_LABELS, Work};
use super::{DataError, Row, read};
use crate::model::tokenizer::Tokenizer;
use crate::spec::{DataSource, DataSpec, EvalData, TrainData};

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
    /// In the order of the sources; [`order`](super::order) shuffles. [`Report::place`] says where a row stands.
    pub train: Vec<Row>,
    pub eval: Vec<Row>,
    pub report: Report,
}

/// An example and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Located {
    pub example: Example,
    /// Number of its row over all files read, from 0.
    pub source: usize,
    pub place: Place,
    pub held_out: bool,
    hash: u64,
}

/// All that a load comes to, also where it cannot be trained on.
pub(super) struct Assembled {
    pub loaded: Loaded,
    /// Every row that became an example, in the order of the files.
    pub examples: Vec<Located>,
    pub template: Option<ChatTemplate>,
    /// Why nothing can be trained on it.
    pub problem: Option<DataError>,
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
    let assembled = assemble(spec, seed, tokenizer, progress)?;
    match assembled.problem {
        Some(problem) => Err(problem),
        None => Ok(assembled.loaded),
    }
}

/// As [`load`], with what is there where nothing can be trained on.
pub(super) fn assemble(
    spec: &DataSpec,
    seed: u64,
    tokenizer: Option<&Tokenizer>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Assembled, DataError> {
    check(spec)?;
    let fraction = match &spec.eval {
        EvalData::Fraction(fraction) => *fraction,
        EvalData::Path(_) => 0.0,
    };
    let mut report = Report { max_length: spec.max_length, ..Report::default() };
    let (mut examples, mut train) = (Vec::new(), Vec::new());
    for (index, source) in sources(spec).iter().enumerate() {
        let mut found = gather(source, spec, Split::Train, &mut report, progress)?;
        // Held out before rows are repeated, so that no repeat of a held-out row is trained on.
        if hold_out_examples(&found, fraction) {
            let held = held_out(found.len(), fraction, seed.wrapping_add(index as u64));
            for (example, held) in found.iter_mut().zip(held) {
                example.held_out = held;
            }
        }
        train.extend(weigh(found.iter().filter(|example| !example.held_out), source, seed, index)?);
        examples.extend(found);
    }
    if let EvalData::Path(path) = &spec.eval {
        // Written like the training rows, or in a format of its own.
        let alike = sources(spec).into_iter().next().unwrap_or_default();
        let source = DataSource { path: path.clone(), ..DataSource::default() };
        let like_train = DataSource { format: alike.format, columns: alike.columns, ..source.clone() };
        let mut found = match gather(&like_train, spec, Split::Eval, &mut report, progress) {
            Err(DataError::Format { .. }) if like_train != source => {
                gather(&source, spec, Split::Eval, &mut report, progress)?
            }
            other => other?,
        };
        found.iter_mut().for_each(|example| example.held_out = true);
        examples.extend(found);
    }
    let eval: Vec<Located> = examples.iter().filter(|example| example.held_out).cloned().collect();
    let hashes: HashSet<u64> = train.iter().map(|example| example.hash).collect();
    report.overlap = eval.iter().filter(|example| hashes.contains(&example.hash)).count();

    let chat = examples.iter().any(|located| matches!(located.example, Example::Chat { .. }));
    let template = match (chat, tokenizer) {
        (false, _) => None,
        (true, Some(tokenizer)) => Some(ChatTemplate::choose(&spec.template, tokenizer)?),
        (true, None) => return Err(no_tokenizer()),
    };
    let work = Work { spec, tokenizer, template: template.as_ref() };
    let mut too_long = Vec::new();
    let mut train_rows = work.tokenize(&train, &mut report, &mut too_long, progress)?;
    let mut eval_rows = work.tokenize(&eval, &mut report, &mut too_long, progress)?;
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
    report.template = template.as_ref().map(|template| template.origin.clone());
    report.finish(&train_rows, &eval_rows, tokenizer);
    let masked = report.dropped.iter().filter(|dropped| dropped.reason == NO_LABELS).count();
    let problem = match too_long.first() {
        Some((first, length)) => Some(DataError::TooLong {
            rows: too_long.len(),
            first: first.clone(),
            length: *length,
            max_length: spec.max_length,
        }),
        None if !train_rows.is_empty() => None,
        None if masked > 0 && masked == report.dropped.len() => Some(DataError::AllMasked { rows: masked }),
        None => Some(nothing_left(&report)),
    };
    Ok(Assembled { loaded: Loaded { train: train_rows, eval: eval_rows, report }, examples, template, problem })
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
    let mut seen = HashSet::new();
    let mut read_any = false;
    let embedded = source.path == DEMO;
    let files = if embedded {
        vec![DEMO.into()]
    } else {
        let folder = read::locate(&source.path)?;
        read::select(&folder, read::files(&folder)?, &source.subset, &source.split)?
    };
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
        let first = report.read;
        report.read += records.len();
        let before = examples.len();
        for (i, record) in records.iter().enumerate() {
            let place = Place { file: path.clone(), line: record.line };
            match normalise(record, &mapping, &spec.system) {
                Ok(example) => {
                    let hash = hash(&example);
                    if !seen.insert(hash) {
                        report.duplicates.push(place.clone());
                    }
                    examples.push(Located { example, source: first + i, place, held_out: false, hash });
                }
                Err(reason) => report.dropped.push(DroppedRow { place, reason: reason.0 }),
            }
        }
        report.sources.push(SourceReport {
            path: path.clone(),
            eval: split == Split::Eval,
            mapping,
            rows: records.len(),
            kept: examples.len() - before,
            first,
            lines: records.iter().map(|record| record.line).collect(),
        });
    }
    if !read_any {
        return Err(DataError::Empty { path: source.path.clone() });
    }
    if let Some(rows) = source.rows {
        report.left_out += examples.len().saturating_sub(rows);
        examples.truncate(rows);
    }
    Ok(examples)
}

/// The rows of a source as often as its weight says: 2 is every row twice, 0.5 half of them.
fn weigh<'a>(
    examples: impl Iterator<Item = &'a Located>,
    source: &DataSource,
    seed: u64,
    index: usize,
) -> Result<Vec<Located>, DataError> {
    let examples: Vec<&Located> = examples.collect();
    // A table without the key has 0.
    let weight = if source.weight == 0.0 { 1.0 } else { source.weight };
    if !weight.is_finite() || weight < 0.0 {
        return Err(DataError::Value {
            key: "data.train.weight",
            value: weight.to_string(),
            allowed: "above 0: 2 is every row twice, 0.5 half of the rows".into(),
        });
    }
    if weight == 1.0 {
        return Ok(examples.into_iter().cloned().collect());
    }
    let count = (examples.len() as f64 * weight).round().max(1.0) as usize;
    Ok(draw(examples.len(), count, seed, index).into_iter().map(|row| examples[row].clone()).collect())
}

/// Documents of plain text are held out whole when there are enough of them.
fn hold_out_examples(examples: &[Located], fraction: f64) -> bool {
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

pub(super) fn no_tokenizer() -> DataError {
    DataError::Unsupported {
        path: "data".into(),
        what: "text needs a tokenizer, and the model has none".into(),
        hint: "put the model's tokenizer.json into its folder, or give rows of input_ids and labels".into(),
    }
}

fn nothing_left(report: &Report) -> DataError {
    let reasons = report.dropped_by_reason();
    let why = reasons.iter().take(3).map(|(reason, count)| format!("{count}: {reason}")).collect::<Vec<_>>().join("; ");
    DataError::NothingLeft { read: report.read, why }
}
