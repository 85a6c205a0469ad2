// The gradients of the selective scan. See seqarch.h for the equation, scan.cuh for the cut.
//
// A block goes through the chunks of its segment from the last to the first. The states of a chunk are computed again
// from the one kept before it and stay in registers; the decays cost a second exponential, which is cheaper than room
// for them. What is summed over channels, dB and dC, is summed over a warp as it arises, over the block's warps once
// per chunk, and over blocks by a kernel of its own; what is summed over steps, once per segment and then over
// segments. No sum depends on the order in which blocks run.
#include "scan.cuh"

namespace {

using namespace seqarch::cuda;
using namespace seqarch::cuda::scan;

template <class A>
struct Gradients {
    const A* starts;
    Rows dy;
    const A* dstate_out;
    Rows dx, ddt, dB, dC, dz;
    A *dA, *dD, *dbias, *dstate;
};

// Parts of sums: dB and dC side by side, [tiles, rows, 2, N]; dA, dD and dbias [segments, ...].
template <class A>
struct Parts {
    A *vectors, *rates, *skip, *bias;
};

template <class A, class L>
struct BackwardTile {
    A delta[kChunk][L::kWidth], write[kChunk][L::kWidth], dy[kChunk][L::kWidth];  // dy: of y before the gate
    A x[kChunk][L::kWidth], slope[kChunk][L::kWidth], dgate[kChunk][L::kWidth];
    A y[kChunk][L::kWidth], dwrite[kChunk][L::kWidth], dstep[kChunk][L::kWidth];
    Vectors<A, L> B, C;
    A sums[L::kWarps][kChunk][2 * L::kPadded];
};

// A chunk's inputs, and what of them the gradients need.
template <class A, class L>
__device__ __forceinline__ void stage(const Problem<A>& p, const Gradients<A>& g, const Columns<L>& columns,
                                      const Share<L>& share, const Sequence& at, int64_t chunk,
                                      BackwardTile<A, L>& tile) {
    A bias[kFour];
    VectorShare<A, L> B, C;
    B.load(p, p.B, columns, at, chunk);
    C.load(p, p.C, columns, at, chunk);
    share.load_parameter(p.bias, columns, bias);
    __syncthreads();
    B.stage(tile.B);
    C.stage(tile.C);
#pragma unroll
    for (int i = 0; i < L::kShares; ++i) {
        const int row = share.row_of(i);
        if (row >= kChunk) continue;
        A x[kFour], dt[kFour], dy[kFour], z[kFour];
        share.load(p, p.x, columns, at, chunk, i, x);
        share.load(p, p.dt, columns, at, chunk, i, dt);
        share.load(p, g.dy, columns, at, chunk, i, dy);
        if (p.z.data) share.load(p, p.z, columns, at, chunk, i, z);
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            const int column = share.column + j;
            const A raw = biased(p, dt[j], bias[j]);
            const A delta = step_size(p, raw, row < at.count(chunk) && j < share.left);
            if (p.z.data) {
                const A gate = sigmoid(z[j]);
                tile.dgate[row][column] = dy[j] * gate * (A(1) + z[j] * (A(1) - gate));
                dy[j] *= z[j] * gate;
            }
            tile.delta[row][column] = delta;
            tile.write[row][column] = p.scale_input ? delta * x[j] : x[j];
            tile.dy[row][column] = dy[j];
            tile.x[row][column] = x[j];
            tile.slope[row][column] = p.softplus ? softplus_slope(raw) : A(1);
        }
    }
    __syncthreads();
}

// The states before each step of a chunk from the one before the first, which becomes the one after the last; and y
// before the gate, where `gated`.
template <class A, class L>
__device__ __forceinline__ void scan_again(BackwardTile<A, L>& tile, const Lane<L>& lane, int steps, bool gated,
                                           const A (&rate)[L::kStates], A (&h)[L::kStates],
                                           A (&before)[kChunk][L::kStates]) {
    using Sum = Fold<kGroup, L::kSharing, 1>;
#pragma unroll
    for (int begin = 0; begin < kChunk; begin += kGroup) {
        if (begin >= steps) continue;
        A y[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int t = begin + i;
            const A delta = tile.delta[t][lane.channel], write = tile.write[t][lane.channel];
            y[i] = 0;
#pragma unroll
            for (int j = 0; j < L::kStates; ++j) {
                before[t][j] = h[j];
                h[j] = power_of_two(delta * rate[j]) * h[j] + write * tile.B[t][lane.state + j];
                y[i] += tile.C[t][lane.state + j] * h[j];
            }
        }
        if (!gated) continue;
        Sum::sum(y, lane.sharing);
        if (Sum::writes(lane.sharing)) {
#pragma unroll
            for (int i = 0; i < Sum::kKept; ++i) tile.y[begin + Sum::first(lane.sharing) + i][lane.channel] = y[i];
        }
    }
}

