// Causal attention of packed documents on the tensor cores of any card since sm_80 (mma.sync). Forward, with WARPS:
//   P = softmax(cap(scale Q Kᵀ)), output = P V, log_sum_exp = ln Σ exp(cap(scale Q Kᵀ))
// in one pass over keys with a running maximum: FlashAttention-2 (Dao 2023, arXiv 2307.08691). With MIDDLE_RANK also each
// head's share of the middle of the LoRA branch that reads the output, while that is in registers:
//   partial[head] = output a^T  [tokens, MIDDLE_RANK], over the head's columns; lora_middle_finish (lora.cu) adds them up.
//
// Source: prelude.cuh, tensor_core.cuh, attention_shape.cuh (its macros), this file.
// Macros: WARPS, ROW_TILES (tiles of 16 queries a warp holds), BLOCK_N (keys a step, a multiple of 16);
//   BLOCK_M = 16 ROW_TILES WARPS queries a block.
// attention_forward: grid (⌈tokens / BLOCK_M⌉, HEADS), block 32 WARPS,
//   dynamic shared memory (BLOCK_M + 2 BLOCK_N) (2 HEAD_DIM + 16) bytes.
//
// Backward, with KEY_WARPS; P recomputed from log_sum_exp and S the scaled (capped) scores (Dao 2023, arXiv 2307.08691):
//   delta = Σ dO O,  dP = dO Vᵀ,  dS = P (dP - delta) cap',  dV = Pᵀ dO,  dK = scale dSᵀ Q,  dQ = scale dS K
// Queries' gradients come from a second kernel that recomputes S and dP: seven products in place of five, but no
// atomic sums, so every run gives the same bits, and no f32 copy of dQ.
// Macros: KEY_WARPS, KEY_BLOCK_M (queries a step), QUERY_WARPS, QUERY_BLOCK_N (keys a step), both multiples of 16 with
//   KEY_BLOCK_M <= 16 KEY_WARPS; KEY_PASSES: 1, or 2 where dK and dV do not fit in registers together (HEAD_DIM 256).
// In this order:
// attention_delta: grid ⌈tokens HEADS / (256 / LANES)⌉, LANES = HEAD_DIM / 8 rounded up to a power of two; block 256.
// attention_backward_key_value: grid (⌈tokens / (16 KEY_WARPS)⌉, KV_HEADS, KEY_PASSES), block 32 KEY_WARPS, dynamic
//   shared memory (32 KEY_WARPS + 4 KEY_BLOCK_M) (2 HEAD_DIM + 16) + 16 KEY_BLOCK_M bytes.
// attention_backward_query: grid (⌈tokens / (16 QUERY_WARPS)⌉, HEADS), block 32 QUERY_WARPS, dynamic shared memory
//   (32 QUERY_WARPS + 4 QUERY_BLOCK_N) (2 HEAD_DIM + 16) bytes.

#ifdef WARPS
constexpr int BLOCK_M = 16 * ROW_TILES * WARPS;
constexpr int THREADS = 32 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(bf16* output, float* log_sum_exp, const bf16* qkv, const int* document_start, int tokens, const bf16* a,
                      i64 a_stride, float* partial) {
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

    if constexpr (MIDDLE_RANK > 0) {
        __syncthreads();
        copy_rows<MIDDLE_RANK, THREADS>(key_tile, a + head * HEAD_DIM, a_stride, 0, MIDDLE_RANK);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
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
        if constexpr (MIDDLE_RANK > 0)
            store_partial_middle<MIDDLE_RANK>(partial + (i64)head * tokens * MIDDLE_RANK, key_tile, first + tile_row, tokens,
                                              accumulator[tile], inverse[0], inverse[1]);
    }
}
#endif

#ifdef KEY_WARPS
constexpr int DELTA_LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;

