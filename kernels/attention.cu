// Causal attention of packed documents, forward, on the tensor cores of any card since sm_80 (mma.sync).
//   P = softmax(cap(scale Q Kᵀ)), output = P V, log_sum_exp = ln Σ exp(cap(scale Q Kᵀ))
// in one pass over keys with a running maximum: FlashAttention-2 (Dao 2023, arXiv 2307.08691).
//
// Source: prelude.cuh, tensor_core.cuh, attention_shape.cuh (its macros), this file.
// Macros: WARPS, ROW_TILES (tiles of 16 queries a warp holds), BLOCK_N (keys a step, a multiple of 16);
//   BLOCK_M = 16 ROW_TILES WARPS queries a block.
// attention_forward: grid (⌈tokens / BLOCK_M⌉, HEADS), block 32 WARPS,
//   dynamic shared memory (BLOCK_M + 2 BLOCK_N) (2 HEAD_DIM + 16) bytes.

constexpr int BLOCK_M = 16 * ROW_TILES * WARPS;
constexpr int THREADS = 32 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(bf16* output, float* log_sum_exp, const bf16* qkv, const int* document_start, int tokens) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int head = blockIdx.y, kv_head = head / GROUP;
    // Late tiles see the most keys: they start first.
    int first = (gridDim.x - 1 - blockIdx.x) * BLOCK_M;
    int last = min(first + BLOCK_M, tokens) - 1;

    const bf16* query = qkv + head * HEAD_DIM;
    const bf16* key = qkv + (HEADS + kv_head) * HEAD_DIM;
    const bf16* value = key + KV_HEADS * HEAD_DIM;
    u32 query_tile = shared_address(shared);
    u32 key_tile = query_tile + BLOCK_M * ROW_BYTES;
    u32 value_tile = key_tile + BLOCK_N * ROW_BYTES;

    int first_key = first_seen(document_start, first), last_first_key = first_seen(document_start, last);
    int lowest_block = first_key / BLOCK_N, block = last / BLOCK_N;

    copy_rows<BLOCK_M, THREADS>(query_tile, query, QKV_STRIDE, first, tokens);
    copy_rows<BLOCK_N, THREADS>(key_tile, key, QKV_STRIDE, block * BLOCK_N, tokens);
    copy_async_commit();

    int warp_row = warp * 16 * ROW_TILES;
    int row_first_key[ROW_TILES][2];
    float accumulator[ROW_TILES][HEAD_DIM / 8][4], row_max[ROW_TILES][2], row_sum[ROW_TILES][2];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + warp_row + tile * 16 + (lane >> 2) + half * 8;
            row_first_key[tile][half] = first_seen(document_start, min(row, tokens - 1));
            row_max[tile][half] = -INFINITY_F;
            row_sum[tile][half] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) accumulator[tile][j][i] = 0.0f;
    }

    for (; block >= lowest_block; block--) {
        int n0 = block * BLOCK_N;
        // The warp's rows may all lie before this block of keys (on the diagonal).
        bool active = n0 <= first + warp_row + 16 * ROW_TILES - 1;
        float scores[ROW_TILES][BLOCK_N / 8][4];

        copy_async_wait<0>();
        __syncthreads();
        copy_rows<BLOCK_N, THREADS>(value_tile, value, QKV_STRIDE, n0, tokens);
        copy_async_commit();

        if (active) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) scores[tile][j][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < HEAD_DIM / 16; k++) {
                u32 a[ROW_TILES][4];
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; tile++)
                    load_a<ROW_BYTES>(a[tile], query_tile + (warp_row + tile * 16) * ROW_BYTES + k * 32);
#pragma unroll
                for (int j = 0; j < BLOCK_N / 16; j++) {
                    u32 b[4];
                    load_b_from_n_rows<ROW_BYTES>(b, key_tile + j * 16 * ROW_BYTES + k * 32);
#pragma unroll
                    for (int tile = 0; tile < ROW_TILES; tile++) {
                        multiply_16x8x16(scores[tile][2 * j], a[tile], b[0], b[1]);
                        multiply_16x8x16(scores[tile][2 * j + 1], a[tile], b[2], b[3]);
                    }
                }
            }
        }

        copy_async_wait<0>();
        __syncthreads();
        if (block > lowest_block) {
            copy_rows<BLOCK_N, THREADS>(key_tile, key, QKV_STRIDE, n0 - BLOCK_N, tokens);
            copy_async_commit();
        }
        if (!active) continue;

        bool masked = n0 + BLOCK_N - 1 > first + warp_row || n0 < last_first_key;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[tile][j][i] = cap_score(scores[tile][j][i]);
            if (masked) {
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int column = n0 + j * 8 + (lane & 3) * 2 + (i & 1);
                        int row = first + warp_row + tile * 16 + (lane >> 2) + (i >> 1) * 8;
                        if (column > row || column < row_first_key[tile][i >> 1]) scores[tile][j][i] = -INFINITY_F;
                    }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float maximum = row_max[tile][half];
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
                    maximum = fmaxf(maximum, fmaxf(scores[tile][j][2 * half], scores[tile][j][2 * half + 1]));
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
                float base = maximum == -INFINITY_F ? 0.0f : maximum * EXPONENT_SCALE;
                float correction = exp2_fast(row_max[tile][half] * EXPONENT_SCALE - base);
                row_max[tile][half] = maximum;
                float sum = row_sum[tile][half] * correction;
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        scores[tile][j][i] = exp2_fast(scores[tile][j][i] * EXPONENT_SCALE - base);
                        sum += scores[tile][j][i];
                    }
                row_sum[tile][half] = sum;
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 8; j++) {
                    accumulator[tile][j][2 * half] *= correction;
                    accumulator[tile][j][2 * half + 1] *= correction;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++) {
            u32 a[ROW_TILES][4];
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* pair = &scores[tile][2 * k + (i >> 1)][2 * (i & 1)];
                    a[tile][i] = pack_bf16(pair[0], pair[1]);
                }
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 16; j++) {
                u32 b[4];
                load_b_from_k_rows<ROW_BYTES>(b, value_tile + k * 16 * ROW_BYTES + j * 32);
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; tile++) {
                    multiply_16x8x16(accumulator[tile][2 * j], a[tile], b[0], b[1]);
                    multiply_16x8x16(accumulator[tile][2 * j + 1], a[tile], b[2], b[3]);
                }
            }
        }
    }

    // Each warp reads only its own rows of the query tile, so it may reuse them.
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
        int tile_row = warp_row + tile * 16;
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = row_sum[tile][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[half] = 1.0f / sum;
            int row = first + tile_row + (lane >> 2) + half * 8;
            if ((lane & 3) == 0 && row < tokens)
                log_sum_exp[(i64)row * HEADS + head] = row_max[tile][half] * (EXPONENT_SCALE * LN_2) + logf(sum);
        }
        store_rows<HEAD_DIM>(output + head * HEAD_DIM, OUTPUT_STRIDE, first + tile_row, tokens, shared + tile_row * ROW_BYTES,
                   accumulator[tile], inverse[0], inverse[1]);
    }
}