// A chunk backwards. `carried` is the gradient of the state after it and becomes that of the state before it; `after`
// is the state after it. The gradients of step sizes are per unit of rate, so to base 2.
template <class A, class L>
__device__ __forceinline__ void differentiate(BackwardTile<A, L>& tile, const Lane<L>& lane, int steps, bool shared,
                                              const A (&rate)[L::kStates], const A (&before)[kChunk][L::kStates],
                                              A (&after)[L::kStates], A (&carried)[L::kStates],
                                              A (&drate)[L::kStates]) {
    using OverStates = Fold<2 * kGroup, L::kSharing, 1>;
    using OverChannels = Fold<2 * L::kStates, L::kChannels, L::kSharing>;
#pragma unroll
    for (int begin = kChunk - kGroup; begin >= 0; begin -= kGroup) {
        if (begin >= steps) continue;
        A both[2 * kGroup];  // of writes, then of step sizes
#pragma unroll
        for (int i = kGroup - 1; i >= 0; --i) {
            const int t = begin + i;
            const A delta = tile.delta[t][lane.channel], write = tile.write[t][lane.channel];
            const A dy = tile.dy[t][lane.channel];
            A vectors[2 * L::kStates];  // of B, then of C
            both[i] = both[kGroup + i] = 0;
#pragma unroll
            for (int j = 0; j < L::kStates; ++j) {
                const A gradient = carried[j] + dy * tile.C[t][lane.state + j];
                vectors[j] = gradient * write;
                vectors[L::kStates + j] = after[j] * dy;
                both[i] += gradient * tile.B[t][lane.state + j];
                carried[j] = gradient * power_of_two(delta * rate[j]);
                const A through = carried[j] * before[t][j];
                both[kGroup + i] += through * rate[j];
                drate[j] += through * delta;
                after[j] = before[t][j];
            }
            if (!shared) continue;
            OverChannels::sum(vectors, lane.place());
            if (OverChannels::writes(lane.place())) {
#pragma unroll
                for (int k = 0; k < OverChannels::kKept; ++k) {
                    const int which = OverChannels::first(lane.place()) + k;
                    const int place = which / L::kStates * L::kPadded + lane.state + which % L::kStates;
                    tile.sums[lane.warp][t][place] = vectors[k];
                }
            }
        }
        OverStates::sum(both, lane.sharing);
        if (OverStates::writes(lane.sharing)) {
#pragma unroll
            for (int k = 0; k < OverStates::kKept; ++k) {
                const int which = OverStates::first(lane.sharing) + k, t = begin + which % kGroup;
                (which < kGroup ? tile.dwrite : tile.dstep)[t][lane.channel] = both[k];
            }
        }
    }
}

// The gradients of a chunk's rows from those of its writes and step sizes; dskip and dbias grow.
template <class A, class L>
__device__ __forceinline__ void finish(const Problem<A>& p, const Gradients<A>& g, const Columns<L>& columns,
                                       const Share<L>& share, const Sequence& at, int64_t chunk,
                                       const BackwardTile<A, L>& tile, A (&dskip)[kFour], A (&dbias)[kFour]) {
    A skip[kFour];
    share.load_parameter(p.skip, columns, skip);
#pragma unroll
    for (int i = 0; i < L::kShares; ++i) {
        const int row = share.row_of(i);
        if (row >= at.count(chunk) || share.left <= 0) continue;
        A dx[kFour], ddt[kFour], dz[kFour];
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            const int column = share.column + j;
            if (j >= share.left) {
                dx[j] = ddt[j] = dz[j] = 0;
                continue;
            }
            const A x = tile.x[row][column], dy = tile.dy[row][column], dwrite = tile.dwrite[row][column];
            dx[j] = (p.scale_input ? dwrite * tile.delta[row][column] : dwrite) + skip[j] * dy;
            ddt[j] = tile.dstep[row][column] * static_cast<A>(kLn2) + (p.scale_input ? dwrite * x : A(0));
            ddt[j] *= tile.slope[row][column];
            dz[j] = p.z.data ? tile.dgate[row][column] * (tile.y[row][column] + skip[j] * x) : A(0);
            dskip[j] += x * dy;
            dbias[j] += ddt[j];
        }
        share.store(p, g.dx, columns, at, chunk, i, dx);
        share.store(p, g.ddt, columns, at, chunk, i, ddt);
        if (p.z.data) share.store(p, g.dz, columns, at, chunk, i, dz);
    }
}

