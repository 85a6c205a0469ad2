// A linear map of a few rows. See seqarch.h.
//
// Its time is that of reading the weights: each of their rows is read once, and meets all rows of x, which stay in the
// cache, while it is there. A result is computed by one thread, so it does not depend on how many there are.
#include "linear.h"

#include "arguments.h"
#include "dtypes.h"
#include "memory.h"
#include "seqarch.h"

namespace {

using namespace seqarch;

constexpr int64_t kSmallWork = 1 << 20;  // weights fewer than starting the threads is worth

template <class T, class A>
void linear(const A* x, const T* weight, const A* bias, T* y, int64_t rows, int64_t depth, int64_t width, int threads) {
    const int team = width * depth < kSmallWork ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t j = 0; j < width; ++j)
        products_of_all(rows, depth, weight + j * depth, x, depth,
                        [=](int64_t r, A sum) { store(y + r * width + j, sum + (bias ? bias[j] : A(0))); });
}

}  // namespace

int32_t seqarch_linear(int32_t dtype, const void* x, const void* weight, const void* bias, void* y, int64_t rows,
                       int64_t depth, int64_t width, int32_t num_threads) {
    if (num_threads < 1 || !countable({rows, depth}) || !countable({rows, width}) || !countable({depth, width}))
        return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = typename accumulation<T>::type;
        const Buffer<A> wide(rows * depth), add(bias ? width : 0);
        for (int64_t i = 0; i < rows * depth; ++i) wide[i] = load(static_cast<const T*>(x)[i]);
        for (int64_t j = 0; bias && j < width; ++j) add[j] = load(static_cast<const T*>(bias)[j]);
        linear(+wide, static_cast<const T*>(weight), bias ? +add : nullptr, static_cast<T*>(y), rows, depth, width,
               num_threads);
    });
}
