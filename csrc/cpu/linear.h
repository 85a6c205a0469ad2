// Products of a few rows with weights that are read once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace seqarch {

constexpr int kRows = 4, kSums = 4;  // of x at once, and of one product, added up side by side
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

// y[r] = x[r] . weight for `Rows` rows of x, `stride` apart. One product is added up in kSums sums side by side, as a
// multiply-add takes four cycles and the next one need not wait for it.
template <int Rows, class T, class A>
inline void products(int64_t depth, const T* weight, const A* x, int64_t stride, A* y) {
    constexpr int64_t L = kLanes<A>, kSides = kSums / Rows ? kSums / Rows : 1;
    Vector<A> sum[Rows][kSides] = {};
    int64_t k = 0;
    for (; k + kSides * L <= depth; k += kSides * L)
#pragma GCC unroll 4
        for (int64_t side = 0; side < kSides; ++side) {
            __builtin_prefetch(weight + k + side * L + kAhead / sizeof(T));
            const Vector<A> w = load_wide(weight + k + side * L);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) sum[r][side] += w * load_vector(x + r * stride + k + side * L);
        }
    for (; k + L <= depth; k += L) {
        const Vector<A> w = load_wide(weight + k);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sum[r][0] += w * load_vector(x + r * stride + k);
    }
    for (int r = 0; r < Rows; ++r) {
        for (int64_t side = 1; side < kSides; ++side) sum[r][0] += sum[r][side];
        y[r] = sum_of_lanes(sum[r][0]);
        for (int64_t i = k; i < depth; ++i) y[r] += load(weight[i]) * x[r * stride + i];
    }
}

// One row of weights with all rows of x: finish(row, sum) for each.
template <class T, class A, class Finish>
inline void products_of_all(int64_t rows, int64_t depth, const T* weight, const A* x, int64_t stride, Finish finish) {
    for (int64_t first = 0; first < rows; first += kRows) {
        const int64_t count = std::min<int64_t>(kRows, rows - first);
        const A* part = x + first * stride;
        A sums[kRows];
        switch (count) {
            case 1: products<1>(depth, weight, part, stride, sums); break;
            case 2: products<2>(depth, weight, part, stride, sums); break;
            case 3: products<3>(depth, weight, part, stride, sums); break;
            default: products<4>(depth, weight, part, stride, sums);
        }
        for (int64_t r = 0; r < count; ++r) finish(first + r, sums[r]);
    }
}

}  // namespace seqarch
