// Products with sparse codes, stored row after row as (indices, values, offsets).
#pragma once

#include "vectors.h"

namespace {

// out += v0 * w0 + v1 * w1 + v2 * w2 + v3 * w3
inline void add4(float *out, const float *const w[4], const float v[4], int64_t d,
                 const float *const next[4]) {
    const Vec v0 = all(v[0]), v1 = all(v[1]), v2 = all(v[2]), v3 = all(v[3]);
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        for (int i = 0; i < 4; i++) prefetch(next[i] + c);
        store(out + c, (load(out + c) + v0 * load(w[0] + c) + v1 * load(w[1] + c)) +
                           (v2 * load(w[2] + c) + v3 * load(w[3] + c)));
    }
    for (; c < d; c++) out[c] = (out[c] + v[0] * w[0][c] + v[1] * w[1][c]) + (v[2] * w[2][c] + v[3] * w[3][c]);
}

inline void add1(float *out, const float *w, float v, int64_t d) {
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) store(out + c, load(out + c) + all(v) * load(w + c));
    for (; c < d; c++) out[c] += v * w[c];
}

// out += the weighted rows of some entries, four at a time so that `out` is loaded and stored a quarter as often.
inline void add_rows(float *out, const int64_t *indices, const float *values, int64_t count, const float *weight,
                     int64_t d) {
    int64_t e = 0;
    for (; e + 4 <= count; e += 4) {
        const float *w[4], *next[4];
        for (int i = 0; i < 4; i++) {
            w[i] = weight + indices[e + i] * d;
            next[i] = e + 4 + i < count ? weight + indices[e + 4 + i] * d : w[i];
        }
        add4(out, w, values + e, d, next);
    }
    for (; e < count; e++) add1(out, weight + indices[e] * d, values[e], d);
}

void gather_sum(const int64_t *indices, const float *values, const int64_t *offsets, int64_t n, const float *weight,
                int64_t d, float *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float *row = out + i * d;
        std::memset(row, 0, d * sizeof(float));
        add_rows(row, indices + offsets[i], values + offsets[i], offsets[i + 1] - offsets[i], weight, d);
    }
}

void sddmm(const int64_t *indices, const int64_t *offsets, int64_t n, const float *grad, const float *weight,
           int64_t d, float *out) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = offsets[i]; e < offsets[i + 1]; e++) {
            const float *next = weight + indices[e + AHEAD < offsets[n] ? e + AHEAD : e] * d;
            out[e] = dot(grad + i * d, weight + indices[e] * d, d, next);
        }
}

// The entries latent by latent, within a latent in the order of the rows. Each thread places the latents of its own
// range, so nothing is shared and the result does not depend on the number of threads.
void transpose(const int64_t *indices, const int64_t *offsets, int64_t n, int64_t m, int64_t *order, int64_t *rows,
               int64_t *ends) {
    std::memset(ends, 0, (m + 1) * sizeof(int64_t));
    const int64_t nnz = offsets[n];
    for (int64_t e = 0; e < nnz; e++) ends[indices[e] + 1]++;
    for (int64_t j = 0; j < m; j++) ends[j + 1] += ends[j];
    constexpr int64_t PARTS = 16;  // fixed, so that any number of threads does the same
    int64_t *next = new int64_t[m];
    std::memcpy(next, ends, m * sizeof(int64_t));
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t part = 0; part < (nnz < 200000 ? 1 : PARTS); part++) {
        const int64_t parts = nnz < 200000 ? 1 : PARTS;
        const int64_t first = m * part / parts, last = m * (part + 1) / parts;
        for (int64_t i = 0; i < n; i++)
            for (int64_t e = offsets[i]; e < offsets[i + 1]; e++) {
                const int64_t j = indices[e];
                if (j < first || j >= last) continue;
                order[next[j]] = e;
                rows[next[j]++] = i;
            }
    }
    delete[] next;
}

// What a row of a weight's gradient has beside its sum over tokens. Pointers may be null.
struct Extra {
    const float *start;        // rows to begin with: that of latent j is start[start_slot[j]], or none if that is negative
    const int64_t *start_slot;
    const float *weight;       // the weight itself, (m, d), for the two below
    const float *along;        // (m,): this much of weight[j] is added (the gradient of a penalty on its norm)
    bool project;              // take out the part along weight[j], which has norm 1
};

