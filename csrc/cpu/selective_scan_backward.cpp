// The gradients of the selective scan. See seqarch.h for the equation.
#include "selective_scan.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

using namespace seqarch::scan;
using seqarch::Buffer;
using seqarch::read;
using seqarch::write;

template <class A>
struct Gradients {
    const A* starts;
    seqarch_rows dy;
    const A* dstate_out;
    seqarch_rows dx, ddt, dB, dC, dz;
    A *dA, *dD, *dbias, *dstate;
};

// What the backward pass of one thread works in beside the forward pass's.
template <class A>
struct BackwardScratch : Scratch<A> {
    Buffer<A> carried, drate;                  // of all blocks of a run: [tiles, N, kLanes]
    Buffer<A> decays, kept, before;            // [chunk, N, kLanes] twice, [tiles, N, kLanes]
    Buffer<A> dB, dC;                          // [chunk, N, kLanes], summed over a block's tiles
    Buffer<A> x, slope, dy, dgate, du, dstep;  // [chunk, kWidth]
    BackwardScratch(const Problem<A>& p, int64_t chunk, int64_t blocks)
        : Scratch<A>(p, chunk, blocks), carried(blocks * p.states * kWidth), drate(blocks * p.states * kWidth),
          decays(chunk * p.states * kLanes), kept(chunk * p.states * kLanes), before(p.states * kWidth),
          dB(chunk * p.states * kLanes), dC(chunk * p.states * kLanes), x(chunk * kWidth), slope(chunk * kWidth),
          dy(chunk * kWidth), dgate(chunk * kWidth), du(chunk * kWidth), dstep(chunk * kWidth) {}
};

// Shares of the sums over channels, a block's [steps of all sequences, N] after the other's; and of those over
// sequences, [S, D, N] and [S, D].
template <class A>
struct Shares {
    Buffer<A> dB, dC, dA, dD, dbias;
};

// What a tile's gradient reads and writes over some steps.
template <class A>
struct Tile {
    const A *delta, *u, *dy, *B, *C, *rate, *decays, *kept, *before;
    A *carried, *drate, *du, *dstep, *dB, *dC;
};

// Some steps of one tile backwards. `carried` is the gradient of the state after them and becomes that of the state
// before them. dstep is per unit of rate, so to base 2.
template <bool kShared, class A>
void differentiate_tile(int64_t steps, int64_t states, const Tile<A>& tile) {
    A *__restrict carried = tile.carried, *__restrict drate = tile.drate;
    const A* __restrict rate = tile.rate;
    for (int64_t t = steps - 1; t >= 0; --t) {
        const A *decays = tile.decays + t * states * kLanes, *kept = tile.kept + t * states * kLanes;
        const A* before = t ? kept - states * kLanes : tile.before;
        A *__restrict dB = tile.dB + t * states * kLanes, *__restrict dC = tile.dC + t * states * kLanes;
        A step[kLanes], write[kLanes], dy[kLanes], du[kLanes], dstep[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) {
            step[l] = tile.delta[t * kWidth + l];
            write[l] = tile.u[t * kWidth + l];
            dy[l] = tile.dy[t * kWidth + l];
            du[l] = dstep[l] = A(0);
        }
        for (int64_t n = 0; n < states; ++n) {
            const A b = tile.B[t * states + n], c = tile.C[t * states + n];
#pragma omp simd
            for (int64_t l = 0; l < kLanes; ++l) {
                const int64_t i = n * kLanes + l;
                const A g = carried[i] + dy[l] * c;
                if (kShared) {
                    dC[i] += kept[i] * dy[l];
                    dB[i] += g * write[l];
                }
                du[l] += g * b;
                const A back = g * decays[i], through = back * before[i];
                carried[i] = back;
                dstep[l] += through * rate[i];
                drate[i] += through * step[l];
            }
        }
        for (int64_t l = 0; l < kLanes; ++l) {
            tile.du[t * kWidth + l] = du[l];
            tile.dstep[t * kWidth + l] = dstep[l];
        }
    }
}

