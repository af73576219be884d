// The vector type of one target, and the few operations that plain loops do not give.
//
// kernels.cpp is compiled once for each instruction set. Everything lives in an unnamed namespace, and standard
// containers are not used with standard element types: the linker would otherwise merge a template that was compiled
// for AVX-512 into code that has to run without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef float VecAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int32_t IntsAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int8_t BytesAt __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t HalfAt __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

inline Vec load(const float *p) { return *reinterpret_cast<const VecAt *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<VecAt *>(p) = v; }

inline Vec load(const bf16 *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const HalfAt *>(p), VecBits) << 16);
#endif
}

inline void store(bf16 *p, VecBits bits) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)bits, _mm256_setzero_si256());
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8)));
#else
    *reinterpret_cast<HalfAt *>(p) = __builtin_convertvector(bits, HalfAt);
#endif
}

inline Vec load(const int32_t *p) {
    return __builtin_convertvector(*reinterpret_cast<const IntsAt *>(p), Vec);
}

// The nearest whole number, of one below 2^22 in size: the last place of such a sum is worth 1.
template <class V>
inline V nearest(V v) {
    constexpr float large = 3 << 22;
    return (v + large) - large;
}

// Every lane is a whole number between -127 and 127.
inline void store(int8_t *p, Vec whole) {
    const Ints numbers = __builtin_convertvector(whole, Ints);
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)numbers));
#else
    *reinterpret_cast<BytesAt *>(p) = __builtin_convertvector(numbers, BytesAt);
#endif
}

// Whole numbers and what is added to each and to all of them.
inline Vec shifted(const int32_t *p, const int32_t *by, int32_t all_by) {
    return __builtin_convertvector(*reinterpret_cast<const IntsAt *>(p) + *reinterpret_cast<const IntsAt *>(by) + all_by, Vec);
}

inline Vec load(const int8_t *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const BytesAt *>(p), Vec);
#endif
}

inline float value(int32_t x) { return float(x); }
inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

// To the nearest, ties to even. Infinities stay; NaN would need care and is refused before it comes here.
inline bf16 rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline void store_rounded(bf16 *p, Vec v) {
    const VecBits bits = (VecBits)v;
    store(p, (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Vec all(float x) { return x - Vec{}; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

inline Vec absolute(Vec a) { return a < 0 ? -a : a; }

// One bit for each lane in which a >= b.
inline uint32_t at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpge_ps(a, b));
#else
    uint32_t mask = 0;
    for (int i = 0; i < LANES; i++) mask |= uint32_t(a[i] >= b[i]) << i;
    return mask;
#endif
}

// How many of LANES unsigned numbers reach a bound.
inline int how_many_reach(const uint32_t *p, uint32_t bound) {
#if defined(__AVX512F__)
    return __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(int(bound))));
#elif defined(__AVX2__)
    const __m256i v = _mm256_loadu_si256((const __m256i *)p), b = _mm256_set1_epi32(int(bound));
    return __builtin_popcount(_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32(_mm256_max_epu32(v, b), v)));
#else
    int reached = 0;
    for (int i = 0; i < LANES; i++) reached += p[i] >= bound;
    return reached;
#endif
}

// A fixed tree, so that a sum does not depend on what the compiler finds convenient.
inline float sum(Vec v) {
#if defined(__AVX512F__)
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), upper);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    float lane[LANES];
    store(lane, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
#endif
}

// The rows that one token needs are scattered over a matrix, so no hardware foresees them: while one is worked on, the
// one after it is asked for, line by line, so that the requests never queue up in front of the loads.
constexpr int AHEAD = 4;  // entries between a row's prefetch and its use

inline void prefetch(const void *p) { __builtin_prefetch(p); }

// The dot product with a row in fp32 or bf16.
template <class T>
inline float dot(const float *a, const T *b, int64_t d, const T *next) {
    constexpr int LINE = 64 / sizeof(T);
    Vec s0{}, s1{}, s2{}, s3{};
    int64_t c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) {
        for (int i = 0; i < 4 * LANES; i += LINE) prefetch(next + c + i);
        s0 += load(a + c) * load(b + c);
        s1 += load(a + c + LANES) * load(b + c + LANES);
        s2 += load(a + c + 2 * LANES) * load(b + c + 2 * LANES);
        s3 += load(a + c + 3 * LANES) * load(b + c + 3 * LANES);
    }
    for (; c + LANES <= d; c += LANES) s0 += load(a + c) * load(b + c);
    float s = sum((s0 + s1) + (s2 + s3));
    for (; c < d; c++) s += a[c] * value(b[c]);
    return s;
}

inline float dot(const float *a, const float *b, int64_t d) { return dot(a, b, d, b); }

// How many rows are multiplied with one at a time, so that this one is read once for all of them.
constexpr int AT_ONCE = LANES == 16 ? 4 : 2;

// The dot products of a row with K others, each as `dot` gives it, bit for bit.
template <int K>
inline void dots(const float *a, const float *const *b, int64_t d, float *out) {
    Vec s[K][4]{};
    int64_t c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const Vec v = load(a + c + i * LANES);
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) s[k][i] += v * load(b[k] + c + i * LANES);
        }
    for (; c + LANES <= d; c += LANES)
        for (int k = 0; k < K; k++) s[k][0] += load(a + c) * load(b[k] + c);
    for (int k = 0; k < K; k++) {
        out[k] = sum((s[k][0] + s[k][1]) + (s[k][2] + s[k][3]));
        for (int64_t t = c; t < d; t++) out[k] += a[t] * b[k][t];
    }
}

// The dot product of two bf16 rows, summed in fp32.
inline float dot(const bf16 *a, const bf16 *b, int64_t d, [[maybe_unused]] const bf16 *next) {
    Vec s0{}, s1{};
    int64_t c = 0;
#if defined(__AVX512BF16__)
    const auto pair = [](const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); };
    for (; c + 64 <= d; c += 64) {
        prefetch(next + c);
        prefetch(next + c + 32);
        s0 = (Vec)_mm512_dpbf16_ps((__m512)s0, pair(a + c), pair(b + c));
        s1 = (Vec)_mm512_dpbf16_ps((__m512)s1, pair(a + c + 32), pair(b + c + 32));
    }
#endif
    for (; c + LANES <= d; c += LANES) s0 += load(a + c) * load(b + c);
    float s = sum(s0 + s1);
    for (; c < d; c++) s += value(a[c]) * value(b[c]);
    return s;
}

}  // namespace
