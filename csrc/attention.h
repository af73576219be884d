// Attention in bf16 for short rows of text: the scores of a few queries lie in fp32 in the second-level cache, so there
// is one softmax, and no running one. Needs the products of bf16 pairs of AVX512-BF16.
#pragma once

#include <atomic>
#include <cstdlib>

#include "vectors.h"

namespace {

// Elements between neighbours along the batch, the heads and the positions. A head's elements lie side by side.
struct Strides {
    int64_t batch, head, position;
};

struct Attention {
    int64_t batch, heads, groups, length, width;  // groups: query heads to one head of keys and values
    Strides q, k, v;
    float scale;
    bool causal;
};

#if defined(__AVX512BF16__)

constexpr int QUERIES = 4;       // worked on at the same time
constexpr int64_t STRETCH = 64;  // columns of a product that the registers hold

// 2^x for x <= 0, to about 2^-20 of its size; 0 below 2^-999, NaN for NaN.
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-1000), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.33335581e-3f);
    const float series[] = {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1};
    for (const float c : series) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

// out[r, c] = the sum over p of a[r, 2 p] b[p, c][0] + a[r, 2 p + 1] b[p, c][1], for QUERIES rows and 16 N columns.
template <int N>
inline void product(const bf16 *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t pairs, float *out,
                    int64_t out_stride) {
    __m512 sums[QUERIES][N];
    for (auto &row : sums)
        for (auto &sum : row) sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh columns[N];
        for (int c = 0; c < N; c++) columns[c] = (__m512bh)_mm512_loadu_si512(b + p * b_stride + 16 * c);
        for (int r = 0; r < QUERIES; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < N; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], both, columns[c]);
        }
    }
    for (int r = 0; r < QUERIES; r++)
        for (int c = 0; c < N; c++) _mm512_storeu_ps(out + r * out_stride + 16 * c, sums[r][c]);
}

// The same for any multiple of 16 columns.
inline void multiply(const bf16 *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t pairs,
                     int64_t columns, float *out, int64_t out_stride) {
    for (int64_t c = 0; c < columns; c += STRETCH) {
        const int64_t left = columns - c;
        const auto part = left >= 64 ? product<4> : left == 48 ? product<3> : left == 32 ? product<2> : product<1>;
        part(a, a_stride, b + c, b_stride, pairs, out + c, out_stride);
    }
}

// The softmax of `count` scores as bf16 numerators, zeros behind them up to `end`, a multiple of 16; returns what to
// divide them by.
inline float numerators(const float *scores, int64_t count, int64_t end, float scale, bf16 *to) {
    const __m512 least = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale * 1.44269504f);
    const auto valid = [count](int64_t c) { return __mmask16(count - c >= 16 ? 0xffff : (1u << (count - c)) - 1); };
    __m512 most = least, sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += 16)
        most = _mm512_max_ps(_mm512_mask_mul_ps(least, valid(c), _mm512_loadu_ps(scores + c), factor), most);
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    int64_t c = 0;
    for (; c < count; c += 16) {
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + c), factor, top);
        const __m512 e = _mm512_maskz_mov_ps(valid(c), power_of_two(x));
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256((__m256i *)(to + c), (__m256i)_mm512_cvtneps_pbh(e));
    }
    for (; c < end; c += 16) _mm256_storeu_si256((__m256i *)(to + c), _mm256_setzero_si256());
    return _mm512_reduce_add_ps(sum);
}

inline uint32_t pair_of(bf16 low, bf16 high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }

// What one thread works with: keys as pairs of elements `(width / 2, room)`, values as pairs of positions
// `(room / 2, width)`, and of a few queries themselves, their scores, numerators and outputs. Without `memory`, nothing.
struct AttentionScratch {
    uint32_t *keys, *values;
    float *scores, *sums;
    bf16 *queries, *weights;
    char *memory;

