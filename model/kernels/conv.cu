// Depthwise causal convolution and SiLU on NVIDIA GPUs, forward and backward, channel-last, deterministic.
//
// A thread processes two neighbouring channels over SEGMENT tokens with the last TAPS inputs in registers. The backward reads
// TAPS - 1 tokens past its segment, so that one thread computes every dx; sums over tokens (dweight, dbias) are one partial
// sum per segment, which the caller adds. weight is [tap][d], newest tap last.
#include "mamba_cuda.cuh"

#define TAPS 4
#define SEGMENT 64
#define GROUP 4  // tokens that the backward loads at once: two 4-byte loads per thread do not saturate HBM
static_assert(SEGMENT % GROUP == 0, "a group of tokens belongs to one segment");
#define THREADS 128

// Number of past taps that token t - 1 reads, -1 for t = 0: taps do not read across a document start.
__device__ inline int past_taps_before(const DocStarts &doc_starts, int row0, int t) {
    int past_taps = -1;
    for (int p = t < TAPS ? 0 : t - TAPS; p < t; p++)
        past_taps = doc_starts.at(row0 + p) ? 0 : min(past_taps + 1, TAPS - 1);
    return past_taps;
}

struct Window {
    float2 x[TAPS];  // x[0] the newest
    __device__ void push(float2 v) {
#pragma unroll
        for (int i = TAPS - 1; i > 0; i--) x[i] = x[i - 1];
        x[0] = v;
    }
};

__device__ inline float2 convolve(const Window &w, const float2 *weight, float2 bias, int past_taps) {
    float2 s = bias;
#pragma unroll
    for (int back = 0; back < TAPS; back++)
        if (back <= past_taps) {
            s.x = fmaf(weight[TAPS - 1 - back].x, w.x[back].x, s.x);
            s.y = fmaf(weight[TAPS - 1 - back].y, w.x[back].y, s.y);
        }
    return s;
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv_forward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ bias,
             const unsigned char *__restrict__ doc_start_flags, T *__restrict__ out, int length,
             int channels, int x_stride) {
    const int d = (blockIdx.x * THREADS + threadIdx.x) * 2, t0 = blockIdx.y * SEGMENT;
    if (d >= channels) return;
    const int row0 = blockIdx.z * length;
    const DocStarts doc_starts{doc_start_flags};
    float2 weights[TAPS];
#pragma unroll
    for (int i = 0; i < TAPS; i++) weights[i] = make_float2(weight[i * channels + d], weight[i * channels + d + 1]);
    const float2 bias2 = make_float2(bias[d], bias[d + 1]);
    Window window = {};
    for (int t = t0 - TAPS + 1; t < t0; t++)
        window.push(t < 0 ? make_float2(0.0f, 0.0f) : load2(row_of(x, row0 + t, x_stride) + d));
    int past_taps = past_taps_before(doc_starts, row0, t0);
    const int end = min(length, t0 + SEGMENT);
#pragma unroll 4
    for (int t = t0; t < end; t++) {
        past_taps = doc_starts.at(row0 + t) ? 0 : min(past_taps + 1, TAPS - 1);
        window.push(load2(row_of(x, row0 + t, x_stride) + d));
        const float2 s = convolve(window, weights, bias2, past_taps);
        store2(row_of(out, row0 + t, channels) + d, make_float2(s.x * sigmoid(s.x), s.y * sigmoid(s.y)));
    }
}

