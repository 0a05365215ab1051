// SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202), forward and backward.
//
//   output = f(gate) up;  grad_gate = grad_output up f'(gate);  grad_up = grad_output f(gate);  f is in glu.cuh
//
// Grid: (rows, column tiles). gate_up rows hold `columns` gate values, then as many up values, and lie `stride` apart.

template <int V, int GELU>
__device__ __forceinline__ void glu(const bf16* gate_up, i64 stride, bf16* output, i64 output_stride, int columns) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (column >= columns) return;
    const bf16* row = gate_up + blockIdx.x * stride;
    float gate[V], up[V];
    load<V>(row + column, gate);
    load<V>(row + columns + column, up);
#pragma unroll
    for (int i = 0; i < V; i++) {
        float value, slope;
        activation<GELU>(gate[i], value, slope);
        up[i] *= value;
    }
    store<V>(output + blockIdx.x * output_stride + column, up);
}

template <int V, int GELU>
__device__ __forceinline__ void glu_backward(const bf16* grad_output, const bf16* gate_up, i64 stride,
                                             bf16* grad_gate_up, i64 grad_stride, int columns) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (column >= columns) return;
    const bf16* row = gate_up + blockIdx.x * stride;
    bf16* grad_row = grad_gate_up + blockIdx.x * grad_stride;
    float gate[V], up[V], grad[V];
    load<V>(row + column, gate);
    load<V>(row + columns + column, up);
    load<V>(grad_output + (i64)blockIdx.x * columns + column, grad);
#pragma unroll
    for (int i = 0; i < V; i++) {
        float value, slope;
        activation<GELU>(gate[i], value, slope);
        gate[i] = grad[i] * up[i] * slope;
        up[i] = grad[i] * value;
    }
    store<V>(grad_row + column, gate);
    store<V>(grad_row + columns + column, up);
}

#define GLU(NAME, V, GELU)                                                                                \
    extern "C" __global__ void glu_##NAME(const bf16* gate_up, i64 stride, bf16* output,                  \
                                          i64 output_stride, int columns) {                               \
        glu<V, GELU>(gate_up, stride, output, output_stride, columns);                                    \
    }                                                                                                     \
    extern "C" __global__ void glu_backward_##NAME(const bf16* grad_output, const bf16* gate_up,          \
                                                   i64 stride, bf16* grad_gate_up, i64 grad_stride,       \
                                                   int columns) {                                         \
        glu_backward<V, GELU>(grad_output, gate_up, stride, grad_gate_up, grad_stride, columns);          \
    }

GLU(8_silu, 8, 0)
GLU(1_silu, 1, 0)
GLU(8_gelu, 8, 1)
GLU(1_gelu, 1, 1)
