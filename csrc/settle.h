// How candidates are computed again, in fp32, so that a selection can be made among them (candidates.h).
#pragma once

#include "candidates.h"

namespace {

// Compute wanted candidates of a row exactly.
template <class Wanted>
void compute_exactly(Row &row, int64_t i, const float *x, const float *weight, int64_t d, const Screen &s, Keys &todo,
                     const Wanted &wanted) {
    todo.reserve(row.count);
    for (int64_t c = 0; c < row.count; c++) {
        todo.at[todo.count] = c;
        todo.count += (!row.at[c].exact) & bool(wanted(row.at[c]));
    }
    for (int64_t t = 0; t < todo.count; t++) {
        Candidate &now = row.at[todo.at[t]];
        const int64_t later = row.at[todo.at[t + AHEAD < todo.count ? t + AHEAD : t]].latent;
        now.value = dot(x + i * d, weight + now.latent * d, d, weight + later * d) + s.bias[now.latent];
        now.slack = 0;
        now.exact = true;
    }
}

// How many rows of a matrix a block has, which is to stay in the second level of the cache.
inline int64_t fitting_rows(int64_t bytes) { return bytes < (512 << 10) ? (512 << 10) / bytes : 1; }

// For every row and block of latents, on any thread: act(the row's number, its candidates in the block, how many). The
// latents' rows, of `bytes` each, stay in cache while all the rows of x that want them come by; before that begin(latent)
// is called for each of them, and fetch(row) for a row of x that comes soon.
template <class Begin, class Fetch, class Act>
void for_blocks(Collector &collector, int64_t m, int64_t bytes, const Begin &begin, const Fetch &fetch, const Act &act) {
#if defined(_OPENMP)
    const int64_t parts = 4 * omp_get_max_threads();
#else
    const int64_t parts = 1;
#endif
    const int64_t fitting = fitting_rows(bytes), width = m / parts + 1 < fitting ? m / parts + 1 : fitting;
    const int64_t blocks = (m + width - 1) / width;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = blocks * part / parts * width, last = blocks * (part + 1) / parts * width;
        if (first == last) continue;
        int64_t *from = new int64_t[collector.n];
        for (int64_t i = 0; i < collector.n; i++) {
            const Row &row = collector.rows[i];
            int64_t low = 0, high = row.count;
            while (low < high) {
                const int64_t mid = (low + high) / 2;
                if (row.at[mid].latent < first)
                    low = mid + 1;
                else
                    high = mid;
            }
            from[i] = low;
        }
        for (int64_t start = first; start < last && start < m; start += width) {
            const int64_t end = start + width < m ? start + width : m;
            for (int64_t j = start; j < end; j++) begin(j);
            const auto wanted = [&](int64_t i) {
                return from[i] < collector.rows[i].count && collector.rows[i].at[from[i]].latent < end;
            };
            for (int64_t i = 0; i < collector.n; i++) {
                if (i + 4 < collector.n) {
                    const Candidate *soon = collector.rows[i + 4].at + from[i + 4];
                    prefetch(soon), prefetch(soon + 4);
                }
                if (i + 1 < collector.n && wanted(i + 1)) fetch(i + 1);
                const int64_t here = from[i];
                while (wanted(i)) from[i]++;
                if (from[i] > here) act(i, collector.rows[i].at + here, from[i] - here);
            }
        }
        delete[] from;
    }
}

inline int64_t how_many(const Collector &collector) {
    int64_t total = 0;
    for (int64_t i = 0; i < collector.n; i++) total += collector.rows[i].count;
    return total;
}

// Call act<K>(the first of K neighbours) for all of them, as many at once as there are.
template <class Act>
void for_groups(Candidate *at, int64_t count, const Act &act) {
    for (; AT_ONCE == 4 && count >= 4; at += 4, count -= 4) act(std::integral_constant<int, 4>(), at);
    for (; count >= 2; at += 2, count -= 2) act(std::integral_constant<int, 2>(), at);
    if (count) act(std::integral_constant<int, 1>(), at);
}

// Compute all candidates exactly. Where the weight is too large for the last level of the cache: in blocks of latents that
// fit into the second level, if most rows have candidates in each, else in a few parts that fit into the last.
inline void compute_all_exactly(Collector &collector, const float *x, const float *weight, int64_t m, int64_t d,
                                const Screen &s) {
    constexpr int64_t LARGE = 16 << 20, MOST_PARTS = 8;
    const int64_t bytes = 4 * d, blocks = m / fitting_rows(bytes) + 1;
    if (m * bytes < LARGE || how_many(collector) < collector.n * blocks) {
        const int64_t fitting = m * bytes / LARGE + 1, parts = fitting < MOST_PARTS ? fitting : MOST_PARTS;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t first = m * part / parts, end = m * (part + 1) / parts;
            for_rows(collector, [&](Row &row, int64_t i, Keys &keys) {
                compute_exactly(row, i, x, weight, d, s, keys,
                                [&](const Candidate &c) { return (c.latent >= first) & (c.latent < end); });
            });
        }
        return;
    }
    const auto ask_for = [d](const float *row) {
        for (int64_t c = 0; c < d; c += 16) prefetch(row + c);
    };
    for_blocks(
        collector, m, bytes, [&](int64_t j) { ask_for(weight + j * d); }, [&](int64_t i) { ask_for(x + i * d); },
        [&](int64_t i, Candidate *at, int64_t count) {
            for_groups(at, count, [&](auto k, Candidate *now) {
                constexpr int K = decltype(k)::value;
                const float *rows[K];
                float values[K];
                for (int c = 0; c < K; c++) rows[c] = weight + now[c].latent * d;
                dots<K>(x + i * d, rows, d, values);
                // Not the latents: other threads read those of the row, to find where their blocks begin.
                for (int c = 0; c < K; c++) {
                    now[c].value = values[c] + s.bias[now[c].latent];
                    now[c].slack = 0;
                    now[c].exact = true;
                }
            });
        });
}

}  // namespace
