// Row-wise operations on NVIDIA GPUs: RMSNorm of rows or of parts of them, and what the cross entropy needs of logits.
//
// A warp norms a row, a block takes the statistics of one token's logits; threads read neighbouring elements, sums are
// taken in a fixed order. dweight is summed in a kernel of its own, a thread a column over ROWS rows: one partial sum a
// block of rows, which the caller adds.
#include "mamba_cuda.cuh"

#define WARPS 4      // rows of a block of the norm
#define ROWS 64      // rows of a partial sum of dweight
#define PARTS 3      // dt, B and C
#define THREADS 256  // of a row of logits

struct Parts {
    int count, size[PARTS];
};

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

template <class O>
__device__ inline void forward(const T *__restrict__ x, const float *__restrict__ weight, O *__restrict__ out, float *scales, int rows, Index x_row, Parts parts,
                               int size, float eps) {
    const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    const T *from = x + row * x_row;
    O *to = out + (Index)row * size;
    for (int p = 0, at = 0; p < parts.count; at += parts.size[p++]) {
        const int end = at + parts.size[p];
        float squares = 0.0f;
#pragma unroll 4
        for (int i = at + lane; i < end; i += 32) squares = fmaf(widen(from[i]), widen(from[i]), squares);
        const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)parts.size[p] + eps);
        if (lane == 0) scales[(Index)row * parts.count + p] = scale;
#pragma unroll 4
        for (int i = at + lane; i < end; i += 32) put(to + i, widen(from[i]) * scale * (weight ? weight[i] : 1.0f));
    }
}

// y = x s w with s = (mean x^2 + eps)^-1/2: dx = s (g - x s^2 mean(g x)) with g = dout w.
template <class O>
__device__ inline void backward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ scales, const O *__restrict__ dout, T *__restrict__ dx, int rows,
                                Index x_row, Parts parts, int size) {
    const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    const T *from = x + row * x_row;
    const O *g = dout + (Index)row * size;
    for (int p = 0, at = 0; p < parts.count; at += parts.size[p++]) {
        const int end = at + parts.size[p];
        const float s = scales[(Index)row * parts.count + p];
        float product = 0.0f;
#pragma unroll 4
        for (int i = at + lane; i < end; i += 32) product += widen(g[i]) * (weight ? weight[i] : 1.0f) * widen(from[i]);
        const float back = warp_sum(product) * s * s * s / (float)parts.size[p];
#pragma unroll 4
        for (int i = at + lane; i < end; i += 32)
            put(dx + (Index)row * size + i, widen(g[i]) * (weight ? weight[i] : 1.0f) * s - widen(from[i]) * back);
    }
}

// Of rows in one part: sums [block of rows][size].
template <class O>
__device__ inline void weight_sums(const T *__restrict__ x, const float *__restrict__ scales, const O *__restrict__ dout, float *sums, int rows, Index x_row, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row0 = blockIdx.y * ROWS;
    if (i >= size) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = row0; row < min(row0 + ROWS, rows); row++)
        sum = fmaf(widen(dout[(Index)row * size + i]) * scales[row], widen(x[row * x_row + i]), sum);
    sums[(Index)blockIdx.y * size + i] = sum;
}

// *_narrow: the result, and the gradient that comes in, in bf16 whatever the type of x.
#define NORMS(NAME, O)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                                        \
        norm_forward##NAME(const T *__restrict__ x, const float *__restrict__ weight, O *__restrict__ out, float *scales, int rows, Index x_row, int count,   \
                           int a, int b, int c, float eps) {                                                           \
        forward<O>(x, weight, out, scales, rows, x_row, Parts{count, {a, b, c}}, a + b + c, eps);                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                                        \
        norm_backward##NAME(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ scales, const O *__restrict__ dout, T *__restrict__ dx, int rows,      \
                            Index x_row, int count, int a, int b, int c) {                                             \
        backward<O>(x, weight, scales, dout, dx, rows, x_row, Parts{count, {a, b, c}}, a + b + c);                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                                        \
        norm_weight##NAME(const T *__restrict__ x, const float *__restrict__ scales, const O *__restrict__ dout, float *sums, int rows, Index x_row, int size) { \
        weight_sums<O>(x, scales, dout, sums, rows, x_row, size);                                                      \
    }
NORMS(, T)
NORMS(_narrow, Bf16)

struct Top {
    float top, sum;  // largest so far, and the sum of exp(x - largest)
    __device__ void add(float other, float others) {
        const float most = fmaxf(top, other);
        sum = sum * ex2((top - most) * LOG2E) + others * ex2((other - most) * LOG2E);
        top = most;
    }
};

// out [3][t]: the label's logit (0 when another rank holds it), the largest logit, the sum of exp(logit - largest).
extern "C" __global__ void __launch_bounds__(THREADS)
loss_statistics(const T *__restrict__ logits, const Index *labels, float *out, int t, int v) {
    __shared__ float s_top[THREADS], s_sum[THREADS];
    const T *row = logits + (Index)blockIdx.x * v;
    const int tid = threadIdx.x;
    Top mine = {widen(row[0]), 0.0f};
    for (int i = tid; i < v; i += THREADS) {
        const float x = widen(row[i]);
        if (x > mine.top) mine.add(x, 1.0f);
        else mine.sum += ex2((x - mine.top) * LOG2E);
    }
    s_top[tid] = mine.top, s_sum[tid] = mine.sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (tid < half) {
            mine.add(s_top[tid + half], s_sum[tid + half]);
            s_top[tid] = mine.top, s_sum[tid] = mine.sum;
        }
        __syncthreads();
    }
    if (tid == 0) {
        const Index label = labels[blockIdx.x];
        out[blockIdx.x] = label >= 0 && label < v ? widen(row[label]) : 0.0f;
        out[t + blockIdx.x] = mine.top, out[2 * t + blockIdx.x] = mine.sum;
    }
}

// In place: logits become their gradient, (dloss + dlog_sum) softmax - dloss onehot.
extern "C" __global__ void __launch_bounds__(THREADS)
loss_gradient(T *logits, const Index *labels, const float *__restrict__ log_sums, const float *__restrict__ grad_loss, const float *__restrict__ grad_log_sum,
              int v) {
    T *row = logits + (Index)blockIdx.x * v;
    const Index label = labels[blockIdx.x];
    const float shift = log_sums[blockIdx.x], own = grad_loss[blockIdx.x], scale = own + grad_log_sum[blockIdx.x];
#pragma unroll 4
    for (int i = threadIdx.x; i < v; i += THREADS)
        put(row + i, scale * ex2((widen(row[i]) - shift) * LOG2E) - (i == label ? own : 0.0f));
}
