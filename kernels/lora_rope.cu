// The backward pass of rotary position embedding (rope.cu) over the gradients of queries and keys, together with both sums of
// LoRA branches over those of queries, keys and values (lora.cu):
//   g = s grad b  [tokens, rank],   grad_b += s grad^T middle  [columns, rank].
//
// A slice is some heads of one projection. Each warp turns its own rows of a tile, while those of the next are on their way;
// results are rounded to bf16 before they are summed, as if they had been read from memory. Values are only summed. Partial
// sums are added in order (lora_finish): the same bits on every run.
//
// Grid: (slices of all projections, groups of rows), at most a group for every ROWS tokens; dynamic shared memory
//   2 (TILE_BYTES + ROWS thin_stride(RANK)) + 4 ROWS (SHARES RANK + HEAD_DIM) bytes.
// Macros: those of lora_rows.cuh, HEAD_DIM, a multiple of 16, of which WIDTH is one, and RANK (16 or 32, the largest rank or more).

extern __shared__ __align__(128) u8 shared[];

constexpr int HALF = HEAD_DIM / 2;
constexpr int MIDDLE_BYTES = ROWS * thin_stride(RANK);
static_assert(HEAD_DIM % 16 == 0 && WIDTH % HEAD_DIM == 0, "slices of whole heads, halves of 16 bytes");

// Cosines, then sines, for a warp's own rows, [OWN_ROWS][2][HALF].
DEVICE void fill_table(float* table, const float (&position)[OWN_ROWS], const float* inverse_frequency, float scale) {
    for (int i = threadIdx.x & 31; i < HALF; i += 32) {
        float frequency = inverse_frequency[i];
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) {
            float sine, cosine;
            sincosf(position[r] * frequency, &sine, &cosine);
            table[r * HEAD_DIM + i] = cosine * scale;
            table[r * HEAD_DIM + HALF + i] = -(sine * scale);
        }
    }
}

// Turns a warp's own rows of a tile, of which `rows` and `columns` are there, and writes them to where they came from.
DEVICE void turn_rows(u8* tile, const float* table, bf16* to, i64 stride, int rows, int columns) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < OWN_ROWS; r++) {
        int row = warp * OWN_ROWS + r;
        for (int pair = lane; pair < CHUNKS / 2; pair += 32) {
            int i = pair % (HALF / 8) * 8, column = pair / (HALF / 8) * HEAD_DIM + i;
            bf16* first = (bf16*)(tile + row * ROW_BYTES) + column;
            float a[8], b[8], x[8], y[8], cosine[8], sine[8];
            load<8>(first, a);
            load<8>(first + HALF, b);
            load<8>(table + r * HEAD_DIM + i, cosine);
            load<8>(table + r * HEAD_DIM + HALF + i, sine);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                x[j] = a[j] * cosine[j] - b[j] * sine[j];
                y[j] = b[j] * cosine[j] + a[j] * sine[j];
            }
            store<8>(first, x);
            store<8>(first + HALF, y);
            if (row < rows && column < columns) {
                store<8>(to + row * stride + column, x);
                store<8>(to + row * stride + column + HALF, y);
            }
        }
    }
}

// `turned`: projections, from the first on, whose gradients are turned.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    lora_rope(const __grid_constant__ Parts parts, const int* positions, const float* inverse_frequency, float scale,
              int turned, int tokens) {
    int slice = blockIdx.x, part = 0;
    while (slice >= parts.of[part].strips) slice -= parts.of[part++].strips;
    const Part& s = parts.of[part];
    bool turns = part < turned;
    int first_column = slice * WIDTH, columns = min(WIDTH, s.columns - first_column);
    bf16* grad = (bf16*)s.grad_output + first_column;
    int rank = s.rank;
    const bf16* b = s.b + (i64)first_column * rank;
    int own_row = (threadIdx.x >> 5) * OWN_ROWS;
    u32 tiles = shared_address(shared), middles = tiles + 2 * TILE_BYTES;
    float* shares = (float*)(shared + 2 * (TILE_BYTES + MIDDLE_BYTES));
    float* table = shares + SHARES * ROWS * RANK + own_row * HEAD_DIM;
    int end = (tokens + ROWS - 1) / ROWS, apart = gridDim.y;

    auto request = [&](int tile, int stage) {
        int first = tile * ROWS;
        request_rows(tiles + stage * TILE_BYTES, grad + first * s.grad_stride, s.grad_stride, tokens - first, columns);
        request_thin<RANK>(middles + stage * MIDDLE_BYTES, s.middle + first * s.middle_stride, s.middle_stride,
                           tokens - first, rank);
    };
    float position[OWN_ROWS];
    auto take_positions = [&](int tile) {
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++) {
            int token = tile * ROWS + own_row + r;
            position[r] = turns && token < tokens ? (float)positions[token] : 0.0f;
        }
    };

    request(blockIdx.y, 0);
    copy_async_commit();
    take_positions(blockIdx.y);
    u32 factor[SHARE_STEPS][RANK / 8][2];
    take_factor<RANK>(factor, [&](int r) {
        return [=](int column) {
            bool valid = column < columns && r < rank;
            const bf16* at = b + column * rank + r;
            return valid ? (u32)at[0].bits | (u32)at[rank].bits << 16 : 0;
        };
    });

    float sum[OWN_STEPS][RANK / 8][4] = {};
    int stage = 0;
    for (int tile = blockIdx.y; tile < end; tile += apart, stage ^= 1) {
        if (tile + apart < end) request(tile + apart, stage ^ 1);
        copy_async_commit();
        if (turns) fill_table(table, position, inverse_frequency, scale);
        take_positions(tile + apart);
        copy_async_wait<1>();
        __syncwarp();
        int first = tile * ROWS;
        if (turns)
            turn_rows(shared + stage * TILE_BYTES, table, grad + first * s.grad_stride, s.grad_stride, tokens - first,
                      columns);
        __syncthreads();
        u32 rows = tiles + stage * TILE_BYTES;
        add_columns<RANK>(sum, rows, middles + stage * MIDDLE_BYTES);
        share_of_rows<RANK>(shares, rows, factor);
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * RANK; i += THREADS) {
            int token = first + i / RANK, r = i % RANK;
            if (token < tokens && r < rank)
                s.partial_middle[((i64)slice * tokens + token) * rank + r] = sum_of_shares<RANK>(shares, i);
        }
    }
    store_columns<RANK>(s.partial_b + ((i64)blockIdx.y * s.columns + first_column) * rank, sum, columns, rank);
}
