// The squared error of sparse codes and its gradients.
#pragma once

#include "vectors.h"

namespace {

// One row after the other: decode, residual, loss, gradient of the output and gradient of every code. A row's entries
// come in P groups (prefixes of a Matryoshka dictionary; P = 1 otherwise), bounded by `offsets` (n * P + 1); the
// reconstruction of prefix p is what groups 0 to p decode to.
//
//   errors  (n, P)     squared norm of each prefix' residual
//   grad    (n * P, d) for group p, the sum over q >= p of scales[q] * residual of prefix q: the gradient that the
//                      entries of group p see
//   residual (n, d)    target minus the last prefix' reconstruction, if not null
//   code_grad (nnz)    gradient of each code
struct SquaredErrors {
    const int64_t *indices;
    const float *values;
    const int64_t *offsets;
    int64_t n, P;
    const float *scales, *weight, *bias, *x;
    int64_t d;
    float *errors, *grad, *residual, *code_grad;

    // N vectors of columns from c on of row i. Its decoder rows' columns are read twice, and stay in the first level of
    // the cache in between; those that are needed next are asked for meanwhile. `squares` and `dots` are sums over
    // columns.
    template <int N>
    void columns(int64_t i, int64_t c, Vec *squares, Vec *dots) const {
        const int64_t first = offsets[i * P], own = offsets[(i + 1) * P] - first, nnz = offsets[n * P];
        Vec made[N];
        for (int v = 0; v < N; v++) made[v] = load(bias + c + v * LANES);
        for (int64_t p = 0; p < P; p++) {
            for (int64_t e = offsets[i * P + p]; e < offsets[i * P + p + 1]; e++) {
                const float *w = weight + indices[e] * d + c;
                const Vec value = all(values[e]);
                for (int v = 0; v < N; v++) made[v] += value * load(w + v * LANES);
            }
            float *g = grad + (i * P + p) * d + c;
            for (int v = 0; v < N; v++) {
                const Vec r = made[v] - load(x + i * d + c + v * LANES);
                squares[p] += r * r;
                store(g + v * LANES, all(scales[p]) * r);
            }
        }
        if (residual)
            for (int v = 0; v < N; v++)
                store(residual + i * d + c + v * LANES, load(x + i * d + c + v * LANES) - made[v]);
        Vec towards[N]{};
        for (int64_t p = P - 1; p >= 0; p--) {
            float *g = grad + (i * P + p) * d + c;
            for (int v = 0; v < N; v++) {
                towards[v] += load(g + v * LANES);
                store(g + v * LANES, towards[v]);
            }
            for (int64_t e = offsets[i * P + p]; e < offsets[i * P + p + 1]; e++) {
                const float *w = weight + indices[e] * d + c;
                const bool more = c + 2 * N * LANES <= d;
                const float *next = more ? w + N * LANES : e + own < nnz ? weight + indices[e + own] * d : w;
                Vec sum{};
                for (int v = 0; v < N; v++) {
                    prefetch(next + v * LANES);
                    sum += towards[v] * load(w + v * LANES);
                }
                dots[e - first] += sum;
            }
        }
    }

    // The same of one column.
    void column(int64_t i, int64_t c, float *squares, float *dots) const {
        float made = bias[c], towards = 0;
        for (int64_t p = 0; p < P; p++) {
            for (int64_t e = offsets[i * P + p]; e < offsets[i * P + p + 1]; e++)
                made += values[e] * weight[indices[e] * d + c];
            const float r = made - x[i * d + c];
            squares[p] += r * r;
            grad[(i * P + p) * d + c] = scales[p] * r;
        }
        if (residual) residual[i * d + c] = x[i * d + c] - made;
        for (int64_t p = P - 1; p >= 0; p--) {
            towards += grad[(i * P + p) * d + c];
            grad[(i * P + p) * d + c] = towards;
            for (int64_t e = offsets[i * P + p]; e < offsets[i * P + p + 1]; e++)
                dots[e - offsets[i * P]] += towards * weight[indices[e] * d + c];
        }
    }

    void row(int64_t i, Vec *squares, Vec *dots) const {
        const int64_t first = offsets[i * P], own = offsets[(i + 1) * P] - first;
        std::memset(squares, 0, P * sizeof(Vec));
        std::memset(dots, 0, own * sizeof(Vec));
        int64_t c = 0;
        for (; c + 8 * LANES <= d; c += 8 * LANES) columns<8>(i, c, squares, dots);
        for (; c + LANES <= d; c += LANES) columns<1>(i, c, squares, dots);
        for (int64_t p = 0; p < P; p++) errors[i * P + p] = sum(squares[p]);
        for (int64_t e = 0; e < own; e++) code_grad[first + e] = sum(dots[e]);
        for (; c < d; c++) column(i, c, errors + i * P, code_grad + first);
    }

    void rows() const {
        int64_t most = 0;
        for (int64_t i = 0; i < n; i++) {
            const int64_t own = offsets[(i + 1) * P] - offsets[i * P];
            most = own > most ? own : most;
        }
#pragma omp parallel
        {
            Vec *sums = new Vec[P + most];
#pragma omp for schedule(dynamic, 16)
            for (int64_t i = 0; i < n; i++) row(i, sums, sums + P);
            delete[] sums;
        }
    }
};

}  // namespace
