// What both directions of the selective scan share: how it is cut, a thread's share of a chunk, scans of segments.
//
// Time. Every sequence is cut into chunks of kChunk steps; the chunks of all sequences form one list, of which a
// segment is some neighbours. A block takes one segment through its chunks. Where there are enough channels and
// sequences to fill a GPU, a segment is all of a sequence. Otherwise there are more, and each needs the state that
// enters it: a first pass scans every segment from zero (scan_segments), a second one joins what they make of a state
// (join_segments).
//
// Channels. A block takes `kWidth` neighbouring channels of one group, a warp `kChannels` of them. The states of a
// channel lie in the registers of `kSharing` lanes, kStates in each. So decays cost one exponential and all else a few
// fused multiply-adds, sums over states are short, and B and C are read once per block. Rows come from memory four
// neighbouring channels per thread and go through shared memory, since a thread reads more channels and fewer steps
// than it scans.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"

namespace seqarch::cuda::scan {

constexpr int kChunk = SEQARCH_CUDA_CHUNK;
constexpr int kGroup = 4;              // steps whose sums over states are taken together
constexpr int64_t kBusyWarps = 2048;  // as many as fill a large GPU; fixed, so that results do not depend on the device
constexpr int64_t kLeastSpan = 8;      // chunks of a segment that is worth a first pass

// kBlocks: as many as a multiprocessor must hold in the backward pass, which bounds their registers.
template <int kStates_, int kSharing_, int kWarps_, int kBlocks_>
struct Lanes {
    static constexpr int kStates = kStates_, kSharing = kSharing_, kWarps = kWarps_, kBlocks = kBlocks_;
    static constexpr int kThreads = kWarps * kWarp, kChannels = kWarp / kSharing, kWidth = kWarps * kChannels;
    static constexpr int kPadded = kStates * kSharing;                           // states, with those that pad
    static constexpr int kFours = kWidth / kFour;                                // of a row
    static constexpr int kRows = kThreads / kFours;                              // that all threads read at once
    static constexpr int kShares = kRows >= kChunk ? 1 : kChunk / kRows;         // fours of a thread in a chunk
    static constexpr int kVectors = kChunk * kPadded / kThreads ? kChunk * kPadded / kThreads : 1;  // numbers of B, too
};

struct Rows {
    void* data;
    int64_t batch_stride, time_stride;
    int32_t dtype;
    bool aligned;  // whether four neighbours from a multiple of four on may be read at once
};

// Where sequences and their chunks lie. With `offsets` they are packed into one row.
struct Layout {
    const int64_t* offsets;
    int64_t sequences, length, per_sequence;

    __device__ int64_t chunks() const { return offsets ? offsets[2 * sequences + 1] : sequences * per_sequence; }
};

// A sequence: its number, its chunks, its steps, and its first row among those of all.
struct Sequence {
    int64_t number, first, end, steps, row;

    __device__ Sequence(const Layout& all, int64_t chunk) {
        if (all.offsets) {
            const int64_t* chunks = all.offsets + all.sequences + 1;
            number = find_sequence(chunks, all.sequences, chunk);
            first = chunks[number];
            end = chunks[number + 1];
            row = all.offsets[number];
            steps = all.offsets[number + 1] - row;
        } else {
            number = chunk / all.per_sequence;
            first = number * all.per_sequence;
            end = first + all.per_sequence;
            row = number * all.length;
            steps = all.length;
        }
    }
    __device__ int64_t step(int64_t chunk) const { return (chunk - first) * kChunk; }
    __device__ int count(int64_t chunk) const {
        const int64_t left = steps - step(chunk);
        return left < kChunk ? static_cast<int>(left) : kChunk;
    }
};

template <class A>
struct Problem {
    Rows x, dt, B, C, z;
    const A *rate, *skip, *bias;
    Layout layout;
    int64_t channels, states, groups;
    bool softplus, scale_input;

