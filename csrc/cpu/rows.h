// Rows of activations (seqarch_rows) read into and written from numbers of the accumulation type.
#pragma once

#include "numbers.h"
#include "seqarch.h"

namespace seqarch {

inline bool known(const seqarch_rows& rows) {
    return !rows.data || (rows.dtype >= SEQARCH_FLOAT32 && rows.dtype <= SEQARCH_FLOAT64);
}

// The first element of a row, of which `place` was found by Sequences::place.
template <class T>
inline T* at(const seqarch_rows& rows, int64_t element) {
    return static_cast<T*>(rows.data) + element;
}

template <class T, class A>
inline void widen(const T* __restrict from, int64_t count, A* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(load(from[i]));
}

// `count` numbers from an element on.
template <class A>
inline void read(const seqarch_rows& rows, int64_t element, int64_t count, A* to) {
    switch (rows.dtype) {
        case SEQARCH_FLOAT32: return widen(at<float>(rows, element), count, to);
        case SEQARCH_BFLOAT16: return widen(at<bfloat16>(rows, element), count, to);
        default: return widen(at<double>(rows, element), count, to);
    }
}

template <class T, class N, class A>
inline void narrow(const A* __restrict from, int64_t count, T* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to + i, static_cast<N>(from[i]));
}

template <class A>
inline void write(const seqarch_rows& rows, int64_t element, int64_t count, const A* from) {
    switch (rows.dtype) {
        case SEQARCH_FLOAT32: return narrow<float, float>(from, count, at<float>(rows, element));
        case SEQARCH_BFLOAT16: return narrow<bfloat16, float>(from, count, at<bfloat16>(rows, element));
        default: return narrow<double, double>(from, count, at<double>(rows, element));
    }
}

}  // namespace seqarch
