// Depthwise causal convolution and SiLU on NVIDIA GPUs, forward and backward, channel-last, deterministic.
//
// A thread owns two neighbouring channels over SEGMENT tokens and keeps the last TAPS inputs in registers. The backward
// reads TAPS - 1 tokens past its segment, so that every dx is written by one thread; sums over tokens (dweight, dbias)
// are one partial sum per segment, added by the caller. weight is [tap][d], newest tap last.
#include "mamba_cuda.cuh"

#define TAPS 4
#define SEGMENT 64
#define THREADS 128

// How many taps behind a token are visible: they end where a document, or the sequence, begins.
__device__ inline int reach_before(const Starts &starts, Index row0, int t) {
    int reach = -1;  // of the token before t, -1 when there is none
    for (int p = t < TAPS ? 0 : t - TAPS; p < t; p++) reach = starts.at(row0 + p) ? 0 : min(reach + 1, TAPS - 1);
    return reach;
}

struct Window {
    float2 x[TAPS];  // x[0] the newest
    __device__ void push(float2 v) {
#pragma unroll
        for (int i = TAPS - 1; i > 0; i--) x[i] = x[i - 1];
        x[0] = v;
    }
};

__device__ inline float2 convolve(const Window &w, const float2 *weight, float2 bias, int reach) {
    float2 s = bias;
#pragma unroll
    for (int back = 0; back < TAPS; back++)
        if (back <= reach) {
            s.x = fmaf(weight[TAPS - 1 - back].x, w.x[back].x, s.x);
            s.y = fmaf(weight[TAPS - 1 - back].y, w.x[back].y, s.y);
        }
    return s;
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ bias,
             const unsigned char *__restrict__ start_flags, T *__restrict__ out, int length,
             int channels, Index x_row) {
    const int d = (blockIdx.x * THREADS + threadIdx.x) * 2, t0 = blockIdx.y * SEGMENT;
    if (d >= channels) return;
    const Index row0 = (Index)blockIdx.z * length;
    const Starts starts{start_flags};
    float2 taps[TAPS];
#pragma unroll
    for (int i = 0; i < TAPS; i++) taps[i] = make_float2(weight[i * channels + d], weight[i * channels + d + 1]);
    const float2 shift = make_float2(bias[d], bias[d + 1]);
    Window window = {};
    for (int t = t0 - TAPS + 1; t < t0; t++)
        window.push(t < 0 ? make_float2(0.0f, 0.0f) : load2(x + (row0 + t) * x_row + d));
    int reach = reach_before(starts, row0, t0);
    const int end = min(length, t0 + SEGMENT);
#pragma unroll 4
    for (int t = t0; t < end; t++) {
        reach = starts.at(row0 + t) ? 0 : min(reach + 1, TAPS - 1);
        window.push(load2(x + (row0 + t) * x_row + d));
        const float2 s = convolve(window, taps, shift, reach);
        store2(out + (row0 + t) * channels + d, make_float2(s.x * sigmoid(s.x), s.y * sigmoid(s.y)));
    }
}

// sums [b][segment][TAPS + 1][d]: dweight and, last, dbias of one segment.
extern "C" __global__ void __launch_bounds__(THREADS)
conv_backward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ bias,
             const unsigned char *__restrict__ start_flags, const T *__restrict__ dout, T *__restrict__ dx,
              float *sums, int length, int channels, Index x_row) {
    const int d = (blockIdx.x * THREADS + threadIdx.x) * 2, t0 = blockIdx.y * SEGMENT;
    if (d >= channels) return;
    const Index row0 = (Index)blockIdx.z * length;
    const Starts starts{start_flags};
    float2 taps[TAPS], dtaps[TAPS], pending[TAPS], dshift = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < TAPS; i++) {
        taps[i] = make_float2(weight[i * channels + d], weight[i * channels + d + 1]);
        dtaps[i] = pending[i] = make_float2(0.0f, 0.0f);
    }
    const float2 shift = make_float2(bias[d], bias[d + 1]);
    Window window = {};
    for (int t = t0 - TAPS + 1; t < t0; t++)
        window.push(t < 0 ? make_float2(0.0f, 0.0f) : load2(x + (row0 + t) * x_row + d));
    int reach = reach_before(starts, row0, t0);
    for (int t = t0; t < t0 + SEGMENT + TAPS - 1; t++) {  // pending[j] gathers dx of token t - j
#pragma unroll
        for (int j = TAPS - 1; j > 0; j--) pending[j] = pending[j - 1];
        pending[0] = make_float2(0.0f, 0.0f);
        if (t < length) {
            reach = starts.at(row0 + t) ? 0 : min(reach + 1, TAPS - 1);
            window.push(load2(x + (row0 + t) * x_row + d));
            const float2 s = convolve(window, taps, shift, reach), o = load2(dout + (row0 + t) * channels + d);
            const float gx = sigmoid(s.x), gy = sigmoid(s.y);
            const float2 ds = make_float2(o.x * gx * fmaf(s.x, 1.0f - gx, 1.0f), o.y * gy * fmaf(s.y, 1.0f - gy, 1.0f));
            const bool mine = t < t0 + SEGMENT;  // tokens past the segment belong to the next one's sums
            if (mine) dshift = make_float2(dshift.x + ds.x, dshift.y + ds.y);
#pragma unroll
            for (int back = 0; back < TAPS; back++)
                if (back <= reach) {
                    const int tap = TAPS - 1 - back;
                    pending[back].x = fmaf(ds.x, taps[tap].x, pending[back].x);
                    pending[back].y = fmaf(ds.y, taps[tap].y, pending[back].y);
                    if (mine) {
                        dtaps[tap].x = fmaf(ds.x, window.x[back].x, dtaps[tap].x);
                        dtaps[tap].y = fmaf(ds.y, window.x[back].y, dtaps[tap].y);
                    }
                }
        }
        const int done = t - TAPS + 1;
        if (done >= t0 && done < length) store2(dx + (row0 + done) * channels + d, pending[TAPS - 1]);
    }
    const Index at = ((Index)blockIdx.z * gridDim.y + blockIdx.y) * (TAPS + 1) * channels + d;
#pragma unroll
    for (int i = 0; i <= TAPS; i++) {
        const float2 v = i < TAPS ? dtaps[i] : dshift;
        sums[at + (Index)i * channels] = v.x;
        sums[at + (Index)i * channels + 1] = v.y;
    }
}
