// One token through a list of instructions, of any layer whose step was captured. See seqarch.h.
//
// The calling thread goes through the instructions. Those with much to do are in pieces, which the other threads take
// as they come (team.h). A result is computed by one thread from the same numbers in the same order, so it does not
// depend on how many threads there are, nor on which of them took it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "arguments.h"
#include "buffer.h"
#include "flush_denormals.h"
#include "functions.h"
#include "linear.h"
#include "numbers.h"
#include "seqarch.h"
#include "small_weights.h"
#include "team.h"

namespace {

using namespace seqarch;

constexpr int64_t kSmallWork = 1 << 20;  // bytes of weights, fewer than starting the threads is worth
constexpr int64_t kPiece = 1 << 16;      // bytes of weights in a piece, or products
constexpr int64_t kRoom = 4096;          // results of a piece
constexpr int64_t kFetched = 2048, kMostFetched = 3 << 17;  // bytes of weights, at a time and in all
constexpr int64_t kTurns = 4096;         // of a thread that finds nothing to do, before others may have the processor
constexpr int64_t kBlock = 256;          // numbers of a pointwise instruction at a time, in the first cache
constexpr int64_t kColumns = 64;         // of a product at a time
constexpr int64_t kMostRegisters = 32;
constexpr int64_t kLine = 16;            // numbers of a line of the cache, which is one thread's

struct Range {
    int64_t begin, end;
};

Range share(int64_t n, Piece piece, int64_t unit = 1) {
    const int64_t units = (n + unit - 1) / unit;
    const auto from = [&](int64_t number) { return std::min(n, units * number / piece.of * unit); };
    return {from(piece.number), from(piece.number + 1)};
}

// A piece of an instruction.
struct Instruction {
    const seqarch_tape_instruction& i;
    const seqarch_view* views;
    const seqarch_step* steps;
    const uint8_t* prepared;  // x of a map with weights of few bits
    bool integers;
    Piece piece;

    float* data(int v) const { return static_cast<float*>(views[v].data); }
    int64_t stride(int v, int d) const { return views[v].strides[d]; }
    int64_t size(int d) const { return i.sizes[d]; }
};

SmallWeights small_weights(const seqarch_tape_instruction& i, const seqarch_view* views) {
    const void *codes = views ? views[2].data : nullptr, *scales = views ? views[4].data : nullptr;
    return {i.flags, static_cast<const uint8_t*>(codes), static_cast<const bfloat16*>(scales), i.sizes[1], i.sizes[3]};
}

bool has_small_weights(const seqarch_tape_instruction& i) { return i.kind == SEQARCH_MAP && i.flags >= SEQARCH_INT8; }

int64_t weight_bytes(const seqarch_tape_instruction& map) {
    if (has_small_weights(map)) return map.sizes[2] * small_weights(map, nullptr).row_bytes();
    return map.sizes[1] * map.sizes[2] * (map.flags == SEQARCH_BFLOAT16 ? 2 : 4);
}

// The results `own` of a map, at y for the first of them: of all rows y_row apart, of a row y_step.
template <class T>
void map_to(const Instruction& in, Range own, float* y, int64_t y_row, int64_t y_step) {
    const int64_t rows = in.size(0), depth = in.size(1), x_row = in.stride(1, 0);
    const float *x = in.data(1), *bias = in.data(3);
    const T* weight = static_cast<const T*>(in.views[2].data);
    for (int64_t j = own.begin; j < own.end; ++j) {
        const float add = bias ? bias[j] : 0.0f;
        products_of_all(rows, depth, weight + j * depth, x, x_row,
                        [&](int64_t r, float sum) { y[r * y_row + (j - own.begin) * y_step] = sum + add; });
    }
}

void map_to(const Instruction& in, Range own, float* y, int64_t y_row, int64_t y_step) {
    if (in.i.flags == SEQARCH_FLOAT32) return map_to<float>(in, own, y, y_row, y_step);
    if (in.i.flags == SEQARCH_BFLOAT16) return map_to<bfloat16>(in, own, y, y_row, y_step);
    const float* bias = in.data(3);
    small_products_of_all(small_weights(in.i, in.views), own.begin, own.end, in.size(0), in.integers, in.prepared,
                          [=](int64_t r, int64_t j, float sum) {
                              y[r * y_row + (j - own.begin) * y_step] = sum + (bias ? bias[j] : 0.0f);
                          });
}

Range outputs_of_map(const Instruction& in) { return share(in.size(2), in.piece, kLine); }

void map(const Instruction& in) {
    const Range own = outputs_of_map(in);
    map_to(in, own, in.data(0) + own.begin * in.stride(0, 1), in.stride(0, 0), in.stride(0, 1));
}

// The results of a map that lie in `room`, row after row, to their place.
void hand_over(const Instruction& in, const float* room) {
    const Range own = outputs_of_map(in);
    for (int64_t r = 0; r < in.size(0); ++r)
        for (int64_t j = own.begin; j < own.end; ++j) in.data(0)[r * in.stride(0, 0) + j * in.stride(0, 1)] = *room++;
}

// to[k] = f(k) for n numbers.
template <class A, class F>
inline void each(int64_t n, A* __restrict to, F f) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) to[k] = f(k);
}

// The same by functions that compilers do not turn into vector code.
template <class A, class F>
inline void each_alone(int64_t n, A* to, F f) {
    for (int64_t k = 0; k < n; ++k) to[k] = f(k);
}

// Whether all are in the range of sine() and cosine().
template <class A>
bool are_angles(int64_t n, const A* x) {
    A most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t k = 0; k < n; ++k) most = std::max(most, std::fabs(x[k]));
    return most <= A(kMostAngle);
}

