// Causal attention of packed documents for Hopper (sm_90a). With FORWARD: attention.cu's formulas with warpgroup matrix
// instructions and tensor copies, in the manner of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): one warp
// copies, two warpgroups of 64 queries each compute; the scores of the next keys are multiplied while the softmax of
// the last ones is taken, and the two warpgroups take turns at the tensor cores. HEAD_DIM 64 or 128.
//
// Source: prelude.cuh, tensor_core.cuh, hopper.cuh, attention_shape.cuh (its macros), attention_tiles.cuh, this file.
// attention_forward_hopper: grid min(multiprocessors, ⌈tokens / 128⌉ HEADS), block 384, dynamic shared memory
//   1280 HEAD_DIM + 20480 bytes, and with a branch 4 A_ROWS (2 HEAD_DIM + 16) more. `qkv_map` is a tensor map of qkv as a
//   matrix [tokens, columns] of bf16: dimensions
//   {columns, tokens}, row stride 2 columns bytes, box {64, 128}, 128-byte swizzle.
//   `section` (1 to HEADS): heads worked on together, so that their keys and values stay in the L2 cache.
//
// With BACKWARD: attention.cu's formulas of the backward pass and its two kernels (no atomic sums, the
// same bits on every run), with warpgroup matrix instructions and tensor copies. P and dS never leave registers: the
// kernel of keys and values works on transposed scores [keys, queries], so that both come out of one multiplication as
// the left side of the next. HEAD_DIM 64 or 128. attention_delta of attention.cu comes first.
// Tensor maps: {queries, keys and values: qkv [tokens, columns], grad_output [tokens, HEADS HEAD_DIM]} of bf16, 128-byte
//   swizzle, boxes of 64 columns by as many rows as the name says. `section`: heads (in the first kernel, kv heads) worked
//   on together, so that what they read stays in the L2 cache.
// attention_backward_key_value_hopper: grid min(multiprocessors, ⌈tokens / 128⌉ KV_HEADS), block 384, dynamic shared
//   memory 1536 HEAD_DIM + 24576 bytes.
// attention_backward_query_hopper: grid min(multiprocessors, ⌈tokens / 128⌉ HEADS), block 384, dynamic shared memory
//   1536 HEAD_DIM + 20480 bytes.

