// Candidates of a selection from screened pre-activations, and what is known of their values.
//
// A low-precision product gives every pre-activation up to a known error, its slack. Whatever may belong to the
// selection is collected as a candidate; the candidates are computed again as fp32 dot products (settle.h), and the
// selection is made among these. The result is the one that computing every pre-activation in fp32 would give, bit for
// bit, because a candidate is dropped only when its upper bound is below what is already certain.
//
// With x = x' + dx and w = w' + dw, where x' and w' are what the product took,
//     x . w - x' . w' = dx . w + x' . dw + rounding of the sums.
// After rounding to bf16 the two terms are at most |dx| |w| and |x'| |dw|, by Cauchy-Schwarz.
//
// After rounding to int8 that would leave several times as much open as ever happens, so dx and dw are made random:
// dither is added before rounding and taken off afterwards, and with it dx and dw are even in (-1/2, 1/2] units, column
// by column, whatever x and w are that were chosen without knowing the dither (Schuchman 1964). As
// E exp(a dx_i) = sinh(a/2) / (a/2) <= exp(a^2 / 24), in units, the sum of dx_i w_i is sub-Gaussian with variance factor
// |w|^2 / 12, and the factors of the two terms add up: by Chernoff's bound, the chance that their sum is below
// -z sqrt(s^2 |w|^2 + t^2 |x'|^2), where s and t are the units, is at most exp(-6 z^2).
// kernels/screen.py chooses z; that anything is lost is then far less likely than that the memory fails.
#pragma once

#include <cstdlib>

#include "optimizer.h"

namespace {

constexpr float INF = __builtin_inff();

struct Candidate {
    float value, slack;
    int32_t latent;
    bool exact;  // the value is
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
// first of the collector's. The fields' order is that of `_ScreenStruct`
// in kernels/screen.py.
struct Screen {
    const float *bias, *norms, *errors;  // of each latent: bias, |w|, what its rounding may add
    const float *scales;                 // of each latent: the worth of one unit of w' (null without int8)
    const int8_t *bytes;                 // w'
    const int32_t *shifts;               // of each latent: what is to be added to its products
    const float *by_norm, *by_error;     // of each row: the factors of `norms` and `errors` in the slack
    const int8_t *row_bytes;             // x'
    const float *row_scales;             // of each row: the worth of one unit of x'
    const int32_t *row_shifts;           // of each row: what is to be added to its products
    float rel;                           // rounding of the stored product
    float of_smaller;                    // how much of the smaller of the two errors adds to the larger
    float max_bias, max_norm, max_error;

    // The slack's own rounding, and products below the smallest normal number.
    static float safe(float slack) { return slack * 1.00001f + 1e-35f; }

    // With independent errors hardly more than the root of the sum of their squares.
    float together(float a, float b) const { return a > b ? a + of_smaller * b : b + of_smaller * a; }

    float slack(int64_t row, int64_t j, float v) const {
        return safe(together(by_norm[row] * norms[j], by_error[row] * errors[j]) +
                    rel * (std::fabs(v) + std::fabs(bias[j])));
    }
    float largest_slack(int64_t row, float v) const {
        return safe(together(by_norm[row] * max_norm, by_error[row] * max_error) + rel * (std::fabs(v) + max_bias));
    }
};

// Screen::together of vectors.
inline Vec together(Vec a, Vec b, float of_smaller) { return larger(a, b) + of_smaller * smaller(a, b); }

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
    for (int64_t c = 0; c < row.count; c++) {
        keys.at[keys.count] = key(size_of(row.at[c].value, magnitude) - (at_least ? row.at[c].slack : 0));
        keys.count += bool(chosen(row.at[c]));
    }
    return keys.kth_largest(k, 32);
}

// Drop what keep(candidate) is not true of. A branch for each would often be guessed wrong.
template <class Keep>
void keep_if(Row &row, const Keep &keep) {
    int64_t kept = 0;
    for (int64_t c = 0; c < row.count; c++) {
        const Candidate now = row.at[c];
        row.at[kept] = now;
        kept += bool(keep(now));
    }
    row.count = kept;
}

// Drop what the row's candidates show to be out of reach: the k-th largest of what they are at least is a floor.
inline void prune(Row &row, int64_t k, bool magnitude, Keys &keys) {
    if (row.count < k) return;
    const float floor = of_key(kth_candidate(row, k, magnitude, true, keys, [](const Candidate &) { return true; }));
    if (floor > row.floor) row.floor = floor;
    keep_if(row, [&](const Candidate &c) { return size_of(c.value, magnitude) + c.slack >= row.floor; });
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

}  // namespace
