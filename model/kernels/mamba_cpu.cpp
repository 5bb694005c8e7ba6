// Selective scan and causal convolution of Mamba-1 on a CPU, forward and backward, fp32, channel-last.
//
// Axes: b batch, l time, d channel, n state, k taps. A vector holds W neighbouring channels; time runs sequentially with
// the states of one vector of channels in registers. Work is cut into (batch, group of channels) pieces whose size does
// not depend on the number of threads, and sums over pieces are taken in a fixed order: results are deterministic.
// Compiled once per instruction set with W = 16 (AVX-512), 8 (AVX2) or 4 (portable), by GCC's vector extension.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if W >= 8
#include <immintrin.h>
#endif

#ifndef W
#error "compile with -DW=16, 8 or 4"
#endif

typedef float V __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(W * 4), aligned(4), may_alias));

static const int CHUNK = 16;    // time steps between kept states: a chunk's states and decays stay in the first-level cache
static const int GROUP = 256;   // channels of a piece of work
static const float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

static inline V splat(float x) { return x - V{}; }
static inline V load(const float *p) { return *(const V *)p; }
static inline void store(float *p, V x) { *(V *)p = x; }
static inline V select(I mask, V yes, V no) { return mask ? yes : no; }
static inline float sum(V x) {
#if W == 16
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

// 2^x for x <= 127, relative error about 2e-7: the whole part of x goes to the exponent, 2^f of the rest in [-1/2, 1/2]
// is a polynomial. The largest x that gives 2^-126 or less may stop there, which is nothing beside any state.
static inline V power(V f) {
    V p = splat(1.3395279e-3f);
    p = p * f + splat(9.6178371e-3f);
    p = p * f + splat(5.5503324e-2f);
    p = p * f + splat(2.4022652e-1f);
    p = p * f + splat(6.9314718e-1f);
    return p * f + splat(1.0f);
}
#if W == 16
static inline V exp2v(V x) {
    const __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (V)_mm512_scalef_ps((__m512)power(x - (V)whole), whole);
}
static inline V maximum(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
#else
#if W == 8
static inline V maximum(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline V maximum(V a, V b) { return select(a > b, a, b); }
#endif
static inline V exp2v(V x) {
    x = maximum(splat(-126.0f), x);  // in this order a NaN stays one
    const V shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const V r = x + shift;
    return (V)((I)power(x - (r - shift)) + ((I)r << 23));
}
#endif

static inline V expv(V x) { return exp2v(x * splat(LOG2E)); }
static inline V sigmoid(V x) {
    V e = expv(-select(x > 0, x, -x));  // of -|x|: never overflows
    V r = splat(1.0f) / (splat(1.0f) + e);
    return select(x > 0, r, e * r);
}

// ln(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)) as an odd series, relative error about 1e-7.
static inline V log1p01(V e) {
    V s = e / (splat(2.0f) + e), q = s * s;
    V p = splat(2.0f / 13);
    p = p * q + splat(2.0f / 11);
    p = p * q + splat(2.0f / 9);
    p = p * q + splat(2.0f / 7);
    p = p * q + splat(2.0f / 5);
    p = p * q + splat(2.0f / 3);
    p = p * q + splat(2.0f);
    return s * p;
}

static inline V softplus(V x) { return maximum(x, V{}) + log1p01(expv(-select(x > 0, x, -x))); }

// Sizes and inputs of a scan. Rows of u, dt, z, B and C may be parts of wider rows: *_row is the distance of two time
// steps in floats. Channels are padded by the caller to a multiple of W. A and states are [n][d], A times log2(e).
struct Scan {
    int64_t batch, length, channels, states;
    const float *u, *dt, *z, *A, *B, *C, *D, *bias;
    int64_t u_row, dt_row, z_row, B_row, C_row, threads;
    const uint8_t *starts;  // [b][l], or null
    const float *first;     // [b][n][d], or null
};

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

template <int N>
static void scan_forward(const Scan &s, float *y, float *last, float *kept, int64_t b, int64_t d0, int64_t d1) {
    const int64_t L = s.length, D = s.channels, C = chunks_of(L);
    for (int64_t d = d0; d < d1; d += W) {
        V h[N], a[N];
        for (int n = 0; n < N; n++) {
            h[n] = s.first ? load(s.first + (b * N + n) * D + d) : V{};
            a[n] = load(s.A + n * D + d);
        }
        const V skip = load(s.D + d), bias = load(s.bias + d);
        for (int64_t t = 0; t < L; t++) {
            if (kept && t % CHUNK == 0)
                for (int n = 0; n < N; n++) store(kept + ((b * C + t / CHUNK) * N + n) * D + d, h[n]);
            if (s.starts && s.starts[b * L + t])
                for (int n = 0; n < N; n++) h[n] = V{};
            const int64_t row = b * L + t;
            const V u = load(s.u + row * s.u_row + d), z = load(s.z + row * s.z_row + d);
            const V dt = softplus(load(s.dt + row * s.dt_row + d) + bias), du = dt * u;
            const float *Bt = s.B + row * s.B_row, *Ct = s.C + row * s.C_row;
            V y0 = skip * u, y1 = V{};
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
                h[n] = exp2v(dt * a[n]) * h[n] + du * splat(Bt[n]);
                if (n & 1) y1 += h[n] * splat(Ct[n]);
                else y0 += h[n] * splat(Ct[n]);
            }
            store(y + row * D + d, (y0 + y1) * z * sigmoid(z));
        }
        for (int n = 0; n < N; n++) store(last + (b * N + n) * D + d, h[n]);
    }
}

// Gradients of a scan. dB and dC are partial sums over one group of channels, [group][b][l][n]; dA, dD and dbias are
// partial sums over one batch row, [b][n][d] and [b][d].
struct Gradients {
    float *u, *dt, *z, *A, *B, *C, *D, *bias, *first;
};

template <int N>
static void scan_backward(const Scan &s, const float *kept, const float *dy, const float *dlast, const Gradients &g,
                          int64_t b, int64_t group, int64_t d0, int64_t d1) {
    const int64_t L = s.length, D = s.channels, CH = chunks_of(L), width = d1 - d0;
    // per chunk: states before each step, decays, per step (dL/dy, dt, dt u, u, sigmoid, sums of gh B and ga A), and the
    // terms of dB and dC, summed over channels a vector at a time
    const int FIELDS = 7;
    std::vector<float> H(CHUNK * N * W), E(CHUNK * N * W), T(CHUNK * FIELDS * W), SB(CHUNK * N * W), SC(CHUNK * N * W);
    std::vector<float> G(N * width);  // adjoint of the state, from chunk to chunk
    for (int n = 0; n < N; n++)
        for (int64_t d = d0; d < d1; d += W)
            store(&G[n * width + d - d0], dlast ? load(dlast + (b * N + n) * D + d) : V{});
    for (int64_t c = CH - 1; c >= 0; c--) {
        const int64_t t0 = c * CHUNK, t1 = t0 + CHUNK < L ? t0 + CHUNK : L;
        const int steps = int(t1 - t0);
        memset(SB.data(), 0, sizeof(float) * SB.size());
        memset(SC.data(), 0, sizeof(float) * SC.size());
        for (int64_t d = d0; d < d1; d += W) {
            const V skip = load(s.D + d), bias = load(s.bias + d);
            V dD = V{}, dbias = V{};
            V h[N];  // forward again, keeping every state and decay
            for (int n = 0; n < N; n++) h[n] = load(kept + ((b * CH + c) * N + n) * D + d);
            for (int k = 0; k < steps; k++) {
                const int64_t row = b * L + t0 + k;
                const bool opens = s.starts && s.starts[row];
                const V u = load(s.u + row * s.u_row + d), x = load(s.dt + row * s.dt_row + d) + bias;
                const V z = load(s.z + row * s.z_row + d), gate = sigmoid(z), dt = softplus(x), du = dt * u;
                const V dout = load(dy + row * D + d), gy = dout * z * gate;
                const float *Bt = s.B + row * s.B_row, *Ct = s.C + row * s.C_row;
                V y0 = skip * u, y1 = V{};
#pragma GCC unroll 16
                for (int n = 0; n < N; n++) {
                    const int i = (k * N + n) * W;
                    const V e = opens ? V{} : exp2v(dt * load(s.A + n * D + d));
                    store(&H[i], h[n]);
                    store(&E[i], e);
                    h[n] = e * h[n] + du * splat(Bt[n]);
                    store(&SC[i], load(&SC[i]) + gy * h[n]);
                    if (n & 1) y1 += h[n] * splat(Ct[n]);
                    else y0 += h[n] * splat(Ct[n]);
                }
                store(g.z + row * D + d, dout * (y0 + y1) * gate * (splat(1.0f) + z * (splat(1.0f) - gate)));
                dD += gy * u;
                float *at = &T[k * FIELDS * W];
                store(at, gy), store(at + W, dt), store(at + 2 * W, du), store(at + 3 * W, u), store(at + 4 * W, sigmoid(x));
                store(at + 5 * W, V{}), store(at + 6 * W, V{});
            }
            const int M = N < 8 ? N : 8;  // states at a time: their adjoints, gradients and A fit the registers
            for (int n0 = 0; n0 < N; n0 += M) {
                V adj[M], dA[M], a[M];
                for (int n = 0; n < M; n++) {
                    adj[n] = load(&G[(n0 + n) * width + d - d0]);
                    a[n] = load(s.A + (n0 + n) * D + d);
                    dA[n] = V{};
                }
                for (int k = steps - 1; k >= 0; k--) {
                    const int64_t row = b * L + t0 + k;
                    const float *Bt = s.B + row * s.B_row + n0, *Ct = s.C + row * s.C_row + n0;
                    float *at = &T[k * FIELDS * W];
                    const V gy = load(at), dt = load(at + W), du = load(at + 2 * W);
                    V sdu = load(at + 5 * W), sdt = load(at + 6 * W);
#pragma GCC unroll 8
                    for (int n = 0; n < M; n++) {
                        const int i = (k * N + n0 + n) * W;
                        const V gh = gy * splat(Ct[n]) + adj[n];
                        store(&SB[i], load(&SB[i]) + gh * du);
                        sdu += gh * splat(Bt[n]);
                        adj[n] = gh * load(&E[i]);
                        const V ga = adj[n] * load(&H[i]);
                        dA[n] += ga * dt;
                        sdt += ga * a[n];
                    }
                    store(at + 5 * W, sdu), store(at + 6 * W, sdt);
                }
                for (int n = 0; n < M; n++) {
                    store(&G[(n0 + n) * width + d - d0], adj[n]);
                    float *p = g.A + (b * N + n0 + n) * D + d;
                    store(p, load(p) + dA[n]);
                }
            }
            for (int k = 0; k < steps; k++) {
                const int64_t row = b * L + t0 + k;
                const float *at = &T[k * FIELDS * W];
                const V sdu = load(at + 5 * W), dx = (sdu * load(at + 3 * W) + load(at + 6 * W) * splat(LN2)) * load(at + 4 * W);
                store(g.u + row * D + d, sdu * load(at + W) + load(at) * skip);
                store(g.dt + row * D + d, dx);
                dbias += dx;
            }
            store(g.D + b * D + d, load(g.D + b * D + d) + dD);
            store(g.bias + b * D + d, load(g.bias + b * D + d) + dbias);
        }
        for (int k = 0; k < steps; k++)
            for (int n = 0; n < N; n++) {
                const int64_t at = ((group * s.batch + b) * L + t0 + k) * N + n;
                g.B[at] = sum(load(&SB[(k * N + n) * W]));
                g.C[at] = sum(load(&SC[(k * N + n) * W]));
            }
    }
    if (g.first)
        for (int n = 0; n < N; n++)
            for (int64_t d = d0; d < d1; d += W) store(g.first + (b * N + n) * D + d, load(&G[n * width + d - d0]));
}

// The number of states is a compile-time constant of the loops above; these are the ones that are built.
#define FOR_STATES(CALL)                                                                                               \
    switch (s->states) {                                                                                               \
        case 4: CALL(4); break;                                                                                        \
        case 8: CALL(8); break;                                                                                        \
        case 16: CALL(16); break;                                                                                      \
        case 32: CALL(32); break;                                                                                      \
        default: return 1;                                                                                             \
    }

extern "C" {

int vector_width() { return W; }
int chunk_steps() { return CHUNK; }
int group_channels() { return GROUP; }

// y [b][l][d]; last [b][n][d]; kept [b][chunk][n][d] or null. Returns 0, or 1 for a number of states that is not built.
int selective_scan_forward(const Scan *s, float *y, float *last, float *kept) {
    const int64_t groups = (s->channels + GROUP - 1) / GROUP;
#define CALL(N)                                                                                                        \
    _Pragma("omp parallel for schedule(static) num_threads(s->threads)") for (int64_t i = 0; i < s->batch * groups; i++) {                     \
        const int64_t d0 = i % groups * GROUP, d1 = d0 + GROUP < s->channels ? d0 + GROUP : s->channels;               \
        scan_forward<N>(*s, y, last, kept, i / groups, d0, d1);                                                        \
    }
    FOR_STATES(CALL)
#undef CALL
    return 0;
}

int selective_scan_backward(const Scan *s, const float *kept, const float *dy, const float *dlast, const Gradients *g) {
    const int64_t groups = (s->channels + GROUP - 1) / GROUP;
#define CALL(N)                                                                                                        \
    _Pragma("omp parallel for schedule(static) num_threads(s->threads)") for (int64_t i = 0; i < s->batch * groups; i++) {                     \
        const int64_t d0 = i % groups * GROUP, d1 = d0 + GROUP < s->channels ? d0 + GROUP : s->channels;               \
        scan_backward<N>(*s, kept, dy, dlast, *g, i / groups, i % groups, d0, d1);                                     \
    }
    FOR_STATES(CALL)
#undef CALL
    return 0;
}

// Depthwise causal convolution and SiLU. x rows are x_row floats apart; weight [k][d], newest tap last; out [b][l][d].
struct Conv {
    int64_t batch, length, channels, taps;
    const float *x, *weight, *bias;
    int64_t x_row, threads;
    const uint8_t *starts;
};

// How many taps behind token t of row b are visible: they end where a document begins.
static inline int64_t visible(const Conv &c, int64_t b, int64_t t) {
    int64_t reach = 0;
    while (reach < c.taps - 1 && reach < t && !(c.starts && c.starts[b * c.length + t - reach])) reach++;
    return reach;
}

static inline V conv_sum(const Conv &c, int64_t b, int64_t t, int64_t reach, int64_t d) {
    V s = load(c.bias + d);
    for (int64_t back = 0; back <= reach; back++)
        s += load(c.weight + (c.taps - 1 - back) * c.channels + d) * load(c.x + (b * c.length + t - back) * c.x_row + d);
    return s;
}

void causal_conv_forward(const Conv *c, float *out) {
#pragma omp parallel for schedule(static) collapse(2) num_threads(c->threads)
    for (int64_t b = 0; b < c->batch; b++)
        for (int64_t t = 0; t < c->length; t++) {
            const int64_t reach = visible(*c, b, t);
            for (int64_t d = 0; d < c->channels; d += W) {
                const V s = conv_sum(*c, b, t, reach, d);
                store(out + (b * c->length + t) * c->channels + d, s * sigmoid(s));
            }
        }
}

// dx [b][l][d] must be zero; dweight [b][k][d] and dbias [b][d] are partial sums over one batch row and must be zero.
void causal_conv_backward(const Conv *c, const float *dout, float *dx, float *dweight, float *dbias) {
    const int64_t groups = (c->channels + GROUP - 1) / GROUP, D = c->channels, K = c->taps;
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (int64_t i = 0; i < c->batch * groups; i++) {
        const int64_t b = i / groups, d0 = i % groups * GROUP, d1 = d0 + GROUP < D ? d0 + GROUP : D;
        for (int64_t t = 0; t < c->length; t++) {
            const int64_t reach = visible(*c, b, t);
            for (int64_t d = d0; d < d1; d += W) {
                const V s = conv_sum(*c, b, t, reach, d), gate = sigmoid(s);
                const V ds = load(dout + (b * c->length + t) * D + d) * gate * (splat(1.0f) + s * (splat(1.0f) - gate));
                store(dbias + b * D + d, load(dbias + b * D + d) + ds);
                for (int64_t back = 0; back <= reach; back++) {
                    const int64_t row = b * c->length + t - back, w = K - 1 - back;
                    float *px = dx + row * D + d, *pw = dweight + (b * K + w) * D + d;
                    store(px, load(px) + ds * load(c->weight + w * D + d));
                    store(pw, load(pw) + ds * load(c->x + row * c->x_row + d));
                }
            }
        }
    }
}

}  // extern "C"
