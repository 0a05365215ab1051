// What the kernels that work through tiles of activations to sum for LoRA branches share (lora.cu, lora_glu.cu): tiles and the
// thin matrices beside them in shared memory. RANK (16, 32 or 64, the real rank or more) is a macro.

constexpr int TILE = 128;
constexpr int TILE_BYTES = TILE * TILE * 2;
// Rows of middle and b: padded by 16 bytes, so that matrix loads meet no bank twice.
constexpr int THIN_STRIDE = 2 * RANK + 16;
constexpr int B_BYTES = TILE * THIN_STRIDE;
constexpr int RANK_TILES = RANK / 8;

// Byte offset of 16 bytes in a tile of rows of 256 bytes; chunks are swapped within groups of eight, by the row.
DEVICE u32 swizzled(int row, int chunk) { return row * 256 + ((chunk & 8) | ((chunk ^ row) & 7)) * 16; }

// Rows of `rank` values at `stride` into shared rows of THIN_STRIDE; zeros beyond rank and rows.
DEVICE void load_thin(u32 to, const bf16* from, i64 stride, int rows, int rank, int count) {
    constexpr int CHUNKS = RANK / 8;
    for (int i = threadIdx.x; i < count * CHUNKS; i += blockDim.x) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = row < rows && chunk * 8 < rank;
        copy_async_16(to + row * THIN_STRIDE + chunk * 16, valid ? from + row * stride + chunk * 8 : from, valid);
    }
}

// sum += 16 rows of a tile, from `row` on, times the rows of b below it: [16 tokens, columns] [columns, rank].
DEVICE void add_middle(float (&sum)[RANK_TILES][4], u32 tile, int row, u32 b) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
        u32 a[4];
        load_matrix_x4(a, tile + swizzled(row + (lane & 15), 2 * i + (lane >> 4)));
#pragma unroll
        for (int r = 0; r < RANK / 16; r++) {
            u32 f[4];
            load_b_from_k_rows<THIN_STRIDE>(f, b + i * 16 * THIN_STRIDE + r * 32);
            multiply_16x8x16(sum[2 * r], a, f[0], f[1]);
            multiply_16x8x16(sum[2 * r + 1], a, f[2], f[3]);
        }
    }
}

// sum += 16 columns of a tile as rows, from column 16 `strip` on, times the middle of its tokens: [16 columns, tokens]
// [tokens, rank]. The tile holds the transpose.
DEVICE void add_b(float (&sum)[RANK_TILES][4], u32 tile, int strip, u32 middle) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
        u32 a[4];
        load_matrix_x4_transposed(
            a, tile + swizzled(i * 16 + (lane & 7) + (lane >> 4) * 8, 2 * strip + ((lane >> 3) & 1)));
#pragma unroll
        for (int r = 0; r < RANK / 16; r++) {
            u32 f[4];
            load_b_from_k_rows<THIN_STRIDE>(f, middle + i * 16 * THIN_STRIDE + r * 32);
            multiply_16x8x16(sum[2 * r], a, f[0], f[1]);
            multiply_16x8x16(sum[2 * r + 1], a, f[2], f[3]);
        }
    }
}

// sum += rows of g, transposed, times eight columns of a tile, from column 8 `chunk` on: [RANKS, tokens] [tokens, 8]. Rows of g
// are padded as those of middle and b are.
template <int RANKS>
DEVICE void add_a(float (&sum)[RANKS / 16][4], u32 tile, int chunk, u32 g) {
    int lane = threadIdx.x & 31;
    // Unrolled it would take registers from the tiles on their way.
#pragma unroll 1
    for (int i = 0; i < TILE / 32; i++) {
        u32 x[4];
        load_matrix_x4_transposed(x, tile + swizzled(i * 32 + lane, chunk));
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < RANKS / 16; r++) {
                u32 a[4];
                int token = i * 32 + h * 16 + (lane & 7) + (lane >> 4) * 8;
                load_matrix_x4_transposed(a, g + token * (2 * RANKS + 16) + (2 * r + ((lane >> 3) & 1)) * 16);
                multiply_16x8x16(sum[r], a, x[2 * h], x[2 * h + 1]);
            }
    }
}

// Sums of 16 rows from `first` on into rows of `rank` values; those at `end` and beyond are left out.
DEVICE void store_sums(float* to, const float (&sum)[RANK_TILES][4], int first, int end, int rank) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < RANK_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + half * 8 + lane / 4, at = r * 8 + lane % 4 * 2;
            if (row < end && at < rank)
                *(float2*)(to + (i64)row * rank + at) = make_float2(sum[r][2 * half], sum[r][2 * half + 1]);
        }
}
