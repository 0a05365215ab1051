// What the backward pass of attention needs first (attention.cu) together with the gradient of a of the LoRA branch that read
// the output O, which are one pass over O:
//   delta = Σ dO O  [tokens, heads],   grad_a += g^T O  [rank, columns].
//
// A slice is some heads. Each warp sums delta of its own rows of a tile, with the gradient in registers, while the next tile
// is on its way. Partial sums of the gradient of a are added in order (lora_add_up): the same bits on every run.
//
// Grid: (slices, groups of rows), at most a group for every ROWS tokens; dynamic shared memory
//   2 (TILE_BYTES + ROWS thin_stride(RANK)) bytes.
// Macros: those of lora_rows.cuh, HEAD_DIM, a multiple of 16 up to 256, of which WIDTH is one, and RANK (16 or 32, the rank or
// more).

extern __shared__ __align__(128) u8 shared[];

constexpr int MIDDLE_BYTES = ROWS * thin_stride(RANK);
// Lanes that take 16 bytes of a head each; heads that a warp takes at once, and how often in a row.
constexpr int HEAD_CHUNKS = HEAD_DIM / 8;
constexpr int LANES = HEAD_CHUNKS <= 2 ? 2 : HEAD_CHUNKS <= 4 ? 4 : HEAD_CHUNKS <= 8 ? 8 : HEAD_CHUNKS <= 16 ? 16 : 32;
constexpr int AT_ONCE = 32 / LANES, TURNS = (WIDTH / HEAD_DIM + AT_ONCE - 1) / AT_ONCE;
static_assert(HEAD_DIM % 16 == 0 && HEAD_CHUNKS <= 32 && WIDTH % HEAD_DIM == 0, "slices of whole heads");

// partial: [groups of rows, rank, columns].
extern "C" __global__ void __launch_bounds__(THREADS)
    lora_delta(float* delta, float* partial, const bf16* grad_output, i64 grad_stride, const bf16* output, i64 stride,
               const bf16* grad_middle, i64 middle_stride, int tokens, int columns, int rank) {
    int first_column = blockIdx.x * WIDTH, own_columns = min(WIDTH, columns - first_column);
    int lane = threadIdx.x & 31, own_row = (threadIdx.x >> 5) * OWN_ROWS;
    int own_head = lane / LANES, chunk = lane % LANES;
    int heads = columns / HEAD_DIM, first_head = first_column / HEAD_DIM;
    u32 tiles = shared_address(shared), middles = tiles + 2 * TILE_BYTES;
    int end = (tokens + ROWS - 1) / ROWS, apart = gridDim.y;
    grad_output += first_column, output += first_column;

    auto request = [&](int tile, int stage) {
        int first = tile * ROWS;
        request_rows(tiles + stage * TILE_BYTES, output + first * stride, stride, tokens - first, own_columns);
        request_thin<RANK>(middles + stage * MIDDLE_BYTES, grad_middle + first * middle_stride, middle_stride,
                           tokens - first, rank);
    };
    // Of a slice's columns; those of lanes without a chunk lie beyond.
    auto column = [&](int turn) {
        return chunk < HEAD_CHUNKS ? (turn * AT_ONCE + own_head) * HEAD_DIM + chunk * 8 : own_columns;
    };
    uint4 grad[OWN_ROWS][TURNS];
    auto take_gradient = [&](int tile) {
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++)
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                int token = tile * ROWS + own_row + r, at = column(turn);
                bool valid = token < tokens && at < own_columns;
                grad[r][turn] = valid ? *(const uint4*)(grad_output + token * grad_stride + at) : zeros();
            }
    };

    request(blockIdx.y, 0);
    copy_async_commit();
    take_gradient(blockIdx.y);
    float sum[OWN_STEPS][RANK / 16][2][4] = {};
    int stage = 0;
    for (int tile = blockIdx.y; tile < end; tile += apart, stage ^= 1) {
        if (tile + apart < end) request(tile + apart, stage ^ 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncwarp();
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++)
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                int token = tile * ROWS + own_row + r, at = column(turn);
                float product = 0.0f;
                if (at < own_columns) {
                    uint4 x = *(const uint4*)(shared + stage * TILE_BYTES + (own_row + r) * ROW_BYTES + at * 2);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        u32 d = word(grad[r][turn], i), o = word(x, i);
                        product += low_bf16(d) * low_bf16(o);
                        product += high_bf16(d) * high_bf16(o);
                    }
                }
#pragma unroll
                for (int offset = LANES / 2; offset > 0; offset >>= 1)
                    product += __shfl_xor_sync(0xffffffffu, product, offset);
                if (chunk == 0 && token < tokens && at < own_columns)
                    delta[(i64)token * heads + first_head + turn * AT_ONCE + own_head] = product;
            }
        take_gradient(tile + apart);
        __syncthreads();
        add_ranks<RANK>(sum, tiles + stage * TILE_BYTES, middles + stage * MIDDLE_BYTES);
        __syncthreads();
    }
    store_ranks<RANK>(partial + (i64)blockIdx.y * rank * columns + first_column, columns, sum, own_columns, rank);
}
