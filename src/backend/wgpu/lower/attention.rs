//! Attention: in training, backward, and with a cache.

use super::{Call, Lowering, MOST_WORKGROUPS, Work};
use crate::backend::EngineError;
use crate::backend::wgpu::storage::View;
use crate::program::{AttentionShape, DType, Op};

/// Rows of a tile of queries or keys.
const TILE: usize = 32;

/// Rows of a tile on cooperative matrices.
const WIDE: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Threads,
    /// Cooperative matrices.
    Fragments,
    /// The same with the next tile read ahead, backward.
    Ahead,
}

const VARIANTS: [(Variant, &str); 3] =
    [(Variant::Threads, "threads"), (Variant::Fragments, "subgroups"), (Variant::Ahead, "subgroups ahead")];

impl Lowering<'_> {
    pub(super) fn attention(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Attention { qkv, document_start, output, log_sum_exp, shape, .. } => {
                let (qkv, output) = (self.view(*qkv), self.view(*output));
                let ranges = self.row_ranges(&[qkv, output], usize::MAX);
                let variant = self.variant(op, shape, &qkv, ranges.len());
                let (tile, file) = match variant {
                    Variant::Threads => (TILE, "attention"),
                    _ => (WIDE, "attention_cooperative"),
                };
                let vector = by_fours(shape, &qkv);
                for (number, &(first, count)) in ranges.iter().enumerate() {
                    // Its own keys, which every query sees some of, then those before.
                    for keys in ranges[..=number].iter().rev().filter(|keys| reaches(shape, (first, count), **keys)) {
                        let queries = qkv.slice_rows(first, count);
                        let mut call = self.masked(file, shape, &qkv, tile);
                        self.bind_as(&mut call, "qkv", &queries, vector);
                        if ranges.len() > 1 {
                            self.bind_keys(&mut call, &qkv, vector, [(first, count), *keys]);
                            call.flag("MORE", keys.0 != first);
                        }
                        self.bind(&mut call, "document_start", &self.view(*document_start));
                        self.bind_as(&mut call, "output", &output.slice_rows(first, count), vector);
                        self.bind(&mut call, "log_sum_exp", &self.view(*log_sum_exp));
                        call.iterations(keys.1.div_ceil(TILE) * tile_iterations(shape, 1, 1));
                        self.launch(call, [count.div_ceil(tile), shape.heads, 1])?;
                    }
                }
                Ok(())
            }
            Op::AttentionBackward {
                grad_output,
                qkv,
                output,
                log_sum_exp,
                document_start,
                document_end,
                delta,
                grad_qkv,
                shape,
            } => {
                let (qkv, output, grad) = (self.view(*qkv), self.view(*output), self.view(*grad_output));
                let (delta, grad_qkv) = (self.view(*delta), self.view(*grad_qkv));
                let ranges = self.row_ranges(&[qkv, output, grad, grad_qkv], usize::MAX);
                // A workgroup for every 64 rows of a head.
                for (first, count) in self.row_ranges(&[grad, output, delta], MOST_WORKGROUPS * 64 / shape.heads) {
                    let values = count * shape.heads;
                    let mut call = self.call("attention_delta");
                    self.bind(&mut call, "grad_output", &grad.slice_rows(first, count));
                    self.bind(&mut call, "output", &output.slice_rows(first, count));
                    self.bind(&mut call, "delta", &delta.slice_rows(first, count));
                    call.number("count", values).number("head_dim", shape.head_dim);
                    self.launch(call, [values.div_ceil(64), 1, 1])?;
                }
                let vector = by_fours(shape, &qkv);
                let variant = self.variant(op, shape, &qkv, ranges.len());
                let (tile, files) = match variant {
                    Variant::Threads => (TILE, ["attention_backward_query", "attention_backward_key_value"]),
                    _ => (WIDE, ["attention_backward_query_cooperative", "attention_backward_key_value_cooperative"]),
                };
                for (file, heads) in files.into_iter().zip([shape.heads, shape.kv_heads]) {
                    let by_keys = file == files[1];
                    for (number, &own) in ranges.iter().enumerate() {
                        // A range's own rows, then the keys before them or the queries after them.
                        let others: Vec<(usize, usize)> = match by_keys {
                            true => ranges[number..].to_vec(),
                            false => ranges[..=number].iter().rev().copied().collect(),
                        };
                        for other in others {
                            let [queries, keys] = if by_keys { [other, own] } else { [own, other] };
                            if !reaches(shape, queries, keys) {
                                continue;
                            }
                            let mut call = self.masked(file, shape, &qkv, tile);
                            self.bind_as(&mut call, "qkv", &qkv.slice_rows(queries.0, queries.1), vector);
                            if ranges.len() > 1 {
                                self.bind_keys(&mut call, &qkv, vector, [queries, keys]);
                                call.flag("MORE", other != own).number("grad_first", own.0);
                            }
                            self.bind_as(&mut call, "grad_output", &grad.slice_rows(queries.0, queries.1), vector);
                            self.bind(&mut call, "document_start", &self.view(*document_start));
                            self.bind(&mut call, "log_sum_exp", &self.view(*log_sum_exp));
                            self.bind(&mut call, "delta", &delta);
                            self.bind_as(&mut call, "grad_qkv", &grad_qkv.slice_rows(own.0, own.1), vector);
                            let mut rounds = tile_iterations(shape, 2, 1);
                            if by_keys {
                                call.flag("AHEAD", variant == Variant::Ahead);
                                self.bind(&mut call, "document_end", &self.view(*document_end));
                                rounds = tile_iterations(shape, 2, 2) * shape.heads / shape.kv_heads;
                            }
                            call.iterations(other.1.div_ceil(TILE) * rounds);
                            self.launch(call, [own.1.div_ceil(tile), heads, 1])?;
                        }
                    }
                }
                Ok(())
            }
            Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape } => {
                let (qkv, key, value) = (self.view(*qkv), self.view(*cache_key), self.view(*cache_value));
                let (start, output) = (self.view(*start), self.view(*output));
                // A cache that no binding holds is cut by key-value heads.
                let cut = self.cut(&key);
                let most = cut.map_or(shape.kv_heads, |cut| cut.columns / shape.head_dim);
                for (piece, first) in (0..shape.kv_heads).step_by(most).enumerate() {
                    let heads = most.min(shape.kv_heads - first);
                    let columns = heads * shape.head_dim;
                    let part = |cache: &View| {
                        let offset = cache.offset + cut.map_or(0, |cut| piece as u64 * cut.bytes);
                        View { offset, stride: columns, width: columns, ..*cache }
                    };
                    let (key, value) = (part(&key), part(&value));
                    let mut call = self.call("cache_store");
                    self.bind(&mut call, "qkv", &qkv);
                    self.bind(&mut call, "start", &start);
                    self.bind(&mut call, "cache_key", &key);
                    self.bind(&mut call, "cache_value", &value);
                    let key_start = shape.query_columns() + first * shape.head_dim;
                    call.number("stride", qkv.stride).number("key_start", key_start);
                    call.number("value_start", key_start + shape.kv_columns());
                    call.number("columns", columns).number("capacity", key.rows);
                    self.launch(call, [qkv.rows, 1, 1])?;
                    let mut call = self.call("cached_attention");
                    options(&mut call, shape);
                    self.bind(&mut call, "qkv", &qkv);
                    self.bind(&mut call, "start", &start);
                    self.bind(&mut call, "cache_key", &key);
                    self.bind(&mut call, "cache_value", &value);
                    self.bind(&mut call, "output", &output);
                    let group = shape.heads / shape.kv_heads;
                    call.number("stride", qkv.stride).number("columns", columns).number("capacity", key.rows);
                    call.number("first_head", first * group).number("output_stride", output.stride);
                    call.iterations(key.rows.div_ceil(64) * (shape.head_dim + 2 * 64 + 4));
                    self.launch(call, [qkv.rows, heads * group, 1])?;
                }
                Ok(())
            }
            _ => unreachable!("not attention"),
        }
    }

    /// Binds the rows of keys and values beside those of queries: each of the two ranges is its first row and its rows.
    fn bind_keys(&self, call: &mut Call, qkv: &View, vector: bool, [queries, keys]: [(usize, usize); 2]) {
        call.constant("RANGES", 1);
        self.bind_as(call, "keys", &qkv.slice_rows(keys.0, keys.1), vector);
        call.number("query_first", queries.0).number("query_end", queries.0 + queries.1);
        call.number("key_first", keys.0).number("key_end", keys.0 + keys.1);
    }

    /// The kernels that attention runs on, the cooperative ones only for one range of rows: what was measured to agree with the
    /// threads' and to be the fastest. No rule chooses cooperative matrices; `TUNE_COOPERATIVE_ATTENTION` does, for the check:
    /// 1 or 2, a number of [`Variant`].
    fn variant(&mut self, op: &Op, shape: &AttentionShape, qkv: &View, ranges: usize) -> Variant {
        if ranges > 1 || !self.fits_fragments(shape, qkv) {
            return Variant::Threads;
        }
        let AttentionShape { heads, kv_heads, head_dim, window, softcap, .. } = shape;
        let key = format!(
            "{} {} tokens, {heads}/{kv_heads} heads of {head_dim}, window {window:?}, softcap {softcap:?}",
            op.name(),
            qkv.rows
        );
        let backward = matches!(op, Op::AttentionBackward { .. });
        let variants = &VARIANTS[..if backward { 3 } else { 2 }];
        let forced = std::env::var("TUNE_COOPERATIVE_ATTENTION").ok().and_then(|number| number.parse::<usize>().ok());
        let chosen = match forced {
            Some(number) => number,
            None => {
                let names = variants.iter().map(|variant| variant.1.to_string()).collect();
                self.choose(key, names, 0, || Work::Attention(Box::new(op.clone())))
            }
        };
        variants[chosen.min(variants.len() - 1)].0
    }

    /// Whether attention can run on cooperative matrices: f16, whole tiles, rows of whole fragments.
    fn fits_fragments(&self, shape: &AttentionShape, qkv: &View) -> bool {
        // Two tiles of 32 rows in f16, two of 64 x 32 in f32, one of those in f16, and a few rows of numbers.
        let workgroup = 2 * 64 * (shape.head_dim + 8) + 2 * 9216 + 5120 + 512;
        self.facts.cooperative
            && qkv.dtype == DType::F16
            && matches!(shape.head_dim, 16 | 32 | 64 | 128)
            && qkv.rows.is_multiple_of(WIDE)
            && self.facts.workgroup_bytes as usize >= workgroup
    }

    fn masked(&self, file: &'static str, shape: &AttentionShape, qkv: &View, tile: usize) -> Call {
        let mut call = self.call(file);
        options(&mut call, shape);
        if tile == WIDE {
            call.constant("HALF", 1).constant("COOPERATIVE", 1);
            call.constant("FRAGMENTS", (shape.head_dim / 16) as u32).constant("LOADS", (shape.head_dim / 16) as u32);
            call.number("tiles", qkv.rows / WIDE);
        }
        call.flag("RAGGED", !shape.head_dim.is_multiple_of(4));
        call.number("tokens", qkv.rows).number("stride", qkv.stride).number("heads", shape.heads);
        call.number("key_start", shape.query_columns());
        call.number("value_start", shape.query_columns() + shape.kv_columns());
        call.number("output_stride", shape.query_columns());
        call
    }
}

