// What a LoRA branch (Hu et al. 2021, arXiv 2106.09685) needs beside the products with the whole weight, in as few passes
// over activations as go.
//
// Forward, y = x w^T + s (x a^T) b^T: the branch's middle and b are put beside x and w, in the columns that their rows
// have to spare, and one product takes both: y = [x | s m] [w | b]^T. Nothing is added to y afterwards.
//
// Backward: both sums over the gradient of y from one pass over it,
//   g = s grad_y b  [tokens, rank],   grad_b += s grad_y^T m  [columns, rank],
// g beside that gradient and a below w, so that one product gives the gradient of the input: [grad_y | g] [w; a].
// A block works through a strip of columns, tile by tile, for TILES tiles of tokens; partial sums of g (a strip's) and of
// grad_b (a block of tokens') are added in order by lora_finish: the same bits on every run.

// Grid: (strips of all projections, blocks of tokens).
template <int TILES>
DEVICE void lora_backward(const Parts& parts, int tokens) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int TOKENS = TILE * TILES;
    int strip = blockIdx.x, part = 0;
    while (strip >= parts.of[part].strips) strip -= parts.of[part++].strips;
    const Part& s = parts.of[part];
    int first_column = strip * s.strip_tiles * TILE, columns = min(s.strip_tiles * TILE, s.columns - first_column);
    const bf16* grad_output = s.grad_output + first_column;
    const bf16* b_rows = s.b + (i64)first_column * s.rank;
    int first_token = blockIdx.y * TOKENS;
    int warp = threadIdx.x >> 5;
    u32 tiles = shared_address(shared), b_tiles = tiles + 2 * TILE_BYTES, middle = b_tiles + 2 * B_BYTES;
    int column_tiles = (columns + TILE - 1) / TILE;
    int steps = column_tiles * TILES;

    // Step k: token tile k % TILES of column tile k / TILES.
    auto load_step = [&](int k) {
        int column = k / TILES * TILE, token = first_token + k % TILES * TILE;
        const bf16* from = grad_output + (i64)token * s.grad_stride + column;
        u32 to = tiles + (k & 1) * TILE_BYTES;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int row = (threadIdx.x >> 4) + 16 * i, chunk = threadIdx.x & 15;
            bool valid = token + row < tokens && column + chunk * 8 < columns;
            copy_async_16(to + swizzled(row, chunk), valid ? from + row * s.grad_stride + chunk * 8 : grad_output,
                          valid);
        }
        if (k % TILES == 0)
            load_thin(b_tiles + (k / TILES & 1) * B_BYTES, b_rows + (i64)column * s.rank, s.rank, columns - column,
                      s.rank, TILE);
        copy_async_commit();
    };

    load_thin(middle, s.middle + first_token * s.middle_stride, s.middle_stride, tokens - first_token, s.rank, TOKENS);
    load_step(0);

    float grad_middle[TILES][RANK_TILES][4] = {};
    for (int tile = 0; tile < column_tiles; tile++) {
        float grad_b[RANK_TILES][4] = {};
        u32 b = b_tiles + (tile & 1) * B_BYTES;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            int k = tile * TILES + t;
            if (k + 1 < steps) {
                load_step(k + 1);
                copy_async_wait<1>();
            } else {
                copy_async_wait<0>();
            }
            __syncthreads();
            u32 grad = tiles + (k & 1) * TILE_BYTES;
            add_middle(grad_middle[t], grad, warp * 16, b);
            add_b(grad_b, grad, warp, middle + t * TILE * THIN_STRIDE);
            __syncthreads();
        }
        store_sums(s.partial_b + ((i64)blockIdx.y * s.columns + first_column) * s.rank, grad_b, tile * TILE + warp * 16,
                   columns, s.rank);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
        store_sums(s.partial_middle + (i64)strip * tokens * s.rank, grad_middle[t], first_token + t * TILE + warp * 16,
                   tokens, s.rank);
}

#define LORA_BACKWARD(TILES)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) lora_backward_##TILES(const __grid_constant__ Parts parts,       \
                                                                            int tokens) {                             \
        lora_backward<TILES>(parts, tokens);                                                                          \
    }

LORA_BACKWARD(1)
#if RANK <= 32
LORA_BACKWARD(2)
#endif
#if RANK <= 16
LORA_BACKWARD(4)
#endif