extern "C" __global__ void __launch_bounds__(256)
    attention_delta(float* delta, const bf16* grad_output, const bf16* output, int tokens) {
    i64 pair = (i64)blockIdx.x * (256 / DELTA_LANES) + threadIdx.x / DELTA_LANES;
    int chunk = threadIdx.x % DELTA_LANES;
    float sum = 0.0f;
    if (pair < (i64)tokens * HEADS && chunk < HEAD_DIM / 8) {
        float a[8], b[8];
        load<8>(grad_output + pair * HEAD_DIM + chunk * 8, a);
        load<8>(output + pair / HEADS * OUTPUT_STRIDE + pair % HEADS * HEAD_DIM + chunk * 8, b);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    }
#pragma unroll
    for (int offset = DELTA_LANES / 2; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (chunk == 0 && pair < (i64)tokens * HEADS) delta[pair] = sum;
}

constexpr int KEY_BLOCK_N = 16 * KEY_WARPS;
constexpr int KEY_THREADS = 32 * KEY_WARPS;

// A warp holds 16 keys, and works on transposed scores [keys, queries]: P and dS come out of the multiplication in
// the registers where the next one takes its left side.
template <bool WITH_KEY, bool WITH_VALUE>
DEVICE void backward_key_value(bf16* grad_qkv, const bf16* grad_output, const bf16* qkv, const float* log_sum_exp,
                               const float* delta, const int* document_end, int tokens) {
    constexpr int STAGE_BYTES = 2 * KEY_BLOCK_M * ROW_BYTES;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int kv_head = blockIdx.y, first = blockIdx.x * KEY_BLOCK_N;
    int last = min(first + KEY_BLOCK_N, tokens) - 1;

    const bf16* key = qkv + (HEADS + kv_head) * HEAD_DIM;
    u32 key_tile = shared_address(shared);
    u32 value_tile = key_tile + KEY_BLOCK_N * ROW_BYTES;
    u32 stages = value_tile + KEY_BLOCK_N * ROW_BYTES;
    u32 statistics = stages + 2 * STAGE_BYTES;
    const float* statistics_pointer = (const float*)(shared + 2 * KEY_BLOCK_N * ROW_BYTES + 2 * STAGE_BYTES);

    int first_end = end_of_seers(document_end, first), last_end = end_of_seers(document_end, last);
    int first_block = first / KEY_BLOCK_M, blocks = (last_end + KEY_BLOCK_M - 1) / KEY_BLOCK_M - first_block;
    int steps = blocks * GROUP;

    auto copy_step = [&](int step) {
        int head = kv_head * GROUP + step / blocks, m0 = (first_block + step % blocks) * KEY_BLOCK_M;
        u32 stage = stages + (step & 1) * STAGE_BYTES;
        copy_rows<KEY_BLOCK_M, KEY_THREADS>(stage, qkv + head * HEAD_DIM, QKV_STRIDE, m0, tokens);
        copy_rows<KEY_BLOCK_M, KEY_THREADS>(stage + KEY_BLOCK_M * ROW_BYTES, grad_output + head * HEAD_DIM,
                                            GRAD_OUTPUT_STRIDE, m0, tokens);
        for (int i = threadIdx.x; i < 2 * KEY_BLOCK_M; i += KEY_THREADS) {
            int row = m0 + i % KEY_BLOCK_M;
            bool valid = row < tokens;
            const float* from = (i < KEY_BLOCK_M ? log_sum_exp : delta) + (valid ? (i64)row * HEADS + head : 0);
            copy_async_4(statistics + ((step & 1) * 2 * KEY_BLOCK_M + i) * 4, from, valid);
        }
        copy_async_commit();
    };

    copy_rows<KEY_BLOCK_N, KEY_THREADS>(key_tile, key, QKV_STRIDE, first, tokens);
    copy_rows<KEY_BLOCK_N, KEY_THREADS>(value_tile, key + KV_HEADS * HEAD_DIM, QKV_STRIDE, first, tokens);
    copy_step(0);

    int warp_row = warp * 16;
    int row_end[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
        row_end[half] = end_of_seers(document_end, min(first + warp_row + (lane >> 2) + half * 8, tokens - 1));

    constexpr int KEY_COLUMNS = WITH_KEY ? HEAD_DIM / 8 : 1, VALUE_COLUMNS = WITH_VALUE ? HEAD_DIM / 8 : 1;
    float grad_key[KEY_COLUMNS][4], grad_value[VALUE_COLUMNS][4];
#pragma unroll
    for (int j = 0; j < KEY_COLUMNS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) grad_key[j][i] = 0.0f;
#pragma unroll
    for (int j = 0; j < VALUE_COLUMNS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) grad_value[j][i] = 0.0f;

    for (int step = 0; step < steps; step++) {
        int m0 = (first_block + step % blocks) * KEY_BLOCK_M;
        u32 query_tile = stages + (step & 1) * STAGE_BYTES, grad_tile = query_tile + KEY_BLOCK_M * ROW_BYTES;
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) copy_step(step + 1);
        // All queries of the step may lie before the warp's keys (on the diagonal).
        if (m0 + KEY_BLOCK_M - 1 < first + warp_row) continue;

        float scores[KEY_BLOCK_M / 8][4], grad_scores[WITH_KEY ? KEY_BLOCK_M / 8 : 1][4];
#pragma unroll
        for (int j = 0; j < KEY_BLOCK_M / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[j][i] = 0.0f;
                if constexpr (WITH_KEY) grad_scores[j][i] = 0.0f;
            }
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a[4];
            load_a<ROW_BYTES>(a, key_tile + warp_row * ROW_BYTES + k * 32);
#pragma unroll
            for (int j = 0; j < KEY_BLOCK_M / 16; j++) {
                u32 b[4];
                load_b_from_n_rows<ROW_BYTES>(b, query_tile + j * 16 * ROW_BYTES + k * 32);
                multiply_16x8x16(scores[2 * j], a, b[0], b[1]);
                multiply_16x8x16(scores[2 * j + 1], a, b[2], b[3]);
            }
        }
        if constexpr (WITH_KEY) {
#pragma unroll
            for (int k = 0; k < HEAD_DIM / 16; k++) {
                u32 a[4];
                load_a<ROW_BYTES>(a, value_tile + warp_row * ROW_BYTES + k * 32);
#pragma unroll
                for (int j = 0; j < KEY_BLOCK_M / 16; j++) {
                    u32 b[4];
                    load_b_from_n_rows<ROW_BYTES>(b, grad_tile + j * 16 * ROW_BYTES + k * 32);
                    multiply_16x8x16(grad_scores[2 * j], a, b[0], b[1]);
                    multiply_16x8x16(grad_scores[2 * j + 1], a, b[2], b[3]);
                }
            }
        }

        bool masked = m0 < first + warp_row + 15 || m0 + KEY_BLOCK_M > first_end;
        const float* statistic = statistics_pointer + (step & 1) * 2 * KEY_BLOCK_M;
#pragma unroll
        for (int j = 0; j < KEY_BLOCK_M / 8; j++) {
            int column = j * 8 + (lane & 3) * 2;
            float2 sum = *(const float2*)(statistic + column);
            float2 centre = *(const float2*)(statistic + KEY_BLOCK_M + column);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float capped = cap_score(scores[j][i]);
                float p = exp2_fast(capped * EXPONENT_SCALE - ((i & 1) ? sum.y : sum.x) * LOG2_E);
                if (masked) {
                    int query = m0 + column + (i & 1), own = first + warp_row + (lane >> 2) + (i >> 1) * 8;
                    if (query < own || query >= row_end[i >> 1]) p = 0.0f;
                }
                scores[j][i] = p;
                if constexpr (WITH_KEY)
                    grad_scores[j][i] = p * (grad_scores[j][i] - ((i & 1) ? centre.y : centre.x)) * cap_slope(capped);
            }
        }
#pragma unroll
        for (int k = 0; k < KEY_BLOCK_M / 16; k++) {
            u32 p[4], s[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &scores[2 * k + (i >> 1)][2 * (i & 1)];
                if constexpr (WITH_VALUE) p[i] = pack_bf16(pair[0], pair[1]);
                if constexpr (WITH_KEY) {
                    const float* grad_pair = &grad_scores[2 * k + (i >> 1)][2 * (i & 1)];
                    s[i] = pack_bf16(grad_pair[0], grad_pair[1]);
                }
            }
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 16; j++) {
                u32 b[4];
                if constexpr (WITH_VALUE) {
                    load_b_from_k_rows<ROW_BYTES>(b, grad_tile + k * 16 * ROW_BYTES + j * 32);
                    multiply_16x8x16(grad_value[2 * j], p, b[0], b[1]);
                    multiply_16x8x16(grad_value[2 * j + 1], p, b[2], b[3]);
                }
                if constexpr (WITH_KEY) {
                    load_b_from_k_rows<ROW_BYTES>(b, query_tile + k * 16 * ROW_BYTES + j * 32);
                    multiply_16x8x16(grad_key[2 * j], s, b[0], b[1]);
                    multiply_16x8x16(grad_key[2 * j + 1], s, b[2], b[3]);
                }
            }
        }
    }

    // Each warp reads only its own rows of the key tile, so it may reuse them.
    unsigned char* staging = shared + warp_row * ROW_BYTES;
    bf16* grad_key_head = grad_qkv + (HEADS + kv_head) * HEAD_DIM;
    if constexpr (WITH_KEY)
        store_rows<HEAD_DIM>(grad_key_head, GRAD_QKV_STRIDE, first + warp_row, tokens, staging, grad_key, SCALE, SCALE);
    if constexpr (WITH_VALUE)
        store_rows<HEAD_DIM>(grad_key_head + KV_HEADS * HEAD_DIM, GRAD_QKV_STRIDE, first + warp_row, tokens, staging, grad_value, 1.0f,
                   1.0f);
}

