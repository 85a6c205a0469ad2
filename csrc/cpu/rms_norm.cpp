// RMS norm with an optional gate, forward and backward. See seqarch.h for the equation and the arguments.
//
// Rows are taken in blocks of a fixed number, each by one thread. The gradient of the weights is summed in every block
// and then over the blocks in their order, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

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

constexpr int64_t kRowBlock = 256;
constexpr int64_t kSmallWork = 1 << 14;  // fewer numbers than starting the threads is worth

enum class Gate { none, silu_before, sigmoid_before, silu_after, sigmoid_after };

constexpr bool is_before(Gate gate) { return gate == Gate::silu_before || gate == Gate::sigmoid_before; }
constexpr bool is_silu(Gate gate) { return gate == Gate::silu_before || gate == Gate::silu_after; }

template <class T>
struct Problem {
    Heads<T> x, z;
    const T* weight;
    T eps, factor;
    int64_t length, heads, width, weights, rows;

    const T* at(const Heads<T>& tensor, int64_t row) const {
        const int64_t head = row % heads, step = row / heads;
        return tensor.data + step / length * tensor.batch + step % length * tensor.time + head * tensor.head;
    }
    int64_t weight_of(int64_t row) const { return row % heads % weights * width; }
};

// The gate of a number, and its derivative.
template <Gate G, class T>
inline T gate(T z) {
    const T s = seqarch::sigmoid(z);
    return is_silu(G) ? z * s : s;
}
template <Gate G, class T>
inline T gate_slope(T z) {
    const T s = seqarch::sigmoid(z);
    return is_silu(G) ? s * (T(1) + z * (T(1) - s)) : s * (T(1) - s);
}

template <Gate G, class T>
void forward_rows(const Problem<T>& p, int64_t begin, int64_t end, T* y, T* scale) {
    const int64_t n = p.width;
    for (int64_t row = begin; row < end; ++row) {
        const T* __restrict x = p.at(p.x, row);
        const T* __restrict z = G == Gate::none ? nullptr : p.at(p.z, row);
        const T* __restrict weight = p.weight ? p.weight + p.weight_of(row) : nullptr;
        T* __restrict out = y + row * n;
        T squares = 0;
        if constexpr (is_before(G)) {
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < n; ++i) {
                out[i] = x[i] * gate<G>(z[i]);
                squares += out[i] * out[i];
            }
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
        }
        const T own = T(1) / std::sqrt(squares / static_cast<T>(n) + p.eps), times = own * p.factor;
        scale[row] = own;
        const T* __restrict from = is_before(G) ? out : x;
        if (weight) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) out[i] = from[i] * times * weight[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) out[i] = from[i] * times;
        }
        if constexpr (G == Gate::silu_after || G == Gate::sigmoid_after) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) out[i] *= gate<G>(z[i]);
        }
    }
}

template <class T>
struct Gradients {
    Heads<T> dy;
    const T* scale;
    T *dx, *dz, *dweight;
};

// With u the numbers that are normed, r their scale and g the gradient of u r: du = r (g - u r mean(g u r)).
template <Gate G, class T>
void backward_rows(const Problem<T>& p, const Gradients<T>& g, int64_t begin, int64_t end, T* scratch, T* share) {
    const int64_t n = p.width;
    T *__restrict normed = scratch, *__restrict inner = scratch + n;
    for (int64_t row = begin; row < end; ++row) {
        const T *__restrict x = p.at(p.x, row), *__restrict dy = p.at(g.dy, row);
        const T* __restrict z = G == Gate::none ? nullptr : p.at(p.z, row);
        const T* __restrict weight = p.weight ? p.weight + p.weight_of(row) : nullptr;
        T* __restrict dweight = p.weight ? share + p.weight_of(row) : nullptr;
        T *__restrict dx = g.dx + row * n, *__restrict dz = G == Gate::none ? nullptr : g.dz + row * n;
        const T r = g.scale[row];
        T along = 0;
        // inner: first the gradient of u r times the weights, then that of u r
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            if constexpr (is_before(G)) {
                normed[i] = x[i] * gate<G>(z[i]) * r;
                inner[i] = dy[i] * p.factor;
            } else if constexpr (G == Gate::none) {
                normed[i] = x[i] * r;
                inner[i] = dy[i] * p.factor;
            } else {
                normed[i] = x[i] * r;
                inner[i] = dy[i] * p.factor * gate<G>(z[i]);
                dz[i] = dy[i] * p.factor * normed[i] * gate_slope<G>(z[i]);
            }
        }
        if (weight) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                dweight[i] += inner[i] * normed[i];
                inner[i] *= weight[i];
            }
            if constexpr (G == Gate::silu_after || G == Gate::sigmoid_after) {
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) dz[i] *= weight[i];
            }
        }
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < n; ++i) along += inner[i] * normed[i];
        along /= static_cast<T>(n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const T du = r * (inner[i] - normed[i] * along);
            if constexpr (is_before(G)) {
                dx[i] = du * gate<G>(z[i]);
                dz[i] = du * x[i] * gate_slope<G>(z[i]);
            } else {
                dx[i] = du;
            }
        }
    }
}