// codes.T @ x for some latents: row s of `out` belongs to latent `latents[s]` (or s, if `latents` is null), and sums
// values[order[e]] * x[rows[e] / rows_per_x] over the latent's entries e. `squares` receives each row's squared norm.
void scatter_outer(const int64_t *latents, int64_t count, const int64_t *order, const int64_t *rows,
                   const int64_t *ends, const float *values, const float *x, int64_t d, int64_t rows_per_x,
                   const Extra extra, float *out, float *squares) {
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t s = 0; s < count; s++) {
        const int64_t j = latents ? latents[s] : s;
        const int64_t first = ends[j], last = ends[j + 1];
        float *row = out + s * d;
        const int64_t slot = extra.start ? extra.start_slot[j] : -1;
        if (slot < 0)
            std::memset(row, 0, d * sizeof(float));
        else
            std::memcpy(row, extra.start + slot * d, d * sizeof(float));
        int64_t c = 0;
        const auto sum_columns = [&](auto vectors) {
            constexpr int N = decltype(vectors)::value;
            for (; first < last && c + N * LANES <= d; c += N * LANES) {
                Vec t[N];
                for (int i = 0; i < N; i++) t[i] = load(row + c + i * LANES);
                for (int64_t e = first; e < last; e++) {
                    const float *source = x + rows[e] / rows_per_x * d + c;
                    const Vec v = all(values[order[e]]);
                    for (int i = 0; i < N; i++) t[i] += v * load(source + i * LANES);
                }
                for (int i = 0; i < N; i++) store(row + c + i * LANES, t[i]);
            }
        };
        sum_columns(std::integral_constant<int, 16>());
        sum_columns(std::integral_constant<int, 8>());
        for (int64_t e = first; c < d && e < last; e++)
            add1(row + c, x + rows[e] / rows_per_x * d + c, values[order[e]], d - c);
        if (extra.along && extra.along[j] != 0) add1(row, extra.weight + j * d, extra.along[j], d);
        if (extra.project) add1(row, extra.weight + j * d, -dot(row, extra.weight + j * d, d), d);
        if (squares) squares[s] = dot(row, row, d);
    }
}

// The sum of weights[i] * x[i] (weights 1 if null), over blocks of a fixed size, so that any number of threads adds in
// the same order. Row i begins at x + i * stride.
void sum_rows(const float *weights, const float *x, int64_t n, int64_t d, int64_t stride, float *out) {
    constexpr int64_t BLOCK = 256;
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    float *partial = new float[blocks * d]();
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = b * BLOCK; i < n && i < (b + 1) * BLOCK; i++)
            if (!weights || weights[i] != 0) add1(partial + b * d, x + i * stride, weights ? weights[i] : 1, d);
    std::memset(out, 0, d * sizeof(float));
    for (int64_t b = 0; b < blocks; b++) add1(out, partial + b * d, 1, d);
    delete[] partial;
}

// One row after the other: decode, residual, loss, gradient of the output and gradient of every code, while the row's
// decoder rows are in cache. A row's entries come in P groups (prefixes of a Matryoshka dictionary; P = 1 otherwise),
// bounded by `offsets` (n * P + 1); the reconstruction of prefix p is what groups 0 to p decode to.
//
//   errors  (n, P)     squared norm of each prefix' residual
//   grad    (n * P, d) for group p, the sum over q >= p of scales[q] * residual of prefix q: the gradient that the
//                      entries of group p see
//   residual (n, d)    target minus the last prefix' reconstruction, if not null
//   code_grad (nnz)    gradient of each code
void squared_error_rows(const int64_t *indices, const float *values, const int64_t *offsets, int64_t n, int64_t P,
                        const float *scales, const float *weight, const float *bias, const float *x, int64_t d,
                        float *errors, float *grad, float *residual, float *code_grad) {
#pragma omp parallel
    {
        float *made = new float[d];
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < n; i++) {
            const float *target = x + i * d;
            std::memcpy(made, bias, d * sizeof(float));
            for (int64_t p = 0; p < P; p++) {
                const int64_t first = offsets[i * P + p], last = offsets[i * P + p + 1];
                add_rows(made, indices + first, values + first, last - first, weight, d);
                float *g = grad + (i * P + p) * d;
                Vec squares{};
                float rest = 0;
                int64_t c = 0;
                for (; c + LANES <= d; c += LANES) {
                    const Vec r = load(made + c) - load(target + c);
                    squares += r * r;
                    store(g + c, all(scales[p]) * r);
                }
                for (; c < d; c++) {
                    const float r = made[c] - target[c];
                    rest += r * r;
                    g[c] = scales[p] * r;
                }
                errors[i * P + p] = sum(squares) + rest;
            }
            if (residual)
                for (int64_t c = 0; c < d; c++) residual[i * d + c] = target[c] - made[c];
            for (int64_t p = P - 2; p >= 0; p--) add1(grad + (i * P + p) * d, grad + (i * P + p + 1) * d, 1, d);
            for (int64_t p = 0; p < P; p++) {
                const float *g = grad + (i * P + p) * d;
                for (int64_t e = offsets[i * P + p]; e < offsets[i * P + p + 1]; e++)
                    code_grad[e] = dot(g, weight + indices[e] * d, d);
            }
        }
        delete[] made;
    }
}

}  // namespace
