// Selective scan of Mamba-1 on NVIDIA GPUs, backward, channel-last, deterministic.
//
// A block of 128 threads owns 128 channels of one batch row, a warp 32 of them; a thread holds 4 channels by 4 states. Time
// runs backwards in chunks that start from the forward's kept states: a first pass keeps the state before every second
// token in shared memory, then two tokens at a time are computed again and their adjoints with them, in registers.
//
// Sums over states (du, ddt, dz) end in the lane whose number is the channel's, sums over channels (dB, dC) in the lane of
// their state, by exchanging halves between lanes; what warps hold of dB and dC is added in shared memory to one partial
// sum per block, and the caller adds the blocks: no atomics. 106 KiB of shared memory: two blocks an SM.
//
// Eight warps an SM hide little of memory's latency. So what a chunk needs is on its way while the chunk behind it is
// computed: copied without registers to where kept states have been read already, each thread's own.
#include "scan.cuh"

#define CHANNELS 128
#define THREADS 128
#define QUADS 4  // channels of a thread, and states
#define PAIRS (CHUNK / 2)
#define FETCH 2  // pairs of tokens still to compute when the next chunk is asked for

#include "scan_stage.cuh"

#ifndef EMULATED
extern __shared__ float4 shared_memory[];
#endif

struct Backward {
    Tile tile;
    Column before[PAIRS * QUADS];                 // states before every second token
    float sums[THREADS / 32][CHUNK][2 * STATES];  // a warp's dB and dC
};

struct Four {
    float v[4];
    __device__ float operator[](int i) const { return v[i]; }
    __device__ float &operator[](int i) { return v[i]; }
};
__device__ inline Four four(const float *p) {
    const float4 x = load4(p);
    return {{x.x, x.y, x.z, x.w}};
}

// Halves of 2 * HALF values go to the lane whose number differs in `bit`, which keeps the other half.
template <int HALF> __device__ inline void exchange(float *v, int bit) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float sent = upper ? v[i] : v[i + HALF], held = upper ? v[i + HALF] : v[i];
        v[i] = held + __shfl_xor_sync(0xffffffffu, sent, bit);
    }
}
// The sum over four lanes of values of four channels: each lane gets the one of its number.
__device__ inline float over_states(Four x) {
    exchange<2>(x.v, 2);
    exchange<1>(x.v, 1);
    return x[0];
}

// Where a thread is.
struct Place {
    int quad, first, own, d;  // its states; in the block, its first channel and the one whose sums it gets; d of `first`
    int row0;
    Index b, batch, state;
    __device__ Place(int length, int channels) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        quad = lane & 3, first = warp * 32 + (lane >> 2) * QUADS, own = threadIdx.x, d = blockIdx.x * CHANNELS + first;
        b = blockIdx.y, batch = gridDim.y, row0 = blockIdx.y * length, state = (b * channels + d) * STATES + quad * 4;
    }
};