    // The first element of a sequence's row at a step.
    __device__ int64_t element(const Rows& rows, const Sequence& at, int64_t step) const {
        return layout.offsets ? (at.row + step) * rows.time_stride
                              : at.number * rows.batch_stride + step * rows.time_stride;
    }
};

// Segments are `span` chunks each. `carried`: some begin within a sequence.
struct Segments {
    int64_t span, count;
    bool carried;
};

// What the first pass says of each segment: the sum of its step sizes [segments, D], whether it does not hand on the
// state that enters it, and the state that leaves it [segments, D, N], for which join_segments puts the entering one.
template <class A>
struct Passing {
    A* steps;
    int32_t* cut;
    A* states;
};

// A rate to base 2, and finite, so that no step of 0 meets a rate of -inf.
template <class A>
__device__ __forceinline__ A binary_rate(A rate) {
    constexpr A kLowest = std::is_same_v<A, float> ? A(-8e37) : A(-4e307);
    return (rate < kLowest ? kLowest : rate) * static_cast<A>(kLog2E);
}

inline int64_t tiles_of_group(int64_t channels, int64_t groups, int64_t width) {
    return ceil_div(channels / groups, width);
}

// The block's channels: those from `first` on of one group, `count` of them.
template <class L>
struct Columns {
    int64_t group, first;
    int count;

    template <class A>
    __device__ explicit Columns(const Problem<A>& p) {
        const int64_t of_group = p.channels / p.groups, tiles = ceil_div(of_group, L::kWidth);
        const int64_t tile = blockIdx.y % tiles, left = of_group - tile * L::kWidth;
        group = blockIdx.y / tiles;
        first = group * of_group + tile * L::kWidth;
        count = left < L::kWidth ? static_cast<int>(left) : L::kWidth;
    }
};

// A lane's place: its channel of the block's, and its states from `state` on.
template <class L>
struct Lane {
    int warp, sharing, channel, state;
    bool busy;  // whether its warp has channels at all

    __device__ explicit Lane(const Columns<L>& columns) {
        const int lane = threadIdx.x % kWarp;
        warp = threadIdx.x / kWarp;
        sharing = lane % L::kSharing;
        channel = warp * L::kChannels + lane / L::kSharing;
        state = sharing * L::kStates;
        busy = warp * L::kChannels < columns.count;
    }
    __device__ int place() const { return threadIdx.x % kWarp / L::kSharing; }

    // Its states of a tensor [D, N]; `padding` for those that are not there.
    template <class A>
    __device__ void load(const A* from, const Columns<L>& columns, int64_t states, A padding,
                         A (&to)[L::kStates]) const {
        const bool there = channel < columns.count;
        from += (columns.first + channel) * states + state;
#pragma unroll
        for (int j = 0; j < L::kStates; ++j) to[j] = there && state + j < states ? from[j] : padding;
    }
    template <class A>
    __device__ void store(A* to, const Columns<L>& columns, int64_t states, const A (&values)[L::kStates]) const {
        if (channel >= columns.count) return;
        to += (columns.first + channel) * states + state;
#pragma unroll
        for (int j = 0; j < L::kStates; ++j)
            if (state + j < states) to[j] = values[j];
    }
    // What pads decays: a rate of 0 would make NaN of an infinite step.
    template <class A>
    __device__ void load_rates(const Problem<A>& p, const Columns<L>& columns, A (&rate)[L::kStates]) const {
        load(p.rate, columns, p.states, A(-1), rate);
#pragma unroll
        for (int j = 0; j < L::kStates; ++j) rate[j] = binary_rate(rate[j]);
    }
};

// Where a thread's fours of a chunk stand: always in the same columns, `kRows` rows apart.
template <class L>
struct Share {
    int row, column, left;

    __device__ explicit Share(const Columns<L>& columns) {
        row = threadIdx.x / L::kFours;
        column = threadIdx.x % L::kFours * kFour;
        left = columns.count - column;
    }
    __device__ int row_of(int i) const { return row + i * L::kRows; }

