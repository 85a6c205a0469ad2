// A linear map of a few rows. See seqarch.h.
//
// Its time is that of reading the weights: each of their rows is read once, and meets all rows of x, which stay in the
// cache, while it is there. A result is computed by one thread, so it does not depend on how many there are.
#include "linear.h"

#include "arguments.h"
#include "dtypes.h"
#include "buffer.h"
#include "parallel.h"
#include "seqarch.h"

namespace {

using namespace seqarch;

constexpr int64_t kSmallWork = 1 << 20;  // weights fewer than starting the threads is worth

template <class T, class A>
void linear(const A* x, const T* weight, const A* bias, T* y, int64_t rows, int64_t depth, int64_t width, int threads) {
    const int team = width * depth < kSmallWork ? 1 : threads;
    parallel_for(width, team, [&](int64_t j) {
        products_of_all(rows, depth, weight + j * depth, x, depth,
                        [=](int64_t r, A sum) { store(y + r * width + j, sum + (bias ? bias[j] : A(0))); });
    });
}

}  // namespace

int32_t seqarch_linear(const seqarch_linear_arguments* arguments, int32_t num_threads) {
    const auto& a = *arguments;
    if (num_threads < 1 || !countable({a.rows, a.depth}) || !countable({a.rows, a.width}) ||
        !countable({a.depth, a.width}))
        return SEQARCH_BAD_ARGUMENT;
    return with_dtype(a.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = typename accumulation<T>::type;
        const T *given = static_cast<const T*>(a.x), *shift = static_cast<const T*>(a.bias);
        const Buffer<A> wide(a.rows * a.depth), add(shift ? a.width : 0);
        for (int64_t i = 0; i < a.rows * a.depth; ++i) wide[i] = load(given[i]);
        for (int64_t j = 0; shift && j < a.width; ++j) add[j] = load(shift[j]);
        linear(+wide, static_cast<const T*>(a.weight), shift ? +add : nullptr, static_cast<T*>(a.y), a.rows, a.depth,
               a.width, num_threads);
    });
}
