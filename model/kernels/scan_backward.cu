// Selective scan of Mamba-1 on NVIDIA GPUs, backward, channel-last, deterministic.
//
// A block of 128 threads processes 128 channels of one batch row, a warp 32 of them; a thread holds 4 channels by 4 states.
// Time runs backwards in chunks that start from the states saved by the forward. A first pass stores the state before every
// second token in shared memory; then the states of two tokens at a time, and their adjoints, are computed in registers.
//
// Lanes exchange halves of their values to sum over states (du, ddt, dz; the sum ends in the lane of its channel) and over
// channels (dB, dC; the sum ends in the lane of its state). dB and dC of the warps are added in shared memory to one partial
// sum per block, and the caller adds the blocks: no atomics. 106 KiB of shared memory: two blocks per SM.
//
// Eight warps per SM hide little memory latency. So the inputs of the next chunk are copied asynchronously while a chunk is
// computed, into each thread's columns of shared memory whose states have been read already.
#include "scan.cuh"

#define CHANNELS 128
#define THREADS 128
#define PER_THREAD 4  // channels, and states, of a thread
#define PAIRS (CHUNK / 2)
#define FETCH 2  // pairs of tokens still to compute when the next chunk is fetched

#include "scan_stage.cuh"

#ifndef EMULATED
extern __shared__ float4 shared_memory[];
#endif

struct Backward {
    Tile tile;
    Column before[PAIRS * PER_THREAD];                 // states before every second token
    float sums[THREADS / 32][CHUNK][2 * STATES];  // dB and dC of each warp
};

struct Vec4 {
    float v[4];
    __device__ float operator[](int i) const { return v[i]; }
    __device__ float &operator[](int i) { return v[i]; }
};
__device__ inline Vec4 load_vec4(const float *p) {
    const float4 x = load4(p);
    return {{x.x, x.y, x.z, x.w}};
}

// Adds 2 * HALF values of this lane and of the lane whose number differs in `bit`; each of the two ends with one half.
template <int HALF> __device__ inline void exchange(float *v, int bit) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float sent = upper ? v[i] : v[i + HALF], local = upper ? v[i + HALF] : v[i];
        v[i] = local + __shfl_xor_sync(0xffffffffu, sent, bit);
    }
}
// Sums values of four channels over four lanes; each lane gets the sum of one channel.
__device__ inline float over_states(Vec4 x) {
    exchange<2>(x.v, 2);
    exchange<1>(x.v, 1);
    return x[0];
}

struct ThreadPosition {
    int quad;           // index of its 4 states
    int first_channel;  // first of its 4 channels in the block
    int out_channel;    // channel of the block for which it writes du, ddt and dz
    int d;              // first_channel of all channels
    int row0;
    Index b, batch, state;
    __device__ ThreadPosition(int length, int channels) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        quad = lane & 3;
        first_channel = warp * 32 + (lane >> 2) * PER_THREAD;
        out_channel = threadIdx.x;
        d = blockIdx.x * CHANNELS + first_channel;
        b = blockIdx.y;
        batch = gridDim.y;
        row0 = blockIdx.y * length;
        state = (b * channels + d) * STATES + quad * 4;
    }
};

