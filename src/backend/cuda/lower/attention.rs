//! Attention: training forward and backward, and generation over a cache.
//!
//! Launch shapes and the reasons for them are at the top of each kernel file. On Hopper heads of 64 and 128
//! dimensions take the warpgroup kernels. The forward kernels sum for the LoRA branch that reads their result, where
//! they can: no other pass over it is made for the branch's sake.

use super::Lowering;
use super::lora::{even, only_branch};
use super::tiling::TILE;
use crate::backend::EngineError;
use crate::backend::cuda::command::{TensorMap, arguments};
use crate::backend::cuda::compile::{Define, Variant};
use crate::backend::cuda::driver::{Card, shared_bytes, unsupported};
use crate::backend::cuda::product::WORKSPACE_BYTES;
use crate::program::{AttentionShape, BufferId, DType, Lora, Op, Plan, Workload};

impl Lowering<'_> {
    pub(super) fn attention(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Attention { .. } => self.attention_forward(op, None),
            Op::AttentionBackward { .. } => self.attention_backward(op),
            Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape } => {
                self.cached_attention([*qkv, *cache_key, *cache_value, *start, *output], shape)
            }
            _ => Err(unsupported(op.name())),
        }
    }

    /// The launches of attention with the middle of the next operation's branch, if the kernels take both.
    pub(super) fn attention_with_branch(&mut self, op: &Op, next: Option<&Op>) -> Result<bool, EngineError> {
        let (Op::Attention { output, .. }, Some(lora)) = (op, branch(self.workload, op, next)) else {
            return Ok(false);
        };
        if ![self.matrix(lora.a), self.columns(lora.middle)].into_iter().all(even) {
            return Ok(false);
        }
        self.attention_forward(op, Some(lora))?;
        self.summed = Some(*output);
        Ok(true)
    }

    fn attention_forward(&mut self, op: &Op, branch: Option<&Lora>) -> Result<(), EngineError> {
        let Op::Attention { qkv, document_start, output, log_sum_exp, shape, .. } = op else {
            return Ok(());
        };
        check(shape)?;
        self.expect("attention", &[*qkv, *output], DType::BF16)?;
        let (tokens, d) = (self.rows(*qkv), shape.head_dim);
        let room = Room { output: self.memory.spare(self.workload, *output), grad: 0 };
        let (output, log_sum_exp) = (self.address(*output), self.address(*log_sum_exp));
        let starts = self.address(*document_start);
        let variant = forward_variant(self.card, shape, room, branch);
        let sums = match branch {
            Some(lora) => {
                self.expect("attention", &[lora.a, lora.middle.buffer], DType::BF16)?;
                let a = self.matrix(lora.a);
                arguments![a.pointer, a.stride as i64, self.products.workspace().0]
            }
            None => arguments![0u64, 0i64, 0u64],
        };
        if hopper(self.card, shape) {
            let map = TensorMap::new(&self.matrix(*qkv), 128)?;
            let section = query_section(shape, tokens);
            let mut arguments = arguments![output, log_sum_exp, map, starts, tokens as i32, section];
            arguments.extend(sums);
            let grid = self.persistent(tokens.div_ceil(128) * shape.heads);
            let of_branch = branch.map_or(0, |lora| 4 * lora.middle.width.next_multiple_of(16) * (2 * d + 16));
            let shared = 1280 * d + 20480 + of_branch;
            self.launch_variant(&variant, "attention_forward_hopper", grid, 384, shared, arguments)?;
        } else {
            let [warps, row_tiles, block_n] = forward_tiles(d);
            let block_m = 16 * row_tiles * warps;
            let mut arguments = arguments![output, log_sum_exp, self.address(*qkv), starts, tokens as i32];
            arguments.extend(sums);
            let grid = [tokens.div_ceil(block_m), shape.heads, 1];
            let shared = (block_m + 2 * block_n) * (2 * d + 16);
            self.launch_variant(&variant, "attention_forward", grid, 32 * warps as u32, shared, arguments)?;
        }
        branch.map_or(Ok(()), |lora| self.finish_middle(self.columns(lora.middle), shape.heads))
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

        let tiles = BackwardTiles::of(d, self.card.shared_bytes);
        let portable = backward_variant(shape, tiles, room);
        if let Some(reader) = self.reader.take() {
            self.delta_with_branch(op, &reader)?;
        } else {
            let lanes = (d / 8).next_power_of_two().max(8);
            let grid = [(tokens * shape.heads).div_ceil(256 / lanes), 1, 1];
            let arguments = arguments![delta, grad_output_at, output, count];
            self.launch_variant(&portable, "attention_delta", grid, 256, 0, arguments)?;
        }

        if hopper(self.card, shape) {
            let hopper = hopper_variant("BACKWARD", shape, room);
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
        let BackwardTiles { warps, passes, .. } = tiles;
        let threads = 32 * warps as u32;
        let grid = [tokens.div_ceil(16 * warps), shape.kv_heads, passes];
        let shared = tiles.shared_bytes(d);
        let arguments = arguments![grad_qkv, grad_output_at, qkv_at, log_sum_exp, delta, ends, count];
        self.launch_variant(&portable, "attention_backward_key_value", grid, threads, shared, arguments)?;
        let grid = [tokens.div_ceil(16 * warps), shape.heads, 1];
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

/// Kernel files that an operation of a plan needs on this card, with the operation after it.
pub fn files(card: &Card, plan: &Plan, op: &Op, next: Option<&Op>) -> Vec<Variant> {
    let spare = |id: &BufferId| plan.spare.columns(&plan.workload, *id);
    match op {
        Op::Attention { output, shape, .. } => {
            let branch = branch(&plan.workload, op, next);
            vec![forward_variant(card, shape, Room { output: spare(output), grad: 0 }, branch)]
        }
        Op::AttentionBackward { output, grad_qkv, shape, .. } => {
            let room = Room { output: spare(output), grad: spare(grad_qkv) };
            let hopper = hopper(card, shape).then(|| hopper_variant("BACKWARD", shape, room));
            let tiles = BackwardTiles::of(shape.head_dim, card.shared_bytes);
            hopper.into_iter().chain([backward_variant(shape, tiles, room)]).collect()
        }
        _ => Vec::new(),
    }
}

/// The largest rank of a branch whose middle comes with attention: its sums are in registers.
const MOST_RANK: usize = 32;

/// The branch of the operation after attention that takes its result, if its middle comes with that: the heads' partial
/// sums have room in the library's scratch and are no more bytes than the pass that they save. Of fewer tokens a tile
/// would be mostly empty.
fn branch<'a>(workload: &Workload, op: &Op, next: Option<&'a Op>) -> Option<&'a Lora> {
    let Op::Attention { output, shape, .. } = op else { return None };
    let lora = only_branch(*output, next?)?;
    let (tokens, rank) = (workload.buffer(*output).rows(), lora.middle.width);
    let (partial_bytes, pass) = (4 * shape.heads * tokens * rank, 2 * tokens * shape.query_columns());
    let takes = tokens >= TILE
        && rank.is_multiple_of(8)
        && rank <= MOST_RANK
        && partial_bytes <= pass.min(WORKSPACE_BYTES as usize);
    takes.then_some(lora)
}

