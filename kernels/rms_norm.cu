// RMSNorm with residual (Zhang & Sennrich 2019, arXiv 1910.07467), forward and backward.
//
//   x = input + residual;  r = 1 / sqrt(mean(x^2) + epsilon);  output = x r (offset + weight)
//   n = x r;  d = grad_output (offset + weight)
//   grad_input = residual_grad + r (d - n mean(d n));  grad_weight += sum_t grad_output n
//
// One block a row. The second pass over a row finds it in the L1 cache.

template <int V, class W>
__device__ __forceinline__ void rms_norm(const bf16* input, const bf16* residual, bf16* sum, const W* weight,
                                         bf16* output, i64 output_stride, float* inverse_rms, int columns,
                                         float epsilon, float offset) {
    __shared__ float shared[32];
    i64 base = (i64)blockIdx.x * columns;
    float squares = 0.0f;
    for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
        float x[V];
        load<V>(input + base + column, x);
        if (residual) {
            float other[V];
            load<V>(residual + base + column, other);
#pragma unroll
            for (int i = 0; i < V; i++) x[i] = round_bf16(x[i] + other[i]);
            store<V>(sum + base + column, x);
        }
#pragma unroll
        for (int i = 0; i < V; i++) squares += x[i] * x[i];
    }
    squares = block_sum(squares, shared);
    float inverse = 1.0f / sqrtf(squares / (float)columns + epsilon);
    if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
    for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
        float x[V], w[V];
        load<V>(input + base + column, x);
        if (residual) {
            float other[V];
            load<V>(residual + base + column, other);
#pragma unroll
            for (int i = 0; i < V; i++) x[i] = round_bf16(x[i] + other[i]);
        }
        load<V>(weight + column, w);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = x[i] * inverse * (offset + w[i]);
        store<V>(output + blockIdx.x * output_stride + column, x);
    }
}

template <int V, class W>
__device__ __forceinline__ void rms_norm_backward(const bf16* grad_output, const bf16* input, const W* weight,
                                                  const float* inverse_rms, const bf16* residual_grad,
                                                  i64 residual_stride, bf16* grad_input, i64 grad_stride, int columns,
                                                  float offset) {
    __shared__ float shared[32];
    i64 base = (i64)blockIdx.x * columns;
    float inverse = inverse_rms[blockIdx.x];
    float dot = 0.0f;
    for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
        float g[V], x[V], w[V];
        load<V>(grad_output + base + column, g);
        load<V>(input + base + column, x);
        load<V>(weight + column, w);
#pragma unroll
        for (int i = 0; i < V; i++) dot += g[i] * (offset + w[i]) * (x[i] * inverse);
    }
    float mean = block_sum(dot, shared) / (float)columns;
    for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
        float g[V], x[V], w[V], out[V];
        load<V>(grad_output + base + column, g);
        load<V>(input + base + column, x);
        load<V>(weight + column, w);
#pragma unroll
        for (int i = 0; i < V; i++) out[i] = inverse * (g[i] * (offset + w[i]) - x[i] * inverse * mean);
        if (residual_grad) {
            float other[V];
            load<V>(residual_grad + blockIdx.x * residual_stride + column, other);
#pragma unroll
            for (int i = 0; i < V; i++) out[i] += other[i];
        }
        store<V>(grad_input + blockIdx.x * grad_stride + column, out);
    }
}

#define RMS_NORM(NAME, V, W)                                                                                       \
    extern "C" __global__ void rms_norm_##NAME(const bf16* input, const bf16* residual, bf16* sum, const W* weight, \
                                               bf16* output, i64 output_stride, float* inverse_rms, int columns,    \
                                               float epsilon, float offset) {                                       \
        rms_norm<V, W>(input, residual, sum, weight, output, output_stride, inverse_rms, columns, epsilon, offset); \
    }                                                                                                               \
    extern "C" __global__ void rms_norm_backward_##NAME(                                                            \
        const bf16* grad_output, const bf16* input, const W* weight, const float* inverse_rms,                      \
        const bf16* residual_grad, i64 residual_stride, bf16* grad_input, i64 grad_stride, int columns,             \
        float offset) {                                                                                             \
        rms_norm_backward<V, W>(grad_output, input, weight, inverse_rms, residual_grad, residual_stride,            \
                                grad_input, grad_stride, columns, offset);                                          \
    }

// Vector width, then the type of the weight.
RMS_NORM(8_bf16, 8, bf16)
RMS_NORM(1_bf16, 1, bf16)
RMS_NORM(8_f32, 8, float)
RMS_NORM(1_f32, 1, float)

// Partial sums of grad_weight: block (column tile, chunk of rows), one thread a column.
// partial: [gridDim.y, columns].
extern "C" __global__ void rms_norm_grad_weight(const bf16* grad_output, const bf16* input, const float* inverse_rms,
                                                float* partial, int rows, int columns, int rows_per_chunk) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    int first = blockIdx.y * rows_per_chunk;
    int last = min(rows, first + rows_per_chunk);
    float sum = 0.0f;
    for (int row = first; row < last; row++) {
        i64 at = (i64)row * columns + column;
        sum += to_float(grad_output[at]) * to_float(input[at]) * inverse_rms[row];
    }
    partial[(i64)blockIdx.y * columns + column] = sum;
}
