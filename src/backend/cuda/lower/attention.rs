//! Attention: training forward and backward, and generation over a cache.
//!
//! Launch shapes and the reasons for them are at the top of each kernel file. On Hopper heads of 64 and 128
//! dimensions take the warpgroup kernels.

use super::Lowering;
use crate::backend::EngineError;
use crate::backend::cuda::command::{TensorMap, arguments};
use crate::backend::cuda::compile::{Define, Variant};
use crate::backend::cuda::driver::unsupported;
use crate::program::{AttentionShape, BufferId, DType, Op, Plan};

impl Lowering<'_> {
    pub(super) fn attention(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Attention { .. } => self.attention_forward(op),
            Op::AttentionBackward { .. } => self.attention_backward(op),
            Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape } => {
                self.cached_attention([*qkv, *cache_key, *cache_value, *start, *output], shape)
            }
            _ => Err(unsupported(op.name())),
        }
    }

    fn attention_forward(&mut self, op: &Op) -> Result<(), EngineError> {
        let Op::Attention { qkv, document_start, output, log_sum_exp, shape, .. } = op else {
            return Ok(());
        };
        check(shape)?;
        self.expect("attention", &[*qkv, *output], DType::BF16)?;
        let (tokens, d) = (self.rows(*qkv), shape.head_dim);
        let room = Room { output: self.memory.spare(self.workload, *output), grad: 0 };
        let (output, log_sum_exp) = (self.address(*output), self.address(*log_sum_exp));
        let starts = self.address(*document_start);
        let variant = forward_variant(self.card.capability, shape, room);
        if hopper(self.card.capability, shape) {
            let map = TensorMap::new(&self.matrix(*qkv), 128)?;
            let section = query_section(shape, tokens);
            let arguments = arguments![output, log_sum_exp, map, starts, tokens as i32, section];
            let grid = self.persistent(tokens.div_ceil(128) * shape.heads);
            let shared = 1280 * d + 20480;
            return self.launch_variant(&variant, "attention_forward_hopper", grid, 384, shared, arguments);
        }
        let [warps, row_tiles, block_n] = forward_tiles(d);
        let block_m = 16 * row_tiles * warps;
        let arguments = arguments![output, log_sum_exp, self.address(*qkv), starts, tokens as i32];
        let grid = [tokens.div_ceil(block_m), shape.heads, 1];
        let shared = (block_m + 2 * block_n) * (2 * d + 16);
        self.launch_variant(&variant, "attention_forward", grid, 32 * warps as u32, shared, arguments)
    }

    fn attention_backward(&mut self, op: &Op) -> Result<(), EngineError> {
        let Op::AttentionBackward {
            grad_output,
            qkv,
            output,
            log_sum_exp,
            document_start,
            document_end,
            delta,
            grad_qkv,
            shape,
        } = op
        else {
            return Ok(());
        };
        check(shape)?;
        self.expect("attention_backward", &[*grad_output, *qkv, *output, *grad_qkv], DType::BF16)?;
        let (tokens, d) = (self.rows(*qkv), shape.head_dim);
        let spare = |id: BufferId| self.memory.spare(self.workload, id);
        let room = Room { output: spare(*output), grad: spare(*grad_qkv) };
        let [grad_output_at, qkv_at, output, log_sum_exp, starts, ends, delta, grad_qkv] =
            [*grad_output, *qkv, *output, *log_sum_exp, *document_start, *document_end, *delta, *grad_qkv]
                .map(|id| self.address(id));
        let count = tokens as i32;

        let [warps, block, passes] = backward_tiles(d);
        let portable = backward_variant(shape, room);
        let lanes = (d / 8).next_power_of_two().max(8);
        let grid = [(tokens * shape.heads).div_ceil(256 / lanes), 1, 1];
        let arguments = arguments![delta, grad_output_at, output, count];
        self.launch_variant(&portable, "attention_delta", grid, 256, 0, arguments)?;

        if hopper(self.card.capability, shape) {
            let hopper = variant("attention_backward_hopper", shape, room, &[]);
            let (qkv, grad_output) = (self.matrix(*qkv), self.matrix(*grad_output));
            let (qkv_128, qkv_64) = (TensorMap::new(&qkv, 128)?, TensorMap::new(&qkv, 64)?);
            let (grad_128, grad_64) = (TensorMap::new(&grad_output, 128)?, TensorMap::new(&grad_output, 64)?);
            let arguments = arguments![
                grad_qkv,
                qkv_128.clone(),
                qkv_64,
                grad_64,
                log_sum_exp,
                delta,
                ends,
                count,
                key_section(shape, tokens),
            ];
            let grid = self.persistent(tokens.div_ceil(128) * shape.kv_heads);
            let entry = "attention_backward_key_value_hopper";
            self.launch_variant(&hopper, entry, grid, 384, 1536 * d + 24576, arguments)?;
            let section = query_section(shape, tokens);
            let arguments = arguments![grad_qkv, qkv_128, grad_128, log_sum_exp, delta, starts, count, section];
            let grid = self.persistent(tokens.div_ceil(128) * shape.heads);
            let entry = "attention_backward_query_hopper";
            return self.launch_variant(&hopper, entry, grid, 384, 1536 * d + 20480, arguments);
        }
        let row = 2 * d + 16;
        let threads = 32 * warps as u32;
        let grid = [tokens.div_ceil(16 * warps), shape.kv_heads, passes];
        let shared = (32 * warps + 4 * block) * row + 16 * block;
        let arguments = arguments![grad_qkv, grad_output_at, qkv_at, log_sum_exp, delta, ends, count];
        self.launch_variant(&portable, "attention_backward_key_value", grid, threads, shared, arguments)?;
        let grid = [tokens.div_ceil(16 * warps), shape.heads, 1];
        let shared = (32 * warps + 4 * block) * row;
        let arguments = arguments![grad_qkv, grad_output_at, qkv_at, log_sum_exp, delta, starts, count];
        self.launch_variant(&portable, "attention_backward_query", grid, threads, shared, arguments)
    }

    /// One block a multiprocessor, or fewer where there are fewer tiles.
    fn persistent(&self, tiles: usize) -> [usize; 3] {
        [tiles.min(self.card.multiprocessors as usize), 1, 1]
    }

    /// `[qkv, cache_key, cache_value, start, output]`.
    fn cached_attention(&mut self, buffers: [BufferId; 5], shape: &AttentionShape) -> Result<(), EngineError> {
        let [qkv, cache_key, cache_value, start, output] = buffers;
        self.expect("cached_attention", &[qkv, cache_key, cache_value, output], DType::BF16)?;
        if shape.head_dim > 256 {
            return Err(unsupported(format!("heads of {} dimensions; at most 256", shape.head_dim)));
        }
        let (tokens, capacity) = (self.rows(qkv), self.rows(cache_key));
        let kv_columns = shape.kv_columns();
        let output_stride = self.matrix(output).stride;
        let [qkv, cache_key, cache_value, start, output] =
            [qkv, cache_key, cache_value, start, output].map(|id| self.address(id));
        let arguments = arguments![
            qkv,
            cache_key,
            cache_value,
            start,
            shape.columns() as i32,
            shape.query_columns() as i32,
            kv_columns as i32,
            capacity as i32,
        ];
        let grid = [tokens, kv_columns.div_ceil(256), 1];
        self.launch("cached_attention", "cache_append", grid, 256, arguments)?;
        let arguments = arguments![
            qkv,
            cache_key,
            cache_value,
            start,
            output,
            output_stride as i64,
            shape.heads as i32,
            shape.kv_heads as i32,
            shape.head_dim as i32,
            capacity as i32,
            shape.scale,
            shape.window.unwrap_or(0) as i32,
            shape.softcap.unwrap_or(0.0),
        ];
        self.launch("cached_attention", "cached_attention", [tokens, shape.heads, 1], 128, arguments)
    }
}

