// 8-bit floats, e4m3 (Micikevicius et al. 2022, arXiv 2209.05433): value = code scale, one scale a tensor, which takes
// the largest magnitude to 448, the largest code. Ada, Hopper and newer.
//
// Weights are quantized once, as they arrive. What they are multiplied with is quantized on the way in: its largest
// magnitude is found block by block, and every block of the second launch reduces those to the same scale.

// Two codes, `low` in the lower byte; beyond the largest code the largest, NaN stays NaN.
__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint4 e4m3_codes(const float (&x)[16]) {
    uint4 codes;
    codes.x = e4m3_pair(x[0], x[1]) | e4m3_pair(x[2], x[3]) << 16;
    codes.y = e4m3_pair(x[4], x[5]) | e4m3_pair(x[6], x[7]) << 16;
    codes.z = e4m3_pair(x[8], x[9]) | e4m3_pair(x[10], x[11]) << 16;
    codes.w = e4m3_pair(x[12], x[13]) | e4m3_pair(x[14], x[15]) << 16;
    return codes;
}

// A weight in its final place. `from` holds elements of checkpoint type 0 f32, 1 f16, 2 bf16; a multiple of 16.
extern "C" __global__ void fp8_from_checkpoint(const void* from, int type, const float* scale, u8* to, i64 elements) {
    float inverse = *scale > 0.0f ? 1.0f / *scale : 0.0f;
    i64 step = (i64)gridDim.x * blockDim.x * 16;
    for (i64 first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 16; first < elements; first += step) {
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) x[i] = checkpoint_value(from, type, first + i) * inverse;
        *reinterpret_cast<uint4*>(to + first) = e4m3_codes(x);
    }
}

// Largest magnitude of the rows that a block visits. Columns are a multiple of 16, rows start at 16 bytes.
extern "C" __global__ void fp8_largest(const bf16* from, i64 stride, int rows, int columns, float* largest) {
    __shared__ float shared[32];
    float top = 0.0f;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const bf16* source = from + row * stride;
        for (int column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
            float x[8];
            load<8>(source + column, x);
#pragma unroll
            for (int i = 0; i < 8; i++) top = fmaxf(top, fabsf(x[i]));
        }
    }
    top = block_max(top, shared);
    if (threadIdx.x == 0) largest[blockIdx.x] = top;
}

// Rows as codes, end to end, with the scale that the `count` results of fp8_largest ask for.
extern "C" __global__ void fp8_quantize(const bf16* from, i64 stride, int rows, int columns, const float* largest,
                                        int count, u8* to, float* scale) {
    __shared__ float shared[32];
    float top = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) top = fmaxf(top, largest[i]);
    // Below it the inverse would be infinite.
    top = fmaxf(block_max(top, shared), 1e-30f);
    float inverse = 448.0f / top;
    if (blockIdx.x == 0 && threadIdx.x == 0) *scale = top / 448.0f;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const bf16* source = from + row * stride;
        u8* target = to + (i64)row * columns;
        for (int column = threadIdx.x * 16; column < columns; column += blockDim.x * 16) {
            float a[8], b[8], x[16];
            load<8>(source + column, a);
            load<8>(source + column + 8, b);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = a[i] * inverse, x[8 + i] = b[i] * inverse;
            *reinterpret_cast<uint4*>(target + column) = e4m3_codes(x);
        }
    }
}

// to[column - first][row] = from[row][column] for `columns` columns: what the backward pass multiplies with, for Hopper
// takes 8-bit operands only with the summed dimension along the rows. Rows and columns are multiples of 16.
// One block of 256 threads a tile of 64 x 64; grid: (column tiles, row tiles).
extern "C" __global__ void fp8_transpose(const u8* from, int rows, i64 row_length, i64 first, int columns, u8* to) {
    // A column of the tile touches all banks.
    __shared__ u32 tile[64][17];
    int line = threadIdx.x >> 2, part = threadIdx.x & 3;
    int row = blockIdx.y * 64 + line, column = blockIdx.x * 64 + part * 16;
    if (row < rows && column < columns) {
        uint4 codes = *reinterpret_cast<const uint4*>(from + row * row_length + first + column);
        tile[line][part * 4] = codes.x;
        tile[line][part * 4 + 1] = codes.y;
        tile[line][part * 4 + 2] = codes.z;
        tile[line][part * 4 + 3] = codes.w;
    }
    __syncthreads();
    int to_row = blockIdx.x * 64 + line, to_column = blockIdx.y * 64 + part * 16;
    if (to_row >= columns || to_column >= rows) return;
    u32 words[4];
#pragma unroll
    for (int word = 0; word < 4; word++) {
        words[word] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 source = tile[part * 16 + word * 4 + i][line >> 2];
            words[word] |= (source >> (line & 3) * 8 & 0xffu) << i * 8;
        }
    }
    *reinterpret_cast<uint4*>(to + (i64)to_row * rows + to_column) = make_uint4(words[0], words[1], words[2], words[3]);
}
