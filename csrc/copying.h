// Matrices out of a file or memory, copied or transposed into fresh memory, and checked for values that are not finite.
//
// What costs time is the first touch of the memory copied into. Threads share it out, ask for it in large pieces, and
// touch nothing else: a file is read into it or, to be transposed, into a block that stays in cache, and never mapped.
#pragma once

#include "gather.h"

#if !defined(_WIN32)
#include <cerrno>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// A matrix whose rows lie `stride` bytes apart, in memory or, where that is null, in an open file from an offset on.
struct Stored {
    const char *memory;
    int64_t file, offset, rows, columns, stride;
};

// Copy some bytes of the matrix; false if the file has no such bytes (any more), or cannot be read.
inline bool fetch(const Stored &from, int64_t at, int64_t bytes, void *to) {
    if (from.memory) {
        std::memcpy(to, from.memory + at, bytes);
        return true;
    }
#if defined(_WIN32)
    return false;
#else
    char *next = static_cast<char *>(to);
    for (int64_t done = 0; done < bytes;) {
        const ssize_t n = pread(int(from.file), next + done, bytes - done, from.offset + at + done);
        if (n == 0 || (n < 0 && errno != EINTR)) return false;
        if (n > 0) done += n;
    }
    return true;
#endif
}

// Have the pages of some memory made, all in one call. Else they are made as they are touched.
inline void touch(const void *memory, int64_t bytes) {
#if defined(__linux__)
    if (bytes < 1 << 16) return;
    constexpr int POPULATE_WRITE = 23;  // since Linux 5.14; older headers do not name it
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = uintptr_t(memory) / page * page;
    madvise(reinterpret_cast<void *>(first), uintptr_t(memory) + bytes - first, POPULATE_WRITE);
#else
    (void)memory, (void)bytes;
#endif
}

// The bits of a number, and which of them are all set if it is not finite.
template <class T> struct Bits;
template <> struct Bits<float> { typedef uint32_t Of; static constexpr Of exponent = 0x7f800000; };
template <> struct Bits<double> { typedef uint64_t Of; static constexpr Of exponent = 0x7ff0000000000000; };
template <> struct Bits<bf16> { typedef uint16_t Of; static constexpr Of exponent = 0x7f80; };
template <> struct Bits<fp16> { typedef uint16_t Of; static constexpr Of exponent = 0x7c00; };

template <class T> inline bool finite(const T *values, int64_t n) {
    typedef typename Bits<T>::Of Of;
    constexpr Of exponent = Bits<T>::exponent;
    Of found = 0;
    for (int64_t i = 0; i < n; i++) {
        Of bits;
        std::memcpy(&bits, values + i, sizeof bits);
        found |= Of((bits & exponent) == exponent);
    }
    return !found;
}

enum Found { FINITE, NOT_FINITE, NOT_THERE, NO_MEMORY };  // what is worse comes later

// Copy some values of the matrix, widened where `To` is wider than they are; `room` is for as many of them.
template <class From, class To> inline int fetch(const Stored &from, int64_t at, int64_t n, From *room, To *to) {
    if constexpr (std::is_same_v<From, To>) {
        if (!fetch(from, at, n * sizeof(To), to)) return NOT_THERE;
    } else {
        if (!fetch(from, at, n * sizeof(From), room)) return NOT_THERE;
        widen(room, n, 1, to);
    }
    return finite(to, n) ? FINITE : NOT_FINITE;
}

