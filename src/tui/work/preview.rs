//! What the data is like: loaded as the run would load it.

use std::sync::mpsc::Sender;

use crate::data::{self, IGNORED, Row};
use crate::model::tokenizer::Tokenizer;
use crate::spec::RunSpec;
use crate::train;
use crate::tui::message::{Message, Piece, PieceKind, Preview, Request, RowView};

/// Rows that are shown.
const SHOWN: usize = 200;

/// Columns whose names say that the model should see them.
const PROMPT_NAMES: [&str; 8] =
    ["prompt", "question", "query", "instruction", "input", "system", "context", "messages"];

/// Answers a request for a preview.
pub fn perform(request: Request, sender: &Sender<Message>) {
    let Request::Preview { generation, spec } = request else { return };
    let result = preview(&spec).map(Box::new);
    let _ = sender.send(Message::Preview { generation, result });
}

fn preview(spec: &RunSpec) -> Result<Preview, String> {
    let (_, tokenizer) = train::open_model(spec).map_err(|error| error.to_string())?;
    let loaded =
        data::load(&spec.data, spec.train.seed, Some(&tokenizer), &|_| {}).map_err(|error| error.to_string())?;
    let report = &loaded.report;
    let mut formats: Vec<&str> = report.sources.iter().map(|source| source.mapping.format.name()).collect();
    formats.dedup();
    let mut columns: Vec<(String, Option<String>)> = Vec::new();
    let mut unmapped = Vec::new();
    for mapping in report.sources.iter().map(|source| &source.mapping) {
        for (role, column) in &mapping.columns {
            columns.push((column.clone(), Some(role.clone())));
        }
        for column in &mapping.unmapped {
            columns.push((column.clone(), None));
            if PROMPT_NAMES.contains(&column.to_ascii_lowercase().as_str()) {
                unmapped.push(column.clone());
            }
        }
    }
    columns.dedup();
    let reasons = report.dropped_by_reason();
    let empty = reasons.iter().filter(|(reason, _)| reason.contains("empty")).map(|(_, count)| count).sum();
    let mut lint: Vec<String> = report.lint.iter().map(|lint| format!("{}; {}", lint.message, lint.advice)).collect();
    lint.extend(reasons.iter().map(|(reason, count)| format!("{count} rows dropped: {reason}")));
    Ok(Preview {
        format: formats.join(", "),
        columns,
        rows: report.train_rows,
        eval_rows: report.eval_rows,
        dropped: report.dropped.len(),
        empty,
        duplicates: report.duplicates.len(),
        shared: report.overlap,
        cut: report.truncated.len(),
        label_tokens: report.label_tokens,
        lengths: report.lengths.clone(),
        lint,
        samples: loaded.train.iter().take(SHOWN).map(|row| view(row, &tokenizer)).collect(),
        unmapped,
    })
}

/// The row token by token. Bytes of a character that spans tokens are shown with the last of them.
fn view(row: &Row, tokenizer: &Tokenizer) -> RowView {
    let mut stream = tokenizer.stream(false);
    let mut pieces: Vec<Piece> = Vec::new();
    for (&id, &label) in row.input_ids.iter().zip(&row.labels) {
        let kind = match (tokenizer.is_special(id), label != IGNORED) {
            (true, true) => PieceKind::TrainedSpecial,
            (true, false) => PieceKind::Special,
            (false, true) => PieceKind::Trained,
            (false, false) => PieceKind::Masked,
        };
        let text = stream.push(id).unwrap_or_default();
        match pieces.last_mut() {
            // Neighbours that look the same are one piece.
            Some(last) if last.kind == kind => last.text.push_str(&text),
            _ => pieces.push(Piece { text, kind }),
        }
    }
    if let (Ok(rest), Some(last)) = (stream.finish(), pieces.last_mut()) {
        last.text.push_str(&rest);
    }
    let trained = row.labels.iter().filter(|label| **label != IGNORED).count();
    RowView { tokens: row.input_ids.len(), trained, pieces }
}
