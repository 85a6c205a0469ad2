// Rotary positions: the same function turns forward and, by the opposite angles, backward. See seqarch.h.
#include <algorithm>
#include <type_traits>

#include "arguments.h"
#include "dtypes.h"
#include "heads.h"
#include "numbers.h"
#include "parallel.h"
#include "seqarch.h"

namespace {

using seqarch::countable;
using seqarch::Heads;
using seqarch::with_dtype;

constexpr int64_t kSmallWork = 1 << 14;  // fewer numbers than starting the threads is worth

template <class T>
void turn(const seqarch_rotary_arguments& a, int num_threads) {
    const Heads<T> x(a.x);
    const T sign = a.back ? T(-1) : T(1);
    const int64_t tokens = a.batch * a.length, half = a.half;
    seqarch::parallel_for(tokens, tokens * a.heads * a.width > kSmallWork ? num_threads : 1, [&](int64_t token) {
        const int64_t batch = token / a.length, time = token % a.length;
        const int64_t place = (batch * a.table_stride + time) * half;
        const T *__restrict cosine = static_cast<const T*>(a.cosine) + place;
        const T *__restrict sine = static_cast<const T*>(a.sine) + place;
        for (int64_t head = 0; head < a.heads; ++head) {
            const T* __restrict from = x.data + batch * x.batch + time * x.time + head * x.head;
            T* __restrict to = static_cast<T*>(a.y) + (token * a.heads + head) * a.width;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const T s = sign * sine[i];
                to[i] = from[i] * cosine[i] - from[half + i] * s;
                to[half + i] = from[half + i] * cosine[i] + from[i] * s;
            }
            std::copy(from + 2 * half, from + a.width, to + 2 * half);
        }
    });
}

}  // namespace

int32_t seqarch_rotary(const seqarch_rotary_arguments* arguments, int32_t num_threads) {
    const auto& a = *arguments;
    if (num_threads < 1 || !countable({a.batch, a.length, a.heads, a.width}) ||
        !countable({std::max<int64_t>(a.batch, 1), a.length, std::max<int64_t>(a.half, 0)}) || a.half < 0 ||
        a.half > a.width / 2 || (a.table_stride != 0 && a.table_stride != a.length) || a.dtype == SEQARCH_BFLOAT16)
        return SEQARCH_BAD_ARGUMENT;
    return with_dtype(a.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, seqarch::bfloat16>) turn<T>(a, num_threads);
    });
}
