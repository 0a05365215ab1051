// matrix[row, c] = bias[c]: the start of a product that adds to it. Grid: (rows, column tiles).

template <class B>
__device__ __forceinline__ void broadcast(bf16* matrix, i64 stride, const B* bias, int columns) {
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column < columns) matrix[blockIdx.x * stride + column] = to_bf16(to_float(bias[column]));
}

extern "C" __global__ void bias_bf16(bf16* matrix, i64 stride, const bf16* bias, int columns) {
    broadcast(matrix, stride, bias, columns);
}

extern "C" __global__ void bias_f32(bf16* matrix, i64 stride, const float* bias, int columns) {
    broadcast(matrix, stride, bias, columns);
}
