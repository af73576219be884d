// The int8 product with the scan as its last step: candidates are picked from tiles of 12 x 32 products as they are made,
// so that nothing but the candidates is ever written. The bounds are those of select.h.
#pragma once

#include "candidates.h"
#include "product.h"

#if defined(UW_INT8_PRODUCTS)

namespace {

// What has been picked of a row: fewer bytes than its candidates, and written a vector at a time.
struct Picked {
    float *values;
    int32_t *latents;
    int64_t count, room;

    // There is always room for what one tile can add, and for the rest of the last vector.
    static constexpr int64_t ADDED = TILE_LATENTS + LANES;

    void make_room(int64_t wanted) {
        if (wanted + ADDED <= room) return;
        room = wanted + ADDED;
        values = static_cast<float *>(std::realloc(values, room * sizeof(float)));
        latents = static_cast<int32_t *>(std::realloc(latents, room * sizeof(int32_t)));
    }
    bool full() const { return count + ADDED > room; }

    void add(Vec v, int64_t first, uint32_t which) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i j = _mm512_add_epi32(_mm512_set1_epi32(int32_t(first)), lanes);
        store(values + count, (Vec)_mm512_maskz_compress_ps(which, (__m512)v));
        _mm512_storeu_si512(latents + count, _mm512_maskz_compress_epi32(which, j));
        count += __builtin_popcount(which);
    }
    // Keep the picks of each vector for which wanted(values, latents) has a bit.
    template <class Wanted>
    void keep_if(const Wanted &wanted) {
        int64_t kept = 0;
        for (int64_t c = 0; c < count; c += LANES) {
            const __mmask16 there = count - c < LANES ? (1u << (count - c)) - 1 : 0xffff;
            const __m512 v = _mm512_maskz_loadu_ps(there, values + c);
            const __m512i j = _mm512_maskz_loadu_epi32(there, latents + c);
            const __mmask16 which = wanted((Vec)v, j) & there;
            store(values + kept, (Vec)_mm512_maskz_compress_ps(which, v));
            _mm512_storeu_si512(latents + kept, _mm512_maskz_compress_epi32(which, j));
            kept += __builtin_popcount(which);
        }
        count = kept;
    }
    // Make candidates of the picks.
    template <class SlackOf, class Wanted>
    void move_to(Row &row, const SlackOf &slack_of, const Wanted &wanted) {
        if (row.count + count > row.room) {
            row.room = row.count + count;
            row.at = static_cast<Candidate *>(std::realloc(row.at, row.room * sizeof(Candidate)));
        }
        for (int64_t c = 0; c < count; c++) {
            const Candidate now{values[c], slack_of(values[c], latents[c]), latents[c], SCREENED};
            if (wanted(now)) row.push(now);
        }
        count = 0;
    }
};

// 16 latents, of which the last ones may not exist.
struct Latents {
    int64_t first;
    uint32_t there;
    Vec scales, bias;

    Latents(const Screen &s, int64_t first, int64_t end) : first(first) {
        there = end - first >= LANES ? 0xffff : end > first ? (1u << (end - first)) - 1 : 0;
        scales = get(s.scales), bias = get(s.bias);
    }
    Vec get(const float *of_all) const { return (Vec)_mm512_maskz_loadu_ps(there, of_all + first); }
    Vec values(const int32_t *products, float row_scale) const {
        return ::load(products) * (all(row_scale) * scales) + bias;
    }
};

// Where a tile of products lies.
struct Place {
    int64_t row, rows;   // of the collector
    int64_t latent, end;
    Collector &collector;
    Keys &keys;

    Latents half(const Screen &s, int h) const { return Latents(s, latent + h * LANES, end); }
    Row &of(int64_t r) const { return collector.rows[row + r]; }
};

inline Vec sized(Vec v, bool magnitude) { return magnitude ? absolute(v) : v; }

// For each row its k largest: while products are made, the k-th largest so far rises, and fewer and fewer reach it.
template <bool MAGNITUDE>
struct PickLargest {
    const Screen &s;
    int64_t k;
    float guess;  // as in scan_topk
    struct State {
        float cut;      // what a value has to reach
        int64_t limit;  // of picks, at which the floor is looked for again
    };