/// Whether the warpgroup kernels take this shape.
fn hopper(card: &Card, shape: &AttentionShape) -> bool {
    card.capability == (9, 0) && matches!(shape.head_dim, 64 | 128)
}

/// One pass of `attention_hopper.cu`.
fn hopper_variant(pass: &'static str, shape: &AttentionShape, room: Room) -> Variant {
    variant("attention_hopper", shape, room, &[(pass, 1)])
}

fn forward_variant(card: &Card, shape: &AttentionShape, room: Room, branch: Option<&Lora>) -> Variant {
    let mut variant = if hopper(card, shape) {
        hopper_variant("FORWARD", shape, room)
    } else {
        variant("attention", shape, room, &forward_sizes(shape.head_dim))
    };
    variant.defines.extend(branch.map(|lora| ("MIDDLE_RANK", lora.middle.width.to_string())));
    variant
}

/// The portable kernels; the first of them serves every card.
fn backward_variant(shape: &AttentionShape, tiles: BackwardTiles, room: Room) -> Variant {
    variant("attention", shape, room, &tiles.sizes())
}

/// Macros of the forward kernel of `attention.cu` for heads of so many dimensions.
pub fn forward_sizes(head_dim: usize) -> [(&'static str, usize); 3] {
    let [warps, row_tiles, block_n] = forward_tiles(head_dim);
    [("WARPS", warps), ("ROW_TILES", row_tiles), ("BLOCK_N", block_n)]
}

/// Macros of the backward kernels of `attention.cu` for heads of so many dimensions on a card of this compute capability.
pub fn backward_sizes(head_dim: usize, capability: (i32, i32)) -> [(&'static str, usize); 5] {
    BackwardTiles::of(head_dim, shared_bytes(capability)).sizes()
}

/// Warps of a block, tiles of 16 rows of each, keys at a time.
fn forward_tiles(head_dim: usize) -> [usize; 3] {
    if head_dim <= 128 { [4, 2, 64] } else { [4, 1, 32] }
}

/// How the portable backward kernels share their work.
#[derive(Clone, Copy, Debug, PartialEq)]
struct BackwardTiles {
    /// Of a block; each holds 16 rows.
    warps: usize,
    /// Rows of the other side at a time.
    block: usize,
    /// Over the head's columns.
    passes: usize,
}

/// From fast to lean, for heads of up to 128 dimensions, and for wider ones, whose gradients take two passes.
const BACKWARD_TILES: [[BackwardTiles; 3]; 2] = [
    [BackwardTiles::new(8, 64, 1), BackwardTiles::new(8, 32, 1), BackwardTiles::new(6, 32, 1)],
    [BackwardTiles::new(4, 32, 2), BackwardTiles::new(4, 16, 2), BackwardTiles::new(3, 16, 2)],
];

impl BackwardTiles {
    const fn new(warps: usize, block: usize, passes: usize) -> Self {
        Self { warps, block, passes }
    }

    /// The fastest that a block has shared memory for; the leanest fits every card since sm_80.
    fn of(head_dim: usize, shared_bytes: usize) -> Self {
        let [fast, lean, leanest] = BACKWARD_TILES[usize::from(head_dim > 128)];
        [fast, lean].into_iter().find(|tiles| tiles.shared_bytes(head_dim) <= shared_bytes).unwrap_or(leanest)
    }

    /// Shared memory of a block, bytes: tiles of the block's own rows, two stages of the other side's, and statistics.
    fn shared_bytes(self, head_dim: usize) -> usize {
        (32 * self.warps + 4 * self.block) * (2 * head_dim + 16) + 16 * self.block
    }

    fn sizes(self) -> [(&'static str, usize); 5] {
        [
            ("KEY_WARPS", self.warps),
            ("KEY_BLOCK_M", self.block),
            ("KEY_PASSES", self.passes),
            ("QUERY_WARPS", self.warps),
            ("QUERY_BLOCK_N", self.block),
        ]
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Columns, Dropout, Kind, Projection, Role, WorkloadBuilder};

    /// Whether the middle of a branch of this rank comes with attention over so many tokens, heads and their dimensions.
    fn is_taken([tokens, heads, head_dim]: [usize; 3], rank: usize, dropout: f32) -> bool {
        let shape = AttentionShape { heads, kv_heads: heads, head_dim, scale: 1.0, window: None, softcap: None };
        let mut builder = WorkloadBuilder::new();
        builder.begin("forward", Role::Micro, tokens);
        // Only the shapes of the activations count.
        let weight = builder.persistent("weight", &[1], DType::F32, Kind::Weight);
        let mut activation = |name: &str, columns: usize| builder.activation(name, &[tokens, columns], DType::BF16);
        let [output, middle, result] =
            [("output", shape.query_columns()), ("middle", rank), ("result", 8)].map(|(name, n)| activation(name, n));
        let dropout = (dropout > 0.0).then_some(Dropout { probability: dropout, key: weight, stream: 0 });
        let middle = Columns { buffer: middle, start: 0, width: rank };
        let lora = Some(Lora { a: weight, b: weight, middle, scale: weight, dropout });
        let output_columns = Columns { buffer: result, start: 0, width: 8 };
        let projections = vec![Projection { weight, bias: None, output: output_columns, lora }];
        let (qkv, document_start, document_end, log_sum_exp) = (weight, weight, weight, weight);
        let op = Op::Attention { qkv, document_start, document_end, output, log_sum_exp, shape };
        let next = Op::Linear { input: output, projections };
        assert!(
            branch(builder.workload(), &op, None).is_none() && branch(builder.workload(), &next, Some(&next)).is_none()
        );
        branch(builder.workload(), &op, Some(&next)).is_some()
    }

    #[test]
    fn a_middle_comes_with_attention_where_that_saves_a_pass() {
        for rank in [8, 16, 24, 32] {
            assert!(is_taken([4096, 32, 128], rank, 0.0) && is_taken([128, 9, 64], rank, 0.0));
        }
        assert!(!is_taken([4096, 32, 128], 4, 0.0) && !is_taken([4096, 32, 128], 64, 0.0), "ranks");
        assert!(!is_taken([4096, 32, 128], 16, 0.1), "dropout");
        assert!(!is_taken([127, 32, 128], 16, 0.0), "few tokens");
        assert!(!is_taken([4096, 32, 32], 24, 0.0), "partial sums are more than the output");
        assert!(is_taken([16_384, 32, 128], 16, 0.0) && !is_taken([16_385, 32, 128], 16, 0.0), "room for partial sums");
    }

    #[test]
    fn every_head_has_tiles_that_fit_every_card() {
        for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let most = shared_bytes(capability);
            for head_dim in (16..=256).step_by(16) {
                let tiles = BackwardTiles::of(head_dim, most);
                assert!(tiles.shared_bytes(head_dim) <= most, "{head_dim} on {capability:?}: {tiles:?}");
                assert!(tiles.block <= 16 * tiles.warps, "{tiles:?}");
                let [warps, row_tiles, block_n] = forward_tiles(head_dim);
                assert!((16 * row_tiles * warps + 2 * block_n) * (2 * head_dim + 16) <= most);
            }
        }
        // Cards of people at home have 99 KiB where the H100 has 227.
        assert_eq!(BackwardTiles::of(128, shared_bytes((9, 0))).sizes()[..2], [("KEY_WARPS", 8), ("KEY_BLOCK_M", 64)]);
        assert_eq!(BackwardTiles::of(128, shared_bytes((8, 9))).sizes()[..2], [("KEY_WARPS", 6), ("KEY_BLOCK_M", 32)]);
        assert_eq!(BackwardTiles::of(64, shared_bytes((8, 9))).sizes()[..2], [("KEY_WARPS", 8), ("KEY_BLOCK_M", 64)]);
    }
}