// Inputs of one step of the backward pass: beside those of the forward pass the gradient of the ungated y, and by what
// the ungated y is multiplied for the gradient of z.
template <class A>
void prepare(const Problem<A>& p, const Gradients<A>& g, const Item& item, int64_t t, int64_t row,
             BackwardScratch<A>& w) {
    const int64_t lanes = tiles_of(item.count) * kLanes;
    const Step<A> step(p, item, t, w.delta + row, w.u + row);
    A *__restrict dy = w.dy + row, *__restrict dgate = w.dgate + row, *__restrict slope = w.slope + row;
    std::copy_n(step.x, lanes, w.x + row);
    std::fill_n(dy + item.count, lanes - item.count, A(0));
    read(g.dy, p.element(g.dy, item.sequence, t) + item.c0, item.count, dy);
    if (p.z.data) {
        A z[kWidth];
        std::fill_n(z + item.count, lanes - item.count, A(0));
        read(p.z, p.element(p.z, item.sequence, t) + item.c0, item.count, z);
#pragma omp simd
        for (int64_t c = 0; c < lanes; ++c) {
            const A s = seqarch::sigmoid(z[c]);
            dgate[c] = dy[c] * s * (A(1) + z[c] * (A(1) - s));
            dy[c] *= z[c] * s;
        }
    }
    if (p.softplus) {
#pragma omp simd
        for (int64_t c = 0; c < lanes; ++c) slope[c] = seqarch::softplus_slope(step.raw[c]);
    }
}

// The gradients of one step's rows from those of its steps and writes; dD and dbias grow by the step's part.
template <class A>
void finish(const Problem<A>& p, const Gradients<A>& g, const Item& item, int64_t t, int64_t row,
            BackwardScratch<A>& w, A* __restrict dD, A* __restrict dbias) {
    const A *__restrict x = w.x + row, *__restrict dy = w.dy + row, *__restrict delta = w.delta + row;
    const A *__restrict du = w.du + row, *__restrict y = w.y + row, *__restrict dgate = w.dgate + row;
    A *__restrict ddelta = w.dstep + row;
    const int64_t n = item.count;
    A to[kWidth];
    for (int64_t c = 0; c < n; ++c) ddelta[c] *= static_cast<A>(kLn2);
    if (p.scale_input) {
        for (int64_t c = 0; c < n; ++c) ddelta[c] += du[c] * x[c];
        for (int64_t c = 0; c < n; ++c) to[c] = du[c] * delta[c];
    } else {
        std::copy_n(du, n, to);
    }
    if (p.skip) {
        const A* skip = p.skip + item.c0;
        for (int64_t c = 0; c < n; ++c) to[c] += skip[c] * dy[c];
        for (int64_t c = 0; c < n; ++c) dD[c] += x[c] * dy[c];
    }
    write(g.dx, p.element(g.dx, item.sequence, t) + item.c0, n, to);
    if (p.softplus)
        for (int64_t c = 0; c < n; ++c) ddelta[c] *= w.slope[row + c];
    for (int64_t c = 0; c < n; ++c) dbias[c] += ddelta[c];
    write(g.ddt, p.element(g.ddt, item.sequence, t) + item.c0, n, ddelta);
    if (!p.z.data) return;
    for (int64_t c = 0; c < n; ++c) to[c] = dgate[c] * (y[c] + (p.skip ? p.skip[item.c0 + c] * x[c] : A(0)));
    write(g.dz, p.element(g.dz, item.sequence, t) + item.c0, n, to);
}

// Sums over lanes: [steps, N, kLanes] to [steps, N].
template <class A>
void over_lanes(int64_t count, const A* lanes, A* to) {
    for (int64_t i = 0; i < count; ++i) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t l = 0; l < kLanes; ++l) sum += lanes[i * kLanes + l];
        to[i] = sum;
    }
}

