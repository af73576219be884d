// What is picked of tiles of int8 products, which fused.h makes: the largest of each row, what lies above bounds, the largest
// of groups. The bounds are those of candidates.h.
#pragma once

#include "outliers.h"
#include "picked.h"

#if defined(UW_INT8_PRODUCTS)

namespace {

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
    const int64_t *row;  // the numbers of its rows
    int64_t rows;        // how many they are
    int64_t latent, end;
    Collector &collector;

    Latents half(const Screen &s, int h) const { return Latents(s, latent + h * LANES, end); }
    Row &of(int64_t r) const { return collector.rows[row[r]]; }
};

// Call add(r, h) for the vectors of a tile, two to a row, for which hits(r, h) is not 0. All are asked before any is added
// to: some have hits, and a branch for each, which the processor can only guess, takes longer than asking.
template <class Hits, class Add>
void for_hits(int64_t rows, const Hits &hits, const Add &add) {
    uint32_t which = 0;
    for (int64_t r = 0; r < rows; r++)
        which |= uint32_t(hits(r, 0) != 0) << 2 * r | uint32_t(hits(r, 1) != 0) << (2 * r + 1);
    for (; which; which &= which - 1) add(__builtin_ctz(which) / 2, __builtin_ctz(which) % 2);
}

// For each row its k largest: while products are made, the k-th largest so far rises, and fewer and fewer reach it.
//
// Most picks would come before a row's floor is any good. So a few rows, spread over all, are looked at first, and the
// others begin at the lowest of their floors, relative to the rows' lengths. That is a part of the guess.
template <bool MAGNITUDE>
struct PickLargest {
    const Outliers &outliers;
    int64_t k, m;
    float guess;  // as for scan_topk
    const Screen &s = outliers.usual;
    struct State {
        float cut;        // what a value has to reach
        int64_t limit;    // of picks, at which the floor is looked for again
        Picked outliers;  // picked, too, but no floor is made of them

        ~State() { std::free(outliers.values); }
    };

    bool learns() const { return guess < 1 && m >= 16 * k; }
    // The lowest floor over length of the rows that are looked at first; 0 says nothing.
    float learnt(const Collector &collector, const int64_t *first, int64_t count) const {
        float lowest = INF;
        for (int64_t t = 0; t < count; t++) {
            const float reached = collector.rows[first[t]].floor / s.by_error[first[t]];
            if (reached > 0 && reached < lowest) lowest = reached;
        }
        return lowest < INF ? lowest : 0;
    }
    void begin(Picked &picked, State &state, Row &row, int64_t i, float known) const {
        if (known > 0) row.floor = 0.95f * known * s.by_error[i];
        state.cut = row.floor > -INF ? cut_for(row.floor, s, i) : -INF;
        state.limit = 2 * k + 128;
        picked.make_room(state.limit + 256);  // few rows ask for more
    }
    void look(const int32_t *products, const Place &at, Picked *picked, State *states) const {
        Latents halves[2] = {at.half(s, 0), at.half(s, 1)};
        if (const uint32_t far = outliers.from(at.latent)) look_at_outliers(products, at, halves, far, states);
        const auto values = [&](int64_t r, int h) {
            return halves[h].values(products + r * TILE_LATENTS + h * LANES, s.row_scales[at.row[r]]);
        };
        const auto hits = [&](int64_t r, int h, Vec v) {
            return at_least(sized(v, MAGNITUDE), all(states[r].cut)) & halves[h].there;
        };
        for_hits(
            at.rows, [&](int64_t r, int h) { return hits(r, h, values(r, h)); },
            [&](int64_t r, int h) {
                const Vec v = values(r, h);
                picked[r].add(v, halves[h].first, hits(r, h, v));
                if (picked[r].count <= states[r].limit) return;
                tighten(picked[r], states[r], at.of(r), at.row[r]);
                // What stays is looked at again when as much has come, so that this takes a small part of the time.
                if (2 * picked[r].count > states[r].limit || 4 * picked[r].count < states[r].limit)
                    states[r].limit = 2 * picked[r].count + 64;
                picked[r].make_room(states[r].limit);
            });
    }
    // Pick outliers that may reach the rows' floors as they are, and take them out of `halves`.
    void look_at_outliers(const int32_t *products, const Place &at, Latents *halves, uint32_t far, State *states) const {
        for (int h = 0; h < 2; h++) {
            Latents &half = halves[h];
            const uint32_t here = far >> h * LANES & half.there;
            const Vec norms = half.get(s.norms), errors = half.get(s.errors);
            half.there &= ~here;
            for (int64_t r = 0; r < at.rows && here; r++) {
                const Vec v = half.values(products + r * TILE_LATENTS + h * LANES, s.row_scales[at.row[r]]);
                const Vec slack = slacks(s, at.row[r], v, norms, errors, half.bias);
                Picked &own = states[r].outliers;
                if (own.full()) own.make_room(2 * own.count);
                own.add(v, half.first, at_least(sized(v, MAGNITUDE) + slack, all(at.of(r).floor)) & here);
            }
        }
    }
    // Raise the row's floor to where what was picked puts it.
    void tighten(Picked &picked, State &state, Row &row, int64_t i) const {
        if (picked.count < k) return;
        const float seen = picked.about_kth_largest<MAGNITUDE>(k), floor = seen - guess * s.largest_slack(i, seen);
        if (!(floor > row.floor)) return;
        row.floor = floor;
        state.cut = cut_for(floor, s, i);
        const Vec cut = all(state.cut);
        picked.keep_if([&](Vec v) { return at_least(sized(v, MAGNITUDE), cut); });
    }
    void end(Picked &picked, State &state, Row &row, int64_t i) const {
        tighten(picked, state, row, i);
        const Vec floor = all(row.floor);
        const auto move = [&](Picked &from) {
            from.move_to(
                row, [&](Vec v, __m512i j) { return slacks_of(s, i, v, j); },
                [&](Vec v, __m512i, Vec slack, uint32_t) { return at_least(sized(v, MAGNITUDE) + slack, floor); });
        };
        move(picked);
        const int64_t usual = row.count;
        move(state.outliers);
        for (int64_t c = usual; c < row.count; c++) {  // to where they belong in the order of the latents
            const Candidate now = row.at[c];
            int64_t to = c;
            for (; to > 0 && row.at[to - 1].latent > now.latent; to--) row.at[to] = row.at[to - 1];
            row.at[to] = now;
        }
    }
};

