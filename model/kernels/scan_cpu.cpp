// Selective scan of Mamba-1 on a CPU, forward and backward, fp32, channel-last_state.
//
// Axes: b batch, l time, d channel, n state. A group of channels goes through a chunk of time steps at once. First all
// values that do not depend on the state are computed row by row, which the hardware prefetches. Then M states of a vector of
// channels at a time run through the chunk in registers. The forward saves the state before each chunk; the backward
// recomputes a chunk's states from it.
#include "mamba_cpu.h"

static const int CHUNK = 16;  // time steps between saved states: a chunk's states and decays fit the L1 cache

// Sizes and inputs. u, dt, z, B and C may be slices of wider tensors: *_stride is the number of floats between time steps.
// The caller pads channels to a multiple of W, states to a number in FOR_STATES.
struct Scan {
    int64_t batch, length, channels, states;
    const float *u, *dt, *z, *A, *B, *C, *D, *bias;  // A [d][n]
    int64_t u_stride, dt_stride, z_stride, B_stride, C_stride, threads;
    const uint8_t *doc_starts;   // [b][l], or null
    const float *initial_state;  // [b][d][n], or null
};

// Gradients of u, dt and z [b][l][d], A [d][n], B and C [b][l][n], D and bias [d], initial_state [b][d][n] or null.
struct Gradients {
    float *u, *dt, *z, *A, *B, *C, *D, *bias, *initial_state;
};

static const int VECTORS = GROUP / W;
static const int M = 4;  // states that go through a chunk together: their decays and products fit the L1 cache

static int64_t num_chunks(int64_t length) { return (length + CHUNK - 1) / CHUNK; }
static int chunk_length(int64_t length, int64_t chunk) {
    return int(length - chunk * CHUNK < CHUNK ? length - chunk * CHUNK : CHUNK);
}

// Transpose W rows of N floats to N vectors over the rows, and back.
template <int N> static inline void gather(float *to, const float *from, float scale) {
    for (int w = 0; w < W; w++)
        for (int n = 0; n < N; n++) to[n * W + w] = from[w * N + n] * scale;
}
template <int N> static inline void scatter(float *to, const float *from) {
    for (int w = 0; w < W; w++)
        for (int n = 0; n < N; n++) to[w * N + n] = from[n * W + w];
}

// The smallest A over states, lane by lane.
template <int N> static inline V min_over_states(const float *A) {
    V smallest = load(A);
    for (int n = 1; n < N; n++) smallest = minimum(load(A + n * W), smallest);
    return smallest;
}
// Whether exp2_in_range is correct for all lanes of x.
static inline bool all_in_range(V x) {
    bool all = true;
    for (int w = 0; w < W; w++) all &= x[w] >= -126.0f;  // false for NaN
    return all;
}

// Values of a chunk's steps that do not depend on the state, for one vector of channels: dt, du = dt u, the gate that y is
// multiplied by, and y, to which C h is added. They are computed before the recurrence so that these long chains of
// operations overlap. max_dt is the largest dt of the chunk; it bounds dt A. alignas: a vector on two cache lines is read twice.
struct alignas(64) Precomputed {
    float dt[CHUNK * W], du[CHUNK * W], gate[CHUNK * W], y[CHUNK * W], max_dt[W];
};
// For the backward also: gy = dL/dy before the gate, the derivative of softplus, and sums over states of g B and of g p A. In
// the backward `gate` is dL/dz per unit of y.
struct BackwardPrecomputed : Precomputed {
    float gy[CHUNK * W], dsoftplus[CHUNK * W], sum_B[CHUNK * W], sum_A[CHUNK * W];
};

// Prefetch an output cache line: it arrives while the recurrence runs.
static inline void prefetch_for_write(float *p) { __builtin_prefetch(p, 1, 2); }

// Step k of a group of channels, starting at channel d0.
static inline void precompute(const Scan &s, Precomputed *group, int vectors, int k, int64_t row, int64_t d0, float *y) {
    const float *u = s.u + row * s.u_stride + d0, *x = s.dt + row * s.dt_stride + d0, *z = s.z + row * s.z_stride + d0;
    const float *bias = s.bias + d0, *D = s.D + d0;
    y += row * s.channels + d0;
    for (int v = 0; v < vectors; v++) {
        const int i = v * W;
        Precomputed &pre = group[v];
        prefetch_for_write(y + i);
        const V uk = load(u + i), zk = load(z + i), dt = Softplus(load(x + i) + load(bias + i)).value;
        store(pre.dt + k * W, dt), store(pre.du + k * W, dt * uk);
        store(pre.gate + k * W, zk * sigmoid(zk)), store(pre.y + k * W, load(D + i) * uk);
        store(pre.max_dt, k ? maximum(load(pre.max_dt), dt) : dt);
    }
}

