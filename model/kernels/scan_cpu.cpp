// Selective scan of Mamba-1 on a CPU, forward and backward, fp32, channel-last.
//
// Axes: b batch, l time, d channel, n state. A tile of channels goes through a chunk of time at once: what needs no state
// is computed row by row, in whole cache lines, then time runs sequentially with some states of one vector of channels in
// registers. The backward starts each chunk from a kept state and computes the chunk's states again.
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

static const int TILE = 64;            // channels whose rows are read together
static const int VECTORS = TILE / W;   // of a tile
// States that go through a chunk together: as many as the registers hold, 32 of them with AVX-512 and 16 without.
template <int N> constexpr int AHEAD = W == 16 || N < 8 ? N : 8;
template <int N> constexpr int BACK = N < 8 ? N : 8;

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

// The smallest of N vectors, lane by lane; and whether 2^x needs no bound in any lane of x.
template <int N> static inline V smallest(const float *A) {
    V least = load(A);
    for (int n = 1; n < N; n++) least = minimum(load(A + n * W), least);
    return least;
}
static inline bool within(V x) {
    bool all = true;
    for (int w = 0; w < W; w++) all &= x[w] >= -126.0f;  // a NaN is not
    return all;
}

// What the steps of a chunk need besides states, of one vector of channels: dt, dt u, what y is multiplied by, and y, onto
// which C h is summed. Computed ahead of the recurrence, so that these long chains of operations overlap. `steepest` is the
// largest dt of the chunk, for the range of dt A.
struct Steps {
    float dt[CHUNK * W], du[CHUNK * W], gate[CHUNK * W], y[CHUNK * W], steepest[W];
};
// And for the backward: the gradient of y, the slope of softplus, and sums over states of adjoint times B, and times A p.
struct BackwardSteps : Steps {
    float gy[CHUNK * W], slope[CHUNK * W], sum_B[CHUNK * W], sum_A[CHUNK * W];
};

// One step of one vector of channels.
static inline void prepare(const Scan &s, Steps &at, int k, int64_t row, int64_t d) {
    const V u = load(s.u + row * s.u_row + d), z = load(s.z + row * s.z_row + d);
    const V dt = softplus(load(s.dt + row * s.dt_row + d) + load(s.bias + d));
    store(at.dt + k * W, dt), store(at.du + k * W, dt * u);
    store(at.gate + k * W, z * sigmoid(z)), store(at.y + k * W, load(s.D + d) * u);
    store(at.steepest, k ? maximum(load(at.steepest), dt) : dt);
}

// The same for the backward; dD gathers.
static inline void prepare(const Scan &s, BackwardSteps &at, int k, int64_t row, int64_t d, const float *dy, float *dD) {
    const V u = load(s.u + row * s.u_row + d), x = load(s.dt + row * s.dt_row + d) + load(s.bias + d), dt = softplus(x);
    const V z = load(s.z + row * s.z_row + d), gate = sigmoid(z), dout = load(dy + row * s.channels + d), gy = dout * z * gate;
    store(at.dt + k * W, dt), store(at.du + k * W, dt * u);
    store(at.gate + k * W, dout * gate * (splat(1.0f) + z * (splat(1.0f) - gate))), store(at.y + k * W, load(s.D + d) * u);
    store(at.gy + k * W, gy), store(at.slope + k * W, sigmoid(x));
    store(at.sum_B + k * W, V{}), store(at.sum_A + k * W, V{});
    store(dD, load(dD) + gy * u);
    store(at.steepest, k ? maximum(load(at.steepest), dt) : dt);
}

// Per step k and state n of one vector of channels: e decay, p decay times the state before; and the terms of dB and dC,
// which gather over the piece's channels a vector at a time.
template <int N> struct Chunk {
    float e[CHUNK * BACK<N> * W], p[CHUNK * BACK<N> * W], dB[CHUNK * N * W], dC[CHUNK * N * W];
    BackwardSteps tile[VECTORS];
};

// The forward pass leaves nothing behind in the recurrence; the backward's keeps decays and states, and adds to dC.
struct Forget {
    inline void operator()(int, int, V, V, V) const {}
};
template <int N, int M> struct Keep {
    Chunk<N> &c;
    const float *gy;
    int n0;
    inline void operator()(int k, int n, V e, V p, V h) const {
        store(c.e + (k * M + n) * W, e), store(c.p + (k * M + n) * W, p);
        float *dC = c.dC + (k * N + n0 + n) * W;
        store(dC, load(dC) + load(gy + k * W) * h);
    }
};

