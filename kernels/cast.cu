// Conversions of whole tensors: sets of tensors in one launch, and checkpoint tensors as they arrive.

struct CastPart {
    const void* from;
    void* to;
    u64 elements;
};

// Piece `index` of part `part`, in units of the piece size of the kernel.
struct Piece {
    u32 part;
    u32 index;
};

// One block a piece of 2048 elements.
template <class F, class T>
__device__ __forceinline__ void cast(const CastPart* parts, const Piece* pieces) {
    Piece piece = pieces[blockIdx.x];
    CastPart part = parts[piece.part];
    const F* from = (const F*)part.from;
    T* to = (T*)part.to;
    u64 first = (u64)piece.index * 2048;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u64 at = first + i * 256 + threadIdx.x;
        if (at < part.elements) store_value(to + at, to_float(from[at]));
    }
}

extern "C" __global__ void cast_f32_bf16(const CastPart* parts, const Piece* pieces) { cast<float, bf16>(parts, pieces); }
extern "C" __global__ void cast_bf16_f32(const CastPart* parts, const Piece* pieces) { cast<bf16, float>(parts, pieces); }
extern "C" __global__ void cast_f32_f32(const CastPart* parts, const Piece* pieces) { cast<float, float>(parts, pieces); }
extern "C" __global__ void cast_bf16_bf16(const CastPart* parts, const Piece* pieces) { cast<bf16, bf16>(parts, pieces); }

// Elements from `first` on of rows of `columns`, which lie `stride` apart.
extern "C" __global__ void convert_to_bf16(const void* from, int type, bf16* to, i64 first, i64 columns, i64 stride,
                                           i64 elements) {
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < elements; at += (i64)gridDim.x * blockDim.x) {
        i64 place = first + at;
        if (columns != stride) place = place / columns * stride + place % columns;
        to[place] = to_bf16(checkpoint_value(from, type, at));
    }
}

extern "C" __global__ void convert_to_f32(const void* from, int type, float* to, i64 elements) {
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < elements; at += (i64)gridDim.x * blockDim.x)
        to[at] = checkpoint_value(from, type, at);
}

// Numbers of magnitude 1 to 2 and either sign, for timing products: zeros would run faster than real data.
extern "C" __global__ void fill_noise(u32* to, i64 words) {
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < words; at += (i64)gridDim.x * blockDim.x)
        to[at] = (random_mix((u32)at) & 0x807f807fu) | 0x3f803f80u;
}
