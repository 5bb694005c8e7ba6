// Row-wise operations on a CPU, fp32: RMSNorm of rows or of parts of them, and what the cross entropy needs of logits.
#include "mamba_cpu.h"

static const int ROWS = 32;  // of a piece of work: sums over rows (dweight) are one partial sum a piece

// x [rows][size], rows x_row floats apart; each of the `count` parts of a row is normed by itself; weight [size] or null.
struct Norm {
    int64_t rows, size, x_row, count, threads;
    const float *x, *weight;
    const int64_t *parts;
    float eps;
};

static void norm_row(const Norm &n, int64_t row, float *out, float *scales) {
    const float *x = n.x + row * n.x_row;
    for (int64_t p = 0, at = 0; p < n.count; at += n.parts[p++]) {
        const int64_t end = at + n.parts[p];
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = at; i < end; i++) squares += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(squares / float(n.parts[p]) + n.eps);
        scales[p] = scale;
        if (n.weight)
            for (int64_t i = at; i < end; i++) out[i] = x[i] * scale * n.weight[i];
        else
            for (int64_t i = at; i < end; i++) out[i] = x[i] * scale;
    }
}

// y = x s w with s = (mean x^2 + eps)^-1/2: dx = s (g - x s^2 mean(g x)) with g = dout w; dweight += dout x s.
static void norm_row_backward(const Norm &n, int64_t row, const float *dout, const float *scales, float *dx, float *dweight) {
    const float *x = n.x + row * n.x_row;
    for (int64_t p = 0, at = 0; p < n.count; at += n.parts[p++]) {
        const int64_t end = at + n.parts[p];
        const float s = scales[p];
        float product = 0.0f;
        if (n.weight) {
#pragma omp simd reduction(+ : product)
            for (int64_t i = at; i < end; i++) product += dout[i] * n.weight[i] * x[i];
        } else {
#pragma omp simd reduction(+ : product)
            for (int64_t i = at; i < end; i++) product += dout[i] * x[i];
        }
        const float back = product * s * s * s / float(n.parts[p]);
        if (n.weight)
            for (int64_t i = at; i < end; i++) {
                dx[i] = dout[i] * n.weight[i] * s - x[i] * back;
                dweight[i] += dout[i] * x[i] * s;
            }
        else
            for (int64_t i = at; i < end; i++) dx[i] = dout[i] * s - x[i] * back;
    }
}

// f on vectors of a row, the last one filled up with a value that f makes nothing of.
template <class F> static inline void vectors(float *row, int64_t size, float filling, bool written, F f) {
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        const V v = f(load(row + i));
        if (written) store(row + i, v);
    }
    if (i == size) return;
    float rest[W];
    for (int w = 0; w < W; w++) rest[w] = i + w < size ? row[i + w] : filling;
    store(rest, f(load(rest)));
    if (written) memcpy(row + i, rest, sizeof(float) * (size - i));
}

extern "C" {

// out [rows][size], scales [rows][count].
void rms_norm_forward(const Norm *n, float *out, float *scales) {
#pragma omp parallel for schedule(static) num_threads(n->threads)
    for (int64_t row = 0; row < n->rows; row++) norm_row(*n, row, out + row * n->size, scales + row * n->count);
}

// dout and dx [rows][size]; dweight [size], or null without a weight.
void rms_norm_backward(const Norm *n, const float *dout, const float *scales, float *dx, float *dweight) {
    const int64_t pieces = (n->rows + ROWS - 1) / ROWS;
    std::vector<float> sums(dweight ? pieces * n->size : 0);
#pragma omp parallel for schedule(static) num_threads(n->threads)
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t row = piece * ROWS; row < n->rows && row < (piece + 1) * ROWS; row++)
            norm_row_backward(*n, row, dout + row * n->size, scales + row * n->count, dx + row * n->size,
                              dweight ? &sums[piece * n->size] : nullptr);
    if (dweight) add_parts(dweight, sums.data(), pieces, n->size);
}

// logits [t][v]; labels [t], outside [0, v) where the label is elsewhere; out [3][t]: label's logit or 0, largest, sum.
void loss_statistics(const float *logits, const int64_t *labels, float *out, int64_t t, int64_t v, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < t; i++) {
        float *row = const_cast<float *>(logits) + i * v;
        V most = splat(row[0]), total = V{};
        vectors(row, v, row[0], false, [&](V x) { return most = maximum(most, x); });
        float top = most[0];
        for (int w = 1; w < W; w++) top = most[w] > top ? most[w] : top;
        vectors(row, v, -INFINITY, false, [&](V x) { return total += expv(x - splat(top)); });
        out[i] = labels[i] >= 0 && labels[i] < v ? row[labels[i]] : 0.0f;
        out[t + i] = top, out[2 * t + i] = sum(total);
    }
}

// In place: logits become their gradient, (dloss + dlog_sum) softmax - dloss onehot.
void loss_gradient(float *logits, const int64_t *labels, const float *log_sums, const float *grad_loss,
                   const float *grad_log_sum, int64_t t, int64_t v, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < t; i++) {
        float *row = logits + i * v;
        const V shift = splat(log_sums[i]), scale = splat(grad_loss[i] + grad_log_sum[i]);
        vectors(row, v, -INFINITY, true, [&](V x) { return scale * expv(x - shift); });
        if (labels[i] >= 0 && labels[i] < v) row[labels[i]] -= grad_loss[i];
    }
}

}  // extern "C"