/// Columns that rows have beyond their own: of the output, and of the gradient of queries, keys and values.
#[derive(Clone, Copy)]
struct Room {
    output: usize,
    grad: usize,
}

/// Kernel files that an operation of a plan needs on a card of this compute capability.
pub fn files(capability: (i32, i32), plan: &Plan, op: &Op) -> Vec<Variant> {
    let spare = |id: &BufferId| plan.spare.columns(&plan.workload, *id);
    match op {
        Op::Attention { output, shape, .. } => {
            vec![forward_variant(capability, shape, Room { output: spare(output), grad: 0 })]
        }
        Op::AttentionBackward { output, grad_qkv, shape, .. } => {
            let room = Room { output: spare(output), grad: spare(grad_qkv) };
            let hopper = hopper(capability, shape).then(|| variant("attention_backward_hopper", shape, room, &[]));
            hopper.into_iter().chain([backward_variant(shape, room)]).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether the warpgroup kernels take this shape.
fn hopper(capability: (i32, i32), shape: &AttentionShape) -> bool {
    capability == (9, 0) && matches!(shape.head_dim, 64 | 128)
}

fn forward_variant(capability: (i32, i32), shape: &AttentionShape, room: Room) -> Variant {
    if hopper(capability, shape) {
        return variant("attention_hopper", shape, room, &[]);
    }
    let [warps, row_tiles, block_n] = forward_tiles(shape.head_dim);
    variant("attention", shape, room, &[("WARPS", warps), ("ROW_TILES", row_tiles), ("BLOCK_N", block_n)])
}

/// The portable kernels; the first of them serves every card.
fn backward_variant(shape: &AttentionShape, room: Room) -> Variant {
    let [warps, block, passes] = backward_tiles(shape.head_dim);
    let sizes = [
        ("KEY_WARPS", warps),
        ("KEY_BLOCK_M", block),
        ("KEY_PASSES", passes),
        ("QUERY_WARPS", warps),
        ("QUERY_BLOCK_N", block),
    ];
    variant("attention_backward", shape, room, &sizes)
}

/// Warps of a block, tiles of 16 rows of each, keys at a time.
fn forward_tiles(head_dim: usize) -> [usize; 3] {
    if head_dim <= 128 { [4, 2, 64] } else { [4, 1, 32] }
}

/// Warps of a block, rows of the other side at a time, passes over the head's columns.
fn backward_tiles(head_dim: usize) -> [usize; 3] {
    if head_dim <= 128 { [8, 64, 1] } else { [4, 32, 2] }
}

fn check(shape: &AttentionShape) -> Result<(), EngineError> {
    if shape.head_dim.is_multiple_of(16) && shape.head_dim <= 256 && shape.heads.is_multiple_of(shape.kv_heads) {
        return Ok(());
    }
    Err(unsupported(format!(
        "attention with {} heads on {} of {} dimensions; it takes multiples of 16 up to 256",
        shape.heads, shape.kv_heads, shape.head_dim
    )))
}

/// A file compiled for a shape: macros of `attention_shape.cuh`, then the file's own.
fn variant(file: &'static str, shape: &AttentionShape, room: Room, sizes: &[(&'static str, usize)]) -> Variant {
    let mut defines: Vec<Define> = vec![
        ("HEADS", shape.heads.to_string()),
        ("KV_HEADS", shape.kv_heads.to_string()),
        ("HEAD_DIM", shape.head_dim.to_string()),
        ("SCALE", format!("{:?}f", shape.scale)),
        ("WINDOW", shape.window.unwrap_or(0).to_string()),
        ("SOFTCAP", format!("{:?}f", shape.softcap.unwrap_or(0.0))),
        ("OUTPUT_SPARE", room.output.to_string()),
        ("GRAD_SPARE", room.grad.to_string()),
    ];
    defines.extend(sizes.iter().map(|(name, value)| (*name, value.to_string())));
    Variant { file, defines }
}

/// Bytes of keys and values (or queries and their gradients) that heads worked on together should take, so that
/// they stay in the L2 cache.
const SECTION_BYTES: f64 = 24e6;

/// Heads worked on together.
fn query_section(shape: &AttentionShape, tokens: usize) -> i32 {
    let per_head = (tokens * shape.head_dim * 4 * shape.kv_heads) as f64 / shape.heads as f64;
    ((SECTION_BYTES / per_head) as i32).clamp(1, shape.heads as i32)
}

/// Key-value heads worked on together.
fn key_section(shape: &AttentionShape, tokens: usize) -> i32 {
    let per_head = (tokens * shape.head_dim * 4 * shape.heads) as f64 / shape.kv_heads as f64;
    ((SECTION_BYTES / per_head) as i32).clamp(1, shape.kv_heads as i32)
}