// Everything that may lie above the bound of its latent.
struct PickAbove {
    const Screen &s;
    const float *bounds;
    bool count_certain;
    struct State {};

    bool learns() const { return false; }
    float learnt(const Collector &, const int64_t *, int64_t) const { return 0; }
    void begin(Picked &picked, State &, Row &, int64_t, float) const { picked.make_room(256); }
    void look(const int32_t *products, const Place &at, Picked *picked, State *) const {
        struct Half : Latents {
            Vec norms, errors, needed, bias_slack;
        };
        const Vec rel = all(s.rel * 1.00001f), tiny = all(1e-35f);
        const auto half = [&](const Latents &l) {
            return Half{l, l.get(s.norms), l.get(s.errors), l.get(bounds), rel * absolute(l.bias) + tiny};
        };
        const Half halves[2] = {half(at.half(s, 0)), half(at.half(s, 1))};
        const auto values = [&](int64_t r, int h) {
            return halves[h].values(products + r * TILE_LATENTS + h * LANES, s.row_scales[at.row[r]]);
        };
        const auto hits = [&](int64_t r, int h, Vec v) {
            const Half &now = halves[h];
            const int64_t i = at.row[r];
            const Vec by_norm = all(s.by_norm[i] * 1.00001f), by_error = all(s.by_error[i] * 1.00001f);
            const Vec open = together(by_norm * now.norms, by_error * now.errors, s.of_smaller);
            const Vec slack = open + (rel * absolute(v) + now.bias_slack);
            return at_least(v + slack, now.needed) & now.there;
        };
        for_hits(
            at.rows, [&](int64_t r, int h) { return hits(r, h, values(r, h)); },
            [&](int64_t r, int h) {
                const Vec v = values(r, h);
                picked[r].add(v, halves[h].first, hits(r, h, v));
                if (picked[r].full()) picked[r].make_room(2 * picked[r].count);
            });
    }
    void end(Picked &picked, State &, Row &row, int64_t i) const {
        picked.move_to(
            row, [&](Vec v, __m512i j) { return count_certain ? slacks_of(s, i, v, j) : Vec{}; },
            [&](Vec v, __m512i j, Vec slack, uint32_t there) {
                if (!count_certain) return there;
                row.certain += __builtin_popcount(at_least(v - slack, of_latents(bounds, j)) & there);
                return there;
            });
    }
};

// The largest of each group of `size` neighbouring latents; `floors` has what each group of each row reaches for
// certain.
struct PickGroups {
    const Screen &s;
    int64_t size, groups;
    float *floors;
    struct State {};

    bool learns() const { return false; }
    float learnt(const Collector &, const int64_t *, int64_t) const { return 0; }
    void begin(Picked &picked, State &, Row &, int64_t, float) const { picked.make_room(4 * groups + 256); }
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
                    const int64_t i = at.row[r];
                    float &floor = floors[i * groups + g];
                    const Vec v = l.values(products + r * TILE_LATENTS + h * LANES, s.row_scales[i]);
                    const Vec open = slacks(s, i, v, norms, errors, l.bias);
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
    void end(Picked &picked, State &, Row &row, int64_t i) const {
        picked.move_to(
            row, [&](Vec v, __m512i j) { return slacks_of(s, i, v, j); },
            [&](Vec v, __m512i j, Vec slack, uint32_t) {
                alignas(64) int32_t latent[LANES];
                alignas(64) float floor[LANES];
                _mm512_store_si512(latent, j);
                for (int l = 0; l < LANES; l++) floor[l] = floors[i * groups + latent[l] / size];
                return at_least(v + slack, load(floor));
            });
    }
};

}  // namespace

#endif
