// The elementwise passes of dense execution, column sums included: what would be a dozen passes of tensor operations.
#pragma once

#include "vectors.h"

namespace {

inline void put(float *p, Vec v) { store(p, v); }
inline void put(bf16 *p, Vec v) { store_rounded(p, v); }
inline void put_one(float *p, float v) { *p = v; }
inline void put_one(bf16 *p, float v) { *p = rounded(v); }

constexpr int64_t COLUMNS = 512;  // a thread works on its own, row after row, so column sums have one order

// into += halves. PyTorch would make a copy of them in fp32 first.
void add_halves(float *into, const bf16 *halves, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < n; start += COLUMNS) {
        const int64_t end = start + COLUMNS < n ? start + COLUMNS : n;
        int64_t c = start;
        for (; c + LANES <= end; c += LANES) store(into + c, load(into + c) + load(halves + c));
        for (; c < end; c++) into[c] += value(halves[c]);
    }
}

// codes = pre where pre > theta, else 0. Adds to `active` how often each latent is, and to `sums` its codes. Returns
// whether all of `pre` is finite.
template <class T>
bool dense_codes(const T *pre, int64_t n, int64_t m, const float *theta, T *codes, float *active, float *sums) {
    float odd = 0;  // 0, or NaN
#pragma omp parallel for schedule(static) reduction(+ : odd)
    for (int64_t start = 0; start < m; start += COLUMNS) {
        const int64_t end = start + COLUMNS < m ? start + COLUMNS : m;
        Vec odd_lanes{};
        for (int64_t i = 0; i < n; i++) {
            int64_t c = start;
            for (; c + LANES <= end; c += LANES) {
                const Vec v = load(pre + i * m + c), bound = load(theta + c);
                const Vec code = v > bound ? v : Vec{};
                odd_lanes += v - v;
                put(codes + i * m + c, code);
                store(active + c, load(active + c) + (v > bound ? all(1) : Vec{}));
                store(sums + c, load(sums + c) + code);
            }
            for (; c < end; c++) {
                const float v = value(pre[i * m + c]);
                const bool on = v > theta[c];
                odd += v - v;
                put_one(codes + i * m + c, on ? v : 0);
                active[c] += on;
                sums[c] += on ? v : 0;
            }
        }
        odd += sum(odd_lanes);
    }
    return odd == 0;
}

// What flows back to the codes, `back`, becomes what flows back to the pre-activations: `add` is added, and where
// pre <= theta it ends. Adds to `bias` its column sums. With a window of width 2 * half around theta, adds to `windows`
// how much of the window each latent's tokens fill, and to `towards` the gradient that theta gets through it.
template <class T>
void dense_back(T *back, const T *pre, int64_t n, int64_t m, const float *theta, const float *add, float half,
                float *bias, float *windows, float *towards) {
    const float height = half > 0 ? 1 / (2 * half) : 0;
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < m; start += COLUMNS) {
        const int64_t end = start + COLUMNS < m ? start + COLUMNS : m;
        for (int64_t i = 0; i < n; i++) {
            int64_t c = start;
            for (; c + LANES <= end; c += LANES) {
                const Vec v = load(pre + i * m + c), bound = load(theta + c);
                const Vec g = load(back + i * m + c) + load(add + c);
                if (half > 0) {
                    const Vec inside = absolute(v - bound) < half ? all(height) : Vec{};
                    store(windows + c, load(windows + c) + inside);
                    store(towards + c, load(towards + c) - g * bound * inside);
                }
                const Vec kept = v > bound ? g : Vec{};
                put(back + i * m + c, kept);
                store(bias + c, load(bias + c) + kept);
            }
            for (; c < end; c++) {
                const float v = value(pre[i * m + c]), g = value(back[i * m + c]) + add[c];
                if (half > 0 && std::fabs(v - theta[c]) < half) {
                    windows[c] += height;
                    towards[c] -= g * theta[c] * height;
                }
                const float kept = v > theta[c] ? g : 0;
                put_one(back + i * m + c, kept);
                bias[c] += kept;
            }
        }
    }
}

}  // namespace
