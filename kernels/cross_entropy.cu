// Cross-entropy on one chunk of logits, and the gradient of the logits in their place.
//
//   z = softcap(logits);  loss = logsumexp(z) - z[target], 0 where target < 0
//   dz = scale weight (softmax(z) - onehot(target));  dlogits = dz (1 - (z/c)^2) with a softcap c
//
// One block a row. Maximum and sum of exponentials are found in one pass (Milakov & Gimelshein 2018, arXiv 1805.02867).
// `stride` is the distance between rows of logits, a multiple of V.

__device__ __forceinline__ float capped(float x, float cap) { return cap > 0.0f ? cap * tanhf(x / cap) : x; }

// Joins (maximum, sum of exp(z - maximum)) pairs.
__device__ __forceinline__ void join(float& maximum, float& sum, float other_maximum, float other_sum) {
    float top = fmaxf(maximum, other_maximum);
    float a = maximum == -INFINITY_F ? 0.0f : sum * __expf(maximum - top);
    float b = other_maximum == -INFINITY_F ? 0.0f : other_sum * __expf(other_maximum - top);
    maximum = top;
    sum = a + b;
}

template <int V, class L>
__device__ __forceinline__ void cross_entropy(L* logits, i64 stride, const int* targets, const float* token_weights,
                                              const float* scale, float* losses, int vocabulary, float cap,
                                              int backward) {
    __shared__ float shared_maximum[32], shared_sum[32];
    L* row = logits + (i64)blockIdx.x * stride;
    int target = targets[blockIdx.x];
    if (target >= vocabulary) target = -1;
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        if (backward) {
            for (int column = threadIdx.x * V; column < vocabulary; column += blockDim.x * V) {
                float zero[V];
#pragma unroll
                for (int i = 0; i < V; i++) zero[i] = 0.0f;
                store<V>(row + column, zero);
            }
        }
        return;
    }
    float target_logit = capped(to_float(row[target]), cap);
    float maximum = -INFINITY_F, sum = 0.0f;
    for (int column = threadIdx.x * V; column < vocabulary; column += blockDim.x * V) {
        float z[V];
        load<V>(row + column, z);
        float top = -INFINITY_F;
        if (cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < V; i++) z[i] = cap * tanhf(z[i] / cap);
        }
#pragma unroll
        for (int i = 0; i < V; i++) top = fmaxf(top, z[i]);
        if (top > maximum) {
            sum *= __expf(maximum - top);
            maximum = top;
        }
#pragma unroll
        for (int i = 0; i < V; i++) sum += __expf(z[i] - maximum);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        float other_maximum = __shfl_xor_sync(0xffffffffu, maximum, offset);
        float other_sum = __shfl_xor_sync(0xffffffffu, sum, offset);
        join(maximum, sum, other_maximum, other_sum);
    }
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    if (lane == 0) shared_maximum[warp] = maximum, shared_sum[warp] = sum;
    // Also orders every read of row[target] before the writes below.
    __syncthreads();
    maximum = shared_maximum[0], sum = shared_sum[0];
    for (int w = 1; w < warps; w++) join(maximum, sum, shared_maximum[w], shared_sum[w]);
    float log_sum = maximum + logf(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = log_sum - target_logit;
    if (!backward) return;
    float weight = *scale * token_weights[blockIdx.x];
    for (int column = threadIdx.x * V; column < vocabulary; column += blockDim.x * V) {
        float z[V];
        load<V>(row + column, z);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float value = capped(z[i], cap);
            float slope = cap > 0.0f ? 1.0f - (value / cap) * (value / cap) : 1.0f;
            float probability = __expf(value - log_sum);
            z[i] = weight * slope * (probability - (column + i == target ? 1.0f : 0.0f));
        }
        store<V>(row + column, z);
    }
}

#define CROSS_ENTROPY(NAME, V, L)                                                                                 \
    extern "C" __global__ void cross_entropy_##NAME(L* logits, i64 stride, const int* targets,                    \
                                                    const float* token_weights, const float* scale, float* losses, \
                                                    int vocabulary, float cap, int backward) {                    \
        cross_entropy<V, L>(logits, stride, targets, token_weights, scale, losses, vocabulary, cap, backward);    \
    }

CROSS_ENTROPY(8_bf16, 8, bf16)
CROSS_ENTROPY(1_bf16, 1, bf16)
CROSS_ENTROPY(8_f32, 8, float)
CROSS_ENTROPY(1_f32, 1, float)

// loss_sum += scale sum_t token_weights[t] losses[t], by one block in a fixed order.
extern "C" __global__ void loss_sum(const float* losses, const int* targets, const float* token_weights,
                                    const float* scale, float* result, int tokens) {
    __shared__ double partial[1024];
    double sum = 0.0;
    for (int token = threadIdx.x; token < tokens; token += blockDim.x)
        if (targets[token] >= 0) sum += (double)token_weights[token] * (double)losses[token];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *result += (float)((double)*scale * partial[0]);
}