    void begin(Picked &picked, State &state, const Row &row, int64_t i) const {
        state.cut = row.floor > -INF ? cut_for(row.floor, s, i) : -INF;
        state.limit = 2 * k + 128;
        picked.make_room(state.limit);
    }
    void look(const int32_t *products, const Place &at, Picked *picked, State *states) const {
        const Latents a = at.half(s, 0), b = at.half(s, 1);
        for (int64_t r = 0; r < at.rows; r++, products += TILE_LATENTS) {
            const Vec cut = all(states[r].cut);
            const Vec v = a.values(products, s.row_scales[at.row + r]);
            const Vec w = b.values(products + LANES, s.row_scales[at.row + r]);
            const uint32_t of_a = at_least(sized(v, MAGNITUDE), cut) & a.there;
            const uint32_t of_b = at_least(sized(w, MAGNITUDE), cut) & b.there;
            if (!(of_a | of_b)) continue;
            picked[r].add(v, a.first, of_a);
            picked[r].add(w, b.first, of_b);
            if (picked[r].count <= states[r].limit) continue;
            tighten(picked[r], states[r], at.of(r), at.row + r, at.keys);
            // What stays is looked at again when as much has come, so that this takes a small part of the time.
            if (2 * picked[r].count > states[r].limit || 4 * picked[r].count < states[r].limit)
                states[r].limit = 2 * picked[r].count + 64;
            picked[r].make_room(states[r].limit);
        }
    }
    // Raise the row's floor to where what was picked puts it.
    void tighten(Picked &picked, State &state, Row &row, int64_t i, Keys &keys) const {
        if (picked.count < k) return;
        keys.reserve(picked.count);
        for (int64_t c = 0; c < picked.count; c++) keys.at[c] = key(size_of(picked.values[c], MAGNITUDE));
        keys.count = picked.count;
        const uint32_t found = keys.kth_largest(k, 20);
        if (!found) return;
        const float seen = of_key(found), slack = s.largest_slack(i, seen);
        const float floor = seen - (guess > 0 ? guess * slack + 1.1f * s.largest_finer_slack(i, seen) : slack);
        if (!(floor > row.floor)) return;
        row.floor = floor;
        state.cut = cut_for(floor, s, i);
        const Vec cut = all(state.cut);
        picked.keep_if([&](Vec v, __m512i) { return at_least(sized(v, MAGNITUDE), cut); });
    }
    void end(Picked &picked, State &state, Row &row, int64_t i, Keys &keys) const {
        tighten(picked, state, row, i, keys);
        picked.move_to(row, [&](float v, int32_t j) { return s.slack(i, j, v); },
                       [&](const Candidate &c) { return size_of(c.value, MAGNITUDE) + c.slack >= row.floor; });
    }
};

// Everything that may lie above the bound of its latent.
struct PickAbove {
    const Screen &s;
    const float *bounds;
    bool count_certain;
    struct State {};

    void begin(Picked &picked, State &, const Row &, int64_t) const { picked.make_room(256); }
    void look(const int32_t *products, const Place &at, Picked *picked, State *) const {
        struct Half : Latents {
            Vec norms, errors, needed, bias_slack;
        };
        const Vec rel = all(s.rel * 1.00001f), tiny = all(1e-35f);
        const auto half = [&](const Latents &l) {
            return Half{l, l.get(s.norms), l.get(s.errors), l.get(bounds), rel * absolute(l.bias) + tiny};
        };
        const Half halves[2] = {half(at.half(s, 0)), half(at.half(s, 1))};
        for (int64_t r = 0; r < at.rows; r++, products += TILE_LATENTS) {
            const int64_t i = at.row + r;
            const Vec by_norm = all(s.by_norm[i] * 1.00001f), by_error = all(s.by_error[i] * 1.00001f);
            for (int h = 0; h < 2; h++) {
                const Half &now = halves[h];
                const Vec v = now.values(products + h * LANES, s.row_scales[i]);
                const Vec slack = by_norm * now.norms + by_error * now.errors + (rel * absolute(v) + now.bias_slack);
                const uint32_t hits = at_least(v + slack, now.needed) & now.there;
                if (hits) picked[r].add(v, now.first, hits);
            }
            if (picked[r].full()) picked[r].make_room(2 * picked[r].count);
        }
    }
    void end(Picked &picked, State &, Row &row, int64_t i, Keys &) const {
        picked.move_to(row, [](float, int32_t) { return 0.0f; },
                       [&](const Candidate &c) {
                           if (count_certain)
                               row.certain += c.value - s.slack(i, c.latent, c.value) >= bounds[c.latent];
                           return true;
                       });
    }
};

// The largest of each group of `size` neighbouring latents; `floors` has what each group of each row reaches for certain.
struct PickGroups {
    const Screen &s;
    int64_t size, groups;
    float *floors;
    struct State {};