#ifdef FORWARD
constexpr int BLOCK_N = 128;
constexpr int STAGES = 2;
constexpr u32 QUERY_SLAB = TILE * 128, QUERY_BYTES = SLABS * QUERY_SLAB;
constexpr u32 KEY_SLAB = BLOCK_N * 128, KEY_BYTES = SLABS * KEY_SLAB;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward_hopper(bf16* output, float* log_sum_exp, const __grid_constant__ TensorMap qkv_map,
                             const int* document_start, int tokens, int section, const bf16* a, i64 a_stride,
                             float* partial) {
    u32 query_tile = aligned_shared(), key_tiles = query_tile + QUERY_BYTES;
    u32 value_tiles = key_tiles + STAGES * KEY_BYTES, staging = value_tiles + STAGES * KEY_BYTES;
    u32 query_full = staging + STAGING_BYTES, query_empty = query_full + 8;
    u32 key_full = query_empty + 8, key_empty = key_full + 8 * STAGES;
    u32 value_full = key_empty + 8 * STAGES, value_empty = value_full + 8 * STAGES;
    u32 tile_full = value_empty + 8 * STAGES, tile_empty = tile_full + 16;
    volatile int* tile_slots = (volatile int*)shared_pointer(tile_empty + 16);
    // A head's columns of a for each group, twice: a warp may be at the next tile while another multiplies by them.
    u32 a_tiles = (tile_empty + 24 + 15) & ~15u;

    int tiles = (tokens + TILE - 1) / TILE * HEADS;
    int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;

    if (threadIdx.x == 0) {
        barrier_init(query_full, 1);
        barrier_init(query_empty, WARPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(key_full + 8 * i, 1);
            barrier_init(key_empty + 8 * i, WARPS);
            barrier_init(value_full + 8 * i, 1);
            barrier_init(value_empty + 8 * i, WARPS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(tile_full + 8 * i, 1);
            barrier_init(tile_empty + 8 * i, WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        registers_give<40>();
        if (threadIdx.x != 0) return;
        int index = blockIdx.x;
        Ring<STAGES> stage;
        Ring<2> slot;
        for (u32 n = 0;; n++, slot.advance()) {
            barrier_wait(tile_empty + 8 * slot.place, slot.parity ^ 1);
            tile_slots[slot.place] = index;
            barrier_arrive(tile_full + 8 * slot.place);
            if (index >= tiles) break;
            int next = take_tile();

            Tile tile = tile_at<HEADS, true>(index, tokens, section);
            int key_column = (HEADS + tile.head / GROUP) * HEAD_DIM, value_column = key_column + KV_HEADS * HEAD_DIM;
            int lowest = first_seen(document_start, tile.first) / BLOCK_N;
            barrier_wait(query_empty, (n & 1) ^ 1);
            barrier_arrive_expect(query_full, QUERY_BYTES);
            copy_tile(query_tile, QUERY_SLAB, qkv_map, tile.head * HEAD_DIM, tile.first, query_full);
            for (int block = tile.last / BLOCK_N; block >= lowest; block--, stage.advance()) {
                u32 key = key_full + 8 * stage.place, value = value_full + 8 * stage.place;
                barrier_wait(key_empty + 8 * stage.place, stage.parity ^ 1);
                barrier_arrive_expect(key, KEY_BYTES);
                copy_tile(key_tiles + stage.place * KEY_BYTES, KEY_SLAB, qkv_map, key_column, block * BLOCK_N, key);
                barrier_wait(value_empty + 8 * stage.place, stage.parity ^ 1);
                barrier_arrive_expect(value, KEY_BYTES);
                copy_tile(value_tiles + stage.place * KEY_BYTES, KEY_SLAB, qkv_map, value_column, block * BLOCK_N, value);
            }
            index = next;
        }
        finish_tiles();
        return;
    }

    registers_take<232>();
    int group = warp / 4 - 1, group_row = group * 64, warp_row = (warp - 4) * 16;
    unsigned char* warp_staging = shared_pointer(staging + (warp - 4) * STAGING_WARP);
    u64 query_descriptor = descriptor_k_columns(query_tile + group_row * 128);
    u64 key_descriptor = descriptor_k_columns(key_tiles);
    u64 value_descriptor = descriptor_k_rows(value_tiles, KEY_SLAB);

    float scores[BLOCK_N / 8][4], accumulator[HEAD_DIM / 8][4];
    u32 probabilities[BLOCK_N / 16][4];
    Ring<STAGES> stage;
    Ring<2> slot;
    // Group 0 goes first.
    if (group == 1) named_barrier_arrive(1, 256);

    auto multiply_keys = [&](u32 stage) {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma(scores, query_descriptor + slab * (QUERY_SLAB / 16) + k * 2,
                      key_descriptor + stage * (KEY_BYTES / 16) + slab * (KEY_SLAB / 16) + k * 2, slab + k > 0);
        wgmma_commit();
    };
    auto multiply_values = [&](u32 stage, bool add) {
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++)
            wgmma(accumulator, probabilities[k], value_descriptor + stage * (KEY_BYTES / 16) + k * 128, k > 0 || add);
        wgmma_commit();
    };
    auto pack_probabilities = [&]() {
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                probabilities[k][i] = pack_bf16(scores[2 * k + (i >> 1)][2 * (i & 1)], scores[2 * k + (i >> 1)][2 * (i & 1) + 1]);
    };

    for (u32 n = 0;; n++, slot.advance()) {
        barrier_wait(tile_full + 8 * slot.place, slot.parity);
        int index = tile_slots[slot.place];
        __syncwarp();
        if (lane == 0) barrier_arrive(tile_empty + 8 * slot.place);
        if (index >= tiles) break;

        Tile tile = tile_at<HEADS, true>(index, tokens, section);
        u32 a_tile = a_tiles + (2 * group + (n & 1)) * A_ROWS * ROW_BYTES;
        if constexpr (MIDDLE_RANK > 0) {
            for (int i = threadIdx.x & 127; i < MIDDLE_RANK * (HEAD_DIM / 8); i += 128) {
                int r = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
                copy_async_16(a_tile + r * ROW_BYTES + chunk * 16, a + r * a_stride + tile.head * HEAD_DIM + chunk * 8, true);
            }
            copy_async_commit();
        }
        int row = tile.first + warp_row + (lane >> 2);
        int row_first_key[2] = {first_seen(document_start, min(row, tokens - 1)),
                                first_seen(document_start, min(row + 8, tokens - 1))};
        int last_first_key = first_seen(document_start, tile.last);
        int lowest = first_seen(document_start, tile.first) / BLOCK_N, block = tile.last / BLOCK_N;
        float row_max[2] = {-INFINITY_F, -INFINITY_F}, row_sum[2] = {0.0f, 0.0f}, correction[2];

        auto softmax = [&]() {
            int n0 = block * BLOCK_N;
            if constexpr (HAS_SOFTCAP) {
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) scores[j][i] = cap_score(scores[j][i]);
            }
            if (n0 + BLOCK_N - 1 > tile.first + group_row || n0 < last_first_key) {
                int column = n0 + (lane & 3) * 2;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int most = row + 8 * half - column, least = row_first_key[half] - column;
#pragma unroll
                    for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if (j * 8 + i > most || j * 8 + i < least) scores[j][2 * half + i] = -INFINITY_F;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float maximum = row_max[half];
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
                    maximum = fmaxf(maximum, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
                float exponent = maximum == -INFINITY_F ? 0.0f : maximum * EXPONENT_SCALE;
                correction[half] = exp2_fast(row_max[half] * EXPONENT_SCALE - exponent);
                row_max[half] = maximum;
                float sum = row_sum[half] * correction[half];
#pragma unroll
                for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        scores[j][i] = exp2_fast(scores[j][i] * EXPONENT_SCALE - exponent);
                        sum += scores[j][i];
                    }
                row_sum[half] = sum;
            }
        };

        barrier_wait(query_full, n & 1);
        barrier_wait(key_full + 8 * stage.place, stage.parity);
        wgmma_fence();
        multiply_keys(stage.place);
        wgmma_wait<0>();
        keep(scores);
        if (lane == 0) barrier_arrive(key_empty + 8 * stage.place);
        softmax();
        pack_probabilities();

        bool add = false;
        for (block--; block >= lowest; block--) {
            // Scores of these keys beside values of the last ones.
            Ring<STAGES> previous = stage;
            stage.advance();
            barrier_wait(key_full + 8 * stage.place, stage.parity);
            named_barrier_wait(1 + group, 256);
            wgmma_fence();
            multiply_keys(stage.place);
            barrier_wait(value_full + 8 * previous.place, previous.parity);
            wgmma_fence();
            multiply_values(previous.place, add);
            named_barrier_arrive(2 - group, 256);
            wgmma_wait<1>();
            keep(scores);
            if (lane == 0) barrier_arrive(key_empty + 8 * stage.place);
            softmax();
            pin(row_sum[0] + row_sum[1], staging);
            wgmma_wait<0>();
            keep(accumulator);
            if (lane == 0) barrier_arrive(value_empty + 8 * previous.place);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) accumulator[j][i] *= correction[i >> 1];
            pack_probabilities();
            add = true;
        }
        if (lane == 0) barrier_arrive(query_empty);

        barrier_wait(value_full + 8 * stage.place, stage.parity);
        wgmma_fence();
        multiply_values(stage.place, add);
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = row_sum[half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[half] = 1.0f / sum;
            if ((lane & 3) == 0 && row + 8 * half < tokens)
                log_sum_exp[(i64)(row + 8 * half) * HEADS + tile.head] =
                    (row_max[half] * EXPONENT_SCALE + log2_fast(sum)) * LN_2;
        }
        wgmma_wait<0>();
        keep(accumulator);
        if (lane == 0) barrier_arrive(value_empty + 8 * stage.place);
        stage.advance();
        store_rows<PIECE>(output + tile.head * HEAD_DIM, OUTPUT_STRIDE, tile.first + warp_row, tokens, warp_staging, accumulator,
                   inverse[0], inverse[1]);
        if constexpr (MIDDLE_RANK > 0) {
            copy_async_wait<0>();
            named_barrier_wait(3 + group, 128);
            store_partial_middle<MIDDLE_RANK>(partial + (i64)tile.head * tokens * MIDDLE_RANK, a_tile, tile.first + warp_row, tokens,
                                              accumulator, inverse[0], inverse[1]);
        }
    }
}
#endif

