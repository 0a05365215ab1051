//! Causal attention within documents, forward and backward, and attention over a key-value cache.
//!
//! Scores exist for one block of queries and one head at a time. The backward pass walks the query blocks of a
//! document in order, so sums into keys and values always have the same order.

use std::ops::Range;

use rayon::prelude::*;

use super::device;
use super::elementary::{exp, maximum, sum, tanh, vectorized};
use super::product::{Into, Matrix, MatrixMut, multiply, with_scratch};
use crate::backend::EngineError;
use crate::program::AttentionShape;

/// Queries of one block.
const QUERIES: usize = 64;

/// Column ranges of the heads in a query-key-value row.
fn query(shape: &AttentionShape, head: usize) -> Range<usize> {
    let start = head * shape.head_dim;
    start..start + shape.head_dim
}

fn key(shape: &AttentionShape, head: usize) -> Range<usize> {
    let start = shape.query_columns() + head * shape.head_dim;
    start..start + shape.head_dim
}

fn value(shape: &AttentionShape, head: usize) -> Range<usize> {
    let start = shape.query_columns() + shape.kv_columns() + head * shape.head_dim;
    start..start + shape.head_dim
}

/// Query heads that share a key-value head.
fn group(shape: &AttentionShape, kv_head: usize) -> Range<usize> {
    let size = shape.heads / shape.kv_heads;
    kv_head * size..(kv_head + 1) * size
}

/// Token ranges of the documents.
fn documents(document_start: &[i32]) -> Result<Vec<Range<usize>>, EngineError> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for (token, &start) in document_start.iter().enumerate() {
        match found.last_mut() {
            Some(last) if last.start as i32 == start => last.end = token + 1,
            _ if start as usize == token => found.push(token..token + 1),
            _ => return Err(device(format!("token {token} is said to be of a document that starts at {start}"))),
        }
    }
    Ok(found)
}

fn query_blocks(document: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    document.clone().step_by(QUERIES).map(move |start| start..(start + QUERIES).min(document.end))
}

/// First token that `token` may see.
fn first_seen(shape: &AttentionShape, document: usize, token: usize) -> usize {
    shape.window.map_or(document, |window| document.max((token + 1).saturating_sub(window)))
}

/// Scaled and capped scores of a block of queries against the keys `seen`.
fn scores(out: &mut MatrixMut, queries: Matrix, keys: Matrix, shape: &AttentionShape) {
    multiply(out, queries, keys.transposed(), shape.scale, Into::Replace);
    if let Some(cap) = shape.softcap {
        for row in 0..out.rows {
            vectorized(
                #[inline(always)]
                || out.row(row).iter_mut().for_each(|score| *score = cap * tanh(*score / cap)),
            );
        }
    }
}

/// Replaces the scores at `valid` by their exponentials less the maximum, all others by 0; gives maximum and sum.
fn exponentials(scores: &mut [f32], valid: Range<usize>) -> (f32, f32) {
    vectorized(
        #[inline(always)]
        || {
            scores[..valid.start].fill(0.0);
            scores[valid.end..].fill(0.0);
            let scores = &mut scores[valid];
            let most = maximum(scores);
            for score in scores.iter_mut() {
                *score = exp(*score - most);
            }
            (most, sum(scores.len(), |i| scores[i]))
        },
    )
}

pub fn attention(
    qkv: Matrix,
    document_start: &[i32],
    output: &MatrixMut,
    log_sum_exp: &MatrixMut,
    shape: &AttentionShape,
) -> Result<(), EngineError> {
    let mut tasks = Vec::new();
    for document in documents(document_start)? {
        for block in query_blocks(document.clone()) {
            tasks.extend((0..shape.kv_heads).map(|head| (document.start, block.clone(), head)));
        }
    }
    tasks.into_par_iter().for_each(|(document, block, kv_head)| {
        let seen = first_seen(shape, document, block.start)..block.end;
        let keys = qkv.part(seen.clone(), key(shape, kv_head));
        let values = qkv.part(seen.clone(), value(shape, kv_head));
        with_scratch(block.len() * seen.len(), |scratch| {
            let mut weights = MatrixMut::new(scratch, seen.len());
            for head in group(shape, kv_head) {
                // SAFETY: each task writes its own rows and heads.
                let mut out = unsafe { output.part(block.clone(), query(shape, head)) };
                // SAFETY: as above.
                let mut log_sum = unsafe { log_sum_exp.part(block.clone(), head..head + 1) };
                scores(&mut weights, qkv.part(block.clone(), query(shape, head)), keys, shape);
                for (row, token) in block.clone().enumerate() {
                    let valid = first_seen(shape, document, token) - seen.start..token + 1 - seen.start;
                    let (most, total) = exponentials(weights.row(row), valid);
                    log_sum.row(row)[0] = (f64::from(most) + f64::from(total).ln()) as f32;
                    let inverse = 1.0 / total;
                    weights.row(row).iter_mut().for_each(|weight| *weight *= inverse);
                }
                multiply(&mut out, weights.as_matrix(), values, 1.0, Into::Replace);
            }
        });
    });
    Ok(())
}

