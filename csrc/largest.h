// The largest of values that are computed already: of each row of a dense tile, and of all candidates of a batch.
#pragma once

#include "candidates.h"

namespace {

// Keep the k largest positive values of each row of (n, width) and make the others 0; the lowest of equals stay.
template <class T>
void keep_largest(T *tile, int64_t n, int64_t width, int64_t k) {
#pragma omp parallel
    {
        Keys keys{};
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = 0; i < n; i++) {
            T *p = tile + i * width;
            keys.reserve(width);
            int64_t c = 0;
            for (; c + LANES <= width; c += LANES) {
                const VecBits bits = (VecBits)(load(p + c) + 0.0f), keyed = bits ^ (-(bits >> 31) | 0x80000000u);
                std::memcpy(keys.at + c, &keyed, sizeof keyed);
            }
            for (; c < width; c++) keys.at[c] = key(value(p[c]));
            keys.count = width;
            // Nothing of a positive bf16 is beyond the first 16 bits, and which negative one is the k-th does not matter.
            const uint32_t last = keys.kth_largest(k, std::is_same_v<T, bf16> ? 16 : 32);
            const bool few = last < key(0);  // fewer than k are positive
            const uint32_t least = few ? key(0) + 1 : last;
            int64_t reach = 0;
            for (c = 0; c < width; c++) reach += keys.at[c] >= least;
            for (c = 0; c + LANES <= width; c += LANES) {
                VecBits keyed;
                std::memcpy(&keyed, keys.at + c, sizeof keyed);
                const VecBits kept = (VecBits)load(p + c) & (VecBits)(keyed >= least);
                if constexpr (std::is_same_v<T, bf16>)
                    store(p + c, kept >> 16);
                else
                    store(p + c, (Vec)kept);
            }
            for (; c < width; c++) p[c] = keys.at[c] < least ? T{} : p[c];
            int64_t surplus = few ? 0 : reach - k;
            for (c = width - 1; surplus > 0; c--)
                if (keys.at[c] == last) p[c] = T{}, surplus--;
        }
        std::free(keys.at);
    }
}

// Keep the `budget` largest of all candidates of a batch, of which there are more, in their order; of equals the first.
inline void keep_largest_of_batch(int64_t *counts, int64_t rows, int64_t *indices, float *values, int64_t budget) {
    int64_t total = 0;
    for (int64_t i = 0; i < rows; i++) total += counts[i];
    Keys keys{};
    keys.reserve(total);
    for (int64_t c = 0; c < total; c++) keys.at[c] = key(values[c]);
    keys.count = total;
    const uint32_t last = keys.kth_largest(budget, 32);
    int64_t ties = budget;
    for (int64_t c = 0; c < total; c++) ties -= keys.at[c] > last;
    for (int64_t i = 0, c = 0, out = 0; i < rows; i++) {
        const int64_t before = out;
        for (const int64_t end = c + counts[i]; c < end; c++) {
            const bool tied = keys.at[c] == last;
            indices[out] = indices[c];
            values[out] = values[c];
            out += keys.at[c] > last || (tied && ties > 0);
            ties -= tied;
        }
        counts[i] = out - before;
    }
    std::free(keys.at);
}

}  // namespace
