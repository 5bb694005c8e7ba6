// Selective scan of Mamba-1 on a CPU, forward and backward, fp32, channel-last.
//
// Axes: b batch, l time, d channel, n state. A group of channels goes through a chunk of time at once: what needs no state
// is computed row by row, which the processor reads ahead, then time runs sequentially with some states of one vector of
// channels in registers. The backward starts each chunk from a kept state and computes the chunk's states again.
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

static const int VECTORS = GROUP / W;
static const int M = 4;  // states that go through a chunk together: their decays and terms stay in the first-level cache

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
// largest dt of the chunk, for the range of dt A. A vector that lies on two cache lines is read twice, hence alignas.
struct alignas(64) Steps {
    float dt[CHUNK * W], du[CHUNK * W], gate[CHUNK * W], y[CHUNK * W], steepest[W];
};
// And for the backward: the gradient of y, the slope of softplus, and sums over states of adjoint times B, and times A p.
struct BackwardSteps : Steps {
    float gy[CHUNK * W], slope[CHUNK * W], sum_B[CHUNK * W], sum_A[CHUNK * W];
};

// Ask for a cache line that a chunk's end writes: it comes while the recurrence runs.
static inline void soon_written(float *p) { __builtin_prefetch(p, 1, 2); }

// One step of a group of channels from d0 on.
static inline void prepare(const Scan &s, Steps *group, int vectors, int k, int64_t row, int64_t d0, float *y) {
    const float *u = s.u + row * s.u_row + d0, *x = s.dt + row * s.dt_row + d0, *z = s.z + row * s.z_row + d0;
    const float *bias = s.bias + d0, *D = s.D + d0;
    y += row * s.channels + d0;
    for (int v = 0; v < vectors; v++) {
        const int i = v * W;
        Steps &at = group[v];
        soon_written(y + i);
        const V uk = load(u + i), zk = load(z + i), dt = Softplus(load(x + i) + load(bias + i)).value;
        store(at.dt + k * W, dt), store(at.du + k * W, dt * uk);
        store(at.gate + k * W, zk * sigmoid(zk)), store(at.y + k * W, load(D + i) * uk);
        store(at.steepest, k ? maximum(load(at.steepest), dt) : dt);
    }
}

// The same for the backward; dD gathers.
static inline void prepare(const Scan &s, const Gradients &g, BackwardSteps *group, int vectors, int k, int64_t row, int64_t d0,
                           const float *dy, float *dD) {
    const float *u = s.u + row * s.u_row + d0, *x = s.dt + row * s.dt_row + d0, *z = s.z + row * s.z_row + d0;
    const float *bias = s.bias + d0, *D = s.D + d0;
    const int64_t out = row * s.channels + d0;
    for (int v = 0; v < vectors; v++) {
        const int i = v * W;
        BackwardSteps &at = group[v];
        soon_written(g.u + out + i), soon_written(g.dt + out + i), soon_written(g.z + out + i);
        const Softplus dt(load(x + i) + load(bias + i));
        const V uk = load(u + i), zk = load(z + i), dout = load(dy + out + i), gate = sigmoid(zk), gy = dout * zk * gate;
        store(at.dt + k * W, dt.value), store(at.du + k * W, dt.value * uk);
        store(at.gate + k * W, dout * gate * (splat(1.0f) + zk * (splat(1.0f) - gate)));
        store(at.y + k * W, load(D + i) * uk);
        store(at.gy + k * W, gy), store(at.slope + k * W, dt.slope);
        store(at.sum_B + k * W, V{}), store(at.sum_A + k * W, V{});
        store(dD + i, load(dD + i) + gy * uk);
        store(at.steepest, k ? maximum(load(at.steepest), dt.value) : dt.value);
    }
}

// Per step k and state n of one vector of channels: e decay, p decay times the state before; and the terms of dB and dC,
// which gather over the piece's channels a vector at a time.
template <int N> struct alignas(64) Chunk {
    float e[CHUNK * M * W], p[CHUNK * M * W], dB[CHUNK * N * W], dC[CHUNK * N * W];
    BackwardSteps group[VECTORS];
};

