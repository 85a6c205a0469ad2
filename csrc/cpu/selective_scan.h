// What both directions of the selective scan share: the problem, how it is cut, a step's inputs, the scan of a tile.
//
// Channels are cut into blocks of one group, and these into tiles of kLanes that lie side by side in vectors, so that
// the sum over the states of a channel needs no sum within a vector. A thread takes some neighbouring blocks of a
// sequence through its steps together, chunk by chunk: a page of memory holds a row or less, and is not looked up again
// for each block. For the backward pass the forward pass leaves the state before each chunk, from which the chunk's
// decays and states are computed again, tile by tile, into the cache. Sums over channels and sequences are taken block
// by block in a fixed order, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "arguments.h"
#include "buffer.h"
#include "dtypes.h"
#include "numbers.h"
#include "parallel.h"
#include "rows.h"
#include "seqarch.h"

namespace seqarch::scan {

// Channels of a tile: of float32 one vector of AVX-512, two of AVX2. The recurrence is one chain of multiply-adds per
// state; the lanes of a tile and its states are chains that do not wait for one another.
constexpr int64_t kLanes = 16;
constexpr int64_t kWidth = 256, kLeastWidth = 64;
constexpr int64_t kFewBlocks = 4;  // too few to share out among threads, where narrower ones can be had
constexpr int64_t kSmallWork = 1 << 15;  // states fewer than starting the threads is worth
constexpr int64_t kFewSteps = 4;         // of a sequence, too few to bring the state into tiles and back
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A>
struct Problem {
    seqarch_rows x, dt, B, C, z;  // z without data: no gate
    const A *rate, *skip, *bias;
    const int64_t* offsets;
    int64_t sequences, length, channels, states, groups, chunk;
    bool softplus, scale_input;
    int num_threads;

    int64_t steps(int64_t s) const { return offsets ? offsets[s + 1] - offsets[s] : length; }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t s = 0; s < sequences; ++s) most = std::max(most, steps(s));
        return most;
    }
    int64_t total_steps() const { return offsets ? offsets[sequences] : sequences * length; }
    // The first element of the row of sequence s at step t.
    int64_t element(const seqarch_rows& rows, int64_t s, int64_t t) const {
        return offsets ? (offsets[s] + t) * rows.time_stride : s * rows.batch_stride + t * rows.time_stride;
    }
};

// Channels c0 .. c0 + count of one group and one sequence, the sequence's block of that number.
struct Item {
    int64_t sequence, c0, count, group, block;
};

// Neighbouring blocks of one sequence, a thread's unit of work. chunk0 is the sequence's first among all chunks, row0
// its first step among all steps.
struct Run {
    int64_t sequence, begin, end, chunk0, row0;
};

inline int64_t tiles_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

// Channels of a block; wide ones read longer pieces of memory. It follows from the sizes alone, as the sums do.
template <class A>
int64_t block_width(const Problem<A>& p) {
    int64_t width = kWidth;
    while (width > kLeastWidth && p.sequences * (p.channels / width) < kFewBlocks) width /= 2;
    return width;
}

template <class A>
int64_t blocks_of_group(const Problem<A>& p) {
    const int64_t width = block_width(p);
    return (p.channels / p.groups + width - 1) / width;
}

template <class A>
Item item_of(const Problem<A>& p, const Run& run, int64_t block) {
    const int64_t per_group = p.channels / p.groups, blocks = blocks_of_group(p);
    const int64_t width = block_width(p), group = block / blocks, first = block % blocks * width;
    return {run.sequence, group * per_group + first, std::min(width, per_group - first), group, block};
}

