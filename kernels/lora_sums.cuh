// What all kernels that sum over activations for LoRA branches share: where a projection's partial sums lie, and how they are
// added up. Ranks and columns are multiples of 8.

// One projection's side of the backward pass, and where its partial sums lie.
struct Part {
    const bf16* grad_output;
    const bf16* b;
    const bf16* middle;
    bf16* grad_middle;
    float* partial_middle;  // [strips, tokens, rank]
    float* partial_b;       // [blocks of tokens, columns, rank]
    float* grad_b;
    const float* scale;
    i64 grad_stride;
    i64 middle_stride;
    i64 grad_middle_stride;
    int columns;
    int rank;
    int strips;
    int strip_tiles;  // column tiles of a strip
};

struct Parts {
    Part of[4];
};

DEVICE uint4 zeros() { return make_uint4(0, 0, 0, 0); }

DEVICE u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

DEVICE float4 sum_of(const float4* from, i64 apart, int count) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int i = 0; i < count; i++) {
        float4 x = from[i * apart];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    return sum;
}

// Four sums times `scale` as bf16, beside each other in a row of `rank` values.
DEVICE void store_middle(bf16* to, i64 stride, i64 quad, int rank, float scale, float4 sum) {
    uint2 packed = make_uint2(pack_bf16(scale * sum.x, scale * sum.y), pack_bf16(scale * sum.z, scale * sum.w));
    *(uint2*)(to + quad * 4 / rank * stride + quad * 4 % rank) = packed;
}
