// Selective scan of Mamba-1 on a CPU, forward and backward, fp32, channel-last.
//
// Axes: b batch, l time, d channel, n state. Time runs sequentially with the states of one vector of channels in
// registers. The backward starts each chunk of time from a kept state and computes the chunk's states again.
#include "mamba_cpu.h"

static const int CHUNK = 16;  // time steps between kept states: a chunk's states and decays stay in the first-level cache

// Sizes and inputs. Rows of u, dt, z, B and C may be parts of wider rows: *_row is the distance of two time steps in
// floats. Channels are padded by the caller to a multiple of W, states to a number that is built.
struct Scan {
    int64_t batch, length, channels, states;
    const float *u, *dt, *z, *A, *B, *C, *D, *bias;  // A [d][n]
    int64_t u_row, dt_row, z_row, B_row, C_row, threads;
    const uint8_t *starts;  // [b][l], or null
    const float *first;     // [b][d][n], or null
};

// dA [d][n], dB and dC [b][l][n], first [b][d][n].
struct Gradients {
    float *u, *dt, *z, *A, *B, *C, *D, *bias, *first;
};

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }
static int steps_of(int64_t length, int64_t chunk) { return int(length - chunk * CHUNK < CHUNK ? length - chunk * CHUNK : CHUNK); }

// W rows of N floats to N vectors over the rows, and back.
template <int N> static inline void gather(float *to, const float *from, float scale) {
    for (int w = 0; w < W; w++)
        for (int n = 0; n < N; n++) to[n * W + w] = from[w * N + n] * scale;
}
template <int N> static inline void scatter(float *to, const float *from) {
    for (int w = 0; w < W; w++)
        for (int n = 0; n < N; n++) to[w * N + n] = from[n * W + w];
}

// What the steps of a chunk need besides states, of one vector of channels: dt, dt u, D u and SiLU(z). Computed ahead of
// the recurrence, so that these long chains of operations overlap.
struct Steps {
    float dt[CHUNK * W], du[CHUNK * W], direct[CHUNK * W], gate[CHUNK * W];
    Steps(const Scan &s, int64_t row0, int steps, int64_t d) {
        const V skip = load(s.D + d), bias = load(s.bias + d);
        for (int k = 0; k < steps; k++) {
            const V u = load(s.u + (row0 + k) * s.u_row + d), z = load(s.z + (row0 + k) * s.z_row + d);
            const V step = softplus(load(s.dt + (row0 + k) * s.dt_row + d) + bias);
            store(dt + k * W, step), store(du + k * W, step * u);
            store(direct + k * W, skip * u), store(gate + k * W, z * sigmoid(z));
        }
    }
};

// One chunk of one vector of channels; state [n][W] before and after.
template <int N> static void advance(const Scan &s, const float *A, float *state, float *y, int64_t row0, int steps, int64_t d) {
    const Steps at(s, row0, steps, d);
    V h[N];
    for (int n = 0; n < N; n++) h[n] = load(state + n * W);
    for (int k = 0; k < steps; k++) {
        const int64_t row = row0 + k;
        if (s.starts && s.starts[row])
            for (int n = 0; n < N; n++) h[n] = V{};
        const V dt = load(at.dt + k * W), du = load(at.du + k * W);
        const float *Bt = s.B + row * s.B_row, *Ct = s.C + row * s.C_row;
        V y0 = load(at.direct + k * W), y1 = V{};
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            h[n] = exp2v(dt * load(A + n * W)) * h[n] + du * splat(Bt[n]);
            if (n & 1) y1 += h[n] * splat(Ct[n]);
            else y0 += h[n] * splat(Ct[n]);
        }
        store(y + row * s.channels + d, (y0 + y1) * load(at.gate + k * W));
    }
    for (int n = 0; n < N; n++) store(state + n * W, h[n]);
}

