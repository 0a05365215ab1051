// Forward: sum = input + residual, output = norm(sum) (rms_norm.cu), middle = output a^T. A block takes 16 rows, a warp one of them;
// then a warp takes a share of the columns of all 16 for the middle, 16 bytes of a row at a time: the order of the columns is
// another than memory's, the same for both factors. Macros: COLUMNS, RANKS of the branches together.
extern __shared__ __align__(128) u8 shared[];
constexpr int ROWS = 16, WARPS = 16;
constexpr int STRIDE = 2 * COLUMNS + 64;
constexpr int TILES = RANKS / 8;

extern "C" __global__ void __launch_bounds__(512)
    norm_middle(const bf16* input, const bf16* residual, bf16* sum, const bf16* weight, bf16* output, i64 output_stride, float* inverse_rms,
                const bf16* a, bf16* middle, int tokens, float epsilon) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int first = blockIdx.x * ROWS, row = first + warp;
    u8* own = shared + warp * STRIDE;
    if (row < tokens) {
        i64 base = (i64)row * COLUMNS;
        float squares = 0.0f;
#pragma unroll 8
        for (int column = lane * 8; column < COLUMNS; column += 256) {
            float x[8], other[8];
            load<8>(input + base + column, x);
            load<8>(residual + base + column, other);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = round_bf16(x[i] + other[i]), squares += x[i] * x[i];
            store<8>(sum + base + column, x);
            store<8>((bf16*)own + column, x);
        }
        squares = warp_sum(squares);
        float inverse = 1.0f / sqrtf(squares / (float)COLUMNS + epsilon);
        if (lane == 0) inverse_rms[row] = inverse;
#pragma unroll 4
        for (int column = lane * 8; column < COLUMNS; column += 256) {
            float x[8], w[8];
            load<8>((const bf16*)own + column, x);
            load<8>(weight + column, w);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = x[i] * inverse * w[i];
            store<8>((bf16*)own + column, x);
            store<8>(output + (i64)row * output_stride + column, x);
        }
    }
    __syncthreads();
    constexpr int SHARE = COLUMNS / WARPS;
    int g = lane >> 2, t = lane & 3;
    float acc[TILES][4] = {};
    const bf16* a_rows = a + (i64)g * COLUMNS + warp * SHARE + t * 8;
    const u8* x_rows = shared + g * STRIDE + (warp * SHARE + t * 8) * 2;
#pragma unroll 2
    for (int k = 0; k < SHARE; k += 32) {
        uint4 b[TILES];
#pragma unroll
        for (int j = 0; j < TILES; j++) b[j] = *(const uint4*)(a_rows + (i64)j * 8 * COLUMNS + k);
        uint4 low = *(const uint4*)(x_rows + k * 2), high = *(const uint4*)(x_rows + 8 * STRIDE + k * 2);
        u32 one[4] = {low.x, high.x, low.y, high.y}, two[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            multiply_16x8x16(acc[j], one, b[j].x, b[j].y);
            multiply_16x8x16(acc[j], two, b[j].z, b[j].w);
        }
    }
    __syncthreads();
    float* partial = (float*)shared;  // [WARPS][16][RANKS]
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        float* at = partial + (warp * 16 + g) * RANKS + j * 8 + t * 2;
        *(float2*)at = make_float2(acc[j][0], acc[j][1]);
        *(float2*)(at + 8 * RANKS) = make_float2(acc[j][2], acc[j][3]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * RANKS; i += 512) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += partial[w * 16 * RANKS + i];
        int token = first + i / RANKS;
        if (token < tokens) middle[(i64)token * RANKS + i % RANKS] = to_bf16(total);
    }
}
