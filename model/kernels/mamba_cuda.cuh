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

#ifndef EMULATED
__device__ inline float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ inline float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
#endif

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

__device__ inline float sigmoid(float x) {
    const float e = ex2(-fabsf(x) * LOG2E);  // of -|x|: never overflows
    const float r = reciprocal(1.0f + e);
    return x > 0.0f ? r : e * r;
}
// max(x, 0) + ln(1 + e), e = e^-|x|. ln(1 + e) is 2 atanh(s), s = e / (2 + e), as s times a polynomial in s^2: relative
// error a few 2^-23 however small, where lg2.approx(1 + e) has an absolute one and loses time steps near 0.001.
__device__ inline float softplus(float x) {
    const float e = ex2(-fabsf(x) * LOG2E), s = e * reciprocal(2.0f + e), q = s * s;
    float p = fmaf(0.28011993f, q, 0.28001804f);
    p = fmaf(p, q, 0.40021527f);
    p = fmaf(p, q, 0.66666416f);
    p = fmaf(p, q, 2.0f);
    return fmaf(s, p, fmaxf(x, 0.0f));
}
