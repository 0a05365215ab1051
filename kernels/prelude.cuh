// What every kernel starts from: types, bfloat16 by PTX, vector loads, block reductions, random numbers.
// Prepended to each file before compilation; no toolkit headers, so that NVRTC alone is enough.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INFINITY_F __int_as_float(0x7f800000)

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }

// Round to nearest even.
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}

// Two values in one word, `low` in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float round_bf16(float x) { return to_float(to_bf16(x)); }

__device__ __forceinline__ void store_value(bf16* to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void store_value(float* to, float x) { *to = x; }

// `V` consecutive values; for V = 8 the address is a multiple of 16 bytes.
template <int V>
__device__ __forceinline__ void load(const bf16* from, float (&x)[V]) {
    if constexpr (V == 8) {
        uint4 raw = *reinterpret_cast<const uint4*>(from);
        x[0] = low_bf16(raw.x), x[1] = high_bf16(raw.x);
        x[2] = low_bf16(raw.y), x[3] = high_bf16(raw.y);
        x[4] = low_bf16(raw.z), x[5] = high_bf16(raw.z);
        x[6] = low_bf16(raw.w), x[7] = high_bf16(raw.w);
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = to_float(from[i]);
    }
}

template <int V>
__device__ __forceinline__ void load(const float* from, float (&x)[V]) {
    if constexpr (V == 8) {
        float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) x[i] = from[i];
    }
}

template <int V>
__device__ __forceinline__ void store(bf16* to, const float (&x)[V]) {
    if constexpr (V == 8) {
        uint4 raw;
        raw.x = pack_bf16(x[0], x[1]), raw.y = pack_bf16(x[2], x[3]);
        raw.z = pack_bf16(x[4], x[5]), raw.w = pack_bf16(x[6], x[7]);
        *reinterpret_cast<uint4*>(to) = raw;
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = to_bf16(x[i]);
    }
}

template <int V>
__device__ __forceinline__ void store(float* to, const float (&x)[V]) {
    if constexpr (V == 8) {
        reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = x[i];
    }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Sum over the block, the same in every thread and on every run. `blockDim.x` is a multiple of 32, at most 1024;
// `shared` holds 32 floats and is free again when the call returns.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? shared[lane] : 0.0f);
    __syncthreads();
    return x;
}

__device__ __forceinline__ float block_max(float x, float* shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? shared[lane] : -INFINITY_F);
    __syncthreads();
    return x;
}

// `program::random`: mixing function and key chain, bit for bit.
__device__ __forceinline__ u32 random_mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// The chain up to the stream: the same for every element of a tensor.
__device__ __forceinline__ u32 random_prefix(const u32* key, u32 stream) {
    u32 x = random_mix(key[0] ^ 0x9e3779b9u);
    x = random_mix(x ^ key[1]);
    x = random_mix(x ^ key[2]);
    x = random_mix(x ^ key[3]);
    return random_mix(x ^ stream);
}

__device__ __forceinline__ u32 random_bits(u32 prefix, u32 row, u32 column) {
    return random_mix(random_mix(prefix ^ row) ^ column);
}

__device__ __forceinline__ float random_uniform(u32 prefix, u32 row, u32 column) {
    return (float)(random_bits(prefix, row, column) >> 8) * (1.0f / 16777216.0f);
}
