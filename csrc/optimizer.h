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

// What a product in low precision takes of a weight, or of its inputs, row by row. Pointers may be null, those of
// one kind of image together. The fields' order is that of `Images` in kernels/screen.py.
struct Images {
    float *norms;           // |w|
    void *half;             // bf16 rows
    float *half_errors;     // |w - its bf16 row|
    int8_t *bytes;          // int8 rows: w / scale + dither, rounded
    float *byte_scales;     // the worth of one unit
    int32_t *byte_shifts;   // what a product of int8 rows lacks of this one's part
    const float *dither;    // random numbers between -1/2 and 1/2, one for each column
    const float *other;     // those of the matrix that this one is multiplied with
};

// |row - image|, where the image is 0 if it is null.
inline float norm_of_difference(const float *row, const bf16 *image, int64_t d) {
    Vec total{};
    float tail = 0;
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        const Vec delta = image ? load(row + c) - load(image + c) : load(row + c);
        total += delta * delta;
    }
    for (; c < d; c++) {
        const float delta = row[c] - (image ? value(image[c]) : 0);
        tail += delta * delta;
    }
    const float squares = sum(total) + tail;
    if (squares > 1e-20f && squares < 1e30f) return std::sqrt(squares);
    // Squares of very small or very large numbers leave fp32's range; a norm that is too small would be no bound.
    double exact = 0;
    for (c = 0; c < d; c++) {
        const double delta = double(row[c]) - (image ? value(image[c]) : 0);
        exact += delta * delta;
    }
    return float(std::sqrt(exact));
}

// A row in int8, with subtractive dither: (byte - dither) * scale is off by up to half a unit, evenly and independently in
// every column whatever the row is, because the dither was drawn without knowing it (candidates.h).
inline void bytes_of_row(const float *row, int64_t j, int64_t d, const Images &into) {
    int8_t *bytes = into.bytes + j * d;
    Vec most{};
    float largest = 0;
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) most = larger(most, absolute(load(row + c)));
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    for (; c < d; c++) largest = std::fabs(row[c]) > largest ? std::fabs(row[c]) : largest;
    // Half a unit is left for the dither. No unit is too small to divide by.
    const float scale = largest > 126.5e-30f ? largest / 126.5f : 1e-30f, inverse = 1 / scale;
    const auto clipped = [](auto v, auto most) { return v > most ? most : v < -most ? -most : v; };
    // With x = (x' - u) and w = (w' - v) in units, x . w = x' . w' - (x' - u/2) . v - (w' - v/2) . u
    Vec lacking{};
    float tail = 0;
    for (c = 0; c + LANES <= d; c += LANES) {
        const Vec dither = load(into.dither + c);
        const Vec whole = nearest(clipped(load(row + c) * inverse + dither, all(127)));
        store(bytes + c, whole);
        lacking += (whole - 0.5f * dither) * load(into.other + c);
    }
    for (; c < d; c++) {
        const float dither = into.dither[c], whole = nearest(clipped(row[c] * inverse + dither, 127.0f));
        bytes[c] = int8_t(whole);
        tail += (whole - 0.5f * dither) * into.other[c];
    }
    into.byte_scales[j] = scale;
    into.byte_shifts[j] = int32_t(std::lrint(-(sum(lacking) + tail)));
}

inline void images_of_row(const float *row, int64_t j, int64_t d, const Images &into) {
    into.norms[j] = norm_of_difference(row, nullptr, d);
    if (into.half) {
        bf16 *half = static_cast<bf16 *>(into.half) + j * d;
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) store_rounded(half + c, load(row + c));
        for (; c < d; c++) half[c] = rounded(row[c]);
        into.half_errors[j] = norm_of_difference(row, half, d);
    }
    if (into.bytes) bytes_of_row(row, j, d, into);
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