// M states of one vector of channels through a chunk; A, B, C and state [n][W] begin at the first of them.
template <int M, bool NEAR, class Each>
static inline void advance(const Scan &s, const float *A, float *state, Steps &at, int64_t row0, int steps, int n0, Each each) {
    V h[M];
    for (int n = 0; n < M; n++) h[n] = load(state + n * W);
    for (int k = 0; k < steps; k++) {
        const int64_t row = row0 + k;
        if (s.starts && s.starts[row])
            for (int n = 0; n < M; n++) h[n] = V{};
        const V dt = load(at.dt + k * W), du = load(at.du + k * W);
        const float *Bt = s.B + row * s.B_row + n0, *Ct = s.C + row * s.C_row + n0;
        V y0 = load(at.y + k * W), y1 = V{};
#pragma GCC unroll 16
        for (int n = 0; n < M; n++) {
            const V x = dt * load(A + n * W), e = NEAR ? exp2_near(x) : exp2v(x), p = e * h[n];
            h[n] = p + du * splat(Bt[n]);
            each(k, n, e, p, h[n]);
            if (n & 1) y1 += h[n] * splat(Ct[n]);
            else y0 += h[n] * splat(Ct[n]);
        }
        store(at.y + k * W, y0 + y1);
    }
    for (int n = 0; n < M; n++) store(state + n * W, h[n]);
}

template <int N> static void scan_forward(const Scan &s, float *y, float *last, float *kept, const Piece &p) {
    const int64_t L = s.length, D = s.channels, C = chunks_of(L), b = p.b, width = p.d1 - p.d0;
    const int M = AHEAD<N>;
    std::vector<float> A(N * width), state(N * width), least(width);
    Steps tile[VECTORS];
    for (int64_t d = p.d0; d < p.d1; d += W) {
        gather<N>(&A[N * (d - p.d0)], s.A + d * N, LOG2E);
        store(&least[d - p.d0], smallest<N>(&A[N * (d - p.d0)]));
        if (s.first) gather<N>(&state[N * (d - p.d0)], s.first + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = 0; chunk < C; chunk++) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = steps_of(L, chunk);
        for (int64_t d0 = p.d0; d0 < p.d1; d0 += TILE) {
            const int vectors = int(d0 + TILE < p.d1 ? TILE : p.d1 - d0) / W;
            for (int k = 0; k < steps; k++)
                for (int v = 0; v < vectors; v++) prepare(s, tile[v], k, row0 + k, d0 + v * W);
            for (int v = 0; v < vectors; v++) {
                const int64_t d = d0 + v * W, i = d - p.d0;
                float *h = &state[N * i];
                for (int n = 0; n < N; n++) store(kept + ((b * C + chunk) * N + n) * D + d, load(h + n * W));
                const bool near = within(load(tile[v].steepest) * load(&least[i]));
                for (int n = 0; n < N; n += M) {
                    const float *a = &A[N * i + n * W];
                    if (near) advance<M, true>(s, a, h + n * W, tile[v], row0, steps, n, Forget());
                    else advance<M, false>(s, a, h + n * W, tile[v], row0, steps, n, Forget());
                }
            }
            for (int k = 0; k < steps; k++)
                for (int v = 0; v < vectors; v++)
                    store(y + (row0 + k) * D + d0 + v * W, load(tile[v].y + k * W) * load(tile[v].gate + k * W));
        }
    }
    for (int64_t d = p.d0; d < p.d1; d += W) scatter<N>(last + (b * D + d) * N, &state[N * (d - p.d0)]);
}

