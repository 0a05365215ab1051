// 8-bit integers with one scale a row: scale = max |x| / 127, code = x / scale rounded to the nearest (as LLM.int8()
// quantizes weights, Dettmers et al. 2022, arXiv 2208.07339).

// One block a row; `from` holds whole rows of checkpoint type 0 f32, 1 f16, 2 bf16.
extern "C" __global__ void int8_quantize(const void* from, int type, signed char* codes, float* scales, int columns) {
    __shared__ float shared[32];
    i64 first = (i64)blockIdx.x * columns;
    float top = 0.0f;
    for (int column = threadIdx.x; column < columns; column += blockDim.x)
        top = fmaxf(top, fabsf(checkpoint_value(from, type, first + column)));
    float scale = block_max(top, shared) / 127.0f;
    float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int column = threadIdx.x; column < columns; column += blockDim.x)
        codes[first + column] = (signed char)roundf(checkpoint_value(from, type, first + column) * inverse);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

// Columns [first_column, first_column + columns) of rows [first_row, first_row + rows) of a weight with `row_length`
// columns, as bf16 rows `stride` apart; for V = 8 all three column figures are multiples of 8.
// One thread V values in each of 8 rows, four rows' loads in flight; grid: (ceil(columns / V / blockDim.x), ceil(rows / 8)).
template <int V>
__device__ __forceinline__ void int8_dequantize(const signed char* codes, const float* scales, bf16* to, i64 stride,
                                                i64 row_length, i64 first_row, i64 first_column, int columns, int rows) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= columns) return;
    for (int row = blockIdx.y * 8; row < min(rows, (int)blockIdx.y * 8 + 8); row += 4) {
        signed char code[4][V];
        float scale[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            // Past the last row the last is read again.
            i64 from = first_row + min(row + r, rows - 1);
            const signed char* source = codes + from * row_length + first_column + column;
            if constexpr (V == 8) {
                uint2 packed = *reinterpret_cast<const uint2*>(source);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    code[r][i] = (signed char)(packed.x >> (8 * i));
                    code[r][i + 4] = (signed char)(packed.y >> (8 * i));
                }
            } else {
                code[r][0] = *source;
            }
            scale[r] = scales[from];
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float x[V];
#pragma unroll
            for (int i = 0; i < V; i++) x[i] = (float)code[r][i] * scale[r];
            if (row + r < rows) store<V>(to + (row + r) * stride + column, x);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
    int8_dequantize_8(const signed char* codes, const float* scales, bf16* to, i64 stride, i64 row_length,
                      i64 first_row, i64 first_column, int columns, int rows) {
    int8_dequantize<8>(codes, scales, to, stride, row_length, first_row, first_column, columns, rows);
}

extern "C" __global__ void __launch_bounds__(128)
    int8_dequantize_1(const signed char* codes, const float* scales, bf16* to, i64 stride, i64 row_length,
                      i64 first_row, i64 first_column, int columns, int rows) {
    int8_dequantize<1>(codes, scales, to, stride, row_length, first_row, first_column, columns, rows);
}
