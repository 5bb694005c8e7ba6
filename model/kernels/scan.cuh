// What the scan's kernels share: sizes, arguments, and how a sequence in segments is one sequence.
//
// Sizes: D channels (a multiple of 128), 16 states, A and states [d][16], A times log2(e). Rows of u, dt, z [b][l] are
// u_row, ... elements apart, those of B and C B_row, C_row.
//
// Where channels and batch alone do not fill the GPU, the sequence is cut into gridDim.z segments. A first kernel runs all
// segments at once from zero and keeps of each what it adds to the state (or adjoint) at its far end, and the time that
// passes in it; the second joins them up to its own segment, since a segment multiplies by exp(A time).
#pragma once
#include "mamba_cuda.cuh"

#define STATES 16
#define CHUNK 16  // tokens of a tile, and between kept states
#define FOREVER 1e30f  // time that passes where a document opens: exp(A FOREVER) is 0; sums of it stay finite

#define INPUTS                                                                                                         \
    const T *__restrict__ u, const T *__restrict__ dt, const T *__restrict__ z, const float *__restrict__ A,           \
        const T *__restrict__ B, const T *__restrict__ C, const float *__restrict__ D, const float *__restrict__ bias, \
        const unsigned char *__restrict__ start_flags
#define SIZES int length, int channels, int segment, int u_row, int dt_row, int z_row, int B_row, int C_row

__device__ inline float dot(const float4 a, const float4 b) {
    return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w)));
}
__device__ inline float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
__device__ inline float4 load4(const float *p) { return *reinterpret_cast<const float4 *>(p); }
__device__ inline void store4(float *p, float4 v) { *reinterpret_cast<float4 *>(p) = v; }

// Where row `row` of a tensor begins: 32 by 32 bits, one instruction.
template <class P> __device__ inline P *row_of(P *p, int row, int stride) { return p + (Index)row * stride; }

// h = exp2(a time) h + end: four states across a segment.
__device__ inline float4 cross(float4 h, const float4 a, float time, const float4 end) {
    return make_float4(fmaf(ex2(a.x * time), h.x, end.x), fmaf(ex2(a.y * time), h.y, end.y),
                       fmaf(ex2(a.z * time), h.z, end.z), fmaf(ex2(a.w * time), h.w, end.w));
}