// The block's part of dB and dC in a chunk: over its warps that have channels.
template <class A, class L>
__device__ __forceinline__ void sum_warps(const Problem<A>& p, const Columns<L>& columns, const Sequence& at,
                                          int64_t chunk, int64_t rows, const BackwardTile<A, L>& tile, A* parts) {
    const int states = static_cast<int>(p.states), busy = (columns.count + L::kChannels - 1) / L::kChannels;
    A* to = parts + (blockIdx.y * rows + at.row + at.step(chunk)) * 2 * p.states;
    for (int i = threadIdx.x; i < at.count(chunk) * 2 * states; i += L::kThreads) {
        const int t = i / (2 * states), place = i % (2 * states);
        const int from = place < states ? place : L::kPadded + place - states;
        A sum = tile.sums[0][t][from];
        for (int warp = 1; warp < busy; ++warp) sum += tile.sums[warp][t][from];
        to[i] = sum;
    }
}

// The segment's part of dD and dbias: each thread's over those that have the same columns.
template <class A, class L>
__device__ __forceinline__ void sum_steps(const Problem<A>& p, const Columns<L>& columns, const Share<L>& share,
                                          const A (&dskip)[kFour], const A (&dbias)[kFour], BackwardTile<A, L>& tile,
                                          const Parts<A>& parts) {
    constexpr int kUsed = L::kRows < kChunk ? L::kRows : kChunk;
    __syncthreads();
    if (share.row < kUsed) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            tile.dwrite[share.row][share.column + j] = dskip[j];
            tile.dstep[share.row][share.column + j] = dbias[j];
        }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < columns.count; column += L::kThreads) {
        A skip = 0, bias = 0;
        for (int row = 0; row < kUsed; ++row) {
            skip += tile.dwrite[row][column];
            bias += tile.dstep[row][column];
        }
        parts.skip[blockIdx.x * p.channels + columns.first + column] = skip;
        parts.bias[blockIdx.x * p.channels + columns.first + column] = bias;
    }
}

template <class A, class L>
__global__ void __launch_bounds__(L::kThreads, std::is_same_v<A, float> ? L::kBlocks : 1)
    scan_backward(const Problem<A> p, const Segments segments, const A* entering, const Gradients<A> g,
                  const int64_t rows, const Parts<A> parts) {
    auto& tile = *reinterpret_cast<BackwardTile<A, L>*>(shared_memory());
    const Columns<L> columns(p);
    const Lane<L> lane(columns);
    const Share<L> share(columns);
    const int64_t segment = blockIdx.x, begin = segment * segments.span, all = p.layout.chunks();
    const int64_t end = begin + segments.span < all ? begin + segments.span : all, size = p.channels * p.states;

    A rate[L::kStates], carried[L::kStates], drate[L::kStates], dskip[kFour], dbias[kFour];
    lane.load_rates(p, columns, rate);
#pragma unroll
    for (int j = 0; j < kFour; ++j) dskip[j] = dbias[j] = 0;
#pragma unroll
    for (int j = 0; j < L::kStates; ++j) drate[j] = 0;
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
        const Sequence at(p.layout, chunk);
        const int steps = at.count(chunk);
        stage(p, g, columns, share, at, chunk, tile);
        if (chunk + 1 == at.end)
            lane.load(g.dstate_out + at.number * size, columns, p.states, A(0), carried);
        else if (chunk + 1 == end)
            lane.load(entering + segment * size, columns, p.states, A(0), carried);
        if (lane.busy) {
            A h[L::kStates], before[kChunk][L::kStates];
            lane.load(g.starts + chunk * size, columns, p.states, A(0), h);
            scan_again(tile, lane, steps, p.z.data != nullptr, rate, h, before);
            differentiate(tile, lane, steps, g.dB.data != nullptr, rate, before, h, carried, drate);
        }
        __syncthreads();
        finish(p, g, columns, share, at, chunk, tile, dskip, dbias);
        if (g.dB.data) sum_warps(p, columns, at, chunk, rows, tile, parts.vectors);
        if (chunk == at.first) lane.store(g.dstate + at.number * size, columns, p.states, carried);
    }
    lane.store(parts.rates + segment * size, columns, p.states, drate);
    sum_steps(p, columns, share, dskip, dbias, tile, parts);
}