#ifdef BACKWARD
constexpr u32 TILE_SLAB = TILE * 128, TILE_BYTES = SLABS * TILE_SLAB;

// Queries a step of the kernel of keys and values.
constexpr int BLOCK_M = 64;
constexpr int STEP_STAGES = 4;
constexpr u32 STEP_SLAB = BLOCK_M * 128, STEP_BYTES = SLABS * STEP_SLAB;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_key_value_hopper(bf16* grad_qkv, const __grid_constant__ TensorMap qkv_128,
                                        const __grid_constant__ TensorMap qkv_64,
                                        const __grid_constant__ TensorMap grad_output_64, const float* log_sum_exp,
                                        const float* delta, const int* document_end, int tokens, int section) {
    u32 key_tile = aligned_shared(), value_tile = key_tile + TILE_BYTES;
    u32 query_stages = value_tile + TILE_BYTES, grad_stages = query_stages + STEP_STAGES * STEP_BYTES;
    u32 staging = grad_stages + STEP_STAGES * STEP_BYTES;
    u32 statistics = staging + STAGING_BYTES;
    u32 tile_loaded = statistics + STEP_STAGES * 2 * BLOCK_M * 4, tile_used = tile_loaded + 8;
    u32 step_full = tile_used + 8, step_empty = step_full + 8 * STEP_STAGES;
    u32 tile_full = step_empty + 8 * STEP_STAGES, tile_empty = tile_full + 16;
    volatile int* tile_slots = (volatile int*)shared_pointer(tile_empty + 16);
    float* statistic = (float*)shared_pointer(statistics);

    int tiles = (tokens + TILE - 1) / TILE * KV_HEADS;
    int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;

    if (threadIdx.x == 0) {
        barrier_init(tile_loaded, 1);
        barrier_init(tile_used, WARPS);
        for (int i = 0; i < STEP_STAGES; i++) {
            // The copy and the 32 threads that bring log_sum_exp and delta.
            barrier_init(step_full + 8 * i, 33);
            // Every lane, for every lane reads the step's statistics.
            barrier_init(step_empty + 8 * i, 32 * WARPS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(tile_full + 8 * i, 1);
            barrier_init(tile_empty + 8 * i, WARPS + 1);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        registers_give<24>();
        if (warp > 1 || (warp == 0 && lane != 0)) return;
        int index = blockIdx.x, next = 0;
        Ring<STEP_STAGES> stage;
        Ring<2> slot;
        for (u32 n = 0;; n++, slot.advance()) {
            if (warp == 0) {
                barrier_wait(tile_empty + 8 * slot.place, slot.parity ^ 1);
                tile_slots[slot.place] = index;
                barrier_arrive(tile_full + 8 * slot.place);
                if (index >= tiles) break;
                next = take_tile();
            } else {
                barrier_wait(tile_full + 8 * slot.place, slot.parity);
                index = tile_slots[slot.place];
                __syncwarp();
                if (lane == 0) barrier_arrive(tile_empty + 8 * slot.place);
                if (index >= tiles) break;
            }
            Tile tile = tile_at<KV_HEADS, false>(index, tokens, section);
            int first_block = tile.first / BLOCK_M;
            int blocks = (end_of_seers(document_end, tile.last) + BLOCK_M - 1) / BLOCK_M;

            if (warp == 0) {
                int key_column = (HEADS + tile.head) * HEAD_DIM;
                barrier_wait(tile_used, (n & 1) ^ 1);
                barrier_arrive_expect(tile_loaded, 2 * TILE_BYTES);
                copy_tile(key_tile, TILE_SLAB, qkv_128, key_column, tile.first, tile_loaded);
                copy_tile(value_tile, TILE_SLAB, qkv_128, key_column + KV_HEADS * HEAD_DIM, tile.first, tile_loaded);
            }
            for (int head = tile.head * GROUP; head < (tile.head + 1) * GROUP; head++)
                for (int block = first_block; block < blocks; block++, stage.advance()) {
                    u32 full = step_full + 8 * stage.place, empty = step_empty + 8 * stage.place;
                    int m0 = block * BLOCK_M;
                    if (warp == 0) {
                        barrier_wait(empty, stage.parity ^ 1);
                        barrier_arrive_expect(full, 2 * STEP_BYTES);
                        copy_tile(query_stages + stage.place * STEP_BYTES, STEP_SLAB, qkv_64, head * HEAD_DIM, m0, full);
                        copy_tile(grad_stages + stage.place * STEP_BYTES, STEP_SLAB, grad_output_64, head * HEAD_DIM, m0, full);
                    } else {
                        float values[4];
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            i64 at = (i64)min(m0 + half * 32 + lane, tokens - 1) * HEADS + head;
                            values[half] = log_sum_exp[at] * LOG2_E;
                            values[2 + half] = delta[at];
                        }
                        barrier_wait(empty, stage.parity ^ 1);
#pragma unroll
                        for (int i = 0; i < 4; i++) statistic[stage.place * 2 * BLOCK_M + i * 32 + lane] = values[i];
                        barrier_arrive(full);
                    }
                }
            if (warp == 0) index = next;
        }
        if (warp == 0) finish_tiles();
        return;
    }

    registers_take<240>();
    int group_row = (warp / 4 - 1) * 64, warp_row = (warp - 4) * 16;
    unsigned char* warp_staging = shared_pointer(staging + (warp - 4) * STAGING_WARP);
    u64 key_descriptor = descriptor_k_columns(key_tile + group_row * 128);
    u64 value_descriptor = descriptor_k_columns(value_tile + group_row * 128);
    u64 query_columns = descriptor_k_columns(query_stages), query_rows = descriptor_k_rows(query_stages, STEP_SLAB);
    u64 grad_columns = descriptor_k_columns(grad_stages), grad_rows = descriptor_k_rows(grad_stages, STEP_SLAB);

    float grad_key[HEAD_DIM / 8][4], grad_value[HEAD_DIM / 8][4];
    float scores[BLOCK_M / 8][4], grad_scores[BLOCK_M / 8][4];
    u32 left[BLOCK_M / 16][4], grad_left[BLOCK_M / 16][4];
    Ring<STEP_STAGES> stage;
    Ring<2> slot;
    for (u32 n = 0;; n++, slot.advance()) {
        barrier_wait(tile_full + 8 * slot.place, slot.parity);
        int index = tile_slots[slot.place];
        __syncwarp();
        if (lane == 0) barrier_arrive(tile_empty + 8 * slot.place);
        if (index >= tiles) break;

        Tile tile = tile_at<KV_HEADS, false>(index, tokens, section);
        int row = tile.first + warp_row + (lane >> 2);
        int row_end[2] = {end_of_seers(document_end, min(row, tokens - 1)),
                          end_of_seers(document_end, min(row + 8, tokens - 1))};
        int first_end = end_of_seers(document_end, tile.first);
        int first_block = tile.first / BLOCK_M;
        int blocks = (end_of_seers(document_end, tile.last) + BLOCK_M - 1) / BLOCK_M;
        int steps = (blocks - first_block) * GROUP;

        barrier_wait(tile_loaded, n & 1);
        bool add = false;
        u32 previous = 0;
        for (int step = 0, block = first_block; step < steps; step++, stage.advance()) {
            int m0 = block * BLOCK_M;
            if (++block == blocks) block = first_block;
            barrier_wait(step_full + 8 * stage.place, stage.parity);
            // All queries of the step may lie before the group's keys (on the diagonal).
            if (m0 + BLOCK_M <= tile.first + group_row) {
                barrier_arrive(step_empty + 8 * stage.place);
                continue;
            }
            u32 offset = stage.place * (STEP_BYTES / 16);

            wgmma_fence();
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    wgmma(scores, key_descriptor + slab * (TILE_SLAB / 16) + k * 2,
                          query_columns + offset + slab * (STEP_SLAB / 16) + k * 2, slab + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (add) barrier_arrive(step_empty + 8 * previous);
            previous = stage.place;
            wgmma_fence();
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    wgmma(grad_scores, value_descriptor + slab * (TILE_SLAB / 16) + k * 2,
                          grad_columns + offset + slab * (STEP_SLAB / 16) + k * 2, slab + k > 0);
            wgmma_commit();

            wgmma_wait<1>();
            keep(scores);
            float slopes[HAS_SOFTCAP ? BLOCK_M / 8 : 1][4];
            const float* sums = statistic + stage.place * 2 * BLOCK_M + (lane & 3) * 2;
#pragma unroll
            for (int j = 0; j < BLOCK_M / 8; j++) {
                float2 sum = *(const float2*)(sums + j * 8);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float capped = cap_score(scores[j][i]);
                    if constexpr (HAS_SOFTCAP) slopes[j][i] = cap_slope(capped);
                    scores[j][i] = exp2_fast(capped * EXPONENT_SCALE - ((i & 1) ? sum.y : sum.x));
                }
            }
            if (m0 < tile.first + group_row + 63 || m0 + BLOCK_M > first_end) {
                int column = m0 + (lane & 3) * 2;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int least = row + 8 * half - column, end = row_end[half] - column;
#pragma unroll
                    for (int j = 0; j < BLOCK_M / 8; j++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if (j * 8 + i < least || j * 8 + i >= end) scores[j][2 * half + i] = 0.0f;
                }
            }
#pragma unroll
            for (int k = 0; k < BLOCK_M / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&pair)[4] = scores[2 * k + (i >> 1)];
                    left[k][i] = pack_bf16(pair[2 * (i & 1)], pair[2 * (i & 1) + 1]);
                }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_M / 16; k++)
                wgmma(grad_value, left[k], grad_rows + offset + k * 128, k > 0 || add);
            wgmma_commit();

            wgmma_wait<1>();
            keep(grad_scores);
#pragma unroll
            for (int j = 0; j < BLOCK_M / 8; j++) {
                float2 centre = *(const float2*)(sums + BLOCK_M + j * 8);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float g = scores[j][i] * (grad_scores[j][i] - ((i & 1) ? centre.y : centre.x));
                    grad_scores[j][i] = HAS_SOFTCAP ? g * slopes[HAS_SOFTCAP ? j : 0][i] : g;
                }
            }
#pragma unroll
            for (int k = 0; k < BLOCK_M / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&pair)[4] = grad_scores[2 * k + (i >> 1)];
                    grad_left[k][i] = pack_bf16(pair[2 * (i & 1)], pair[2 * (i & 1) + 1]);
                }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_M / 16; k++)
                wgmma(grad_key, grad_left[k], query_rows + offset + k * 128, k > 0 || add);
            wgmma_commit();
            add = true;
        }
        wgmma_wait<0>();
        keep(grad_value);
        keep(grad_key);
        if (add) barrier_arrive(step_empty + 8 * previous);
        if (lane == 0) barrier_arrive(tile_used);
        bf16* head = grad_qkv + (HEADS + tile.head) * HEAD_DIM;
        store_rows<PIECE>(head, GRAD_QKV_STRIDE, tile.first + warp_row, tokens, warp_staging, grad_key, SCALE, SCALE);
        store_rows<PIECE>(head + KV_HEADS * HEAD_DIM, GRAD_QKV_STRIDE, tile.first + warp_row, tokens, warp_staging, grad_value,
                          1.0f, 1.0f);
    }
}

