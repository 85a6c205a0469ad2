// A gated linear unit's product, forward and backward. See seqarch.h for the equation and the arguments.
#include <type_traits>

#include "arguments.h"
#include "dtypes.h"
#include "numbers.h"
#include "parallel.h"
#include "seqarch.h"

namespace {

using seqarch::countable;
using seqarch::with_dtype;

constexpr int64_t kSmallWork = 1 << 14;  // fewer numbers than starting the threads is worth

template <class T>
void forward(const T* x, T* y, int64_t rows, int64_t width, int num_threads) {
    seqarch::parallel_for(rows, rows * width > kSmallWork ? num_threads : 1, [&](int64_t row) {
        const T *__restrict gate = x + 2 * row * width, *__restrict value = gate + width;
        T* __restrict out = y + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = gate[i] * seqarch::sigmoid(gate[i]) * value[i];
    });
}

template <class T>
void backward(const T* x, const T* dy, T* dx, int64_t rows, int64_t width, int num_threads) {
    seqarch::parallel_for(rows, rows * width > kSmallWork ? num_threads : 1, [&](int64_t row) {
        const T *__restrict gate = x + 2 * row * width, *__restrict value = gate + width;
        const T* __restrict upstream = dy + row * width;
        T *__restrict dgate = dx + 2 * row * width, *__restrict dvalue = dgate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const T s = seqarch::sigmoid(gate[i]);
            dgate[i] = upstream[i] * value[i] * s * (T(1) + gate[i] * (T(1) - s));
            dvalue[i] = upstream[i] * gate[i] * s;
        }
    });
}

bool valid(int64_t rows, int64_t width, int32_t dtype, int num_threads) {
    return num_threads > 0 && countable({rows, width, 2}) && dtype != SEQARCH_BFLOAT16;
}

}  // namespace

int32_t seqarch_swiglu_forward(const seqarch_swiglu_arguments* arguments, int32_t num_threads) {
    const auto& a = *arguments;
    if (!valid(a.rows, a.width, a.dtype, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(a.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, seqarch::bfloat16>)
            forward(static_cast<const T*>(a.x), static_cast<T*>(a.y), a.rows, a.width, num_threads);
    });
}

int32_t seqarch_swiglu_backward(const seqarch_swiglu_gradients* gradients, int32_t num_threads) {
    const auto& g = *gradients;
    if (!valid(g.rows, g.width, g.dtype, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(g.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, seqarch::bfloat16>)
            backward(static_cast<const T*>(g.x), static_cast<const T*>(g.dy), static_cast<T*>(g.dx), g.rows, g.width,
                     num_threads);
    });
}
