// Common parts of the CPU kernels: vectors of W floats, elementary functions, and the division of work.
//
// A vector holds W neighbouring channels (or features, or logits). The size of a work item does not depend on the number
// of threads, and partial sums of work items are added in a fixed order: results are deterministic.
// Compiled once per instruction set with W = 16 (AVX-512), 8 (AVX2) or 4 (portable), by GCC's vector extension.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if W >= 8
#include <immintrin.h>
#endif

#ifndef W
#error "compile with -DW=16, 8 or 4"
#endif

typedef float V __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(W * 4), aligned(4), may_alias));

static const int GROUP = 256;  // channels of a work item
static const float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

static inline V splat(float x) { return x - V{}; }
static inline V load(const float *p) { return *(const V *)p; }
static inline void store(float *p, V x) { *(V *)p = x; }
static inline float sum(V x) {
#if W == 16
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

// 2^x, relative error about 2e-7, for x <= 127: the integer part of x goes to the exponent; 2^f of the fraction f in
// [-1/2, 1/2] is a polynomial. Without AVX-512 results below 2^-126 are clamped to it, which no state can notice.
static inline V exp2_fraction(V f) {
    V p = splat(1.3395279e-3f) * f + splat(9.6178371e-3f);
    p = p * f + splat(5.5503324e-2f);
    p = p * f + splat(2.4022652e-1f);
    p = p * f + splat(6.9314718e-1f);
    return p * f + splat(1.0f);
}
#if W == 16
static inline V maximum(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V minimum(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
static inline V exp2v(V x) {
    const V f = (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // x minus its integer part
    return (V)_mm512_scalef_ps((__m512)exp2_fraction(f), (__m512)(x - f));
}
static inline V exp2_in_range(V x) { return exp2v(x); }
static inline V reciprocal(V x) {  // 14 bits and one Newton step: a third of a division's time
    const V r = (V)_mm512_rcp14_ps((__m512)x);
    return r + r * (splat(1.0f) - x * r);
}
#else
static inline V reciprocal(V x) { return splat(1.0f) / x; }
#if W == 8
static inline V maximum(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
static inline V minimum(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline V maximum(V a, V b) { return a > b ? a : b; }
static inline V minimum(V a, V b) { return a < b ? a : b; }
#endif
static inline V exp2_in_range(V x) {  // for x >= -126
    const V shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const V r = x + shift;
    return (V)((I)exp2_fraction(x - (r - shift)) + ((I)r << 23));
}
static inline V exp2v(V x) { return exp2_in_range(maximum(splat(-126.0f), x)); }  // this argument order keeps NaN
#endif

static inline V expv(V x) { return exp2v(x * splat(LOG2E)); }
// e^-x is clamped to 2^126, where adding 1 changes nothing.
static inline V sigmoid(V x) { return reciprocal(splat(1.0f) + exp2v(minimum(splat(126.0f), x * splat(-LOG2E)))); }

// softplus(x) = max(x, 0) + ln(1 + e), e = e^-|x|, and its derivative, sigmoid(x). ln(1 + e) = 2 atanh(s), s = e / (2 + e),
// is s times a polynomial in s^2, relative error 5e-9 plus rounding. One division gives 1 / (2 + e) and 1 / (1 + e).
struct Softplus {
    V value, derivative;
    explicit inline Softplus(V x) {
        const V e = expv((V)((I)x | (I)splat(-0.0f))), one = splat(1.0f) + e, two = splat(2.0f) + e;
        const V r = reciprocal(one * two), s = e * one * r, q = s * s, one_inverse = two * r;
        V p = splat(0.28011993f) * q + splat(0.28001804f);
        p = p * q + splat(0.40021527f);
        p = p * q + splat(0.66666416f);
        p = p * q + splat(2.0f);
        value = maximum(x, V{}) + s * p;
        derivative = x > 0.0f ? one_inverse : e * one_inverse;
    }
};

// One batch row and a group of its channels.
struct WorkItem {
    int64_t b, group, d0, d1;
    WorkItem(int64_t index, int64_t channels) {
        const int64_t groups = (channels + GROUP - 1) / GROUP;
        b = index / groups;
        group = index % groups;
        d0 = group * GROUP;
        d1 = d0 + GROUP < channels ? d0 + GROUP : channels;
    }
};

// out[i] = sum of partials [count][size] over the first axis, in order.
static inline void sum_partials(float *out, const float *partials, int64_t count, int64_t size) {
    memcpy(out, partials, sizeof(float) * size);
    for (int64_t p = 1; p < count; p++)
        for (int64_t i = 0; i < size; i++) out[i] += partials[p * size + i];
}