template <int N> static void scan_forward(const Scan &s, float *y, float *last, float *kept, const Piece &p) {
    const int64_t L = s.length, D = s.channels, C = chunks_of(L), b = p.b, width = p.d1 - p.d0;
    std::vector<float> A(N * width), state(N * width);
    for (int64_t d = p.d0; d < p.d1; d += W) {
        gather<N>(&A[N * (d - p.d0)], s.A + d * N, LOG2E);
        if (s.first) gather<N>(&state[N * (d - p.d0)], s.first + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = 0; chunk < C; chunk++)
        for (int64_t d = p.d0; d < p.d1; d += W) {
            float *h = &state[N * (d - p.d0)];
            for (int n = 0; n < N; n++) store(kept + ((b * C + chunk) * N + n) * D + d, load(h + n * W));
            advance<N>(s, &A[N * (d - p.d0)], h, y, b * L + chunk * CHUNK, steps_of(L, chunk), d);
        }
    for (int64_t d = p.d0; d < p.d1; d += W) scatter<N>(last + (b * D + d) * N, &state[N * (d - p.d0)]);
}

// One chunk of one vector of channels. Per step k and state n: e decay, p decay times the state before, and the terms of
// dB and dC, which gather over the piece's channels a vector at a time; per step the fields below.
enum { GY, DT, DU, U, SLOPE, DZ, Y, SUM_DU, SUM_DT, FIELDS };
template <int N> struct Chunk {
    float e[CHUNK * N * W], p[CHUNK * N * W], dB[CHUNK * N * W], dC[CHUNK * N * W], at[CHUNK * FIELDS * W];
};

// What needs no state, as in the forward; returns the chunk's part of dD.
template <int N> static V prepare(const Scan &s, const float *dy, Chunk<N> &c, int64_t row0, int steps, int64_t d) {
    const V skip = load(s.D + d), bias = load(s.bias + d);
    V dD = V{};
    for (int k = 0; k < steps; k++) {
        const int64_t row = row0 + k;
        const V u = load(s.u + row * s.u_row + d), x = load(s.dt + row * s.dt_row + d) + bias, dt = softplus(x);
        const V z = load(s.z + row * s.z_row + d), gate = sigmoid(z), dout = load(dy + row * s.channels + d), gy = dout * z * gate;
        float *at = c.at + k * FIELDS * W;
        store(at + GY * W, gy), store(at + DT * W, dt), store(at + DU * W, dt * u), store(at + U * W, u);
        store(at + SLOPE * W, sigmoid(x)), store(at + Y * W, skip * u);
        store(at + DZ * W, dout * gate * (splat(1.0f) + z * (splat(1.0f) - gate)));
        store(at + SUM_DU * W, V{}), store(at + SUM_DT * W, V{});
        dD += gy * u;
    }
    return dD;
}

// Forward again from the kept state, keeping decays and states; writes dz and adds to dC.
template <int N>
static void recompute(const Scan &s, const float *A, const float *kept, float *dz, Chunk<N> &c, int64_t row0, int steps, int64_t d) {
    V h[N];
    for (int n = 0; n < N; n++) h[n] = load(kept + n * s.channels + d);
    for (int k = 0; k < steps; k++) {
        const int64_t row = row0 + k;
        const bool opens = s.starts && s.starts[row];
        const float *Bt = s.B + row * s.B_row, *Ct = s.C + row * s.C_row, *at = c.at + k * FIELDS * W;
        const V dt = load(at + DT * W), du = load(at + DU * W), gy = load(at + GY * W);
        V y0 = load(at + Y * W), y1 = V{};
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const int i = (k * N + n) * W;
            const V e = opens ? V{} : exp2v(dt * load(A + n * W)), p = e * h[n];
            store(c.e + i, e);
            store(c.p + i, p);
            h[n] = p + du * splat(Bt[n]);
            store(c.dC + i, load(c.dC + i) + gy * h[n]);
            if (n & 1) y1 += h[n] * splat(Ct[n]);
            else y0 += h[n] * splat(Ct[n]);
        }
        store(dz + row * s.channels + d, load(at + DZ * W) * (y0 + y1));
    }
}

// The adjoint recurrence of M states from n0 on, backwards through the chunk; dA and the sums over states gather.
template <int N, int M>
static void adjoint(const Scan &s, const float *A, float *state, float *dA, Chunk<N> &c, int64_t row0, int steps, int n0) {
    V g[M], gA[M];
    for (int n = 0; n < M; n++) g[n] = load(state + (n0 + n) * W), gA[n] = load(dA + (n0 + n) * W);
    for (int k = steps - 1; k >= 0; k--) {
        const int64_t row = row0 + k;
        const float *Bt = s.B + row * s.B_row + n0, *Ct = s.C + row * s.C_row + n0;
        float *at = c.at + k * FIELDS * W;
        const V gy = load(at + GY * W), dt = load(at + DT * W), du = load(at + DU * W);
        V sdu = load(at + SUM_DU * W), sdt = load(at + SUM_DT * W);
#pragma GCC unroll 8
        for (int n = 0; n < M; n++) {
            const int i = (k * N + n0 + n) * W;
            const V gh = gy * splat(Ct[n]) + g[n], ga = gh * load(c.p + i);
            store(c.dB + i, load(c.dB + i) + gh * du);
            sdu += gh * splat(Bt[n]);
            g[n] = gh * load(c.e + i);
            gA[n] += ga * dt;
            sdt += ga * load(A + (n0 + n) * W);
        }
        store(at + SUM_DU * W, sdu), store(at + SUM_DT * W, sdt);
    }
    for (int n = 0; n < M; n++) store(state + (n0 + n) * W, g[n]), store(dA + (n0 + n) * W, gA[n]);
}

