// matrix[row, c] += bias[c], after the product. Grid: (rows, column tiles).

template <class B>
__device__ __forceinline__ void add(bf16* matrix, i64 stride, const B* bias, int columns) {
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    bf16* to = matrix + blockIdx.x * stride + column;
    *to = to_bf16(to_float(*to) + to_float(bias[column]));
}

extern "C" __global__ void bias_bf16(bf16* matrix, i64 stride, const bf16* bias, int columns) {
    add(matrix, stride, bias, columns);
}

extern "C" __global__ void bias_f32(bf16* matrix, i64 stride, const float* bias, int columns) {
    add(matrix, stride, bias, columns);
}