// The adjoint recurrence of M states from n0 on, backwards through the chunk; dA and the sums over states gather.
template <int N, int M>
static void adjoint(const Scan &s, const float *A, float *state, float *dA, Chunk<N> &c, BackwardSteps &at, int64_t row0, int steps, int n0) {
    V g[M], gA[M];
    for (int n = 0; n < M; n++) g[n] = load(state + n * W), gA[n] = load(dA + n * W);
    for (int k = steps - 1; k >= 0; k--) {
        const int64_t row = row0 + k;
        const float *Bt = s.B + row * s.B_row + n0, *Ct = s.C + row * s.C_row + n0;
        const V gy = load(at.gy + k * W), dt = load(at.dt + k * W), du = load(at.du + k * W);
        V sum_B = load(at.sum_B + k * W), sum_A = load(at.sum_A + k * W);
#pragma GCC unroll 8
        for (int n = 0; n < M; n++) {
            const V gh = gy * splat(Ct[n]) + g[n], ga = gh * load(c.p + (k * M + n) * W);
            float *dB = c.dB + (k * N + n0 + n) * W;
            store(dB, load(dB) + gh * du);
            sum_B += gh * splat(Bt[n]);
            g[n] = gh * load(c.e + (k * M + n) * W);
            gA[n] += ga * dt;
            sum_A += ga * load(A + n * W);
        }
        store(at.sum_B + k * W, sum_B), store(at.sum_A + k * W, sum_A);
        if (s.starts && s.starts[row])
            for (int n = 0; n < M; n++) g[n] = V{};
    }
    for (int n = 0; n < M; n++) store(state + n * W, g[n]), store(dA + n * W, gA[n]);
}

// One step's gradients of u, dt and z; dbias gathers.
static inline void finish(const Scan &s, const Gradients &g, const BackwardSteps &at, int k, int64_t row, int64_t d, float *dbias) {
    const V sum_B = load(at.sum_B + k * W), sum_A = load(at.sum_A + k * W) * splat(LN2);
    const V dx = (sum_B * load(s.u + row * s.u_row + d) + sum_A) * load(at.slope + k * W);
    store(g.u + row * s.channels + d, sum_B * load(at.dt + k * W) + load(at.gy + k * W) * load(s.D + d));
    store(g.dt + row * s.channels + d, dx);
    store(g.z + row * s.channels + d, load(at.gate + k * W) * load(at.y + k * W));
    store(dbias, load(dbias) + dx);
}

// dB and dC of the piece, [b][l][n]; dA [d][n], dD and dbias [d] of one batch row.
template <int N>
static void scan_backward(const Scan &s, const float *kept, const float *dy, const float *dlast, const Gradients &g,
                          const Piece &p) {
    const int64_t L = s.length, D = s.channels, b = p.b, width = p.d1 - p.d0;
    const int M = BACK<N>;
    std::vector<Chunk<N>> held(1);
    Chunk<N> &c = held[0];
    std::vector<float> A(N * width), state(N * width), dA(N * width), dD(width), dbias(width), least(width);
    for (int64_t d = p.d0; d < p.d1; d += W) {
        gather<N>(&A[N * (d - p.d0)], s.A + d * N, LOG2E);
        store(&least[d - p.d0], smallest<N>(&A[N * (d - p.d0)]));
        if (dlast) gather<N>(&state[N * (d - p.d0)], dlast + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = chunks_of(L) - 1; chunk >= 0; chunk--) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = steps_of(L, chunk);
        memset(c.dB, 0, sizeof c.dB);
        memset(c.dC, 0, sizeof c.dC);
        for (int64_t d0 = p.d0; d0 < p.d1; d0 += TILE) {
            const int vectors = int(d0 + TILE < p.d1 ? TILE : p.d1 - d0) / W;
            for (int k = 0; k < steps; k++)
                for (int v = 0; v < vectors; v++) prepare(s, c.tile[v], k, row0 + k, d0 + v * W, dy, &dD[d0 - p.d0 + v * W]);
            for (int v = 0; v < vectors; v++) {
                const int64_t d = d0 + v * W, i = N * (d - p.d0);
                BackwardSteps &at = c.tile[v];
                const bool near = within(load(at.steepest) * load(&least[d - p.d0]));
                for (int n = 0; n < N; n += M) {
                    float h[M * W];
                    for (int m = 0; m < M; m++) store(h + m * W, load(kept + ((b * chunks_of(L) + chunk) * N + n + m) * D + d));
                    const Keep<N, M> keep{c, at.gy, n};
                    if (near) advance<M, true>(s, &A[i + n * W], h, at, row0, steps, n, keep);
                    else advance<M, false>(s, &A[i + n * W], h, at, row0, steps, n, keep);
                    adjoint<N, M>(s, &A[i + n * W], &state[i + n * W], &dA[i + n * W], c, at, row0, steps, n);
                }
            }
            for (int k = 0; k < steps; k++)
                for (int v = 0; v < vectors; v++) finish(s, g, c.tile[v], k, row0 + k, d0 + v * W, &dbias[d0 - p.d0 + v * W]);
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
