// Attention of generation over a key-value cache.
//
// `cache_append` stores the keys and values of rows 0..T of `qkv` at positions start..start + T.
// `cached_attention`: row t attends to positions max(0, p - window + 1)..=p with p = start + t, softmax of
// softcap(scale q·k), online over positions (Dao 2023, arXiv 2307.08691). One block a (token, query head): warps
// take positions in turn and are joined at the end, in a fixed order.

// Grid: (tokens, column tiles).
extern "C" __global__ void cache_append(const bf16* qkv, bf16* cache_key, bf16* cache_value, const int* start,
                                        int columns, int query_columns, int kv_columns, int capacity) {
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    int position = *start + blockIdx.x;
    if (column >= kv_columns || position >= capacity) return;
    const bf16* row = qkv + (i64)blockIdx.x * columns + query_columns;
    i64 at = (i64)position * kv_columns + column;
    cache_key[at] = row[column];
    cache_value[at] = row[kv_columns + column];
}

// Grid: (tokens, heads), 128 threads. Lane l holds dimensions l, l + 32, ...: head_dim at most 256.
extern "C" __global__ void __launch_bounds__(128)
    cached_attention(const bf16* qkv, const bf16* cache_key, const bf16* cache_value, const int* start, bf16* output,
                     i64 output_stride, int heads, int kv_heads, int head_dim, int capacity, float scale, int window, float cap) {
    __shared__ float shared_maximum[4], shared_sum[4], shared_output[4][256];
    int token = blockIdx.x, head = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int kv_head = head / (heads / kv_heads);
    i64 columns = (i64)(heads + 2 * kv_heads) * head_dim, kv_columns = (i64)kv_heads * head_dim;
    const bf16* query = qkv + token * columns + (i64)head * head_dim;
    int last = min(*start + token, capacity - 1);
    int first = window > 0 ? max(0, last - window + 1) : 0;
    float q[8], sum_values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int d = lane + 32 * i;
        q[i] = d < head_dim ? to_float(query[d]) * scale : 0.0f;
        sum_values[i] = 0.0f;
    }
    float maximum = -INFINITY_F, sum = 0.0f;
    for (int position = first + warp; position <= last; position += 4) {
        i64 at = position * kv_columns + (i64)kv_head * head_dim;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int d = lane + 32 * i;
            if (d < head_dim) score += q[i] * to_float(cache_key[at + d]);
        }
        score = warp_sum(score);
        if (cap > 0.0f) score = cap * tanhf(score / cap);
        float top = fmaxf(maximum, score);
        float correction = __expf(maximum - top), probability = __expf(score - top);
        sum = sum * correction + probability;
        maximum = top;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int d = lane + 32 * i;
            float value = d < head_dim ? to_float(cache_value[at + d]) : 0.0f;
            sum_values[i] = sum_values[i] * correction + probability * value;
        }
    }
    if (lane == 0) shared_maximum[warp] = maximum, shared_sum[warp] = sum;
#pragma unroll
    for (int i = 0; i < 8; i++) shared_output[warp][lane + 32 * i] = sum_values[i];
    __syncthreads();
    float top = -INFINITY_F, total = 0.0f;
    for (int w = 0; w < 4; w++) top = fmaxf(top, shared_maximum[w]);
    float factor[4];
    for (int w = 0; w < 4; w++) {
        factor[w] = shared_maximum[w] == -INFINITY_F ? 0.0f : __expf(shared_maximum[w] - top);
        total += shared_sum[w] * factor[w];
    }
    for (int d = threadIdx.x; d < head_dim; d += 128) {
        float value = 0.0f;
        for (int w = 0; w < 4; w++) value += shared_output[w][d] * factor[w];
        output[token * output_stride + head * head_dim + d] = to_bf16(value / total);
    }
}
