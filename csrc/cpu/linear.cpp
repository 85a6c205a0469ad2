// A linear map of a few rows. See seqarch.h.
//
// Its time is that of reading the weights: each of their rows is read once, and meets all rows of x, which stay in the
// cache, while it is there. A result is computed by one thread, so it does not depend on how many there are.
#include <algorithm>
#include <type_traits>

#include "dtypes.h"
#include "memory.h"
#include "seqarch.h"
#include "vectors.h"

namespace {

using namespace seqarch;

constexpr int kRows = 4, kSums = 4;          // of x at once, and of one product, added up side by side
constexpr int64_t kSmallWork = 1 << 20;  // weights fewer than starting the threads is worth

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

// y[r] = x[r] . weight for `Rows` rows of x, `stride` apart.
template <int Rows, class T, class A>
inline void products(int64_t depth, const T* weight, const A* x, int64_t stride, A* y) {
    constexpr int64_t L = kLanes<A>, kSides = kSums / Rows ? kSums / Rows : 1;
    Vector<A> sum[Rows][kSides] = {};
    int64_t k = 0;
    for (; k + kSides * L <= depth; k += kSides * L)
#pragma GCC unroll 4
        for (int64_t side = 0; side < kSides; ++side) {
            const Vector<A> w = load_wide(weight + k + side * L);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) sum[r][side] += w * load_vector(x + r * stride + k + side * L);
        }
    for (int r = 0; r < Rows; ++r) {
        for (int64_t side = 1; side < kSides; ++side) sum[r][0] += sum[r][side];
        y[r] = 0;
        for (int64_t l = 0; l < L; ++l) y[r] += sum[r][0][l];
        for (int64_t i = k; i < depth; ++i) y[r] += load(weight[i]) * x[r * stride + i];
    }
}

template <class T, class A>
void linear(const A* x, const T* weight, const A* bias, T* y, int64_t rows, int64_t depth, int64_t width, int threads) {
    const int team = width * depth < kSmallWork ? 1 : std::max(1, threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t j = 0; j < width; ++j) {
        const A add = bias ? bias[j] : A(0);
        for (int64_t first = 0; first < rows; first += kRows) {
            const int64_t count = std::min<int64_t>(kRows, rows - first);
            const A* part = x + first * depth;
            A sums[kRows];
            switch (count) {
                case 1: products<1>(depth, weight + j * depth, part, depth, sums); break;
                case 2: products<2>(depth, weight + j * depth, part, depth, sums); break;
                case 3: products<3>(depth, weight + j * depth, part, depth, sums); break;
                default: products<4>(depth, weight + j * depth, part, depth, sums);
            }
            for (int64_t r = 0; r < count; ++r) store(y + (first + r) * width + j, sums[r] + add);
        }
    }
}

}  // namespace

int32_t seqarch_linear(int32_t dtype, const void* x, const void* weight, const void* bias, void* y, int64_t rows,
                       int64_t depth, int64_t width, int32_t num_threads) {
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