// The runs of all sequences: of each as few as keep every thread of a team busy. `longest` receives the most blocks of
// one run.
template <class A>
std::vector<Run> cut(const Problem<A>& p, int64_t team, int64_t& longest) {
    std::vector<Run> runs;
    const int64_t blocks = p.channels ? blocks_of_group(p) * p.groups : 0;
    const int64_t parts = std::min(blocks, team / std::gcd(team, std::max<int64_t>(1, p.sequences)));
    int64_t chunk0 = 0, row0 = 0;
    longest = 0;
    for (int64_t s = 0; s < p.sequences; ++s) {
        for (int64_t i = 0; i < parts; ++i) {
            runs.push_back({s, blocks * i / parts, blocks * (i + 1) / parts, chunk0, row0});
            longest = std::max(longest, runs.back().end - runs.back().begin);
        }
        chunk0 += (p.steps(s) + p.chunk - 1) / p.chunk;
        row0 += p.steps(s);
    }
    return runs;
}

template <class A>
int threads(const Problem<A>& p) {
    return static_cast<double>(p.total_steps()) * p.channels * p.states < kSmallWork ? 1 : p.num_threads;
}

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The exponent's factor, to base 2; finite, so that no decay of 0 meets a rate of -inf.
template <class A>
inline A rate_of(A a) {
    return std::max(a, std::numeric_limits<A>::lowest() / 4) * static_cast<A>(kLog2E);
}

// Between [count, N] and tiles [N, kLanes]; lanes past `count` are set to 0.
template <class A, class F>
void into_tiles(const A* from, int64_t count, int64_t states, A* tiles, F f) {
    for (int64_t c0 = 0; c0 < count; c0 += kLanes, tiles += states * kLanes)
        for (int64_t l = 0; l < kLanes; ++l)
            for (int64_t n = 0; n < states; ++n)
                tiles[n * kLanes + l] = c0 + l < count ? f(from[(c0 + l) * states + n]) : A(0);
}
template <class A>
void from_tiles(const A* tiles, int64_t count, int64_t states, A* to) {
    for (int64_t c = 0; c < count; ++c)
        for (int64_t n = 0; n < states; ++n)
            to[c * states + n] = tiles[(c / kLanes * states + n) * kLanes + c % kLanes];
}

// What one thread works in.
template <class A>
struct Scratch {
    Buffer<A> rate, h;      // of all blocks of a run: [tiles, N, kLanes]
    Buffer<A> B, C;         // [chunk, N]
    Buffer<A> delta, u, y;  // [chunk, kWidth]
    Scratch(const Problem<A>& p, int64_t chunk, int64_t blocks)
        : rate(blocks * p.states * kWidth), h(blocks * p.states * kWidth), B(chunk * p.states), C(chunk * p.states),
          delta(chunk * kWidth), u(chunk * kWidth), y(chunk * kWidth) {}
};

// A step's inputs, in the accumulation type; 0 past the item's channels.
template <class A>
struct Step {
    A x[kWidth], raw[kWidth];

    Step(const Problem<A>& p, const Item& item, int64_t t, A* __restrict delta, A* __restrict u) {
        const int64_t lanes = tiles_of(item.count) * kLanes;
        std::fill_n(x + item.count, lanes - item.count, A(0));
        std::fill_n(raw + item.count, lanes - item.count, A(0));
        read(p.x, p.element(p.x, item.sequence, t) + item.c0, item.count, x);
        read(p.dt, p.element(p.dt, item.sequence, t) + item.c0, item.count, raw);
        if (p.bias)
            for (int64_t c = 0; c < item.count; ++c) raw[c] += p.bias[item.c0 + c];
        if (p.softplus) {
#pragma omp simd
            for (int64_t c = 0; c < lanes; ++c) delta[c] = seqarch::softplus(raw[c]);
        } else {
            std::copy_n(raw, lanes, delta);
        }
        if (p.scale_input) {
#pragma omp simd
            for (int64_t c = 0; c < lanes; ++c) u[c] = delta[c] * x[c];
        } else {
            std::copy_n(x, lanes, u);
        }
    }
};