// sums [b][segment][TAPS + 1][d]: dweight, then dbias, of one segment.
extern "C" __global__ void __launch_bounds__(THREADS)
conv_backward(const T *__restrict__ x, const float *__restrict__ weight, const float *__restrict__ bias,
             const unsigned char *__restrict__ doc_start_flags, const T *__restrict__ dout, T *__restrict__ dx,
             float *sums, int length, int channels, int x_stride) {
    const int d = (blockIdx.x * THREADS + threadIdx.x) * 2, t0 = blockIdx.y * SEGMENT;
    if (d >= channels) return;
    const int row0 = blockIdx.z * length;
    const DocStarts doc_starts{doc_start_flags};
    float2 weights[TAPS], dweights[TAPS], partial_dx[TAPS], dbias2 = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < TAPS; i++) {
        weights[i] = make_float2(weight[i * channels + d], weight[i * channels + d + 1]);
        dweights[i] = partial_dx[i] = make_float2(0.0f, 0.0f);
    }
    const float2 bias2 = make_float2(bias[d], bias[d + 1]);
    Window window = {};
    for (int t = t0 - TAPS + 1; t < t0; t++)
        window.push(t < 0 ? make_float2(0.0f, 0.0f) : load2(row_of(x, row0 + t, x_stride) + d));
    int past_taps = past_taps_before(doc_starts, row0, t0);
    const int end = min(length, t0 + SEGMENT);
    for (int t1 = t0; t1 < t0 + SEGMENT + TAPS - 1; t1 += GROUP) {
        Pair x_pair[GROUP], dout_pair[GROUP];
        bool is_doc_start[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {  // past the end of the sequence, repeat the last token
            const int row = row0 + min(t1 + i, length - 1);
            x_pair[i] = *reinterpret_cast<const Pair *>(row_of(x, row, x_stride) + d);
            dout_pair[i] = *reinterpret_cast<const Pair *>(row_of(dout, row, channels) + d);
            is_doc_start[i] = doc_starts.at(row);
        }
        const float in_segment = t1 < t0 + SEGMENT ? 1.0f : 0.0f;  // the next segment sums the tokens past this one
#pragma unroll
        for (int i = 0; i < GROUP; i++) {  // partial_dx[j] accumulates dx of token t1 + i - j
            const float in_sequence = t1 + i < length ? 1.0f : 0.0f;  // a factor: a branch would serialize the loads
            past_taps = is_doc_start[i] ? 0 : min(past_taps + 1, TAPS - 1);
            window.push(to_float2(x_pair[i]));
            const float2 s = convolve(window, weights, bias2, past_taps);
            const float2 o = make_float2(in_sequence * to_float(dout_pair[i].x), in_sequence * to_float(dout_pair[i].y));
            const float gx = sigmoid(s.x), gy = sigmoid(s.y);
            const float2 ds = make_float2(o.x * gx * fmaf(s.x, 1.0f - gx, 1.0f), o.y * gy * fmaf(s.y, 1.0f - gy, 1.0f));
            const float2 segment_ds = make_float2(in_segment * ds.x, in_segment * ds.y);
            dbias2 = make_float2(dbias2.x + segment_ds.x, dbias2.y + segment_ds.y);
#pragma unroll
            for (int j = TAPS - 1; j > 0; j--) partial_dx[j] = partial_dx[j - 1];
            partial_dx[0] = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int back = 0; back < TAPS; back++)
                if (back <= past_taps) {
                    const int tap = TAPS - 1 - back;
                    partial_dx[back].x = fmaf(ds.x, weights[tap].x, partial_dx[back].x);
                    partial_dx[back].y = fmaf(ds.y, weights[tap].y, partial_dx[back].y);
                    dweights[tap].x = fmaf(segment_ds.x, window.x[back].x, dweights[tap].x);
                    dweights[tap].y = fmaf(segment_ds.y, window.x[back].y, dweights[tap].y);
                }
            const int finished = t1 + i - TAPS + 1;
            if (finished >= t0 && finished < end) store2(row_of(dx, row0 + finished, channels) + d, partial_dx[TAPS - 1]);
        }
    }
    const Index offset = ((Index)blockIdx.z * gridDim.y + blockIdx.y) * (TAPS + 1) * channels + d;
#pragma unroll
    for (int i = 0; i <= TAPS; i++) {
        const float2 v = i < TAPS ? dweights[i] : dbias2;
        sums[offset + (Index)i * channels] = v.x;
        sums[offset + (Index)i * channels + 1] = v.y;
    }
}
