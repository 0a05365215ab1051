//! How the kernels that sum over activations for LoRA branches share their work (`kernels/lora.cu`, `kernels/lora_glu.cu`).

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
        let bytes = |&(columns, rank): &(usize, usize)| self.partial_bytes(columns, rank, self.tokens).1;
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

    /// Bytes of a projection's partial sums: of its middle's gradient, and of all.
    pub fn partial_bytes(&self, columns: usize, rank: usize, tokens: usize) -> (usize, usize) {
        let middle = 4 * self.strips(columns) * tokens * rank;
        (middle, middle + 4 * self.token_blocks(tokens) * columns * rank)
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
