// Selective scan of Mamba-1 on NVIDIA GPUs, forward and backward, channel-last, deterministic.
//
// A block of 256 threads owns 64 channels of one batch row for the whole sequence; four neighbouring lanes share a channel
// and hold 4 of its 16 states each, in registers. At batch 1 and 8,192 channels this is 128 blocks, one per SM, without
// cutting the sequence. Time runs in tiles staged through shared memory: rows are read coalesced, two channels a lane.
// The forward keeps the state every CHUNK tokens; the backward recomputes from there. Sums over channels (dB, dC) go
// through shared memory to one partial sum per block; the caller adds the blocks: no atomics.
//
// Sizes: D channels (a multiple of 64), 16 states, A and states [d][16], A times log2(e).
#include "mamba_cuda.cuh"

#define CHANNELS 64
#define THREADS 256
#define STATES 16
#define TILE 16   // tokens of a forward tile
#define CHUNK 32  // tokens between kept states; TILE divides it
#define SUB 4     // tokens whose states and decays the backward holds at once
#define SUBS (CHUNK / SUB)

#ifndef EMULATED
extern __shared__ float4 shared_memory[];
#endif

__device__ inline void advance(float4 &h, const float4 a, const float4 B, float dt, float du) {
    h.x = fmaf(ex2(dt * a.x), h.x, du * B.x);
    h.y = fmaf(ex2(dt * a.y), h.y, du * B.y);
    h.z = fmaf(ex2(dt * a.z), h.z, du * B.z);
    h.w = fmaf(ex2(dt * a.w), h.w, du * B.w);
}
__device__ inline float dot(const float4 a, const float4 b) {
    return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w)));
}
__device__ inline float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

