// Selection from tiles of screened pre-activations: what may belong to it becomes a candidate, and the candidates are
// then settled (settle.h).
#pragma once

#include "settle.h"

namespace {

// A row of a tile of products, seen as pre-activations.
template <class T>
struct Products {
    const T *p;
    const float *bias, *scales;  // of the tile's latents
    const int32_t *shifts;
    float row_scale;
    int32_t row_shift;

    Products(const T *tile, int64_t row, int64_t width, int64_t first, const Screen &s)
        : p(tile + row * width), bias(s.bias + first) {
        if constexpr (std::is_same_v<T, int32_t>) {
            scales = s.scales + first, shifts = s.shifts + first;
            row_scale = s.row_scales[row], row_shift = s.row_shifts[row];
        }
    }
    Vec load(int64_t c) const {
        if constexpr (std::is_same_v<T, int32_t>)
            return shifted(p + c, shifts + c, row_shift) * (all(row_scale) * ::load(scales + c)) + ::load(bias + c);
        else
            return ::load(p + c) + ::load(bias + c);
    }
    float at(int64_t c) const {
        if constexpr (std::is_same_v<T, int32_t>)
            return float(p[c] + shifts[c] + row_shift) * (row_scale * scales[c]) + bias[c];
        else
            return value(p[c]) + bias[c];
    }
};

constexpr int MAX_LANES = 4096;

// A lower bound of the k-th largest value: the k-th largest among the maxima of strided lanes.
template <bool MAGNITUDE, class T>
float bound_by_lanes(const Products<T> &p, int64_t width, int64_t k, Keys &keys) {
    int64_t lanes = 2 * LANES;
    while (lanes < 8 * k && lanes < MAX_LANES) lanes *= 2;
    if (lanes * 4 > width || k > lanes) return -INF;
    const auto sized = [](Vec v) { return MAGNITUDE ? absolute(v) : v; };
    alignas(64) float maxima[MAX_LANES];
    for (int64_t c = 0; c < lanes; c += LANES) store(maxima + c, sized(p.load(c)));
    for (int64_t start = lanes; start + lanes <= width; start += lanes)
        for (int64_t c = 0; c < lanes; c += LANES)
            store(maxima + c, larger(load(maxima + c), sized(p.load(start + c))));
    keys.reserve(lanes);
    for (int64_t c = 0; c < lanes; c++) keys.at[c] = key(maxima[c]);
    keys.count = lanes;
    const uint32_t found = keys.kth_largest(k, 20);
    return found ? of_key(found) : -INF;
}

// Look at a tile (n, width) of screened products, whose first latent is `first`, for each row's k largest.
//
// A row's floor is where its screened values put it, less a share of the slack. Only with all of it, a `guess` of 1, is it
// certain to be low enough; but the slack is seldom used up, and far fewer reach a higher one. `finish_topk` finds out
// whether the guess was right.
template <bool MAGNITUDE, class T>
void scan_topk(Collector &collector, const T *tile, int64_t width, int64_t first, const Screen &s, int64_t k,
               float guess) {
    for_rows(collector, [&](Row &row, int64_t i, Keys &keys) {
        const Products<T> p(tile, i, width, first, s);
        const float seen = bound_by_lanes<MAGNITUDE>(p, width, k, keys);
        if (seen > -INF) {
            const float floor = seen - guess * s.largest_slack(i, seen);
            if (floor > row.floor) row.floor = floor;
        }
        const float cut = row.floor > -INF ? cut_for(row.floor, s, i) : -INF;
        const Vec bound = all(cut);
        Vec odd{};
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            const Vec v = p.load(c);
            odd += v - v;  // 0, or NaN where v is not finite
            for (uint32_t hits = at_least(MAGNITUDE ? absolute(v) : v, bound); hits; hits &= hits - 1) {
                const int64_t j = c + __builtin_ctz(hits);
                const float x = p.at(j), slack = s.slack(i, first + j, x);
                if (size_of(x, MAGNITUDE) + slack >= row.floor) row.push({x, slack, int32_t(first + j), false});
            }
        }
        float odd_rest = sum(odd);
        for (; c < width; c++) {
            const float x = p.at(c);
            odd_rest += x - x;
            if (size_of(x, MAGNITUDE) >= cut) row.push({x, s.slack(i, first + c, x), int32_t(first + c), false});
        }
        if (odd_rest != 0) row.finite = false;
        if (guess == 1 && row.count > 4 * k + 256) prune(row, k, MAGNITUDE, keys);
    });
}

