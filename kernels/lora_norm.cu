// RMSNorm (rms_norm.cu) together with what LoRA branches sum over rows that it makes or reads, for cards whose blocks work in
// clusters (sm_90 and newer). SLICES blocks of a cluster share rows of COLUMNS = SLICES WIDTH: what a row's statistics need goes
// from block to block through their shared memory, and each reads its columns of memory once.
//
// FORWARD: x = input + residual, r = 1 / sqrt(mean(x^2) + epsilon), output = x r (offset + weight), and the middles of the
//   branches that read the output: output a^T = r (x (a (offset + weight))^T)  [tokens, READERS], their ranks beside each other.
// BACKWARD: d = grad_output (offset + weight), n = x r, grad_input = residual_grad + r (d - n mean(d n)), and
//   for the branch below, of whose output this is the gradient (RANK, 0 for none):
//     g = s grad_input b  [tokens, rank],   grad_b += s grad_input^T middle  [columns, rank];
//   for the branches that read the norm (READERS, 0 for none), whose g is given:
//     grad_a += g^T output = ((r g)^T x) (offset + weight)  [ranks, columns], which needs no output.
//
// So what is summed over the norm is multiplied while its rows' statistics are on their way. Factors are rounded to bf16 as the
// output would be. Partial sums over rows are added in order by lora_add_up (lora.cu), those of a row in the order of slices:
// the same bits on every run.
//
// Grid: (SLICES, clusters). Macros: those of lora_rows.cuh, SLICES, READERS and RANK (multiples of 16), WEIGHT (bf16 or float), FORWARD or BACKWARD.

extern __shared__ __align__(128) u8 shared[];

constexpr int COLUMNS = SLICES * WIDTH;
// Rows of a tile that a block adds up the slices' sums of.
constexpr int FINISHED_ROWS = (ROWS + SLICES - 1) / SLICES;
constexpr int STATISTICS = SLICES * ROWS;
// For every warp, and for the sums; twice, for a block may be a tile ahead of another.
constexpr int BARRIERS = 2 * (WARPS + 1);

DEVICE u32 of_peer(u32 address, int peer) {
    u32 result;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(peer));
    return result;
}

// Stores at a block of the cluster, whose barrier counts the bytes.
DEVICE void send(u32 address, float x, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address), "r"(__float_as_int(x)), "r"(barrier)
                 : "memory");
}

DEVICE void send(u32 address, float4 x, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address), "r"(__float_as_int(x.x)),
                 "r"(__float_as_int(x.y)), "r"(__float_as_int(x.z)), "r"(__float_as_int(x.w)), "r"(barrier)
                 : "memory");
}

// Waits for what blocks of the cluster send before the phase of this parity completes.
DEVICE void await(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// After this every block of the cluster may send to every other.
DEVICE void begin(u32 barriers) {
    if (threadIdx.x < BARRIERS) barrier_init(barriers + 8 * threadIdx.x, 1);
    barrier_init_fence();
    cluster_barrier();
}

// A warp's sums of its rows over a slice go to the same warp of every block. Statistics: [SLICES][ROWS].
DEVICE void send_statistics(u32 statistics, u32 barrier, const float (&x)[OWN_ROWS]) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (lane == 0) barrier_arrive_expect(barrier, SLICES * OWN_ROWS * 4);
    if (lane < SLICES) {
        u32 at = of_peer(statistics + (blockIdx.x * ROWS + warp * OWN_ROWS) * 4, lane), peer_barrier = of_peer(barrier, lane);
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) send(at + r * 4, x[r], peer_barrier);
    }
}

DEVICE float whole_statistic(const float* statistics, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++) sum += statistics[slice * ROWS + row];
    return sum;
}

// Sums of this slice for rows and ranks go to the block that adds those of all slices up: [SLICES][FINISHED_ROWS][RANKS] there.
template <int RANKS>
DEVICE void send_sums(u32 sums, u32 barrier, const float* shares) {
    constexpr int QUADS = RANKS / 4;
    int own = (ROWS - (int)blockIdx.x + SLICES - 1) / SLICES;
    if (threadIdx.x == 0) barrier_arrive_expect(barrier, SLICES * own * RANKS * 4);
    for (int i = threadIdx.x; i < ROWS * QUADS; i += THREADS) {
        int row = i / QUADS, peer = row % SLICES;
        u32 at = sums + ((blockIdx.x * FINISHED_ROWS + row / SLICES) * RANKS + i % QUADS * 4) * 4;
        float4 sum = sum_of((const float4*)shares + i, ROWS * QUADS, SHARES);
        send(of_peer(at, peer), sum, of_peer(barrier, peer));
    }
}

