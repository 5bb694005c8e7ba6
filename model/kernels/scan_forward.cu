// Selective scan of Mamba-1 on NVIDIA GPUs, forward, channel-last, deterministic.
//
// A block of 256 threads processes 64 channels of one batch row; four neighbouring lanes share a channel and hold 4 of its 16
// states each, in registers. At batch 1 and 8,192 channels this is 128 blocks, one per SM, without splitting the sequence.
// Tiles of CHUNK tokens go through shared memory; reads are coalesced, two channels per lane. The next tile is loaded while
// one is computed. The state before every tile is saved if there is a backward.
#include "scan.cuh"

#define CHANNELS 64
#define THREADS 256
#define TOKENS 2  // tokens of a tile that a thread loads: warp and warp + 8, its pair of channels

__device__ inline void advance(float4 &h, const float4 a, const float4 B, float dt, float du) {
    h.x = fmaf(ex2(dt * a.x), h.x, du * B.x);
    h.y = fmaf(ex2(dt * a.y), h.y, du * B.y);
    h.z = fmaf(ex2(dt * a.z), h.z, du * B.z);
    h.w = fmaf(ex2(dt * a.w), h.w, du * B.w);
}

// The inputs of a tile that a thread loads, in their own type.
struct TileInputs {
    Pair u[TOKENS], dt[TOKENS], z[TOKENS];
    T b, c;
};

// SUMMARY: computes only the end state of the segment and its sum of dt. The segment starts from zero, the first one from
// initial_state.
template <bool SUMMARY>
__device__ inline void run(INPUTS, const float *initial_state, T *y, float *last_state, float *chunk_states,
                           float *end_states, float *dt_sums, SIZES) {
    alignas(16) __shared__ float s_dt[CHUNK][CHANNELS], s_du[CHUNK][CHANNELS], s_y[CHUNK][THREADS];
    __shared__ float4 s_B[CHUNK][4], s_C[CHUNK][4];
    const int tid = threadIdx.x, quad = tid & 3, channel = tid >> 2, d = blockIdx.x * CHANNELS + channel;
    const int lane = tid & 31, warp = tid >> 5, pair_d = blockIdx.x * CHANNELS + 2 * lane;
    const int BC_token = tid / STATES, BC_state = tid % STATES;  // element of B and C that this thread loads
    const Index b = blockIdx.y, batch = gridDim.y, state = (b * channels + d) * STATES + quad * 4;
    const DocStarts doc_starts{doc_start_flags};
    const int row0 = blockIdx.y * length, chunks = (length + CHUNK - 1) / CHUNK;
    const int begin = blockIdx.z * segment_length, end = min(begin + segment_length, length);
    const float4 a = load4(A + d * STATES + quad * 4);
    const float2 skip = make_float2(D[pair_d], D[pair_d + 1]), bias2 = make_float2(bias[pair_d], bias[pair_d + 1]);
    // later segments get initial_state through the end state of segment 0
    float4 h = initial_state && blockIdx.z == 0 ? load4(initial_state + state) : zero4();
    float dt_sum = 0.0f;
    if (!SUMMARY)
        for (int s = 0; s < blockIdx.z; s++)
            h = apply_segment(h, a, dt_sums[(s * batch + b) * channels + d],
                              load4(end_states + s * batch * channels * STATES + state));
    auto load_tile = [&](int t0) {  // past the end, the last token again
        TileInputs tile;
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            const int row = row0 + min(t0 + warp + 8 * i, end - 1);
            tile.u[i] = *reinterpret_cast<const Pair *>(row_of(u, row, u_stride) + pair_d);
            tile.dt[i] = *reinterpret_cast<const Pair *>(row_of(dt, row, dt_stride) + pair_d);
            if (!SUMMARY) tile.z[i] = *reinterpret_cast<const Pair *>(row_of(z, row, z_stride) + pair_d);
        }
        const int row = row0 + min(t0 + BC_token, end - 1);
        tile.b = row_of(B, row, B_stride)[BC_state];
        if (!SUMMARY) tile.c = row_of(C, row, C_stride)[BC_state];
        return tile;
    };
    TileInputs next = load_tile(begin);
    for (int t0 = begin; t0 < end; t0 += CHUNK) {
        if (!SUMMARY && chunk_states)
            store4(chunk_states + ((b * chunks + t0 / CHUNK) * channels + d) * STATES + quad * 4, h);
        const TileInputs tile = next;
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            const int k = warp + 8 * i;
            const float2 x = to_float2(tile.dt[i]), v = to_float2(tile.u[i]);
            float2 step = make_float2(softplus(x.x + bias2.x), softplus(x.y + bias2.y));
            if (t0 + k >= end) step = make_float2(0.0f, 0.0f);  // past the end the state does not change
            *reinterpret_cast<float2 *>(&s_du[k][2 * lane]) = make_float2(step.x * v.x, step.y * v.y);
            if (t0 + k < end && doc_starts.at(row0 + t0 + k)) step = make_float2(RESET_DT, RESET_DT);
            *reinterpret_cast<float2 *>(&s_dt[k][2 * lane]) = step;
        }
        reinterpret_cast<float *>(s_B)[tid] = to_float(tile.b);
        if (!SUMMARY) reinterpret_cast<float *>(s_C)[tid] = to_float(tile.c);
        __syncthreads();
        next = load_tile(t0 + CHUNK);
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            advance(h, a, s_B[k][quad], s_dt[k][channel], s_du[k][channel]);
            if (SUMMARY) dt_sum += s_dt[k][channel];
            else s_y[k][tid] = dot(h, s_C[k][quad]);
        }
        __syncthreads();
        if (!SUMMARY)