template <class A>
void step(const seqarch_step& s, int64_t n, A* to, const A* a, const A* b, const A* c) {
    const A number = static_cast<A>(s.number), other = static_cast<A>(s.other);
    switch (s.code) {
        case SEQARCH_COPY: return each(n, to, [=](int64_t k) { return a[k]; });
        case SEQARCH_ADD: return each(n, to, [=](int64_t k) { return a[k] + number * b[k]; });
        case SEQARCH_MULTIPLY: return each(n, to, [=](int64_t k) { return a[k] * b[k]; });
        case SEQARCH_DIVIDE: return each(n, to, [=](int64_t k) { return a[k] / b[k]; });
        case SEQARCH_AFFINE: return each(n, to, [=](int64_t k) { return a[k] * number + other; });
        case SEQARCH_OVER: return each(n, to, [=](int64_t k) { return number / a[k]; });
        case SEQARCH_MAXIMUM: return each(n, to, [=](int64_t k) { return a[k] > b[k] || a[k] != a[k] ? a[k] : b[k]; });
        case SEQARCH_MINIMUM: return each(n, to, [=](int64_t k) { return a[k] < b[k] || a[k] != a[k] ? a[k] : b[k]; });
        case SEQARCH_CLAMP:
            return each(n, to, [=](int64_t k) { return a[k] < number ? number : a[k] > other ? other : a[k]; });
        case SEQARCH_WHERE: return each(n, to, [=](int64_t k) { return a[k] != A(0) ? b[k] : c[k]; });
        case SEQARCH_LESS: return each(n, to, [=](int64_t k) { return a[k] < b[k] ? A(1) : A(0); });
        case SEQARCH_LESS_EQUAL: return each(n, to, [=](int64_t k) { return a[k] <= b[k] ? A(1) : A(0); });
        case SEQARCH_EQUAL: return each(n, to, [=](int64_t k) { return a[k] == b[k] ? A(1) : A(0); });
        case SEQARCH_NOT: return each(n, to, [=](int64_t k) { return a[k] == A(0) ? A(1) : A(0); });
        case SEQARCH_ABSOLUTE: return each(n, to, [=](int64_t k) { return std::fabs(a[k]); });
        case SEQARCH_SQRT: return each(n, to, [=](int64_t k) { return std::sqrt(a[k]); });
        case SEQARCH_RSQRT: return each(n, to, [=](int64_t k) { return A(1) / std::sqrt(a[k]); });
        case SEQARCH_EXPONENTIAL: return each(n, to, [=](int64_t k) { return exponential(a[k]); });
        case SEQARCH_SIGMOID_OF: return each(n, to, [=](int64_t k) { return sigmoid(a[k]); });
        case SEQARCH_SILU_OF: return each(n, to, [=](int64_t k) { return a[k] * sigmoid(a[k]); });
        case SEQARCH_SOFTPLUS: return each(n, to, [=](int64_t k) { return softplus(a[k]); });
        case SEQARCH_SIGN_OF: return each(n, to, [=](int64_t k) { return A(a[k] > A(0)) - A(a[k] < A(0)); });
        case SEQARCH_FLOOR: return each(n, to, [=](int64_t k) { return std::floor(a[k]); });
        case SEQARCH_POWER: return each_alone(n, to, [=](int64_t k) { return std::pow(a[k], number); });
        case SEQARCH_REMAINDER:
            return each_alone(n, to, [=](int64_t k) { return a[k] - std::floor(a[k] / number) * number; });
        case SEQARCH_TANH: return each(n, to, [=](int64_t k) { return tanh_of(a[k]); });
        case SEQARCH_LOG: return each(n, to, [=](int64_t k) { return logarithm(a[k]); });
        case SEQARCH_LOG1P: return each(n, to, [=](int64_t k) { return logarithm_of_one_plus(a[k]); });
        case SEQARCH_EXPM1: return each(n, to, [=](int64_t k) { return exponential_minus_one(a[k]); });
        case SEQARCH_SINE:
            if (!are_angles(n, a)) return each_alone(n, to, [=](int64_t k) { return std::sin(a[k]); });
            return each(n, to, [=](int64_t k) { return sine(a[k]); });
        case SEQARCH_COSINE:
            if (!are_angles(n, a)) return each_alone(n, to, [=](int64_t k) { return std::cos(a[k]); });
            return each(n, to, [=](int64_t k) { return cosine(a[k]); });
        case SEQARCH_ERF: return each_alone(n, to, [=](int64_t k) { return std::erf(a[k]); });
        default: return;
    }
}

int64_t offset(const Instruction& in, int v, const int64_t* place, int dims) {
    int64_t sum = 0;
    for (int d = 0; d < dims; ++d) sum += place[d] * in.stride(v, d);
    return sum;
}

// Numbers of a view along its last dimension, side by side in the type A.
template <class A, class T>
const A* gather(const T* from, int64_t stride, int64_t n, A* to) {
    if constexpr (std::is_same_v<A, T>)
        if (stride == 1) return from;
    const A first = static_cast<A>(load(*from));
    if (stride == 0)
        each(n, to, [=](int64_t) { return first; });
    else if (stride == 1)
        each(n, to, [=](int64_t k) { return static_cast<A>(load(from[k])); });
    else if (stride == 2)  // a part of complex numbers, which compilers take apart by vectors
        each(n, to, [=](int64_t k) { return static_cast<A>(load(from[2 * k])); });
    else
        for (int64_t k = 0; k < n; ++k) to[k] = static_cast<A>(load(from[k * stride]));
    return to;
}

template <class A, class T>
void scatter(const A* from, int64_t n, T* to, int64_t stride) {
    if constexpr (std::is_same_v<A, T>)
        if (stride == 1) return static_cast<void>(std::copy_n(from, n, to));
    for (int64_t k = 0; k < n; ++k) store(to + k * stride, from[k]);
}