// Keys a step of the kernel of queries.
constexpr int BLOCK_N = 128;
constexpr int STAGES = 2;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_query_hopper(bf16* grad_qkv, const __grid_constant__ TensorMap qkv_128,
                                    const __grid_constant__ TensorMap grad_output_128, const float* log_sum_exp,
                                    const float* delta, const int* document_start, int tokens, int section) {
    u32 query_tile = aligned_shared(), grad_tile = query_tile + TILE_BYTES;
    u32 key_tiles = grad_tile + TILE_BYTES, value_tiles = key_tiles + STAGES * TILE_BYTES;
    u32 staging = value_tiles + STAGES * TILE_BYTES;
    u32 query_full = staging + STAGING_BYTES, query_empty = query_full + 8;
    u32 key_full = query_empty + 8, key_empty = key_full + 8 * STAGES;
    u32 value_full = key_empty + 8 * STAGES, value_empty = value_full + 8 * STAGES;
    u32 tile_full = value_empty + 8 * STAGES, tile_empty = tile_full + 16;
    volatile int* tile_slots = (volatile int*)shared_pointer(tile_empty + 16);

    int tiles = (tokens + TILE - 1) / TILE * HEADS;
    int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;

    if (threadIdx.x == 0) {
        barrier_init(query_full, 1);
        barrier_init(query_empty, WARPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(key_full + 8 * i, 1);
            barrier_init(key_empty + 8 * i, WARPS);
            barrier_init(value_full + 8 * i, 1);
            barrier_init(value_empty + 8 * i, WARPS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(tile_full + 8 * i, 1);
            barrier_init(tile_empty + 8 * i, WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warp < 4) {
        registers_give<40>();
        if (threadIdx.x != 0) return;
        int index = blockIdx.x;
        Ring<STAGES> stage;
        Ring<2> slot;
        for (u32 n = 0;; n++, slot.advance()) {
            barrier_wait(tile_empty + 8 * slot.place, slot.parity ^ 1);
            tile_slots[slot.place] = index;
            barrier_arrive(tile_full + 8 * slot.place);
            if (index >= tiles) break;
            int next = take_tile();

            Tile tile = tile_at<HEADS, true>(index, tokens, section);
            int key_column = (HEADS + tile.head / GROUP) * HEAD_DIM, value_column = key_column + KV_HEADS * HEAD_DIM;
            int lowest = first_seen(document_start, tile.first) / BLOCK_N;
            barrier_wait(query_empty, (n & 1) ^ 1);
            barrier_arrive_expect(query_full, 2 * TILE_BYTES);
            copy_tile(query_tile, TILE_SLAB, qkv_128, tile.head * HEAD_DIM, tile.first, query_full);
            copy_tile(grad_tile, TILE_SLAB, grad_output_128, tile.head * HEAD_DIM, tile.first, query_full);
            for (int block = tile.last / BLOCK_N; block >= lowest; block--, stage.advance()) {
                u32 key = key_full + 8 * stage.place, value = value_full + 8 * stage.place;
                barrier_wait(key_empty + 8 * stage.place, stage.parity ^ 1);
                barrier_arrive_expect(key, TILE_BYTES);
                copy_tile(key_tiles + stage.place * TILE_BYTES, TILE_SLAB, qkv_128, key_column, block * BLOCK_N, key);
                barrier_wait(value_empty + 8 * stage.place, stage.parity ^ 1);
                barrier_arrive_expect(value, TILE_BYTES);
                copy_tile(value_tiles + stage.place * TILE_BYTES, TILE_SLAB, qkv_128, value_column, block * BLOCK_N, value);
            }
            index = next;
        }
        finish_tiles();
        return;
    }

    registers_take<232>();
    int group_row = (warp / 4 - 1) * 64, warp_row = (warp - 4) * 16;
    unsigned char* warp_staging = shared_pointer(staging + (warp - 4) * STAGING_WARP);
    u64 query_descriptor = descriptor_k_columns(query_tile + group_row * 128);
    u64 grad_descriptor = descriptor_k_columns(grad_tile + group_row * 128);
    u64 key_columns = descriptor_k_columns(key_tiles), key_rows = descriptor_k_rows(key_tiles, TILE_SLAB);
    u64 value_columns = descriptor_k_columns(value_tiles);

    float scores[BLOCK_N / 8][4], grad_scores[BLOCK_N / 8][4], grad_query[HEAD_DIM / 8][4];
    u32 left[BLOCK_N / 16][4];
    Ring<STAGES> stage;
    Ring<2> slot;
    for (u32 n = 0;; n++, slot.advance()) {
        barrier_wait(tile_full + 8 * slot.place, slot.parity);
        int index = tile_slots[slot.place];
        __syncwarp();
        if (lane == 0) barrier_arrive(tile_empty + 8 * slot.place);
        if (index >= tiles) break;

        Tile tile = tile_at<HEADS, true>(index, tokens, section);
        int row = tile.first + warp_row + (lane >> 2);
        int row_first_key[2];
        float row_sum[2], centre[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int within = min(row + 8 * half, tokens - 1);
            row_first_key[half] = first_seen(document_start, within);
            row_sum[half] = log_sum_exp[(i64)within * HEADS + tile.head] * LOG2_E;
            centre[half] = delta[(i64)within * HEADS + tile.head];
        }
        int last_first_key = first_seen(document_start, tile.last);
        int lowest = first_seen(document_start, tile.first) / BLOCK_N;

        barrier_wait(query_full, n & 1);
        bool add = false;
        u32 previous = 0;
        for (int block = tile.last / BLOCK_N; block >= lowest; block--, stage.advance()) {
            int n0 = block * BLOCK_N;
            u32 offset = stage.place * (TILE_BYTES / 16);
            barrier_wait(key_full + 8 * stage.place, stage.parity);
            wgmma_fence();
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    wgmma(scores, query_descriptor + slab * (TILE_SLAB / 16) + k * 2,
                          key_columns + offset + slab * (TILE_SLAB / 16) + k * 2, slab + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (add && lane == 0) barrier_arrive(key_empty + 8 * previous);
            previous = stage.place;
            barrier_wait(value_full + 8 * stage.place, stage.parity);
            wgmma_fence();
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    wgmma(grad_scores, grad_descriptor + slab * (TILE_SLAB / 16) + k * 2,
                          value_columns + offset + slab * (TILE_SLAB / 16) + k * 2, slab + k > 0);
            wgmma_commit();

            wgmma_wait<1>();
            keep(scores);
            float slopes[HAS_SOFTCAP ? BLOCK_N / 8 : 1][4];
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float capped = cap_score(scores[j][i]);
                    if constexpr (HAS_SOFTCAP) slopes[j][i] = cap_slope(capped);
                    scores[j][i] = exp2_fast(capped * EXPONENT_SCALE - row_sum[i >> 1]);
                }
            if (n0 + BLOCK_N - 1 > tile.first + group_row || n0 < last_first_key) {
                int column = n0 + (lane & 3) * 2;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int most = row + 8 * half - column, least = row_first_key[half] - column;
#pragma unroll
                    for (int j = 0; j < BLOCK_N / 8; j++)
#pragma unroll
                        for (int i = 0; i < 2; i++)
                            if (j * 8 + i > most || j * 8 + i < least) scores[j][2 * half + i] = 0.0f;
                }
            }
            pin(scores, staging);
            wgmma_wait<0>();
            keep(grad_scores);
            if (lane == 0) barrier_arrive(value_empty + 8 * stage.place);
#pragma unroll
            for (int k = 0; k < BLOCK_N / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float pair[2];
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        int j = 2 * k + (i >> 1), e = 2 * (i & 1) + c;
                        pair[c] = scores[j][e] * (grad_scores[j][e] - centre[i & 1]);
                        if constexpr (HAS_SOFTCAP) pair[c] *= slopes[j][e];
                    }
                    left[k][i] = pack_bf16(pair[0], pair[1]);
                }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCK_N / 16; k++) wgmma(grad_query, left[k], key_rows + offset + k * 128, k > 0 || add);
            wgmma_commit();
            add = true;
        }
        if (lane == 0) barrier_arrive(query_empty);
        wgmma_wait<0>();
        keep(grad_query);
        if (lane == 0) barrier_arrive(key_empty + 8 * previous);
        store_rows<PIECE>(grad_qkv + tile.head * HEAD_DIM, GRAD_QKV_STRIDE, tile.first + warp_row, tokens, warp_staging, grad_query,
                          SCALE, SCALE);
    }
}
#endif
