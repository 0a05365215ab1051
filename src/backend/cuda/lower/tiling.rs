//! How the kernels that sum over activations for LoRA branches share their work (`kernels/lora.cu`, `kernels/lora_glu.cu`, and
//! those that pass over rows, `kernels/lora_rows.cuh`).

use crate::backend::cuda::compile::Variant;

/// Ranks that `lora.cu` is compiled for.
pub(super) const RANKS: [usize; 3] = [16, 32, 64];

/// Those of `lora_glu.cu`, whose threads hold more beside the sums.
pub(super) const GATED_RANKS: [usize; 2] = [16, 32];

/// Tokens and columns of a tile.
pub(super) const TILE: usize = 128;

/// Shared memory of a block of which a multiprocessor of the larger cards takes two.
const HALF_SHARED: usize = 113 << 10;

/// What there is for a kernel to use.
pub(super) struct Room {
    pub multiprocessors: usize,
    /// Shared memory of a block, bytes.
    pub shared: usize,
    /// Memory for partial sums, bytes.
    pub workspace: usize,
}

/// How `lora_backward` and `lora_glu_backward` work through an operation.
pub(super) struct Tiling {
    /// Ranks that the kernel is compiled for: the real ones or more.
    pub rank: usize,
    /// Tiles of tokens that a block takes.
    pub tiles: usize,
    /// Tokens of a launch.
    pub tokens: usize,
    /// Column tiles of a strip.
    pub strip_tiles: usize,
    /// Of `lora_glu_backward` with a reader: the product takes the place of another tile, for there is no room beside it.
    pub lean: bool,
}

impl Tiling {
    /// For `lora_backward` on so many rows of projections with these (columns, rank); none where the kernel does not take them
    /// (large ranks, little shared memory or workspace), or where its partial sums are more bytes than the pass over the
    /// gradient that it saves.
    pub fn new(rows: usize, sizes: &[(usize, usize)], room: &Room) -> Option<Self> {
        let rank = compiled_rank(&RANKS, sizes.iter().map(|&(_, rank)| rank).max()?)?;
        let column_tiles: usize = sizes.iter().map(|(columns, _)| columns.div_ceil(TILE)).sum();
        let fitting = |limit: usize| tile_counts(rank).filter(move |&tiles| Self::shared_bytes(rank, tiles) <= limit);
        // As many tokens a block as leave a block for every multiprocessor.
        let fills = |tiles: &usize| rows.div_ceil(TILE * tiles) * column_tiles >= room.multiprocessors;
        let half = HALF_SHARED.min(room.shared);
        let tiles = fitting(half).find(fills).or(fitting(half).last()).or(fitting(room.shared).last())?;
        Self::within(rows, sizes, None, room, |tokens| {
            let wanted = (2 * room.multiprocessors).div_ceil(tokens.div_ceil(TILE * tiles)).clamp(1, column_tiles);
            Self { rank, tiles, tokens, strip_tiles: column_tiles.div_ceil(wanted), lean: false }
        })
    }

    /// For `lora_glu_backward`, of whose blocks a multiprocessor takes one, on two projections of this (columns, rank), and with
    /// the branch of this rank that read the product.
    pub fn gated(rows: usize, size: (usize, usize), reader: Option<usize>, room: &Room) -> Option<Self> {
        let rank = compiled_rank(&GATED_RANKS, size.1)?;
        if reader.is_some_and(|reader| reader > rank || !reader.is_multiple_of(8)) {
            return None;
        }
        let column_tiles = size.0.div_ceil(TILE);
        let shared = |tiles| Self::gated_shared_bytes(rank, tiles, reader.is_some());
        let fitting = || tile_counts(rank).filter(|&tiles| shared(tiles) <= room.shared);
        let fills = |tiles: &usize| rows.div_ceil(TILE * tiles) * column_tiles >= room.multiprocessors;
        let (tiles, lean) = match fitting().find(fills).or(fitting().last()) {
            Some(tiles) => (tiles, false),
            None if reader.is_some() && Self::lean_shared_bytes(rank) <= room.shared => (1, true),
            None => return None,
        };
        Self::within(rows, &[size; 2], reader.map(|rank| (size.0, rank)), room, |tokens| {
            let blocks = tokens.div_ceil(TILE * tiles);
            Self { rank, tiles, tokens, strip_tiles: strip_tiles(column_tiles, blocks, room.multiprocessors), lean }
        })
    }

