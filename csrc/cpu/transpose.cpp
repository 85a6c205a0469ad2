// A matrix transposed into columns of another. See seqarch.h.
//
// The matrix is meant to lie in a cache, as what was just read of a file does. A few of its columns at a time go to as
// many rows of the result, each a run of whole lines; blocks of vectors are transposed in registers on their way. Where
// a vector is a line and the lines of the result are whole, they go past the caches: the result is larger than these,
// and its lines would else be read before they are written.
#include "arguments.h"
#include "seqarch.h"
#include "simd.h"

namespace {

using namespace seqarch;

constexpr int64_t kLine = 64;
constexpr bool kStreams = kVectorBytes == kLine;

// A line that begins at `to`. Other threads are only sure to see it after a fence.
template <class T>
inline void write_line(const T* from, T* to) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
#else
    std::memcpy(to, from, kLine);
#endif
}

inline void fence_lines() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// As `transpose` of so many rows, which are whole vectors, and one vector of columns, into lines of the result.
template <class T>
void transpose_into_lines(int64_t rows, const T* x, int64_t x_row, T* y, int64_t y_row) {
    constexpr int64_t L = kLanes<T>;
    alignas(kLine) T block[L * L];
    for (int64_t i = 0; i < rows; i += L) {
        transpose<T>(L, L, x + i * x_row, x_row, block, L);
        for (int64_t c = 0; c < L; ++c) write_line(block + c * L, y + c * y_row + i);
    }
}

template <class T>
void transpose_into(const T* x, T* y, int64_t rows, int64_t columns, int64_t width, int threads) {
    constexpr int64_t L = kLanes<T>;
    const int64_t whole_rows = rows / L * L, blocks = (columns + L - 1) / L;
    const bool lines = kStreams && reinterpret_cast<uintptr_t>(y) % kLine == 0 && width * sizeof(T) % kLine == 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t j = block * L, end = std::min(columns, j + L);
        const int64_t vectors = end - j == L ? whole_rows : 0;  // rows that whole vectors hold
        if (lines)
            transpose_into_lines(vectors, x + j, columns, y + j * width, width);
        else
            transpose<T>(vectors, vectors ? L : 0, x + j, columns, y + j * width, width);
        for (int64_t c = j; c < end; ++c)
            for (int64_t i = vectors; i < rows; ++i) y[c * width + i] = x[i * columns + c];
        if (lines) fence_lines();
    }
}

}  // namespace

int32_t seqarch_transpose(const seqarch_transpose_arguments* arguments, int32_t num_threads) {
    const auto& a = *arguments;
    if (num_threads < 1 || !countable({a.rows, a.columns}) || !countable({a.columns, a.width}) || a.first < 0 ||
        a.first > a.width || a.rows > a.width - a.first)
        return SEQARCH_BAD_ARGUMENT;
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        transpose_into(static_cast<const T*>(a.x), static_cast<T*>(a.y) + a.first, a.rows, a.columns, a.width,
                       num_threads);
        return SEQARCH_OK;
    };
    switch (a.item_bytes) {
        case 2: return run(static_cast<int16_t*>(nullptr));
        case 4: return run(static_cast<int32_t*>(nullptr));
        case 8: return run(static_cast<int64_t*>(nullptr));
        default: return SEQARCH_BAD_ARGUMENT;
    }
}