// Steps `begin` to `begin + count` of block b of a run.
template <bool kShared, class A>
void backward_chunk(const Problem<A>& p, const Gradients<A>& g, const Run& run, int64_t b, int64_t begin, int64_t count,
                    BackwardScratch<A>& w, const Shares<A>& shares) {
    const int64_t N = p.states, lanes = count * N * kLanes, tiles = (b - run.begin) * N * kWidth;
    const Item item = item_of(p, run, b);
    for (int64_t t = 0; t < count; ++t) {
        prepare(p, g, item, begin + t, t * kWidth, w);
        read_shared(p, p.B, item, begin + t, w.B + t * N);
        read_shared(p, p.C, item, begin + t, w.C + t * N);
    }
    if (kShared) {
        std::fill_n(+w.dB, lanes, A(0));
        std::fill_n(+w.dC, lanes, A(0));
    }
    load_start(p, item, g.starts + (run.chunk0 + begin / p.chunk) * p.channels * N, +w.before);
    for (int64_t l = 0; l < item.count; l += kLanes) {
        const A *rate = w.rate + tiles + l * N, *before = w.before + l * N;
        std::copy_n(before, N * kLanes, +w.h);
        scan_tile<true>(count, N, w.delta + l, w.u + l, +w.B, +w.C, rate, +w.h, w.y + l, +w.decays, +w.kept);
        differentiate_tile<kShared>(
            count, N,
            Tile<A>{w.delta + l, w.u + l, w.dy + l, w.B, w.C, rate, w.decays, w.kept, before, w.carried + tiles + l * N,
                    w.drate + tiles + l * N, w.du + l, w.dstep + l, w.dB, w.dC});
    }
    if (kShared) {
        const int64_t share = (b * p.total_steps() + run.row0 + begin) * N;
        over_lanes(count * N, +w.dB, shares.dB + share);
        over_lanes(count * N, +w.dC, shares.dC + share);
    }
    const int64_t channel = item.sequence * p.channels + item.c0;
    for (int64_t t = 0; t < count; ++t)
        finish(p, g, item, begin + t, t * kWidth, w, shares.dD + channel, shares.dbias + channel);
}

template <bool kShared, class A>
void backward_run(const Problem<A>& p, const Gradients<A>& g, const Run& run, BackwardScratch<A>& w,
                  const Shares<A>& shares) {
    const int64_t steps = p.steps(run.sequence), N = p.states;
    const auto blocks = [&](auto f) {
        for (int64_t b = run.begin; b < run.end; ++b) {
            const Item item = item_of(p, run, b);
            f(item, run.sequence * p.channels + item.c0, (b - run.begin) * kWidth * N);
        }
    };
    blocks([&](const Item& item, int64_t channel, int64_t tiles) {
        into_tiles(p.rate + item.c0 * N, item.count, N, w.rate + tiles, rate_of<A>);
        into_tiles(g.dstate_out + channel * N, item.count, N, w.carried + tiles, [](A a) { return a; });
        std::fill_n(w.drate + tiles, N * tiles_of(item.count) * kLanes, A(0));
        std::fill_n(shares.dD + channel, item.count, A(0));
        std::fill_n(shares.dbias + channel, item.count, A(0));
    });
    for (int64_t begin = steps ? (steps - 1) / p.chunk * p.chunk : -1; begin >= 0; begin -= p.chunk)
        for (int64_t b = run.begin; b < run.end; ++b)
            backward_chunk<kShared>(p, g, run, b, begin, std::min(p.chunk, steps - begin), w, shares);
    blocks([&](const Item& item, int64_t channel, int64_t tiles) {
        from_tiles(w.carried + tiles, item.count, N, g.dstate + channel * N);
        from_tiles(w.drate + tiles, item.count, N, shares.dA + channel * N);
    });
}

// Sums `count` shares of `size` numbers, in their order.
template <class A>
void over_shares(int64_t count, int64_t size, const A* shares, A* to) {
    std::fill_n(to, size, A(0));
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < size; ++j) to[j] += shares[i * size + j];
}

