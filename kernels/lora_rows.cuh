// What the kernels that pass over rows for another reason share when they sum for LoRA branches on their way (lora_norm.cu,
// lora_rope.cu, lora_delta.cu). A block keeps a slice of WIDTH columns and works down the rows, ROWS of them at a time: sums over rows stay
// in registers until the end, and a branch's factors are read once. A warp first makes whole rows of the slice, of which it
// then sums a share of the columns of all. Macros: WIDTH, a multiple of 16; TILE_ROWS (16 or 32) and BLOCK_WARPS.

constexpr int ROWS = TILE_ROWS, WARPS = BLOCK_WARPS, THREADS = 32 * WARPS;
constexpr int OWN_ROWS = ROWS / WARPS;
// Rows are padded by 16 bytes, so that matrix loads meet no bank twice.
constexpr int ROW_BYTES = 2 * WIDTH + 16, TILE_BYTES = ROWS * ROW_BYTES;
// 16 bytes of a row each.
constexpr int CHUNKS = WIDTH / 8;
// Steps of 16 columns; those of a warp in sums over rows, and in sums over columns, for which a warp takes 16 rows.
constexpr int STEPS = WIDTH / 16, OWN_STEPS = (STEPS + WARPS - 1) / WARPS;
constexpr int SHARES = WARPS / (ROWS / 16), SHARE_STEPS = (STEPS + SHARES - 1) / SHARES;

// Bytes of a row of `rank` values beside a tile, padded likewise.
DEVICE constexpr int thin_stride(int rank) { return 2 * rank + 16; }

// A warp's own rows of a tile, of which `rows` and `columns` are there; zeros elsewhere.
DEVICE void request_rows(u32 tile, const bf16* from, i64 stride, int rows, int columns) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < OWN_ROWS; r++) {
        int row = warp * OWN_ROWS + r;
        for (int chunk = lane; chunk < CHUNKS; chunk += 32) {
            bool valid = row < rows && chunk * 8 < columns;
            copy_async_16(tile + row * ROW_BYTES + chunk * 16, valid ? from + row * stride + chunk * 8 : from, valid);
        }
    }
}

// Rows of `rank` values, at most RANKS, a multiple of 16: zeros beyond rank and rows. By all threads.
template <int RANKS>
DEVICE void request_thin(u32 to, const bf16* from, i64 stride, int rows, int rank) {
    for (int i = threadIdx.x; i < ROWS * (RANKS / 8); i += THREADS) {
        int row = i / (RANKS / 8), chunk = i % (RANKS / 8);
        bool valid = row < rows && chunk * 8 < rank;
        copy_async_16(to + row * thin_stride(RANKS) + chunk * 16, valid ? from + row * stride + chunk * 8 : from, valid);
    }
}

// sum += the columns of a warp's steps as rows, times the thin rows beside: [16 columns, ROWS] [ROWS, RANKS] a step.
template <int RANKS>
DEVICE void add_columns(float (&sum)[OWN_STEPS][RANKS / 8][4], u32 tile, u32 thin) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) {
        u32 right[RANKS / 16][4];
#pragma unroll
        for (int r = 0; r < RANKS / 16; r++)
            load_b_from_k_rows<thin_stride(RANKS)>(right[r], thin + k * 16 * thin_stride(RANKS) + r * 32);
#pragma unroll
        for (int s = 0; s < OWN_STEPS; s++) {
            int step = warp + s * WARPS;
            if (STEPS % WARPS != 0 && step >= STEPS) break;
            u32 left[4];
            load_matrix_x4_transposed(left, tile + (k * 16 + (lane & 7) + (lane >> 4) * 8) * ROW_BYTES + step * 32 +
                                                ((lane >> 3) & 1) * 16);
#pragma unroll
            for (int r = 0; r < RANKS / 16; r++) {
                multiply_16x8x16(sum[s][2 * r], left, right[r][0], right[r][1]);
                multiply_16x8x16(sum[s][2 * r + 1], left, right[r][2], right[r][3]);
            }
        }
    }
}