// `take(row, r, sum, next)` for each two neighbouring sums of all slices that are this block's.
template <int RANKS, class Take>
DEVICE void finish_sums(const float* sums, Take take) {
    for (int i = threadIdx.x; i < FINISHED_ROWS * (RANKS / 2); i += THREADS) {
        int row = i / (RANKS / 2) * SLICES + blockIdx.x;
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            float2 x = ((const float2*)sums)[slice * FINISHED_ROWS * (RANKS / 2) + i];
            sum.x += x.x, sum.y += x.y;
        }
        if (row < ROWS) take(row, i % (RANKS / 2) * 2, sum);
    }
}

DEVICE void unpack(const uint4& from, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = low_bf16(word(from, i)), x[2 * i + 1] = high_bf16(word(from, i));
}

DEVICE uint4 pack(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

#ifdef FORWARD
struct Reader {
    const bf16* a;  // [rank, COLUMNS]
    bf16* middle;
    i64 middle_stride;
    int first;  // of all ranks
    int rank;
};

struct Readers {
    Reader of[4];
};

// Dynamic shared memory: tiles of input and residual, twice; shares; statistics and sums, twice; 1 / rms, twice; barriers.
extern "C" __global__ void __cluster_dims__(SLICES, 1, 1) __launch_bounds__(THREADS, 512 / THREADS)
    lora_norm(const bf16* input, const bf16* residual, bf16* total, const WEIGHT* weight, bf16* output, i64 output_stride, float* inverse_rms,
              const __grid_constant__ Readers readers, int tokens, float epsilon, float offset) {
    constexpr int SUMS = SLICES * FINISHED_ROWS * READERS;
    u32 tiles = shared_address(shared);
    float* shares = (float*)(shared + 4 * TILE_BYTES);
    float* statistics = shares + SHARES * ROWS * READERS;
    float* sums = statistics + 2 * STATISTICS;
    float* inverses = sums + 2 * SUMS;
    u32 barriers = shared_address(inverses + 2 * ROWS);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first_column = blockIdx.x * WIDTH;

    auto request = [&](int tile, int stage) {
        i64 first = (i64)tile * ROWS, at = first * COLUMNS + first_column;
        u32 to = tiles + stage * 2 * TILE_BYTES;
        request_rows(to, input + at, COLUMNS, tokens - (int)first, WIDTH);
        if (residual) request_rows(to + TILE_BYTES, residual + at, COLUMNS, tokens - (int)first, WIDTH);
    };
    // Step k had a tile.
    auto store_middles = [&](int tile, int k) {
        int stage = k & 1;
        await(barriers + 8 * (2 * WARPS + stage), k >> 1 & 1);
        finish_sums<READERS>(sums + stage * SUMS, [&](int row, int r, float2 sum) {
            i64 token = (i64)tile * ROWS + row;
            float inverse = inverses[stage * ROWS + row];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Reader& reader = readers.of[i];
                if (r >= reader.first && r < reader.first + reader.rank && token < tokens)
                    *(u32*)(reader.middle + token * reader.middle_stride + r - reader.first) = pack_bf16(inverse * sum.x, inverse * sum.y);
            }
        });
    };

    request(blockIdx.y, 0);
    copy_async_commit();
    u32 factor[SHARE_STEPS][READERS / 8][2];
    take_factor<READERS>(factor, [&](int r) {
        const bf16* row = nullptr;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Reader& reader = readers.of[i];
            if (r >= reader.first && r < reader.first + reader.rank) row = reader.a + (i64)(r - reader.first) * COLUMNS;
        }
        return [=](int column) {
            int at = first_column + column;
            u32 pair = row ? *(const u32*)(row + at) : 0;
            return pack_bf16(low_bf16(pair) * (offset + to_float(weight[at])), high_bf16(pair) * (offset + to_float(weight[at + 1])));
        };
    });
    begin(barriers);

    int row_tiles = (tokens + ROWS - 1) / ROWS, step = 0;
    for (int tile = blockIdx.y; tile < row_tiles; tile += gridDim.y, step++) {
        int stage = step & 1;
        if (tile + gridDim.y < row_tiles) request(tile + gridDim.y, stage ^ 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncwarp();
        u8* rows = shared + stage * 2 * TILE_BYTES + warp * OWN_ROWS * ROW_BYTES;
        i64 first_token = (i64)tile * ROWS + warp * OWN_ROWS;
        float squares[OWN_ROWS] = {};
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) {
            for (int chunk = lane; chunk < CHUNKS; chunk += 32) {
                uint4* at = (uint4*)(rows + r * ROW_BYTES + chunk * 16);
                float x[8];
                unpack(*at, x);
                if (residual) {
                    float other[8];
                    unpack(*(const uint4*)((const u8*)at + TILE_BYTES), other);
#pragma unroll
                    for (int i = 0; i < 8; i++) x[i] += other[i];
                    uint4 packed = pack(x);
                    *at = packed;
                    if (first_token + r < tokens) *(uint4*)(total + (first_token + r) * COLUMNS + first_column + chunk * 8) = packed;
                    unpack(packed, x);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) squares[r] += x[i] * x[i];
            }
            squares[r] = warp_sum(squares[r]);
        }
        u32 barrier = barriers + 8 * (stage * WARPS + warp);
        send_statistics(shared_address(statistics + stage * STATISTICS), barrier, squares);
        __syncthreads();
        share_of_rows<READERS>(shares, tiles + stage * 2 * TILE_BYTES, factor);
        if (step > 0) store_middles(tile - gridDim.y, step - 1);
        await(barrier, step >> 1 & 1);
        float inverse[OWN_ROWS];
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) {
            int row = warp * OWN_ROWS + r;
            inverse[r] = 1.0f / sqrtf(whole_statistic(statistics + stage * STATISTICS, row) / (float)COLUMNS + epsilon);
            if (lane == 0) {
                inverses[stage * ROWS + row] = inverse[r];
                if (blockIdx.x == 0 && first_token + r < tokens) inverse_rms[first_token + r] = inverse[r];
            }
        }
        for (int chunk = lane; chunk < CHUNKS; chunk += 32) {
            float w[8];
            load<8>(weight + first_column + chunk * 8, w);
#pragma unroll
            for (int r = 0; r < OWN_ROWS; r++) {
                float x[8];
                unpack(*(const uint4*)(rows + r * ROW_BYTES + chunk * 16), x);
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = x[i] * inverse[r] * (offset + w[i]);
                if (first_token + r < tokens) *(uint4*)(output + (first_token + r) * output_stride + first_column + chunk * 8) = pack(x);
            }
        }
        __syncthreads();
        send_sums<READERS>(shared_address(sums + stage * SUMS), barriers + 8 * (2 * WARPS + stage), shares);
    }
    if (step > 0) store_middles(blockIdx.y + (step - 1) * gridDim.y, step - 1);
    // No block goes while another may send to it.
    cluster_barrier();
}
#endif