// Compute again in fp32 every candidate that may be among the k largest, and write these, in the order of their latents;
// among equal values the lowest latents win. Nothing is written of rows whose guessed floors turn out to be too high.
inline void finish_topk(Collector &collector, const float *x, const float *weight, const Screen &s, int64_t m,
                           int64_t d, int64_t k, bool magnitude, bool guess, int64_t *indices, float *values) {
    const auto exact = [](const Candidate &c) { return c.exact; };
    const auto any = [](const Candidate &) { return true; };
    if (guess) compute_all_exactly(collector, x, weight, m, d, s);
    for_rows(collector, [&](Row &row, int64_t i, Keys &keys) {
        if (!guess) {
            prune(row, k, magnitude, keys);
            // First the k that look largest: they rule out most of the others.
            const float likely = of_key(kth_candidate(row, k, magnitude, false, keys, any));
            compute_exactly(row, i, x, weight, d, s, keys,
                            [&](const Candidate &c) { return size_of(c.value, magnitude) >= likely; });
            const float certain = of_key(kth_candidate(row, k, magnitude, false, keys, exact));
            compute_exactly(row, i, x, weight, d, s, keys,
                            [&](const Candidate &c) { return size_of(c.value, magnitude) + c.slack >= certain; });
        }
        const uint32_t last = kth_candidate(row, k, magnitude, false, keys, exact);
        if (guess && (row.count < k || of_key(last) < row.floor)) return;
        int64_t ties = k;
        for (int64_t c = 0; c < keys.count; c++) ties -= keys.at[c] > last;
        // Whether the next one is taken would often be guessed wrong, so each is written down.
        for (int64_t c = 0, out = i * k; c < row.count && out < (i + 1) * k; c++) {
            const Candidate now = row.at[c];
            const uint32_t own = key(size_of(now.value, magnitude));
            const bool tied = exact(now) & (own == last);
            indices[out] = now.latent;
            values[out] = now.value;
            out += (exact(now) & (own > last)) | (tied & (ties > 0));
            ties -= tied;
        }
    });
}

// Look at a tile for everything that may lie above the bound of its latent.
template <class T>
void scan_above(Collector &collector, const T *tile, int64_t width, int64_t first, const Screen &s,
                const float *bounds) {
    const float *bias = s.bias + first, *norms = s.norms + first, *errors = s.errors + first, *bound = bounds + first;
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t i = 0; i < collector.n; i++) {
        Row &row = collector.rows[i];
        const Products<T> p(tile, i, width, first, s);
        const Vec by_norm = all(s.by_norm[i] * 1.00001f), by_error = all(s.by_error[i] * 1.00001f);
        const Vec rel = all(s.rel * 1.00001f), tiny = all(1e-35f);
        Vec odd{};
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            const Vec v = p.load(c);
            odd += v - v;
            const Vec open = together(by_norm * load(norms + c), by_error * load(errors + c), s.of_smaller);
            const Vec slack = open + rel * (absolute(v) + absolute(load(bias + c))) + tiny;
            row.certain += __builtin_popcount(at_least(v - slack, load(bound + c)));
            for (uint32_t hits = at_least(v + slack, load(bound + c)); hits; hits &= hits - 1) {
                const int64_t j = c + __builtin_ctz(hits);
                row.push({p.at(j), 0, int32_t(first + j), false});
            }
        }
        float odd_rest = sum(odd);
        for (; c < width; c++) {
            const float v = p.at(c);
            odd_rest += v - v;
            row.certain += v - s.slack(i, first + c, v) >= bound[c];
            if (v + s.slack(i, first + c, v) >= bound[c]) row.push({v, 0, int32_t(first + c), false});
        }
        if (odd_rest != 0) row.finite = false;
    }
}

// Compute the candidates again in fp32 and keep those strictly above their bound; says how many each row keeps.
inline void finish_above(Collector &collector, const float *x, const float *weight, const Screen &s, int64_t m,
                         int64_t d, const float *bounds, int64_t *counts) {
    compute_all_exactly(collector, x, weight, m, d, s);
    for (int64_t i = 0; i < collector.n; i++) counts[i] = 0;
    for_rows(collector, [&](Row &row, int64_t i, Keys &) {
        keep_if(row, [&](const Candidate &c) { return c.value > bounds[c.latent]; });
        counts[i] = row.count;
    });
}

// Look at a tile for the largest pre-activation of each group of `size` neighbouring latents; tiles hold whole groups.
template <class T>
void scan_groups(Collector &collector, const T *tile, int64_t width, int64_t first, const Screen &s, int64_t size) {
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t i = 0; i < collector.n; i++) {
        const Products<T> p(tile, i, width, first, s);
        for (int64_t start = 0; start + size <= width; start += size) {
            float floor = -INF;
            for (int64_t c = start; c < start + size; c++) {
                const float v = p.at(c);
                if (v - v != 0) collector.rows[i].finite = false;
                if (v > floor) {
                    const float certain = v - s.slack(i, first + c, v);
                    if (certain > floor) floor = certain;
                }
            }
            for (int64_t c = start; c < start + size; c++) {
                const float v = p.at(c), slack = s.slack(i, first + c, v);
                if (v + slack >= floor) collector.rows[i].push({v, slack, int32_t(first + c), false});
            }
        }
    }
}

// The winner of each group, computed in fp32; among equal values the lowest latent.
inline void finish_groups(Collector &collector, const float *x, const float *weight, const Screen &s, int64_t d,
                          int64_t groups, int64_t size, int64_t *indices, float *values) {
    for_rows(collector, [&](Row &row, int64_t i, Keys &keys) {
        compute_exactly(row, i, x, weight, d, s, keys, [](const Candidate &) { return true; });
        float *best = values + i * groups;
        for (int64_t g = 0; g < groups; g++) {
            best[g] = -INF;
            indices[i * groups + g] = g * size;
        }
        for (int64_t c = 0; c < row.count; c++) {
            const int64_t g = row.at[c].latent / size;
            if (row.at[c].value > best[g]) {
                best[g] = row.at[c].value;
                indices[i * groups + g] = row.at[c].latent;
            }
        }
    });
}

}  // namespace
