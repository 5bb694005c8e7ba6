// What the CUDA kernels share: element type, loads of two neighbouring channels, and the elementary functions.
// Compiled by NVRTC with -DBF16=0 or 1; tests compile the same text for the CPU with EMULATED, which replaces the
// hardware's approximate functions and the threads of a block (tests/cuda/emulator.h).
#pragma once

typedef long long Index;

struct Starts {
    const unsigned char *flags;  // [b][l], or null: no document boundaries
    __device__ bool at(Index row) const { return flags != nullptr && flags[row] != 0; }
};

typedef unsigned short Bf16;  // its bits
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Bf16 x) { return __uint_as_float((unsigned)x << 16); }
__device__ inline void put(float *p, float x) { *p = x; }
__device__ inline void put(Bf16 *p, float x) {  // to nearest, ties to even
#ifdef EMULATED
    unsigned u = __float_as_uint(x);
    *p = (Bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*p) : "f"(x));
#endif
}

#if BF16
typedef Bf16 T;
struct alignas(4) Pair { T x, y; };
#else
typedef float T;
struct alignas(8) Pair { T x, y; };
#endif
__device__ inline T narrow(float x) {
    T r;
    put(&r, x);
    return r;
}

__device__ inline float2 widen2(const Pair v) { return make_float2(widen(v.x), widen(v.y)); }
__device__ inline float2 load2(const T *p) { return widen2(*reinterpret_cast<const Pair *>(p)); }
__device__ inline void store2(T *p, float2 v) {
    *reinterpret_cast<Pair *>(p) = Pair{narrow(v.x), narrow(v.y)};
}

#ifdef EMULATED
__device__ inline float ex2(float x) { return exp2f(x); }
__device__ inline float lg2(float x) { return log2f(x); }
__device__ inline float divide(float a, float b) { return a / b; }
#else
__device__ inline float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ inline float lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ inline float divide(float a, float b) { return __fdividef(a, b); }
#endif

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

__device__ inline float sigmoid(float x) {
    const float e = ex2(-fabsf(x) * LOG2E);  // of -|x|: never overflows
    const float r = divide(1.0f, 1.0f + e);
    return x > 0.0f ? r : e * r;
}
// ln(1 + e^x). Below -8 the two terms of the series of ln(1 + e) are exact to fp32, where lg2(1 + e) has lost e's bits.
__device__ inline float softplus(float x) {
    const float e = ex2(-fabsf(x) * LOG2E);
    const float tail = e < 4e-4f ? e - 0.5f * e * e : lg2(1.0f + e) * LN2;
    return fmaxf(x, 0.0f) + tail;
}