// sum += the thin rows, transposed, times the columns of a warp's steps: [RANKS, ROWS] [ROWS, 16 columns] a step.
template <int RANKS>
DEVICE void add_ranks(float (&sum)[OWN_STEPS][RANKS / 16][2][4], u32 tile, u32 thin) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++) {
        u32 left[RANKS / 16][4];
#pragma unroll
        for (int r = 0; r < RANKS / 16; r++)
            load_matrix_x4_transposed(left[r], thin + (k * 16 + (lane & 7) + (lane >> 4) * 8) * thin_stride(RANKS) + r * 32 +
                                                   ((lane >> 3) & 1) * 16);
#pragma unroll
        for (int s = 0; s < OWN_STEPS; s++) {
            int step = warp + s * WARPS;
            if (STEPS % WARPS != 0 && step >= STEPS) break;
            u32 right[4];
            load_b_from_k_rows<ROW_BYTES>(right, tile + k * 16 * ROW_BYTES + step * 32);
#pragma unroll
            for (int r = 0; r < RANKS / 16; r++) {
                multiply_16x8x16(sum[s][r][0], left[r], right[0], right[1]);
                multiply_16x8x16(sum[s][r][1], left[r], right[2], right[3]);
            }
        }
    }
}

// The right factor of sums over columns, [columns, RANKS], in registers: that of a warp's share of the steps.
// `of(r)` gives two neighbours of column r as one word: `of(r)(column)`.
template <int RANKS, class Of>
DEVICE void take_factor(u32 (&factor)[SHARE_STEPS][RANKS / 8][2], Of of) {
    int share = (threadIdx.x >> 5) / (ROWS / 16), lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < RANKS / 8; j++) {
        auto at = of(j * 8 + (lane >> 2));
#pragma unroll
        for (int s = 0; s < SHARE_STEPS; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int step = share + s * SHARES;
                factor[s][j][half] = STEPS % SHARES == 0 || step < STEPS ? at(step * 16 + half * 8 + (lane & 3) * 2) : 0;
            }
    }
}

// A warp's share of a tile's rows times the factor, into its place of [SHARES][ROWS][RANKS] f32.
template <int RANKS>
DEVICE void share_of_rows(float* shares, u32 tile, const u32 (&factor)[SHARE_STEPS][RANKS / 8][2]) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = warp % (ROWS / 16) * 16, share = warp / (ROWS / 16);
    float sum[RANKS / 8][4] = {};
#pragma unroll
    for (int s = 0; s < SHARE_STEPS; s++) {
        int step = share + s * SHARES;
        if (STEPS % SHARES != 0 && step >= STEPS) break;
        u32 left[4];
        load_a<ROW_BYTES>(left, tile + first * ROW_BYTES + step * 32);
#pragma unroll
        for (int j = 0; j < RANKS / 8; j++) multiply_16x8x16(sum[j], left, factor[s][j][0], factor[s][j][1]);
    }
    float* to = shares + (share * ROWS + first + (lane >> 2)) * RANKS + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < RANKS / 8; j++) {
        *(float2*)(to + j * 8) = make_float2(sum[j][0], sum[j][1]);
        *(float2*)(to + 8 * RANKS + j * 8) = make_float2(sum[j][2], sum[j][3]);
    }
}

// Element `i` of [ROWS][RANKS], all shares of it.
template <int RANKS>
DEVICE float sum_of_shares(const float* shares, int i) {
    float sum = 0.0f;
#pragma unroll
    for (int share = 0; share < SHARES; share++) sum += shares[share * ROWS * RANKS + i];
    return sum;
}

// Sums over rows as partial ones: [columns, rank], from a pointer to the slice's first column on.
template <int RANKS>
DEVICE void store_columns(float* to, const float (&sum)[OWN_STEPS][RANKS / 8][4], int columns, int rank) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int s = 0; s < OWN_STEPS; s++)
#pragma unroll
        for (int j = 0; j < RANKS / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int column = (warp + s * WARPS) * 16 + half * 8 + (lane >> 2), r = j * 8 + (lane & 3) * 2;
                if (column < columns && r < rank)
                    *(float2*)(to + (i64)column * rank + r) = make_float2(sum[s][j][2 * half], sum[s][j][2 * half + 1]);
            }
}

// Likewise the other way round: [rank, stride].
template <int RANKS>
DEVICE void store_ranks(float* to, i64 stride, const float (&sum)[OWN_STEPS][RANKS / 16][2][4], int columns, int rank) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int s = 0; s < OWN_STEPS; s++)
#pragma unroll
        for (int j = 0; j < RANKS / 16; j++)
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int column = (warp + s * WARPS) * 16 + part * 8 + (lane & 3) * 2, r = j * 16 + half * 8 + (lane >> 2);
                    if (column < columns && r < rank)
                        *(float2*)(to + r * stride + column) = make_float2(sum[s][j][part][2 * half], sum[s][j][part][2 * half + 1]);
                }
}
