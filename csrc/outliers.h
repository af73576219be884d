// Latents that are far longer than nearly all others, or that rounding changed far more.
//
// While the k largest of a row are looked for, what their floor and its cut leave to rounding is that of the latent with
// the most. One of a hundred times the others' norm would keep nearly everything in question. So outliers are left out of
// the floors, which the others then put where they belong, and each of them is compared with its own slack.
#pragma once

#include "candidates.h"

namespace {

class Outliers {
  public:
    // Whether a value is one: it is more than half as much again as all but a few in a hundred.
    static constexpr int64_t FEW = 64, LEAST = 1024;
    static constexpr float FAR = 1.5f;

    Outliers(const Screen &s, int64_t m) : usual(s) {
        if (m < LEAST) return;
        const float norm = bound(s.norms, m, s.max_norm), error = bound(s.errors, m, s.max_error);
        if (norm == s.max_norm && error == s.max_error) return;
        usual.max_norm = norm, usual.max_error = error;
        bits = static_cast<uint32_t *>(std::calloc(m / 32 + 1, sizeof(uint32_t)));
        for (int64_t j = 0; j < m; j++)
            if (s.norms[j] > norm || s.errors[j] > error) bits[j / 32] |= 1u << j % 32;
    }
    ~Outliers() { std::free(bits); }
    Outliers(const Outliers &) = delete;

    // One bit for each of 32 latents from `first`, a multiple of 32, on.
    uint32_t from(int64_t first) const { return bits ? bits[first / 32] : 0; }

    Screen usual;  // with the largest of the others

  private:
    uint32_t *bits = nullptr;

    static float bound(const float *values, int64_t m, float largest) {
        double total = 0;
        for (int64_t j = 0; j < m; j++) total += values[j];
        if (largest <= FAR * total / m) return largest;  // seldom is there more to do
        Keys keys{};
        keys.reserve(m);
        for (int64_t j = 0; j < m; j++) keys.at[j] = key(values[j]);
        keys.count = m;
        const float far = FAR * of_key(keys.kth_largest(m / FEW, 12));
        std::free(keys.at);
        return far < largest ? far : largest;
    }
};

}  // namespace
