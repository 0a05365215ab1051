// Backward by tiles, the rows' means of d n given (rms_norm.cu): grad_input, both sums of the next branch over it (lora.cu), and
// the gradients of a of the branches that read the norm. Macros: RANK of the next branch, READERS: ranks of the readers together.
extern __shared__ __align__(128) u8 shared[];
constexpr int THREADS = 512, ROWS = 4, APART = TILE / ROWS;
constexpr int G_STRIDE = 2 * READERS + 16;

template <int TILES>
DEVICE void norm_backward(const bf16* grad_output, const bf16* input, const bf16* residual, i64 residual_stride, const bf16* weight,
                          const float* inverse_rms, const float* means, bf16* grad_input, i64 grad_stride, const bf16* b_next,
                          const bf16* m_next, const bf16* g_readers, float* partial_middle, float* partial_b, float* partial_a, int tokens,
                          int columns, int strip_tiles) {
    constexpr int TOKENS = TILE * TILES;
    u32 tiles = shared_address(shared), b_tile = tiles + 2 * TILE_BYTES, middles = b_tile + B_BYTES, gs = middles + TOKENS * THIN_STRIDE;
    float* statistics = (float*)(shared + 2 * TILE_BYTES + B_BYTES + TOKENS * THIN_STRIDE + TOKENS * G_STRIDE);
    int warp = threadIdx.x >> 5, group = warp & 7, side = warp >> 3;
    int first = blockIdx.x * strip_tiles * TILE, end = min(first + strip_tiles * TILE, columns);
    int first_token = blockIdx.y * TOKENS, own_row = threadIdx.x >> 4, own_chunk = threadIdx.x & 15;
    uint4 grad[ROWS], x[ROWS], other[ROWS];
    auto load_tile = [&](int token_tile, int column) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            i64 token = first_token + token_tile * TILE + own_row + APART * i;
            int at = column + own_chunk * 8;
            bool valid = token < tokens && at < end;
            grad[i] = valid ? *(const uint4*)(grad_output + token * columns + at) : zeros();
            x[i] = valid ? *(const uint4*)(input + token * columns + at) : zeros();
            other[i] = valid ? *(const uint4*)(residual + token * residual_stride + at) : zeros();
        }
    };
    load_tile(0, first);
    load_thin(middles, m_next + (i64)first_token * RANK, RANK, tokens - first_token, RANK, TOKENS);
    for (int i = threadIdx.x; i < TOKENS * (READERS / 8); i += THREADS) {
        int row = i / (READERS / 8), chunk = i % (READERS / 8);
        bool valid = first_token + row < tokens;
        copy_async_16(gs + row * G_STRIDE + chunk * 16, valid ? g_readers + (i64)(first_token + row) * READERS + chunk * 8 : g_readers, valid);
    }
    for (int i = threadIdx.x; i < TOKENS; i += THREADS) {
        bool valid = first_token + i < tokens;
        statistics[2 * i] = valid ? inverse_rms[first_token + i] : 0.0f;
        statistics[2 * i + 1] = valid ? means[first_token + i] : 0.0f;
    }
    __syncthreads();
    float grad_middle[TILES][RANK_TILES][4] = {};
    for (int column = first; column < end; column += TILE) {
        float grad_a[READERS / 16][4] = {}, grad_b[RANK_TILES][4] = {};
        load_thin(b_tile, b_next + (i64)column * RANK, RANK, end - column, RANK, TILE);
        copy_async_commit();
        float w[8];
        load<8>(weight + column + own_chunk * 8, w);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                int row = own_row + APART * i, token = first_token + t * TILE + row, at = column + own_chunk * 8;
                float2 s = *(const float2*)(statistics + 2 * (t * TILE + row));
                u32 out[4], normed[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 d = word(grad[i], e), h = word(x[i], e), r = word(other[i], e);
                    float n0 = low_bf16(h) * s.x, n1 = high_bf16(h) * s.x;
                    out[e] = pack_bf16(s.x * (low_bf16(d) * w[2 * e] - n0 * s.y) + low_bf16(r),
                                       s.x * (high_bf16(d) * w[2 * e + 1] - n1 * s.y) + high_bf16(r));
                    normed[e] = pack_bf16(n0 * w[2 * e], n1 * w[2 * e + 1]);
                }
                uint4 chunk = make_uint4(out[0], out[1], out[2], out[3]);
                *(uint4*)(shared + swizzled(row, own_chunk)) = chunk;
                *(uint4*)(shared + TILE_BYTES + swizzled(row, own_chunk)) = make_uint4(normed[0], normed[1], normed[2], normed[3]);
                if (token < tokens && at < end) *(uint4*)(grad_input + (i64)token * grad_stride + at) = chunk;
            }
            load_tile((t + 1) % TILES, t + 1 < TILES ? column : column + TILE);
            copy_async_wait<0>();
            __syncthreads();
            if (side == 0) {
                add_middle(grad_middle[t], tiles, group * 16, b_tile);
            } else {
                add_b(grad_b, tiles, group, middles + t * TILE * THIN_STRIDE);
            }
            add_a<READERS>(grad_a, tiles + TILE_BYTES, warp, gs + t * TILE * G_STRIDE);
            __syncthreads();
        }
        if (side == 1) store_sums(partial_b + (i64)blockIdx.y * columns * RANK, grad_b, column + group * 16, end, RANK);
        int lane = threadIdx.x & 31, at = column + warp * 8 + lane % 4 * 2;
        float* to = partial_a + (i64)blockIdx.y * READERS * columns + at;
