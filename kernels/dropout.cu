// Dropout on the input of a LoRA branch, with a mask that is a pure function of key, stream, token and column.
//
//   kept(t, c) = uniform(key, stream, t, c) >= probability;  drop(x) = x / (1 - probability) where kept, else 0
//
// Grid: (rows of this chunk, column tiles).

// to[row, c] = drop(from[first_row + row, c]); `from` points at row `first_row`.
extern "C" __global__ void dropout(const bf16* from, bf16* to, const u32* key, u32 stream, int first_row, int columns,
                                   float probability, float factor) {
    u32 prefix = random_prefix(key, stream);
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    i64 at = (i64)blockIdx.x * columns + column;
    bool kept = random_uniform(prefix, (u32)(first_row + blockIdx.x), (u32)column) >= probability;
    to[at] = to_bf16(kept ? to_float(from[at]) * factor : 0.0f);
}

// to[row, c] += drop'(from[row, c]): the mask on the gradient.
extern "C" __global__ void dropout_backward(const bf16* from, bf16* to, const u32* key, u32 stream, int first_row,
                                            int columns, float probability, float factor) {
    u32 prefix = random_prefix(key, stream);
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    i64 at = (i64)blockIdx.x * columns + column;
    bool kept = random_uniform(prefix, (u32)(first_row + blockIdx.x), (u32)column) >= probability;
    float value = kept ? to_float(from[at]) * factor : 0.0f;
    to[at] = to_bf16(to_float(to[at]) + value);
}
