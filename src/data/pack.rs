//! Packing: rows laid end to end in micro-batches of the few token sizes that programs exist for.

use super::{DataError, MicroBatch, Row};

/// A label that is not trained on.
pub const IGNORED: i32 = -100;

/// Lays rows end to end, in order, in micro-batches of the given `sizes` (tokens), choosing the cheapest cover:
/// with `cheapest(i)` the least cost of the first `i` rows,
/// `cheapest(i) = min over j < i of cheapest(j) + cost(smallest program that holds rows j..i)`.
/// Without `packing` every row has a micro-batch of its own.
///
/// Each row is a document with its own positions; what no row fills is a document without labels.
///
/// # Errors
/// When a row is longer than the largest size.
pub fn pack(
    rows: &[&Row],
    sizes: &[usize],
    cost: impl Fn(usize) -> f64,
    packing: bool,
) -> Result<Vec<MicroBatch>, DataError> {
    let largest = sizes.iter().copied().max().unwrap_or(0);
    if let Some(row) = rows.iter().find(|row| row.input_ids.len() > largest) {
        return Err(DataError::DoesNotFit { length: row.input_ids.len(), size: largest });
    }
    let cheapest_size = |tokens: usize| -> (usize, f64) {
        let mut best = (largest, f64::INFINITY);
        for &size in sizes.iter().filter(|&&size| size >= tokens) {
            let price = cost(size);
            if price < best.1 || (price == best.1 && size < best.0) {
                best = (size, price);
            }
        }
        best
    };
    // cover[i] = (cost, first row of the last micro-batch, its size) of the best cover of rows ..i
    let mut cover: Vec<(f64, usize, usize)> = vec![(0.0, 0, 0)];
    for end in 1..=rows.len() {
        let mut best = (f64::INFINITY, end - 1, largest);
        let mut tokens = 0;
        for start in (0..end).rev() {
            tokens += rows[start].input_ids.len();
            if tokens > largest || (!packing && start + 1 < end) {
                break;
            }
            let (size, price) = cheapest_size(tokens);
            let total = cover[start].0 + price;
            // At equal cost the fuller, earlier micro-batch: fewer of them.
            if total <= best.0 {
                best = (total, start, size);
            }
        }
        cover.push(best);
    }
    let mut batches = Vec::new();
    let mut end = rows.len();
    while end > 0 {
        let (_, start, size) = cover[end];
        batches.push(lay_out(rows, start..end, size));
        end = start;
    }
    batches.reverse();
    Ok(batches)
}

fn lay_out(rows: &[&Row], range: std::ops::Range<usize>, size: usize) -> MicroBatch {
    let mut batch = MicroBatch {
        size,
        ids: Vec::with_capacity(size),
        positions: Vec::with_capacity(size),
        document_start: Vec::with_capacity(size),
        document_end: Vec::with_capacity(size),
        targets: Vec::with_capacity(size),
        token_weights: Vec::with_capacity(size),
        label_tokens: 0,
        padding: 0,
        rows: range.clone().collect(),
    };
    for row in range {
        let row = rows[row];
        let (start, length) = (batch.ids.len(), row.input_ids.len());
        for (t, &id) in row.input_ids.iter().enumerate() {
            // The label of token t + 1 is the target of token t; a document's last token has none.
            let target = row.labels.get(t + 1).copied().unwrap_or(IGNORED);
            let labelled = target != IGNORED;
            batch.ids.push(id as i32);
            batch.positions.push(t as i32);
            batch.document_start.push(start as i32);
            batch.document_end.push((start + length) as i32);
            batch.targets.push(target);
            let weight = row.weights.get(t + 1).copied().unwrap_or(1.0);
            batch.token_weights.push(if labelled { weight } else { 0.0 });
            batch.label_tokens += usize::from(labelled);
        }
    }
    let start = batch.ids.len();
    batch.padding = size - start;
    for t in 0..batch.padding {
        batch.ids.push(0);
        batch.positions.push(t as i32);
        batch.document_start.push(start as i32);
        batch.document_end.push(size as i32);
        batch.targets.push(IGNORED);
        batch.token_weights.push(0.0);
    }
    batch
}