    Vec slack(int64_t i, Vec v, Vec norms, Vec errors, Vec bias) const {
        const Vec rounding = all(s.rel) * (absolute(v) + absolute(bias));
        return (all(s.by_norm[i]) * norms + all(s.by_error[i]) * errors + rounding) * 1.00001f + 1e-35f;
    }
    void begin(Picked &picked, State &, const Row &, int64_t) const { picked.make_room(4 * groups + 256); }
    void look(const int32_t *products, const Place &at, Picked *picked, State *) const {
        for (int h = 0; h < 2; h++) {
            const Latents l = at.half(s, h);
            const int64_t end = l.first + __builtin_popcount(l.there);
            const Vec norms = l.get(s.norms), errors = l.get(s.errors);
            for (int64_t from = l.first, to; from < end; from = to) {
                const int64_t g = from / size;
                to = (g + 1) * size < end ? (g + 1) * size : end;
                const uint32_t own = (1u << (to - l.first)) - (1u << (from - l.first));
                for (int64_t r = 0; r < at.rows; r++) {
                    const int64_t i = at.row + r;
                    float &floor = floors[i * groups + g];
                    const Vec v = l.values(products + r * TILE_LATENTS + h * LANES, s.row_scales[i]);
                    const Vec open = slack(i, v, norms, errors, l.bias);
                    if (!(at_least(v + open, all(floor)) & own)) continue;
                    const float certain = _mm512_mask_reduce_max_ps(own, (__m512)(v - open));
                    if (certain > floor) floor = certain;
                    picked[r].add(v, l.first, at_least(v + open, all(floor)) & own);
                }
            }
        }
        for (int64_t r = 0; r < at.rows; r++)
            if (picked[r].full()) picked[r].make_room(2 * picked[r].count);
    }
    void end(Picked &picked, State &, Row &row, int64_t i, Keys &) const {
        picked.move_to(row, [&](float v, int32_t j) { return s.slack(i, j, v); },
                       [&](const Candidate &c) { return c.value + c.slack >= floors[i * groups + c.latent / size]; });
    }
};

// Make the products of all rows with `width` latents from `first` on, and let `pick` look at each.
//
// A thread has its own rows, so that candidates come in the order of their latents and no row is shared. It packs 32
// latents, which then stay in the first level of the cache, and sends its rows past them.
template <class Pick>
void pick_candidates(Collector &collector, int64_t first, int64_t width, int64_t d, const Screen &s, const Pick &pick) {
    constexpr int64_t BYTES = 1 << 19;  // of a part's rows, which are to stay in the second level of the cache
    const int64_t end = first + width;
    int64_t most = BYTES / d / TILE_ROWS * TILE_ROWS;
    most = most < 4 * TILE_ROWS ? 4 * TILE_ROWS : most;
#pragma omp parallel
    {
#if defined(_OPENMP)
        const int64_t threads = omp_get_num_threads();
#else
        const int64_t threads = 1;
#endif
        // As few parts as there may be, as many as keep all threads busy.
        const int64_t rounds = (collector.n + threads * most - 1) / (threads * most);
        const int64_t rows = tile_rows((collector.n + threads * rounds - 1) / (threads * rounds)) * TILE_ROWS;
        int32_t *latents = aligned<int32_t>(TILE_LATENTS * fours(d));
        Picked *picked = new Picked[rows]();
        typename Pick::State *states = new typename Pick::State[rows];
        Keys keys{};
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < collector.n; start += rows) {
            const int64_t n = collector.n - start < rows ? collector.n - start : rows;
            const PackedRows packed(s.row_bytes + start * d, n, d);
            for (int64_t i = 0; i < n; i++) pick.begin(picked[i], states[i], collector.rows[start + i], start + i);
            for (int64_t at = first; at < end; at += TILE_LATENTS) {
                pack_latents(s.bytes + at * d, end - at < TILE_LATENTS ? end - at : TILE_LATENTS, d, latents);
                const int8_t *next = s.bytes + (at + TILE_LATENTS) * d, *last = next + TILE_LATENTS * d;
                last = last < s.bytes + end * d ? last : s.bytes + end * d;
                for (int64_t i = 0; i < n; i += TILE_ROWS) {
                    for (int64_t l = 0; l < d * TILE_LATENTS; l += 64 * 43)
                        if (next < last) _mm_prefetch(next, _MM_HINT_T1), next += 64;
                    alignas(64) int32_t products[TILE_ROWS * TILE_LATENTS];
                    multiply(packed.at + i / TILE_ROWS * packed.stride, latents, fours(d), products);
                    const Place place{start + i, n - i < TILE_ROWS ? n - i : TILE_ROWS, at, end, collector, keys};
                    pick.look(products, place, picked + i, states + i);
                }
            }
            for (int64_t i = 0; i < n; i++) pick.end(picked[i], states[i], collector.rows[start + i], start + i, keys);
        }
        for (int64_t i = 0; i < rows; i++) std::free(picked[i].values), std::free(picked[i].latents);
        std::free(keys.at);
        std::free(latents);
        delete[] states;
        delete[] picked;
    }
}

}  // namespace

#endif
