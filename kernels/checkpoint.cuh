// Values of a checkpoint, whose element types are 0 f32, 1 f16, 2 bf16.

__device__ __forceinline__ float f16_to_float(u16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
    return result;
}

__device__ __forceinline__ float checkpoint_value(const void* from, int type, i64 at) {
    if (type == 0) return ((const float*)from)[at];
    u16 raw = ((const u16*)from)[at];
    return type == 1 ? f16_to_float(raw) : __uint_as_float((u32)raw << 16);
}