// Row (s, t) of dB or dC: for each group the sum over its blocks.
template <class A>
void write_shared(const Problem<A>& p, const A* shares, const seqarch_rows& rows, int64_t blocks, int team) {
    const int64_t per_group = blocks / p.groups, N = p.states, total = p.total_steps();
    std::vector<int64_t> first(p.sequences + 1);
    for (int64_t s = 0; s < p.sequences; ++s) first[s + 1] = first[s] + p.steps(s);
    std::vector<Buffer<A>> sums;
    for (int i = 0; i < team; ++i) sums.emplace_back(N);
    seqarch::parallel_for(total, team, [&](int64_t row) {
        const int64_t s = std::upper_bound(first.begin(), first.end(), row) - first.begin() - 1;
        A* __restrict sum = sums[thread_number()];
        for (int64_t g = 0; g < p.groups; ++g) {
            std::fill_n(sum, N, A(0));
            for (int64_t b = g * per_group; b < (g + 1) * per_group; ++b)
                for (int64_t n = 0; n < N; ++n) sum[n] += shares[(b * total + row) * N + n];
            write(rows, p.element(rows, s, row - first[s]) + g * N, N, sum);
        }
    });
}

template <bool kShared, class A>
void backward(const Problem<A>& p, const Gradients<A>& g) {
    const int team = threads(p);
    int64_t longest;
    const std::vector<Run> runs = cut(p, team, longest);
    const int64_t blocks = p.channels ? blocks_of_group(p) * p.groups : 0, rows = p.sequences * p.channels;
    const int64_t shared = kShared ? blocks * p.total_steps() * p.states : 0;
    const Shares<A> shares{Buffer<A>(shared), Buffer<A>(shared), Buffer<A>(rows * p.states), Buffer<A>(rows),
                           Buffer<A>(rows)};
    std::vector<BackwardScratch<A>> scratch;
    for (int i = 0; i < team; ++i) scratch.emplace_back(p, std::min(p.chunk, p.longest()), longest);
    seqarch::parallel_tasks(static_cast<int64_t>(runs.size()), team,
                            [&](int64_t i) { backward_run<kShared>(p, g, runs[i], scratch[thread_number()], shares); });

    over_shares(p.sequences, p.channels * p.states, +shares.dA, g.dA);
    if (g.dD) over_shares(p.sequences, p.channels, +shares.dD, g.dD);
    if (g.dbias) over_shares(p.sequences, p.channels, +shares.dbias, g.dbias);
    if (kShared) {
        write_shared(p, +shares.dB, g.dB, blocks, team);
        write_shared(p, +shares.dC, g.dC, blocks, team);
    }
}

}  // namespace

int32_t seqarch_selective_scan_backward(const seqarch_selective_scan_inputs* inputs,
                                        const seqarch_selective_scan_gradients* gradients, int32_t num_threads) {
    const auto& to = *gradients;
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    for (const seqarch_rows& rows : {to.dy, to.dx, to.ddt, to.dB, to.dC, to.dz})
        if (!seqarch::known(rows)) return SEQARCH_BAD_ARGUMENT;
    if (!to.dB.data != !to.dC.data || !to.dz.data != !inputs->z.data) return SEQARCH_BAD_ARGUMENT;
    return with_accumulation(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto p = problem<T>(*inputs, num_threads);
        const Gradients<T> g{static_cast<const T*>(to.starts),
                             to.dy,
                             static_cast<const T*>(to.dstate_out),
                             to.dx,
                             to.ddt,
                             to.dB,
                             to.dC,
                             to.dz,
                             static_cast<T*>(to.dA),
                             static_cast<T*>(to.dD),
                             static_cast<T*>(to.ddt_bias),
                             static_cast<T*>(to.dstate)};
        to.dB.data ? backward<true>(p, g) : backward<false>(p, g);
    });
}
