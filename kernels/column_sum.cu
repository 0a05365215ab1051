// Sums over rows in two launches, the same on every run: partial sums of chunks of rows, then the chunks in order.

// partial[chunk, c] = sum of matrix[row, c] over the chunk's rows. `matrix` points at the first column of a block of
// `columns` columns; `stride` is the distance between rows.
extern "C" __global__ void column_sum_partial(const bf16* matrix, i64 stride, float* partial, int rows, int columns,
                                              int rows_per_chunk) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    int first = blockIdx.y * rows_per_chunk;
    int last = min(rows, first + rows_per_chunk);
    float sum = 0.0f;
    for (int row = first; row < last; row++) sum += to_float(matrix[row * stride + column]);
    partial[(i64)blockIdx.y * columns + column] = sum;
}

// result[c] += sum of partial[chunk, c].
extern "C" __global__ void column_sum_finish(const float* partial, float* result, int chunks, int columns) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = 0.0f;
    for (int chunk = 0; chunk < chunks; chunk++) sum += partial[(i64)chunk * columns + column];
    result[column] += sum;
}