#pragma unroll
            for (int i = 0; i < TOKENS; i++) {
                const int k = warp + 8 * i;
                if (t0 + k >= end) continue;
                const float4 p = load4(&s_y[k][8 * lane]), q = load4(&s_y[k][8 * lane + 4]);
                const float2 v = to_float2(tile.u[i]), g = to_float2(tile.z[i]);
                const float y0 = fmaf(skip.x, v.x, p.x + p.y + (p.z + p.w));
                const float y1 = fmaf(skip.y, v.y, q.x + q.y + (q.z + q.w));
                store2(row_of(y, row0 + t0 + k, channels) + pair_d,
                       make_float2(y0 * g.x * sigmoid(g.x), y1 * g.y * sigmoid(g.y)));
            }
        // no barrier: the next tile overwrites what this one reads only after its first barrier
    }
    if (SUMMARY) {
        store4(end_states + blockIdx.z * batch * channels * STATES + state, h);
        if (quad == 0) dt_sums[(blockIdx.z * batch + b) * channels + d] = dt_sum;
    } else if (end == length) {
        store4(last_state + state, h);
    }
}

// initial_state [b][d][16] and chunk_states [b][chunk][d][16] may be null; end_states [segment][b][d][16] and dt_sums
// [segment][b][d] are read if gridDim.z > 1.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_forward(INPUTS, const float *initial_state, T *y, float *last_state, float *chunk_states, float *end_states,
             float *dt_sums, SIZES) {
    run<false>(u, dt, z, A, B, C, D, bias, doc_start_flags, initial_state, y, last_state, chunk_states, end_states,
               dt_sums, length, channels, segment_length, u_stride, dt_stride, z_stride, B_stride, C_stride);
}

// For all segments but the last: gridDim.z is one less.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
scan_summary(INPUTS, const float *initial_state, T *y, float *last_state, float *chunk_states, float *end_states,
             float *dt_sums, SIZES) {
    run<true>(u, dt, z, A, B, C, D, bias, doc_start_flags, initial_state, y, last_state, chunk_states, end_states,
              dt_sums, length, channels, segment_length, u_stride, dt_stride, z_stride, B_stride, C_stride);
}
