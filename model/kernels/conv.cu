// Depthwise causal convolution and SiLU on NVIDIA GPUs, forward and backward, channel-last, deterministic.
//
// A thread owns two neighbouring channels over SEGMENT tokens and keeps the last TAPS inputs in registers. The backward
// reads TAPS - 1 tokens past its segment, so that every dx is written by one thread; sums over tokens (dweight, dbias)
// are one partial sum per segment, added by the caller. weight is [tap][d], newest tap last.
#include "mamba_cuda.cuh"

#define TAPS 4
#define SEGMENT 64
#define GROUP 4  // tokens that the backward asks for at once: two loads of four bytes a thread do not fill HBM
static_assert(SEGMENT % GROUP == 0, "a group is in one segment's sums");
#define THREADS 128

// How many taps behind a token are visible: they end where a document, or the sequence, begins.
__device__ inline int reach_before(const Starts &starts, int row0, int t) {
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
             int channels, int x_row) {
    const int d = (blockIdx.x * THREADS + threadIdx.x) * 2, t0 = blockIdx.y * SEGMENT;
    if (d >= channels) return;
    const int row0 = blockIdx.z * length;
    const Starts starts{start_flags};
    float2 taps[TAPS];
#pragma unroll
    for (int i = 0; i < TAPS; i++) taps[i] = make_float2(weight[i * channels + d], weight[i * channels + d + 1]);
    const float2 shift = make_float2(bias[d], bias[d + 1]);
    Window window = {};
    for (int t = t0 - TAPS + 1; t < t0; t++)
        window.push(t < 0 ? make_float2(0.0f, 0.0f) : load2(row_of(x, row0 + t, x_row) + d));
    int reach = reach_before(starts, row0, t0);
    const int end = min(length, t0 + SEGMENT);
#pragma unroll 4
    for (int t = t0; t < end; t++) {
        reach = starts.at(row0 + t) ? 0 : min(reach + 1, TAPS - 1);
        window.push(load2(row_of(x, row0 + t, x_row) + d));
        const float2 s = convolve(window, taps, shift, reach);
        store2(row_of(out, row0 + t, channels) + d, make_float2(s.x * sigmoid(s.x), s.y * sigmoid(s.y)));
    }
}

// sums [b][segment][TAPS + 1][d]: dweight and, last, dbias of one segment.
extern "C" __global__ void __launch_bounds__(THREADS)
conv_backward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ bias,
             const unsigned char *__restrict__ start_flags, const T *__restrict__ dout, T *__restrict__ dx,
              float *sums, int length, int channels, int x_row) {
    const int d = (blockIdx.x * THREADS + threadIdx.x) * 2, t0 = blockIdx.y * SEGMENT;
    if (d >= channels) return;
    const int row0 = blockIdx.z * length;
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
        window.push(t < 0 ? make_float2(0.0f, 0.0f) : load2(row_of(x, row0 + t, x_row) + d));
    int reach = reach_before(starts, row0, t0);
    const int end = min(length, t0 + SEGMENT);
    for (int t1 = t0; t1 < t0 + SEGMENT + TAPS - 1; t1 += GROUP) {
        Pair read[GROUP], came[GROUP];
        bool opens[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {  // past the end of the sequence, the last token again
            const int row = row0 + min(t1 + i, length - 1);
            read[i] = *reinterpret_cast<const Pair *>(row_of(x, row, x_row) + d);
            came[i] = *reinterpret_cast<const Pair *>(row_of(dout, row, channels) + d);
            opens[i] = starts.at(row);
        }
        const float mine = t1 < t0 + SEGMENT ? 1.0f : 0.0f;  // tokens past the segment belong to the next one's sums
#pragma unroll
        for (int i = 0; i < GROUP; i++) {  // pending[j] gathers dx of token t1 + i - j
            const float there = t1 + i < length ? 1.0f : 0.0f;  // a factor: with a condition the loads wait for each other
            reach = opens[i] ? 0 : min(reach + 1, TAPS - 1);
            window.push(widen2(read[i]));
            const float2 s = convolve(window, taps, shift, reach);
            const float2 o = make_float2(there * widen(came[i].x), there * widen(came[i].y));
            const float gx = sigmoid(s.x), gy = sigmoid(s.y);
            const float2 ds = make_float2(o.x * gx * fmaf(s.x, 1.0f - gx, 1.0f), o.y * gy * fmaf(s.y, 1.0f - gy, 1.0f));
            const float2 own = make_float2(mine * ds.x, mine * ds.y);
            dshift = make_float2(dshift.x + own.x, dshift.y + own.y);
#pragma unroll
            for (int j = TAPS - 1; j > 0; j--) pending[j] = pending[j - 1];
            pending[0] = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int back = 0; back < TAPS; back++)
                if (back <= reach) {
                    const int tap = TAPS - 1 - back;
                    pending[back].x = fmaf(ds.x, taps[tap].x, pending[back].x);
                    pending[back].y = fmaf(ds.y, taps[tap].y, pending[back].y);
                    dtaps[tap].x = fmaf(own.x, window.x[back].x, dtaps[tap].x);
                    dtaps[tap].y = fmaf(own.y, window.x[back].y, dtaps[tap].y);
                }
            const int done = t1 + i - TAPS + 1;
            if (done >= t0 && done < end) store2(row_of(dx, row0 + done, channels) + d, pending[TAPS - 1]);
        }
    }
    const Index at = ((Index)blockIdx.z * gridDim.y + blockIdx.y) * (TAPS + 1) * channels + d;
#pragma unroll
    for (int i = 0; i <= TAPS; i++) {
        const float2 v = i < TAPS ? dtaps[i] : dshift;
        sums[at + (Index)i * channels] = v.x;
        sums[at + (Index)i * channels + 1] = v.y;
    }
}
