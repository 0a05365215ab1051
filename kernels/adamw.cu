// Gradient norm and AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) over sets of tensors.
//
//   norm = sqrt(sum g^2);  c = min(1, max_norm / (norm + 1e-6)), 1 when max_norm is 0;  g = c gradient
//   p -= rate weight_decay p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   p -= rate / correction1 m / (sqrt(v) / correction2 + epsilon)   (correction2 is a square root already)
//
// Nothing changes when the norm is not finite. 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861): blocks of
// 256 codes into a dynamic table, one f32 scale a block. bf16 parameters are rounded stochastically. Gradients are f32 or
// bf16, each part's own.

struct AdamPart {
    void* parameter;
    const void* gradient;
    void* first_moment;
    void* second_moment;
    // Scales of 8-bit moments.
    float* first_scale;
    float* second_scale;
    u64 elements;
    u32 stream;
    // Whether the gradient is bf16.
    u32 half;
};

struct NormPart {
    const void* gradient;
    u64 elements;
    u64 half;
};

__device__ __forceinline__ float gradient_at(const void* gradient, u32 half, u64 at) {
    return half ? to_float(((const bf16*)gradient)[at]) : ((const float*)gradient)[at];
}

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
    bool whole = first + 8192 <= part.elements && ((u64)part.gradient & 15) == 0;
    if (whole && part.half) {
        const bf16* from = (const bf16*)part.gradient + first;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float g[8];
            load<8>(from + (i * 256 + threadIdx.x) * 8, g);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += g[j] * g[j];
        }
    } else if (whole) {
        const float4* from = (const float4*)((const float*)part.gradient + first);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 g = from[i * 256 + threadIdx.x];
            sum += g.x * g.x + g.y * g.y + g.z * g.z + g.w * g.w;
        }
    } else {
        for (int i = 0; i < 32; i++) {
            u64 at = first + i * 256 + threadIdx.x;
            float g = at < part.elements ? gradient_at(part.gradient, part.half, at) : 0.0f;
            sum += g * g;
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

// What a parameter of this type takes of a value.
__device__ __forceinline__ float rounded(const float*, float value, u32, u64) { return value; }

// Adds 16 random bits below the kept ones and truncates: the expectation is the value.
__device__ __forceinline__ float rounded(const bf16*, float value, u32 prefix, u64 at) {
    u32 bits = __float_as_uint(value);
    u32 random = random_bits(prefix, (u32)(at >> 32), (u32)at) & 0xffffu;
    // Infinities and NaN have no neighbours to round to.
    if ((bits & 0x7f800000u) != 0x7f800000u) bits += random;
    return __uint_as_float(bits & 0xffff0000u);
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
        float value = adamw_value(to_float(parameter[at]), gradient_at(part.gradient, part.half, at), m, v, step);
        first[at] = m;
        second[at] = v;
        store_value(parameter + at, rounded(parameter, value, prefix, at));
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

__device__ __forceinline__ u8 byte_of(uint2 word, int i) { return (u8)((i < 4 ? word.x : word.y) >> (i & 3) * 8); }

// Codes of eight neighbours in one word.
__device__ __forceinline__ uint2 codes_of(const float* table, const float (&x)[8], float inverse) {
    uint2 word = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 code = nearest(table, x[i] * inverse);
        if (i < 4) word.x |= code << i * 8;
        else word.y |= code << (i - 4) * 8;
    }
    return word;
}

// The same with 8-bit moments: one warp a block of 256 codes, 8 a lane. Eight neighbours where the block is whole and
// aligned: one access of 8 bytes a lane, which moments in the host's memory need, for the bus carries long requests best.
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
    int lane = threadIdx.x & 31;
    u64 alignment = ((u64)first | (u64)second) & 7 | ((u64)parameter | (u64)part.gradient) & 15;
    if (start + 256 <= part.elements && alignment == 0) {
        u64 begin = start + lane * 8;
        uint2 first_codes = *(const uint2*)(first + begin), second_codes = *(const uint2*)(second + begin);
        float p[8], g[8];
        load<8>(parameter + begin, p);
        if (part.half) load<8>((const bf16*)part.gradient + begin, g);
        else load<8>((const float*)part.gradient + begin, g);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            m[i] = table[byte_of(first_codes, i)] * first_scale;
            v[i] = table[256 + byte_of(second_codes, i)] * second_scale;
            float value = adamw_value(p[i], g[i], m[i], v[i], step);
            p[i] = rounded(parameter, value, prefix, begin + i);
            m_top = fmaxf(m_top, fabsf(m[i]));
            v_top = fmaxf(v_top, v[i]);
        }
        store<8>(parameter + begin, p);
        m_top = warp_max(m_top);
        v_top = warp_max(v_top);
        float m_inverse = m_top > 0.0f ? 1.0f / m_top : 0.0f, v_inverse = v_top > 0.0f ? 1.0f / v_top : 0.0f;
        *(uint2*)(first + begin) = codes_of(table, m, m_inverse);
        *(uint2*)(second + begin) = codes_of(table + 256, v, v_inverse);
        if (lane == 0) {
            part.first_scale[block] = m_top;
            part.second_scale[block] = v_top;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = start + i * 32 + lane;
        m[i] = 0.0f, v[i] = 0.0f;
        if (at >= part.elements) continue;
        m[i] = table[first[at]] * first_scale;
        v[i] = table[256 + second[at]] * second_scale;
        float value = adamw_value(to_float(parameter[at]), gradient_at(part.gradient, part.half, at), m[i], v[i], step);
        store_value(parameter + at, rounded(parameter, value, prefix, at));
        m_top = fmaxf(m_top, fabsf(m[i]));
        v_top = fmaxf(v_top, v[i]);
    }
    m_top = warp_max(m_top);
    v_top = warp_max(v_top);
    float m_inverse = m_top > 0.0f ? 1.0f / m_top : 0.0f, v_inverse = v_top > 0.0f ? 1.0f / v_top : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = start + i * 32 + lane;
        if (at >= part.elements) continue;
        first[at] = nearest(table, m[i] * m_inverse);
        second[at] = nearest(table + 256, v[i] * v_inverse);
    }
    if (lane == 0) {
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
