// Rotary position embedding in place (Su et al. 2021, arXiv 2104.09864), half-split layout: dimension i is paired
// with i + rotary_dim / 2. For pair (a, b) and angle p f_i: (a cos - b sin, b cos + a sin); backward turns the
// other way.
//
// One block a token; cosines and sines are computed once for all heads. Dynamic shared memory: rotary_dim floats.

template <int V>
__device__ __forceinline__ void rope(bf16* tensor, i64 stride, const int* positions, const float* inverse_frequency,
                                     int heads, int head_dim, int half, float scale, float direction) {
    extern __shared__ float table[];
    float position = (float)positions[blockIdx.x];
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float sine, cosine;
        sincosf(position * inverse_frequency[i], &sine, &cosine);
        table[i] = cosine * scale;
        table[half + i] = sine * scale * direction;
    }
    __syncthreads();
    bf16* row = tensor + blockIdx.x * stride;
    int vectors = half / V;
    for (int item = threadIdx.x; item < heads * vectors; item += blockDim.x) {
        int head = item / vectors, i = (item % vectors) * V;
        bf16* first = row + (i64)head * head_dim + i;
        float a[V], b[V], x[V], y[V];
        load<V>(first, a);
        load<V>(first + half, b);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float cosine = table[i + j], sine = table[half + i + j];
            x[j] = a[j] * cosine - b[j] * sine;
            y[j] = b[j] * cosine + a[j] * sine;
        }
        store<V>(first, x);
        store<V>(first + half, y);
    }
}

extern "C" __global__ void rope_8(bf16* tensor, i64 stride, const int* positions, const float* inverse_frequency,
                                  int heads, int head_dim, int half, float scale, float direction) {
    rope<8>(tensor, stride, positions, inverse_frequency, heads, head_dim, half, scale, direction);
}

extern "C" __global__ void rope_1(bf16* tensor, i64 stride, const int* positions, const float* inverse_frequency,
                                  int heads, int head_dim, int half, float scale, float direction) {
    rope<1>(tensor, stride, positions, inverse_frequency, heads, head_dim, half, scale, direction);
}