    template <class A>
    __device__ void load(const Problem<A>& p, const Rows& rows, const Columns<L>& columns, const Sequence& at,
                         int64_t chunk, int i, A (&to)[kFour]) const {
        const int64_t base = p.element(rows, at, at.step(chunk)) + columns.first + column;
        load_four<A>(rows.data, rows.dtype, rows.aligned, base + row_of(i) * rows.time_stride,
                     row_of(i) < at.count(chunk) ? left : 0, to);
    }
    template <class A>
    __device__ void store(const Problem<A>& p, const Rows& rows, const Columns<L>& columns, const Sequence& at,
                          int64_t chunk, int i, const A (&values)[kFour]) const {
        if (row_of(i) >= at.count(chunk)) return;
        const int64_t base = p.element(rows, at, at.step(chunk)) + columns.first + column;
        store_four<A>(rows.data, rows.dtype, rows.aligned, base + row_of(i) * rows.time_stride, left, values);
    }
    // Four numbers of [D] or, of none, zeros.
    template <class A>
    __device__ void load_parameter(const A* from, const Columns<L>& columns, A (&to)[kFour]) const {
#pragma unroll
        for (int j = 0; j < kFour; ++j) to[j] = from && j < left ? from[columns.first + column + j] : A(0);
    }
};

// dt with bias, and the step size from it; 0 for what is not there, which leaves the state as it is.
template <class A>
__device__ __forceinline__ A biased(const Problem<A>& p, A dt, A bias) {
    return p.bias ? dt + bias : dt;
}
template <class A>
__device__ __forceinline__ A step_size(const Problem<A>& p, A raw, bool there) {
    return !there ? A(0) : p.softplus ? softplus(raw) : raw;
}

template <class A, class L>
using Vectors = A[kChunk][L::kPadded];

// A thread's numbers of B or C in a chunk, and their way into shared memory; 0 for steps and states that are not there.
template <class A, class L>
struct VectorShare {
    A values[L::kVectors];

    __device__ void load(const Problem<A>& p, const Rows& rows, const Columns<L>& columns, const Sequence& at,
                         int64_t chunk) {
        const int64_t base = p.element(rows, at, at.step(chunk)) + columns.group * p.states;
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
            const int place = threadIdx.x + i * L::kThreads, row = place / L::kPadded, n = place % L::kPadded;
            const bool there = row < at.count(chunk) && n < p.states;
            values[i] = there ? load_one<A>(rows.data, rows.dtype, base + row * rows.time_stride + n) : A(0);
        }
    }
    __device__ void stage(Vectors<A, L>& to) const {
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
            const int place = threadIdx.x + i * L::kThreads;
            if (place < kChunk * L::kPadded) to[place / L::kPadded][place % L::kPadded] = values[i];
        }
    }
};

template <class A, class L>
struct SegmentTile {
    A delta[kChunk][L::kWidth], write[kChunk][L::kWidth];
    Vectors<A, L> vectors;
};

// Scans every segment from zero or from where a sequence begins in it, up to its last step; backward, the gradient of
// the states from its end or from where a sequence ends in it, down to its first step, from dy and dstate_out.
template <bool kBackward, class A, class L>
__global__ void __launch_bounds__(L::kThreads)
    scan_segments(const Problem<A> p, const Segments segments, const Rows dy, const A* ends, const Passing<A> passing) {
    auto& tile = *reinterpret_cast<SegmentTile<A, L>*>(shared_memory());
    const Columns<L> columns(p);
    const Lane<L> lane(columns);
    const Share<L> share(columns);
    const int64_t segment = blockIdx.x, begin = segment * segments.span, all = p.layout.chunks();
    const int64_t end = begin + segments.span < all ? begin + segments.span : all;
    if (begin >= end) return;

    // Of the sequences in the segment, only the one at the end where the state leaves it counts.
    const Sequence at(p.layout, kBackward ? begin : end - 1);
    const bool cut = kBackward ? at.end <= end : at.first >= begin;
    const int64_t low = kBackward || !cut ? begin : at.first, high = kBackward && cut ? at.end : end;
    A rate[L::kStates], h[L::kStates], bias[kFour], sum = 0;
    lane.load_rates(p, columns, rate);
    share.load_parameter(p.bias, columns, bias);
    const A* start = cut && ends ? ends + at.number * p.channels * p.states : nullptr;
    if (start) {
        lane.load(start, columns, p.states, A(0), h);
    } else {
#pragma unroll
        for (int j = 0; j < L::kStates; ++j) h[j] = 0;
    }
    for (int64_t i = 0; i < high - low; ++i) {
        const int64_t chunk = kBackward ? high - 1 - i : low + i;
        const int steps = at.count(chunk);
        VectorShare<A, L> vectors;
        vectors.load(p, kBackward ? p.C : p.B, columns, at, chunk);
        __syncthreads();
        vectors.stage(tile.vectors);
#pragma unroll
        for (int s = 0; s < L::kShares; ++s) {
            const int row = share.row_of(s);
            if (row >= kChunk) continue;
            A written[kFour], dt[kFour], z[kFour];
            share.load(p, kBackward ? dy : p.x, columns, at, chunk, s, written);
            share.load(p, p.dt, columns, at, chunk, s, dt);
            if (kBackward && p.z.data) share.load(p, p.z, columns, at, chunk, s, z);
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                const A delta = step_size(p, biased(p, dt[j], bias[j]), row < steps && j < share.left);
                if (kBackward && p.z.data) written[j] *= z[j] * sigmoid(z[j]);
                if (!kBackward && p.scale_input) written[j] *= delta;
                tile.delta[row][share.column + j] = delta;
                tile.write[row][share.column + j] = written[j];
            }
        }
        __syncthreads();
        if (!lane.busy) continue;
#pragma unroll 4
        for (int s = 0; s < steps; ++s) {
            const int t = kBackward ? steps - 1 - s : s;
            const A delta = tile.delta[t][lane.channel], write = tile.write[t][lane.channel];
            sum += delta;
#pragma unroll
            for (int j = 0; j < L::kStates; ++j) {
                const A decay = power_of_two(delta * rate[j]), w = write * tile.vectors[t][lane.state + j];
                h[j] = kBackward ? decay * (h[j] + w) : decay * h[j] + w;
            }
        }
    }
    lane.store(passing.states + segment * p.channels * p.states, columns, p.states, h);
    if (lane.sharing == 0 && lane.channel < columns.count)
        passing.steps[segment * p.channels + columns.first + lane.channel] = sum;
    if (threadIdx.x == 0 && blockIdx.y == 0) passing.cut[segment] = cut;
}

