// The gated product of an MLP together with what LoRA branches sum over its results, which are the widest activations of a
// model: tiles are at hand here that would take another pass over memory to read.
//
// Forward, output = f(gate) up (glu.cu), and the middle of the branch that reads it: output a^T  [tokens, rank].
//
// Backward, the gradients of gate and up (glu.cu), and over each of them both sums of its branch (lora.cu):
//   g = s grad b  [tokens, rank],   grad_b += s grad^T middle  [columns, rank].
// With a READER, the branch that read the gated product, its
//   grad_a += g^T output  [rank, columns]
// too (added up by lora_add_up, lora.cu), for which the product is not made again, or read.
//
// A thread takes 16 bytes of four rows of a tile and asks for those of the next tile before this one is multiplied (LEAN:
// before the last sum over it). Results
// are rounded to bf16 before they are summed, as if they had been read from memory. Partial sums are added in order: the
// same bits on every run. A multiprocessor has one block of 16 warps, which leaves the sums their registers; two blocks of 8
// were slower.
//
// Macros: GELU_GATE (0 or 1), RANK, and of FORWARD, BACKWARD and BACKWARD_READER the one whose kernels are wanted.

extern __shared__ __align__(128) u8 shared[];

constexpr int THREADS = 512;
// Rows that a thread takes 16 bytes of, and how far they are apart.
constexpr int ROWS = 4;
constexpr int APART = TILE / ROWS;
// Rows of a, 128 columns of them: padded by 16 bytes.
constexpr int A_STRIDE = 2 * TILE + 16;

DEVICE float gated(float gate, float up) {
    float value, slope;
    activation<GELU_GATE>(gate, value, slope);
    return up * value;
}

#ifdef FORWARD
// Grid: (strips of columns, tiles of tokens). partial: [2 strips, tokens, rank], of a half of every tile's columns each.
extern "C" __global__ void __launch_bounds__(THREADS)
    lora_glu(const bf16* gate_up, i64 stride, bf16* output, i64 output_stride, const bf16* a, i64 a_stride, float* partial,
             int tokens, int columns, int rank, int strip_tiles) {
    u32 tile = shared_address(shared), a_tile = tile + TILE_BYTES;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp & 7, half = warp >> 3;
    int first_token = blockIdx.y * TILE, own_row = threadIdx.x >> 4, own_chunk = threadIdx.x & 15;
    int first = blockIdx.x * strip_tiles * TILE, end = min(first + strip_tiles * TILE, columns);
    const bf16* up_rows = gate_up + columns;

    uint4 gate[ROWS], up[ROWS];
    auto load_tile = [&](int column) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int token = first_token + own_row + APART * i, at = column + own_chunk * 8;
            bool valid = token < tokens && at < end;
            gate[i] = valid ? *(const uint4*)(gate_up + token * stride + at) : zeros();
            up[i] = valid ? *(const uint4*)(up_rows + token * stride + at) : zeros();
        }
    };

    float sum[RANK_TILES][4] = {};
    load_tile(first);
    for (int column = first; column < end; column += TILE) {
        for (int i = threadIdx.x; i < RANK * 16; i += THREADS) {
            int row = i / 16, at = column + i % 16 * 8;
            bool valid = row < rank && at < end;
            copy_async_16(a_tile + row * A_STRIDE + i % 16 * 16, valid ? a + row * a_stride + at : a, valid);
        }
        copy_async_commit();
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            u32 out[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 g = word(gate[i], e), u = word(up[i], e);
                out[e] = pack_bf16(gated(low_bf16(g), low_bf16(u)), gated(high_bf16(g), high_bf16(u)));
            }
            uint4 chunk = make_uint4(out[0], out[1], out[2], out[3]);
            int row = own_row + APART * i, token = first_token + row, at = column + own_chunk * 8;
            *(uint4*)(shared + swizzled(row, own_chunk)) = chunk;
            if (token < tokens && at < end) *(uint4*)(output + token * output_stride + at) = chunk;
        }
        load_tile(column + TILE);
        copy_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / 32; i++) {
            int chunk = half * 8 + 2 * i;
            u32 x[4];
            load_matrix_x4(x, tile + swizzled(group * 16 + (lane & 15), chunk + (lane >> 4)));
#pragma unroll
            for (int r = 0; r < RANK / 16; r++) {
                u32 f[4];
                load_b_from_n_rows<A_STRIDE>(f, a_tile + r * 16 * A_STRIDE + chunk * 16);
                multiply_16x8x16(sum[2 * r], x, f[0], f[1]);
                multiply_16x8x16(sum[2 * r + 1], x, f[2], f[3]);
            }
        }
        __syncthreads();
    }
    store_sums(partial + (i64)(2 * blockIdx.x + half) * tokens * rank, sum, first_token + group * 16, tokens, rank);
}