// f of the place of a view's numbers, as their type.
template <class F>
auto with_type_of(const seqarch_view& view, F f) {
    switch (view.dtype) {
        case SEQARCH_BFLOAT16: return f(static_cast<bfloat16*>(view.data));
        case SEQARCH_FLOAT64: return f(static_cast<double*>(view.data));
        case SEQARCH_INT64: return f(static_cast<int64_t*>(view.data));
        default: return f(static_cast<float*>(view.data));
    }
}

// Views: the outputs, then the inputs. Sources of a step: inputs, then the results of steps. In type A.
template <class A>
void elementwise(const Instruction& in) {
    const int outputs = in.i.outputs, inputs = in.i.inputs;
    const int64_t inner = in.size(4), parts = (inner + kBlock - 1) / kBlock;
    const int64_t outer = in.size(0) * in.size(1) * in.size(2) * in.size(3);
    alignas(64) A memory[kMostRegisters][kBlock];
    const A* source[kMostRegisters];
    const Range own = share(outer * parts, in.piece);
    for (int64_t t = own.begin; t < own.end; ++t) {
        int64_t place[5], rest = t / parts;
        for (int d = 3; d >= 0; --d) {
            place[d] = rest % in.size(d);
            rest /= in.size(d);
        }
        place[4] = t % parts * kBlock;
        const int64_t n = std::min(kBlock, inner - place[4]);
        for (int i = 0; i < inputs; ++i) {
            const int v = outputs + i;
            const int64_t at = offset(in, v, place, 5), stride = in.stride(v, 4);
            source[i] =
                with_type_of(in.views[v], [&](const auto* data) { return gather(data + at, stride, n, memory[i]); });
        }
        for (int s = 0; s < in.i.count; ++s) {
            const seqarch_step& one = in.steps[s];
            const auto operand = [&](int number) { return source[std::max(number, 0)]; };
            step(one, n, memory[inputs + s], operand(one.a), operand(one.b), operand(one.c));
            source[inputs + s] = memory[inputs + s];
        }
        for (int v = 0; v < outputs; ++v) {
            const A* from = source[in.steps[in.i.count + v].a];
            const int64_t at = offset(in, v, place, 5), stride = in.stride(v, 4);
            with_type_of(in.views[v], [&](auto* data) { scatter(from, n, data + at, stride); });
        }
    }
}

// The largest of sign row[k] and of `most`; NaN if one is.
float extreme(int64_t n, const float* row, int64_t stride, float most, float sign) {
    int64_t k = 0;
    if (stride == 1) {
        float side[kLine];
        std::fill_n(side, kLine, most);
        for (; k + kLine <= n; k += kLine)
#pragma omp simd
            for (int64_t i = 0; i < kLine; ++i) {
                const float next = sign * row[k + i];
                side[i] = next > side[i] || next != next ? next : side[i];
            }
        for (float next : side)
            if (next > most || next != next) most = next;
    }
    for (; k < n; ++k) {
        const float next = sign * row[k * stride];
        if (next > most || next != next) most = next;
    }
    return most;
}

// y [s0, s1, s2] from x [s0, s1, s2, s3, s4], over the last two.
void reduce(const Instruction& in) {
    const int64_t outer = in.size(0) * in.size(1) * in.size(2), stride = in.stride(1, 4);
    const Range own = share(outer, in.piece);
    for (int64_t t = own.begin; t < own.end; ++t) {
        const int64_t place[3] = {t / in.size(2) / in.size(1), t / in.size(2) % in.size(1), t % in.size(2)};
        const float* x = in.data(1) + offset(in, 1, place, 3);
        float result = in.i.flags == 0 ? 0.0f : in.i.flags == 1 ? -std::numeric_limits<float>::infinity()
                                                                : std::numeric_limits<float>::infinity();
        for (int64_t a = 0; a < in.size(3); ++a) {
            const float* row = x + a * in.stride(1, 3);
            float sum = 0.0f;
            switch (in.i.flags) {
                case 0:
                    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
                        for (int64_t k = 0; k < in.size(4); ++k) sum += row[k];
                    } else {
                        for (int64_t k = 0; k < in.size(4); ++k) sum += row[k * stride];
                    }
                    result += sum;
                    break;
                case 1: result = extreme(in.size(4), row, stride, result, 1.0f); break;
                default: result = -extreme(in.size(4), row, stride, -result, -1.0f);
            }
        }
        in.data(0)[offset(in, 0, place, 3)] = result * static_cast<float>(in.i.factor);
    }
}

// y[r][x] += sum_j weight[r][j] rows[j stride + x] over n rows of `numbers` numbers, for `Rows` rows of weights and of
// sums, which stay in registers: what is read of a row serves all of them.
template <int Rows, int Wide, class T>
int64_t add_weighted(int64_t n, int64_t from, int64_t to, const float* weight, int64_t weight_row, const T* rows,
                     int64_t stride, float* y, int64_t y_row) {
    constexpr int64_t L = kLanes<float>;
    for (; from + Wide * L <= to; from += Wide * L) {
        Vector<float> sum[Rows][Wide];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < Wide; ++i) sum[r][i] = load_vector(y + r * y_row + from + i * L);
        for (int64_t j = 0; j < n; ++j) {
            Vector<float> row[Wide];
#pragma GCC unroll 4
            for (int i = 0; i < Wide; ++i) row[i] = load_wide(rows + j * stride + from + i * L);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < Wide; ++i) sum[r][i] += weight[r * weight_row + j] * row[i];
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < Wide; ++i) store_vector(y + r * y_row + from + i * L, sum[r][i]);
    }
    return from;
}