// Grid: (pieces, projections); a thread adds up four values at a time. `blocks`: of tokens.
extern "C" __global__ void __launch_bounds__(256)
    lora_finish(const __grid_constant__ Parts parts, int tokens, int blocks) {
    const Part& s = parts.of[blockIdx.y];
    float scale = *s.scale;
    i64 of_middle = (i64)tokens * s.rank / 4, of_b = (i64)s.columns * s.rank / 4;
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < of_middle + of_b; i += (i64)gridDim.x * 256) {
        if (i < of_middle) {
            float4 sum = sum_of((const float4*)s.partial_middle + i, of_middle, s.strips);
            store_middle(s.grad_middle, s.grad_middle_stride, i, s.rank, scale, sum);
        } else {
            float4 sum = sum_of((const float4*)s.partial_b + (i - of_middle), of_b, blocks);
            float4* to = (float4*)s.grad_b + (i - of_middle);
            float4 x = *to;
            *to = make_float4(x.x + scale * sum.x, x.y + scale * sum.y, x.z + scale * sum.z, x.w + scale * sum.w);
        }
    }
}

// The middle of a branch from the partial sums [parts, tokens, rank] of the kernel that makes what it reads (lora_glu, attention
// forward), four values a thread; grid: (ceil(tokens rank / 4 / 256)).
extern "C" __global__ void __launch_bounds__(256)
    lora_middle_finish(const float* partial, int parts, bf16* middle, i64 stride, int tokens, int rank) {
    i64 quads = (i64)tokens * rank / 4, i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i < quads) store_middle(middle, stride, i, rank, 1.0f, sum_of((const float4*)partial + i, quads, parts));
}

// A gradient and its partial sums, `apart` quads from each other.
struct Sum {
    const float* partial;
    float* to;
    i64 apart;
    i64 quads;
};

struct Sums {
    Sum of[5];
};

// to += its partial sums, of which there are `count`, four values a thread; grid: (ceil(most quads / 256), gradients).
extern "C" __global__ void __launch_bounds__(256) lora_add_up(const __grid_constant__ Sums sums, int count) {
    const Sum& s = sums.of[blockIdx.y];
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= s.quads) return;
    float4 sum = sum_of((const float4*)s.partial + i, s.apart, count);
    float4* at = (float4*)s.to + i;
    float4 x = *at;
    *at = make_float4(x.x + sum.x, x.y + sum.y, x.z + sum.z, x.w + sum.w);
}

// One branch beside the whole product's factors. Its columns are `offset` to `offset + rank` of those to spare.
struct Branch {
    const bf16* middle;
    const bf16* b;
    const float* scale;
    i64 middle_stride;
    int offset;
    int rank;
    int first_row;  // of the rows below each other that the product takes
    int rows;
};

struct Branches {
    Branch of[4];
};

// Fills the spare columns of x's rows with s m, and those of w's rows with b: block-diagonal, for projections below each
// other have branches of their own. Eight values a thread; grid: (ceil((tokens + rows) spare / 8 / 256)).
extern "C" __global__ void __launch_bounds__(256)
    lora_place(const __grid_constant__ Branches branches, int count, bf16* x, i64 x_stride, int tokens, bf16* w, i64 w_stride, int rows,
               int first_row, int spare) {
    int chunks = spare / 8;
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (i64)(tokens + rows) * chunks) return;
    int row = (int)(i / chunks), column = (int)(i % chunks) * 8;
    bool of_x = row < tokens;
    if (!of_x) row -= tokens;
    uint4 out = make_uint4(0, 0, 0, 0);
    for (int j = 0; j < count; j++) {
        const Branch& branch = branches.of[j];
        int at = column - branch.offset;
        if (at < 0 || at >= branch.rank) continue;
        if (of_x) {
            float v[8], scale = *branch.scale;
            load<8>(branch.middle + row * branch.middle_stride + at, v);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] *= scale;
            out = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        } else {
            int own = first_row + row - branch.first_row;
            if (own >= 0 && own < branch.rows) out = *(const uint4*)(branch.b + (i64)own * branch.rank + at);
        }
    }
    *(uint4*)(of_x ? x + row * x_stride + column : w + row * w_stride + column) = out;
}

// Rows to another place, as those of a below those of w. Eight values a thread; grid: (ceil(rows columns / 8 / 256)).
extern "C" __global__ void __launch_bounds__(256)
    lora_rows(const bf16* a, i64 a_stride, bf16* to, i64 stride, int rows, int columns) {
    int chunks = columns / 8;
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= rows * chunks) return;
    int row = i / chunks, column = i % chunks * 8;
    *(uint4*)(to + row * stride + column) = *(const uint4*)(a + row * a_stride + column);
}
