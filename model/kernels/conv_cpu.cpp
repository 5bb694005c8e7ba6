// Depthwise causal convolution of TAPS taps and SiLU on a CPU, forward and backward, fp32, channel-last.
//
// The last inputs of one vector of channels stay in registers. The backward gathers dx of the tokens that later ones
// still add to; sums over time (dweight, dbias) are one partial sum per batch row.
#include "mamba_cpu.h"

static const int TAPS = 4;    // fewer are padded by the caller with zeros in front
static const int STEPS = 16;  // tokens of one vector of channels before the next vector: whole cache lines are used

// x rows are x_row floats apart; weight [d][TAPS], newest tap last.
struct Conv {
    int64_t batch, length, channels;
    const float *x, *weight, *bias;
    int64_t x_row, threads;
    const uint8_t *starts;  // [b][l], or null
};

// How many taps behind a token are visible, from that of the token before: they end where a document begins.
static inline int next_reach(const Conv &c, int64_t row, int reach) {
    return c.starts && c.starts[row] ? 0 : reach + 1 < TAPS ? reach + 1 : TAPS - 1;
}

// Taps, inputs and pending gradients of a piece, kept between its steps; [0] is the newest token.
struct Window {
    float weight[TAPS][GROUP], x[TAPS][GROUP], dx[TAPS][GROUP], dweight[TAPS][GROUP], dbias[GROUP];
    Window(const Conv &c, const Piece &p) {
        memset(this, 0, sizeof *this);
        for (int64_t d = p.d0; d < p.d1; d++)
            for (int i = 0; i < TAPS; i++) weight[i][d - p.d0] = c.weight[d * TAPS + TAPS - 1 - i];
    }
};

static inline V convolve(V sum, const V *weight, const V *x, int reach) {
    for (int i = 0; i < TAPS; i++)
        if (i <= reach) sum += weight[i] * x[i];
    return sum;
}

static void conv_forward(const Conv &c, float *out, const Piece &p) {
    Window w(c, p);
    int reach = -1;
    for (int64_t t0 = 0; t0 < c.length; t0 += STEPS) {
        const int64_t t1 = t0 + STEPS < c.length ? t0 + STEPS : c.length, row0 = p.b * c.length;
        int after = reach;
        for (int64_t d = p.d0; d < p.d1; d += W) {
            const int64_t i = d - p.d0;
            V weight[TAPS], x[TAPS];
            for (int k = 0; k < TAPS; k++) weight[k] = load(w.weight[k] + i), x[k] = load(w.x[k] + i);
            const V bias = load(c.bias + d);
            after = reach;
            for (int64_t t = t0; t < t1; t++) {
                for (int k = TAPS - 1; k > 0; k--) x[k] = x[k - 1];
                x[0] = load(c.x + (row0 + t) * c.x_row + d);
                after = next_reach(c, row0 + t, after);
                const V s = convolve(bias, weight, x, after);
                store(out + (row0 + t) * c.channels + d, s * sigmoid(s));
            }
            for (int k = 0; k < TAPS; k++) store(w.x[k] + i, x[k]);
        }
        reach = after;
    }
}

// dweight [d][TAPS] and dbias [d] of one batch row.
static void conv_backward(const Conv &c, const float *dout, float *dx, float *dweight, float *dbias, const Piece &p) {
    Window w(c, p);
    int reach = -1;
    const int64_t row0 = p.b * c.length, D = c.channels;
    for (int64_t t0 = 0; t0 < c.length; t0 += STEPS) {
        const int64_t t1 = t0 + STEPS < c.length ? t0 + STEPS : c.length;
        int after = reach;
        for (int64_t d = p.d0; d < p.d1; d += W) {
            const int64_t i = d - p.d0;
            V weight[TAPS], x[TAPS], pending[TAPS], dw[TAPS], db = load(w.dbias + i);
            for (int k = 0; k < TAPS; k++) {
                weight[k] = load(w.weight[k] + i), x[k] = load(w.x[k] + i);
                pending[k] = load(w.dx[k] + i), dw[k] = load(w.dweight[k] + i);
            }
            const V bias = load(c.bias + d);
            after = reach;
            for (int64_t t = t0; t < t1; t++) {
                for (int k = TAPS - 1; k > 0; k--) x[k] = x[k - 1], pending[k] = pending[k - 1];
                x[0] = load(c.x + (row0 + t) * c.x_row + d), pending[0] = V{};
                after = next_reach(c, row0 + t, after);
                const V s = convolve(bias, weight, x, after), gate = sigmoid(s);
                const V ds = load(dout + (row0 + t) * D + d) * gate * (splat(1.0f) + s * (splat(1.0f) - gate));
                db += ds;
                for (int k = 0; k < TAPS; k++)
                    if (k <= after) pending[k] += ds * weight[k], dw[k] += ds * x[k];
                if (t >= TAPS - 1) store(dx + (row0 + t - TAPS + 1) * D + d, pending[TAPS - 1]);
            }
            store(w.dbias + i, db);
            for (int k = 0; k < TAPS; k++) {
                store(w.x[k] + i, x[k]), store(w.dx[k] + i, pending[k]), store(w.dweight[k] + i, dw[k]);
                const int64_t left = c.length - 1 - k;  // what nobody adds to any more
                if (t1 == c.length && k < TAPS - 1 && left >= 0) store(dx + (row0 + left) * D + d, pending[k]);
            }
        }
        reach = after;
    }
    for (int64_t d = p.d0; d < p.d1; d++) {
        dbias[d] = w.dbias[d - p.d0];
        for (int k = 0; k < TAPS; k++) dweight[d * TAPS + TAPS - 1 - k] = w.dweight[k][d - p.d0];
    }
}

extern "C" {

// out [b][l][d].
void causal_conv_forward(const Conv *c, float *out) {
    const int64_t groups = (c->channels + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (int64_t i = 0; i < c->batch * groups; i++) conv_forward(*c, out, Piece(i, c->channels));
}

// dout and dx [b][l][d], dweight [d][TAPS], dbias [d].
void causal_conv_backward(const Conv *c, const float *dout, float *dx, float *dweight, float *dbias) {
    const int64_t D = c->channels, groups = (D + GROUP - 1) / GROUP;
    std::vector<float> weight(c->batch * D * TAPS), bias(c->batch * D);
#pragma omp parallel for schedule(static) num_threads(c->threads)
    for (int64_t i = 0; i < c->batch * groups; i++) {
        const Piece p(i, D);
        conv_backward(*c, dout, dx, &weight[p.b * D * TAPS], &bias[p.b * D], p);
    }
    add_parts(dweight, weight.data(), c->batch, D * TAPS);
    add_parts(dbias, bias.data(), c->batch, D);
}

}  // extern "C"
