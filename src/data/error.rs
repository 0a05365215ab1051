//! What can be wrong with data: each message says what and where, [`DataError::hint`] what to do next.

use std::path::PathBuf;

use crate::model::tokenizer::TokenizerError;

#[derive(Clone, Debug, thiserror::Error)]
pub enum DataError {
    #[error("{path} does not exist", path = path.display())]
    NotFound { path: PathBuf },
    #[error("{path} could not be read: {what}", path = path.display())]
    Read { path: PathBuf, what: String },
    #[error("{path}: {what}", path = path.display())]
    Unreadable { path: PathBuf, what: String },
    #[error("{path} line {line}: {what}", path = path.display())]
    Line { path: PathBuf, line: usize, what: String },
    #[error("{path}: {what}", path = path.display())]
    Content { path: PathBuf, what: String },
    #[error("{path} has no rows")]
    Empty { path: String },
    #[error("no rows are left of {read} read ({why})")]
    NothingLeft { read: usize, why: String },
    #[error("not one token of {rows} rows would be trained on: every label is masked")]
    AllMasked { rows: usize },
    #[error("{path}: no format fits the columns {columns}", path = path.display())]
    Format { path: PathBuf, columns: String, hint: String },
    #[error("data.format = \"{name}\" is not known")]
    UnknownFormat { name: String, allowed: String },
    #[error("{path}: {what}")]
    Unsupported { path: String, what: String, hint: String },
    #[error("{key} = {value} is not allowed")]
    Value { key: &'static str, value: String, allowed: String },
    #[error("{rows} rows are longer than data.max_length = {max_length} tokens; the first, {first}, has {length}")]
    TooLong { rows: usize, first: String, length: usize, max_length: usize },
    #[error("data.max_length = {max_length} is over the model's context of {context} tokens")]
    OverContext { max_length: usize, context: usize },
    #[error("a row of {length} tokens does not fit the largest micro-batch of {size} tokens")]
    DoesNotFit { length: usize, size: usize },
    #[error("chat template {template}: {what}")]
    Template { template: String, what: String },
    #[error("data.template = \"{name}\" is neither a built-in template nor a file")]
    UnknownTemplate { name: String, allowed: String },
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl DataError {
    /// The next step; empty where there is none to name.
    pub fn hint(&self) -> String {
        match self {
            Self::NotFound { .. } => format!("data is a file ({READABLE}) or a folder of such files"),
            Self::Unreadable { .. } => format!("readable are {READABLE}"),
            Self::Line { .. } => "mend or delete that line".into(),
            Self::NothingLeft { .. } => "`tune data FILE` lists the rows and why each was dropped".into(),
            Self::AllMasked { .. } => {
                "check data.loss_on, data.template and the columns with `tune data FILE --model M`".into()
            }
            Self::Format { hint, .. } | Self::Unsupported { hint, .. } => hint.clone(),
            Self::UnknownFormat { allowed, .. } => format!("allowed are {allowed}"),
            Self::Value { allowed, .. } => allowed.clone(),
            Self::TooLong { .. } => "raise data.max_length, or set data.too_long to \"truncate\" or \"drop\"".into(),
            Self::OverContext { context, .. } => format!("set data.max_length to {context} or less"),
            Self::DoesNotFit { .. } => "lower data.max_length".into(),
            Self::UnknownTemplate { allowed, .. } => format!("allowed are {allowed}, or the path of a .jinja file"),
            Self::Template { .. } => {
                "set data.template to a built-in one or a file of your own, or mend the rows it refuses".into()
            }
            Self::Tokenizer(error) => error.hint().into(),
            Self::Read { .. } | Self::Content { .. } | Self::Empty { .. } => String::new(),
        }
    }
}

/// What the reader opens, for messages.
pub const READABLE: &str = ".parquet, and .json, .jsonl, .ndjson, .csv, .tsv, .txt, .md, each of these also as .xz";
