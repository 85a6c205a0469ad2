// Causal depthwise convolution, forward and backward. See seqarch.h for the equation and the arguments.
//
// h = [state; x] has T + W - 1 rows; output row t reads rows t .. t + W - 1 of it. Work is cut into blocks of time
// and channels whose rows stay in the first-level cache. The cut depends on the sizes alone, and weight gradients are
// summed block by block in a fixed order, so results do not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "arguments.h"
#include "dtypes.h"
#include "numbers.h"
#include "parallel.h"
#include "seqarch.h"

namespace {

using seqarch::countable;
using seqarch::load;
using seqarch::packs;
using seqarch::store;
using seqarch::with_dtype;

constexpr int64_t kChannelBlock = 256;
constexpr int64_t kTimeBlock = 128;
constexpr int64_t kMaxWidth = 8;
constexpr int64_t kSmallWork = 1 << 14;  // fewer multiply-adds than starting the threads is worth

template <class T>
using Acc = typename seqarch::accumulation<T>::type;

// to += a b, elementwise.
template <class A, class T>
inline void multiply_add(int64_t n, const A* __restrict a, const T* __restrict b, A* __restrict to) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] += a[c] * load(b[c]);
}

template <class T>
struct Problem {
    const T* x;
    int64_t x_batch_stride, x_time_stride;
    const Acc<T>*weight, *bias;
    const T* state;
    const int64_t* offsets;
    int64_t sequences, length, channels, width;
    bool silu;
    int num_threads;

    bool worth_threads(int64_t blocks) const {
        return static_cast<double>(blocks * std::min(length, kTimeBlock)) * channels * width > kSmallWork;
    }

    int64_t steps(int64_t sequence) const {
        return offsets ? offsets[sequence + 1] - offsets[sequence] : length;
    }
    // The first row of a sequence in a contiguous tensor shaped like x.
    int64_t first_row(int64_t sequence) const { return offsets ? offsets[sequence] : sequence * length; }
    int64_t start(int64_t sequence, int64_t batch_stride, int64_t time_stride) const {
        return offsets ? offsets[sequence] * time_stride : sequence * batch_stride;
    }
};

// A range of rows of one sequence, the unit of parallel work.
struct Block {
    int64_t sequence, begin, end;
};

// Cuts every sequence's steps, plus `extra` rows, into blocks; a sequence of no rows still gets one, empty block.
template <class T>
std::vector<Block> cut(const Problem<T>& p, int64_t extra) {
    std::vector<Block> blocks;
    for (int64_t s = 0; s < p.sequences; ++s) {
        const int64_t rows = p.steps(s) + extra;
        int64_t begin = 0;
        do {
            blocks.push_back({s, begin, std::min(begin + kTimeBlock, rows)});
            begin += kTimeBlock;
        } while (begin < rows);
    }
    return blocks;
}

// One sequence's rows of h for one block of channels, with that block's weights transposed to [W, n].
template <class T>
struct Window {
    const T *x, *state;
    int64_t x_time_stride, channels, width, n;
    T zeros[kChannelBlock] = {};
    Acc<T> weight[kMaxWidth][kChannelBlock], bias[kChannelBlock];

    Window(const Problem<T>& p, int64_t sequence, int64_t c0)
        : x(p.x + p.start(sequence, p.x_batch_stride, p.x_time_stride) + c0),
          state(p.state ? p.state + sequence * (p.width - 1) * p.channels + c0 : nullptr),
          x_time_stride(p.x_time_stride),
          channels(p.channels),
          width(p.width),
          n(std::min(kChannelBlock, p.channels - c0)) {
        for (int64_t c = 0; c < n; ++c) {
            bias[c] = p.bias ? p.bias[c0 + c] : Acc<T>(0);
            for (int64_t w = 0; w < width; ++w) weight[w][c] = p.weight[(c0 + c) * width + w];
        }
    }

    const T* row(int64_t i) const {
        if (i >= width - 1) return x + (i - (width - 1)) * x_time_stride;
        return state ? state + i * channels : zeros;
    }