template <int Rows, class T>
void add_weighted(int64_t n, int64_t numbers, const float* weight, int64_t weight_row, const T* rows, int64_t stride,
                  float* y, int64_t y_row) {
    constexpr int kWide = std::min(4, 2 * kRows / Rows);  // 16 sums of 32 registers, or 8 of 16
    int64_t x = add_weighted<Rows, kWide>(n, 0, numbers, weight, weight_row, rows, stride, y, y_row);
    x = add_weighted<Rows, 1>(n, x, numbers, weight, weight_row, rows, stride, y, y_row);
    for (; x < numbers; ++x)
        for (int r = 0; r < Rows; ++r)
            for (int64_t j = 0; j < n; ++j) y[r * y_row + x] += weight[r * weight_row + j] * load(rows[j * stride + x]);
}

float product_of_strided(int64_t n, const float* a, int64_t a_step, const float* b, int64_t b_step) {
    if (a_step == 1 && b_step == 1) return product(n, a, b);
    float sum = 0.0f;
    for (int64_t k = 0; k < n; ++k) sum += a[k * a_step] * b[k * b_step];
    return sum;
}

// y [s0, s1, M, N] = a [s0, s1, M, K] b [s0, s1, K, N]. A block of b's columns serves all M rows of a while it is in
// the cache; the columns of a piece are whole blocks.
void product_of(const Instruction& in) {
    const int64_t M = in.size(2), N = in.size(3), K = in.size(4), blocks = (N + kColumns - 1) / kColumns;
    const int64_t a_step = in.stride(1, 3), b_step = in.stride(2, 2), b_column = in.stride(2, 3),
                  y_step = in.stride(0, 3);
    const Range own = share(in.size(0) * in.size(1) * blocks, in.piece);
    for (int64_t t = own.begin; t < own.end; ++t) {
        const int64_t place[2] = {t / blocks / in.size(1), t / blocks % in.size(1)};
        const int64_t first = t % blocks * kColumns, columns = std::min(kColumns, N - first);
        const float* b = in.data(2) + offset(in, 2, place, 2) + first * b_column;
        for (int64_t m = 0; m < M; ++m) {
            const float* a = in.data(1) + offset(in, 1, place, 2) + m * in.stride(1, 2);
            float* y = in.data(0) + offset(in, 0, place, 2) + m * in.stride(0, 2) + first * y_step;
            alignas(64) float sum[kColumns] = {};
            if (b_column == 1 && columns > 1) {
                alignas(64) float part[kBlock];
                for (int64_t k = 0; k < K; k += kBlock) {
                    const int64_t n = std::min(kBlock, K - k);
                    add_weighted<1>(n, columns, gather(a + k * a_step, a_step, n, part), 0, b + k * b_step, b_step, sum,
                                    0);
                }
            } else {
                for (int64_t j = 0; j < columns; ++j)
                    sum[j] = product_of_strided(K, a, a_step, b + j * b_column, b_step);
            }
            scatter(sum, columns, y, y_step);
        }
    }
}

// A step of channels [begin, end) of one row, of which state has the inputs before.
template <int Taps>
void convolve(Range own, int64_t channels, const float* __restrict x, const float* __restrict weight, const float* bias,
              float* __restrict state, float* __restrict y) {
#pragma omp simd
    for (int64_t c = own.begin; c < own.end; ++c) {
        float sum = weight[c * Taps + Taps - 1] * x[c], after = x[c];
#pragma GCC unroll 8
        for (int w = Taps - 2; w >= 0; --w) {
            const float held = state[w * channels + c];
            sum += weight[c * Taps + w] * held;
            state[w * channels + c] = after;
            after = held;
        }
        y[c] = sum;
    }
    if (bias)
        each(own.end - own.begin, y + own.begin, [=](int64_t k) { return y[own.begin + k] + bias[own.begin + k]; });
}

constexpr int kMostTaps = 8;  // as seqarch_causal_conv1d_forward takes

template <int Taps = 2>
void convolve(int64_t taps, Range own, int64_t channels, const float* x, const float* weight, const float* bias,
              float* state, float* y) {
    if (taps == Taps) return convolve<Taps>(own, channels, x, weight, bias, state, y);
    if constexpr (Taps < kMostTaps) convolve<Taps + 1>(taps, own, channels, x, weight, bias, state, y);
}

// Views y, x, weight, bias, state; sizes B, D, W.
void convolve(const Instruction& in) {
    const Range own = share(in.size(1), in.piece, kLine);
    for (int64_t r = 0; r < in.size(0); ++r) {
        float* y = in.data(0) + r * in.stride(0, 0);
        convolve(in.size(2), own, in.size(1), in.data(1) + r * in.stride(1, 0), in.data(2), in.data(3),
                 in.data(4) + r * in.stride(4, 0), y);
        if (in.i.flags) each(own.end - own.begin, y + own.begin, [=](int64_t k) {
            const float z = y[own.begin + k];
            return z * sigmoid(z);
        });
    }
}