// For all segments but the first: blockIdx.z counts from 1. ends: the adjoint before a segment, from zero behind it (the
// last from dlast, which may be null).
extern "C" __global__ void __launch_bounds__(THREADS)
scan_adjoint(INPUTS, const T *dy, const float *dlast, float *ends, float *times, SIZES) {
    __shared__ Staged s;
    __shared__ Column columns[Held<true>::COLUMNS];
    const Held<true> held{columns};
    const Place at(length, channels);
    const int part = blockIdx.z + 1, begin = part * segment, end = min(begin + segment, length);
    const int last = begin + (end - 1 - begin) / CHUNK * CHUNK, pair = blockIdx.x * CHANNELS + 2 * (threadIdx.x & 63);
    const float2 shift = make_float2(bias[pair], bias[pair + 1]);
    Four a[QUADS], g[QUADS];
    Four time = {};
#pragma unroll
    for (int c = 0; c < QUADS; c++) {
        a[c] = four(A + (at.d + c) * STATES + at.quad * 4);
        g[c] = {};
        if (dlast && end == length) g[c] = four(dlast + at.state + c * STATES);
    }
    auto read = [&](int t0) {
        return fetch(held, u, dt, z, A, B, C, D, bias, start_flags, dy, at.row0, t0, end, channels, u_row, dt_row, z_row,
                     B_row, C_row);
    };
    unsigned char opens = read(last);
    for (int t0 = last; t0 >= begin; t0 -= CHUNK) {
        stage(s, held, opens, shift, t0, end);
        if (t0 > begin) opens = read(t0 - CHUNK);
        __syncthreads();
#pragma unroll 4
        for (int k = CHUNK - 1; k >= 0; k--) {
            const Four step = four(&s.dt[k][at.first]), gy = four(&s.gy[k][at.first]);
            const Four cc = four(reinterpret_cast<const float *>(&s.C[k][at.quad]));
#pragma unroll
            for (int c = 0; c < QUADS; c++) {
                const float passed = step[c] + s.opens[k];
                time[c] += passed;
#pragma unroll
                for (int n = 0; n < 4; n++) g[c][n] = ex2(passed * a[c][n]) * fmaf(gy[c], cc[n], g[c][n]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < QUADS; c++) {
        store4(ends + part * at.batch * channels * STATES + at.state + c * STATES, make_float4(g[c][0], g[c][1], g[c][2], g[c][3]));
        if (at.quad == 0) times[(part * at.batch + at.b) * channels + at.d + c] = time[c];
    }
}

// dB_dC [block][b][l][32]: partial sums over the block's channels. Of one segment and batch row: dA [segment][b][d][16],
// dD and dbias [segment][b][d]. ends and times are read for gridDim.z > 1; dlast may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
scan_backward(INPUTS, const float *kept, const T *dy, const float *dlast, const float *ends, const float *times, T *du, T *ddt,
              T *dz, float *dA, float *dB_dC, float *dD, float *dbias, float *dfirst, SIZES) {
    Backward &s = *reinterpret_cast<Backward *>(shared_memory);
    const Place at(length, channels);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, own_d = blockIdx.x * CHANNELS + at.own;
    const int chunks = (length + CHUNK - 1) / CHUNK, begin = blockIdx.z * segment, end = min(begin + segment, length);
    const int last = begin + (end - 1 - begin) / CHUNK * CHUNK, pair = blockIdx.x * CHANNELS + 2 * (tid & 63);
    Column *const next = s.before + FETCH * QUADS;  // the state before the next chunk, and its inputs
    const Held<false> held{next + QUADS};
    static_assert((FETCH + 1) * QUADS + held.COLUMNS <= PAIRS * QUADS, "states that are still to be read");
    const float2 shift = make_float2(bias[pair], bias[pair + 1]);
    // dC of state `quad * 4 + group` for groups below 4, dB above
    const int slot = (lane < 16 ? STATES : 0) + at.quad * 4 + ((lane >> 2) & 3);
    const float skip = D[own_d];
    float gD = 0.0f, gbias = 0.0f;
    Four a[QUADS], g[QUADS], gA[QUADS];
#pragma unroll
    for (int c = 0; c < QUADS; c++) {
        a[c] = four(A + (at.d + c) * STATES + at.quad * 4);
        float4 joined = dlast ? load4(dlast + at.state + c * STATES) : zero4();
        for (int part = gridDim.z - 1; part > blockIdx.z; part--)
            if (part == gridDim.z - 1)  // from dlast already
                joined = load4(ends + part * at.batch * channels * STATES + at.state + c * STATES);
            else
                joined = cross(joined, make_float4(a[c][0], a[c][1], a[c][2], a[c][3]),
                               times[(part * at.batch + at.b) * channels + at.d + c],
                               load4(ends + part * at.batch * channels * STATES + at.state + c * STATES));
        g[c] = {{joined.x, joined.y, joined.z, joined.w}};
        gA[c] = {};
    }
    auto read = [&](int t0) {
#pragma unroll
        for (int c = 0; c < QUADS; c++)
            depart(&next[c][tid], kept + ((at.b * chunks + t0 / CHUNK) * channels + at.d + c) * STATES + at.quad * 4);
        return fetch(held, u, dt, z, A, B, C, D, bias, start_flags, dy, at.row0, t0, end, channels, u_row, dt_row, z_row,
                     B_row, C_row);
    };
    unsigned char opens = read(last);
    for (int t0 = last; t0 >= begin; t0 -= CHUNK) {
        stage(s.tile, held, opens, shift, t0, end);
        Four h[QUADS];
#pragma unroll
        for (int c = 0; c < QUADS; c++) h[c] = four(reinterpret_cast<const float *>(&next[c][tid]));
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < CHUNK; k++) {  // states before every second token
            const Four step = four(&s.tile.dt[k][at.first]), v = four(&s.tile.u[k][at.first]);
            const Four b = four(reinterpret_cast<const float *>(&s.tile.B[k][at.quad]));
#pragma unroll
            for (int c = 0; c < QUADS; c++) {
                if (k % 2 == 0) s.before[k / 2 * QUADS + c][tid] = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
                const float input = step[c] * v[c], passed = step[c] + s.tile.opens[k];
#pragma unroll
                for (int n = 0; n < 4; n++) h[c][n] = fmaf(ex2(passed * a[c][n]), h[c][n], input * b[n]);
            }
        }
#pragma unroll 1
        for (int j = PAIRS - 1; j >= 0; j--) {
            if (j == FETCH - 1 && t0 > begin) opens = read(t0 - CHUNK);
            Four before[2][QUADS], decay[2][QUADS];  // of the pair's tokens
#pragma unroll
            for (int c = 0; c < QUADS; c++) before[0][c] = four(reinterpret_cast<const float *>(&s.before[j * QUADS + c][tid]));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int k = 2 * j + r;
                const Four step = four(&s.tile.dt[k][at.first]), v = four(&s.tile.u[k][at.first]);
                const Four b = four(reinterpret_cast<const float *>(&s.tile.B[k][at.quad]));
#pragma unroll
                for (int c = 0; c < QUADS; c++) {
                    const float input = step[c] * v[c], passed = step[c] + s.tile.opens[k];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        decay[r][c][n] = ex2(passed * a[c][n]);
                        if (r == 0) before[1][c][n] = fmaf(decay[0][c][n], before[0][c][n], input * b[n]);
                    }
                }
            }
#pragma unroll
            for (int r = 1; r >= 0; r--) {
                const int k = 2 * j + r;
                const Four step = four(&s.tile.dt[k][at.first]), v = four(&s.tile.u[k][at.first]);
                const Four gy = four(&s.tile.gy[k][at.first]);
                const Four b = four(reinterpret_cast<const float *>(&s.tile.B[k][at.quad]));
                const Four cc = four(reinterpret_cast<const float *>(&s.tile.C[k][at.quad]));
                float terms[8] = {};  // of dC and dB, over the thread's channels
                Four from_B = {}, from_A = {}, y = {};
#pragma unroll
                for (int c = 0; c < QUADS; c++) {
                    const float input = step[c] * v[c];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        const float past = decay[r][c][n] * before[r][c][n];
                        const float now = r == 0 ? before[1][c][n] : fmaf(input, b[n], past);
                        const float gh = fmaf(gy[c], cc[n], g[c][n]), ga = gh * past;
                        terms[n] = fmaf(gy[c], now, terms[n]);
                        terms[4 + n] = fmaf(gh, input, terms[4 + n]);
                        y[c] = fmaf(now, cc[n], y[c]);
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
                const float own_dt = s.tile.dt[k][at.own], own_u = s.tile.u[k][at.own], own_gy = s.tile.gy[k][at.own];
                // the derivative of softplus from its value: 1 - exp(-dt), by its series where that cancels
                const float series = fmaf(own_dt, fmaf(own_dt, fmaf(own_dt, -1.0f / 24, 1.0f / 6), -0.5f), 1.0f);
                const float slope = own_dt < 0.1f ? own_dt * series : 1.0f - ex2(-own_dt * LOG2E);
                const float dx = fmaf(sum_B, own_u, sum_A * LN2) * slope;
                gD = fmaf(own_gy, own_u, gD);
                gbias += dx;
                if (t0 + k < end) {
                    const Index out = (Index)(at.row0 + t0 + k) * channels + own_d;
                    put(du + out, fmaf(sum_B, own_dt, own_gy * skip));
                    put(ddt + out, dx);
                    put(dz + out, s.tile.dz[k][at.own] * fmaf(skip, own_u, sum_y));
                }
            }
        }
        __syncthreads();
        const int k = tid >> 3, n = 4 * (tid & 7);  // four sums of one token
        if (t0 + k < end) {
            const float4 p = load4(&s.sums[0][k][n]), q = load4(&s.sums[1][k][n]);
            const float4 r = load4(&s.sums[2][k][n]), v = load4(&s.sums[3][k][n]);
            store4(dB_dC + ((blockIdx.x * at.batch + at.b) * length + t0 + k) * (2 * STATES) + n,
                   make_float4(p.x + q.x + (r.x + v.x), p.y + q.y + (r.y + v.y), p.z + q.z + (r.z + v.z),
                               p.w + q.w + (r.w + v.w)));
        }
        // no barrier: the next chunk writes the sums after its own first barrier, and nothing else is read here
    }
#pragma unroll
    for (int c = 0; c < QUADS; c++) {
        const Index part = blockIdx.z * at.batch * channels * STATES + at.state + c * STATES;
        store4(dA + part, make_float4(gA[c][0], gA[c][1], gA[c][2], gA[c][3]));
        if (blockIdx.z == 0) store4(dfirst + at.state + c * STATES, make_float4(g[c][0], g[c][1], g[c][2], g[c][3]));
    }
    dD[(blockIdx.z * at.batch + at.b) * channels + own_d] = gD;
    dbias[(blockIdx.z * at.batch + at.b) * channels + own_d] = gbias;
}