    // z of output row t. Tap after tap: the sums stay in the cache, and each loop is plain vector code.
    void convolve(int64_t t, Acc<T>* __restrict z) const {
        std::copy_n(bias, n, z);
        for (int64_t w = 0; w < width; ++w) multiply_add(n, weight[w], row(t + w), z);
    }
};

template <class T>
void forward_block(const Problem<T>& p, const Block& block, int64_t c0, T* y, T* state_out) {
    const Window<T> h(p, block.sequence, c0);
    Acc<T> z[kChannelBlock];
    for (int64_t t = block.begin; t < block.end; ++t) {
        h.convolve(t, z);
        T* __restrict out = y + (p.first_row(block.sequence) + t) * p.channels + c0;
        if (p.silu) {
#pragma omp simd
            for (int64_t c = 0; c < h.n; ++c) store(out + c, z[c] * seqarch::sigmoid(z[c]));
        } else {
#pragma omp simd
            for (int64_t c = 0; c < h.n; ++c) store(out + c, z[c]);
        }
    }
    const int64_t steps = p.steps(block.sequence);
    if (block.end != steps) return;
    for (int64_t i = 0; i < p.width - 1; ++i)
        std::copy_n(h.row(steps + i), h.n, state_out + (block.sequence * (p.width - 1) + i) * p.channels + c0);
}

// body(b, c0) for each of `count` blocks of time and each block of channels, which begins at c0.
template <class T, class Body>
void for_each_block(const Problem<T>& p, int64_t count, Body body) {
    const int64_t across = (p.channels + kChannelBlock - 1) / kChannelBlock;
    seqarch::parallel_for(count * across, p.worth_threads(count) ? p.num_threads : 1,
                          [&](int64_t i) { body(i / across, i % across * kChannelBlock); });
}

template <class T>
void forward(const Problem<T>& p, T* y, T* state_out) {
    const std::vector<Block> blocks = cut(p, 0);
    const int64_t count = static_cast<int64_t>(blocks.size());
    for_each_block(p, count, [&](int64_t b, int64_t c0) { forward_block(p, blocks[b], c0, y, state_out); });
}

template <class T>
struct Gradients {
    const T* dy;
    int64_t dy_batch_stride, dy_time_stride;
    const T* dstate_out;
    T* dx;
    Acc<T>*dweight, *dbias;
    T* dstate;
};

// dz of output row t from its dy.
template <class T>
void differentiate_activation(const Window<T>& h, bool silu, int64_t t, const T* dy, Acc<T>* __restrict dz) {
    using A = Acc<T>;
    if (!silu) {
        for (int64_t c = 0; c < h.n; ++c) dz[c] = load(dy[c]);
        return;
    }
    A z[kChannelBlock];
    h.convolve(t, z);
#pragma omp simd
    for (int64_t c = 0; c < h.n; ++c) {
        const A s = seqarch::sigmoid(z[c]);
        dz[c] = load(dy[c]) * s * (A(1) + z[c] * (A(1) - s));
    }
}

// The gradients of the rows [block.begin, block.end) of h, and this block's share of the weight and bias gradients.
// dh[i] = sum_w weight[w] dz[i - w], so the last W rows of dz are kept in a ring.
template <class T>
void backward_block(const Problem<T>& p, const Gradients<T>& g, const Block& block, int64_t c0, Acc<T>* share) {
    using A = Acc<T>;
    const Window<T> h(p, block.sequence, c0);
    const int64_t n = h.n, width = p.width, steps = p.steps(block.sequence);
    const T* dy = g.dy + p.start(block.sequence, g.dy_batch_stride, g.dy_time_stride) + c0;
    A ring[kMaxWidth][kChannelBlock] = {};
    A dweight[kMaxWidth][kChannelBlock] = {};
    A dbias[kChannelBlock] = {};
    A dh[kChannelBlock];

    for (int64_t i = std::max<int64_t>(0, block.begin - (width - 1)); i < block.end; ++i) {
        A* dz = ring[i % width];
        if (i < steps)
            differentiate_activation(h, p.silu, i, dy + i * g.dy_time_stride, dz);
        else
            std::fill_n(dz, n, A(0));
        if (i < block.begin) continue;
        if (i < steps) {
            for (int64_t c = 0; c < n; ++c) dbias[c] += dz[c];
            for (int64_t w = 0; w < width; ++w) multiply_add(n, dz, h.row(i + w), dweight[w]);
        }

        const int64_t state_row = block.sequence * (width - 1) + i;  // of dstate, while i < W - 1
        T* to = i >= width - 1 ? g.dx + (p.first_row(block.sequence) + i - (width - 1)) * p.channels + c0
                : g.dstate    ? g.dstate + state_row * p.channels + c0
                              : nullptr;
        if (!to) continue;
        const T* carried = i >= steps ? g.dstate_out + (state_row - steps) * p.channels + c0 : h.zeros;
        for (int64_t c = 0; c < n; ++c) dh[c] = load(carried[c]);
        for (int64_t w = 0; w < width; ++w) multiply_add(n, h.weight[w], ring[(i - w + width) % width], dh);
        for (int64_t c = 0; c < n; ++c) store(to + c, dh[c]);
    }
    for (int64_t w = 0; w < width; ++w) std::copy_n(dweight[w], n, share + w * p.channels + c0);
    std::copy_n(dbias, n, share + width * p.channels + c0);
}