// The same for the backward; adds to dD.
static inline void precompute(const Scan &s, const Gradients &g, BackwardPrecomputed *group, int vectors, int k, int64_t row,
                              int64_t d0, const float *dy, float *dD) {
    const float *u = s.u + row * s.u_stride + d0, *x = s.dt + row * s.dt_stride + d0, *z = s.z + row * s.z_stride + d0;
    const float *bias = s.bias + d0, *D = s.D + d0;
    const int64_t out = row * s.channels + d0;
    for (int v = 0; v < vectors; v++) {
        const int i = v * W;
        BackwardPrecomputed &pre = group[v];
        prefetch_for_write(g.u + out + i), prefetch_for_write(g.dt + out + i), prefetch_for_write(g.z + out + i);
        const Softplus dt(load(x + i) + load(bias + i));
        const V uk = load(u + i), zk = load(z + i), dout = load(dy + out + i), gate = sigmoid(zk), gy = dout * zk * gate;
        store(pre.dt + k * W, dt.value), store(pre.du + k * W, dt.value * uk);
        store(pre.gate + k * W, dout * gate * (splat(1.0f) + zk * (splat(1.0f) - gate)));
        store(pre.y + k * W, load(D + i) * uk);
        store(pre.gy + k * W, gy), store(pre.dsoftplus + k * W, dt.derivative);
        store(pre.sum_B + k * W, V{}), store(pre.sum_A + k * W, V{});
        store(dD + i, load(dD + i) + gy * uk);
        store(pre.max_dt, k ? maximum(load(pre.max_dt), dt.value) : dt.value);
    }
}

// Per step k and state n of a vector of channels: decay e, and p = e times the previous state. dB and dC are sums over the
// vectors of the work item's channels; the lanes are added at the end of the chunk.
template <int N> struct alignas(64) BackwardChunk {
    float e[CHUNK * M * W], p[CHUNK * M * W], dB[CHUNK * N * W], dC[CHUNK * N * W];
    BackwardPrecomputed group[VECTORS];
};

// What advance() calls for each step and state: nothing in the forward; the backward stores e and p, and adds to dC.
struct NoRecord {
    inline void operator()(int, int, V, V, V) const {}
};
template <int N> struct Record {
    BackwardChunk<N> &c;
    const float *gy;
    int n0;
    inline void operator()(int k, int n, V e, V p, V h) const {
        store(c.e + (k * M + n) * W, e), store(c.p + (k * M + n) * W, p);
        float *dC = c.dC + (k * N + n0 + n) * W;
        store(dC, load(dC) + load(gy + k * W) * h);
    }
};

// Advances M states of a vector of channels through a chunk; A and state [n][W] start at state n0.
template <bool IN_RANGE, class Recorder>
static inline void advance(const Scan &s, const float *A, float *state, Precomputed &pre, int64_t row0, int steps, int n0,
                           Recorder record) {
    V h[M];
    for (int n = 0; n < M; n++) h[n] = load(state + n * W);
    for (int k = 0; k < steps; k++) {
        const int64_t row = row0 + k;
        if (s.doc_starts && s.doc_starts[row])
            for (int n = 0; n < M; n++) h[n] = V{};
        const V dt = load(pre.dt + k * W), du = load(pre.du + k * W);
        const float *Bt = s.B + row * s.B_stride + n0, *Ct = s.C + row * s.C_stride + n0;
        V y0 = load(pre.y + k * W), y1 = V{};
#pragma GCC unroll 4
        for (int n = 0; n < M; n++) {
            const V x = dt * load(A + n * W), e = IN_RANGE ? exp2_in_range(x) : exp2v(x), p = e * h[n];
            h[n] = p + du * splat(Bt[n]);
            record(k, n, e, p, h[n]);
            if (n & 1) y1 += h[n] * splat(Ct[n]);
            else y0 += h[n] * splat(Ct[n]);
        }
        store(pre.y + k * W, y0 + y1);
    }
    for (int n = 0; n < M; n++) store(state + n * W, h[n]);
}

