// Selective scan of a diagonal state-space model, forward. See seqarch.h for the equation.
#include "selective_scan.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

using namespace seqarch::scan;
using seqarch::read;
using seqarch::write;

template <class A>
struct Outputs {
    const A* state;
    seqarch_rows y;
    A *state_out, *starts;
};

// y of one step from its sums over N.
template <class A>
void finish(const Problem<A>& p, const Item& item, const Outputs<A>& out, int64_t t, A* __restrict y) {
    A in[kWidth];
    if (p.skip) {
        read(p.x, p.element(p.x, item.sequence, t) + item.c0, item.count, in);
#pragma omp simd
        for (int64_t c = 0; c < item.count; ++c) y[c] += p.skip[item.c0 + c] * in[c];
    }
    if (p.z.data) {
        read(p.z, p.element(p.z, item.sequence, t) + item.c0, item.count, in);
#pragma omp simd
        for (int64_t c = 0; c < item.count; ++c) y[c] *= in[c] * seqarch::sigmoid(in[c]);
    }
    write(out.y, p.element(out.y, item.sequence, t) + item.c0, item.count, y);
}

// Steps `begin` to `begin + count` of a block, whose rates and states are given.
template <class A>
void forward_chunk(const Problem<A>& p, const Outputs<A>& out, const Item& item, int64_t begin, int64_t count,
                   const A* rate, A* h, Scratch<A>& w) {
    const int64_t N = p.states;
    for (int64_t t = 0; t < count; ++t) {
        Step<A>(p, item, begin + t, w.delta + t * kWidth, w.u + t * kWidth);
        read_shared(p, p.B, item, begin + t, w.B + t * N);
        read_shared(p, p.C, item, begin + t, w.C + t * N);
    }
    for (int64_t l = 0; l < item.count; l += kLanes)
        scan_tile<false>(count, N, w.delta + l, w.u + l, +w.B, +w.C, rate + l * N, h + l * N, w.y + l,
                         static_cast<A*>(nullptr), static_cast<A*>(nullptr));
    for (int64_t t = 0; t < count; ++t) finish(p, item, out, begin + t, w.y + t * kWidth);
}

template <class A>
void forward_run(const Problem<A>& p, const Outputs<A>& out, const Run& run, Scratch<A>& w) {
    const int64_t steps = p.steps(run.sequence), N = p.states;
    const auto blocks = [&](auto f) {
        for (int64_t b = run.begin; b < run.end; ++b) {
            const Item item = item_of(p, run, b);
            f(item, (run.sequence * p.channels + item.c0) * N, w.rate + (b - run.begin) * kWidth * N,
              w.h + (b - run.begin) * kWidth * N);
        }
    };
    blocks([&](const Item& item, int64_t place, A* rate, A* h) {
        into_tiles(p.rate + item.c0 * N, item.count, N, rate, rate_of<A>);
        if (out.state)
            into_tiles(out.state + place, item.count, N, h, [](A a) { return a; });
        else
            std::fill_n(h, N * tiles_of(item.count) * kLanes, A(0));
    });
    for (int64_t begin = 0; begin < steps; begin += p.chunk)
        blocks([&](const Item& item, int64_t, const A* rate, A* h) {
            if (out.starts) keep_start(p, item, h, out.starts + (run.chunk0 + begin / p.chunk) * p.channels * N);
            forward_chunk(p, out, item, begin, std::min(p.chunk, steps - begin), rate, h, w);
        });
    blocks([&](const Item& item, int64_t place, const A*, const A* h) {
        from_tiles(h, item.count, N, out.state_out + place);
    });
}

// A few steps on the state as it lies, [D, N].
template <class A>
void step_item(const Problem<A>& p, const Outputs<A>& out, const Item& item, Scratch<A>& w) {
    const int64_t steps = p.steps(item.sequence), N = p.states;
    const int64_t first = (item.sequence * p.channels + item.c0) * N;
    A* next = out.state_out + first;
    const A* __restrict rate = p.rate + item.c0 * N;
    if (!out.state)
        std::fill_n(next, item.count * N, A(0));
    else if (out.state != out.state_out)
        std::copy_n(out.state + first, item.count * N, next);
    for (int64_t t = 0; t < steps; ++t) {
        Step<A>(p, item, t, +w.delta, +w.u);
        read_shared(p, p.B, item, t, +w.B);
        read_shared(p, p.C, item, t, +w.C);
        const A *__restrict b = w.B, *__restrict c = w.C;
        for (int64_t d = 0; d < item.count; ++d) {
            const A step = w.delta[d], write = w.u[d];
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < N; ++n) {
                const A decay = seqarch::power_of_two(step * rate_of(rate[d * N + n]));
                next[d * N + n] = decay * next[d * N + n] + write * b[n];
                sum += c[n] * next[d * N + n];
            }
            w.y[d] = sum;
        }
        finish(p, item, out, t, +w.y);
    }
}

template <class A>
void forward(const Problem<A>& p, const Outputs<A>& out) {
    const int team = threads(p);
    int64_t blocks;
    const std::vector<Run> runs = cut(p, team, blocks);
    std::vector<Scratch<A>> scratch;
    for (int i = 0; i < team; ++i) scratch.emplace_back(p, std::min(p.chunk, p.longest()), blocks);
    seqarch::parallel_tasks(static_cast<int64_t>(runs.size()), team, [&](int64_t i) {
        Scratch<A>& w = scratch[thread_number()];
        if (out.starts || p.steps(runs[i].sequence) >= kFewSteps || p.states < kLanes / 2) {
            forward_run(p, out, runs[i], w);
        } else {
            for (int64_t b = runs[i].begin; b < runs[i].end; ++b) step_item(p, out, item_of(p, runs[i], b), w);
        }
    });
}

}  // namespace

int32_t seqarch_selective_scan_forward(const seqarch_selective_scan_inputs* inputs,
                                       const seqarch_selective_scan_outputs* outputs, int32_t num_threads) {
    if (!valid(*inputs, num_threads) || !seqarch::known(outputs->y)) return SEQARCH_BAD_ARGUMENT;
    return with_accumulation(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(problem<T>(*inputs, num_threads),
                Outputs<T>{static_cast<const T*>(inputs->state), outputs->y, static_cast<T*>(outputs->state_out),
                           static_cast<T*>(outputs->starts)});
    });
}
