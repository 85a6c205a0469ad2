// Small dense products on buffers in the cache, and what goes with them: packing, transposing.
//
// A buffer holds rows of accumulation type, each padded with zeros to whole vectors, so that no inner loop has a
// remainder. Rows beyond those in use may hold anything; results that would read them are masked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace seqarch {

// A tile of kTileRows x kTileVectors sums must stay in registers beside kTileVectors of the right factor and one of the
// left: 16 + 4 + 1 of 32, or 12 + 3 + 1 of 16. It also has to be that large: a processor begins two multiply-adds in a
// cycle and each takes four, so that fewer than eight sums would wait for one another.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileVectors = 4;  // 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileVectors = 3;  // 16 registers
#else
constexpr int kVectorBytes = 16, kTileVectors = 3;
#endif
constexpr int kTileRows = 4;

template <class A>
struct vector_of {
    typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename vector_of<A>::type;
template <class A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

template <class A>
constexpr int64_t padded(int64_t n) {
    return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
inline Vector<A> load_vector(const A* from) {
    Vector<A> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class A>
inline void store_vector(A* to, Vector<A> x) {
    std::memcpy(to, &x, sizeof x);
}
template <class A>
inline Vector<A> splat(A x) {
    return x - Vector<A>{};
}
// The sum of the lanes, halves added to halves.
template <int Lanes, class V>
inline auto sum_of_first(V x) {
    if constexpr (Lanes == 1) {
        return x[0];
    } else {
        decltype(x < x) from{};
        for (int l = 0; l < Lanes / 2; ++l) from[l] = l + Lanes / 2;
        return sum_of_first<Lanes / 2>(x + __builtin_shuffle(x, from));
    }
}
template <class V>
inline auto sum_of_lanes(V x) {
    return sum_of_first<static_cast<int>(sizeof(V) / sizeof(x[0]))>(x);
}
// 0, 1, 2, ...
template <class A>
inline Vector<A> lane_numbers() {
    Vector<A> x{};
    for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = A(i);
    return x;
}

// power_of_two of each lane.
inline Vector<float> power_of_two(Vector<float> x) {
    x = x < -127.0f ? splat(-127.0f) : x;
    const Vector<float> shifted = x + 12583039.0f, series = power_of_two_series(x - (shifted - 12583039.0f));
    return series * reinterpret_cast<Vector<float>>(reinterpret_cast<Vector<uint32_t>>(shifted) << 23);
}
inline Vector<double> power_of_two(Vector<double> x) {
    for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = power_of_two(static_cast<double>(x[i]));
    return x;
}

// Hands out parts of one allocation, each at a cache line and full of zeros; without memory it only counts.
template <class A>
class Arena {
    A* base;

  public:
    int64_t used = 0;
    explicit Arena(A* base = nullptr) : base(base) {}
    A* take(int64_t count) {
        A* part = take_unwritten(count);
        if (part) std::fill_n(part, count, A(0));
        return part;
    }
    A* take_unwritten(int64_t count) {
        constexpr int64_t kLine = 64 / sizeof(A);
        A* part = base ? base + used : nullptr;
        used += (count + kLine - 1) / kLine * kLine;
        return part;
    }
};

// The left factor of a product: its element (i, p) is data[i row + p step]. Each is read alone and spread over a
// vector, so that a factor costs the same as it is and transposed.
template <class A>
struct Left {
    const A* data;
    int64_t row, step;
};
template <class A>
inline Left<A> as_is(const A* x, int64_t row) {
    return {x, row, 1};
}
template <class A>
inline Left<A> transposed(const A* x, int64_t row) {
    return {x, 1, row};
}

// c [Rows, Vectors] = (add ? c : 0) + a b, in registers. Rows of b and c must have Vectors whole vectors.
template <class A, int Rows, int Vectors>
inline void tile(int64_t depth, const Left<A>& a, const A* b, int64_t b_row, A* c, int64_t c_row, bool add) {
    constexpr int64_t L = kLanes<A>;
    Vector<A> sum[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? load_vector(c + r * c_row + v * L) : Vector<A>{};
    for (int64_t p = 0; p < depth; ++p) {
        Vector<A> right[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) right[v] = load_vector(b + p * b_row + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Vector<A> left = splat(a.data[r * a.row + p * a.step]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) store_vector(c + r * c_row + v * L, sum[r][v]);
}

// The same where fewer rows or vectors may be left, at least one of each.
template <class A, int Rows, int Vectors>
void tile_of(int64_t rows, int64_t vectors, int64_t depth, const Left<A>& a, const A* b, int64_t b_row, A* c,
             int64_t c_row, bool add) {
    if constexpr (Rows > 1)
        if (rows < Rows) return tile_of<A, Rows - 1, Vectors>(rows, vectors, depth, a, b, b_row, c, c_row, add);
    if constexpr (Vectors > 1)
        if (vectors < Vectors) return tile_of<A, Rows, Vectors - 1>(rows, vectors, depth, a, b, b_row, c, c_row, add);
    tile<A, Rows, Vectors>(depth, a, b, b_row, c, c_row, add);
}

// What of some rows of a product is computed: the results in columns [left, right), whole vectors, as sums over the
// depths [first, last).
struct Part {
    int64_t left, right, first, last;
};

// c [m, ...] = (add ? c : 0) + a b, of every kTileRows rows from i on what part(i, their end) says. Other results keep
// what they held. Rows of b and c must be padded to whole vectors, and c must overlap neither factor. Panels of b as
// wide as a tile come first: one stays in the first-level cache while all rows of a pass over it.
template <class A, class PartOf>
void multiply_parts(int64_t m, Left<A> a, const A* b, int64_t b_row, A* c, int64_t c_row, bool add, int64_t n,
                    PartOf part_of) {
    constexpr int64_t L = kLanes<A>, kPanel = kTileVectors * L;
    for (int64_t j = 0; j < n; j += kPanel)
        for (int64_t i = 0; i < m; i += kTileRows) {
            const int64_t rows = std::min<int64_t>(kTileRows, m - i);
            const Part part = part_of(i, i + rows);
            const int64_t from = std::max(j, part.left), to = std::min(j + kPanel, part.right);
            if (from >= to) continue;
            const Left<A> left{a.data + i * a.row + part.first * a.step, a.row, a.step};
            tile_of<A, kTileRows, kTileVectors>(rows, (to - from) / L, part.last - part.first, left,
                                                b + part.first * b_row + from, b_row, c + i * c_row + from, c_row,
                                                add);
        }
}

// Which elements of a product's results or of its left factor matter: all; only the results (i, j) with j <= i; or all
// results where the left factor's elements (i, p) are zero for p > i, or for p < i.
enum class Shape { full, lower_result, lower_left, upper_left };

// c [m, n] = (add ? c : 0) + a [m, depth] b [depth, n]; n is rounded up to whole vectors. Zeros are skipped by blocks
// of kTileRows rows, so the elements of such a block beside its diagonal are read, or written. What multiply_parts asks
// of the buffers holds here.
template <class A>
void multiply(Shape shape, int64_t m, int64_t n, int64_t depth, Left<A> a, const A* b, int64_t b_row, A* c,
              int64_t c_row, bool add) {
    n = padded<A>(n);
    multiply_parts(m, a, b, b_row, c, c_row, add, n, [=](int64_t i, int64_t end) -> Part {
        return {0, shape == Shape::lower_result ? std::min(padded<A>(end), n) : n, shape == Shape::upper_left ? i : 0,
                shape == Shape::lower_left ? std::min(depth, end) : depth};
    });
}

// One step of a transposition of L rows of L lanes: swaps the off-diagonal blocks of Distance x Distance.
template <class A, int Distance>
inline void swap_blocks(Vector<A>* rows) {
    constexpr int L = kLanes<A>;
    typedef std::conditional_t<sizeof(A) == 4, int32_t, std::conditional_t<sizeof(A) == 2, int16_t, int64_t>> Int;
    Vector<Int> low{}, high{};
    for (int x = 0; x < L; ++x) {
        low[x] = x & Distance ? L + x - Distance : x;
        high[x] = x & Distance ? L + x : x + Distance;
    }
#pragma GCC unroll 32
    for (int i = 0; i < L; ++i) {
        if (i & Distance) continue;
        const Vector<A> first = rows[i], second = rows[i + Distance];
        rows[i] = __builtin_shuffle(first, second, low);
        rows[i + Distance] = __builtin_shuffle(first, second, high);
    }
}

// to [columns, rows] = from [rows, columns] transposed, in whole blocks of vectors. Both buffers must have padded rows,
// and as many of them as a padded number; they must not overlap.
template <class A>
void transpose(int64_t rows, int64_t columns, const A* from, int64_t from_row, A* to, int64_t to_row) {
    constexpr int L = kLanes<A>;
    for (int64_t i = 0; i < rows; i += L)
        for (int64_t j = 0; j < columns; j += L) {
            Vector<A> block[L];
#pragma GCC unroll 32
            for (int r = 0; r < L; ++r) block[r] = load_vector(from + (i + r) * from_row + j);
            if constexpr (L >= 32) swap_blocks<A, 16>(block);
            if constexpr (L >= 16) swap_blocks<A, 8>(block);
            if constexpr (L >= 8) swap_blocks<A, 4>(block);
            if constexpr (L >= 4) swap_blocks<A, 2>(block);
            swap_blocks<A, 1>(block);
#pragma GCC unroll 32
            for (int r = 0; r < L; ++r) store_vector(to + (j + r) * to_row + i, block[r]);
        }
}

// Rows of any number type into a buffer, times `factor`; what pads its rows becomes 0. to_row must be at least
// `columns`, and the buffer must not overlap `from`.
template <class T, class A>
void pack(int64_t rows, int64_t columns, const T* from, int64_t from_row, A factor, A* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
        const T* __restrict in = from + i * from_row;
        A* __restrict out = to + i * to_row;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) out[j] = factor * load(in[j]);
        for (int64_t j = columns; j < to_row; ++j) out[j] = 0;
    }
}

// The way back: rows of a buffer, times `factor`, into rows of any number type, which must not overlap it.
template <class T, class A>
void unpack(int64_t rows, int64_t columns, const A* from, int64_t from_row, A factor, T* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
        const A* __restrict in = from + i * from_row;
        T* __restrict out = to + i * to_row;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) store(out + j, factor * in[j]);
    }
}

// The sum of x y over n numbers, rounded up to whole vectors: both must be padded with zeros.
template <class A>
inline A dot(int64_t n, const A* x, const A* y) {
    Vector<A> sum{};
    for (int64_t i = 0; i < n; i += kLanes<A>) sum += load_vector(x + i) * load_vector(y + i);
    return sum_of_lanes(sum);
}

// The sum of x y, whatever their types.
template <class X, class Y>
inline typename accumulation<X>::type product(int64_t n, const X* x, const Y* y) {
    typename accumulation<X>::type sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += load(x[i]) * load(y[i]);
    return sum;
}

// to += the sum of `rows` rows, 1 to Most, each times its weight. `to` must not overlap them: so many are added at once
// that it is read and written once for all.
template <int64_t Most, class T, class A>
inline void add_rows(int64_t rows, int64_t n, const A* weights, int64_t step, const T* from, int64_t from_row, A* to) {
    if constexpr (Most > 1)
        if (rows < Most) return add_rows<Most - 1>(rows, n, weights, step, from, from_row, to);
    A* __restrict sums = to;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        A sum = sums[i];
#pragma GCC unroll 8
        for (int64_t r = 0; r < Most; ++r) sum += weights[r * step] * load(from[r * from_row + i]);
        sums[i] = sum;
    }
}

// to += from over whole vectors.
template <class A>
inline void add_row(int64_t width, const A* from, A* to) {
    for (int64_t x = 0; x < width; x += kLanes<A>) store_vector(to + x, load_vector(to + x) + load_vector(from + x));
}

// to += x y, elementwise over n numbers, rounded up to whole vectors.
template <class A>
inline void add_product(int64_t n, const A* x, const A* y, A* to) {
    for (int64_t i = 0; i < n; i += kLanes<A>)
        store_vector(to + i, load_vector(to + i) + load_vector(x + i) * load_vector(y + i));
}

}  // namespace seqarch