// Views y, x, dt, A, B, C, D, z, dt_bias, state; sizes B, D, N; flags: 1 softplus, 2 scale_input.
int32_t scan(const Instruction& in) {
    const int64_t channels = in.size(1), states = in.size(2);
    const Range own = share(channels, in.piece, kLine);
    int32_t code = SEQARCH_OK;
    for (int64_t r = 0; r < in.size(0) && own.begin < own.end; ++r) {
        const auto rows = [&](int v, int64_t first) {
            float* data = in.data(v);
            return seqarch_rows{data ? data + r * in.stride(v, 0) + first : nullptr, 0, 0, SEQARCH_FLOAT32};
        };
        const auto channel = [&](int v) { return in.data(v) ? in.data(v) + own.begin : nullptr; };
        float* state = in.data(9) + r * in.stride(9, 0) + own.begin * states;
        seqarch_selective_scan_inputs a{};
        a.dtype = SEQARCH_FLOAT32;
        a.softplus = in.i.flags & 1;
        a.scale_input = in.i.flags >> 1 & 1;
        a.x = rows(1, own.begin);
        a.dt = rows(2, own.begin);
        a.B = rows(4, 0);
        a.C = rows(5, 0);
        a.z = rows(7, own.begin);
        a.A = in.data(3) + own.begin * states;
        a.D = channel(6);
        a.dt_bias = channel(8);
        a.state = state;
        a.sequences = a.length = a.groups = a.chunk = 1;
        a.channels = own.end - own.begin;
        a.state_width = states;
        const seqarch_selective_scan_outputs out{rows(0, own.begin), state, nullptr};
        code = std::max(code, seqarch_selective_scan_forward(&a, &out, 1));
    }
    return code;
}

// A recurrence with a state [K, V] for each sequence and head, T steps of it. Views o [B, T, H], q [B, T, G], k, v,
// decay, state [B, H] and for the delta rule beta, read, erase; sizes B, T, H, K, V, G; flags: how the decay varies, 0
// not at all, 1 by head, 2 by key; its last stride is the key's.
template <bool Delta>
void recurrence(const Instruction& in) {
    const int64_t T = in.size(1), H = in.size(2), K = in.size(3), V = in.size(4), sharing = H / in.size(5);
    const float scale = static_cast<float>(in.i.factor);
    constexpr int64_t kWidth = 64;  // values at a time
    const int64_t parts = (V + kWidth - 1) / kWidth;
    const Range own = share(in.size(0) * H * parts, in.piece);
    for (int64_t t = own.begin; t < own.end; ++t) {
        const int64_t b = t / parts / H, h = t / parts % H, first = t % parts * kWidth, n = std::min(kWidth, V - first);
        float* state = in.data(5) + b * in.stride(5, 0) + h * K * V + first;
        for (int64_t s = 0; s < T; ++s) {
            const auto at = [&](int view, int64_t head) {
                return in.data(view) + b * in.stride(view, 0) + s * in.stride(view, 1) + head * in.stride(view, 2);
            };
            const float *q = at(1, h / sharing), *k = at(2, h / sharing), *v = at(3, h) + first;
            const float* decay = in.i.flags ? at(4, h) : nullptr;
            const int64_t decay_step = in.i.flags == 2 ? 1 : 0;
            float* o = at(0, h) + first;
            alignas(64) float sum[kWidth] = {}, change[kWidth];
            const float whole = in.i.flags == 1 ? std::exp(*decay) : 1.0f;
            const auto kept = [&](int64_t key) {
                return in.i.flags == 2 ? exponential(decay[key * decay_step]) : whole;
            };
            if constexpr (Delta) {
                const float *beta = at(6, h), *read = in.data(7) ? at(7, h / sharing) : k;
                const float* erase = in.data(8) ? at(8, h / sharing) : nullptr;
                alignas(64) float old[kWidth] = {};
                for (int64_t key = 0; key < K; ++key) {
                    float* __restrict row = state + key * V;
                    const float keep = kept(key), r = read[key];
#pragma omp simd
                    for (int64_t x = 0; x < n; ++x) {
                        row[x] *= keep;
                        old[x] += r * row[x];
                    }
                }
                if (!erase) {
                    for (int64_t x = 0; x < n; ++x) change[x] = *beta * (v[x] - old[x]);
                    for (int64_t key = 0; key < K; ++key) {
                        float* __restrict row = state + key * V;
                        const float write = k[key], ask = q[key];
#pragma omp simd
                        for (int64_t x = 0; x < n; ++x) {
                            row[x] += write * change[x];
                            sum[x] += ask * row[x];
                        }
                    }
                } else {
                    for (int64_t x = 0; x < n; ++x) {
                        change[x] = *beta * v[x];
                        old[x] *= *beta;
                    }
                    for (int64_t key = 0; key < K; ++key) {
                        float* __restrict row = state + key * V;
                        const float write = k[key], gone = erase[key], ask = q[key];
#pragma omp simd
                        for (int64_t x = 0; x < n; ++x) {
                            row[x] += write * change[x] - gone * old[x];
                            sum[x] += ask * row[x];
                        }
                    }
                }
            } else {
                for (int64_t key = 0; key < K; ++key) {
                    float* __restrict row = state + key * V;
                    const float keep = kept(key), write = k[key], ask = q[key];
#pragma omp simd
                    for (int64_t x = 0; x < n; ++x) {
                        row[x] = keep * row[x] + write * v[x];
                        sum[x] += ask * row[x];
                    }
                }
            }
            for (int64_t x = 0; x < n; ++x) o[x] = scale * sum[x];
        }
    }
}

template <class T>
void fetch(const T* row, int64_t numbers) {
    for (int64_t k = 0; k < numbers; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + k);
}

// The parts that the keys of a sequence are taken in, of `most` that there is room for.
int64_t key_parts(int64_t keys, int64_t most) {
    constexpr int64_t kLeast = 64;  // keys of a part
    return std::max<int64_t>(1, std::min(keys / kLeast, most));
}

