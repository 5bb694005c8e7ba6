// Selective scan of Mamba-1 on NVIDIA GPUs, forward, channel-last, deterministic.
//
// A block of 256 threads owns 64 channels of one batch row; four neighbouring lanes share a channel and hold 4 of its 16
// states each, in registers. At batch 1 and 8,192 channels this is 128 blocks, one per SM, without cutting the sequence.
// Time runs in tiles staged through shared memory, rows read coalesced, two channels a lane; the next tile is read while
// this one is computed. The state before every tile is kept for the backward, if there is one.
#include "scan.cuh"

#define CHANNELS 64
#define THREADS 256
#define ROWS 2  // of a tile that a thread reads: its pair of channels in tokens warp and warp + 8

__device__ inline void advance(float4 &h, const float4 a, const float4 B, float dt, float du) {
    h.x = fmaf(ex2(dt * a.x), h.x, du * B.x);
    h.y = fmaf(ex2(dt * a.y), h.y, du * B.y);
    h.z = fmaf(ex2(dt * a.z), h.z, du * B.z);
    h.w = fmaf(ex2(dt * a.w), h.w, du * B.w);
}

// What a thread reads of a tile, as it lies in memory.
struct Held {
    Pair u[ROWS], dt[ROWS], z[ROWS];
    T b, c;
};

// SUMMARY: only the state that the segment ends with from zero (the first from `first`), and the time that passes.
template <bool SUMMARY>
__device__ inline void run(INPUTS, const float *first, T *y, float *last, float *kept, float *ends, float *times, SIZES) {
    alignas(16) __shared__ float s_dt[CHUNK][CHANNELS], s_du[CHUNK][CHANNELS], s_y[CHUNK][THREADS];
    __shared__ float4 s_B[CHUNK][4], s_C[CHUNK][4];
    const int tid = threadIdx.x, quad = tid & 3, channel = tid >> 2, d = blockIdx.x * CHANNELS + channel;
    const int lane = tid & 31, warp = tid >> 5, pair = blockIdx.x * CHANNELS + 2 * lane;
    const int own_token = tid / STATES, own_state = tid % STATES;  // of B and C
    const Index b = blockIdx.y, batch = gridDim.y, state = (b * channels + d) * STATES + quad * 4;
    const Starts starts{start_flags};
    const int row0 = blockIdx.y * length, chunks = (length + CHUNK - 1) / CHUNK, begin = blockIdx.z * segment, end = min(begin + segment, length);
    const float4 a = load4(A + d * STATES + quad * 4);
    const float2 skip = make_float2(D[pair], D[pair + 1]), shift = make_float2(bias[pair], bias[pair + 1]);
    float4 h = first && blockIdx.z == 0 ? load4(first + state) : zero4();  // what segment 0 ends with has it in it
    float time = 0.0f;
    if (!SUMMARY)
        for (int s = 0; s < blockIdx.z; s++)
            h = cross(h, a, times[(s * batch + b) * channels + d], load4(ends + s * batch * channels * STATES + state));
    auto read = [&](int t0) {  // past the end, the last token again
        Held held;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = row0 + min(t0 + warp + 8 * i, end - 1);
            held.u[i] = *reinterpret_cast<const Pair *>(row_of(u, row, u_row) + pair);
            held.dt[i] = *reinterpret_cast<const Pair *>(row_of(dt, row, dt_row) + pair);
            if (!SUMMARY) held.z[i] = *reinterpret_cast<const Pair *>(row_of(z, row, z_row) + pair);
        }
        const int row = row0 + min(t0 + own_token, end - 1);
        held.b = row_of(B, row, B_row)[own_state];
        if (!SUMMARY) held.c = row_of(C, row, C_row)[own_state];
        return held;
    };
    Held next = read(begin);
    for (int t0 = begin; t0 < end; t0 += CHUNK) {
        if (!SUMMARY && kept) store4(kept + ((b * chunks + t0 / CHUNK) * channels + d) * STATES + quad * 4, h);
        const Held held = next;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int k = warp + 8 * i;
            const float2 x = widen2(held.dt[i]), v = widen2(held.u[i]);
            float2 step = make_float2(softplus(x.x + shift.x), softplus(x.y + shift.y));
            if (t0 + k >= end) step = make_float2(0.0f, 0.0f);  // past the end the state stays as it is
            *reinterpret_cast<float2 *>(&s_du[k][2 * lane]) = make_float2(step.x * v.x, step.y * v.y);
            if (t0 + k < end && starts.at(row0 + t0 + k)) step = make_float2(FOREVER, FOREVER);
            *reinterpret_cast<float2 *>(&s_dt[k][2 * lane]) = step;
        }
        reinterpret_cast<float *>(s_B)[tid] = widen(held.b);
        if (!SUMMARY) reinterpret_cast<float *>(s_C)[tid] = widen(held.c);
        __syncthreads();
        next = read(t0 + CHUNK);
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            advance(h, a, s_B[k][quad], s_dt[k][channel], s_du[k][channel]);
            if (SUMMARY) time += s_dt[k][channel];
            else s_y[k][tid] = dot(h, s_C[k][quad]);
        }
        __syncthreads();
        if (!SUMMARY)
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int k = warp + 8 * i;
                if (t0 + k >= end) continue;
                const float4 p = load4(&s_y[k][8 * lane]), q = load4(&s_y[k][8 * lane + 4]);
                const float2 v = widen2(held.u[i]), g = widen2(held.z[i]);
                const float y0 = fmaf(skip.x, v.x, p.x + p.y + (p.z + p.w)), y1 = fmaf(skip.y, v.y, q.x + q.y + (q.z + q.w));
                store2(row_of(y, row0 + t0 + k, channels) + pair, make_float2(y0 * g.x * sigmoid(g.x), y1 * g.y * sigmoid(g.y)));
            }
        // no barrier: the next tile's writes to what this one reads come after its own first barrier
    }
    if (SUMMARY) {
        store4(ends + blockIdx.z * batch * channels * STATES + state, h);
        if (quad == 0) times[(blockIdx.z * batch + b) * channels + d] = time;
    } else if (end == length) {
        store4(last + state, h);
    }
}

// first and kept [b][chunk][d][16] may be null; ends [segment][b][d][16] and times [segment][b][d] are read for gridDim.z > 1.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_forward(INPUTS, const float *first, T *y, float *last, float *kept, float *ends, float *times, SIZES) {
    run<false>(u, dt, z, A, B, C, D, bias, start_flags, first, y, last, kept, ends, times, length, channels, segment, u_row,
               dt_row, z_row, B_row, C_row);
}

// For all segments but the last: gridDim.z is one less.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_summary(INPUTS, const float *first, T *y, float *last, float *kept, float *ends, float *times, SIZES) {
    run<true>(u, dt, z, A, B, C, D, bias, start_flags, first, y, last, kept, ends, times, length, channels, segment, u_row,
              dt_row, z_row, B_row, C_row);
}
