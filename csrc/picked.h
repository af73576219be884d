// What a row's picks are held in between the products they come from (fused.h) and the candidates that they become.
#pragma once

#include "candidates.h"
#include "product.h"

#if defined(UW_INT8_PRODUCTS)

namespace {

inline Vec sized(Vec v, bool magnitude) { return magnitude ? absolute(v) : v; }

// What has been picked of a row: fewer bytes than its candidates, and written a vector at a time.
struct Picked {
    float *values;
    int32_t *latents;  // in the same allocation
    int64_t count, room;

    // There is always room for what one tile can add, and for a vector after it.
    static constexpr int64_t ADDED = TILE_LATENTS + LANES;

    void make_room(int64_t wanted) {
        if (wanted + ADDED <= room) return;
        room = wanted + ADDED;
        float *wider = static_cast<float *>(std::malloc(2 * room * sizeof(float)));
        if (count) {
            std::memcpy(wider, values, count * sizeof(float));
            std::memcpy(wider + room, latents, count * sizeof(int32_t));
        }
        std::free(values);
        values = wider, latents = reinterpret_cast<int32_t *>(wider + room);
    }
    bool full() const { return count + ADDED > room; }

    void add(Vec v, int64_t first, uint32_t which) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i j = _mm512_add_epi32(_mm512_set1_epi32(int32_t(first)), lanes);
        store(values + count, (Vec)_mm512_maskz_compress_ps(which, (__m512)v));
        _mm512_storeu_si512(latents + count, _mm512_maskz_compress_epi32(which, j));
        count += __builtin_popcount(which);
    }
    // One bit for each of the LANES picks from c on that there are.
    __mmask16 there(int64_t c) const { return count - c < LANES ? (1u << (count - c)) - 1 : 0xffff; }

    // Keep the picks of each vector for which wanted(values) has a bit.
    template <class Wanted>
    void keep_if(const Wanted &wanted) {
        int64_t kept = 0;
        for (int64_t c = 0; c < count; c += LANES) {
            const __m512 v = _mm512_maskz_loadu_ps(there(c), values + c);
            const __m512i j = _mm512_maskz_loadu_epi32(there(c), latents + c);
            const __mmask16 which = wanted((Vec)v) & there(c);
            store(values + kept, (Vec)_mm512_maskz_compress_ps(which, v));
            _mm512_storeu_si512(latents + kept, _mm512_maskz_compress_epi32(which, j));
            kept += __builtin_popcount(which);
        }
        count = kept;
    }
    // At most the k-th largest of the values, and seldom much less: what lies between the smallest and the largest is
    // halved until exactly k reach it, or nine times; more often where a few values lie far above the others.
    template <bool MAGNITUDE>
    float about_kth_largest(int64_t k) {
        store(values + count, all(MAGNITUDE ? 0 : -INF));  // no bound above the least counts these
        const auto at = [&](int64_t c) { return sized(load(values + c), MAGNITUDE); };
        Vec least = all(INF), most = at(0);
        for (int64_t c = 0; c < count; c += LANES) {
            most = larger(most, at(c));
            least = (Vec)_mm512_mask_min_ps((__m512)least, there(c), (__m512)least, (__m512)at(c));
        }
        float low = _mm512_reduce_min_ps((__m512)least), high = _mm512_reduce_max_ps((__m512)most);
        int64_t left = count;
        for (int i = 0; i < 9 || (i < 32 && left > 2 * k); i++) {
            const float middle = low + (high - low) / 2;
            const Vec bound = all(middle);
            int64_t reach = 0;
            for (int64_t c = 0; c < count; c += LANES)
                reach += __builtin_popcount(at_least(at(c), bound));
            (reach < k ? high : low) = middle;
            if (reach >= k) left = reach;
            if (reach == k) break;
        }
        return low;
    }
    // Make candidates of the picks for which wanted(values, latents, slacks, which of 16 there are) has a bit.
    template <class Slacks, class Wanted>
    void move_to(Row &row, const Slacks &slacks, const Wanted &wanted) {
        if (row.count + count > row.room) {
            row.room = row.count + count;
            row.at = static_cast<Candidate *>(std::realloc(row.at, row.room * sizeof(Candidate)));
        }
        for (int64_t c = 0; c < count; c += LANES) {
            const Vec v = (Vec)_mm512_maskz_loadu_ps(there(c), values + c);
            const __m512i j = _mm512_maskz_loadu_epi32(there(c), latents + c);
            const Vec slack = slacks(v, j);
            const uint32_t which = wanted(v, j, slack, there(c)) & there(c);
            alignas(64) float of[LANES], open[LANES];
            alignas(64) int32_t latent[LANES];
            store(of, (Vec)_mm512_maskz_compress_ps(which, (__m512)v));
            store(open, (Vec)_mm512_maskz_compress_ps(which, (__m512)slack));
            _mm512_store_si512(latent, _mm512_maskz_compress_epi32(which, j));
            for (int l = 0; l < __builtin_popcount(which); l++)
                row.at[row.count++] = {of[l], open[l], latent[l], false};
        }
        count = 0;
    }
};

// Screen::slack of 16 values of a row.
inline Vec slacks(const Screen &s, int64_t row, Vec v, Vec norms, Vec errors, Vec bias) {
    const Vec rounding = all(s.rel) * (absolute(v) + absolute(bias));
    const Vec open = together(all(s.by_norm[row]) * norms, all(s.by_error[row]) * errors, s.of_smaller);
    return (open + rounding) * 1.00001f + 1e-35f;
}

inline Vec of_latents(const float *of_all, __m512i j) { return (Vec)_mm512_i32gather_ps(j, of_all, 4); }

inline Vec slacks_of(const Screen &s, int64_t row, Vec v, __m512i j) {
    return slacks(s, row, v, of_latents(s.norms, j), of_latents(s.errors, j), of_latents(s.bias, j));
}

}  // namespace

#endif
