// Gradient norm and AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) over sets of tensors.
//
//   norm = sqrt(sum g^2);  c = min(1, max_norm / (norm + 1e-6)), 1 when max_norm is 0;  g = c gradient
//   p -= rate weight_decay p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   p -= rate / correction1 m / (sqrt(v) / correction2 + epsilon)   (correction2 is a square root already)
//
// Nothing changes when the norm is not finite. 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861): blocks of
// 256 codes into a dynamic table, one f32 scale a block. bf16 parameters are rounded stochastically.

struct AdamPart {
    void* parameter;
    const float* gradient;
    void* first_moment;
    void* second_moment;
    // Scales of 8-bit moments.
    float* first_scale;
    float* second_scale;
    u64 elements;
    u32 stream;
    u32 unused;
};

struct NormPart {
    const float* gradient;
    u64 elements;
};

struct Piece {
    u32 part;
    u32 index;
};

__device__ __forceinline__ double block_sum_double(double x, double* shared) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    double sum = 0.0;
    for (int w = 0; w < warps; w++) sum += shared[w];
    __syncthreads();
    return sum;
}

// One block of 256 threads a piece of 8192 elements.
extern "C" __global__ void gradient_norm_partial(const NormPart* parts, const Piece* pieces, double* partial) {
    __shared__ double shared[32];
    Piece piece = pieces[blockIdx.x];
    NormPart part = parts[piece.part];
    u64 first = (u64)piece.index * 8192;
    float sum = 0.0f;
    if (first + 8192 <= part.elements && ((u64)part.gradient & 15) == 0) {
        const float4* from = (const float4*)(part.gradient + first);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 g = from[i * 256 + threadIdx.x];
            sum += g.x * g.x + g.y * g.y + g.z * g.z + g.w * g.w;
        }
    } else {
        for (int i = 0; i < 32; i++) {
            u64 at = first + i * 256 + threadIdx.x;
            if (at < part.elements) sum += part.gradient[at] * part.gradient[at];
        }
    }
    double total = block_sum_double((double)sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block.
extern "C" __global__ void gradient_norm_finish(const double* partial, int count, float* norm) {
    __shared__ double shared[32];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

__device__ __forceinline__ void update_parameter(float* parameter, float value, u32, u64, u64) { *parameter = value; }

// Adds 16 random bits below the kept ones and truncates: the expectation is the value.
__device__ __forceinline__ void update_parameter(bf16* parameter, float value, u32 prefix, u64 at, u64) {
    u32 bits = __float_as_uint(value);
    u32 random = random_bits(prefix, (u32)(at >> 32), (u32)at) & 0xffffu;
    // Infinities and NaN have no neighbours to round to.
    if ((bits & 0x7f800000u) != 0x7f800000u) bits += random;
    parameter->bits = (u16)(bits >> 16);
}

struct Step {
    float rate, correction1, correction2, clip, beta1, beta2, epsilon, weight_decay;
};

__device__ __forceinline__ float adamw_value(float p, float g, float& m, float& v, const Step& s) {
    g *= s.clip;
    p -= s.rate * s.weight_decay * p;
    m = s.beta1 * m + (1.0f - s.beta1) * g;
    v = s.beta2 * v + (1.0f - s.beta2) * g * g;
    return p - s.rate / s.correction1 * m / (sqrtf(v) / s.correction2 + s.epsilon);
}

__device__ __forceinline__ bool begin_step(Step& s, const float* norm, const float* hyper, float beta1, float beta2,
                                           float epsilon, float weight_decay, float max_norm) {
    float n = *norm;
    if (!(n < INFINITY_F)) return false;
    s.rate = hyper[0], s.correction1 = hyper[1], s.correction2 = hyper[2];
    s.clip = max_norm > 0.0f ? fminf(1.0f, max_norm / (n + 1e-6f)) : 1.0f;
    s.beta1 = beta1, s.beta2 = beta2, s.epsilon = epsilon, s.weight_decay = weight_decay;
    return true;
}

// One block of 256 threads a piece of 2048 elements, moments in f32.
template <class P>
__device__ __forceinline__ void adamw(const AdamPart* parts, const Piece* pieces, const float* norm,
                                      const float* hyper, const u32* key, float beta1, float beta2, float epsilon,
                                      float weight_decay, float max_norm) {
    Step step;
    if (!begin_step(step, norm, hyper, beta1, beta2, epsilon, weight_decay, max_norm)) return;
    Piece piece = pieces[blockIdx.x];
    AdamPart part = parts[piece.part];
    u32 prefix = random_prefix(key, part.stream);
    P* parameter = (P*)part.parameter;
    float* first = (float*)part.first_moment;
    float* second = (float*)part.second_moment;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = (u64)piece.index * 2048 + i * 256 + threadIdx.x;
        if (at >= part.elements) continue;
        float m = first[at], v = second[at];
        float value = adamw_value(to_float(parameter[at]), part.gradient[at], m, v, step);
        first[at] = m;
        second[at] = v;
        update_parameter(parameter + at, value, prefix, at, part.elements);
    }
}

// Code of the entry of an ascending table of 256 that is nearest to x.
__device__ __forceinline__ u8 nearest(const float* table, float x) {
    int low = 0, high = 255;
    // table[low] <= x < table[high] once the ends are ruled out.
    if (x <= table[0]) return 0;
    if (x >= table[255]) return 255;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int middle = (low + high) >> 1;
        if (high - low > 1) {
            if (table[middle] <= x) low = middle;
            else high = middle;
        }
    }
    return x - table[low] < table[high] - x ? (u8)low : (u8)high;
}