// Replaces the state that leaves each segment by the one that enters it; backward, from the last segment to the first.
template <bool kBackward, class A>
__global__ void __launch_bounds__(128)
    join_segments(const Problem<A> p, const Segments segments, const Passing<A> passing) {
    const int64_t size = p.channels * p.states, i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const int64_t channel = i / p.states, count = ceil_div(p.layout.chunks(), segments.span);
    const A rate = binary_rate(p.rate[i]);
    A h = 0;
#pragma unroll 4
    for (int64_t s = 0; s < count; ++s) {
        const int64_t segment = kBackward ? count - 1 - s : s;
        const A own = passing.states[segment * size + i];
        const A kept =
            passing.cut[segment] ? A(0) : power_of_two(passing.steps[segment * p.channels + channel] * rate) * h;
        passing.states[segment * size + i] = h;
        h = kept + own;
    }
}

// The states of sequences without a step: the last is the first, and so are their gradients.
template <class A>
__global__ void __launch_bounds__(128) pass_empty(const Layout layout, int64_t size, const A* from, A* to) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, sequence = i / (size ? size : 1);
    if (sequence >= layout.sequences) return;
    const int64_t steps = layout.offsets ? layout.offsets[sequence + 1] - layout.offsets[sequence] : layout.length;
    if (!steps) to[i] = from ? from[i] : A(0);
}

// Host side.

inline Rows rows_of(const seqarch_rows& rows, int64_t columns) {
    if (!rows.data) return {nullptr, 0, 0, 0, false};
    const int64_t address = reinterpret_cast<int64_t>(rows.data);
    const bool aligned = address % (kFour * bytes_of(rows.dtype)) == 0 && columns % kFour == 0 &&
                         rows.batch_stride % kFour == 0 && rows.time_stride % kFour == 0;
    return {rows.data, rows.batch_stride, rows.time_stride, rows.dtype, aligned};
}

// The chunks of all sequences; of packed ones at least as many.
inline int64_t count_chunks(const Layout& layout) {
    return layout.offsets ? layout.length / kChunk + layout.sequences : layout.sequences * layout.per_sequence;
}

inline Segments cut(const Layout& layout, int64_t warps) {
    const int64_t lines = layout.offsets ? 1 : layout.sequences, all = count_chunks(layout);
    const int64_t whole = layout.offsets ? all : layout.per_sequence, busy = std::max<int64_t>(1, lines * warps);
    int64_t span = whole;
    if (busy * 3 < kBusyWarps) span = std::min(whole, std::max(kLeastSpan, ceil_div(whole * busy, kBusyWarps)));
    if (span < 1) return {1, 0, false};
    return {span, ceil_div(all, span), span < whole};
}

template <class L, class A>
dim3 grid_for(const Problem<A>& p, const Segments& segments) {
    const int64_t tiles = p.channels ? tiles_of_group(p.channels, p.groups, L::kWidth) * p.groups : 0;
    return grid_of(segments.count, tiles);
}