// dB and dC of the piece, [b][l][n]; dA [d][n], dD and dbias [d] of one batch row.
template <int N>
static void scan_backward(const Scan &s, const float *kept, const float *dy, const float *dlast, const Gradients &g,
                          const Piece &p) {
    const int64_t L = s.length, D = s.channels, b = p.b, width = p.d1 - p.d0;
    const int M = N < 8 ? N : 8;  // states whose adjoints and gradients fit the registers
    std::vector<Chunk<N>> held(1);
    Chunk<N> &c = held[0];
    std::vector<float> A(N * width), state(N * width), dA(N * width), dD(width), dbias(width);
    for (int64_t d = p.d0; d < p.d1; d += W) {
        gather<N>(&A[N * (d - p.d0)], s.A + d * N, LOG2E);
        if (dlast) gather<N>(&state[N * (d - p.d0)], dlast + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = chunks_of(L) - 1; chunk >= 0; chunk--) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = steps_of(L, chunk);
        memset(c.dB, 0, sizeof c.dB);
        memset(c.dC, 0, sizeof c.dC);
        for (int64_t d = p.d0; d < p.d1; d += W) {
            const int64_t i = d - p.d0;
            const V skip = load(s.D + d);
            store(&dD[i], load(&dD[i]) + prepare<N>(s, dy, c, row0, steps, d));
            recompute<N>(s, &A[N * i], kept + (b * chunks_of(L) + chunk) * N * D, g.z, c, row0, steps, d);
            for (int n0 = 0; n0 < N; n0 += M) adjoint<N, M>(s, &A[N * i], &state[N * i], &dA[N * i], c, row0, steps, n0);
            V shift = load(&dbias[i]);
            for (int k = 0; k < steps; k++) {
                const float *at = c.at + k * FIELDS * W;
                const V sdu = load(at + SUM_DU * W);
                const V dx = (sdu * load(at + U * W) + load(at + SUM_DT * W) * splat(LN2)) * load(at + SLOPE * W);
                store(g.u + (row0 + k) * D + d, sdu * load(at + DT * W) + load(at + GY * W) * skip);
                store(g.dt + (row0 + k) * D + d, dx);
                shift += dx;
            }
            store(&dbias[i], shift);
        }
        for (int i = 0; i < steps * N; i++) {
            g.B[row0 * N + i] = sum(load(c.dB + i * W));
            g.C[row0 * N + i] = sum(load(c.dC + i * W));
        }
    }
    for (int64_t d = p.d0; d < p.d1; d += W) {
        scatter<N>(g.A + d * N, &dA[N * (d - p.d0)]);
        if (g.first) scatter<N>(g.first + (b * D + d) * N, &state[N * (d - p.d0)]);
    }
    memcpy(g.D + p.d0, dD.data(), sizeof(float) * width);
    memcpy(g.bias + p.d0, dbias.data(), sizeof(float) * width);
}

template <int N> static void forward(const Scan &s, float *y, float *last, float *kept) {
    const int64_t groups = (s.channels + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t i = 0; i < s.batch * groups; i++) scan_forward<N>(s, y, last, kept, Piece(i, s.channels));
}

template <int N>
static void backward(const Scan &s, const float *kept, const float *dy, const float *dlast, const Gradients &g) {
    const int64_t D = s.channels, groups = (D + GROUP - 1) / GROUP, rows = s.batch * s.length * N;
    // partial sums: of dB and dC one a group, of dA, dD and dbias one a batch row
    std::vector<float> B(groups * rows), C(groups * rows), A(s.batch * D * N), skip(s.batch * D), bias(s.batch * D);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t i = 0; i < s.batch * groups; i++) {
        const Piece p(i, D);
        const Gradients part{g.u, g.dt, g.z, &A[p.b * D * N], &B[p.group * rows], &C[p.group * rows],
                             &skip[p.b * D], &bias[p.b * D], g.first};
        scan_backward<N>(s, kept, dy, dlast, part, p);
    }
    add_parts(g.B, B.data(), groups, rows);
    add_parts(g.C, C.data(), groups, rows);
    add_parts(g.A, A.data(), s.batch, D * N);
    add_parts(g.D, skip.data(), s.batch, D);
    add_parts(g.bias, bias.data(), s.batch, D);
}

// The number of states is a compile-time constant of the loops above; these are the ones that are built.
#define FOR_STATES(CALL)                                                                                               \
    switch (s->states) {                                                                                               \
        case 4: CALL(4); return 0;                                                                                     \
        case 8: CALL(8); return 0;                                                                                     \
        case 16: CALL(16); return 0;                                                                                   \
        case 32: CALL(32); return 0;                                                                                   \
        default: return 1;                                                                                             \
    }

extern "C" {

int vector_width() { return W; }
int chunk_steps() { return CHUNK; }

// y [b][l][d]; last [b][d][n]; kept [b][chunk][n][d]. Returns 0, or 1 for a number of states that is not built.
int selective_scan_forward(const Scan *s, float *y, float *last, float *kept) {
#define CALL(N) forward<N>(*s, y, last, kept)
    FOR_STATES(CALL)
#undef CALL
}

int selective_scan_backward(const Scan *s, const float *kept, const float *dy, const float *dlast, const Gradients *g) {
#define CALL(N) backward<N>(*s, kept, dy, dlast, *g)
    FOR_STATES(CALL)
#undef CALL
}

}  // extern "C"
