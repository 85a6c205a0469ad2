// Products of a few rows with weights that are read once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace seqarch {

#ifdef __AVX512F__
constexpr int kRows = 8;  // of x that share what is read of a row of weights: their sums stay in registers
#else
constexpr int kRows = 4;
#endif
// Bytes of weights that are fetched early, as the processor itself stops at a page; beyond the last, which is harmless.
constexpr int64_t kAhead = 4096;

// The weights of one vector, in the accumulation type.
inline Vector<float> load_wide(const float* from) { return load_vector(from); }
inline Vector<double> load_wide(const double* from) { return load_vector(from); }
inline Vector<float> load_wide(const bfloat16* from) {
    typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    return __builtin_bit_cast(Vector<float>, __builtin_convertvector(bits, Wide) << 16);
}

// The lanes of `Blocks` blocks of each of two vectors, halves of a block added: those of the first, then the second's.
template <int Blocks, class V>
inline V add_halves(V first, V second) {
    constexpr int L = sizeof(V) / sizeof(first[0]), kHalf = L / Blocks / 2;
    decltype(first < first) low{};
    for (int x = 0; x < L; ++x) low[x] = x / kHalf * 2 * kHalf + x % kHalf;  // from L on, of the second
    return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, low + kHalf);
}
// y[r] = the sum of the lanes of x[r]; y has room for whole vectors. Vectors are merged two by two, so that several
// take little more than one.
template <int Rows, int Blocks = 1, class V, class A>
inline void sums_of_lanes(const V (&x)[Rows], A* y) {
    constexpr int L = sizeof(V) / sizeof(x[0][0]), kPairs = (Rows + 1) / 2;
    V merged[kPairs];
#pragma GCC unroll 8
    for (int r = 0; r < kPairs; ++r) merged[r] = add_halves<Blocks>(x[2 * r], x[std::min(2 * r + 1, Rows - 1)]);
    if constexpr (2 * Blocks < L)
        sums_of_lanes<kPairs, 2 * Blocks>(merged, y);
    else
        std::memcpy(y, merged, sizeof merged);
}

// y[r] = x[r] . weight for `Rows` rows of x, `stride` apart; y has room for whole vectors. A product of few rows is
// added up in several sums side by side, as a multiply-add takes four cycles and the next one need not wait for it.
template <int Rows, class T, class A>
inline void products(int64_t depth, const T* weight, const A* x, int64_t stride, A* y) {
    constexpr int64_t L = kLanes<A>, kSides = Rows == 1 ? 4 : Rows < 8 ? 2 : 1;
    Vector<A> sum[Rows][kSides] = {};
    int64_t k = 0;
    for (; k + kSides * L <= depth; k += kSides * L)
#pragma GCC unroll 4
        for (int64_t side = 0; side < kSides; ++side) {
            __builtin_prefetch(weight + k + side * L + kAhead / sizeof(T));
            const Vector<A> w = load_wide(weight + k + side * L);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) sum[r][side] += w * load_vector(x + r * stride + k + side * L);
        }
    for (; k + L <= depth; k += L) {
        const Vector<A> w = load_wide(weight + k);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) sum[r][0] += w * load_vector(x + r * stride + k);
    }
    Vector<A> whole[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        whole[r] = sum[r][0];
        for (int64_t side = 1; side < kSides; ++side) whole[r] += sum[r][side];
    }
    sums_of_lanes(whole, y);
    for (; k < depth; ++k)
        for (int r = 0; r < Rows; ++r) y[r] += load(weight[k]) * x[r * stride + k];
}

// run(count, first) for all of `rows`, up to `Most` at a time, with their count as a constant.
template <int Most, class Run>
inline void in_groups(int64_t rows, Run run, int64_t first = 0) {
    for (; first + Most <= rows; first += Most) run(std::integral_constant<int, Most>(), first);
    if constexpr (Most > 1)
        if (first < rows) in_groups<Most - 1>(rows, run, first);
}

// One row of weights with all rows of x: finish(row, sum) for each.
template <class T, class A, class Finish>
inline void products_of_all(int64_t rows, int64_t depth, const T* weight, const A* x, int64_t stride, Finish finish) {
    in_groups<kRows>(rows, [&](auto count, int64_t first) {
        A sums[padded<A>(decltype(count)::value)];
        products<decltype(count)::value>(depth, weight, x + first * stride, stride, sums);
        for (int r = 0; r < count; ++r) finish(first + r, sums[r]);
    });
}

}  // namespace seqarch