    /// The tiling for as many tokens a launch as have room for their partial sums.
    fn within(
        rows: usize,
        sizes: &[(usize, usize)],
        reader: Option<(usize, usize)>,
        room: &Room,
        tiling: impl Fn(usize) -> Self,
    ) -> Option<Self> {
        let mut tokens = rows;
        loop {
            let tiling = tiling(tokens);
            let of_reader = reader.map_or(0, |(columns, rank)| 4 * tiling.token_blocks(tokens) * columns * rank);
            let bytes = tiling.workspace(sizes) + of_reader;
            if bytes <= room.workspace {
                let pass: usize = sizes.iter().chain(&reader).map(|(columns, _)| 2 * tokens * columns).sum();
                return (bytes <= pass).then_some(tiling);
            }
            let blocks = tiling.token_blocks(tokens);
            if blocks == 1 {
                return None;
            }
            tokens = blocks.div_ceil(2) * TILE * tiling.tiles;
        }
    }

    /// Bytes of all partial sums of a launch.
    fn workspace(&self, sizes: &[(usize, usize)]) -> usize {
        let blocks = self.token_blocks(self.tokens);
        let bytes = |&size: &(usize, usize)| partial_bytes(self.strips(size.0), blocks, size, self.tokens).1;
        sizes.iter().map(|size| bytes(size).next_multiple_of(256)).sum()
    }

    /// Two tiles of the gradient; those of b for two column tiles, and the middle.
    pub fn shared_bytes(rank: usize, tiles: usize) -> usize {
        2 * TILE * TILE * 2 + (2 * TILE + tiles * TILE) * (2 * rank + 16)
    }

    /// A tile of each gradient, b and the middle of both projections; with a reader a tile of the product, and its middle's
    /// gradient.
    pub fn gated_shared_bytes(rank: usize, tiles: usize, reader: bool) -> usize {
        let (wide, thin) = if reader { (3, 2 + 3 * tiles) } else { (2, 2 + 2 * tiles) };
        wide * TILE * TILE * 2 + thin * TILE * (2 * rank + 16)
    }

    /// One tile of tokens, with a reader whose product has no tile of its own.
    pub fn lean_shared_bytes(rank: usize) -> usize {
        Self::gated_shared_bytes(rank, 1, true) - TILE * TILE * 2
    }

    /// Blocks of tokens of a launch over so many.
    pub fn token_blocks(&self, tokens: usize) -> usize {
        tokens.div_ceil(TILE * self.tiles)
    }

    pub fn strips(&self, columns: usize) -> usize {
        columns.div_ceil(TILE).div_ceil(self.strip_tiles)
    }
}

/// Bytes of a projection's partial sums of both kinds: those of its middle's gradient, and all.
pub(super) fn partial_bytes(
    strips: usize,
    blocks: usize,
    (columns, rank): (usize, usize),
    tokens: usize,
) -> (usize, usize) {
    let middle = 4 * strips * tokens * rank;
    (middle, middle + 4 * blocks * columns * rank)
}

/// How a block of the kernels that build on `lora_rows.cuh` works down rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    pub rows: usize,
    pub warps: usize,
}

impl Tile {
    /// Of a block that has a multiprocessor to itself: all registers are for its sums.
    pub const WHOLE: Self = Self { rows: 32, warps: 16 };
    /// Of one of two: one multiplies while the other waits.
    pub const HALF: Self = Self { rows: 16, warps: 8 };

    /// Blocks of a multiprocessor.
    pub fn blocks(self) -> usize {
        Self::WHOLE.warps / self.warps
    }

    pub fn threads(self) -> u32 {
        32 * self.warps as u32
    }

    /// Into how many shares of columns the warps divide a tile.
    pub fn shares(self) -> usize {
        self.warps / (self.rows / 16)
    }

    pub fn defines(self) -> [(&'static str, usize); 2] {
        [("TILE_ROWS", self.rows), ("BLOCK_WARPS", self.warps)]
    }
}

/// The widest of their slices.
pub(super) const WIDEST: usize = 512;

/// The widest of branches whose ranks take twice the registers.
const WIDEST_OF_LARGE_RANKS: usize = 384;

/// Columns of whole heads that a block of theirs takes, and what it is compiled for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slice {
    pub head_dim: usize,
    pub width: usize,
    /// The largest of the branches' ranks or more.
    pub rank: usize,
    pub tile: Tile,
}

