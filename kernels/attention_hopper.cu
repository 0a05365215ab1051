// Causal attention of packed documents, forward, for Hopper (sm_90a): attention.cu's formulas with warpgroup matrix
// instructions and tensor copies, in the manner of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): one warp
// copies, two warpgroups of 64 queries each compute; the scores of the next keys are multiplied while the softmax of
// the last ones is taken, and the two warpgroups take turns at the tensor cores. HEAD_DIM 64 or 128.
//
// Source: prelude.cuh, tensor_core.cuh, hopper.cuh, attention_shape.cuh (its macros), attention_tiles.cuh, this file.
// attention_forward_hopper: grid min(multiprocessors, ⌈tokens / 128⌉ HEADS), block 384, dynamic shared memory
//   1280 HEAD_DIM + 20480 bytes. `qkv_map` is a tensor map of qkv as a matrix [tokens, columns] of bf16: dimensions
//   {columns, tokens}, row stride 2 columns bytes, box {64, 128}, 128-byte swizzle.
//   `section` (1 to HEADS): heads worked on together, so that their keys and values stay in the L2 cache.

constexpr int BLOCK_N = 128;
constexpr int STAGES = 2;
constexpr u32 QUERY_SLAB = TILE * 128, QUERY_BYTES = SLABS * QUERY_SLAB;
constexpr u32 KEY_SLAB = BLOCK_N * 128, KEY_BYTES = SLABS * KEY_SLAB;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward_hopper(bf16* output, float* log_sum_exp, const __grid_constant__ TensorMap qkv_map,
                             const int* document_start, int tokens, int section) {
    u32 query_tile = aligned_shared(), key_tiles = query_tile + QUERY_BYTES;
    u32 value_tiles = key_tiles + STAGES * KEY_BYTES, staging = value_tiles + STAGES * KEY_BYTES;
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
    }
}
