// Rows out of mapped files: each is copied once, from the map into the batch, and widened to fp32 where that is wanted.
#pragma once

#include "vectors.h"

namespace {

struct fp16 {
    uint16_t bits;
};

inline float value(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    uint32_t wide;
    float v;
    if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
        v = float(mantissa) * 0x1p-24f;
        std::memcpy(&wide, &v, sizeof wide);
        wide |= sign;
    } else {
        wide = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
    }
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

inline Vec load(const fp16 *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    Vec v;
    for (int i = 0; i < LANES; i++) v[i] = value(p[i]);
    return v;
#endif
}

template <class T>
inline void widen(const T *from, int64_t d, float scale, float *to) {
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) store(to + c, load(from + c) * scale);
    for (; c < d; c++) to[c] = value(from[c]) * scale;
}

// One stretch of rows: row i lies at base + (i / per_group) * group_stride + (i % per_group) * row_stride, in bytes.
struct Stretch {
    const char *base;
    const float *scales;  // one for each row of int8, else null
    int64_t per_group, group_stride, row_stride;
};

// Where a row lies, and its scale.
inline const char *find(const Stretch *stretches, const int64_t *starts, int64_t count, int64_t row, float *scale) {
    int64_t low = 0, high = count;  // the last stretch that does not begin behind the row
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (starts[middle] <= row ? low : high) = middle;
    }
    const Stretch &s = stretches[low];
    const int64_t at = row - starts[low];
    *scale = s.scales ? s.scales[at] : 1;
    if (s.per_group == 1) return s.base + at * s.group_stride;
    return s.base + at / s.per_group * s.group_stride + at % s.per_group * s.row_stride;
}

// Kinds of elements: fp32 (0), bf16 (1), fp16 (2), int8 (3). Row i of a stretch has the number starts[stretch] + i.
inline void gather_rows(const int64_t *rows, int64_t n, int64_t d, const Stretch *stretches, const int64_t *starts,
                        int64_t count, int64_t kind, bool wide, char *out, int64_t threads) {
    (void)threads;  // without OpenMP
    const int64_t size = kind == 0 ? 4 : kind == 3 ? 1 : 2, out_size = wide ? 4 : size, bytes = d * size;
    constexpr int64_t NEXT = 4;  // rows between asking for one and copying it
#pragma omp parallel num_threads(threads)
    {
        const char *from[NEXT + 1];
        float scale[NEXT + 1];
        const auto ask = [&](int64_t i) {
            const char *at = from[i % (NEXT + 1)] = find(stretches, starts, count, rows[i], scale + i % (NEXT + 1));
            // Into the second-level cache, which has room for more requests at a time than the first.
            for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(at + c, 0, 2);
        };
        int64_t asked = 0;  // behind the last row that this thread has asked for
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            if (asked < i) asked = i;
            for (; asked <= i + NEXT && asked < n; asked++) ask(asked);
            const char *row = from[i % (NEXT + 1)];
            char *to = out + i * d * out_size;
            if (!wide || kind == 0)
                std::memcpy(to, row, bytes);
            else if (kind == 1)
                widen(reinterpret_cast<const bf16 *>(row), d, 1, reinterpret_cast<float *>(to));
            else if (kind == 2)
                widen(reinterpret_cast<const fp16 *>(row), d, 1, reinterpret_cast<float *>(to));
            else
                widen(reinterpret_cast<const int8_t *>(row), d, scale[i % (NEXT + 1)], reinterpret_cast<float *>(to));
        }
    }
}

}  // namespace