template <int N> static void scan_forward(const Scan &s, float *y, float *last_state, float *chunk_states, const WorkItem &item) {
    const int64_t L = s.length, D = s.channels, C = num_chunks(L), b = item.b;
    const int vectors = int(item.d1 - item.d0) / W;
    alignas(64) float A[N * GROUP], state[N * GROUP] = {}, min_A[GROUP];
    Precomputed group[VECTORS];
    for (int v = 0; v < vectors; v++) {
        const int64_t d = item.d0 + v * W;
        gather<N>(A + N * v * W, s.A + d * N, LOG2E);
        store(min_A + v * W, min_over_states<N>(A + N * v * W));
        if (s.initial_state) gather<N>(state + N * v * W, s.initial_state + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = 0; chunk < C; chunk++) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = chunk_length(L, chunk);
        for (int k = 0; k < steps; k++) precompute(s, group, vectors, k, row0 + k, item.d0, y);
        for (int v = 0; v < vectors; v++) {
            float *h = state + N * v * W;
            for (int n = 0; chunk_states && n < N; n++)
                store(chunk_states + ((b * C + chunk) * N + n) * D + item.d0 + v * W, load(h + n * W));
            const bool in_range = all_in_range(load(group[v].max_dt) * load(min_A + v * W));
            for (int n = 0; n < N; n += M) {
                const float *a = A + (N * v + n) * W;
                if (in_range) advance<true>(s, a, h + n * W, group[v], row0, steps, n, NoRecord());
                else advance<false>(s, a, h + n * W, group[v], row0, steps, n, NoRecord());
            }
        }
        for (int k = 0; k < steps; k++)
            for (int v = 0; v < vectors; v++)
                store(y + (row0 + k) * D + item.d0 + v * W, load(group[v].y + k * W) * load(group[v].gate + k * W));
    }
    for (int v = 0; v < vectors; v++) scatter<N>(last_state + (b * D + item.d0 + v * W) * N, state + N * v * W);
}

// Runs the adjoint recurrence of M states from n0 on backwards through a chunk; adds to dA, dB and the sums over states.
template <int N>
static void advance_adjoint(const Scan &s, const float *A, float *state, float *dA, BackwardChunk<N> &c,
                            BackwardPrecomputed &pre, int64_t row0, int steps, int n0) {
    V g[M], gA[M];
    for (int n = 0; n < M; n++) g[n] = load(state + n * W), gA[n] = load(dA + n * W);
    for (int k = steps - 1; k >= 0; k--) {
        const int64_t row = row0 + k;
        const float *Bt = s.B + row * s.B_stride + n0, *Ct = s.C + row * s.C_stride + n0;
        const V gy = load(pre.gy + k * W), dt = load(pre.dt + k * W), du = load(pre.du + k * W);
        V sum_B = load(pre.sum_B + k * W), sum_A = load(pre.sum_A + k * W);
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
        store(pre.sum_B + k * W, sum_B), store(pre.sum_A + k * W, sum_A);
        if (s.doc_starts && s.doc_starts[row])
            for (int n = 0; n < M; n++) g[n] = V{};
    }
    for (int n = 0; n < M; n++) store(state + n * W, g[n]), store(dA + n * W, gA[n]);
}

// Stores one step's gradients of u, dt and z; adds to dbias.
static inline void store_input_gradients(const Scan &s, const Gradients &g, const BackwardPrecomputed &pre, int k, int64_t row,
                                         int64_t d, float *dbias) {
    const V sum_B = load(pre.sum_B + k * W), sum_A = load(pre.sum_A + k * W) * splat(LN2);
    const V dx = (sum_B * load(s.u + row * s.u_stride + d) + sum_A) * load(pre.dsoftplus + k * W);
    store(g.u + row * s.channels + d, sum_B * load(pre.dt + k * W) + load(pre.gy + k * W) * load(s.D + d));
    store(g.dt + row * s.channels + d, dx);
    store(g.z + row * s.channels + d, load(pre.gate + k * W) * load(pre.y + k * W));
    store(dbias, load(dbias) + dx);
}

