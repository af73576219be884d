// Products of int8 rows, a small tile at a time: what has become of a tile is looked at before the next one is made, so
// it never leaves the first level of the cache.
//
// The instruction multiplies unsigned bytes with signed ones. Latents are taken with 128 added, and the rows' sums begin
// at -128 times their total; both are exact, as is the sum modulo 2^32 whatever it reaches on the way.
#pragma once

#include <cstdlib>

#include "vectors.h"

#if defined(__AVX512VNNI__)
#define UW_INT8_PRODUCTS

namespace {

// 24 sums, two vectors of latents and a few rows' numbers fill the 32 registers.
constexpr int TILE_ROWS = 12, TILE_LATENTS = 2 * LANES;

inline int64_t fours(int64_t d) { return (d + 3) / 4; }
inline int64_t tile_rows(int64_t n) { return (n + TILE_ROWS - 1) / TILE_ROWS; }

template <class T>
T *aligned(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return static_cast<T *>(std::aligned_alloc(64, bytes));
}

// Some rows as a tile takes them: of TILE_ROWS rows first what their sums begin at, `shifts` among it, then four bytes of each,
// the next four of each, and so on. What is missing in the last tile is 0.
struct PackedRows {
    int64_t n, stride;
    int32_t *at;

    PackedRows(const int8_t *bytes, const int32_t *shifts, const int64_t *which, int64_t n, int64_t d)
        : n(n), stride(TILE_ROWS * (fours(d) + 1)), at(aligned<int32_t>(tile_rows(n) * stride)) {
        std::memset(at, 0, tile_rows(n) * stride * sizeof(int32_t));
        for (int64_t i = 0; i < n; i++) {
            int32_t *to = at + i / TILE_ROWS * stride + i % TILE_ROWS;
            const int8_t *row = bytes + which[i] * d;
            int32_t total = 0;
            for (int64_t c = 0; c < d; c++) total += row[c];
            *to = shifts[which[i]] - 128 * total;
            for (int64_t c = 0; c < d; c += 4) std::memcpy(to += TILE_ROWS, row + c, d - c < 4 ? d - c : 4);
        }
    }
    ~PackedRows() { std::free(at); }
    PackedRows(const PackedRows &) = delete;
};

// Exchange rows and columns of 16 x 16 numbers of 32 bits.
inline void transpose_16(__m512i r[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            b[i + 2 * h] = _mm512_unpacklo_epi64(a[i + h], a[i + h + 2]);
            b[i + 2 * h + 1] = _mm512_unpackhi_epi64(a[i + h], a[i + h + 2]);
        }
    // Quarter q of b[4 i + j] is column 4 q + j of rows 4 i to 4 i + 3.
    for (int j = 0; j < 4; j++) {
        const __m512i even0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i even1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i odd1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
}

// Up to TILE_LATENTS latents as a tile takes them: four bytes of each, the next four of each, and so on.
inline void pack_latents(const int8_t *bytes, int64_t count, int64_t d, int32_t *into) {
    const __m512i sign = _mm512_set1_epi8(-128);
    for (int64_t c = 0; c < d; c += 64) {
        const __mmask64 there = d - c < 64 ? (1ull << (d - c)) - 1 : ~0ull;
        const int64_t words = fours(d - c < 64 ? d - c : 64);
        for (int h = 0; h < 2; h++) {
            __m512i r[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t j = h * LANES + i;
                const __m512i row = j < count ? _mm512_maskz_loadu_epi8(there, bytes + j * d + c) : _mm512_setzero_si512();
                r[i] = _mm512_xor_si512(row, sign);
            }
            transpose_16(r);
            for (int64_t w = 0; w < words; w++)
                _mm512_store_si512(into + (c / 4 + w) * TILE_LATENTS + h * LANES, r[w]);
        }
    }
}

// `width` latents from `first` on as tiles take them, one tile after the other.
struct PackedLatents {
    int64_t first, width, d;
    int32_t *at;  // room for them all, which is not this struct's

    int64_t end() const { return first + width; }
    int64_t tiles() const { return (width + TILE_LATENTS - 1) / TILE_LATENTS; }
    int64_t tile_size() const { return TILE_LATENTS * fours(d); }
    int64_t latent(int64_t tile) const { return first + tile * TILE_LATENTS; }
    int64_t count(int64_t tile) const {
        return end() - latent(tile) < TILE_LATENTS ? end() - latent(tile) : TILE_LATENTS;
    }
    int32_t *tile(int64_t tile) const { return at + tile * tile_size(); }
    void pack(const int8_t *bytes, int64_t t) const { pack_latents(bytes + latent(t) * d, count(t), d, tile(t)); }
};

// out[TILE_ROWS][TILE_LATENTS] = the products of packed rows and packed latents, and the latents' shifts.
inline void multiply(const int32_t *rows, const int32_t *latents, const int32_t *shifts, int64_t fours, int32_t *out) {
    __m512i sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
            sums[r][h] = _mm512_add_epi32(_mm512_set1_epi32(rows[r]), _mm512_load_si512(shifts + h * LANES));
    for (int64_t c = 0; c < fours; c++) {
        rows += TILE_ROWS;
        const __m512i w0 = _mm512_load_si512(latents), w1 = _mm512_load_si512(latents + LANES);
        latents += TILE_LATENTS;
#pragma GCC unroll 12
        for (int r = 0; r < TILE_ROWS; r++) {
            const __m512i x = _mm512_set1_epi32(rows[r]);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, x);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, x);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++) {
        _mm512_store_si512(out + r * TILE_LATENTS, sums[r][0]);
        _mm512_store_si512(out + r * TILE_LATENTS + LANES, sums[r][1]);
    }
}

}  // namespace

#endif
