// The C interface, compiled once for each target: every function is exported as uw_NAME_TARGET.
// Callers check shapes, types and index ranges; nothing is checked here.
#include "attention.h"
#include "copying.h"
#include "dense.h"
#include "fused.h"
#include "gather.h"
#include "largest.h"
#include "optimizer.h"
#include "select.h"
#include "sparse.h"
#include "squared_error.h"

#define JOIN3(a, b, c) a##b##_##c
#define JOIN2(a, b, c) JOIN3(a, b, c)
#define UW_EXPORT(name) __attribute__((visibility("default"))) JOIN2(uw_, name, UW_TARGET)

typedef int64_t i64;
typedef void *Handle;

#define SCREEN (*static_cast<const Screen *>(screen))
#define COLLECTOR (*static_cast<Collector *>(handle))

namespace {
template <class Do>
void with_products(const void *tile, i64 kind, const Do &act) {
    if (kind == 0) act(static_cast<const float *>(tile));
    if (kind == 1) act(static_cast<const bf16 *>(tile));
    if (kind == 2) act(static_cast<const int32_t *>(tile));
}
}  // namespace

extern "C" {

void UW_EXPORT(gather_sum)(const i64 *indices, const float *values, const i64 *offsets, i64 n, const float *weight,
                           i64 d, float *out) {
    gather_sum(indices, values, offsets, n, weight, d, out);
}

void UW_EXPORT(sddmm)(const i64 *indices, const i64 *offsets, i64 n, const float *grad, const float *weight, i64 d,
                      float *out) {
    sddmm(indices, offsets, n, grad, weight, d, out);
}

void UW_EXPORT(transpose)(const i64 *indices, const i64 *offsets, i64 n, i64 m, i64 *order, i64 *rows, i64 *ends) {
    transpose(indices, offsets, n, m, order, rows, ends);
}

void UW_EXPORT(sum_by_latent)(const i64 *order, const i64 *ends, i64 m, const float *values, float *out) {
    sum_by_latent(order, ends, m, values, out);
}

void UW_EXPORT(scatter_outer)(const i64 *latents, i64 count, const i64 *order, const i64 *rows, const i64 *ends,
                              const float *values, const float *x, i64 d, i64 rows_per_x, const float *start,
                              const i64 *start_slot, const float *weight, const float *along, i64 project, float *out,
                              float *squares) {
    const Extra extra{start, start_slot, weight, along, project != 0};
    scatter_outer(latents, count, order, rows, ends, values, x, d, rows_per_x, extra, out, squares);
}

void UW_EXPORT(sum_rows)(const float *weights, const float *x, i64 n, i64 d, i64 stride, float *out) {
    sum_rows(weights, x, n, d, stride, out);
}

double UW_EXPORT(squared_distances)(const float *x, i64 n, i64 d, const float *from) {
    return squared_distances(x, n, d, from);
}

// The sum of n values, one after the other.
double UW_EXPORT(total)(const float *values, i64 n) {
    double sum = 0;
    for (i64 i = 0; i < n; i++) sum += values[i];
    return sum;
}

void UW_EXPORT(keep_largest)(void *tile, i64 half, i64 n, i64 width, i64 k) {
    if (half)
        keep_largest(static_cast<bf16 *>(tile), n, width, k);
    else
        keep_largest(static_cast<float *>(tile), n, width, k);
}

void UW_EXPORT(squared_error_rows)(const i64 *indices, const float *values, const i64 *offsets, i64 n, i64 P,
                                   const float *scales, const float *weight, const float *bias, const float *x, i64 d,
                                   float *errors, float *grad, float *residual, float *code_grad) {
    const SquaredErrors all{indices, values, offsets, n, P, scales, weight, bias, x, d,
                            errors, grad, residual, code_grad};
    all.rows();
}

void UW_EXPORT(images)(const float *weight, i64 m, i64 d, const void *into) {
#pragma omp parallel for schedule(static)
    for (i64 j = 0; j < m; j++) images_of_row(weight + j * d, j, d, *static_cast<const Images *>(into));
}

Handle UW_EXPORT(collector)(i64 n) {
    Collector *collector = new Collector{n, new Row[n]};
    for (i64 i = 0; i < n; i++) collector->rows[i] = {nullptr, 0, 0, 0, -INF, true};
    return collector;
}

void UW_EXPORT(discard)(void *handle) {
    Collector *collector = static_cast<Collector *>(handle);
    for (i64 i = 0; i < collector->n; i++) std::free(collector->rows[i].at);
    delete[] collector->rows;
    delete collector;
}

// The first row on which a pre-activation was NaN or infinite; -1 if there is none.
i64 UW_EXPORT(not_finite)(void *handle) {
    const Collector &collector = COLLECTOR;
    for (i64 i = 0; i < collector.n; i++)
        if (!collector.rows[i].finite) return i;
    return -1;
}

// How many entries are above their bounds for certain.
i64 UW_EXPORT(certain)(void *handle) {
    const Collector &collector = COLLECTOR;
    i64 total = 0;
    for (i64 i = 0; i < collector.n; i++) total += collector.rows[i].certain;
    return total;
}

#if defined(UW_INT8_PRODUCTS)

// The scans of tiles below with the int8 product made in them, of `width` latents from `first` on, which is 0 but for
// pick_above; `packed` has room for these latents. Only for processors that have an instruction for it.
void UW_EXPORT(pick_topk)(void *handle, i64 first, i64 width, i64 d, const void *screen, void *packed, i64 k,
                          i64 magnitude, float guess) {
    const Outliers outliers(SCREEN, width);
    const PackedLatents latents{first, width, d, static_cast<int32_t *>(packed)};
    if (magnitude)
        pick_candidates(COLLECTOR, latents, SCREEN, PickLargest<true>{outliers, k, width, guess});
    else
        pick_candidates(COLLECTOR, latents, SCREEN, PickLargest<false>{outliers, k, width, guess});
}

void UW_EXPORT(pick_above)(void *handle, i64 first, i64 width, i64 d, const void *screen, void *packed,
                           const float *bounds, i64 count_certain) {
    const PickAbove pick{SCREEN, bounds, count_certain != 0};
    pick_candidates(COLLECTOR, {first, width, d, static_cast<int32_t *>(packed)}, SCREEN, pick);
}

void UW_EXPORT(pick_groups)(void *handle, i64 first, i64 width, i64 d, const void *screen, void *packed, i64 size) {
    const i64 cells = COLLECTOR.n * (width / size);
    float *floors = static_cast<float *>(std::malloc(cells * sizeof(float)));
    for (i64 i = 0; i < cells; i++) floors[i] = -INF;
    const PickGroups pick{SCREEN, size, width / size, floors};
    pick_candidates(COLLECTOR, {first, width, d, static_cast<int32_t *>(packed)}, SCREEN, pick);
    std::free(floors);
}

#endif

// The products of a tile are float (0), bf16 (1) or int32 of int8 operands (2).
void UW_EXPORT(scan_topk)(void *handle, const void *tile, i64 kind, i64 width, i64 first, const void *screen, i64 k,
                          i64 magnitude, float guess) {
    with_products(tile, kind, [&](const auto *products) {
        if (magnitude)
            scan_topk<true>(COLLECTOR, products, width, first, SCREEN, k, guess);
        else
            scan_topk<false>(COLLECTOR, products, width, first, SCREEN, k, guess);
    });
}

void UW_EXPORT(finish_topk)(void *handle, const float *x, const float *weight, i64 m, i64 d, const void *screen, i64 k,
                           i64 magnitude, i64 guess, i64 *indices, float *values) {
    Collector &collector = COLLECTOR;
    finish_topk(collector, x, weight, SCREEN, m, d, k, magnitude, guess, indices, values);
}

void UW_EXPORT(scan_above)(void *handle, const void *tile, i64 kind, i64 width, i64 first, const void *screen,
                           const float *bounds) {
    with_products(tile, kind, [&](const auto *products) {
        scan_above(COLLECTOR, products, width, first, SCREEN, bounds);
    });
}

void UW_EXPORT(finish_above)(void *handle, const float *x, const float *weight, i64 m, i64 d, const void *screen,
                             const float *bounds, i64 *counts) {
    finish_above(COLLECTOR, x, weight, SCREEN, m, d, bounds, counts);
}

void UW_EXPORT(scan_groups)(void *handle, const void *tile, i64 kind, i64 width, i64 first, const void *screen,
                            i64 size) {
    with_products(tile, kind, [&](const auto *products) {
        scan_groups(COLLECTOR, products, width, first, SCREEN, size);
    });
}

void UW_EXPORT(finish_groups)(void *handle, const float *x, const float *weight, i64 d, const void *screen, i64 groups,
                              i64 size, i64 *indices, float *values) {
    finish_groups(COLLECTOR, x, weight, SCREEN, d, groups, size, indices, values);
}

void UW_EXPORT(add_halves)(float *into, const void *halves, i64 n) {
    add_halves(into, static_cast<const bf16 *>(halves), n);
}

i64 UW_EXPORT(dense_codes)(const void *pre, i64 half, i64 n, i64 m, const float *theta, void *codes, float *active,
                           float *sums) {
    if (half)
        return dense_codes(static_cast<const bf16 *>(pre), n, m, theta, static_cast<bf16 *>(codes), active, sums);
    return dense_codes(static_cast<const float *>(pre), n, m, theta, static_cast<float *>(codes), active, sums);
}

void UW_EXPORT(dense_back)(void *back, const void *pre, i64 half, i64 n, i64 m, const float *theta, const float *add,
                           float half_width, float *bias, float *windows, float *towards) {
    if (half)
        dense_back(static_cast<bf16 *>(back), static_cast<const bf16 *>(pre), n, m, theta, add, half_width, bias,
                   windows, towards);
    else
        dense_back(static_cast<float *>(back), static_cast<const float *>(pre), n, m, theta, add, half_width, bias,
                   windows, towards);
}

// Keep the `budget` largest of a batch's candidates, of which there are more, in their order; the first of equals stay.
void UW_EXPORT(largest_of_batch)(i64 *counts, i64 rows, i64 *indices, float *values, i64 budget) {
    keep_largest_of_batch(counts, rows, indices, values, budget);
}

// Copy the kept candidates out, row after row.
void UW_EXPORT(take)(void *handle, i64 *indices, float *values) {
    const Collector &collector = COLLECTOR;
    for (i64 i = 0; i < collector.n; i++)
        for (i64 c = 0; c < collector.rows[i].count; c++) {
            *indices++ = collector.rows[i].at[c].latent;
            *values++ = collector.rows[i].at[c].value;
        }
}

void UW_EXPORT(gather_rows)(const i64 *rows, i64 n, i64 d, const void *stretches, const i64 *starts, i64 count, i64 kind,
                            i64 wide, void *out, i64 threads) {
    gather_rows(rows, n, d, static_cast<const Stretch *>(stretches), starts, count, kind, wide != 0,
                static_cast<char *>(out), threads);
}

// 0 if all values are finite, 1 if some are not, 2 if the file ends before the matrix does or cannot be read, 3 if there
// is no memory for what it works with.
int UW_EXPORT(copy_matrix)(const void *memory, i64 file, i64 offset, i64 rows, i64 columns, i64 row_stride, i64 kind,
                           void *out, i64 out_stride, i64 wide, i64 transposed, i64 threads) {
    const Stored from{static_cast<const char *>(memory), file, offset, rows, columns, row_stride};
    return copy_matrix(from, kind, out, out_stride, wide != 0, transposed != 0, threads);
}

// Strides: of queries, keys and values along the batch, the heads and the positions. Returns 1 if there is no such kernel
// for this target, 2 if there is no memory for what it works with; then nothing was written.
int UW_EXPORT(attention)(const void *q, const void *k, const void *v, void *out, i64 batch, i64 heads, i64 groups,
                         i64 length, i64 width, const i64 *strides, float scale, i64 causal) {
#if defined(__AVX512BF16__)
    const auto at = [strides](int i) { return Strides{strides[i], strides[i + 1], strides[i + 2]}; };
    const Attention a{batch, heads, groups, length, width, at(0), at(3), at(6), scale, causal != 0};
    const bool done = attention(a, static_cast<const bf16 *>(q), static_cast<const bf16 *>(k),
                                static_cast<const bf16 *>(v), static_cast<bf16 *>(out));
    return done ? 0 : 2;
#else
    (void)q, (void)k, (void)v, (void)out, (void)batch, (void)heads, (void)groups, (void)length, (void)width;
    (void)strides, (void)scale, (void)causal;
    return 1;
#endif
}

void UW_EXPORT(adam_rows)(float *weight, i64 m, i64 d, const float *grad, const i64 *slot, void *first, void *second,
                          i64 half, float step_size, float beta1, float beta2, float eps, float correction,
                          float grad_scale, uint64_t seed, i64 unit, const void *into) {
    const Adam a{step_size, beta1, beta2, eps, correction, grad_scale, seed};
    const Images images = into ? *static_cast<const Images *>(into) : Images{};
    if (half)
        adam_rows(weight, m, d, grad, slot, static_cast<bf16 *>(first), static_cast<bf16 *>(second), a, unit, images);
    else
        adam_rows(weight, m, d, grad, slot, static_cast<float *>(first), static_cast<float *>(second), a, unit, images);
}

}  // extern "C"