impl Slice {
    /// The widest of `lora_rope.cu` that a block has shared memory for; none where it does not take the heads or the rank.
    pub fn of_rope(head_dim: usize, rank: usize, shared: usize) -> Option<Self> {
        let most = if rank > GATED_RANKS[0] { WIDEST_OF_LARGE_RANKS } else { WIDEST };
        let fits = |slice: &Self| slice.width <= most && slice.rope_shared_bytes() * slice.tile.blocks() <= shared;
        Self::widest(head_dim, rank, Tile::HALF, fits)
    }

    /// The widest of `lora_delta.cu`, likewise.
    pub fn of_delta(head_dim: usize, rank: usize, shared: usize) -> Option<Self> {
        Self::widest(head_dim, rank, Tile::WHOLE, |slice| head_dim <= 256 && slice.tiles_bytes() <= shared)
    }

    fn widest(head_dim: usize, rank: usize, tile: Tile, fits: impl Fn(&Self) -> bool) -> Option<Self> {
        let rank = compiled_rank(&GATED_RANKS, rank)?;
        let most = if head_dim.is_multiple_of(16) { WIDEST.checked_div(head_dim)? } else { 0 };
        (1..=most).rev().map(|heads| Self { head_dim, width: heads * head_dim, rank, tile }).find(fits)
    }

    /// Two tiles, and thin rows beside each.
    pub fn tiles_bytes(self) -> usize {
        2 * self.tile.rows * ((2 * self.width + 16) + (2 * self.rank + 16))
    }

    /// Beside tiles, sums of rows by shares, and cosines and sines.
    pub fn rope_shared_bytes(self) -> usize {
        self.tiles_bytes() + 4 * self.tile.rows * (self.tile.shares() * self.rank + self.head_dim)
    }

    pub fn strips(self, columns: usize) -> usize {
        columns.div_ceil(self.width)
    }

    pub fn variant(self, file: &'static str) -> Variant {
        let defines = [("HEAD_DIM", self.head_dim), ("WIDTH", self.width), ("RANK", self.rank)];
        let defines = defines.into_iter().chain(self.tile.defines());
        Variant { file, defines: defines.map(|(name, value)| (name, value.to_string())).collect() }
    }
}

/// How such a kernel works through an operation: in blocks that all run at once.
#[derive(Debug)]
pub(super) struct Slices {
    pub slice: Slice,
    /// Tokens of a launch.
    pub tokens: usize,
    /// Blocks that share the rows of a slice.
    groups: usize,
}

impl Slices {
    /// For both sums over so many rows of projections with these (columns, rank); none of few rows, or where partial sums are
    /// more bytes than the pass that they save even from one group.
    pub fn both(slice: Slice, rows: usize, sizes: &[(usize, usize)], room: &Room) -> Option<Self> {
        Self::within(slice, rows, sizes, room, |&(columns, rank), tokens| 4 * slice.strips(columns) * tokens * rank)
    }

    /// For the gradient of `a` alone, of so many (columns, rank), in one launch.
    pub fn one(slice: Slice, rows: usize, size: (usize, usize), room: &Room) -> Option<Self> {
        Self::within(slice, rows, &[size], room, |_, _| 0).filter(|slices| slices.tokens == rows)
    }

    /// As many tokens a launch as have room for their partial sums; `of_rows`: bytes of those that each row has.
    fn within(
        slice: Slice,
        rows: usize,
        sizes: &[(usize, usize)],
        room: &Room,
        of_rows: impl Fn(&(usize, usize), usize) -> usize,
    ) -> Option<Self> {
        let strips: usize = sizes.iter().map(|&(columns, _)| slice.strips(columns)).sum();
        let of_group: usize = sizes.iter().map(|(columns, rank)| 4 * columns * rank).sum();
        let mut tokens = rows;
        // Blocks of fewer would be mostly empty.
        while tokens >= TILE {
            let pass: usize = sizes.iter().map(|(columns, _)| 2 * tokens * columns).sum();
            let of_rows: usize = sizes.iter().map(|size| of_rows(size, tokens).next_multiple_of(256)).sum();
            let worth = pass.saturating_sub(of_rows) / of_group;
            let blocks = room.multiprocessors * slice.tile.blocks();
            let groups = (blocks / strips).clamp(1, tokens.div_ceil(slice.tile.rows)).min(worth);
            if groups == 0 {
                return None;
            }
            if of_rows + groups * of_group + 256 * sizes.len() <= room.workspace {
                return Some(Self { slice, tokens, groups });
            }
            tokens = tokens.div_ceil(2).next_multiple_of(slice.tile.rows);
        }
        None
    }

