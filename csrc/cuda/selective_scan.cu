// Selective scan of a diagonal state-space model, forward. See seqarch.h for the equation, scan.cuh for the cut.
#include "scan.cuh"

namespace {

using namespace seqarch::cuda;
using namespace seqarch::cuda::scan;

template <class A>
struct Outputs {
    const A* state;
    Rows y;
    A *state_out, *starts;
};

template <class A, class L>
struct ForwardTile {
    A delta[kChunk][L::kWidth], write[kChunk][L::kWidth], y[kChunk][L::kWidth];
    Vectors<A, L> B, C;
};

// A thread's share of a chunk's inputs.
template <class A, class L>
struct Inputs {
    A x[L::kShares][kFour], dt[L::kShares][kFour], z[L::kShares][kFour];
    VectorShare<A, L> B, C;

    __device__ void load(const Problem<A>& p, const Columns<L>& columns, const Share<L>& share, const Sequence& at,
                         int64_t chunk) {
#pragma unroll
        for (int i = 0; i < L::kShares; ++i) {
            share.load(p, p.x, columns, at, chunk, i, x[i]);
            share.load(p, p.dt, columns, at, chunk, i, dt[i]);
            if (p.z.data) share.load(p, p.z, columns, at, chunk, i, z[i]);
        }
        B.load(p, p.B, columns, at, chunk);
        C.load(p, p.C, columns, at, chunk);
    }
    __device__ void stage(const Problem<A>& p, const Share<L>& share, int steps, const A (&bias)[kFour],
                          ForwardTile<A, L>& tile) const {
        B.stage(tile.B);
        C.stage(tile.C);
#pragma unroll
        for (int i = 0; i < L::kShares; ++i) {
            const int row = share.row_of(i);
            if (row >= kChunk) continue;
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                const A delta = step_size(p, biased(p, dt[i][j], bias[j]), row < steps && j < share.left);
                tile.delta[row][share.column + j] = delta;
                tile.write[row][share.column + j] = p.scale_input ? delta * x[i][j] : x[i][j];
            }
        }
    }
};

// The steps of a chunk, kGroup at a time. The sums over states that follow a group are no part of the recurrence.
template <class A, class L>
__device__ __forceinline__ void scan_chunk(ForwardTile<A, L>& tile, const Lane<L>& lane, int steps,
                                           const A (&rate)[L::kStates], A (&h)[L::kStates]) {
    using Sum = Fold<kGroup, L::kSharing, 1>;
    for (int begin = 0; begin < steps; begin += kGroup) {
        A y[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int t = begin + i;
            const A delta = tile.delta[t][lane.channel], write = tile.write[t][lane.channel];
            y[i] = 0;
#pragma unroll
            for (int j = 0; j < L::kStates; ++j) {
                h[j] = power_of_two(delta * rate[j]) * h[j] + write * tile.B[t][lane.state + j];
                y[i] += tile.C[t][lane.state + j] * h[j];
            }
        }
        Sum::sum(y, lane.sharing);
        if (Sum::writes(lane.sharing)) {
#pragma unroll
            for (int i = 0; i < Sum::kKept; ++i) tile.y[begin + Sum::first(lane.sharing) + i][lane.channel] = y[i];
        }
    }
}

template <class A, class L>
__device__ __forceinline__ void load_state(const Problem<A>& p, const A* state, int64_t row, const Columns<L>& columns,
                                           const Lane<L>& lane, A (&h)[L::kStates]) {
    if (state) {
        lane.load(state + row * p.channels * p.states, columns, p.states, A(0), h);
    } else {
#pragma unroll
        for (int j = 0; j < L::kStates; ++j) h[j] = 0;
    }
}

