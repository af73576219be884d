// Candidates of a selection from screened pre-activations, and how they are settled.
//
// A low-precision product gives every pre-activation up to a known error, its slack. Whatever may belong to the
// selection is collected as a candidate; the candidates are computed again as fp32 dot products, and the selection is
// made among these. The result is the one that computing every pre-activation in fp32 would give, bit for bit, because
// a candidate is dropped only when its upper bound is below what is already certain.
//
// With x = x' + dx and w = w' + dw, where x' and w' are what the product took, Cauchy-Schwarz bounds the error:
//     |x . w - x' . w'| <= |dx| |w| + |x'| |dw| + rounding of the sums
// An int8 product leaves many candidates. Their values are improved first with what rounding to int8 left of x and w,
// also in int8: that takes half the bytes of an fp32 row, and hardly ever leaves more candidates than are selected.
#pragma once

#include <cstdlib>

#include "optimizer.h"

namespace {

constexpr float INF = __builtin_inff();

enum Stage : int32_t { SCREENED, FINER_SCREENED, EXACT };

struct Candidate {
    float value, slack;
    int32_t latent;
    Stage stage;
};

struct Row {
    Candidate *at;
    int64_t count, room;
    int64_t certain;  // how many of them are above their bounds whatever the rounding
    float floor;      // a lower bound of the k-th largest
    bool finite;

    void push(Candidate c) {
        if (count == room) {
            room = room ? 2 * room : 64;
            at = static_cast<Candidate *>(std::realloc(at, room * sizeof(Candidate)));
        }
        at[count++] = c;
    }
};

struct Collector {
    int64_t n;
    Row *rows;
};

// What is known of a product's operands. Arrays of latents begin at the dictionary's first, arrays of rows at the
// first of the collector's. The fields' order is that of `_Screen` in kernels/screen.py.
struct Screen {
    const float *bias, *norms, *errors;   // of each latent: bias, |w|, |dw|
    const float *scales;                  // of each latent: the worth of one unit of w' (int8)
    const int8_t *bytes, *rest;           // w' and what it leaves of w, where the product was in int8; else null
    const float *rest_errors;             // of each latent: what both leave
    const float *by_norm, *by_error;      // of each row: the factors of |w| and |dw| in the slack
    const int8_t *row_bytes, *row_rest;   // x' and what it leaves of x
    const float *row_scales;              // of each row: the worth of one unit of x' (int8)
    const float *finer_by_norm, *finer_by_error, *finer_by_rest;  // the factors of |w|, |dw| and the rest's error
    float rel;                            // rounding of the stored product
    float max_bias, max_norm, max_error, max_rest_error;

    // The slack's own rounding, and products below the smallest normal number.
    static float safe(float slack) { return slack * 1.00001f + 1e-35f; }

    float slack(int64_t row, int64_t j, float v) const {
        return safe(by_norm[row] * norms[j] + by_error[row] * errors[j] + rel * (std::fabs(v) + std::fabs(bias[j])));
    }
    float largest_slack(int64_t row, float v) const {
        return safe(by_norm[row] * max_norm + by_error[row] * max_error + rel * (std::fabs(v) + max_bias));
    }
    // The same once the rests are added.
    float finer_slack(int64_t row, int64_t j, float v) const {
        return safe(finer_by_norm[row] * norms[j] + finer_by_error[row] * errors[j] +
                    finer_by_rest[row] * rest_errors[j] + rel * (std::fabs(v) + std::fabs(bias[j])));
    }
    float largest_finer_slack(int64_t row, float v) const {
        return safe(finer_by_norm[row] * max_norm + finer_by_error[row] * max_error +
                    finer_by_rest[row] * max_rest_error + rel * (std::fabs(v) + max_bias));
    }
};

// Floats as integers of the same order.
inline uint32_t key(float f) {
    uint32_t u;
    f += 0.0f;  // -0 equals 0
    std::memcpy(&u, &f, sizeof u);
    return u >> 31 ? ~u : u | 0x80000000u;
}

inline float of_key(uint32_t k) {
    uint32_t u = k >> 31 ? k & 0x7fffffffu : ~k;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}

struct Keys {
    uint32_t *at;
    int64_t count, room;

    void reserve(int64_t wanted) {
        count = 0;
        const int64_t padded = (wanted + 2 * LANES) / LANES * LANES;
        if (padded > room) {
            std::free(at);
            room = padded;
            at = static_cast<uint32_t *>(std::malloc(room * sizeof(uint32_t)));
        }
    }