#else
// The branch that read the gated product.
struct Reader {
    const bf16* grad_middle;  // [tokens, rank]
    i64 stride;
    float* partial;  // [blocks of tokens, rank, columns]
    int rank;
};

// Grid: (strips of columns, blocks of TILES tiles of tokens). parts: gate and up, whose gradients may lie over gate_up.
// LEAN: the product takes the place of the gradient of the gate when that is summed, on cards with little shared memory.
template <int TILES, bool READER, bool LEAN>
DEVICE void lora_glu_backward(const Parts& parts, const Reader& reader, const bf16* grad_output, i64 grad_output_stride,
                              const bf16* gate_up, i64 stride, int tokens) {
    constexpr int TOKENS = TILE * TILES;
    u32 tiles = shared_address(shared), b_tiles = tiles + (READER && !LEAN ? 3 : 2) * TILE_BYTES;
    u32 middles = b_tiles + 2 * B_BYTES, of_reader = middles + 2 * TOKENS * THIN_STRIDE;
    // Half of the warps sum over the gradient of the gate, half over that of up.
    int warp = threadIdx.x >> 5, side = warp >> 3, group = warp & 7;
    const Part& s = parts.of[side];
    int columns = parts.of[0].columns, strip_columns = parts.of[0].strip_tiles * TILE;
    int first = blockIdx.x * strip_columns, end = min(first + strip_columns, columns);
    int first_token = blockIdx.y * TOKENS, own_row = threadIdx.x >> 4, own_chunk = threadIdx.x & 15;
    const bf16* up_rows = gate_up + columns;

    uint4 grad[ROWS], gate[ROWS], up[ROWS];
    auto load_tile = [&](int token_tile, int column) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int token = first_token + token_tile * TILE + own_row + APART * i, at = column + own_chunk * 8;
            bool valid = token < tokens && at < end;
            grad[i] = valid ? *(const uint4*)(grad_output + token * grad_output_stride + at) : zeros();
            gate[i] = valid ? *(const uint4*)(gate_up + token * stride + at) : zeros();
            up[i] = valid ? *(const uint4*)(up_rows + token * stride + at) : zeros();
        }
    };

    load_tile(0, first);
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const Part& part = parts.of[p];
        load_thin(middles + p * TOKENS * THIN_STRIDE, part.middle + first_token * part.middle_stride, part.middle_stride,
                  tokens - first_token, part.rank, TOKENS);
    }
    if (READER)
        load_thin(of_reader, reader.grad_middle + first_token * reader.stride, reader.stride, tokens - first_token,
                  reader.rank, TOKENS);

    float grad_middle[TILES][RANK_TILES][4] = {};
    for (int column = first; column < end; column += TILE) {
        float grad_a[RANK / 16][4] = {};
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const Part& part = parts.of[p];
            load_thin(b_tiles + p * B_BYTES, part.b + (i64)column * part.rank, part.rank, end - column, part.rank, TILE);
        }
        copy_async_commit();
        float grad_b[RANK_TILES][4] = {};
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            uint4 products[LEAN ? ROWS : 1];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                u32 of_gate[4], of_up[4], product[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 d = word(grad[i], e), g = word(gate[i], e), u = word(up[i], e);
                    float low, high, low_slope, high_slope;
                    activation<GELU_GATE>(low_bf16(g), low, low_slope);
                    activation<GELU_GATE>(high_bf16(g), high, high_slope);
                    of_gate[e] =
                        pack_bf16(low_bf16(d) * low_bf16(u) * low_slope, high_bf16(d) * high_bf16(u) * high_slope);
                    of_up[e] = pack_bf16(low_bf16(d) * low, high_bf16(d) * high);
                    if (READER) product[e] = pack_bf16(low_bf16(u) * low, high_bf16(u) * high);
                }
                uint4 gate_chunk = make_uint4(of_gate[0], of_gate[1], of_gate[2], of_gate[3]);
                uint4 up_chunk = make_uint4(of_up[0], of_up[1], of_up[2], of_up[3]);
                int row = own_row + APART * i, token = first_token + t * TILE + row, at = column + own_chunk * 8;
                *(uint4*)(shared + swizzled(row, own_chunk)) = gate_chunk;
                *(uint4*)(shared + TILE_BYTES + swizzled(row, own_chunk)) = up_chunk;
                if (READER) {
                    uint4 product_chunk = make_uint4(product[0], product[1], product[2], product[3]);
                    if (LEAN) products[LEAN ? i : 0] = product_chunk;
                    else *(uint4*)(shared + 2 * TILE_BYTES + swizzled(row, own_chunk)) = product_chunk;
                }
                if (token < tokens && at < end) {
                    *(uint4*)((bf16*)parts.of[0].grad_output + token * parts.of[0].grad_stride + at) = gate_chunk;
                    *(uint4*)((bf16*)parts.of[1].grad_output + token * parts.of[1].grad_stride + at) = up_chunk;
                }
            }
            if (!LEAN) load_tile((t + 1) % TILES, t + 1 < TILES ? column : column + TILE);
            copy_async_wait<0>();
            __syncthreads();
            u32 tile = tiles + side * TILE_BYTES;
            add_middle(grad_middle[t], tile, group * 16, b_tiles + side * B_BYTES);
            add_b(grad_b, tile, group, middles + (side * TOKENS + t * TILE) * THIN_STRIDE);
            if (LEAN) {
                __syncthreads();
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    *(uint4*)(shared + swizzled(own_row + APART * i, own_chunk)) = products[LEAN ? i : 0];
                // Beside the sums over the product.
                load_tile((t + 1) % TILES, t + 1 < TILES ? column : column + TILE);
                __syncthreads();
            }
            if (READER) add_a<RANK>(grad_a, tiles + (LEAN ? 0 : 2) * TILE_BYTES, warp, of_reader + t * TILE * THIN_STRIDE);
            __syncthreads();
        }
        store_sums(s.partial_b + (i64)blockIdx.y * columns * s.rank, grad_b, column + group * 16, end, s.rank);
        if (READER) {
            int lane = threadIdx.x & 31, at = column + warp * 8 + lane % 4 * 2;
            float* to = reader.partial + (i64)blockIdx.y * reader.rank * columns + at;
#pragma unroll
            for (int r = 0; r < 2 * (RANK / 16); r++) {
                int row = r * 8 + lane / 4;
                if (row < reader.rank && at < end)
                    *(float2*)(to + (i64)row * columns) =
                        make_float2(grad_a[r / 2][r % 2 * 2], grad_a[r / 2][r % 2 * 2 + 1]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
        store_sums(s.partial_middle + (i64)blockIdx.x * tokens * s.rank, grad_middle[t],
                   first_token + t * TILE + group * 16, tokens, s.rank);
}

#ifdef BACKWARD
#define LORA_GLU_BACKWARD(TILES)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) lora_glu_backward_##TILES(                              \
        const __grid_constant__ Parts parts, const bf16* grad_output, i64 grad_output_stride, const bf16* gate_up, \
        i64 stride, int tokens) {                                                                                 \
        lora_glu_backward<TILES, false, false>(parts, Reader(), grad_output, grad_output_stride, gate_up, stride, tokens); \
    }
#else
#define LORA_GLU_BACKWARD_READER(NAME, TILES, LEAN)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) lora_glu_backward_reader_##NAME(                       \
        const __grid_constant__ Parts parts, const __grid_constant__ Reader reader, const bf16* grad_output,     \
        i64 grad_output_stride, const bf16* gate_up, i64 stride, int tokens) {                                   \
        lora_glu_backward<TILES, true, LEAN>(parts, reader, grad_output, grad_output_stride, gate_up, stride, tokens); \
    }
#define LORA_GLU_BACKWARD(TILES) LORA_GLU_BACKWARD_READER(TILES, TILES, false)

LORA_GLU_BACKWARD_READER(lean, 1, true)
#endif

LORA_GLU_BACKWARD(1)
LORA_GLU_BACKWARD(2)
#if RANK <= 16
LORA_GLU_BACKWARD(4)
#endif
#endif