template <Gate G, class T>
void forward(const Problem<T>& p, T* y, T* scale, int num_threads) {
    const int64_t blocks = (p.rows + kRowBlock - 1) / kRowBlock;
    seqarch::parallel_for(blocks, p.rows * p.width > kSmallWork ? num_threads : 1, [&](int64_t b) {
        forward_rows<G>(p, b * kRowBlock, std::min((b + 1) * kRowBlock, p.rows), y, scale);
    });
}

template <Gate G, class T>
void backward(const Problem<T>& p, const Gradients<T>& g, int num_threads) {
    const int64_t blocks = (p.rows + kRowBlock - 1) / kRowBlock, size = p.weight ? p.weights * p.width : 0;
    const int64_t each = 2 * p.width + size;
    std::vector<T> memory(std::max<int64_t>(blocks, 1) * each);
    seqarch::parallel_for(blocks, p.rows * p.width > kSmallWork ? num_threads : 1, [&](int64_t b) {
        T* own = memory.data() + b * each;
        backward_rows<G>(p, g, b * kRowBlock, std::min((b + 1) * kRowBlock, p.rows), own, own + 2 * p.width);
    });
    if (!g.dweight) return;
    std::fill_n(g.dweight, size, T(0));
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < size; ++i) g.dweight[i] += memory[b * each + 2 * p.width + i];
}

bool valid(const seqarch_rms_norm_inputs& in, int num_threads) {
    return num_threads > 0 && in.weights > 0 && countable({in.batch, in.length, in.heads, in.width}) &&
           countable({in.weights, in.width}) && in.dtype != SEQARCH_BFLOAT16 &&
           (in.z.data ? in.activation == SEQARCH_SILU || in.activation == SEQARCH_SIGMOID
                      : in.activation == SEQARCH_IDENTITY);
}

template <class T>
Problem<T> problem(const seqarch_rms_norm_inputs& in) {
    return {Heads<T>(in.x), Heads<T>(in.z), static_cast<const T*>(in.weight), static_cast<T>(in.eps),
            static_cast<T>(in.factor), in.length, in.heads, in.width, in.weights, in.batch * in.length * in.heads};
}

// run(type, gate) with the gate as a constant.
template <class Run>
int32_t with_gate(const seqarch_rms_norm_inputs& in, Run run) {
    return with_dtype(in.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, seqarch::bfloat16>) {
            const bool silu = in.activation == SEQARCH_SILU;
            if (!in.z.data) return run(type, std::integral_constant<Gate, Gate::none>());
            if (in.gate_first && silu) return run(type, std::integral_constant<Gate, Gate::silu_before>());
            if (in.gate_first) return run(type, std::integral_constant<Gate, Gate::sigmoid_before>());
            if (silu) return run(type, std::integral_constant<Gate, Gate::silu_after>());
            run(type, std::integral_constant<Gate, Gate::sigmoid_after>());
        }
    });
}

}  // namespace

int32_t seqarch_rms_norm_forward(const seqarch_rms_norm_inputs* inputs, const seqarch_rms_norm_outputs* outputs,
                                 int32_t num_threads) {
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_gate(*inputs, [&](auto* type, auto gate) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward<gate.value>(problem<T>(*inputs), static_cast<T*>(outputs->y), static_cast<T*>(outputs->scale),
                            num_threads);
    });
}

int32_t seqarch_rms_norm_backward(const seqarch_rms_norm_inputs* inputs, const seqarch_rms_norm_gradients* gradients,
                                  int32_t num_threads) {
    const auto& g = *gradients;
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_gate(*inputs, [&](auto* type, auto gate) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Gradients<T> found{Heads<T>(g.dy), static_cast<const T*>(g.scale), static_cast<T*>(g.dx),
                                 static_cast<T*>(g.dz), static_cast<T*>(g.dweight)};
        backward<gate.value>(problem<T>(*inputs), found, num_threads);
    });
}