// Softmax attention of one query a head, each part of the keys for itself. Views room [P, B, H], q [B, H], k [B, G, N],
// v [B, G, N]; sizes B, H, N, K, V, G; flags: P. A part reads whole rows of a cache one after another, the numbers of
// all heads, as memory is read fastest; values are fetched while their keys are read. Heads that share keys take what
// is read of them, and widened, together. The room of a head holds the weighted sum of V values, the largest score, the
// sum of the weights, and scores.
template <class T>
void attend(const Instruction& in, const T* keys, const T* values) {
    constexpr int64_t kKeys = SEQARCH_ATTEND_KEYS;
    const int64_t H = in.size(1), N = in.size(2), K = in.size(3), V = in.size(4), G = in.size(5), sharing = H / G;
    const int64_t parts = key_parts(N, in.i.flags), key_row = in.stride(2, 2), value_row = in.stride(3, 2);
    const int64_t head_row = in.stride(0, 2);
    const float scale = static_cast<float>(in.i.factor);
    const auto place = [&](int v, int64_t b, int64_t h) { return b * in.stride(v, 0) + h * in.stride(v, 1); };
    const Range own = share(in.size(0) * parts, in.piece);
    for (int64_t t = own.begin; t < own.end; ++t) {
        const int64_t b = t / parts, p = t % parts, end = N * (p + 1) / parts;
        const auto room = [&](int64_t h) { return in.data(0) + place(0, p, b) + h * head_row; };
        for (int64_t h = 0; h < H; ++h) {
            std::fill_n(room(h), V, 0.0f);
            room(h)[V] = -std::numeric_limits<float>::infinity();
            room(h)[V + 1] = 0.0f;
        }
        for (int64_t first = N * p / parts; first < end; first += kKeys) {
            const int64_t n = std::min(kKeys, end - first);
            for (int64_t j = first; j < first + n; ++j)
                for (int64_t g = 0; g < G; ++g) {
                    fetch(values + place(3, b, g) + j * value_row, V);
                    const float* query = in.data(1) + place(1, b, g * sharing);
                    products_of_all(
                        sharing, K, keys + place(2, b, g) + j * key_row, query, in.stride(1, 1),
                        [&](int64_t i, float sum) { room(g * sharing + i)[V + 2 + j - first] = scale * sum; });
                }
            for (int64_t h = 0; h < H; ++h) {
                float *sums = room(h), *score = sums + V + 2, &most = sums[V], &total = sums[V + 1];
                float highest = most;
                for (int64_t j = 0; j < n; ++j) highest = std::max(highest, score[j]);
                if (total > 0.0f && highest > most) {
                    const float keep = exponential(most - highest);
                    total *= keep;
                    for (int64_t x = 0; x < V; ++x) sums[x] *= keep;
                }
                most = highest;
                each(n, score, [&](int64_t j) { return exponential(score[j] - highest); });
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < n; ++j) sum += score[j];
                total += sum;
            }
            for (int64_t g = 0; g < G; ++g)
                in_groups<kRows>(sharing, [&](auto count, int64_t i) {
                    float* sums = room(g * sharing + i);
                    const T* rows = values + place(3, b, g) + first * value_row;
                    add_weighted<decltype(count)::value>(n, V, sums + V + 2, head_row, rows, value_row, sums, head_row);
                });
        }
    }
}

void attend(const Instruction& in) {
    if (in.views[2].dtype == SEQARCH_BFLOAT16)
        attend(in, static_cast<const bfloat16*>(in.views[2].data), static_cast<const bfloat16*>(in.views[3].data));
    else
        attend<float>(in, in.data(2), in.data(3));
}

// What the parts of attention come to. Views o [B, H], room [P, B, H]; sizes B, H, N, V; flags: P.
void attend_join(const Instruction& in) {
    const int64_t H = in.size(1), V = in.size(3), parts = key_parts(in.size(2), in.i.flags);
    const Range own = share(in.size(0) * H, in.piece);
    for (int64_t t = own.begin; t < own.end; ++t) {
        const int64_t b = t / H, h = t % H;
        const auto part = [&](int64_t p) {
            return in.data(1) + p * in.stride(1, 0) + b * in.stride(1, 1) + h * in.stride(1, 2);
        };
        float* __restrict o = in.data(0) + b * in.stride(0, 0) + h * in.stride(0, 1);
        float most = part(0)[V], total = 0.0f;
        for (int64_t p = 1; p < parts; ++p) most = std::max(most, part(p)[V]);
        std::fill_n(o, V, 0.0f);
        for (int64_t p = 0; p < parts; ++p) {
            const float* __restrict sums = part(p);
            const float weight = exponential(sums[V] - most);
            total += weight * sums[V + 1];
            for (int64_t x = 0; x < V; ++x) o[x] += weight * sums[x];
        }
        for (int64_t x = 0; x < V; ++x) o[x] /= total;
    }
}

// Views y [R], index [R], weight; sizes R, D, V.
int32_t look_up(const Instruction& in) {
    for (int64_t r = 0; r < in.size(0); ++r) {
        const int64_t row = static_cast<const int64_t*>(in.views[1].data)[r * in.stride(1, 0)];
        if (row < 0 || row >= in.size(2)) return SEQARCH_BAD_ARGUMENT;
        float* to = in.data(0) + r * in.stride(0, 0);
        with_type_of(in.views[2], [&](const auto* weight) {
            for (int64_t d = 0; d < in.size(1); ++d) to[d] = static_cast<float>(load(weight[row * in.size(1) + d]));
        });
    }
    return SEQARCH_OK;
}

// Views y [R] of float64, x [R]; sizes R, V.
void argmax(const Instruction& in) {
    for (int64_t r = 0; r < in.size(0); ++r) {
        const float* x = in.data(1) + r * in.stride(1, 0);
        const float most = extreme(in.size(1), x, 1, -std::numeric_limits<float>::infinity(), 1.0f);
        int64_t k = 0;
        while (k + 1 < in.size(1) && x[k] != most && x[k] == x[k]) ++k;
        static_cast<double*>(in.views[0].data)[r * in.stride(0, 0)] = static_cast<double>(k);
    }
}

