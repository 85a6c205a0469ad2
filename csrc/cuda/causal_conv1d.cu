// Causal depthwise convolution, forward and backward. See seqarch.h for the equation and the arguments.
//
// h = [state; x] has T + W - 1 rows; output row t reads rows t .. t + W - 1 of it. A thread takes four neighbouring
// channels through a run of steps, with the last W - 1 rows in registers: each row is read once from memory. Its time
// is that of the bytes.
#include "launch.cuh"
#include "numbers.cuh"

namespace {

using seqarch::countable;
using namespace seqarch::cuda;

constexpr int kThreads = 128;
constexpr int64_t kLeastRun = 32, kBusyThreads = 1 << 18;

template <class A>
struct Problem {
    const void* x;
    int64_t x_batch_stride, x_time_stride;
    const A *weight, *bias;
    const void* state;
    const int64_t* offsets;
    int64_t sequences, length, channels;
    int32_t dtype;
    bool aligned, silu;  // aligned: whether rows of x, of outputs and of states may be read four numbers at once

    __host__ __device__ int64_t lines() const { return offsets ? 1 : sequences; }
    __device__ int64_t begin(int64_t sequence) const { return offsets ? offsets[sequence] : 0; }
    __device__ int64_t steps(int64_t sequence) const {
        return offsets ? offsets[sequence + 1] - offsets[sequence] : length;
    }
    // The first element of a sequence in a tensor with these strides.
    __device__ int64_t start(int64_t sequence, int64_t batch_stride, int64_t time_stride) const {
        return offsets ? offsets[sequence] * time_stride : sequence * batch_stride;
    }
};

template <class A>
struct Upstream {
    const void* dy;
    int64_t batch_stride, time_stride;
    const void* dstate_out;
    bool aligned;
};

// Four channels of one sequence.
template <class A, int W>
struct Column {
    const Problem<A>& p;
    int64_t sequence, channel, steps, x_start;
    int count;
    A weight[W][kFour], bias[kFour];

    __device__ Column(const Problem<A>& problem, int64_t four)
        : p(problem), sequence(0), channel(four * kFour), steps(0), x_start(0),
          count(p.channels - channel < kFour ? static_cast<int>(p.channels - channel) : kFour) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            const bool there = j < count;
            bias[j] = there && p.bias ? p.bias[channel + j] : A(0);
#pragma unroll
            for (int w = 0; w < W; ++w) weight[w][j] = there ? p.weight[(channel + j) * W + w] : A(0);
        }
    }
    __device__ void enter(int64_t number) {
        sequence = number;
        steps = p.steps(number);
        x_start = p.start(number, p.x_batch_stride, p.x_time_stride);
    }
    // A row of a state [S, W - 1, D].
    __device__ int64_t state_row(int64_t row) const { return (sequence * (W - 1) + row) * p.channels + channel; }
    // The element of a contiguous tensor like x.
    __device__ int64_t row(int64_t t) const {
        return (p.begin(sequence) + t + (p.offsets ? 0 : sequence * p.length)) * p.channels + channel;
    }
    // Row t of x; before the first, of the state.
    __device__ __forceinline__ void read(int64_t t, A (&to)[kFour]) const {
        if (t >= 0) {
            load_four<A>(p.x, p.dtype, p.aligned, x_start + t * p.x_time_stride + channel, count, to);
        } else if (p.state) {
            load_four<A>(p.state, p.dtype, p.aligned, state_row(W - 1 + t), count, to);
        } else {
#pragma unroll
            for (int j = 0; j < kFour; ++j) to[j] = 0;
        }
    }
    __device__ __forceinline__ void convolve(const A (&h)[W][kFour], A (&z)[kFour]) const {
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            z[j] = bias[j];
#pragma unroll
            for (int w = 0; w < W; ++w) z[j] += weight[w][j] * h[w][j];
        }
    }
};

// Makes room for a newer row at the end.
template <class A, int N>
__device__ __forceinline__ void shift(A (&rows)[N][kFour]) {
#pragma unroll
    for (int w = 0; w + 1 < N; ++w)
#pragma unroll
        for (int j = 0; j < kFour; ++j) rows[w][j] = rows[w + 1][j];
}

