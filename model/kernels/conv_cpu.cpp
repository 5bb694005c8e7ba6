// Depthwise causal convolution of TAPS taps and SiLU on a CPU, forward and backward, fp32, channel-last.
//
// The last TAPS inputs of a vector of channels stay in registers. The backward accumulates dx of the last TAPS tokens until
// no later token adds to it; sums over time (dweight, dbias) are one partial sum per batch row.
#include "mamba_cpu.h"

static const int TAPS = 4;    // the caller pads fewer taps with zeros in front
static const int STEPS = 16;  // tokens of a vector of channels before the next vector: reads whole cache lines

// x_stride: floats between tokens of x; weight [d][TAPS], newest tap last.
struct Conv {
    int64_t batch, length, channels;
    const float *x, *weight, *bias;
    int64_t x_stride, threads;
    const uint8_t *doc_starts;  // [b][l], or null
};

// Number of past taps that a token reads, from that of the previous token: taps do not read across a document start.
static inline int next_past_taps(const Conv &c, int64_t row, int past_taps) {
    return c.doc_starts && c.doc_starts[row] ? 0 : past_taps + 1 < TAPS ? past_taps + 1 : TAPS - 1;
}

// Weights, inputs and unfinished gradients of a work item, carried from token to token; [0] is the newest token.
struct Window {
    float weight[TAPS][GROUP], x[TAPS][GROUP], dx[TAPS][GROUP], dweight[TAPS][GROUP], dbias[GROUP];
    Window(const Conv &c, const WorkItem &item) {
        memset(this, 0, sizeof *this);
        for (int64_t d = item.d0; d < item.d1; d++)
            for (int i = 0; i < TAPS; i++) weight[i][d - item.d0] = c.weight[d * TAPS + TAPS - 1 - i];
    }
};

static inline V convolve(V sum, const V *weight, const V *x, int past_taps) {
    for (int i = 0; i < TAPS; i++)
        if (i <= past_taps) sum += weight[i] * x[i];
    return sum;
}

static void conv_forward(const Conv &c, float *out, const WorkItem &item) {
    Window w(c, item);
    int past_taps = -1;
    for (int64_t t0 = 0; t0 < c.length; t0 += STEPS) {
        const int64_t t1 = t0 + STEPS < c.length ? t0 + STEPS : c.length, row0 = item.b * c.length;
        int next_taps = past_taps;
        for (int64_t d = item.d0; d < item.d1; d += W) {
            const int64_t i = d - item.d0;
            V weight[TAPS], x[TAPS];
            for (int k = 0; k < TAPS; k++) weight[k] = load(w.weight[k] + i), x[k] = load(w.x[k] + i);
            const V bias = load(c.bias + d);
            next_taps = past_taps;
            for (int64_t t = t0; t < t1; t++) {
                for (int k = TAPS - 1; k > 0; k--) x[k] = x[k - 1];
                x[0] = load(c.x + (row0 + t) * c.x_stride + d);
                next_taps = next_past_taps(c, row0 + t, next_taps);
                const V s = convolve(bias, weight, x, next_taps);
                store(out + (row0 + t) * c.channels + d, s * sigmoid(s));
            }
            for (int k = 0; k < TAPS; k++) store(w.x[k] + i, x[k]);
        }
        past_taps = next_taps;
    }
}

// dweight [d][TAPS] and dbias [d] of one batch row.
static void conv_backward(const Conv &c, const float *dout, float *dx, float *dweight, float *dbias, const WorkItem &item) {
    Window w(c, item);
    int past_taps = -1;
    const int64_t row0 = item.b * c.length, D = c.channels;
    for (int64_t t0 = 0; t0 < c.length; t0 += STEPS) {
        const int64_t t1 = t0 + STEPS < c.length ? t0 + STEPS : c.length;
        int next_taps = past_taps;
        for (int64_t d = item.d0; d < item.d1; d += W) {
            const int64_t i = d - item.d0;
            V weight[TAPS], x[TAPS], partial_dx[TAPS], dw[TAPS], db = load(w.dbias + i);
            for (int k = 0; k < TAPS; k++) {
                weight[k] = load(w.weight[k] + i), x[k] = load(w.x[k] + i);
                partial_dx[k] = load(w.dx[k] + i), dw[k] = load(w.dweight[k] + i);
            }
            const V bias = load(c.bias + d);
            next_taps = past_taps;
            for (int64_t t = t0; t < t1; t++) {
                for (int k = TAPS - 1; k > 0; k--) x[k] = x[k - 1], partial_dx[k] = partial_dx[k - 1];
                x[0] = load(c.x + (row0 + t) * c.x_stride + d), partial_dx[0] = V{};
                next_taps = next_past_taps(c, row0 + t, next_taps);
                const V s = convolve(bias, weight, x, next_taps), gate = sigmoid(s);
                const V ds = load(dout + (row0 + t) * D + d) * gate * (splat(1.0f) + s * (splat(1.0f) - gate));
                db += ds;
                for (int k = 0; k < TAPS; k++)
                    if (k <= next_taps) partial_dx[k] += ds * weight[k], dw[k] += ds * x[k];
                if (t >= TAPS - 1) store(dx + (row0 + t - TAPS + 1) * D + d, partial_dx[TAPS - 1]);
            }
            store(w.dbias + i, db);
            for (int k = 0; k < TAPS; k++) {
                store(w.x[k] + i, x[k]), store(w.dx[k] + i, partial_dx[k]), store(w.dweight[k] + i, dw[k]);
                const int64_t last = c.length - 1 - k;  // complete: no later token adds to it
                if (t1 == c.length && k < TAPS - 1 && last >= 0) store(dx + (row0 + last) * D + d, partial_dx[k]);
            }
        }
        past_taps = next_taps;
    }
    for (int64_t d = item.d0; d < item.d1; d++) {
        dbias[d] = w.dbias[d - item.d0];
        for (int k = 0; k < TAPS; k++) dweight[d * TAPS + TAPS - 1 - k] = w.dweight[k][d - item.d0];
    }
}

extern "C" {

// out [b][l][d].
void causal_conv_forward(const Conv *c, float *out) {
    const int64_t groups = (c->channels + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (int64_t i = 0; i < c->batch * groups; i++) conv_forward(*c, out, WorkItem(i, c->channels));
}

// dout and dx [b][l][d], dweight [d][TAPS], dbias [d].
void causal_conv_backward(const Conv *c, const float *dout, float *dx, float *dweight, float *dbias) {
    const int64_t D = c->channels, groups = (D + GROUP - 1) / GROUP;
    std::vector<float> weight(c->batch * D * TAPS), bias(c->batch * D);
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (int64_t i = 0; i < c->batch * groups; i++) {
        const WorkItem item(i, D);
        conv_backward(*c, dout, dx, &weight[item.b * D * TAPS], &bias[item.b * D], item);
    }
    sum_partials(dweight, weight.data(), c->batch, D * TAPS);
    sum_partials(dbias, bias.data(), c->batch, D);
}

}  // extern "C"
