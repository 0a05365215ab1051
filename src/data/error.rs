//! What can be wrong with data: each message says what, where, and what to do next.

use std::path::PathBuf;

use crate::model::tokenizer::TokenizerError;

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{path} does not exist\nhint: data is a file (.json, .jsonl, .csv, .txt) or a folder of such files")]
    NotFound { path: PathBuf },
    #[error("{path} could not be read: {what}")]
    Read { path: PathBuf, what: String },
    #[error("{path}: {what}\nhint: readable are {READABLE}")]
    Unreadable { path: PathBuf, what: String },
    #[error("{path} line {line}: {what}\nhint: every line must be one complete JSON object; mend or delete that line")]
    Line { path: PathBuf, line: usize, what: String },
    #[error("{path}: {what}")]
    Content { path: PathBuf, what: String },
    #[error("{path} has no rows")]
    Empty { path: String },
    #[error("no rows are left of {read} read: {why}\nhint: `tune data FILE` lists the rows and why each was dropped")]
    NothingLeft { read: usize, why: String },
    #[error(
        "not one token of {rows} rows would be trained on: every label is masked\nhint: check data.loss_on, \
         data.template and the column mapping with `tune data FILE --model M`"
    )]
    AllMasked { rows: usize },
    #[error("{path}: the format was not recognised from the columns {columns}\nhint: {hint}")]
    Format { path: PathBuf, columns: String, hint: String },
    #[error("data.format = \"{name}\" is not known\nhint: allowed are {allowed}")]
    UnknownFormat { name: String, allowed: String },
    #[error("{path}: {what}\nhint: {hint}")]
    Unsupported { path: String, what: String, hint: String },
    #[error("{key} = {value} is not allowed\nhint: {allowed}")]
    Value { key: &'static str, value: String, allowed: String },
    #[error(
        "{rows} rows are longer than data.max_length = {max_length} tokens, the first is row {first} with {length}\n\
         hint: raise data.max_length, or set data.too_long to \"truncate\" or \"drop\""
    )]
    TooLong { rows: usize, first: usize, length: usize, max_length: usize },
    #[error(
        "data.max_length = {max_length} is over the model's context of {context} tokens\nhint: set it to {context} or less"
    )]
    OverContext { max_length: usize, context: usize },
    #[error("a row of {length} tokens does not fit the largest micro-batch of {size} tokens")]
    DoesNotFit { length: usize, size: usize },
    #[error("chat template {template}: {what}")]
    Template { template: String, what: String },
    #[error(
        "data.template = \"{name}\" is neither a built-in template nor a file\nhint: built in are {allowed}; or give a path to a .jinja file"
    )]
    UnknownTemplate { name: String, allowed: String },
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// What the reader opens, for messages.
pub const READABLE: &str = ".json, .jsonl, .ndjson, .csv, .tsv, .txt, .md, each also as .xz";