// The forward pass leaves nothing behind in the recurrence; the backward's keeps decays and states, and adds to dC.
struct Forget {
    inline void operator()(int, int, V, V, V) const {}
};
template <int N> struct Keep {
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
template <bool NEAR, class Each>
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
#pragma GCC unroll 4
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
    const int64_t L = s.length, D = s.channels, C = chunks_of(L), b = p.b;
    const int vectors = int(p.d1 - p.d0) / W;
    alignas(64) float A[N * GROUP], state[N * GROUP] = {}, least[GROUP];
    Steps group[VECTORS];
    for (int v = 0; v < vectors; v++) {
        const int64_t d = p.d0 + v * W;
        gather<N>(A + N * v * W, s.A + d * N, LOG2E);
        store(least + v * W, smallest<N>(A + N * v * W));
        if (s.first) gather<N>(state + N * v * W, s.first + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = 0; chunk < C; chunk++) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = steps_of(L, chunk);
        for (int k = 0; k < steps; k++) prepare(s, group, vectors, k, row0 + k, p.d0, y);
        for (int v = 0; v < vectors; v++) {
            float *h = state + N * v * W;
            for (int n = 0; kept && n < N; n++)
                store(kept + ((b * C + chunk) * N + n) * D + p.d0 + v * W, load(h + n * W));
            const bool near = within(load(group[v].steepest) * load(least + v * W));
            for (int n = 0; n < N; n += M) {
                const float *a = A + (N * v + n) * W;
                if (near) advance<true>(s, a, h + n * W, group[v], row0, steps, n, Forget());
                else advance<false>(s, a, h + n * W, group[v], row0, steps, n, Forget());
            }
        }
        for (int k = 0; k < steps; k++)
            for (int v = 0; v < vectors; v++)
                store(y + (row0 + k) * D + p.d0 + v * W, load(group[v].y + k * W) * load(group[v].gate + k * W));
    }
    for (int v = 0; v < vectors; v++) scatter<N>(last + (b * D + p.d0 + v * W) * N, state + N * v * W);
}

// The adjoint recurrence of M states from n0 on, backwards through the chunk; dA and the sums over states gather.
template <int N>
static void adjoint(const Scan &s, const float *A, float *state, float *dA, Chunk<N> &c, BackwardSteps &at, int64_t row0, int steps, int n0) {
    V g[M], gA[M];
    for (int n = 0; n < M; n++) g[n] = load(state + n * W), gA[n] = load(dA + n * W);
    for (int k = steps - 1; k >= 0; k--) {
        const int64_t row = row0 + k;
        const float *Bt = s.B + row * s.B_row + n0, *Ct = s.C + row * s.C_row + n0;
        const V gy = load(at.gy + k * W), dt = load(at.dt + k * W), du = load(at.du + k * W);
        V sum_B = load(at.sum_B + k * W), sum_A = load(at.sum_A + k * W);
#pragma GCC unroll 4
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
    const int64_t L = s.length, D = s.channels, b = p.b;
    const int vectors = int(p.d1 - p.d0) / W;
    Chunk<N> c;
    alignas(64) float A[N * GROUP], state[N * GROUP] = {}, dA[N * GROUP] = {}, least[GROUP], dD[GROUP] = {}, dbias[GROUP] = {};
    for (int v = 0; v < vectors; v++) {
        const int64_t d = p.d0 + v * W;
        gather<N>(A + N * v * W, s.A + d * N, LOG2E);
        store(least + v * W, smallest<N>(A + N * v * W));
        if (dlast) gather<N>(state + N * v * W, dlast + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = chunks_of(L) - 1; chunk >= 0; chunk--) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = steps_of(L, chunk);
        memset(c.dB, 0, sizeof c.dB);
        memset(c.dC, 0, sizeof c.dC);
        for (int k = 0; k < steps; k++) prepare(s, g, c.group, vectors, k, row0 + k, p.d0, dy, dD);
        for (int v = 0; v < vectors; v++) {
            BackwardSteps &at = c.group[v];
            const bool near = within(load(at.steepest) * load(least + v * W));
            for (int n = 0; n < N; n += M) {
                const int i = (N * v + n) * W;
                alignas(64) float h[M * W];
                for (int m = 0; m < M; m++)
                    store(h + m * W, load(kept + ((b * chunks_of(L) + chunk) * N + n + m) * D + p.d0 + v * W));
                const Keep<N> keep{c, at.gy, n};
                if (near) advance<true>(s, A + i, h, at, row0, steps, n, keep);
                else advance<false>(s, A + i, h, at, row0, steps, n, keep);
                adjoint<N>(s, A + i, state + i, dA + i, c, at, row0, steps, n);
            }
        }
        for (int k = 0; k < steps; k++)
            for (int v = 0; v < vectors; v++) finish(s, g, c.group[v], k, row0 + k, p.d0 + v * W, dbias + v * W);
        for (int i = 0; i < steps * N; i++) {
            g.B[row0 * N + i] = sum(load(c.dB + i * W));
            g.C[row0 * N + i] = sum(load(c.dC + i * W));
        }
    }
    for (int v = 0; v < vectors; v++) {
        const int64_t d = p.d0 + v * W;
        scatter<N>(g.A + d * N, dA + N * v * W);
        if (g.first) scatter<N>(g.first + (b * D + d) * N, state + N * v * W);
    }
    memcpy(g.D + p.d0, dD, sizeof(float) * vectors * W);
    memcpy(g.bias + p.d0, dbias, sizeof(float) * vectors * W);
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

// y [b][l][d]; last [b][d][n]; kept [b][chunk][n][d], or null. Returns 0, or 1 for a number of states that is not built.
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
