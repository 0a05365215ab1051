//! Data: read, normalise to messages, render the template, tokenize with a label mask, pack.

mod error;
mod format;
mod load;
mod mask;
mod message;
mod normalise;
mod order;
mod pack;
mod parquet;
mod preview;
mod python_json;
mod read;
mod report;
mod template;
mod tokenize;

pub use error::DataError;
pub use format::{Format, Mapping};
pub use load::{Loaded, Progress, check_context, load};
pub use mask::{MaskMethod, Masked, labels, mask};
pub use message::{Example, Message};
pub use order::{held_out, order};
pub use pack::{IGNORED, pack};
pub use preview::{Bin, Histogram, Preview, RowView, TokenSpan};
pub use read::{locate, retain_readable};
pub use report::{DroppedRow, Lint, Place, Report, SourceReport, TruncatedRow};
pub use template::{ChatTemplate, Rendered, built_in_templates};

/// A tokenized example.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub input_ids: Vec<u32>,
    /// The token itself where it is trained on, -100 where it is not. Unshifted, as in Transformers.
    pub labels: Vec<i32>,
    /// Weight of each token's loss when it is the target; empty for 1 everywhere.
    pub weights: Vec<f32>,
    /// Where it came from: the number of its row over all files read, from 0; [`Report::place`] gives file and line.
    pub source: usize,
}

/// Rows laid end to end in one of the program's sizes; the arrays are what the program's inputs hold.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// Tokens of the program it is for; every array has this length.
    pub size: usize,
    pub ids: Vec<i32>,
    /// Position in the document.
    pub positions: Vec<i32>,
    pub document_start: Vec<i32>,
    pub document_end: Vec<i32>,
    /// The next token of the document where that is labelled, else -100.
    pub targets: Vec<i32>,
    pub token_weights: Vec<f32>,
    /// Targets that are not -100, weighted or not.
    pub label_tokens: usize,
    /// Tokens that no row filled; a document of its own without labels.
    pub padding: usize,
    /// Which of the rows given are in it.
    pub rows: Vec<usize>,
}