#pragma unroll
        for (int r = 0; r < 2 * (READERS / 16); r++)
            if (at < end)
                *(float2*)(to + (i64)(r * 8 + lane / 4) * columns) = make_float2(grad_a[r / 2][r % 2 * 2], grad_a[r / 2][r % 2 * 2 + 1]);
    }
    if (side == 0)
#pragma unroll
        for (int t = 0; t < TILES; t++)
            store_sums(partial_middle + (i64)blockIdx.x * tokens * RANK, grad_middle[t], first_token + t * TILE + group * 16, tokens, RANK);
}

#define ENTRY(TILES)                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_##TILES(                                                            \
        const bf16* grad_output, const bf16* input, const bf16* residual, i64 residual_stride, const bf16* weight, const float* inverse_rms, \
        const float* means, bf16* grad_input, i64 grad_stride, const bf16* b_next, const bf16* m_next, const bf16* g_readers,                \
        float* partial_middle, float* partial_b, float* partial_a, int tokens, int columns, int strip_tiles) {                               \
        norm_backward<TILES>(grad_output, input, residual, residual_stride, weight, inverse_rms, means, grad_input, grad_stride, b_next,     \
                             m_next, g_readers, partial_middle, partial_b, partial_a, tokens, columns, strip_tiles);                         \
    }
ENTRY(1)
ENTRY(2)
ENTRY(4)

// Sums of partial ones: middle of the next branch (scaled, bf16), its grad_b, and grad_a.
extern "C" __global__ void __launch_bounds__(256)
    norm_finish(const float* partial_middle, int strips, const float* partial_b, const float* partial_a, int blocks, bf16* middle, float* grad_b,
                float* grad_a, int tokens, int columns) {
    i64 of_middle = (i64)tokens * RANK / 4, of_b = (i64)columns * RANK / 4, of_a = (i64)columns * READERS / 4;
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < of_middle + of_b + of_a; i += (i64)gridDim.x * 256) {
        if (i < of_middle) {
            store_middle(middle, RANK, i, RANK, 1.0f, sum_of((const float4*)partial_middle + i, of_middle, strips));
            continue;
        }
        bool is_b = i < of_middle + of_b;
        i64 at = is_b ? i - of_middle : i - of_middle - of_b;
        float4 sum = is_b ? sum_of((const float4*)partial_b + at, of_b, blocks) : sum_of((const float4*)partial_a + at, of_a, blocks);
        float4* to = (float4*)(is_b ? grad_b : grad_a) + at;
        float4 x = *to;
        *to = make_float4(x.x + sum.x, x.y + sum.y, x.z + sum.z, x.w + sum.w);
    }
}

// Means of d n, a block a row: what the tiles need first.
extern "C" __global__ void __launch_bounds__(256)
    norm_means(const bf16* grad_output, const bf16* input, const bf16* weight, const float* inverse_rms, float* means, int columns) {
    __shared__ float sums[32];
    i64 base = (i64)blockIdx.x * columns;
    float dot = 0.0f;
    for (int column = threadIdx.x * 8; column < columns; column += 2048) {
        float g[8], x[8], w[8];
        load<8>(grad_output + base + column, g);
        load<8>(input + base + column, x);
        load<8>(weight + column, w);
#pragma unroll
        for (int i = 0; i < 8; i++) dot += g[i] * w[i] * x[i];
    }
    dot = block_sum(dot, sums);
    if (threadIdx.x == 0) means[blockIdx.x] = dot * inverse_rms[blockIdx.x] / (float)columns;
}
