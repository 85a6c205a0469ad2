// One token through a list of instructions. See seqarch.h.
//
// All threads take each instruction together, a part of its results each, and wait for one another after it. A result is
// computed by one thread from the same numbers in the same order, so it does not depend on how many there are.
#include <algorithm>
#include <atomic>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "arguments.h"
#include "linear.h"
#include "numbers.h"
#include "seqarch.h"

namespace {

using namespace seqarch;

constexpr int64_t kSmallWork = 1 << 20;  // weights fewer than starting the threads is worth
constexpr int64_t kLine = 16;            // numbers of a line of the cache, which is one thread's

// A thread's number, and how many there are.
struct Member {
    int number, team;
};

struct Range {
    int64_t begin, end;
};

// A thread's part of n results, in whole lines.
Range share(int64_t n, Member member) {
    const int64_t lines = (n + kLine - 1) / kLine;
    const auto from = [&](int64_t number) { return std::min(n, lines * number / member.team * kLine); };
    return {from(member.number), from(member.number + 1)};
}

float* row(const seqarch_operand& operand, int64_t r) {
    return operand.data ? operand.data + r * operand.stride : nullptr;
}

// y = factor f(x); y may be x.
template <class F>
void apply(Range range, float factor, F f, const float* x, float* y) {
#pragma omp simd
    for (int64_t c = range.begin; c < range.end; ++c) y[c] = factor * f(x[c]);
}

// Calls run with the activation as a function.
template <class Run>
void with_activation(int32_t activation, Run run) {
    switch (activation) {
        case SEQARCH_SILU: return run([](float x) { return x * sigmoid(x); });
        case SEQARCH_EXP: return run([](float x) { return exponential(x); });
        default: return run([](float x) { return x; });
    }
}

void norm(const seqarch_instruction& i, Member member) {
    const int64_t width = i.sizes[0], parts = i.sizes[1];
    const float* weight = i.operands[2].data;
    for (int64_t p = member.number; p < i.rows * parts; p += member.team) {
        const float* x = row(i.operands[1], p / parts) + p % parts * width;
        float* __restrict y = row(i.operands[0], p / parts) + p % parts * width;
        const float mean = product(width, x, x) / static_cast<float>(width);
        const float scale = 1.0f / std::sqrt(mean + static_cast<float>(i.factor));
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) y[c] = x[c] * scale * (weight ? weight[c] : 1.0f);
    }
}

void linear(const seqarch_instruction& i, Member member) {
    const seqarch_operand &y = i.operands[0], &x = i.operands[1], &z = i.operands[4];
    const float *weight = i.operands[2].data, *bias = i.operands[3].data;
    const Range own = share(i.sizes[1], member);
    for (int64_t j = own.begin; j < own.end; ++j) {
        const float add = bias ? bias[j] : 0.0f;
        const auto finish = [&](int64_t r, float sum) { row(y, r)[j] = sum + add + (z.data ? row(z, r)[j] : 0.0f); };
        products_of_all(i.rows, i.sizes[0], weight + j * i.sizes[0], x.data, x.stride, finish);
    }
}

void convolve(const seqarch_instruction& i, Member member) {
    const int64_t channels = i.sizes[0], taps = i.sizes[1];
    const float *weight = i.operands[2].data, *bias = i.operands[3].data;
    const Range own = share(channels, member);
    for (int64_t r = 0; r < i.rows; ++r) {
        const float* __restrict x = row(i.operands[1], r);
        float *__restrict y = row(i.operands[0], r), *__restrict state = i.operands[4].data + r * (taps - 1) * channels;
        for (int64_t c = own.begin; c < own.end; ++c)
            y[c] = (bias ? bias[c] : 0.0f) + weight[c * taps + taps - 1] * x[c];
        for (int64_t w = 0; w < taps - 1; ++w)
            for (int64_t c = own.begin; c < own.end; ++c) {
                y[c] += weight[c * taps + w] * state[w * channels + c];
                state[w * channels + c] = w < taps - 2 ? state[(w + 1) * channels + c] : x[c];
            }
        with_activation(i.activation, [=](auto f) { apply(own, 1.0f, f, y, y); });
    }
}