/// Whether one of these queries sees one of these keys, by their places alone.
fn reaches(shape: &AttentionShape, queries: (usize, usize), keys: (usize, usize)) -> bool {
    shape.window.is_none_or(|window| keys.0 + keys.1 + window >= queries.0 + 2)
}

fn options(call: &mut Call, shape: &AttentionShape) {
    call.constant("HEAD_DIM", shape.head_dim as u32).constant("CHUNKS", shape.head_dim.div_ceil(64) as u32);
    call.number("group", shape.heads / shape.kv_heads).float("scale", shape.scale);
    if let Some(window) = shape.window {
        call.constant("WINDOW", 1).number("window", window);
    }
    if let Some(softcap) = shape.softcap {
        call.constant("SOFTCAP", 1).float("softcap", softcap);
    }
}

/// Iterations of loops that a tile takes: `scores` products that sum over the head, `sums` over the tile.
fn tile_iterations(shape: &AttentionShape, scores: usize, sums: usize) -> usize {
    1 + scores * (shape.head_dim.div_ceil(32) + 1) + 33 * (2 + sums * shape.head_dim.div_ceil(64))
}

fn by_fours(shape: &AttentionShape, qkv: &View) -> bool {
    shape.head_dim.is_multiple_of(4) && qkv.stride.is_multiple_of(4)
}
