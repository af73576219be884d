// The int8 product with the scan as its last step: candidates are picked from tiles of 12 x 32 products as they are
// made, so that nothing but the candidates is ever written.
#pragma once

#include "picking.h"

#if defined(UW_INT8_PRODUCTS)

namespace {

// The numbers from 0 to n - 1: first `some` of them, spread over all, then the others.
inline void spread_first(int64_t *order, int64_t n, int64_t some) {
    int64_t early = 0, late = some;
    for (int64_t i = 0; i < n; i++) {
        const bool now = early < some && i == early * n / some;
        order[now ? early++ : late++] = i;
    }
}

// Make the products of all rows with some latents, and let `pick` look at each.
//
// A thread has its own rows, so that candidates come in the order of their latents and no row is shared. 32 packed
// latents stay in the first level of the cache while it sends its rows past them.
template <class Pick>
void pick_candidates(Collector &collector, const PackedLatents &latents, const Screen &s, const Pick &pick) {
    constexpr int64_t BYTES = 1 << 19;  // of a part's rows, which are to stay in the second level of the cache
    const int64_t d = latents.d, tiles = latents.tiles();
    int64_t most = BYTES / d / TILE_ROWS * TILE_ROWS;
    most = most < 4 * TILE_ROWS ? 4 * TILE_ROWS : most;
#if defined(_OPENMP)
    const int64_t threads = omp_get_max_threads();
#else
    const int64_t threads = 1;
#endif
    // What is learnt of a few rows has to be worth their own, shorter parts.
    const int64_t few = TILE_ROWS * (threads < 16 ? 16 / threads : 1);
    const int64_t early = pick.learns() && collector.n >= 8 * few * threads ? few * threads : 0;
    int64_t *order = new int64_t[collector.n];
    spread_first(order, collector.n, early);
    // As few parts as there may be, as many as keep all threads busy.
    const int64_t late = collector.n - early, rounds = (late + threads * most - 1) / (threads * most);
    const int64_t rows = tile_rows((late + threads * rounds - 1) / (threads * rounds)) * TILE_ROWS;
    float known = 0;
#pragma omp parallel
    {
        const int64_t room = rows > few ? rows : few;
        Picked *picked = new Picked[room]();
        typename Pick::State *states = new typename Pick::State[room]();
        const auto pick_from = [&](const int64_t *row, int64_t n) {
            const PackedRows packed(s.row_bytes, s.row_shifts, row, n, d);
            for (int64_t i = 0; i < n; i++) pick.begin(picked[i], states[i], collector.rows[row[i]], row[i], known);
            for (int64_t t = 0; t < tiles; t++) {
                alignas(64) int32_t shifts[TILE_LATENTS] = {};
                std::memcpy(shifts, s.shifts + latents.latent(t), latents.count(t) * sizeof(int32_t));
                const int32_t *next = latents.tile(t + 1), *last = t + 1 < tiles ? next + latents.tile_size() : next;
                for (int64_t i = 0; i < n; i += TILE_ROWS) {
                    for (int64_t l = 0; l < latents.tile_size(); l += LANES * 43)
                        if (next < last) _mm_prefetch(next, _MM_HINT_T1), next += LANES;
                    alignas(64) int32_t products[TILE_ROWS * TILE_LATENTS];
                    multiply(packed.at + i / TILE_ROWS * packed.stride, latents.tile(t), shifts, fours(d), products);
                    const int64_t there = n - i < TILE_ROWS ? n - i : TILE_ROWS;
                    const Place place{row + i, there, latents.latent(t), latents.end(), collector};
                    pick.look(products, place, picked + i, states + i);
                }
            }
            for (int64_t i = 0; i < n; i++) pick.end(picked[i], states[i], collector.rows[row[i]], row[i]);
        };
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) latents.pack(s.bytes, t);
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < early; start += few) pick_from(order + start, few);
#pragma omp single
        known = pick.learnt(collector, order, early);
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = early; start < collector.n; start += rows)
            pick_from(order + start, collector.n - start < rows ? collector.n - start : rows);
        for (int64_t i = 0; i < room; i++) std::free(picked[i].values);
        delete[] states;
        delete[] picked;
    }
    delete[] order;
}

}  // namespace

#endif