// Rows of u, dt, z [b][l] are u_row, ... elements apart, of B and C B_row, C_row. first may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
scan_forward(const T *u, const T *dt, const T *z, const float *A, const T *B, const T *C, const float *D,
             const float *bias, const unsigned char *start_flags, const float *first, T *y, float *last, float *kept,
             int length, int channels, Index u_row, Index dt_row, Index z_row, Index B_row, Index C_row) {
    __shared__ float s_dt[TILE][CHANNELS], s_du[TILE][CHANNELS], s_y[TILE][THREADS];
    __shared__ float4 s_B[TILE][4], s_C[TILE][4];
    const int tid = threadIdx.x, quad = tid & 3, d = blockIdx.x * CHANNELS + (tid >> 2);
    const int lane = tid & 31, warp = tid >> 5, pair = blockIdx.x * CHANNELS + 2 * lane;
    const Index row0 = (Index)blockIdx.y * length, state = ((Index)blockIdx.y * channels + d) * STATES + quad * 4;
    const Starts starts{start_flags};
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const float4 a = *reinterpret_cast<const float4 *>(A + d * STATES + quad * 4);
    const float2 skip = make_float2(D[pair], D[pair + 1]), shift = make_float2(bias[pair], bias[pair + 1]);
    float4 h = first ? *reinterpret_cast<const float4 *>(first + state) : zero4();
    for (int t0 = 0; t0 < length; t0 += TILE) {
        if (t0 % CHUNK == 0)
            *reinterpret_cast<float4 *>(
                kept + (((Index)blockIdx.y * chunks + t0 / CHUNK) * channels + d) * STATES + quad * 4) = h;
        float2 held_u[2], held_z[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int k = warp + 8 * i;
            const Index row = row0 + t0 + k;
            float2 step = make_float2(0.0f, 0.0f);  // past the end dt = 0: the state stays as it is
            held_u[i] = held_z[i] = step;
            if (t0 + k < length) {
                const float2 x = load2(dt + row * dt_row + pair);
                held_u[i] = load2(u + row * u_row + pair);
                held_z[i] = load2(z + row * z_row + pair);
                step = make_float2(softplus(x.x + shift.x), softplus(x.y + shift.y));
            }
            *reinterpret_cast<float2 *>(&s_dt[k][2 * lane]) = step;
            *reinterpret_cast<float2 *>(&s_du[k][2 * lane]) = make_float2(step.x * held_u[i].x, step.y * held_u[i].y);
        }
        {
            const int k = tid / STATES, n = tid % STATES;
            const bool inside = t0 + k < length;
            reinterpret_cast<float *>(s_B)[tid] = inside ? widen(B[(row0 + t0 + k) * B_row + n]) : 0.0f;
            reinterpret_cast<float *>(s_C)[tid] = inside ? widen(C[(row0 + t0 + k) * C_row + n]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE; k++) {
            if (t0 + k < length && starts.at(row0 + t0 + k)) h = zero4();
            advance(h, a, s_B[k][quad], s_dt[k][tid >> 2], s_du[k][tid >> 2]);
            s_y[k][tid] = dot(h, s_C[k][quad]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int k = warp + 8 * i;
            if (t0 + k >= length) continue;
            const float4 p = *reinterpret_cast<const float4 *>(&s_y[k][8 * lane]);
            const float4 q = *reinterpret_cast<const float4 *>(&s_y[k][8 * lane + 4]);
            const float2 v = held_u[i], g = held_z[i];
            const float y0 = fmaf(skip.x, v.x, p.x + p.y + (p.z + p.w)), y1 = fmaf(skip.y, v.y, q.x + q.y + (q.z + q.w));
            store2(y + (row0 + t0 + k) * channels + pair, make_float2(y0 * g.x * sigmoid(g.x), y1 * g.y * sigmoid(g.y)));
        }
        // no barrier: the next tile's writes to what this one reads come after its own first barrier
    }
    *reinterpret_cast<float4 *>(last + state) = h;
}

// Shared memory of the backward, 108 KiB: two blocks fit an SM.
struct Backward {
    float dt[CHUNK][CHANNELS], du[CHUNK][CHANNELS], gy[CHUNK][CHANNELS];
    float4 B[CHUNK][4], C[CHUNK][4];
    float4 sub[SUBS][THREADS];   // states before each SUB tokens
    float4 h[SUB][THREADS];      // state before a token; then (sum gh B, sum ga A, y, -) of the thread's states
    float4 e[SUB][THREADS];      // decay of a token; then its terms of dB
    float4 dC[SUB][THREADS];     // terms of dC
};

// dB_dC [block][b][l][32]: partial sums over the block's channels. dA [b][d][16], dD and dbias [b][d]: of one batch row.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
scan_backward(const T *u, const T *dt, const T *z, const float *A, const T *B, const T *C, const float *D,
              const float *bias, const unsigned char *start_flags, const float *kept, const T *dy, const float *dlast,
              T *du, T *ddt, T *dz, float *dA, float *dB_dC, float *dD, float *dbias, float *dfirst, int length,
              int channels, Index u_row, Index dt_row, Index z_row, Index B_row, Index C_row) {
    Backward &s = *reinterpret_cast<Backward *>(shared_memory);
    const int tid = threadIdx.x, quad = tid & 3, c = tid >> 2, d = blockIdx.x * CHANNELS + c;
    const int lane = tid & 31, warp = tid >> 5, pair = blockIdx.x * CHANNELS + 2 * lane;
    const int out_c = tid & 63, out_t = tid >> 6, out_d = blockIdx.x * CHANNELS + out_c;  // one channel of one token
    const Index row0 = (Index)blockIdx.y * length, state = ((Index)blockIdx.y * channels + d) * STATES + quad * 4;
    const Index batch = gridDim.y;
    const Starts starts{start_flags};
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const float4 a = *reinterpret_cast<const float4 *>(A + d * STATES + quad * 4);
    float4 adjoint = *reinterpret_cast<const float4 *>(dlast + state), gA = zero4();
    float gD = 0.0f, gbias = 0.0f;
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int t0 = chunk * CHUNK;
        for (int k = warp; k < CHUNK; k += THREADS / 32) {
            const Index row = row0 + t0 + k;
            float2 step = make_float2(0.0f, 0.0f), input = step, gy = step;
            if (t0 + k < length) {
                const float2 x = load2(dt + row * dt_row + pair), g = load2(z + row * z_row + pair);
                const float2 v = load2(u + row * u_row + pair), o = load2(dy + row * channels + pair);
                step = make_float2(softplus(x.x + bias[pair]), softplus(x.y + bias[pair + 1]));
                input = make_float2(step.x * v.x, step.y * v.y);
                gy = make_float2(o.x * g.x * sigmoid(g.x), o.y * g.y * sigmoid(g.y));
            }
            *reinterpret_cast<float2 *>(&s.dt[k][2 * lane]) = step;
            *reinterpret_cast<float2 *>(&s.du[k][2 * lane]) = input;
            *reinterpret_cast<float2 *>(&s.gy[k][2 * lane]) = gy;
        }
        for (int i = tid; i < CHUNK * STATES; i += THREADS) {
            const int k = i / STATES, n = i % STATES;
            const bool inside = t0 + k < length;
            reinterpret_cast<float *>(s.B)[i] = inside ? widen(B[(row0 + t0 + k) * B_row + n]) : 0.0f;
            reinterpret_cast<float *>(s.C)[i] = inside ? widen(C[(row0 + t0 + k) * C_row + n]) : 0.0f;
        }
        __syncthreads();
        float4 h = *reinterpret_cast<const float4 *>(
            kept + (((Index)blockIdx.y * chunks + chunk) * channels + d) * STATES + quad * 4);
        for (int sub = 0; sub < SUBS; sub++) {  // states before every SUB tokens
            s.sub[sub][tid] = h;
            if (sub == SUBS - 1) break;
#pragma unroll
            for (int k = sub * SUB; k < (sub + 1) * SUB; k++) {
                if (t0 + k < length && starts.at(row0 + t0 + k)) h = zero4();
                advance(h, a, s.B[k][quad], s.dt[k][c], s.du[k][c]);
            }
        }
        for (int sub = SUBS - 1; sub >= 0; sub--) {
            h = s.sub[sub][tid];
            float y[SUB];
#pragma unroll
            for (int j = 0; j < SUB; j++) {  // forward again: every state and decay, and dC
                const int k = sub * SUB + j;
                const bool opens = t0 + k < length && starts.at(row0 + t0 + k);
                const float step = s.dt[k][c], input = s.du[k][c], gy = s.gy[k][c];
                const float4 b = s.B[k][quad];
                float4 e = zero4();
                if (!opens) e = make_float4(ex2(step * a.x), ex2(step * a.y), ex2(step * a.z), ex2(step * a.w));
                s.h[j][tid] = h;
                s.e[j][tid] = e;
                h = make_float4(fmaf(e.x, h.x, input * b.x), fmaf(e.y, h.y, input * b.y),
                                fmaf(e.z, h.z, input * b.z), fmaf(e.w, h.w, input * b.w));
                y[j] = dot(h, s.C[k][quad]);
                s.dC[j][tid] = make_float4(gy * h.x, gy * h.y, gy * h.z, gy * h.w);
            }
#pragma unroll
            for (int j = SUB - 1; j >= 0; j--) {
                const int k = sub * SUB + j;
                const float step = s.dt[k][c], input = s.du[k][c], gy = s.gy[k][c];
                const float4 b = s.B[k][quad], cc = s.C[k][quad], e = s.e[j][tid], before = s.h[j][tid];
                const float4 g = make_float4(fmaf(gy, cc.x, adjoint.x), fmaf(gy, cc.y, adjoint.y),
                                             fmaf(gy, cc.z, adjoint.z), fmaf(gy, cc.w, adjoint.w));
                adjoint = make_float4(g.x * e.x, g.y * e.y, g.z * e.z, g.w * e.w);
                const float4 ga = make_float4(adjoint.x * before.x, adjoint.y * before.y, adjoint.z * before.z,
                                              adjoint.w * before.w);
                gA = make_float4(fmaf(ga.x, step, gA.x), fmaf(ga.y, step, gA.y), fmaf(ga.z, step, gA.z),
                                 fmaf(ga.w, step, gA.w));
                s.h[j][tid] = make_float4(dot(g, b), dot(ga, a), y[j], 0.0f);
                s.e[j][tid] = make_float4(g.x * input, g.y * input, g.z * input, g.w * input);
            }
            __syncthreads();
            {  // sums over the block's channels: a warp takes dB or dC of one token, its lanes (part of channels, quad)
                const int t = t0 + sub * SUB + (warp >> 1);
                const float4 *terms = warp & 1 ? s.dC[warp >> 1] : s.e[warp >> 1];
                float4 sum = zero4();
#pragma unroll
                for (int i = 0; i < THREADS / 32; i++) {
                    const float4 v = terms[i * 32 + lane];
                    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
                }
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) {
                    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, mask);
                    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, mask);
                    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, mask);
                    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, mask);
                }
                if (lane < 4 && t < length)
                    reinterpret_cast<float4 *>(dB_dC)[((blockIdx.x * batch + blockIdx.y) * length + t) * 8 +
                                                      (warp & 1) * 4 + lane] = sum;
            }
            const int k = sub * SUB + out_t;
            if (t0 + k < length) {  // du, ddt and dz of one channel of one token
                const Index row = row0 + t0 + k;
                float from_B = 0.0f, from_A = 0.0f, yy = 0.0f;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 v = s.h[out_t][out_c * 4 + j];
                    from_B += v.x, from_A += v.y, yy += v.z;
                }
                const float v = widen(u[row * u_row + out_d]), x = widen(dt[row * dt_row + out_d]) + bias[out_d];
                const float g = widen(z[row * z_row + out_d]), o = widen(dy[row * channels + out_d]);
                const float gate = sigmoid(g), gy = s.gy[k][out_c];
                const float dx = fmaf(from_B, v, from_A * LN2) * sigmoid(x);
                yy = fmaf(D[out_d], v, yy);
                du[row * channels + out_d] = narrow(fmaf(from_B, s.dt[k][out_c], gy * D[out_d]));
                ddt[row * channels + out_d] = narrow(dx);
                dz[row * channels + out_d] = narrow(o * yy * gate * fmaf(g, 1.0f - gate, 1.0f));
                gD = fmaf(gy, v, gD);
                gbias += dx;
            }
            __syncthreads();
        }
    }
    *reinterpret_cast<float4 *>(dA + state) = gA;
    *reinterpret_cast<float4 *>(dfirst + state) = adjoint;
    s.h[0][tid] = make_float4(gD, gbias, 0.0f, 0.0f);  // four threads hold parts of a channel's sums
    __syncthreads();
    if (tid < CHANNELS) {
        float sum_D = 0.0f, sum_bias = 0.0f;
        for (int i = 0; i < 4; i++) sum_D += s.h[0][tid + 64 * i].x, sum_bias += s.h[0][tid + 64 * i].y;
        dD[(Index)blockIdx.y * channels + out_d] = sum_D;
        dbias[(Index)blockIdx.y * channels + out_d] = sum_bias;
    }
}
