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

// The entries latent by latent, within a latent in the order of the rows. Each part of the rows counts its own entries
// of each latent, and so knows where they belong; the result is the same whatever the parts are.
void transpose(const int64_t *indices, const int64_t *offsets, int64_t n, int64_t m, int64_t *order, int64_t *rows,
               int64_t *ends) {
    int64_t parts = 1 + offsets[n] / (m + 1);  // counting is to be the smaller part of the work
#if defined(_OPENMP)
    parts = parts < omp_get_max_threads() ? parts : omp_get_max_threads();
#else
    parts = 1;
#endif
    int64_t *places = new int64_t[parts * m]();
    const auto first_row = [=](int64_t part) { return n * part / parts; };
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t e = offsets[first_row(part)]; e < offsets[first_row(part + 1)]; e++)
            places[part * m + indices[e]]++;
    ends[0] = 0;
    for (int64_t j = 0; j < m; j++) {
        ends[j + 1] = ends[j];
        for (int64_t part = 0; part < parts; part++) {
            const int64_t count = places[part * m + j];
            places[part * m + j] = ends[j + 1];
            ends[j + 1] += count;
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = first_row(part); i < first_row(part + 1); i++)
            for (int64_t e = offsets[i]; e < offsets[i + 1]; e++) {
                const int64_t place = places[part * m + indices[e]]++;
                order[place] = e;
                rows[place] = i;
            }
    delete[] places;
}

// The sum of each latent's values, in the order of its entries.
void sum_by_latent(const int64_t *order, const int64_t *ends, int64_t m, const float *values, float *out) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < m; j++) {
        double sum = 0;
        for (int64_t e = ends[j]; e < ends[j + 1]; e++) sum += values[order[e]];
        out[j] = float(sum);
    }
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
        constexpr int N = 8;  // vectors of columns, whose sums stay in registers
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

// The sum of the rows' squared distances from a point, or from 0 if it is null, over blocks of a fixed size as well.
double squared_distances(const float *x, int64_t n, int64_t d, const float *from) {
    constexpr int64_t BLOCK = 256, COLUMNS_AT_ONCE = 4096;
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    double *partial = new double[blocks]();
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = b * BLOCK; i < n && i < (b + 1) * BLOCK; i++)
            for (int64_t c = 0, end; c < d; c = end) {
                end = c + COLUMNS_AT_ONCE < d ? c + COLUMNS_AT_ONCE : d;
                const float *row = x + i * d;
                Vec squares{};
                float rest = 0;
                for (; c + LANES <= end; c += LANES) {
                    const Vec away = from ? load(row + c) - load(from + c) : load(row + c);
                    squares += away * away;
                }
                for (; c < end; c++) {
                    const float away = from ? row[c] - from[c] : row[c];
                    rest += away * away;
                }
                partial[b] += sum(squares) + rest;
            }
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) total += partial[b];
    delete[] partial;
    return total;
}

}  // namespace