// For all segments but the first: blockIdx.z = 0 is segment 1. Writes to end_states the adjoint before each segment, which
// starts from zero (the last segment from dlast_state, which may be null).
extern "C" __global__ void __launch_bounds__(THREADS)
scan_adjoint(INPUTS, const T *dy, const float *dlast_state, float *end_states, float *dt_sums, SIZES) {
    __shared__ AdjointTile s;
    __shared__ Column columns[Staging<true>::COLUMNS];
    const Staging<true> staging{columns};
    const ThreadPosition pos(length, channels);
    const int seg = blockIdx.z + 1, begin = seg * segment_length, end = min(begin + segment_length, length);
    const int last_t0 = begin + (end - 1 - begin) / CHUNK * CHUNK, pair_d = blockIdx.x * CHANNELS + 2 * (threadIdx.x & 63);
    const float2 bias2 = make_float2(bias[pair_d], bias[pair_d + 1]);
    Vec4 a[PER_THREAD], g[PER_THREAD];
    Vec4 dt_sum = {};
#pragma unroll
    for (int c = 0; c < PER_THREAD; c++) {
        a[c] = load_vec4(A + (pos.d + c) * STATES + pos.quad * 4);
        g[c] = {};
        if (dlast_state && end == length) g[c] = load_vec4(dlast_state + pos.state + c * STATES);
    }
    auto load_chunk = [&](int t0) {
        return fetch(staging, u, dt, z, A, B, C, D, bias, doc_start_flags, dy, pos.row0, t0, end, channels,
                     u_stride, dt_stride, z_stride, B_stride, C_stride);
    };
    unsigned char is_doc_start = load_chunk(last_t0);
    for (int t0 = last_t0; t0 >= begin; t0 -= CHUNK) {
        stage(s, staging, is_doc_start, bias2, t0, end);
        if (t0 > begin) is_doc_start = load_chunk(t0 - CHUNK);
        __syncthreads();
#pragma unroll 4
        for (int k = CHUNK - 1; k >= 0; k--) {
            const Vec4 step = load_vec4(&s.dt[k][pos.first_channel]), gy = load_vec4(&s.gy[k][pos.first_channel]);
            const Vec4 cc = load_vec4(reinterpret_cast<const float *>(&s.C[k][pos.quad]));
#pragma unroll
            for (int c = 0; c < PER_THREAD; c++) {
                const float decay_dt = step[c] + s.reset_dt[k];
                dt_sum[c] += decay_dt;
#pragma unroll
                for (int n = 0; n < 4; n++) g[c][n] = ex2(decay_dt * a[c][n]) * fmaf(gy[c], cc[n], g[c][n]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < PER_THREAD; c++) {
        store4(end_states + seg * pos.batch * channels * STATES + pos.state + c * STATES,
               make_float4(g[c][0], g[c][1], g[c][2], g[c][3]));
        if (pos.quad == 0) dt_sums[(seg * pos.batch + pos.b) * channels + pos.d + c] = dt_sum[c];
    }
}

// Partial sums: dB_dC [block][b][l][32] over the block's channels; dA [segment][b][d][16], dD and dbias [segment][b][d] over
// a segment. end_states and dt_sums are read if gridDim.z > 1; dlast_state may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
scan_backward(INPUTS, const float *chunk_states, const T *dy, const float *dlast_state, const float *end_states,
              const float *dt_sums, T *du, T *ddt, T *dz, float *dA, float *dB_dC, float *dD, float *dbias,
              float *dinitial_state, SIZES) {
    Backward &s = *reinterpret_cast<Backward *>(shared_memory);
    const ThreadPosition pos(length, channels);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, out_d = blockIdx.x * CHANNELS + pos.out_channel;
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const int begin = blockIdx.z * segment_length, end = min(begin + segment_length, length);
    const int last_t0 = begin + (end - 1 - begin) / CHUNK * CHUNK, pair_d = blockIdx.x * CHANNELS + 2 * (tid & 63);
    Column *const next = s.before + FETCH * PER_THREAD;  // the state before the next chunk, and its inputs
    const Staging<false> staging{next + PER_THREAD};
    static_assert((FETCH + 1) * PER_THREAD + staging.COLUMNS <= PAIRS * PER_THREAD,
                  "fetch() overwrites states that are not read yet");
    const float2 bias2 = make_float2(bias[pair_d], bias[pair_d + 1]);
    // dC of state `quad * 4 + group` for groups below 4, dB above
    const int slot = (lane < 16 ? STATES : 0) + pos.quad * 4 + ((lane >> 2) & 3);
    const float skip = D[out_d];
    float gD = 0.0f, gbias = 0.0f;
    Vec4 a[PER_THREAD], g[PER_THREAD], gA[PER_THREAD];
#pragma unroll
    for (int c = 0; c < PER_THREAD; c++) {
        a[c] = load_vec4(A + (pos.d + c) * STATES + pos.quad * 4);
        float4 adjoint = dlast_state ? load4(dlast_state + pos.state + c * STATES) : zero4();
        for (int other = gridDim.z - 1; other > blockIdx.z; other--)
            if (other == gridDim.z - 1)  // includes dlast_state
                adjoint = load4(end_states + other * pos.batch * channels * STATES + pos.state + c * STATES);
            else
                adjoint = apply_segment(adjoint, make_float4(a[c][0], a[c][1], a[c][2], a[c][3]),
                                        dt_sums[(other * pos.batch + pos.b) * channels + pos.d + c],
                                        load4(end_states + other * pos.batch * channels * STATES + pos.state + c * STATES));
        g[c] = {{adjoint.x, adjoint.y, adjoint.z, adjoint.w}};
        gA[c] = {};
    }
    auto load_chunk = [&](int t0) {
#pragma unroll
        for (int c = 0; c < PER_THREAD; c++)
            async_copy(&next[c][tid],
                       chunk_states + ((pos.b * chunks + t0 / CHUNK) * channels + pos.d + c) * STATES + pos.quad * 4);
        return fetch(staging, u, dt, z, A, B, C, D, bias, doc_start_flags, dy, pos.row0, t0, end, channels,
                     u_stride, dt_stride, z_stride, B_stride, C_stride);
    };
    unsigned char is_doc_start = load_chunk(last_t0);
    for (int t0 = last_t0; t0 >= begin; t0 -= CHUNK) {
        stage(s.tile, staging, is_doc_start, bias2, t0, end);
        Vec4 h[PER_THREAD];
#pragma unroll
        for (int c = 0; c < PER_THREAD; c++) h[c] = load_vec4(reinterpret_cast<const float *>(&next[c][tid]));
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < CHUNK; k++) {  // states before every second token
            const Vec4 step = load_vec4(&s.tile.dt[k][pos.first_channel]), v = load_vec4(&s.tile.u[k][pos.first_channel]);
            const Vec4 b = load_vec4(reinterpret_cast<const float *>(&s.tile.B[k][pos.quad]));
#pragma unroll
            for (int c = 0; c < PER_THREAD; c++) {
                if (k % 2 == 0) s.before[k / 2 * PER_THREAD + c][tid] = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
                const float input = step[c] * v[c], decay_dt = step[c] + s.tile.reset_dt[k];
#pragma unroll
                for (int n = 0; n < 4; n++) h[c][n] = fmaf(ex2(decay_dt * a[c][n]), h[c][n], input * b[n]);
            }
        }
#pragma unroll 1
        for (int j = PAIRS - 1; j >= 0; j--) {
            if (j == FETCH - 1 && t0 > begin) is_doc_start = load_chunk(t0 - CHUNK);
            Vec4 before[2][PER_THREAD], decay[2][PER_THREAD];  // of two tokens
#pragma unroll
            for (int c = 0; c < PER_THREAD; c++)
                before[0][c] = load_vec4(reinterpret_cast<const float *>(&s.before[j * PER_THREAD + c][tid]));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int k = 2 * j + r;
                const Vec4 step = load_vec4(&s.tile.dt[k][pos.first_channel]), v = load_vec4(&s.tile.u[k][pos.first_channel]);
                const Vec4 b = load_vec4(reinterpret_cast<const float *>(&s.tile.B[k][pos.quad]));
#pragma unroll
                for (int c = 0; c < PER_THREAD; c++) {
                    const float input = step[c] * v[c], decay_dt = step[c] + s.tile.reset_dt[k];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        decay[r][c][n] = ex2(decay_dt * a[c][n]);
                        if (r == 0) before[1][c][n] = fmaf(decay[0][c][n], before[0][c][n], input * b[n]);
                    }
                }
            }
#pragma unroll
            for (int r = 1; r >= 0; r--) {
                const int k = 2 * j + r;
                const Vec4 step = load_vec4(&s.tile.dt[k][pos.first_channel]), v = load_vec4(&s.tile.u[k][pos.first_channel]);
                const Vec4 gy = load_vec4(&s.tile.gy[k][pos.first_channel]);
                const Vec4 b = load_vec4(reinterpret_cast<const float *>(&s.tile.B[k][pos.quad]));
                const Vec4 cc = load_vec4(reinterpret_cast<const float *>(&s.tile.C[k][pos.quad]));
                float terms[8] = {};  // dC and dB, summed over the thread's channels
                Vec4 from_B = {}, from_A = {}, y = {};
#pragma unroll
                for (int c = 0; c < PER_THREAD; c++) {
                    const float input = step[c] * v[c];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        const float decayed = decay[r][c][n] * before[r][c][n];
                        const float h_now = r == 0 ? before[1][c][n] : fmaf(input, b[n], decayed);
                        const float gh = fmaf(gy[c], cc[n], g[c][n]), ga = gh * decayed;
                        terms[n] = fmaf(gy[c], h_now, terms[n]);
                        terms[4 + n] = fmaf(gh, input, terms[4 + n]);
                        y[c] = fmaf(h_now, cc[n], y[c]);
                        from_B[c] = fmaf(gh, b[n], from_B[c]);
                        from_A[c] = fmaf(ga, a[c][n], from_A[c]);
                        gA[c][n] = fmaf(ga, step[c], gA[c][n]);
                        g[c][n] = gh * decay[r][c][n];
                    }
                }
                exchange<4>(terms, 16);
                exchange<2>(terms, 8);
                exchange<1>(terms, 4);
                s.sums[warp][k][slot] = terms[0];
                const float sum_B = over_states(from_B), sum_A = over_states(from_A), sum_y = over_states(y);
                const float out_dt = s.tile.dt[k][pos.out_channel], out_u = s.tile.u[k][pos.out_channel];
                const float out_gy = s.tile.gy[k][pos.out_channel];
                // the derivative of softplus from its value: 1 - exp(-dt), by its series where the subtraction cancels
                const float series = fmaf(out_dt, fmaf(out_dt, fmaf(out_dt, -1.0f / 24, 1.0f / 6), -0.5f), 1.0f);
                const float dsoftplus = out_dt < 0.1f ? out_dt * series : 1.0f - ex2(-out_dt * LOG2E);
                const float dx = fmaf(sum_B, out_u, sum_A * LN2) * dsoftplus;
                gD = fmaf(out_gy, out_u, gD);
                gbias += dx;
                if (t0 + k < end) {
                    const Index out = (Index)(pos.row0 + t0 + k) * channels + out_d;
                    store_as(du + out, fmaf(sum_B, out_dt, out_gy * skip));
                    store_as(ddt + out, dx);
                    store_as(dz + out, s.tile.dz[k][pos.out_channel] * fmaf(skip, out_u, sum_y));
                }
            }
        }
        __syncthreads();
        const int k = tid >> 3, n = 4 * (tid & 7);  // four sums of one token
        if (t0 + k < end) {
            const float4 p = load4(&s.sums[0][k][n]), q = load4(&s.sums[1][k][n]);
            const float4 r = load4(&s.sums[2][k][n]), v = load4(&s.sums[3][k][n]);
            store4(dB_dC + ((blockIdx.x * pos.batch + pos.b) * length + t0 + k) * (2 * STATES) + n,
                   make_float4(p.x + q.x + (r.x + v.x), p.y + q.y + (r.y + v.y), p.z + q.z + (r.z + v.z),
                               p.w + q.w + (r.w + v.w)));
        }
        // no barrier: the next chunk writes the sums only after its first barrier, and nothing else is read here
    }
#pragma unroll
    for (int c = 0; c < PER_THREAD; c++) {
        const Index offset = blockIdx.z * pos.batch * channels * STATES + pos.state + c * STATES;
        store4(dA + offset, make_float4(gA[c][0], gA[c][1], gA[c][2], gA[c][3]));
        if (blockIdx.z == 0)
            store4(dinitial_state + pos.state + c * STATES, make_float4(g[c][0], g[c][1], g[c][2], g[c][3]));
    }
    dD[(blockIdx.z * pos.batch + pos.b) * channels + out_d] = gD;
    dbias[(blockIdx.z * pos.batch + pos.b) * channels + out_d] = gbias;
}