// Workspace for what segments hand on, nothing where they do not.
template <class A>
Passing<A> lay_out_passing(Workspace& buffers, const Problem<A>& p, const Segments& segments) {
    const int64_t count = segments.carried ? segments.count : 0;
    A* steps = buffers.take<A>(count * p.channels);
    int32_t* cut = buffers.take<int32_t>(count);
    return {steps, cut, buffers.take<A>(count * p.channels * p.states)};
}

// What enters each segment, in passing.states.
template <bool kBackward, class A, class L>
void pass_segments(Launches& launch, const Problem<A>& p, const Segments& segments, const Rows& dy, const A* ends,
                   const Passing<A>& passing) {
    if (!segments.carried) return;
    launch(scan_segments<kBackward, A, L>, grid_for<L>(p, segments), L::kThreads, sizeof(SegmentTile<A, L>), p,
           segments, dy, ends, passing);
    launch(join_segments<kBackward, A>, grid_of(ceil_div(p.channels * p.states, 128)), 128, 0, p, segments, passing);
}

template <class A>
void pass_empty_states(Launches& launch, const Problem<A>& p, const A* from, A* to) {
    const int64_t size = p.channels * p.states;
    if (p.layout.offsets || !p.layout.length)
        launch(pass_empty<A>, grid_of(ceil_div(p.layout.sequences * size, 128)), 128, 0, p.layout, size, from, to);
}

// Calls f with the accumulation type and with the lanes for so many states. The sums of a block's warps over more
// states of float64 than these outgrow the shared memory of the older devices.
template <class F>
int32_t with_lanes(int32_t dtype, int64_t states, F f) {
    const auto with = [&](auto lanes) {
        if (dtype == SEQARCH_FLOAT32) return f(static_cast<float*>(nullptr), lanes);
        if (dtype == SEQARCH_FLOAT64) return f(static_cast<double*>(nullptr), lanes);
        return static_cast<int32_t>(SEQARCH_BAD_ARGUMENT);
    };
    if (states <= 1) return with(Lanes<1, 1, 4, 4>());
    if (states <= 4) return with(Lanes<4, 1, 4, 3>());
    if (states <= 8) return with(Lanes<4, 2, 4, 3>());
    if (states <= 16) return with(Lanes<4, 4, 8, 2>());
    if (states <= 32) return with(Lanes<4, 8, 4, 3>());
    if (states <= SEQARCH_CUDA_STATES64) return with(Lanes<4, 16, 4, 2>());
    if (states > SEQARCH_CUDA_STATES || dtype != SEQARCH_FLOAT32) return SEQARCH_BAD_ARGUMENT;
    return f(static_cast<float*>(nullptr), Lanes<4, 32, 4, 2>());
}

inline bool known(int32_t wide, const seqarch_rows& rows) {
    return !rows.data || rows.dtype == SEQARCH_FLOAT32 || rows.dtype == SEQARCH_BFLOAT16 ||
           rows.dtype == SEQARCH_FLOAT16 || (rows.dtype == SEQARCH_FLOAT64 && wide == SEQARCH_FLOAT64);
}

// Whether a kernel computes with these inputs, and with `others` beside them.
inline bool valid(const seqarch_selective_scan_inputs& in, std::initializer_list<seqarch_rows> others) {
    if (!countable({in.sequences, in.length, in.channels, in.state_width, in.groups})) return false;
    for (const seqarch_rows& rows : {in.x, in.dt, in.B, in.C, in.z})
        if (!known(in.dtype, rows)) return false;
    for (const seqarch_rows& rows : others)
        if (!known(in.dtype, rows)) return false;
    return in.chunk == kChunk && in.groups > 0 && in.channels % in.groups == 0;
}

template <class A>
Problem<A> problem(const seqarch_selective_scan_inputs& in) {
    const int64_t columns = in.channels / in.groups, states = in.state_width;
    return {rows_of(in.x, columns), rows_of(in.dt, columns), rows_of(in.B, states), rows_of(in.C, states),
            rows_of(in.z, columns), static_cast<const A*>(in.A), static_cast<const A*>(in.D),
            static_cast<const A*>(in.dt_bias), Layout{in.offsets, in.sequences, in.length, ceil_div(in.length, kChunk)},
            in.channels, states, in.groups, in.softplus != 0, in.scale_input != 0};
}

}  // namespace seqarch::cuda::scan