// Whether an instruction's sizes can be counted, and what it keeps in arrays fits them.
bool valid(const seqarch_tape_instruction& i) {
    if (i.kind < SEQARCH_MAP || i.kind > SEQARCH_ATTEND_JOIN || i.views < 0 || i.steps < 0) return false;
    if (!countable({i.sizes[0], i.sizes[1], i.sizes[2], i.sizes[3], i.sizes[4], i.sizes[5]})) return false;
    switch (i.kind) {
        case SEQARCH_MAP: return i.flags < SEQARCH_INT8 || small_weights(i, nullptr).valid();
        case SEQARCH_ELEMENTWISE:
            return i.outputs > 0 && i.inputs >= 0 && i.count >= 0 && i.outputs + i.inputs < 32 &&
                   i.inputs + i.count <= kMostRegisters;
        case SEQARCH_STEP_CONVOLUTION: return i.sizes[2] > 1 && i.sizes[2] <= kMostTaps;
        case SEQARCH_STEP_LINEAR_ATTENTION:
        case SEQARCH_STEP_DELTA_RULE: return i.sizes[5] > 0 && i.sizes[2] % i.sizes[5] == 0;
        case SEQARCH_ATTEND: return i.sizes[2] > 0 && i.sizes[5] > 0 && i.sizes[1] % i.sizes[5] == 0 && i.flags > 0;
        case SEQARCH_ATTEND_JOIN: return i.flags > 0;
        default: return true;
    }
}

int32_t run(const Instruction& in) {
    switch (in.i.kind) {
        case SEQARCH_MAP: map(in); return SEQARCH_OK;
        case SEQARCH_ELEMENTWISE: in.i.flags ? elementwise<double>(in) : elementwise<float>(in); return SEQARCH_OK;
        case SEQARCH_REDUCE: reduce(in); return SEQARCH_OK;
        case SEQARCH_PRODUCT: product_of(in); return SEQARCH_OK;
        case SEQARCH_STEP_CONVOLUTION: convolve(in); return SEQARCH_OK;
        case SEQARCH_STEP_SCAN: return scan(in);
        case SEQARCH_STEP_LINEAR_ATTENTION: recurrence<false>(in); return SEQARCH_OK;
        case SEQARCH_STEP_DELTA_RULE: recurrence<true>(in); return SEQARCH_OK;
        case SEQARCH_ATTEND: attend(in); return SEQARCH_OK;
        case SEQARCH_ATTEND_JOIN: attend_join(in); return SEQARCH_OK;
        case SEQARCH_LOOKUP: return look_up(in);
        case SEQARCH_ARGMAX: argmax(in); return SEQARCH_OK;
        default: return SEQARCH_BAD_ARGUMENT;
    }
}

// How many pieces an instruction is best taken in: each is long beside what it takes to be handed out.
int64_t pieces_of(const seqarch_tape_instruction& i) {
    const auto cut = [](int64_t work, int64_t piece, int64_t most) {
        return std::max<int64_t>(1, std::min({work / piece, most, Team::kMostPieces}));
    };
    const int64_t* n = i.sizes;
    switch (i.kind) {
        case SEQARCH_MAP: return cut(std::max(weight_bytes(i), n[1] * n[2]), kPiece, n[2] / kLine);
        case SEQARCH_ELEMENTWISE: {
            const int64_t numbers = n[0] * n[1] * n[2] * n[3] * n[4];
            return cut(numbers * (i.inputs + i.count), kPiece, numbers / kBlock);
        }
        case SEQARCH_REDUCE: return cut(n[0] * n[1] * n[2] * n[3] * n[4], kPiece, n[0] * n[1] * n[2]);
        case SEQARCH_PRODUCT:
            return cut(n[0] * n[1] * n[2] * n[3] * n[4], kPiece, n[0] * n[1] * ((n[3] + kColumns - 1) / kColumns));
        case SEQARCH_STEP_CONVOLUTION: return cut(n[0] * n[1] * n[2], kPiece, n[1] / kLine);
        case SEQARCH_STEP_SCAN: return cut(n[0] * n[1] * n[2], kPiece / 16, n[1] / kLine);
        case SEQARCH_ATTEND: return n[0] * key_parts(n[2], i.flags);
        case SEQARCH_ATTEND_JOIN: return cut(n[0] * n[1] * n[3] * key_parts(n[2], i.flags), kPiece, n[0] * n[1]);
        case SEQARCH_LOOKUP: case SEQARCH_ARGMAX: return 1;
        default: return cut(n[0] * n[1] * n[2] * n[3] * n[4], kPiece / 4, n[0] * n[2] * n[4] / kLine);
    }
}

// Whether a piece's results have room in kRoom numbers, so that another thread may do it again meanwhile.
bool is_repeatable(const Instruction& in) {
    const Range own = outputs_of_map(in);
    return in.i.kind == SEQARCH_MAP && in.size(0) * (own.end - own.begin) <= kRoom;
}

// Fetch some of the weights that a thread will take next: line after line of a map's last pieces.
void fetch_ahead(const seqarch_tape& tape, int64_t instruction, int64_t turn, int64_t number, int64_t team) {
    if (turn * kFetched >= kMostFetched) return;
    while (instruction < tape.count && tape.instructions[instruction].kind != SEQARCH_MAP) ++instruction;
    if (instruction == tape.count) return;
    const seqarch_tape_instruction& i = tape.instructions[instruction];
    const int64_t bytes = weight_bytes(i), from_end = (turn * (team - 1) + number) * kFetched;
    if (from_end > bytes) return;
    const char* at = static_cast<const char*>(tape.views[i.views + 2].data) + bytes - from_end;
    for (int64_t line = 0; line < kFetched; line += 64) __builtin_prefetch(at + line);
}