    AttentionScratch(int64_t room, int64_t width) {
        const int64_t packed = room * width * 2, rows = QUERIES * room * 4, outputs = QUERIES * width * 4;
        memory = static_cast<char *>(std::aligned_alloc(64, 2 * packed + rows + rows / 2 + outputs + outputs / 2));
        if (!memory) return;
        keys = reinterpret_cast<uint32_t *>(memory);
        values = reinterpret_cast<uint32_t *>(memory + packed);
        scores = reinterpret_cast<float *>(memory + 2 * packed);
        sums = reinterpret_cast<float *>(memory + 2 * packed + rows);
        weights = reinterpret_cast<bf16 *>(memory + 2 * packed + rows + outputs);
        queries = reinterpret_cast<bf16 *>(memory + 2 * packed + rows + outputs + rows / 2);
    }
    ~AttentionScratch() { std::free(memory); }
};

inline void attend(const Attention &a, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t out_stride,
                   int64_t room, const AttentionScratch &s) {
    const int64_t n = a.length, d = a.width;
    for (int64_t j = 0; j < room; j++)  // keys behind the last one are zeros
        for (int64_t p = 0; p < d / 2; p++) {
            const bf16 *row = k + j * a.k.position + 2 * p;
            s.keys[p * room + j] = j < n ? pair_of(row[0], row[1]) : 0;
        }
    for (int64_t j = 0; j < room; j += 2) {
        const bf16 *row = v + j * a.v.position, *next = row + a.v.position;
        uint32_t *to = s.values + j / 2 * d;
        for (int64_t c = 0; c < d; c++) to[c] = pair_of(j < n ? row[c] : bf16{0}, j + 1 < n ? next[c] : bf16{0});
    }
    for (int64_t i = 0; i < n; i += QUERIES) {
        const int64_t rows = n - i < QUERIES ? n - i : QUERIES, last = a.causal ? i + rows : n;
        const int64_t end = (last + 15) / 16 * 16;
        for (int64_t r = 0; r < QUERIES; r++)  // the last few are done for nothing
            std::memcpy(s.queries + r * d, q + (i + (r < rows ? r : 0)) * a.q.position, d * sizeof(bf16));
        multiply(s.queries, d, s.keys, room, d / 2, end, s.scores, room);
        float divisors[QUERIES];
        for (int64_t r = 0; r < QUERIES; r++) {
            const int64_t count = a.causal && r < rows ? i + r + 1 : last;
            divisors[r] = numerators(s.scores + r * room, count, end, a.scale, s.weights + r * room);
        }
        multiply(s.weights, room, s.values, d, end / 2, d, s.sums, d);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < d; c += 16) {
                const __m512 x = _mm512_div_ps(_mm512_loadu_ps(s.sums + r * d + c), _mm512_set1_ps(divisors[r]));
                _mm256_storeu_si256((__m256i *)(out + (i + r) * out_stride + c), (__m256i)_mm512_cvtneps_pbh(x));
            }
    }
}

// The output is (batch, length, heads, width); the width is a multiple of 16. False if no thread was given memory, and
// nothing was written.
inline bool attention(const Attention &a, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out) {
    const int64_t room = (a.length + 15) / 16 * 16, count = a.batch * a.heads;
    std::atomic<int64_t> next{0};
#pragma omp parallel
    {
        const AttentionScratch scratch(room, a.width);
        // A thread without memory leaves all of the work to the others.
        for (int64_t i; scratch.memory && (i = next++) < count;) {
            const int64_t b = i / a.heads, h = i % a.heads, g = h / a.groups;
            attend(a, q + b * a.q.batch + h * a.q.head, k + b * a.k.batch + g * a.k.head,
                   v + b * a.v.batch + g * a.v.head, out + (b * a.length * a.heads + h) * a.width, a.heads * a.width,
                   room, scratch);
        }
    }
    return next >= count;
}

#endif

}  // namespace
