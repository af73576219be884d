// One pass over the rows of a weight matrix: gradient, moments, update, norm, and the row as the next product wants it.
#pragma once

#include "vectors.h"

namespace {

// A random number that depends on nothing but what it is for, so that any number of threads rounds alike.
inline uint32_t hashed(uint64_t seed, uint64_t element) {
    uint64_t z = seed * 0x9e3779b97f4a7c15ull + element;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return uint32_t((z ^ z >> 31) >> 32);
}

// Up or down with the probability that makes the mean right: a bf16 moment that decays by a thousandth at a time would
// otherwise never move.
inline bf16 rounded_stochastically(float x, uint32_t random) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {uint16_t((bits + (random & 0xffff)) >> 16)};
}

inline void keep(float *p, float x, uint64_t, uint64_t, uint32_t) { *p = x; }
inline void keep(bf16 *p, float x, uint64_t seed, uint64_t element, uint32_t shift) {
    *p = rounded_stochastically(x, hashed(seed, element) >> shift);
}

struct Adam {
    float step_size;  // lr / (1 - beta1^t)
    float beta1, beta2, eps;
    float correction;  // 1 / sqrt(1 - beta2^t)
    float grad_scale;  // of clipping
    uint64_t seed;     // of the stochastic rounding, another one for each step
};

// What a product in low precision takes of a weight, or of its inputs, row by row. Pointers may be null, those to
// images and their errors in pairs. The fields' order is that of `Images` in kernels/screen.py.
struct Images {
    float *norms;           // |w|
    void *half;             // bf16 rows
    float *half_errors;     // |w - its bf16 row|
    int8_t *bytes;          // int8 rows
    float *byte_scales;     // the worth of one unit
    float *byte_errors;     // |w - its int8 row|
    int8_t *rest;           // what that leaves, in int8 rows whose unit is FINER times as small
    float *rest_errors;     // |w - both int8 rows|
};

constexpr float FINER = 254;  // what rounding leaves is at most half a unit

// |row - (image + rest / FINER) * scale|, where what is null is 0.
template <class T>
float norm_of_difference(const float *row, const T *image, float scale, int64_t d, const int8_t *rest = nullptr) {
    constexpr float unit = 1 / FINER;
    Vec total{};
    float tail = 0;
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        Vec delta = load(row + c);
        if (rest)
            delta -= (load(image + c) + load(rest + c) * unit) * scale;
        else if (image)
            delta -= load(image + c) * scale;
        total += delta * delta;
    }
    for (; c < d; c++) {
        const float taken = (image ? value(image[c]) : 0) + (rest ? value(rest[c]) * unit : 0);
        const float delta = row[c] - taken * scale;
        tail += delta * delta;
    }
    const float squares = sum(total) + tail;
    if (squares > 1e-20f && squares < 1e30f) return std::sqrt(squares);
    // Squares of very small or very large numbers leave fp32's range; a norm that is too small would be no bound.
    double exact = 0;
    for (c = 0; c < d; c++) {
        const double taken = (image ? value(image[c]) : 0) + (rest ? rest[c] / double(FINER) : 0);
        const double delta = row[c] - taken * scale;
        exact += delta * delta;
    }
    return float(std::sqrt(exact));
}

inline void images_of_row(const float *row, int64_t j, int64_t d, const Images &into) {
    into.norms[j] = norm_of_difference<float>(row, nullptr, 1, d);
    if (into.half) {
        bf16 *half = static_cast<bf16 *>(into.half) + j * d;
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) store_rounded(half + c, load(row + c));
        for (; c < d; c++) half[c] = rounded(row[c]);
        into.half_errors[j] = norm_of_difference(row, half, 1, d);
    }
    if (into.bytes) {
        int8_t *bytes = into.bytes + j * d, *rest = into.rest + j * d;
        Vec most{};
        float largest = 0;
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) most = larger(most, absolute(load(row + c)));
        for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        for (; c < d; c++) largest = std::fabs(row[c]) > largest ? std::fabs(row[c]) : largest;
        // Rows too small to divide by are taken as 0; their error is then their norm.
        const float scale = largest / 127, inverse = scale > 1e-30f ? 1 / scale : 0;
        const float limit = 127.0f;
        const auto clipped = [&](auto v, auto most) { return v > most ? most : v < -most ? -most : v; };
        const auto nearest = [](float v) { return int8_t(v < 0 ? v - 0.5f : v + 0.5f); };
        for (c = 0; c + LANES <= d; c += LANES) {
            const Vec v = clipped(load(row + c) * inverse, all(limit));
            store_rounded(bytes + c, v);
            store_rounded(rest + c, clipped((v - load(bytes + c)) * FINER, all(limit)));
        }
        for (; c < d; c++) {
            const float v = clipped(row[c] * inverse, limit);
            bytes[c] = nearest(v);
            rest[c] = nearest(clipped((v - bytes[c]) * FINER, limit));
        }
        into.byte_scales[j] = scale;
        into.byte_errors[j] = norm_of_difference(row, bytes, scale, d);
        into.rest_errors[j] = norm_of_difference(row, bytes, scale, d, rest);
    }
}

// Row j has the gradient grad[slot[j]] (its own row if `slot` is null; none, that is 0, if slot[j] < 0). With `unit`,
// the row is brought back to norm 1. The new row's images are made where `into` has room for them.
template <class M>
void adam_rows(float *weight, int64_t m, int64_t d, const float *grad, const int64_t *slot, M *first, M *second,
               const Adam a, bool unit, const Images &into) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < m; j++) {
        const int64_t at = slot ? slot[j] : j;
        const float *g = at < 0 ? nullptr : grad + at * d;
        float *w = weight + j * d;
        M *m1 = first + j * d, *m2 = second + j * d;
        for (int64_t c = 0; c < d; c++) {
            const float gradient = g ? g[c] * a.grad_scale : 0.0f;
            const float u = a.beta1 * value(m1[c]) + (1 - a.beta1) * gradient;
            const float v = a.beta2 * value(m2[c]) + (1 - a.beta2) * gradient * gradient;
            keep(m1 + c, u, a.seed, j * d + c, 0);
            keep(m2 + c, v, a.seed, j * d + c, 16);
            w[c] -= a.step_size * u / (__builtin_sqrtf(v) * a.correction + a.eps);
        }
        if (unit) {
            const float norm = std::sqrt(dot(w, w, d));
            const float factor = 1 / (norm > 1e-12f ? norm : 1e-12f);
            for (int64_t c = 0; c < d; c++) w[c] *= factor;
        }
        if (into.norms) images_of_row(w, j, d, into);
    }
}

}  // namespace