    /// Groups of rows of a launch over so many tokens.
    pub fn groups(&self, tokens: usize) -> usize {
        self.groups.min(tokens.div_ceil(self.slice.tile.rows))
    }
}

/// The largest rank of branches whose gradients `lora_glu_backward` sums together with that of their product's reader, on cards
/// that have so much shared memory a block; 0 where it is too little.
pub(in crate::backend::cuda) fn gated_rank(shared: usize) -> usize {
    GATED_RANKS.into_iter().filter(|&rank| Tiling::lean_shared_bytes(rank) <= shared).max().unwrap_or(0)
}

/// The smallest of the ranks that a kernel is compiled for which takes this one.
pub(super) fn compiled_rank(ranks: &[usize], rank: usize) -> Option<usize> {
    ranks.iter().copied().find(|&compiled| compiled >= rank)
}

/// Tiles of tokens that blocks may take: their sums are in registers.
fn tile_counts(rank: usize) -> impl Iterator<Item = usize> {
    [4, 2, 1].into_iter().filter(move |&tiles| tiles * rank <= 64)
}

/// Column tiles of a strip where there are to be at most so many blocks, but one for every block of tokens.
pub(super) fn strip_tiles(column_tiles: usize, token_blocks: usize, most: usize) -> usize {
    column_tiles.div_ceil((most / token_blocks.max(1)).clamp(1, column_tiles))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSPACE: usize = 32 << 20;

    #[test]
    fn partial_sums_fit_their_workspace_however_many_tokens_there_are() {
        let shapes: [&[(usize, usize)]; 6] = [
            &[(14336, 16), (14336, 16)],
            &[(576, 16), (192, 16), (192, 16)],
            &[(576, 16)],
            &[(4096, 32), (1024, 32), (1024, 32)],
            &[(28672, 64)],
            &[(8, 8)],
        ];
        for sizes in shapes {
            for rows in [1, 128, 129, 4096, 16_384, 78_475] {
                for (multiprocessors, shared) in [(132, 227 << 10), (28, 99 << 10), (108, 163 << 10)] {
                    let room = Room { multiprocessors, shared, workspace: WORKSPACE };
                    let Some(tiling) = Tiling::new(rows, sizes, &room) else {
                        // One token's gradient is smaller than that of b, and so are 128 tokens' at large ranks.
                        assert!(rows == 1 || sizes[0].1 >= 32 || sizes[0].0 == 8, "{rows} rows of {sizes:?}");
                        continue;
                    };
                    assert!(sizes[0].1 < 64, "a pass over the gradient is less than partial sums of rank 64");
                    assert!(tiling.workspace(sizes) <= WORKSPACE);
                    assert!(Tiling::shared_bytes(tiling.rank, tiling.tiles) <= shared);
                    // Launches begin at whole blocks of tokens.
                    assert!(tiling.tokens >= rows || tiling.tokens.is_multiple_of(TILE * tiling.tiles));
                    for &(columns, _) in sizes {
                        assert!(tiling.strips(columns) * tiling.strip_tiles * TILE >= columns);
                    }
                }
            }
        }
        assert!(
            Tiling::new(128, &[(512, 128)], &Room { multiprocessors: 132, shared: 227 << 10, workspace: WORKSPACE })
                .is_none()
        );
    }

    #[test]
    fn slices_are_whole_heads_and_fit_every_card() {
        let cards = [(132, 227 << 10), (28, 99 << 10), (108, 163 << 10)];
        for head_dim in (16..=256).step_by(16) {
            for (rank, (multiprocessors, shared)) in
                [8, 16, 24, 32].into_iter().flat_map(|rank| cards.map(|card| (rank, card)))
            {
                let slice = Slice::of_delta(head_dim, rank, shared).expect("a slice");
                assert!(slice.width.is_multiple_of(head_dim) && slice.tiles_bytes() <= shared);
                let Some(slice) = Slice::of_rope(head_dim, rank, shared) else {
                    assert!(head_dim == 256 && rank > 16 && shared < 100 << 10, "heads of {head_dim}, rank {rank}");
                    continue;
                };
                assert!(slice.width.is_multiple_of(head_dim) && slice.rank >= rank);
                assert!(2 * slice.rope_shared_bytes() <= shared);
                let room = Room { multiprocessors, shared, workspace: WORKSPACE };
                for (heads, rows) in
                    [4, 32].into_iter().flat_map(|heads| [128, 130, 4096, 78_475].map(|rows| (heads, rows)))
                {
                    let sizes = [(heads * head_dim, rank), (2 * head_dim, rank), (2 * head_dim, rank)];
                    let one = Slices::one(slice, rows, sizes[0], &room).expect("it takes one of any");
                    assert!(4 * one.groups(rows) * sizes[0].0 * rank <= (2 * rows * sizes[0].0).min(WORKSPACE));
                    let Some(slices) = Slices::both(slice, rows, &sizes, &room) else {
                        assert!(2 * head_dim <= 64 || rows < 4096, "{rows} rows of {sizes:?}");
                        continue;
                    };
                    let groups = slices.groups(slices.tokens);
                    let strips: usize = sizes.iter().map(|size| slice.strips(size.0)).sum();
                    assert!(groups == 1 || strips * groups <= 2 * multiprocessors);
                    assert!(slices.tokens >= rows || slices.tokens.is_multiple_of(slice.tile.rows));
                    let bytes =
                        |&size: &(usize, usize)| partial_bytes(slice.strips(size.0), groups, size, slices.tokens).1;
                    let bytes: usize = sizes.iter().map(|size| bytes(size).next_multiple_of(256)).sum();
                    assert!(bytes <= WORKSPACE);
                }
            }
        }
        assert_eq!(Slice::of_rope(128, 16, 227 << 10).map(|slice| slice.width), Some(512));
        assert_eq!(Slice::of_rope(128, 16, 99 << 10).map(|slice| slice.width), Some(384));
        assert_eq!(Slice::of_delta(128, 16, 99 << 10).map(|slice| slice.width), Some(512));
        assert!(Slice::of_rope(72, 16, 227 << 10).is_none() && Slice::of_rope(64, 64, 227 << 10).is_none());
    }

    #[test]
    fn gated_products_run_in_one_wave() {
        for (columns, rank) in [(14_336, 16), (14_336, 32), (8192, 16), (1536, 16), (96, 8)] {
            for rows in [128, 256, 1434, 4096, 16_384, 78_475] {
                for (multiprocessors, shared) in [(132, 227 << 10), (28, 99 << 10), (108, 163 << 10)] {
                    let room = Room { multiprocessors, shared, workspace: WORKSPACE };
                    for reader in [None, Some(rank)] {
                        let Some(tiling) = Tiling::gated(rows, (columns, rank), reader, &room) else {
                            let small = shared < 128 << 10;
                            assert!(
                                rank == 32 && (small || rows == 128) || columns == 96,
                                "{rows} rows of {columns}, {rank}"
                            );
                            continue;
                        };
                        assert!(tiling.workspace(&[(columns, rank); 2]) <= WORKSPACE);
                        let taken = Tiling::gated_shared_bytes(tiling.rank, tiling.tiles, reader.is_some());
                        assert!(if tiling.lean { Tiling::lean_shared_bytes(tiling.rank) } else { taken } <= shared);
                        assert_eq!(tiling.lean, reader.is_some() && shared < 128 << 10);
                        let (strips, blocks) = (tiling.strips(columns), tiling.token_blocks(tiling.tokens));
                        assert!(strips * tiling.strip_tiles * TILE >= columns);
                        assert!(strips == 1 || strips * blocks <= multiprocessors);
                    }
                }
            }
        }
        assert_eq!([99 << 10, 163 << 10, 227 << 10].map(gated_rank), [16, 32, 32]);
        assert!(
            Tiling::gated(
                4096,
                (14_336, 64),
                None,
                &Room { multiprocessors: 132, shared: 227 << 10, workspace: WORKSPACE }
            )
            .is_none()
        );
    }
}
