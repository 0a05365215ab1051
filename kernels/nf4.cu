// 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv 2305.14314), as bitsandbytes stores it.
//
// Blocks of 64 values: scale = max |x|, code = nearest level of x / scale; two codes a byte, the first in the
// upper half. Scales: offset = their mean; blocks of 256 of (scale - offset), each divided by its largest
// magnitude and coded into the signed dynamic table of 256 values.

__device__ const float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Halfway points between levels, as bitsandbytes' decision tree has them.
__device__ const float NF4_BOUNDS[15] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
    0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};

__device__ __forceinline__ u32 nf4_code(float x) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) code += x > NF4_BOUNDS[i] ? 1 : 0;
    return code;
}

// One warp a block of 64 values, a pair a lane. `from` holds `elements` values of checkpoint type 0 f32, 1 f16,
// 2 bf16 and starts at a whole block.
extern "C" __global__ void nf4_quantize(const void* from, int type, u8* codes, float* scales, i64 elements) {
    i64 block = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
    int lane = threadIdx.x & 31;
    i64 at = block * 64 + lane * 2;
    if (block * 64 >= elements) return;
    float a = at < elements ? checkpoint_value(from, type, at) : 0.0f;
    float b = at + 1 < elements ? checkpoint_value(from, type, at + 1) : 0.0f;
    float scale = warp_max(fmaxf(fabsf(a), fabsf(b)));
    float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (at < elements) codes[at / 2] = (u8)(nf4_code(a * inverse) << 4 | nf4_code(b * inverse));
    if (lane == 0) scales[block] = scale;
}

// offset = mean of the scales, by one block in a fixed order.
extern "C" __global__ void nf4_offset(const float* scales, float* offset, i64 count) {
    __shared__ double partial[1024];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += (double)scales[i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *offset = (float)(partial[0] / (double)count);
}

__device__ __forceinline__ u8 nearest(const float* table, float x) {
    int low = 0, high = 255;
    if (x <= table[0]) return 0;
    if (x >= table[255]) return 255;
    while (high - low > 1) {
        int middle = (low + high) >> 1;
        if (table[middle] <= x) low = middle;
        else high = middle;
    }
    return x - table[low] < table[high] - x ? (u8)low : (u8)high;
}

// One block of 256 threads a block of 256 scales. `table`: the signed dynamic map.
extern "C" __global__ void nf4_quantize_scales(const float* scales, const float* offset, const float* table, u8* codes,
                                               float* second_scales, i64 count) {
    __shared__ float shared[32];
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x;
    float x = at < count ? scales[at] - *offset : 0.0f;
    float top = block_max(fabsf(x), shared);
    float inverse = top > 0.0f ? 1.0f / top : 0.0f;
    if (at < count) codes[at] = nearest(table, x * inverse);
    if (threadIdx.x == 0) second_scales[blockIdx.x] = top;
}

// Columns [first_column, first_column + columns) of rows [first_row, first_row + rows) of a weight with `row_length`
// columns, as bf16 rows `stride` apart. All three column figures are multiples of 64.
// One thread 8 values in each of 8 rows, four rows' loads in flight; grid: (ceil(columns / 8 / blockDim.x), ceil(rows / 8)).
extern "C" __global__ void __launch_bounds__(128)
    nf4_dequantize(const u8* codes, const u8* scale_codes, const float* second_scales, const float* offset,
                   const float* table, bf16* to, i64 stride, i64 row_length, i64 first_row, i64 first_column, int columns,
                   int rows) {
    // Tables for each lane's bank: no conflicts whatever the codes.
    __shared__ float levels[16 * 32];
    for (int i = threadIdx.x; i < 512; i += blockDim.x) levels[i] = NF4_LEVELS[i >> 5];
    __syncthreads();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (column >= columns) return;
    int lane = threadIdx.x & 31;
    float mean = *offset;
    for (int row = blockIdx.y * 8; row < min(rows, (int)blockIdx.y * 8 + 8); row += 4) {
        u32 packed[4];
        float scale[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            // Past the last row the last is read again.
            i64 element = (first_row + min(row + r, rows - 1)) * row_length + first_column + column;
            i64 block = element >> 6;
            packed[r] = *(const u32*)(codes + (element >> 1));
            scale[r] = table[scale_codes[block]] * second_scales[block >> 8] + mean;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float x[8];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 byte = packed[r] >> (8 * i);
                x[2 * i] = levels[((byte >> 4) & 15) * 32 + lane] * scale[r];
                x[2 * i + 1] = levels[(byte & 15) * 32 + lane] * scale[r];
            }
            if (row + r < rows) store<8>(to + (row + r) * stride + column, x);
        }
    }
}

// Any shape, one value a thread: whole rows [first_row, ...) of the weight, `elements` in all, to rows `stride` apart.
extern "C" __global__ void nf4_dequantize_any(const u8* codes, const u8* scale_codes, const float* second_scales,
                                              const float* offset, const float* table, bf16* to, i64 stride,
                                              i64 row_length, i64 first_element, i64 elements) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    i64 element = first_element + i, block = element >> 6;
    float scale = table[scale_codes[block]] * second_scales[block >> 8] + *offset;
    u32 byte = codes[element >> 1];
    u32 code = element & 1 ? byte & 15 : byte >> 4;
    to[i / row_length * stride + i % row_length] = to_bf16(NF4_LEVELS[code] * scale);
}