    // The k-th largest key, one bit after the other, each by a pass of compare and count; what all keys begin with needs
    // no pass. With fewer bits than 32 the result is a lower bound. 0 if there are fewer than k.
    uint32_t kth_largest(int64_t k, int bits) {
        if (count < k) return 0;
        uint32_t largest = 0, smallest = ~0u;
        for (int64_t i = 0; i < count; i++) {
            largest = at[i] > largest ? at[i] : largest;
            smallest = at[i] < smallest ? at[i] : smallest;
        }
        if (largest == smallest) return largest;
        const int64_t padded = (count + LANES - 1) / LANES * LANES;
        for (int64_t i = count; i < padded; i++) at[i] = 0;
        const int start = 31 - __builtin_clz(largest ^ smallest);
        uint32_t found = largest >> start >> 1 << start << 1;
        for (int bit = start; bit >= 32 - bits; bit--) {
            const uint32_t trial = found | 1u << bit;
            int64_t total = 0;
            for (int64_t i = 0; i < padded; i += LANES) total += how_many_reach(at + i, trial);
            if (total >= k) found = trial;
            if (total == k && bits == 32) {  // what follows is the smallest of these
                uint32_t smallest = ~0u;
                for (int64_t i = 0; i < padded; i++)
                    if (at[i] >= trial && at[i] < smallest) smallest = at[i];
                return smallest;
            }
        }
        return found;
    }
};

inline float size_of(float v, bool magnitude) { return magnitude ? std::fabs(v) : v; }

// A t such that every v below it has v + slack(v) below `floor`, whatever its latent.
inline float cut_for(float floor, const Screen &s, int64_t row) {
    const float rest = floor - s.largest_slack(row, 0);
    const float t = rest >= 0 ? rest / (1 + s.rel) : rest / (1 - s.rel);
    return t - 1e-5f * std::fabs(t);
}

// The k-th largest of what some candidates are, or (with `at_least`) of what they are at least.
template <class Chosen>
uint32_t kth_candidate(const Row &row, int64_t k, bool magnitude, bool at_least, Keys &keys, const Chosen &chosen) {
    keys.reserve(row.count);
    for (int64_t c = 0; c < row.count; c++)
        if (chosen(row.at[c]))
            keys.at[keys.count++] = key(size_of(row.at[c].value, magnitude) - (at_least ? row.at[c].slack : 0));
    return keys.kth_largest(k, 32);
}

// Drop what the row's candidates show to be out of reach: the k-th largest of what they are at least is a floor.
inline void prune(Row &row, int64_t k, bool magnitude, Keys &keys) {
    if (row.count < k) return;
    const float floor = of_key(kth_candidate(row, k, magnitude, true, keys, [](const Candidate &) { return true; }));
    if (floor > row.floor) row.floor = floor;
    int64_t kept = 0;
    for (int64_t c = 0; c < row.count; c++)
        if (size_of(row.at[c].value, magnitude) + row.at[c].slack >= row.floor) row.at[kept++] = row.at[c];
    row.count = kept;
}

template <class Keep>
void keep_if(Row &row, const Keep &keep) {
    int64_t kept = 0;
    for (int64_t c = 0; c < row.count; c++)
        if (keep(row.at[c])) row.at[kept++] = row.at[c];
    row.count = kept;
}

// For every row, on any thread: act(row, its number, scratch memory).
template <class Act>
void for_rows(Collector &collector, const Act &act) {
#pragma omp parallel
    {
        Keys keys{};
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = 0; i < collector.n; i++)
            if (collector.rows[i].finite) act(collector.rows[i], i, keys);
        std::free(keys.at);
    }
}

// Compute wanted candidates of a row exactly.
template <class Wanted>
void compute_exactly(Row &row, int64_t i, const float *x, const float *weight, int64_t d, const Screen &s, Keys &todo,
                     const Wanted &wanted) {
    todo.reserve(row.count);
    for (int64_t c = 0; c < row.count; c++)
        if (row.at[c].stage != EXACT && wanted(row.at[c])) todo.at[todo.count++] = c;
    for (int64_t t = 0; t < todo.count; t++) {
        Candidate &now = row.at[todo.at[t]];
        const int64_t later = row.at[todo.at[t + AHEAD < todo.count ? t + AHEAD : t]].latent;
        now.value = dot(x + i * d, weight + now.latent * d, d, weight + later * d) + s.bias[now.latent];
        now.slack = 0;
        now.stage = EXACT;
    }
}