pub struct AttentionBackward<'a> {
    pub grad_output: Matrix<'a>,
    pub qkv: Matrix<'a>,
    pub output: Matrix<'a>,
    pub log_sum_exp: Matrix<'a>,
    pub document_start: &'a [i32],
    pub delta: MatrixMut<'a>,
    pub grad_qkv: MatrixMut<'a>,
    pub shape: &'a AttentionShape,
}

pub fn attention_backward(op: AttentionBackward) -> Result<(), EngineError> {
    let shape = op.shape;
    let mut tasks = Vec::new();
    for document in documents(op.document_start)? {
        tasks.extend((0..shape.kv_heads).map(|head| (document.clone(), head)));
    }
    // The longest first, so that threads finish together.
    tasks.sort_by_key(|(document, _)| std::cmp::Reverse(document.len()));
    tasks.into_par_iter().with_max_len(1).for_each(|(document, kv_head)| {
        // SAFETY: each task writes the rows of its document, in the columns of its heads.
        let mut grad_keys = unsafe { op.grad_qkv.part(document.clone(), key(shape, kv_head)) };
        // SAFETY: as above.
        let mut grad_values = unsafe { op.grad_qkv.part(document.clone(), value(shape, kv_head)) };
        grad_keys.fill(0.0);
        grad_values.fill(0.0);
        for block in query_blocks(document.clone()) {
            one_block(&op, document.start, block, kv_head, &mut grad_keys, &mut grad_values);
        }
    });
    Ok(())
}

fn one_block(
    op: &AttentionBackward,
    document: usize,
    block: Range<usize>,
    kv_head: usize,
    grad_keys: &mut MatrixMut,
    grad_values: &mut MatrixMut,
) {
    let shape = op.shape;
    let seen = first_seen(shape, document, block.start)..block.end;
    let rows_seen = seen.start - document..seen.end - document;
    let keys = op.qkv.part(seen.clone(), key(shape, kv_head));
    let values = op.qkv.part(seen.clone(), value(shape, kv_head));
    // SAFETY: these are the only parts alive, in use one after the other.
    let mut grad_keys = unsafe { grad_keys.part(rows_seen.clone(), 0..shape.head_dim) };
    // SAFETY: as above.
    let mut grad_values = unsafe { grad_values.part(rows_seen, 0..shape.head_dim) };
    with_scratch(2 * block.len() * seen.len(), |scratch| {
        let (first, second) = scratch.split_at_mut(block.len() * seen.len());
        let (mut weights, mut grads) = (MatrixMut::new(first, seen.len()), MatrixMut::new(second, seen.len()));
        for head in group(shape, kv_head) {
            let queries = op.qkv.part(block.clone(), query(shape, head));
            let grad_output = op.grad_output.part(block.clone(), query(shape, head));
            let output = op.output.part(block.clone(), query(shape, head));
            // SAFETY: each task writes the rows of its document, in the columns of its heads.
            let mut grad_queries = unsafe { op.grad_qkv.part(block.clone(), query(shape, head)) };
            // SAFETY: as above.
            let mut delta = unsafe { op.delta.part(block.clone(), head..head + 1) };
            scores(&mut weights, queries, keys, shape);
            multiply(&mut grads, grad_output, values.transposed(), 1.0, Into::Replace);
            for (row, token) in block.clone().enumerate() {
                let (dy, y) = (grad_output.row(row), output.row(row));
                let total = vectorized(
                    #[inline(always)]
                    || sum(dy.len(), |i| dy[i] * y[i]),
                );
                delta.row(row)[0] = total;
                let log_sum_exp = op.log_sum_exp.row(token)[head];
                let valid = first_seen(shape, document, token) - seen.start..token + 1 - seen.start;
                let (weights, grads) = (weights.row(row), grads.row(row));
                probabilities_and_gradients(weights, grads, valid, log_sum_exp, total, shape.softcap);
            }
            multiply(&mut grad_values, weights.as_matrix().transposed(), grad_output, 1.0, Into::Add);
            multiply(&mut grad_queries, grads.as_matrix(), keys, shape.scale, Into::Replace);
            multiply(&mut grad_keys, grads.as_matrix().transposed(), queries, shape.scale, Into::Add);
        }
    });
}

