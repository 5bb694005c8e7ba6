// Row-wise operations on a CPU, fp32: RMSNorm of rows or of splits of rows, and the cross entropy's operations on logits.
#include "mamba_cpu.h"

static const int ROWS = 32;  // of a block of rows: dweight is one partial sum per block

// x [rows][size], rows row_stride floats apart; each of num_splits splits of a row has its own norm; weight [size] or null.
struct Norm {
    int64_t rows, size, row_stride, num_splits, threads;
    const float *x, *weight;
    const int64_t *split_sizes;
    float eps;
};

static void norm_row(const Norm &n, int64_t row, float *out, float *scales) {
    const float *x = n.x + row * n.row_stride;
    for (int64_t p = 0, begin = 0; p < n.num_splits; begin += n.split_sizes[p++]) {
        const int64_t end = begin + n.split_sizes[p];
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = begin; i < end; i++) squares += x[i] * x[i];
        const float scale = 1.0f / std::sqrt(squares / float(n.split_sizes[p]) + n.eps);
        scales[p] = scale;
        if (n.weight)
            for (int64_t i = begin; i < end; i++) out[i] = x[i] * scale * n.weight[i];
        else
            for (int64_t i = begin; i < end; i++) out[i] = x[i] * scale;
    }
}

// y = x s w with s = (mean x^2 + eps)^-1/2: dx = s (g - x s^2 mean(g x)) with g = dout w; dweight += dout x s.
static void norm_row_backward(const Norm &n, int64_t row, const float *dout, const float *scales, float *dx, float *dweight) {
    const float *x = n.x + row * n.row_stride;
    for (int64_t p = 0, begin = 0; p < n.num_splits; begin += n.split_sizes[p++]) {
        const int64_t end = begin + n.split_sizes[p];
        const float s = scales[p];
        float product = 0.0f;
        if (n.weight) {
#pragma omp simd reduction(+ : product)
            for (int64_t i = begin; i < end; i++) product += dout[i] * n.weight[i] * x[i];
        } else {
#pragma omp simd reduction(+ : product)
            for (int64_t i = begin; i < end; i++) product += dout[i] * x[i];
        }
        const float back = product * s * s * s / float(n.split_sizes[p]);
        if (n.weight)
            for (int64_t i = begin; i < end; i++) {
                dx[i] = dout[i] * n.weight[i] * s - x[i] * back;
                dweight[i] += dout[i] * x[i] * s;
            }
        else
            for (int64_t i = begin; i < end; i++) dx[i] = dout[i] * s - x[i] * back;
    }
}

// Applies f to a row vector by vector; pads the last vector with a value that does not change the result.
template <class F> static inline void map_vectors(float *row, int64_t size, float padding, bool write_back, F f) {
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        const V v = f(load(row + i));
        if (write_back) store(row + i, v);
    }
    if (i == size) return;
    float tail[W];
    for (int w = 0; w < W; w++) tail[w] = i + w < size ? row[i + w] : padding;
    store(tail, f(load(tail)));
    if (write_back) memcpy(row + i, tail, sizeof(float) * (size - i));
}

extern "C" {

// out [rows][size], scales [rows][num_splits].
void rms_norm_forward(const Norm *n, float *out, float *scales) {
#pragma omp parallel for schedule(static) num_threads(n->threads)
    for (int64_t row = 0; row < n->rows; row++) norm_row(*n, row, out + row * n->size, scales + row * n->num_splits);
}

// dout and dx [rows][size]; dweight [size], or null without a weight.
void rms_norm_backward(const Norm *n, const float *dout, const float *scales, float *dx, float *dweight) {
    const int64_t blocks = (n->rows + ROWS - 1) / ROWS;
    std::vector<float> sums(dweight ? blocks * n->size : 0);
#pragma omp parallel for schedule(static) num_threads(n->threads)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t row = block * ROWS; row < n->rows && row < (block + 1) * ROWS; row++)
            norm_row_backward(*n, row, dout + row * n->size, scales + row * n->num_splits, dx + row * n->size,
                              dweight ? &sums[block * n->size] : nullptr);
    if (dweight) sum_partials(dweight, sums.data(), blocks, n->size);
}

// logits [t][v]; labels [t], outside [0, v) where another rank holds the label. out [3][t]: the label's logit (0 where
// another rank holds it), the largest logit, the sum of exp(logit - largest).
void loss_statistics(const float *logits, const int64_t *labels, float *out, int64_t t, int64_t v, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < t; i++) {
        float *row = const_cast<float *>(logits) + i * v;
        V maxima = splat(row[0]), sums = V{};
        map_vectors(row, v, row[0], false, [&](V x) { return maxima = maximum(maxima, x); });
        float max = maxima[0];
        for (int w = 1; w < W; w++) max = maxima[w] > max ? maxima[w] : max;
        map_vectors(row, v, -INFINITY, false, [&](V x) { return sums += expv(x - splat(max)); });
        out[i] = labels[i] >= 0 && labels[i] < v ? row[labels[i]] : 0.0f;
        out[t + i] = max, out[2 * t + i] = sum(sums);
    }
}

// Overwrites logits with their gradient, (dloss + dlog_sum) softmax - dloss onehot.
void loss_gradient(float *logits, const int64_t *labels, const float *log_sums, const float *grad_loss,
                   const float *grad_log_sum, int64_t t, int64_t v, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < t; i++) {
        float *row = logits + i * v;
        const V log_sum = splat(log_sums[i]), scale = splat(grad_loss[i] + grad_log_sum[i]);
        map_vectors(row, v, -INFINITY, true, [&](V x) { return scale * expv(x - log_sum); });
        if (labels[i] >= 0 && labels[i] < v) row[labels[i]] -= grad_loss[i];
    }
}

}  // extern "C"
