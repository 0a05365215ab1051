// What the Hopper attention kernels share. A block is one warpgroup that copies and GROUPS warpgroups that compute on 64
// rows each. Blocks stay and take tiles from a counter, which the copying warpgroup announces to the others through two
// slots in shared memory; the last block to finish resets the counter. So launches of one module must not overlap.
// Which block works on which tile does not change any result.

constexpr int GROUPS = 2;
constexpr int TILE = 64 * GROUPS;
constexpr int THREADS = 128 * (1 + GROUPS);
constexpr int WARPS = 4 * GROUPS;
// A head's columns lie in slabs of 64 (128 bytes, the swizzle's width).
constexpr int SLABS = HEAD_DIM / 64;
constexpr int PIECE = 64;
constexpr u32 STAGING_WARP = 16 * (2 * PIECE + 16), STAGING_BYTES = WARPS * STAGING_WARP;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "the Hopper kernels take head sizes 64 and 128");

__device__ unsigned int next_tile, finished_blocks;

struct Tile {
    int head, first, last;
};

// Tiles in the order they are taken: a section of heads at a time, whose keys and values fit in the L2 cache; within
// it, the longest first: late queries see the most keys, early keys are seen by the most queries.
template <int ALL_HEADS, bool LATE_FIRST>
DEVICE Tile tile_at(int index, int tokens, int section) {
    int row_tiles = (tokens + TILE - 1) / TILE;
    int sections_before = index / (row_tiles * section);
    int rest = index - sections_before * row_tiles * section;
    int heads = min(section, ALL_HEADS - sections_before * section);
    int row_tile = rest / heads;
    Tile tile;
    tile.head = sections_before * section + rest - row_tile * heads;
    tile.first = (LATE_FIRST ? row_tiles - 1 - row_tile : row_tile) * TILE;
    tile.last = min(tile.first + TILE, tokens) - 1;
    return tile;
}

DEVICE int take_tile() { return gridDim.x + atomicAdd(&next_tile, 1u); }

DEVICE void finish_tiles() {
    if (atomicAdd(&finished_blocks, 1u) == gridDim.x - 1) {
        atomicExch(&next_tile, 0u);
        atomicExch(&finished_blocks, 0u);
    }
}

// A place in a ring of COUNT barriers: the parity to wait for until it was filled, and until it is empty again.
template <int COUNT>
struct Ring {
    u32 place = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++place == COUNT) place = 0, parity ^= 1;
    }
};

// Shared memory from its first multiple of 1024 bytes, where swizzled tiles must lie.
DEVICE u32 aligned_shared() { return (shared_address(shared) + 1023) & ~1023u; }
DEVICE unsigned char* shared_pointer(u32 address) { return shared + (address - shared_address(shared)); }

// Copies rows of one head (its columns from `column`) into slabs of `slab_bytes`.
DEVICE void copy_tile(u32 tile, u32 slab_bytes, const TensorMap& map, int column, int row, u32 full) {
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) copy_box(tile + slab * slab_bytes, map, column + slab * 64, row, full);
}