template <class A, class L>
__global__ void __launch_bounds__(L::kThreads)
    scan_forward(const Problem<A> p, const Segments segments, const A* entering, const Outputs<A> out) {
    auto& tile = *reinterpret_cast<ForwardTile<A, L>*>(shared_memory());
    const Columns<L> columns(p);
    const Lane<L> lane(columns);
    const Share<L> share(columns);
    const int64_t begin = blockIdx.x * segments.span, all = p.layout.chunks(), size = p.channels * p.states;
    const int64_t end = begin + segments.span < all ? begin + segments.span : all;
    if (begin >= end) return;

    A rate[L::kStates], h[L::kStates], bias[kFour], skip[kFour];
    lane.load_rates(p, columns, rate);
    share.load_parameter(p.bias, columns, bias);
    share.load_parameter(p.skip, columns, skip);
    Sequence at(p.layout, begin);
    const bool inside = begin > at.first;
    load_state(p, inside ? entering : out.state, inside ? blockIdx.x : at.number, columns, lane, h);
    Inputs<A, L> own;
    own.load(p, columns, share, at, begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int steps = at.count(chunk);
        own.stage(p, share, steps, bias, tile);
        __syncthreads();
        // The next chunk is on its way while this one is scanned.
        const bool last = chunk + 1 == at.end, more = chunk + 1 < end;
        const Sequence next = last && more ? Sequence(p.layout, chunk + 1) : at;
        Inputs<A, L> following;
        if (more) following.load(p, columns, share, next, chunk + 1);
        if (out.starts) lane.store(out.starts + chunk * size, columns, p.states, h);
        if (lane.busy) scan_chunk(tile, lane, steps, rate, h);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < L::kShares; ++i) {
            const int row = share.row_of(i);
            if (row >= steps || share.left <= 0) continue;
            A y[kFour];
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                y[j] = tile.y[row][share.column + j];
                if (p.skip) y[j] += skip[j] * own.x[i][j];
                if (p.z.data) y[j] *= own.z[i][j] * sigmoid(own.z[i][j]);
            }
            share.store(p, out.y, columns, at, chunk, i, y);
        }
        if (last) {
            lane.store(out.state_out + at.number * size, columns, p.states, h);
            if (more) load_state(p, out.state, next.number, columns, lane, h);
        }
        at = next;
        own = following;
    }
}

template <class A, class L>
int32_t forward(const Problem<A>& p, const Outputs<A>& out, void* workspace, int64_t* workspace_bytes, void* stream) {
    const int64_t tiles = p.channels ? tiles_of_group(p.channels, p.groups, L::kWidth) * p.groups : 0;
    const Segments segments = cut(p.layout, tiles * L::kWarps);
    Workspace buffers(workspace);
    const Passing<A> passing = lay_out_passing(buffers, p, segments);
    if (!workspace) {
        *workspace_bytes = buffers.bytes();
        return SEQARCH_OK;
    }
    Launches launch(stream);
    pass_segments<false, A, L>(launch, p, segments, Rows(), out.state, passing);
    launch(scan_forward<A, L>, grid_for<L>(p, segments), L::kThreads, sizeof(ForwardTile<A, L>), p, segments,
           passing.states, out);
    pass_empty_states(launch, p, out.state, out.state_out);
    return launch.code();
}

}  // namespace

int32_t seqarch_cuda_selective_scan_forward(const seqarch_selective_scan_inputs* inputs,
                                            const seqarch_selective_scan_outputs* outputs, void* workspace,
                                            int64_t* workspace_bytes, void* stream) {
    const auto& in = *inputs;
    if (!valid(in, {outputs->y})) return SEQARCH_BAD_ARGUMENT;
    return with_lanes(in.dtype, in.state_width, [&](auto* type, auto lanes) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Outputs<T> out{static_cast<const T*>(in.state), rows_of(outputs->y, in.channels / in.groups),
                             static_cast<T*>(outputs->state_out), static_cast<T*>(outputs->starts)};
        return forward<T, decltype(lanes)>(problem<T>(in), out, workspace, workspace_bytes, stream);
    });
}