template <class T>
void backward(const Problem<T>& p, const Gradients<T>& g) {
    const std::vector<Block> blocks = cut(p, p.width - 1);
    const int64_t count = static_cast<int64_t>(blocks.size());
    const int64_t share = (p.width + 1) * p.channels;
    std::vector<Acc<T>> shares(count * share);
    for_each_block(p, count,
                   [&](int64_t b, int64_t c0) { backward_block(p, g, blocks[b], c0, &shares[b * share]); });

    std::vector<Acc<T>> total(share);
    for (int64_t b = 0; b < count; ++b)
        for (int64_t j = 0; j < share; ++j) total[j] += shares[b * share + j];
    for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t w = 0; w < p.width; ++w) g.dweight[c * p.width + w] = total[w * p.channels + c];
    if (g.dbias) std::copy_n(total.data() + p.width * p.channels, p.channels, g.dbias);
}

bool valid(const seqarch_causal_conv1d_inputs& in, int num_threads) {
    const int64_t steps = kTimeBlock + kMaxWidth;  // of a block, which a sequence of no steps has too
    return num_threads > 0 && in.width >= 2 && in.width <= kMaxWidth &&
           countable({in.sequences, steps, in.channels, in.width}) &&
           countable({in.offsets ? 1 : in.sequences, in.length, in.channels, in.width}) &&
           packs(in.offsets, in.sequences, in.length);
}

template <class T>
Problem<T> problem(const seqarch_causal_conv1d_inputs& in, int num_threads) {
    using A = Acc<T>;
    return {static_cast<const T*>(in.x.data), in.x.batch_stride, in.x.time_stride, static_cast<const A*>(in.weight),
            static_cast<const A*>(in.bias), static_cast<const T*>(in.state), in.offsets, in.sequences, in.length,
            in.channels, in.width, in.silu != 0, num_threads};
}

}  // namespace

int32_t seqarch_causal_conv1d_forward(const seqarch_causal_conv1d_inputs* inputs,
                                      const seqarch_causal_conv1d_outputs* outputs, int32_t num_threads) {
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(problem<T>(*inputs, num_threads), static_cast<T*>(outputs->y), static_cast<T*>(outputs->state_out));
    });
}

int32_t seqarch_causal_conv1d_backward(const seqarch_causal_conv1d_inputs* inputs,
                                       const seqarch_causal_conv1d_gradients* gradients, int32_t num_threads) {
    const auto& g = *gradients;
    if (!valid(*inputs, num_threads) || g.dy.dtype != inputs->x.dtype) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        backward(problem<T>(*inputs, num_threads),
                 Gradients<T>{static_cast<const T*>(g.dy.data), g.dy.batch_stride, g.dy.time_stride,
                              static_cast<const T*>(g.dstate_out), static_cast<T*>(g.dx), static_cast<A*>(g.dweight),
                              static_cast<A*>(g.dbias), static_cast<T*>(g.dstate)});
    });
}