// Fill a matrix whose rows lie `stride` values apart.
template <class From, class To>
int copy_matrix(const Stored &from, To *to, int64_t stride, int64_t threads) {
    (void)threads;  // without OpenMP
    constexpr int64_t PIECE = 1 << 16;  // values, which are checked while they are in cache
    const int64_t pieces = (from.columns + PIECE - 1) / PIECE;
    int found = FINITE;
#pragma omp parallel num_threads(threads) reduction(max : found)
    {
        From *room = static_cast<From *>(std::malloc(PIECE * sizeof(From)));
        found = room ? FINITE : NO_MEMORY;
#pragma omp for schedule(dynamic, 16)
        for (int64_t job = 0; job < from.rows * pieces; job++) {
            if (found > NOT_FINITE) continue;
            const int64_t row = job / pieces, first = job % pieces * PIECE;
            const int64_t n = from.columns - first < PIECE ? from.columns - first : PIECE;
            To *place = to + row * stride + first;
            touch(place, n * sizeof(To));
            const int here = fetch(from, row * from.stride + first * int64_t(sizeof(From)), n, room, place);
            if (here > found) found = here;
        }
        std::free(room);
    }
    return found;
}

// Fill a matrix whose rows lie `stride` values apart with the transpose, block by block. Blocks are wide, because reading
// a few bytes costs as much as reading some thousand, and of two-byte values a column is still a line of cache.
template <class From, class To>
int transpose_matrix(const Stored &from, To *to, int64_t stride, int64_t threads) {
    (void)threads;  // without OpenMP
    constexpr int64_t ROWS = 32, COLUMNS = 2048, FEWEST = 256;
    constexpr int64_t PITCH = COLUMNS + 64 / sizeof(To);  // values of a column lie in different sets of the cache
    const int64_t share = from.columns / (4 * threads) / 64 * 64;  // so that no thread waits long for another
    const int64_t most = share > COLUMNS ? COLUMNS : share < FEWEST ? FEWEST : share;
    int found = FINITE;
#pragma omp parallel num_threads(threads) reduction(max : found)
    {
        From *room = static_cast<From *>(std::malloc(COLUMNS * sizeof(From)));
        To *block = static_cast<To *>(std::malloc(ROWS * PITCH * sizeof(To)));
        found = room && block ? FINITE : NO_MEMORY;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < from.columns; first += most) {
            const int64_t width = from.columns - first < most ? from.columns - first : most;
            touch(to + first * stride, ((width - 1) * stride + from.rows) * sizeof(To));
            for (int64_t top = 0; top < from.rows; top += ROWS) {
                const int64_t height = from.rows - top < ROWS ? from.rows - top : ROWS;
                for (int64_t i = 0; i < height && found <= NOT_FINITE; i++) {
                    const int64_t at = (top + i) * from.stride + first * int64_t(sizeof(From));
                    const int here = fetch(from, at, width, room, block + i * PITCH);
                    if (here > found) found = here;
                }
                if (found > NOT_FINITE) break;
                for (int64_t j = 0; j < width; j++)
                    for (int64_t i = 0; i < height; i++) to[(first + j) * stride + top + i] = block[i * PITCH + j];
            }
        }
        std::free(block);
        std::free(room);
    }
    return found;
}

template <class From, class To>
int copy_matrix(const Stored &from, void *to, int64_t stride, bool transposed, int64_t threads) {
    To *made = static_cast<To *>(to);
    return transposed ? transpose_matrix<From>(from, made, stride, threads)
                      : copy_matrix<From>(from, made, stride, threads);
}

// Kinds of values: fp32 (0), bf16 (1), fp16 (2), fp64 (3). Those of two bytes may be widened to fp32.
int copy_matrix(const Stored &from, int64_t kind, void *to, int64_t stride, bool wide, bool transposed,
                int64_t threads) {
    if (kind == 0) return copy_matrix<float, float>(from, to, stride, transposed, threads);
    if (kind == 3) return copy_matrix<double, double>(from, to, stride, transposed, threads);
    if (kind == 1)
        return wide ? copy_matrix<bf16, float>(from, to, stride, transposed, threads)
                    : copy_matrix<bf16, bf16>(from, to, stride, transposed, threads);
    return wide ? copy_matrix<fp16, float>(from, to, stride, transposed, threads)
                : copy_matrix<fp16, fp16>(from, to, stride, transposed, threads);
}

}  // namespace
