// The gates of SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202), prepended to what multiplies by them.
//
//   silu: f(x) = x s(x), f'(x) = s (1 + x (1 - s)) with s the logistic function
//   gelu (tanh): f(x) = x (1 + tanh z) / 2 with z = k (x + c x^3), which is x s with s the logistic function of 2 z;
//     f'(x) = s + x s (1 - s) 2 k (1 + 3 c x^2)

template <int GELU>
__device__ __forceinline__ void activation(float x, float& value, float& slope) {
    if constexpr (GELU) {
        const float k = 0.7978845608028654f, c = 0.044715f;
        float s = __fdividef(1.0f, 1.0f + __expf(-2.0f * k * (x + c * x * x * x)));
        value = x * s;
        slope = s + x * s * (1.0f - s) * 2.0f * k * (1.0f + 3.0f * c * x * x);
    } else {
        float s = __fdividef(1.0f, 1.0f + __expf(-x));
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    }
}