class Runner {
public:
    // `room` is as large as room_for() says.
    Runner(const seqarch_tape& tape, uint8_t* room, bool integers) : tape_(tape), room_(room), integers_(integers) {}

    // Bytes for x of the largest map with weights of few bits.
    static int64_t room_for(const seqarch_tape& tape, bool integers) {
        int64_t most = 0;
        for (const auto* i = tape.instructions; i < tape.instructions + tape.count; ++i)
            if (has_small_weights(*i))
                most = std::max(most, prepared_bytes(small_weights(*i, nullptr), i->sizes[0], integers));
        return most;
    }

    int32_t alone() {
        for (int64_t i = 0; i < tape_.count; ++i) {
            prepare_for(i);
            note(run(piece(i, {0, 1})));
        }
        return code_;
    }

    int32_t together(int team) {
#pragma omp parallel num_threads(team)
        {
            const FlushDenormals flush(Denormals::results);
#ifdef _OPENMP
            const int number = omp_get_thread_num();
#else
            const int number = 0;
#endif
            if (number == 0)
                lead();
            else
                follow(number, team);
        }
        return code_;
    }

private:
    Instruction piece(int64_t i, Piece which) const {
        const seqarch_tape_instruction& one = tape_.instructions[i];
        return {one, tape_.views + one.views, tape_.steps + one.steps, room_, integers_, which};
    }

    // Put x in order for a map with weights of few bits; several in a row may be of the same x. A thread that was
    // stopped within an earlier map may still read here: its results are not taken.
    void prepare_for(int64_t i) {
        const seqarch_tape_instruction& map = tape_.instructions[i];
        if (!has_small_weights(map)) return;
        const seqarch_view& x = tape_.views[map.views + 1];
        if (i > 0 && has_small_weights(tape_.instructions[i - 1])) {
            const seqarch_tape_instruction& before = tape_.instructions[i - 1];
            const seqarch_view& former = tape_.views[before.views + 1];
            if (former.data == x.data && former.strides[0] == x.strides[0] && before.flags == map.flags &&
                std::equal(map.sizes, map.sizes + 2, before.sizes) && before.sizes[3] == map.sizes[3])
                return;
        }
        prepare(small_weights(map, nullptr), map.sizes[0], static_cast<const float*>(x.data), x.strides[0], integers_,
                room_);
    }

    void note(int32_t code) {
        if (code != SEQARCH_OK) code_ = code;
    }

    void lead() {
        for (int64_t i = 0; i < tape_.count; ++i) {
            const int64_t pieces = pieces_of(tape_.instructions[i]);
            prepare_for(i);
            if (pieces == 1) {
                note(run(piece(i, {0, 1})));
                continue;
            }
            team_.open(i, pieces);
            for (int64_t p; (p = team_.take_front()) >= 0; team_.finish(i, p)) note(run(piece(i, {p, pieces})));
            team_.wait_for(i, pieces, [&](int64_t p) { note(run(piece(i, {p, pieces}))); });
        }
        team_.end();
    }

    void follow(int64_t number, int64_t team) {
        alignas(64) float room[kRoom];
        team_.follow(
            [&](Team::Taken taken) {
                const Instruction in =
                    piece(taken.instruction, {taken.piece, pieces_of(tape_.instructions[taken.instruction])});
                if (is_repeatable(in)) {
                    const Range own = outputs_of_map(in);
                    map_to(in, own, room, own.end - own.begin, 1);
                    if (!team_.begin(taken.instruction, taken.piece)) return;
                    hand_over(in, room);
                } else {
                    if (!team_.begin(taken.instruction, taken.piece)) return;
                    note(run(in));
                }
                team_.finish(taken.instruction, taken.piece);
            },
            [&](int64_t instruction, int64_t turn) {
                if (turn >= kTurns)
                    std::this_thread::yield();
                else
                    fetch_ahead(tape_, instruction + 1, turn, number, team);
                pause();
            });
    }

    const seqarch_tape& tape_;
    uint8_t* const room_;
    const bool integers_;
    Team team_;
    std::atomic<int32_t> code_{SEQARCH_OK};
};

}  // namespace

int32_t seqarch_run_tape(const seqarch_tape* tape, const int64_t* registers, int32_t num_threads) {
    if (num_threads < 1 || tape->count < 0) return SEQARCH_BAD_ARGUMENT;
    for (int64_t p = 0; p < tape->patch_count; ++p) {
        const seqarch_patch& patch = tape->patches[p];
        *static_cast<int64_t*>(patch.field) = patch.base + patch.factor * registers[patch.number];
    }
    if (!std::all_of(tape->instructions, tape->instructions + tape->count, valid)) return SEQARCH_BAD_ARGUMENT;
    double weights = 0;
    for (int64_t i = 0; i < tape->count; ++i)
        if (tape->instructions[i].kind == SEQARCH_MAP)
            weights += static_cast<double>(weight_bytes(tape->instructions[i]));
    // No instruction leaves one; a logarithm, or a quotient, of one that comes from elsewhere is not that of 0.
    const FlushDenormals flush(Denormals::results);
    static thread_local Kept kept;
    const bool integers = has_integer_products();
    uint8_t* room;
    try {
        room = kept.at_least(Runner::room_for(*tape, integers));
    } catch (const std::bad_alloc&) {
        return SEQARCH_OUT_OF_MEMORY;
    }
    Runner runner(*tape, room, integers);
    const int32_t code = num_threads == 1 || weights < kSmallWork ? runner.alone() : runner.together(num_threads);
    for (int64_t w = 0; w < tape->wanted_count; ++w) __builtin_prefetch(reinterpret_cast<const char*>(tape->wanted[w]));
    return code;
}