#ifdef BACKWARD
// The branch of whose output grad_input is the gradient.
struct Below {
    const bf16* b;  // [COLUMNS, rank]
    const bf16* middle;
    bf16* grad_middle;
    float* partial;  // [clusters, COLUMNS, rank]
    const float* scale;
    i64 middle_stride;
    i64 grad_middle_stride;
    i64 rank;
};

// The branches that read the norm: their g, beside each other.
struct Above {
    const bf16* grad_middle;
    float* partial;  // [clusters, ranks, COLUMNS]
    i64 stride;
    i64 ranks;
};

constexpr int LEFT = RANK > 0 ? RANK : 16, RIGHT = READERS > 0 ? READERS : 16;
constexpr int SHARES_BYTES = RANK > 0 ? SHARES * ROWS * RANK * 4 : 0;
// Shares take the place of the residual's tile when it has been read.
constexpr bool OVER = SHARES_BYTES <= TILE_BYTES;

// Dynamic shared memory: tiles of grad_output, input and residual_grad, twice; middle and g, twice; shares where they do not
// go over a tile; statistics and sums, twice; barriers.
extern "C" __global__ void __cluster_dims__(SLICES, 1, 1) __launch_bounds__(THREADS, 512 / THREADS)
    lora_norm_backward(const bf16* grad_output, const bf16* input, const WEIGHT* weight, const float* inverse_rms, const bf16* residual_grad,
                       i64 residual_stride, bf16* grad_input, i64 grad_stride, const __grid_constant__ Below below,
                       const __grid_constant__ Above above, int tokens, float offset) {
    constexpr int OF_BELOW = RANK > 0 ? ROWS * thin_stride(RANK) : 0, OF_ABOVE = READERS > 0 ? ROWS * thin_stride(READERS) : 0;
    constexpr int SUMS = SLICES * FINISHED_ROWS * RANK;
    u32 tiles = shared_address(shared), middles = tiles + 6 * TILE_BYTES, gs = middles + 2 * OF_BELOW;
    float* apart = (float*)(shared + 6 * TILE_BYTES + 2 * OF_BELOW + 2 * OF_ABOVE);
    float* statistics = apart + (OVER ? 0 : SHARES_BYTES / 4);
    float* sums = statistics + 2 * STATISTICS;
    u32 barriers = shared_address(sums + 2 * SUMS);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first_column = blockIdx.x * WIDTH;
    int rank = (int)below.rank, ranks = (int)above.ranks;

    auto request = [&](int tile, int stage) {
        i64 first = (i64)tile * ROWS, at = first * COLUMNS + first_column;
        int rows = tokens - (int)first;
        u32 to = tiles + stage * 3 * TILE_BYTES;
        request_rows(to, grad_output + at, COLUMNS, rows, WIDTH);
        request_rows(to + TILE_BYTES, input + at, COLUMNS, rows, WIDTH);
        if (residual_grad)
            request_rows(to + 2 * TILE_BYTES, residual_grad + first * residual_stride + first_column, residual_stride, rows, WIDTH);
        if (RANK > 0)
            request_thin<LEFT>(middles + stage * OF_BELOW, below.middle + first * below.middle_stride, below.middle_stride, rows, rank);
        // A warp's own rows, which it multiplies before they are summed.
        if (READERS > 0 && lane < OWN_ROWS * (RIGHT / 8)) {
            int row = warp * OWN_ROWS + lane / (RIGHT / 8), chunk = lane % (RIGHT / 8);
            bool valid = row < rows && chunk * 8 < ranks;
            const bf16* from = above.grad_middle + (valid ? (first + row) * above.stride + chunk * 8 : 0);
            copy_async_16(gs + stage * OF_ABOVE + row * thin_stride(RIGHT) + chunk * 16, from, valid);
        }
    };
    // Step k had a tile.
    auto store_middle = [&](int tile, int k) {
        int stage = k & 1;
        float scale = *below.scale;
        await(barriers + 8 * (2 * WARPS + stage), k >> 1 & 1);
        finish_sums<LEFT>(sums + stage * SUMS, [&](int row, int r, float2 sum) {
            i64 token = (i64)tile * ROWS + row;
            if (r < rank && token < tokens)
                *(u32*)(below.grad_middle + token * below.grad_middle_stride + r) = pack_bf16(scale * sum.x, scale * sum.y);
        });
    };

    request(blockIdx.y, 0);
    copy_async_commit();
    u32 factor[SHARE_STEPS][LEFT / 8][2];
    if (RANK > 0)
        take_factor<LEFT>(factor, [&](int r) {
            const bf16* from = below.b + (i64)first_column * rank + r;
            return [=](int column) { return r < rank ? (u32)from[column * rank].bits | (u32)from[(column + 1) * rank].bits << 16 : 0; };
        });
    float grad_b[OWN_STEPS][LEFT / 8][4] = {}, grad_a[OWN_STEPS][RIGHT / 16][2][4] = {};
    begin(barriers);

    int row_tiles = (tokens + ROWS - 1) / ROWS, step = 0;
    for (int tile = blockIdx.y; tile < row_tiles; tile += gridDim.y, step++) {
        int stage = step & 1;
        if (tile + gridDim.y < row_tiles) request(tile + gridDim.y, stage ^ 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncwarp();
        u8* rows = shared + stage * 3 * TILE_BYTES + warp * OWN_ROWS * ROW_BYTES;
        i64 first_token = (i64)tile * ROWS + warp * OWN_ROWS;
        float inverse[OWN_ROWS], mean[OWN_ROWS] = {};
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) inverse[r] = first_token + r < tokens ? inverse_rms[first_token + r] : 0.0f;
        for (int chunk = lane; chunk < CHUNKS; chunk += 32) {
            float w[8];
            load<8>(weight + first_column + chunk * 8, w);
#pragma unroll
            for (int r = 0; r < OWN_ROWS; r++) {
                const u8* at = rows + r * ROW_BYTES + chunk * 16;
                float d[8], x[8];
                unpack(*(const uint4*)at, d);
                unpack(*(const uint4*)(at + TILE_BYTES), x);
#pragma unroll
                for (int i = 0; i < 8; i++) mean[r] += d[i] * (offset + w[i]) * x[i];
            }
        }
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) mean[r] = warp_sum(mean[r]);
        u32 barrier = barriers + 8 * (stage * WARPS + warp);
        send_statistics(shared_address(statistics + stage * STATISTICS), barrier, mean);
        u32 own = tiles + stage * 3 * TILE_BYTES, g = gs + stage * OF_ABOVE;
        if (READERS > 0) {
            if (lane < OWN_ROWS * (RIGHT / 8)) {
                int row = lane / (RIGHT / 8);
                uint4* at = (uint4*)(shared + (g - tiles) + (warp * OWN_ROWS + row) * thin_stride(RIGHT) + lane % (RIGHT / 8) * 16);
                float x[8], by = inverse[0];
#pragma unroll
                for (int r = 1; r < OWN_ROWS; r++) by = row == r ? inverse[r] : by;
                unpack(*at, x);
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] *= by;
                *at = pack(x);
            }
            __syncthreads();
            add_ranks<RIGHT>(grad_a, own + TILE_BYTES, g);
        }
        if (RANK > 0 && step > 0) store_middle(tile - gridDim.y, step - 1);
        await(barrier, step >> 1 & 1);
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) {
            float dot = whole_statistic(statistics + stage * STATISTICS, warp * OWN_ROWS + r);
            mean[r] = -inverse[r] * inverse[r] * inverse[r] * (dot / (float)COLUMNS);
        }
        for (int chunk = lane; chunk < CHUNKS; chunk += 32) {
            float w[8];
            load<8>(weight + first_column + chunk * 8, w);
#pragma unroll
            for (int r = 0; r < OWN_ROWS; r++) {
                u8* at = rows + r * ROW_BYTES + chunk * 16;
                float d[8], x[8], other[8] = {};
                unpack(*(const uint4*)at, d);
                unpack(*(const uint4*)(at + TILE_BYTES), x);
                if (residual_grad) unpack(*(const uint4*)(at + 2 * TILE_BYTES), other);
#pragma unroll
                for (int i = 0; i < 8; i++) d[i] = inverse[r] * (d[i] * (offset + w[i])) + (x[i] * mean[r] + other[i]);
                uint4 packed = pack(d);
                if (RANK > 0) *(uint4*)at = packed;
                if (first_token + r < tokens) *(uint4*)(grad_input + (first_token + r) * grad_stride + first_column + chunk * 8) = packed;
            }
        }
        __syncthreads();
        if (RANK > 0) {
            float* shares = OVER ? (float*)(shared + (stage * 3 + 2) * TILE_BYTES) : apart;
            share_of_rows<LEFT>(shares, own, factor);
            add_columns<LEFT>(grad_b, own, middles + stage * OF_BELOW);
            __syncthreads();
            send_sums<LEFT>(shared_address(sums + stage * SUMS), barriers + 8 * (2 * WARPS + stage), shares);
            // The next but one tile comes over them.
            if (OVER) __syncthreads();
        }
    }
    if (RANK > 0) {
        if (step > 0) store_middle(blockIdx.y + (step - 1) * gridDim.y, step - 1);
        float scale = *below.scale;
#pragma unroll
        for (int s = 0; s < OWN_STEPS; s++)
#pragma unroll
            for (int j = 0; j < LEFT / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) grad_b[s][j][i] *= scale;
        store_columns<LEFT>(below.partial + ((i64)blockIdx.y * COLUMNS + first_column) * rank, grad_b, WIDTH, rank);
    }
    if (READERS > 0) {
#pragma unroll
        for (int s = 0; s < OWN_STEPS; s++)
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int column = (warp + s * WARPS) * 16 + part * 8 + (lane & 3) * 2 + i;
                    float w = column < WIDTH ? offset + to_float(weight[first_column + column]) : 0.0f;
#pragma unroll
                    for (int j = 0; j < RIGHT / 16; j++) grad_a[s][j][part][i] *= w, grad_a[s][j][part][2 + i] *= w;
                }
        store_ranks<RIGHT>(above.partial + (i64)blockIdx.y * ranks * COLUMNS + first_column, COLUMNS, grad_a, WIDTH, ranks);
    }
    // No block goes while another may send to it.
    cluster_barrier();
}
#endif