// Some steps of one tile. h is the state, replaced by the last one; y receives the sums over N. With kKeep, every decay
// and state is stored too: [steps, N, kLanes].
template <bool kKeep, class A>
void scan_tile(int64_t steps, int64_t states, const A* delta, const A* u, const A* B, const A* C,
               const A* __restrict rate, A* __restrict h, A* __restrict y, A* __restrict decays, A* __restrict kept) {
    for (int64_t t = 0; t < steps; ++t) {
        A step[kLanes], write[kLanes], sum[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) {
            step[l] = delta[t * kWidth + l];
            write[l] = u[t * kWidth + l];
            sum[l] = A(0);
        }
        for (int64_t n = 0; n < states; ++n) {
            const A b = B[t * states + n], c = C[t * states + n];
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l) {
                const int64_t i = n * kLanes + l;
                const A decay = seqarch::power_of_two(step[l] * rate[i]);
                const A next = decay * h[i] + write[l] * b;
                h[i] = next;
                sum[l] += c * next;
                if (kKeep) {
                    decays[t * states * kLanes + i] = decay;
                    kept[t * states * kLanes + i] = next;
                }
            }
        }
        for (int64_t l = 0; l < kLanes; ++l) y[t * kWidth + l] = sum[l];
    }
}

// B or C of one step.
template <class A>
void read_shared(const Problem<A>& p, const seqarch_rows& rows, const Item& item, int64_t t, A* to) {
    read(rows, p.element(rows, item.sequence, t) + item.group * p.states, p.states, to);
}

// The states of an item's channels between tiles and a tensor [N, D].
template <class A>
void keep_start(const Problem<A>& p, const Item& item, const A* tiles, A* start) {
    for (int64_t c = 0; c < item.count; c += kLanes)
        for (int64_t n = 0; n < p.states; ++n)
            std::copy_n(tiles + c * p.states + n * kLanes, std::min(kLanes, item.count - c),
                        start + n * p.channels + item.c0 + c);
}
template <class A>
void load_start(const Problem<A>& p, const Item& item, const A* start, A* tiles) {
    std::fill_n(tiles, p.states * tiles_of(item.count) * kLanes, A(0));
    for (int64_t c = 0; c < item.count; c += kLanes)
        for (int64_t n = 0; n < p.states; ++n)
            std::copy_n(start + n * p.channels + item.c0 + c, std::min(kLanes, item.count - c),
                        tiles + c * p.states + n * kLanes);
}

// Calls f with a null pointer of the accumulation type, as with_dtype does.
template <class F>
int32_t with_accumulation(int32_t dtype, F f) {
    if (dtype == SEQARCH_BFLOAT16) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        if constexpr (!std::is_same_v<decltype(type), bfloat16*>) f(type);
    });
}

// Whether a kernel computes with these inputs. What it works in has for each step a state and a number of each channel,
// and for each block of channels and step a state.
inline bool valid(const seqarch_selective_scan_inputs& in, int num_threads) {
    for (const seqarch_rows& rows : {in.x, in.dt, in.B, in.C, in.z})
        if (!seqarch::known(rows)) return false;
    if (num_threads < 1 || in.chunk < 1) return false;
    if (in.groups < 1 || !countable({in.channels}) || in.channels % in.groups) return false;
    const int64_t width = in.channels + in.groups * kWidth;  // blocks of a group, the last one padded
    return countable({in.groups, kWidth}) && countable({in.sequences, width, in.state_width}) &&
           countable({in.offsets ? 1 : in.sequences, in.length, width, in.state_width}) &&
           packs(in.offsets, in.sequences, in.length);
}

template <class A>
Problem<A> problem(const seqarch_selective_scan_inputs& in, int num_threads) {
    return {in.x, in.dt, in.B, in.C, in.z, static_cast<const A*>(in.A), static_cast<const A*>(in.D),
            static_cast<const A*>(in.dt_bias), in.offsets, in.sequences, in.length, in.channels, in.state_width,
            in.groups, std::min(in.chunk, std::max<int64_t>(in.length, 1)), in.softplus != 0, in.scale_input != 0,
            num_threads};
}

}  // namespace seqarch::scan
