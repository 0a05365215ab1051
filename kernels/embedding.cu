// Embedding lookup and its gradient; rows by index.
//
//   output[t] = scale weight[ids[t]];  grad_weight[ids[t]] += scale grad_output[t], in the order of t

template <int V, class W>
__device__ __forceinline__ void gather(const int* ids, const W* from, bf16* output, int columns, int rows,
                                       float scale) {
    int id = ids[blockIdx.x];
    // An id outside the table would read foreign memory; such a row is NaN, which the loss then shows.
    bool valid = id >= 0 && id < rows;
    const W* source = from + (i64)(valid ? id : 0) * columns;
    bf16* target = output + (i64)blockIdx.x * columns;
    for (int column = threadIdx.x * V; column < columns; column += blockDim.x * V) {
        float x[V];
        load<V>(source + column, x);
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = valid ? x[i] * scale : __int_as_float(0x7fffffff);
        store<V>(target + column, x);
    }
}

#define GATHER(NAME, V, W)                                                                                       \
    extern "C" __global__ void embedding_##NAME(const int* ids, const W* from, bf16* output, int columns,        \
                                                int rows, float scale) {                                         \
        gather<V, W>(ids, from, output, columns, rows, scale);                                                   \
    }

GATHER(8_bf16, 8, bf16)
GATHER(1_bf16, 1, bf16)
GATHER(8_f32, 8, float)
GATHER(1_f32, 1, float)

// Grid: (tokens, column tiles of blockDim.x). The block of the first token with an id sums all tokens that carry
// it, in order; the other blocks leave. No two blocks write the same element.
template <class G>
__device__ __forceinline__ void embedding_backward(const int* ids, const bf16* grad_output, G* grad_weight, int tokens,
                                                   int columns, int rows, float scale) {
    __shared__ int matches[1024];
    __shared__ int counts[32];
    int token = blockIdx.x, id = ids[token];
    if (id < 0 || id >= rows) return;
    bool earlier = false;
    for (int other = threadIdx.x; other < token; other += blockDim.x) earlier |= ids[other] == id;
    if (__syncthreads_or(earlier)) return;
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    float sum = 0.0f;
    for (int first = token; first < tokens; first += blockDim.x) {
        int other = first + threadIdx.x;
        bool match = other < tokens && ids[other] == id;
        u32 ballot = __ballot_sync(0xffffffffu, match);
        if (lane == 0) counts[warp] = __popc(ballot);
        __syncthreads();
        int before = 0, total = 0;
        for (int w = 0; w < warps; w++) {
            if (w < warp) before += counts[w];
            total += counts[w];
        }
        if (match) matches[before + __popc(ballot & ((1u << lane) - 1u))] = other;
        __syncthreads();
        if (column < columns)
            for (int i = 0; i < total; i++) sum += to_float(grad_output[(i64)matches[i] * columns + column]);
        __syncthreads();
    }
    if (column < columns) {
        G* to = grad_weight + (i64)id * columns + column;
        store_value(to, to_float(*to) + scale * sum);
    }
}

#define EMBEDDING_BACKWARD(NAME, G)                                                                              \
    extern "C" __global__ void embedding_backward_##NAME(const int* ids, const bf16* grad_output, G* grad_weight, \
                                                         int tokens, int columns, int rows, float scale) {       \
        embedding_backward<G>(ids, grad_output, grad_weight, tokens, columns, rows, scale);                      \
    }

EMBEDDING_BACKWARD(f32, float)
EMBEDDING_BACKWARD(bf16, bf16)
