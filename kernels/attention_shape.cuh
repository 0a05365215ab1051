// What the attention kernels share: the shape they are compiled for and which tokens see which.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM; SCALE (float, positive); WINDOW (0: none); SOFTCAP (float, 0: none). OUTPUT_SPARE and
// GRAD_SPARE: columns that rows of the output and of the gradient of qkv have beyond their own (0). MIDDLE_RANK: the rank of
// the LoRA branch that reads the output, a multiple of 8, where the forward kernels sum for it (0: they do not).
//
// A token t sees s when first_seen(t) <= s <= t; token s is seen by t when s <= t < end_of_seers(s). Both bounds never
// decrease, so that the first and last token of a tile bound all of it.

#ifndef OUTPUT_SPARE
#define OUTPUT_SPARE 0
#endif
#ifndef GRAD_SPARE
#define GRAD_SPARE 0
#endif
#ifndef MIDDLE_RANK
#define MIDDLE_RANK 0
#endif

extern __shared__ __align__(1024) unsigned char shared[];

constexpr int GROUP = HEADS / KV_HEADS;
constexpr i64 QKV_STRIDE = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr i64 OUTPUT_STRIDE = HEADS * HEAD_DIM + OUTPUT_SPARE;
constexpr i64 GRAD_OUTPUT_STRIDE = HEADS * HEAD_DIM;
constexpr i64 GRAD_QKV_STRIDE = QKV_STRIDE + GRAD_SPARE;
constexpr bool HAS_SOFTCAP = SOFTCAP > 0.0f;

// Turns raw scores (after the cap, where there is one) into exponents of two.
constexpr float EXPONENT_SCALE = (HAS_SOFTCAP ? 1.0f : SCALE) * LOG2_E;

DEVICE int first_seen(const int* document_start, int t) {
    int start = document_start[t];
    return WINDOW > 0 ? max(start, t - WINDOW + 1) : start;
}

DEVICE int end_of_seers(const int* document_end, int s) {
    int end = document_end[s];
    return WINDOW > 0 ? min(end, s + WINDOW) : end;
}

// c tanh(scale s / c), Gemma 2 (arXiv 2408.00118).
DEVICE float cap_score(float score) {
    if constexpr (HAS_SOFTCAP) return SOFTCAP * tanh_fast(score * (SCALE / SOFTCAP));
    return score;
}

// Derivative of the cap by the scaled score, from the capped score: 1 - tanh².
DEVICE float cap_slope(float capped) {
    if constexpr (HAS_SOFTCAP) {
        float t = capped * (1.0f / SOFTCAP);
        return 1.0f - t * t;
    }
    return 1.0f;
}

// Tiles of the mma.sync kernels: rows of one head, padded by 16 bytes so that eight rows lie in different banks.
constexpr int ROW_BYTES = HEAD_DIM * 2 + 16;

// Copies rows [first, first + ROWS) of a head to shared memory; rows past `tokens` become zeros.
template <int ROWS, int THREADS>
DEVICE void copy_rows(u32 tile, const bf16* head, i64 stride, int first, int tokens) {
    constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
    for (int base = 0; base < ROWS * CHUNKS; base += THREADS) {
        int i = base + threadIdx.x;
        if (ROWS * CHUNKS % THREADS != 0 && i >= ROWS * CHUNKS) break;
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = first + row < tokens;
        copy_async_16(tile + row * ROW_BYTES + chunk * 16, head + (valid ? first + row : 0) * stride + chunk * 8, valid);
    }
}

// Writes a warp's 16 rows of accumulators, times the two factors of each lane's rows (r and r + 8), PIECE columns at a
// time through 16 rows of (2 PIECE + 16) bytes of shared memory of its own, in stores of 16 bytes.
template <int PIECE>
DEVICE void store_rows(bf16* head, i64 stride, int first, int tokens, unsigned char* staging,
                       const float (&values)[HEAD_DIM / 8][4], float factor_low, float factor_high) {
    constexpr int STAGING_ROW = 2 * PIECE + 16, CHUNKS = PIECE / 8;
    static_assert(HEAD_DIM % PIECE == 0, "pieces cover a row");
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int piece = 0; piece < HEAD_DIM / PIECE; piece++) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            const float(&value)[4] = values[piece * CHUNKS + j];
            u32* low = (u32*)(staging + (lane >> 2) * STAGING_ROW + j * 16 + (lane & 3) * 4);
            low[0] = pack_bf16(value[0] * factor_low, value[1] * factor_low);
            low[8 * STAGING_ROW / 4] = pack_bf16(value[2] * factor_high, value[3] * factor_high);
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 16 * CHUNKS; i += 32) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            if (first + row < tokens)
                *(uint4*)(head + (first + row) * stride + piece * PIECE + chunk * 8) =
                    *(const uint4*)(staging + row * STAGING_ROW + chunk * 16);
        }
    }
    __syncwarp();
}

// Rows of ROW_BYTES that the head's columns of the branch's `a` take in shared memory.
constexpr int A_ROWS = (MIDDLE_RANK + 15) / 16 * 16;

// A warp's 16 rows of a head's output (as for store_rows, and rounded as they are stored) by the head's columns of the
// branch's `a`, in shared memory: into the head's partial sum of the middle, [tokens, RANK].
template <int RANK>
DEVICE void store_partial_middle(float* partial, u32 a_tile, int first, int tokens, const float (&values)[HEAD_DIM / 8][4],
                                 float factor_low, float factor_high) {
    static_assert(RANK % 8 == 0, "tiles of eight rows of a");
    int lane = threadIdx.x & 31;
    float sum[RANK / 8][4] = {};
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &values[2 * k + (i >> 1)][2 * (i & 1)];
            float factor = (i & 1) ? factor_high : factor_low;
            x[i] = pack_bf16(pair[0] * factor, pair[1] * factor);
        }
#pragma unroll
        for (int r = 0; r < RANK / 8; r += 2) {
            u32 b[4];
            load_b_from_n_rows<ROW_BYTES>(b, a_tile + r * 8 * ROW_BYTES + k * 32);
            multiply_16x8x16(sum[r], x, b[0], b[1]);
            if (r + 1 < RANK / 8) multiply_16x8x16(sum[r + 1 < RANK / 8 ? r + 1 : r], x, b[2], b[3]);
        }
    }
#pragma unroll
    for (int r = 0; r < RANK / 8; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + half * 8 + (lane >> 2);
            if (row < tokens)
                *(float2*)(partial + (i64)row * RANK + r * 8 + (lane & 3) * 2) =
                    make_float2(sum[r][2 * half], sum[r][2 * half + 1]);
        }
}