/// From scores and the gradients of the probabilities to probabilities and the gradients of the scores, in place.
fn probabilities_and_gradients(
    scores: &mut [f32],
    grads: &mut [f32],
    valid: Range<usize>,
    log_sum_exp: f32,
    delta: f32,
    softcap: Option<f32>,
) {
    vectorized(
        #[inline(always)]
        || {
            for values in [&mut *scores, &mut *grads] {
                values[..valid.start].fill(0.0);
                values[valid.end..].fill(0.0);
            }
            let (scores, grads) = (&mut scores[valid.clone()], &mut grads[valid]);
            // The slope of the cap, taken before the scores are overwritten.
            let inverse = softcap.map_or(0.0, |cap| 1.0 / cap);
            for (score, grad) in scores.iter_mut().zip(grads) {
                let (probability, capped) = (exp(*score - log_sum_exp), *score * inverse);
                *grad = probability * (*grad - delta) * (1.0 - capped * capped);
                *score = probability;
            }
        },
    );
}

pub struct CachedAttention<'a> {
    pub qkv: Matrix<'a>,
    pub cache_key: MatrixMut<'a>,
    pub cache_value: MatrixMut<'a>,
    pub start: i32,
    pub output: MatrixMut<'a>,
    pub shape: &'a AttentionShape,
}

pub fn cached_attention(mut op: CachedAttention) -> Result<(), EngineError> {
    let (shape, tokens) = (op.shape, op.qkv.rows);
    let start = usize::try_from(op.start).unwrap_or(usize::MAX);
    if start.saturating_add(tokens) > op.cache_key.rows {
        return Err(device(format!(
            "tokens {} to {} do not fit a cache of {}",
            op.start,
            i64::from(op.start) + tokens as i64,
            op.cache_key.rows
        )));
    }
    let (keys, values) = (shape.query_columns(), shape.query_columns() + shape.kv_columns());
    for token in 0..tokens {
        let row = op.qkv.row(token);
        op.cache_key.row(start + token).copy_from_slice(&row[keys..values]);
        op.cache_value.row(start + token).copy_from_slice(&row[values..]);
    }
    let blocks: Vec<_> = query_blocks(0..tokens).collect();
    let tasks: Vec<_> = blocks.into_iter().flat_map(|b| (0..shape.heads).map(move |h| (b.clone(), h))).collect();
    tasks.into_par_iter().for_each(|(block, head)| {
        let columns = query(shape, head / (shape.heads / shape.kv_heads));
        let seen = first_seen(shape, 0, start + block.start)..start + block.end;
        let keys = op.cache_key.as_matrix().part(seen.clone(), columns.clone());
        let values = op.cache_value.as_matrix().part(seen.clone(), columns);
        // SAFETY: each task writes its own rows and head.
        let mut out = unsafe { op.output.part(block.clone(), query(shape, head)) };
        with_scratch(block.len() * seen.len(), |scratch| {
            let mut weights = MatrixMut::new(scratch, seen.len());
            scores(&mut weights, op.qkv.part(block.clone(), query(shape, head)), keys, shape);
            for (row, token) in block.enumerate() {
                let position = start + token;
                let valid = first_seen(shape, 0, position) - seen.start..position + 1 - seen.start;
                let (_, total) = exponentials(weights.row(row), valid);
                let inverse = 1.0 / total;
                weights.row(row).iter_mut().for_each(|weight| *weight *= inverse);
            }
            multiply(&mut out, weights.as_matrix(), values, 1.0, Into::Replace);
        });
    });
    Ok(())
}