// Calls f(begin, end) for the steps of each sequence in the thread's run, after column.enter.
template <class A, int W, class F>
__device__ __forceinline__ void each_piece(const Problem<A>& p, int64_t run, int64_t steps, Column<A, W>& column, F f) {
    const int64_t runs = ceil_div(p.length, steps), line = run / runs;
    int64_t row = run % runs * steps;
    const int64_t end = row + steps < p.length ? row + steps : p.length;
    for (int64_t s = p.offsets ? find_sequence(p.offsets, p.sequences, row) : line; row < end; ++s) {
        column.enter(s);
        const int64_t first = p.begin(s), last = first + column.steps, stop = last < end ? last : end;
        if (stop > row) f(row - first, stop - first);
        row = stop > row ? stop : row;
    }
}

// The thread's place: which run of steps, which four channels.
struct Place {
    int64_t run, four;
    __device__ explicit Place(int64_t channels) {
        const int64_t fours = ceil_div(channels, kFour);
        const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
        run = i / fours;
        four = i % fours;
    }
};

template <class A, int W>
__global__ void __launch_bounds__(kThreads)
    convolve(const Problem<A> p, const int64_t runs, const int64_t steps, void* y) {
    const Place place(p.channels);
    if (place.run >= runs) return;
    Column<A, W> column(p, place.four);
    each_piece<A, W>(p, place.run, steps, column, [&](int64_t begin, int64_t end) {
        A h[W][kFour];
#pragma unroll
        for (int w = 1; w < W; ++w) column.read(begin - W + w, h[w]);
#pragma unroll 4
        for (int64_t t = begin; t < end; ++t) {
            A z[kFour];
            shift(h);
            column.read(t, h[W - 1]);
            column.convolve(h, z);
            if (p.silu) {
#pragma unroll
                for (int j = 0; j < kFour; ++j) z[j] *= sigmoid(z[j]);
            }
            store_four<A>(y, p.dtype, p.aligned, column.row(t), column.count, z);
        }
    });
}

// The last W - 1 rows of [state; x].
template <class A, int W>
__global__ void __launch_bounds__(kThreads) last_rows(const Problem<A> p, void* state_out) {
    const Place place(p.channels);
    if (place.run >= p.sequences) return;
    Column<A, W> column(p, place.four);
    column.enter(place.run);
    for (int row = 0; row < W - 1; ++row) {
        A h[kFour];
        column.read(column.steps - (W - 1) + row, h);
        store_four<A>(state_out, p.dtype, p.aligned, column.state_row(row), column.count, h);
    }
}

// The gradient of z at successive steps, with the rows of h that step t reads.
template <class A, int W>
struct Backwards {
    const Column<A, W>& column;
    const Upstream<A>& up;
    int64_t dy_start;
    A h[W][kFour];

    __device__ Backwards(const Column<A, W>& c, const Upstream<A>& upstream, int64_t begin)
        : column(c), up(upstream), dy_start(c.p.start(c.sequence, up.batch_stride, up.time_stride)) {
#pragma unroll
        for (int w = 1; w < W; ++w) column.read(begin - W + w, h[w]);
    }
    // Of step t, one after the last; 0 past the end.
    __device__ __forceinline__ void next(int64_t t, A (&dz)[kFour]) {
        const bool there = t < column.steps;
        shift(h);
        if (there) column.read(t, h[W - 1]);
        load_four<A>(up.dy, column.p.dtype, up.aligned, dy_start + t * up.time_stride + column.channel,
                     there ? column.count : 0, dz);
        if (!column.p.silu || !there) return;
        A z[kFour];
        column.convolve(h, z);
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            const A s = sigmoid(z[j]);
            dz[j] *= s * (A(1) + z[j] * (A(1) - s));
        }
    }
};