// g.B and g.C are partial sums [b][l][n] over the work item's channels; g.A [d][n], g.D and g.bias [d] are of its batch row.
template <int N>
static void scan_backward(const Scan &s, const float *chunk_states, const float *dy, const float *dlast_state,
                          const Gradients &g, const WorkItem &item) {
    const int64_t L = s.length, D = s.channels, b = item.b;
    const int vectors = int(item.d1 - item.d0) / W;
    BackwardChunk<N> c;
    alignas(64) float A[N * GROUP], state[N * GROUP] = {}, dA[N * GROUP] = {}, min_A[GROUP], dD[GROUP] = {}, dbias[GROUP] = {};
    for (int v = 0; v < vectors; v++) {
        const int64_t d = item.d0 + v * W;
        gather<N>(A + N * v * W, s.A + d * N, LOG2E);
        store(min_A + v * W, min_over_states<N>(A + N * v * W));
        if (dlast_state) gather<N>(state + N * v * W, dlast_state + (b * D + d) * N, 1.0f);
    }
    for (int64_t chunk = num_chunks(L) - 1; chunk >= 0; chunk--) {
        const int64_t row0 = b * L + chunk * CHUNK;
        const int steps = chunk_length(L, chunk);
        memset(c.dB, 0, sizeof c.dB);
        memset(c.dC, 0, sizeof c.dC);
        for (int k = 0; k < steps; k++) precompute(s, g, c.group, vectors, k, row0 + k, item.d0, dy, dD);
        for (int v = 0; v < vectors; v++) {
            BackwardPrecomputed &pre = c.group[v];
            const bool in_range = all_in_range(load(pre.max_dt) * load(min_A + v * W));
            for (int n = 0; n < N; n += M) {
                const int i = (N * v + n) * W;
                alignas(64) float h[M * W];
                for (int m = 0; m < M; m++)
                    store(h + m * W, load(chunk_states + ((b * num_chunks(L) + chunk) * N + n + m) * D + item.d0 + v * W));
                const Record<N> record{c, pre.gy, n};
                if (in_range) advance<true>(s, A + i, h, pre, row0, steps, n, record);
                else advance<false>(s, A + i, h, pre, row0, steps, n, record);
                advance_adjoint<N>(s, A + i, state + i, dA + i, c, pre, row0, steps, n);
            }
        }
        for (int k = 0; k < steps; k++)
            for (int v = 0; v < vectors; v++)
                store_input_gradients(s, g, c.group[v], k, row0 + k, item.d0 + v * W, dbias + v * W);
        for (int i = 0; i < steps * N; i++) {
            g.B[row0 * N + i] = sum(load(c.dB + i * W));
            g.C[row0 * N + i] = sum(load(c.dC + i * W));
        }
    }
    for (int v = 0; v < vectors; v++) {
        const int64_t d = item.d0 + v * W;
        scatter<N>(g.A + d * N, dA + N * v * W);
        if (g.initial_state) scatter<N>(g.initial_state + (b * D + d) * N, state + N * v * W);
    }
    memcpy(g.D + item.d0, dD, sizeof(float) * vectors * W);
    memcpy(g.bias + item.d0, dbias, sizeof(float) * vectors * W);
}

template <int N> static void forward(const Scan &s, float *y, float *last_state, float *chunk_states) {
    const int64_t groups = (s.channels + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t i = 0; i < s.batch * groups; i++) scan_forward<N>(s, y, last_state, chunk_states, WorkItem(i, s.channels));
}

template <int N>
static void backward(const Scan &s, const float *chunk_states, const float *dy, const float *dlast_state, const Gradients &g) {
    const int64_t D = s.channels, groups = (D + GROUP - 1) / GROUP, rows = s.batch * s.length * N;
    // partial sums: dB and dC per channel group; dA, dD and dbias per batch row
    std::vector<float> B(groups * rows), C(groups * rows), A(s.batch * D * N), D_sums(s.batch * D), bias(s.batch * D);
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int64_t i = 0; i < s.batch * groups; i++) {
        const WorkItem item(i, D);
        const Gradients partial{g.u, g.dt, g.z, &A[item.b * D * N], &B[item.group * rows], &C[item.group * rows],
                                &D_sums[item.b * D], &bias[item.b * D], g.initial_state};
        scan_backward<N>(s, chunk_states, dy, dlast_state, partial, item);
    }
    sum_partials(g.B, B.data(), groups, rows);
    sum_partials(g.C, C.data(), groups, rows);
    sum_partials(g.A, A.data(), s.batch, D * N);
    sum_partials(g.D, D_sums.data(), s.batch, D);
    sum_partials(g.bias, bias.data(), s.batch, D);
}

// The number of states is a compile-time constant of the loops above; these are compiled.
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

// y [b][l][d]; last_state [b][d][n]; chunk_states [b][chunk][n][d], or null. Returns 1 if the number of states is not compiled.
int selective_scan_forward(const Scan *s, float *y, float *last_state, float *chunk_states) {
#define CALL(N) forward<N>(*s, y, last_state, chunk_states)
    FOR_STATES(CALL)
#undef CALL
}

int selective_scan_backward(const Scan *s, const float *chunk_states, const float *dy, const float *dlast_state,
                            const Gradients *g) {
#define CALL(N) backward<N>(*s, chunk_states, dy, dlast_state, *g)
    FOR_STATES(CALL)
#undef CALL
}

}  // extern "C"