void pointwise(const seqarch_instruction& i, Member member) {
    const Range own = share(i.sizes[0], member);
    const float factor = static_cast<float>(i.factor);
    for (int64_t r = 0; r < i.rows; ++r) {
        const float *__restrict x = row(i.operands[1], r), *__restrict z = row(i.operands[2], r);
        float* __restrict y = row(i.operands[0], r);
        with_activation(i.activation, [=](auto f) { apply(own, factor, f, x, y); });
        for (int64_t c = own.begin; z && c < own.end; ++c) y[c] *= z[c];
    }
}

int32_t scan(const seqarch_instruction& i, Member member) {
    const int64_t channels = i.sizes[0], states = i.sizes[1];
    const Range own = share(channels, member);
    int32_t code = SEQARCH_OK;
    for (int64_t r = 0; r < i.rows && own.begin < own.end; ++r) {
        const auto rows = [&](int operand, int64_t first) {
            float* data = row(i.operands[operand], r);
            return seqarch_rows{data ? data + first : nullptr, 0, 0, SEQARCH_FLOAT32};
        };
        const float* D = i.operands[6].data;
        float* state = i.operands[8].data + (r * channels + own.begin) * states;
        seqarch_selective_scan_inputs in{};
        in.dtype = SEQARCH_FLOAT32;
        in.softplus = in.scale_input = 1;
        in.x = rows(1, own.begin);
        in.dt = rows(2, own.begin);
        in.B = rows(3, 0);
        in.C = rows(4, 0);
        in.z = rows(7, own.begin);
        in.A = i.operands[5].data + own.begin * states;
        in.D = D ? D + own.begin : nullptr;
        in.state = state;
        in.sequences = in.length = in.groups = in.chunk = 1;
        in.channels = own.end - own.begin;
        in.state_width = states;
        const seqarch_selective_scan_outputs out{rows(0, own.begin), state, nullptr};
        code = std::max(code, seqarch_selective_scan_forward(&in, &out, 1));
    }
    return code;
}

int32_t run(const seqarch_instruction& i, Member member) {
    switch (i.kind) {
        case SEQARCH_NORM: norm(i, member); return SEQARCH_OK;
        case SEQARCH_LINEAR: linear(i, member); return SEQARCH_OK;
        case SEQARCH_CONVOLVE: convolve(i, member); return SEQARCH_OK;
        case SEQARCH_POINTWISE: pointwise(i, member); return SEQARCH_OK;
        case SEQARCH_SCAN: return scan(i, member);
        default: return SEQARCH_BAD_ARGUMENT;
    }
}

bool valid(const seqarch_instruction& i) {
    const int64_t parts = i.kind == SEQARCH_NORM ? 1 : 0, taps = i.kind == SEQARCH_CONVOLVE ? 2 : 0;
    return i.kind >= SEQARCH_NORM && i.kind <= SEQARCH_SCAN && i.sizes[1] >= std::max(parts, taps) &&
           countable({i.rows, i.sizes[0], i.sizes[1]});
}

int team_of(const seqarch_instruction* instructions, int64_t count, int num_threads) {
    double weights = 0;
    for (int64_t i = 0; i < count; ++i)
        if (instructions[i].kind == SEQARCH_LINEAR)
            weights += static_cast<double>(instructions[i].sizes[0]) * instructions[i].sizes[1];
    return weights < kSmallWork ? 1 : num_threads;
}

}  // namespace

int32_t seqarch_run_token(const seqarch_instruction* instructions, int64_t count, int32_t num_threads) {
    if (num_threads < 1 || count < 0 || !std::all_of(instructions, instructions + count, valid))
        return SEQARCH_BAD_ARGUMENT;
    const int team = team_of(instructions, count, num_threads);
    std::atomic<int32_t> code{SEQARCH_OK};
#pragma omp parallel num_threads(team) if (team > 1)
    {
#ifdef _OPENMP
        const Member member{omp_get_thread_num(), omp_get_num_threads()};
#else
        const Member member{0, 1};
#endif
        for (int64_t i = 0; i < count; ++i) {
            const int32_t own = run(instructions[i], member);
            if (own != SEQARCH_OK) code = own;  // the others go on: they would wait for this thread at the barrier
#pragma omp barrier
        }
    }
    return code;
}