// A run's dx, and its parts of dweight [runs, D, W] and dbias [runs, D].
template <class A, int W>
__global__ void __launch_bounds__(kThreads) differentiate(const Problem<A> p, const Upstream<A> up, const int64_t runs,
                                                          const int64_t steps, void* dx, A* dweight, A* dbias) {
    const Place place(p.channels);
    if (place.run >= runs) return;
    Column<A, W> column(p, place.four);
    A dw[W][kFour], db[kFour];
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        db[j] = 0;
#pragma unroll
        for (int w = 0; w < W; ++w) dw[w][j] = 0;
    }
    each_piece<A, W>(p, place.run, steps, column, [&](int64_t begin, int64_t end) {
        Backwards<A, W> backwards(column, up, begin);
        A dz[W][kFour] = {};  // of the steps t - W + 1 to t
        for (int64_t t = begin; t < end + W - 1; ++t) {
            shift(dz);
            backwards.next(t, dz[W - 1]);
            if (t < end) {
#pragma unroll
                for (int j = 0; j < kFour; ++j) {
                    db[j] += dz[W - 1][j];
#pragma unroll
                    for (int w = 0; w < W; ++w) dw[w][j] += dz[W - 1][j] * backwards.h[w][j];
                }
            }
            const int64_t row = t - (W - 1), kept = row - (column.steps - (W - 1));
            if (row < begin) continue;
            A gradient[kFour];
            load_four<A>(up.dstate_out, p.dtype, p.aligned, column.state_row(kept), kept >= 0 ? column.count : 0,
                         gradient);
#pragma unroll
            for (int j = 0; j < kFour; ++j)
#pragma unroll
                for (int w = 0; w < W; ++w) gradient[j] += column.weight[W - 1 - w][j] * dz[w][j];
            store_four<A>(dx, p.dtype, p.aligned, column.row(row), column.count, gradient);
        }
    });
    const int64_t own = place.run * p.channels + column.channel;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        if (j >= column.count) continue;
        dbias[own + j] = db[j];
#pragma unroll
        for (int w = 0; w < W; ++w) dweight[(own + j) * W + w] = dw[w][j];
    }
}

// The gradient of the rows of the state: what the first W - 1 steps read of them, and what of them is handed on.
template <class A, int W>
__global__ void __launch_bounds__(kThreads)
    differentiate_state(const Problem<A> p, const Upstream<A> up, void* dstate) {
    const Place place(p.channels);
    if (place.run >= p.sequences) return;
    Column<A, W> column(p, place.four);
    column.enter(place.run);
    Backwards<A, W> backwards(column, up, 0);
    A gradient[W][kFour];
#pragma unroll
    for (int row = 0; row < W - 1; ++row) {
        const int64_t kept = row - column.steps;
        load_four<A>(up.dstate_out, p.dtype, p.aligned, column.state_row(kept), kept >= 0 ? column.count : 0,
                     gradient[row]);
    }
#pragma unroll
    for (int t = 0; t < W - 1; ++t) {
        A dz[kFour];
        backwards.next(t, dz);
#pragma unroll
        for (int row = t; row < W - 1; ++row)
#pragma unroll
            for (int j = 0; j < kFour; ++j) gradient[row][j] += column.weight[row - t][j] * dz[j];
    }
#pragma unroll
    for (int row = 0; row < W - 1; ++row)
        store_four<A>(dstate, p.dtype, p.aligned, column.state_row(row), column.count, gradient[row]);
}

// Host side.

// Steps of a run: few enough that all threads of a GPU have one.
template <class A>
int64_t steps_of_run(const Problem<A>& p) {
    const int64_t all = p.lines() * p.length * ceil_div(p.channels, kFour);
    return std::max(kLeastRun, ceil_div(all, kBusyThreads));
}

template <class A>
int64_t runs_of(const Problem<A>& p, int64_t steps) {
    return p.lines() * ceil_div(p.length, steps);
}

template <class A>
dim3 grid_for(const Problem<A>& p, int64_t runs) {
    return grid_of(ceil_div(runs * ceil_div(p.channels, kFour), kThreads));
}

bool aligned(int32_t dtype, const void* data, int64_t channels, int64_t batch_stride, int64_t time_stride) {
    return reinterpret_cast<int64_t>(data) % (kFour * bytes_of(dtype)) == 0 && channels % kFour == 0 &&
           batch_stride % kFour == 0 && time_stride % kFour == 0;
}

// Calls f with a null pointer of the accumulation type and with the width.
template <class F>
int32_t with_width(int32_t dtype, int64_t width, F f) {
    const auto with = [&](auto w) {
        if (dtype == SEQARCH_FLOAT64) return f(static_cast<double*>(nullptr), w);
        if (dtype >= SEQARCH_FLOAT32 && dtype <= SEQARCH_FLOAT16) return f(static_cast<float*>(nullptr), w);
        return static_cast<int32_t>(SEQARCH_BAD_ARGUMENT);
    };
    switch (width) {
        case 2: return with(std::integral_constant<int, 2>());
        case 3: return with(std::integral_constant<int, 3>());
        case 4: return with(std::integral_constant<int, 4>());
        case 5: return with(std::integral_constant<int, 5>());
        case 6: return with(std::integral_constant<int, 6>());
        case 7: return with(std::integral_constant<int, 7>());
        case 8: return with(std::integral_constant<int, 8>());
        default: return SEQARCH_BAD_ARGUMENT;
    }
}