// dB and dC of each row and group: the sums over the group's tiles.
template <class A>
__global__ void __launch_bounds__(128)
    sum_tiles(const Problem<A> p, const Gradients<A> g, const int64_t rows, const int64_t tiles, const A* parts) {
    const int64_t width = 2 * p.states, i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * p.groups * width) return;
    const int64_t place = i % width, group = i / width % p.groups, row = i / width / p.groups;
    const A* from = parts + (group * tiles * rows + row) * width + place;
    A sum = 0;
#pragma unroll 4
    for (int64_t tile = 0; tile < tiles; ++tile) sum += from[tile * rows * width];
    const Rows& to = place < p.states ? g.dB : g.dC;
    const int64_t length = p.layout.length;
    const int64_t start = p.layout.offsets ? row * to.time_stride
                                           : row / length * to.batch_stride + row % length * to.time_stride;
    store_one<A>(to.data, to.dtype, start + group * p.states + place % p.states, sum);
}

// Shared memory that a block may have, in bytes (CUDA C++ programming guide, table of compute capabilities): on each
// device from compute capability 8.0 on, and on those of them that are made for computing.
constexpr size_t kAnyShared = 99 * 1024, kMostShared = 163 * 1024;

template <class A, class L>
int32_t backward(const Problem<A>& p, const Gradients<A>& g, void* workspace, int64_t* workspace_bytes, void* stream) {
    static_assert(sizeof(BackwardTile<A, L>) <= (std::is_same_v<A, float> ? kAnyShared : kMostShared));
    const int64_t of_group = tiles_of_group(p.channels, p.groups, L::kWidth), tiles = of_group * p.groups;
    const int64_t rows = p.layout.offsets ? p.layout.length : p.layout.sequences * p.layout.length;
    const int64_t size = p.channels * p.states;
    const Segments segments = cut(p.layout, tiles * L::kWarps);
    Workspace buffers(workspace);
    const Passing<A> passing = lay_out_passing(buffers, p, segments);
    Parts<A> parts;
    parts.vectors = buffers.take<A>(g.dB.data ? tiles * rows * 2 * p.states : 0);
    parts.rates = buffers.take<A>(segments.count * size);
    parts.skip = buffers.take<A>(segments.count * p.channels);
    parts.bias = buffers.take<A>(segments.count * p.channels);
    if (!workspace) {
        *workspace_bytes = buffers.bytes();
        return SEQARCH_OK;
    }
    Launches launch(stream);
    pass_segments<true, A, L>(launch, p, segments, g.dy, g.dstate_out, passing);
    launch(scan_backward<A, L>, grid_for<L>(p, segments), L::kThreads, sizeof(BackwardTile<A, L>), p, segments,
           passing.states, g, rows, parts);
    launch_sum(launch, parts.rates, segments.count, size, g.dA);
    if (g.dD) launch_sum(launch, parts.skip, segments.count, p.channels, g.dD);
    if (g.dbias) launch_sum(launch, parts.bias, segments.count, p.channels, g.dbias);
    if (g.dB.data)
        launch(sum_tiles<A>, grid_of(ceil_div(rows * p.groups * 2 * p.states, 128)), 128, 0, p, g, rows, of_group,
               parts.vectors);
    pass_empty_states(launch, p, g.dstate_out, g.dstate);
    return launch.code();
}

}  // namespace

int32_t seqarch_cuda_selective_scan_backward(const seqarch_selective_scan_inputs* inputs,
                                             const seqarch_selective_scan_gradients* gradients, void* workspace,
                                             int64_t* workspace_bytes, void* stream) {
    const auto& in = *inputs;
    const auto& to = *gradients;
    if (!valid(in, {to.dy, to.dx, to.ddt, to.dB, to.dC, to.dz})) return SEQARCH_BAD_ARGUMENT;
    if (!to.dB.data != !to.dC.data || !to.dz.data != !in.z.data) return SEQARCH_BAD_ARGUMENT;
    return with_lanes(in.dtype, in.state_width, [&](auto* type, auto lanes) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t columns = in.channels / in.groups, states = in.state_width;
        const Gradients<T> g{static_cast<const T*>(to.starts), rows_of(to.dy, columns),
                             static_cast<const T*>(to.dstate_out), rows_of(to.dx, columns), rows_of(to.ddt, columns),
                             rows_of(to.dB, states), rows_of(to.dC, states), rows_of(to.dz, columns),
                             static_cast<T*>(to.dA), static_cast<T*>(to.dD), static_cast<T*>(to.ddt_bias),
                             static_cast<T*>(to.dstate)};
        return backward<T, decltype(lanes)>(problem<T>(in), g, workspace, workspace_bytes, stream);
    });
}
