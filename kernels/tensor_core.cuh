// Tensor-core instructions, matrix loads and asynchronous copies of sm_80 and newer, as PTX. Prepended after
// prelude.cuh to the kernels that multiply matrices themselves.

#define DEVICE static __device__ __forceinline__

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// 2^x, relative error 2^-22 (PTX ISA, ex2.approx).
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh(x) = 1 - 2 / (1 + e^2x): absolute error about 1e-7, where tanh.approx has 5e-4.
DEVICE float tanh_fast(float x) { return 1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(2.0f * LOG2_E * x)); }

// Address in the shared window, as the asynchronous copies and matrix loads take it.
DEVICE u32 shared_address(const void* pointer) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"((u64)pointer));
    return (u32)address;
}

// 16 bytes from global to shared memory, past L1; zeros where `valid` is false (nothing is read then).
DEVICE void copy_async_16(u32 shared, const void* global, bool valid) {
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's committed groups are under way.
template <int pending>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the row addresses of matrix i.
DEVICE void load_matrix_x4(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void load_matrix_x4_transposed(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], bf16 with f32 accumulation. Lane l holds, with r = l / 4 and c = 2 (l % 4):
// d: (r, c) (r, c+1) (r+8, c) (r+8, c+1); a: (r, c..) (r+8, c..) (r, c+8..) (r+8, c+8..); b: (c.., r) (c+8.., r).
DEVICE void multiply_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void copy_async_4(u32 shared, const void* global, bool valid) {
    u32 bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Fragments of a tile whose rows lie `stride` bytes apart, 16 rows by 16 columns from byte address `tile`.
// As `a` of multiply_16x8x16 (rows are a's rows); or, from rows that are b's k, as b of two columns of eight:
// {b0, b1} of the first, {b0, b1} of the second.
template <int stride>
DEVICE void load_a(u32 (&a)[4], u32 tile) {
    u32 lane = threadIdx.x & 31;
    load_matrix_x4(a, tile + (lane & 15) * stride + (lane >> 4) * 16);
}

template <int stride>
DEVICE void load_b_from_k_rows(u32 (&b)[4], u32 tile) {
    u32 lane = threadIdx.x & 31;
    load_matrix_x4_transposed(b, tile + (lane & 15) * stride + (lane >> 4) * 16);
}

// Likewise from rows that are b's columns.
template <int stride>
DEVICE void load_b_from_n_rows(u32 (&b)[4], u32 tile) {
    u32 lane = threadIdx.x & 31;
    load_matrix_x4(b, tile + ((lane & 7) + (lane >> 4) * 8) * stride + ((lane >> 3) & 1) * 16);
}