extern "C" __global__ void __launch_bounds__(KEY_THREADS)
    attention_backward_key_value(bf16* grad_qkv, const bf16* grad_output, const bf16* qkv, const float* log_sum_exp,
                                 const float* delta, const int* document_end, int tokens) {
#if KEY_PASSES == 1
    backward_key_value<true, true>(grad_qkv, grad_output, qkv, log_sum_exp, delta, document_end, tokens);
#else
    if (blockIdx.z == 0)
        backward_key_value<true, false>(grad_qkv, grad_output, qkv, log_sum_exp, delta, document_end, tokens);
    else
        backward_key_value<false, true>(grad_qkv, grad_output, qkv, log_sum_exp, delta, document_end, tokens);
#endif
}

constexpr int QUERY_BLOCK_M = 16 * QUERY_WARPS;
constexpr int QUERY_THREADS = 32 * QUERY_WARPS;

extern "C" __global__ void __launch_bounds__(QUERY_THREADS)
    attention_backward_query(bf16* grad_qkv, const bf16* grad_output, const bf16* qkv, const float* log_sum_exp,
                             const float* delta, const int* document_start, int tokens) {
    constexpr int STAGE_BYTES = 2 * QUERY_BLOCK_N * ROW_BYTES;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int head = blockIdx.y, kv_head = head / GROUP;
    int first = (gridDim.x - 1 - blockIdx.x) * QUERY_BLOCK_M;
    int last = min(first + QUERY_BLOCK_M, tokens) - 1;

    const bf16* key = qkv + (HEADS + kv_head) * HEAD_DIM;
    u32 query_tile = shared_address(shared);
    u32 grad_tile = query_tile + QUERY_BLOCK_M * ROW_BYTES;
    u32 stages = grad_tile + QUERY_BLOCK_M * ROW_BYTES;

    int last_first_key = first_seen(document_start, last);
    int first_block = first_seen(document_start, first) / QUERY_BLOCK_N, blocks = last / QUERY_BLOCK_N + 1;

    auto copy_step = [&](int block) {
        u32 stage = stages + (block & 1) * STAGE_BYTES;
        copy_rows<QUERY_BLOCK_N, QUERY_THREADS>(stage, key, QKV_STRIDE, block * QUERY_BLOCK_N, tokens);
        copy_rows<QUERY_BLOCK_N, QUERY_THREADS>(stage + QUERY_BLOCK_N * ROW_BYTES, key + KV_HEADS * HEAD_DIM, QKV_STRIDE,
                                                block * QUERY_BLOCK_N, tokens);
        copy_async_commit();
    };
    copy_rows<QUERY_BLOCK_M, QUERY_THREADS>(query_tile, qkv + head * HEAD_DIM, QKV_STRIDE, first, tokens);
    copy_rows<QUERY_BLOCK_M, QUERY_THREADS>(grad_tile, grad_output + head * HEAD_DIM, GRAD_OUTPUT_STRIDE, first, tokens);
    copy_step(first_block);

    int warp_row = warp * 16;
    int row_first_key[2];
    float row_sum[2], centre[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = min(first + warp_row + (lane >> 2) + half * 8, tokens - 1);
        row_first_key[half] = first_seen(document_start, row);
        row_sum[half] = log_sum_exp[(i64)row * HEADS + head] * LOG2_E;
        centre[half] = delta[(i64)row * HEADS + head];
    }
    float grad_query[HEAD_DIM / 8][4];
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) grad_query[j][i] = 0.0f;

    for (int block = first_block; block < blocks; block++) {
        int n0 = block * QUERY_BLOCK_N;
        u32 key_tile = stages + (block & 1) * STAGE_BYTES, value_tile = key_tile + QUERY_BLOCK_N * ROW_BYTES;
        copy_async_wait<0>();
        __syncthreads();
        if (block + 1 < blocks) copy_step(block + 1);
        if (n0 > first + warp_row + 15) continue;

        float scores[QUERY_BLOCK_N / 8][4], grad_scores[QUERY_BLOCK_N / 8][4];
#pragma unroll
        for (int j = 0; j < QUERY_BLOCK_N / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[j][i] = 0.0f, grad_scores[j][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a[4], grad_a[4];
            load_a<ROW_BYTES>(a, query_tile + warp_row * ROW_BYTES + k * 32);
            load_a<ROW_BYTES>(grad_a, grad_tile + warp_row * ROW_BYTES + k * 32);
#pragma unroll
            for (int j = 0; j < QUERY_BLOCK_N / 16; j++) {
                u32 b[4];
                load_b_from_n_rows<ROW_BYTES>(b, key_tile + j * 16 * ROW_BYTES + k * 32);
                multiply_16x8x16(scores[2 * j], a, b[0], b[1]);
                multiply_16x8x16(scores[2 * j + 1], a, b[2], b[3]);
                load_b_from_n_rows<ROW_BYTES>(b, value_tile + j * 16 * ROW_BYTES + k * 32);
                multiply_16x8x16(grad_scores[2 * j], grad_a, b[0], b[1]);
                multiply_16x8x16(grad_scores[2 * j + 1], grad_a, b[2], b[3]);
            }
        }

        bool masked = n0 + QUERY_BLOCK_N - 1 > first + warp_row || n0 < last_first_key;
#pragma unroll
        for (int j = 0; j < QUERY_BLOCK_N / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float capped = cap_score(scores[j][i]);
                float p = exp2_fast(capped * EXPONENT_SCALE - row_sum[i >> 1]);
                if (masked) {
                    int column = n0 + j * 8 + (lane & 3) * 2 + (i & 1), row = first + warp_row + (lane >> 2) + (i >> 1) * 8;
                    if (column > row || column < row_first_key[i >> 1]) p = 0.0f;
                }
                scores[j][i] = p * (grad_scores[j][i] - centre[i >> 1]) * cap_slope(capped);
            }
#pragma unroll
        for (int k = 0; k < QUERY_BLOCK_N / 16; k++) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &scores[2 * k + (i >> 1)][2 * (i & 1)];
                a[i] = pack_bf16(pair[0], pair[1]);
            }
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 16; j++) {
                u32 b[4];
                load_b_from_k_rows<ROW_BYTES>(b, key_tile + k * 16 * ROW_BYTES + j * 32);
                multiply_16x8x16(grad_query[2 * j], a, b[0], b[1]);
                multiply_16x8x16(grad_query[2 * j + 1], a, b[2], b[3]);
            }
        }
    }

    store_rows<HEAD_DIM>(grad_qkv + head * HEAD_DIM, GRAD_QKV_STRIDE, first + warp_row, tokens, shared + warp_row * ROW_BYTES, grad_query,
               SCALE, SCALE);
}
#endif
