// Row-wise operations on NVIDIA GPUs: RMSNorm of rows or of splits of rows, and the cross entropy's operations on logits.
//
// A warp norms a row; a block computes the statistics of one token's logits. Threads read neighbouring elements; sums are
// taken in a fixed order. A separate kernel sums dweight, one thread per column over ROWS rows; the caller adds the partial
// sums of the blocks.
#include "mamba_cuda.cuh"

#define WARPS 4       // warps, and rows, of a block of the norm
#define ROWS 64       // rows of a partial sum of dweight
#define MAX_SPLITS 3  // dt, B and C
#define THREADS 256   // threads per row of logits

struct Splits {
    int count, size[MAX_SPLITS];
};

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

template <class O>
__device__ inline void forward(const T *__restrict__ x, const float *__restrict__ weight, O *__restrict__ out, float *scales,
                               int rows, Index row_stride, Splits splits, int size, float eps) {
    const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    const T *x_row = x + row * row_stride;
    O *out_row = out + (Index)row * size;
    for (int p = 0, begin = 0; p < splits.count; begin += splits.size[p++]) {
        const int end = begin + splits.size[p];
        float squares = 0.0f;
#pragma unroll 4
        for (int i = begin + lane; i < end; i += 32) squares = fmaf(to_float(x_row[i]), to_float(x_row[i]), squares);
        const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)splits.size[p] + eps);
        if (lane == 0) scales[(Index)row * splits.count + p] = scale;
#pragma unroll 4
        for (int i = begin + lane; i < end; i += 32)
            store_as(out_row + i, to_float(x_row[i]) * scale * (weight ? weight[i] : 1.0f));
    }
}

// y = x s w with s = (mean x^2 + eps)^-1/2: dx = s (g - x s^2 mean(g x)) with g = dout w.
template <class O>
__device__ inline void backward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ scales,
                                const O *__restrict__ dout, T *__restrict__ dx, int rows, Index row_stride, Splits splits,
                                int size) {
    const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    const T *x_row = x + row * row_stride;
    const O *g = dout + (Index)row * size;
    for (int p = 0, begin = 0; p < splits.count; begin += splits.size[p++]) {
        const int end = begin + splits.size[p];
        const float s = scales[(Index)row * splits.count + p];
        float product = 0.0f;
#pragma unroll 4
        for (int i = begin + lane; i < end; i += 32) product += to_float(g[i]) * (weight ? weight[i] : 1.0f) * to_float(x_row[i]);
        const float back = warp_sum(product) * s * s * s / (float)splits.size[p];
#pragma unroll 4
        for (int i = begin + lane; i < end; i += 32)
            store_as(dx + (Index)row * size + i, to_float(g[i]) * (weight ? weight[i] : 1.0f) * s - to_float(x_row[i]) * back);
    }
}

// Partial sums of dweight over ROWS rows, for a norm without splits: sums [block of rows][size].
template <class O>
__device__ inline void weight_sums(const T *__restrict__ x, const float *__restrict__ scales, const O *__restrict__ dout,
                                   float *sums, int rows, Index row_stride, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row0 = blockIdx.y * ROWS;
    if (i >= size) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = row0; row < min(row0 + ROWS, rows); row++)
        sum = fmaf(to_float(dout[(Index)row * size + i]) * scales[row], to_float(x[row * row_stride + i]), sum);
    sums[(Index)blockIdx.y * size + i] = sum;
}

// *_narrow: out and dout are bf16 whatever the type of x.
#define NORMS(NAME, O)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                                        \
        norm_forward##NAME(const T *__restrict__ x, const float *__restrict__ weight, O *__restrict__ out, float *scales,\
                           int rows, Index row_stride, int count, int a, int b, int c, float eps) {                    \
        forward<O>(x, weight, out, scales, rows, row_stride, Splits{count, {a, b, c}}, a + b + c, eps);                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                                        \
        norm_backward##NAME(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ scales,\
                            const O *__restrict__ dout, T *__restrict__ dx, int rows, Index row_stride, int count, int a,\
                            int b, int c) {                                                                            \
        backward<O>(x, weight, scales, dout, dx, rows, row_stride, Splits{count, {a, b, c}}, a + b + c);               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                                        \
        norm_weight##NAME(const T *__restrict__ x, const float *__restrict__ scales, const O *__restrict__ dout,       \
                          float *sums, int rows, Index row_stride, int size) {                                         \
        weight_sums<O>(x, scales, dout, sums, rows, row_stride, size);                                                 \
    }
NORMS(, T)
NORMS(_narrow, Bf16)

struct OnlineSoftmax {
    float max, sum;  // largest x so far, and the sum of exp(x - max)
    __device__ void add(float other_max, float other_sum) {
        const float new_max = fmaxf(max, other_max);
        sum = sum * ex2((max - new_max) * LOG2E) + other_sum * ex2((other_max - new_max) * LOG2E);
        max = new_max;
    }
};

// out [3][t]: the label's logit (0 where another rank holds it), the largest logit, the sum of exp(logit - largest).
extern "C" __global__ void __launch_bounds__(THREADS)
loss_statistics(const T *__restrict__ logits, const Index *labels, float *out, int t, int v) {
    __shared__ float s_max[THREADS], s_sum[THREADS];
    const T *row = logits + (Index)blockIdx.x * v;
    const int tid = threadIdx.x;
    OnlineSoftmax local = {to_float(row[0]), 0.0f};
    for (int i = tid; i < v; i += THREADS) {
        const float x = to_float(row[i]);
        if (x > local.max) local.add(x, 1.0f);
        else local.sum += ex2((x - local.max) * LOG2E);
    }
    s_max[tid] = local.max, s_sum[tid] = local.sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (tid < half) {
            local.add(s_max[tid + half], s_sum[tid + half]);
            s_max[tid] = local.max, s_sum[tid] = local.sum;
        }
        __syncthreads();
    }
    if (tid == 0) {
        const Index label = labels[blockIdx.x];
        out[blockIdx.x] = label >= 0 && label < v ? to_float(row[label]) : 0.0f;
        out[t + blockIdx.x] = local.max, out[2 * t + blockIdx.x] = local.sum;
    }
}

// Overwrites logits with their gradient, (dloss + dlog_sum) softmax - dloss onehot.
extern "C" __global__ void __launch_bounds__(THREADS)
loss_gradient(T *logits, const Index *labels, const float *__restrict__ log_sums, const float *__restrict__ grad_loss,
              const float *__restrict__ grad_log_sum, int v) {
    T *row = logits + (Index)blockIdx.x * v;
    const Index label = labels[blockIdx.x];
    const float log_sum = log_sums[blockIdx.x], dloss = grad_loss[blockIdx.x], scale = dloss + grad_log_sum[blockIdx.x];
#pragma unroll 4
    for (int i = threadIdx.x; i < v; i += THREADS)
        store_as(row + i, scale * ex2((to_float(row[i]) - log_sum) * LOG2E) - (i == label ? dloss : 0.0f));
}