// `each` are contiguous tensors of rows of channels that the kernels read or write, NULL where there is none.
template <class A>
Problem<A> problem(const seqarch_causal_conv1d_inputs& in, std::initializer_list<const void*> each) {
    const auto [x, batch_stride, time_stride, dtype] = in.x;
    bool whole = aligned(dtype, x, in.channels, batch_stride, time_stride);
    for (const void* data : each) whole = whole && aligned(dtype, data, in.channels, 0, 0);
    return {x, batch_stride, time_stride, static_cast<const A*>(in.weight), static_cast<const A*>(in.bias), in.state,
            in.offsets, in.sequences, in.length, in.channels, dtype, whole, in.silu != 0};
}

bool valid(const seqarch_causal_conv1d_inputs& in) {
    return countable({in.sequences, in.length, in.channels, in.width});
}

}  // namespace

int32_t seqarch_cuda_causal_conv1d_forward(const seqarch_causal_conv1d_inputs* inputs,
                                           const seqarch_causal_conv1d_outputs* outputs, void* workspace,
                                           int64_t* workspace_bytes, void* stream) {
    const auto& in = *inputs;
    const auto& out = *outputs;
    if (!valid(in)) return SEQARCH_BAD_ARGUMENT;
    return with_width(in.x.dtype, in.width, [&](auto* type, auto w) -> int32_t {
        using A = std::remove_pointer_t<decltype(type)>;
        constexpr int W = decltype(w)::value;
        if (!workspace) {
            *workspace_bytes = Workspace(nullptr).bytes();
            return SEQARCH_OK;
        }
        const auto p = problem<A>(in, {in.state, out.y, out.state_out});
        const int64_t steps = steps_of_run(p), runs = runs_of(p, steps);
        Launches launch(stream);
        launch(convolve<A, W>, grid_for(p, runs), kThreads, 0, p, runs, steps, out.y);
        launch(last_rows<A, W>, grid_for(p, in.sequences), kThreads, 0, p, out.state_out);
        return launch.code();
    });
}

int32_t seqarch_cuda_causal_conv1d_backward(const seqarch_causal_conv1d_inputs* inputs,
                                            const seqarch_causal_conv1d_gradients* gradients, void* workspace,
                                            int64_t* workspace_bytes, void* stream) {
    const auto& in = *inputs;
    const auto& g = *gradients;
    if (!valid(in) || g.dy.dtype != in.x.dtype) return SEQARCH_BAD_ARGUMENT;
    return with_width(in.x.dtype, in.width, [&](auto* type, auto w) -> int32_t {
        using A = std::remove_pointer_t<decltype(type)>;
        constexpr int W = decltype(w)::value;
        const auto p = problem<A>(in, {in.state, g.dx, g.dstate_out, g.dstate});
        const Upstream<A> up{g.dy.data, g.dy.batch_stride, g.dy.time_stride, g.dstate_out,
                             aligned(g.dy.dtype, g.dy.data, in.channels, g.dy.batch_stride, g.dy.time_stride)};
        const int64_t steps = steps_of_run(p), runs = runs_of(p, steps);
        Workspace buffers(workspace);
        A* weights = buffers.take<A>(runs * in.channels * W);
        A* biases = buffers.take<A>(runs * in.channels);
        if (!workspace) {
            *workspace_bytes = buffers.bytes();
            return SEQARCH_OK;
        }
        Launches launch(stream);
        launch(differentiate<A, W>, grid_for(p, runs), kThreads, 0, p, up, runs, steps, g.dx, weights, biases);
        launch_sum(launch, weights, runs, in.channels * W, static_cast<A*>(g.dweight));
        if (g.dbias) launch_sum(launch, biases, runs, in.channels, static_cast<A*>(g.dbias));
        if (g.dstate) launch(differentiate_state<A, W>, grid_for(p, in.sequences), kThreads, 0, p, up, g.dstate);
        return launch.code();
    });
}