// The same with 8-bit moments: one warp a block of 256 codes, 8 a lane.
// `tables`: 256 signed values for the first moment, then 256 unsigned ones for the second.
template <class P>
__device__ __forceinline__ void adamw8(const AdamPart* parts, const Piece* pieces, const float* norm,
                                       const float* hyper, const u32* key, const float* tables, float beta1,
                                       float beta2, float epsilon, float weight_decay, float max_norm) {
    __shared__ float table[512];
    table[threadIdx.x] = tables[threadIdx.x];
    table[256 + threadIdx.x] = tables[256 + threadIdx.x];
    __syncthreads();
    Step step;
    if (!begin_step(step, norm, hyper, beta1, beta2, epsilon, weight_decay, max_norm)) return;
    Piece piece = pieces[blockIdx.x];
    AdamPart part = parts[piece.part];
    u64 block = (u64)piece.index * 8 + (threadIdx.x >> 5);
    u64 start = block * 256;
    if (start >= part.elements) return;
    u32 prefix = random_prefix(key, part.stream);
    P* parameter = (P*)part.parameter;
    u8* first = (u8*)part.first_moment;
    u8* second = (u8*)part.second_moment;
    float first_scale = part.first_scale[block], second_scale = part.second_scale[block];
    float m[8], v[8];
    float m_top = 0.0f, v_top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = start + i * 32 + (threadIdx.x & 31);
        m[i] = 0.0f, v[i] = 0.0f;
        if (at >= part.elements) continue;
        m[i] = table[first[at]] * first_scale;
        v[i] = table[256 + second[at]] * second_scale;
        float value = adamw_value(to_float(parameter[at]), part.gradient[at], m[i], v[i], step);
        update_parameter(parameter + at, value, prefix, at, part.elements);
        m_top = fmaxf(m_top, fabsf(m[i]));
        v_top = fmaxf(v_top, v[i]);
    }
    m_top = warp_max(m_top);
    v_top = warp_max(v_top);
    float m_inverse = m_top > 0.0f ? 1.0f / m_top : 0.0f, v_inverse = v_top > 0.0f ? 1.0f / v_top : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = start + i * 32 + (threadIdx.x & 31);
        if (at >= part.elements) continue;
        first[at] = nearest(table, m[i] * m_inverse);
        second[at] = nearest(table + 256, v[i] * v_inverse);
    }
    if ((threadIdx.x & 31) == 0) {
        part.first_scale[block] = m_top;
        part.second_scale[block] = v_top;
    }
}

#define ADAMW(NAME, P)                                                                                               \
    extern "C" __global__ void adamw_##NAME(const AdamPart* parts, const Piece* pieces, const float* norm,           \
                                            const float* hyper, const u32* key, const float* tables, float beta1,    \
                                            float beta2, float epsilon, float weight_decay, float max_norm) {        \
        adamw<P>(parts, pieces, norm, hyper, key, beta1, beta2, epsilon, weight_decay, max_norm);                    \
    }                                                                                                                \
    extern "C" __global__ void adamw8_##NAME(const AdamPart* parts, const Piece* pieces, const float* norm,          \
                                             const float* hyper, const u32* key, const float* tables, float beta1,   \
                                             float beta2, float epsilon, float weight_decay, float max_norm) {       \
        adamw8<P>(parts, pieces, norm, hyper, key, tables, beta1, beta2, epsilon, weight_decay, max_norm);           \
    }

ADAMW(f32, float)
ADAMW(bf16, bf16)