// For every candidate, on any thread: act(its row's number, candidate). There are many, so it goes block by block through
// the latents, whose rows take up `bytes` each: a block stays in cache while all the rows of x that want it come by, and
// meanwhile fetch(latent) asks for the next one, and fetch_row(row) for what is needed of a row that comes soon.
template <class Fetch, class FetchRow, class Act>
void for_candidates(Collector &collector, int64_t m, int64_t bytes, const Fetch &fetch, const FetchRow &fetch_row,
                    const Act &act) {
    struct Place {
        int32_t row, at;
    };
    constexpr int64_t PARTS = 16;
    int shift = 0;
    while (bytes << (shift + 1) <= 96 << 10) shift++;
    const int64_t blocks = (m >> shift) + 1;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t part = 0; part < PARTS; part++) {
        const int64_t first = blocks * part / PARTS, last = blocks * (part + 1) / PARTS;
        // A counting sort of this part's candidates by their blocks.
        int64_t *ends = new int64_t[last - first + 1](), *from = new int64_t[collector.n];
        const auto each = [&](const auto &take) {
            for (int64_t i = 0; i < collector.n; i++) {
                const Row &row = collector.rows[i];
                for (int64_t c = from[i]; c < row.count && row.at[c].latent >> shift < last; c++)
                    take(i, c, (row.at[c].latent >> shift) - first);
            }
        };
        for (int64_t i = 0; i < collector.n; i++) {
            const Row &row = collector.rows[i];
            int64_t low = 0, high = row.count;
            while (low < high) {
                const int64_t mid = (low + high) / 2;
                if (row.at[mid].latent >> shift < first)
                    low = mid + 1;
                else
                    high = mid;
            }
            from[i] = low;
        }
        each([&](int64_t, int64_t, int64_t block) { ends[block + 1]++; });
        for (int64_t block = 0; block < last - first; block++) ends[block + 1] += ends[block];
        const int64_t count = ends[last - first];
        Place *places = new Place[count];
        each([&](int64_t i, int64_t c, int64_t block) { places[ends[block]++] = {int32_t(i), int32_t(c)}; });
        int64_t next = 0;
        for (int64_t t = 0; t < count; t++) {
            const Place later = places[t + AHEAD < count ? t + AHEAD : t];
            prefetch(collector.rows[later.row].at + later.at);
            fetch_row(places[t + 2 < count ? t + 2 : t].row);
            Candidate &now = collector.rows[places[t].row].at[places[t].at];
            const int64_t start = ((now.latent >> shift) + 1) << shift, end = start + (1ll << shift);
            next = next > start ? next : start;
            if (next < end && next < m) fetch(next++);
            act(places[t].row, now);
        }
        delete[] places;
        delete[] from;
        delete[] ends;
    }
}

// Compute all candidates exactly. Of many rows that each have many, most share their latents with others.
inline void compute_all_exactly(Collector &collector, const float *x, const float *weight, int64_t m, int64_t d,
                                const Screen &s) {
    const auto ask_for = [d](const float *row) {
        for (int64_t c = 0; c < d; c += 16) prefetch(row + c);
    };
    for_candidates(
        collector, m, 4 * d, [&](int64_t j) { ask_for(weight + j * d); }, [&](int64_t i) { ask_for(x + i * d); },
        [&](int64_t i, Candidate &now) {
            now.value = dot(x + i * d, weight + now.latent * d, d) + s.bias[now.latent];
            now.slack = 0;
            now.stage = EXACT;
        });
}

// Add the rests to what all candidates are.
inline void refine(Collector &collector, int64_t m, int64_t d, const Screen &s) {
    int32_t *totals = new int32_t[collector.n];
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < collector.n; i++) {
        totals[i] = 0;
        for (int64_t c = i * d; c < (i + 1) * d; c++) totals[i] += s.row_bytes[c] + s.row_rest[c];
    }
    const auto fetch = [&](int64_t j) {
        for (int64_t c = 0; c < d; c += 64) prefetch(s.bytes + j * d + c), prefetch(s.rest + j * d + c);
    };
    const auto fetch_row = [&](int64_t i) {
        for (int64_t c = 0; c < d; c += 64) prefetch(s.row_bytes + i * d + c), prefetch(s.row_rest + i * d + c);
    };
    for_candidates(collector, m, 2 * d, fetch, fetch_row, [&](int64_t i, Candidate &now) {
        const int64_t j = now.latent;
        const int32_t added = dot_crosswise(s.row_bytes + i * d, s.row_rest + i * d, s.bytes + j * d, s.rest + j * d, d,
                                            totals[i]);
        now.value += float(added) * (s.row_scales[i] * s.scales[j] / FINER);
        now.slack = s.finer_slack(i, j, now.value);
        now.stage = FINER_SCREENED;
    });
    delete[] totals;
}

}  // namespace
