// One step of the cells of seqarch_gated_rnn, forward and backward, elementwise over the channels of one head.
//
// Rows of gates [kGates, stride] and of states [kStates, stride]: x from the input, r from the last output. Backward
// takes the gradients of the states after the step, and leaves in their place those of the states before it, without
// what comes by r.
#pragma once

#include "numbers.h"

namespace seqarch {

template <class A>
struct Step {
    int64_t width, stride;
    const A *x, *r;
};

template <class A>
struct StepGradients {
    A *dx, *dr, *dstates;
};

struct Slstm {
    static constexpr int64_t kGates = 4, kStates = 4;  // z, i, f, o; h, c, n, m

    template <class A>
    static void forward(const Step<A>& step, A* __restrict states) {
        const int64_t s = step.stride;
        const A *__restrict x = step.x, *__restrict r = step.r;
#pragma omp simd
        for (int64_t k = 0; k < step.width; ++k) {
            const A input = x[s + k] + r[s + k], n = states[2 * s + k];
            const A forgotten = states[3 * s + k] - softplus(-(x[2 * s + k] + r[2 * s + k]));
            const A m = n == A(0) ? input : std::max(forgotten, input);
            const A write = exponential(input - m), keep = exponential(std::min(forgotten - m, A(0)));
            const A c = keep * states[s + k] + write * hyperbolic_tangent(x[k] + r[k]);
            const A sum = keep * n + write;
            states[k] = sigmoid(x[3 * s + k] + r[3 * s + k]) * c / sum;
            states[s + k] = c;
            states[2 * s + k] = sum;
            states[3 * s + k] = m;
        }
    }
    template <class A>
    static void backward(const Step<A>& step, const A* __restrict before, const A* __restrict after,
                         const StepGradients<A>& g) {
        const int64_t s = step.stride;
        const A *__restrict x = step.x, *__restrict r = step.r;
        A *__restrict dx = g.dx, *__restrict dr = g.dr, *__restrict d = g.dstates;
#pragma omp simd
        for (int64_t k = 0; k < step.width; ++k) {
            const A z = hyperbolic_tangent(x[k] + r[k]), f = x[2 * s + k] + r[2 * s + k];
            const A out = sigmoid(x[3 * s + k] + r[3 * s + k]), m = after[3 * s + k], n = after[2 * s + k];
            const A write = exponential(x[s + k] + r[s + k] - m);
            const A keep = exponential(std::min(before[3 * s + k] - softplus(-f) - m, A(0)));
            const A ratio = after[s + k] / n, dratio = d[k] * out;
            const A dc = d[s + k] + dratio / n, dn = d[2 * s + k] - dratio * ratio / n;
            dx[k] = dc * write * (A(1) - z * z);
            dx[s + k] = (dc * z + dn) * write;
            dx[2 * s + k] = (dc * before[s + k] + dn * before[2 * s + k]) * keep * sigmoid(-f);
            dx[3 * s + k] = d[k] * ratio * out * (A(1) - out);
            d[k] = 0;
            d[s + k] = dc * keep;
            d[2 * s + k] = dn * keep;
            d[3 * s + k] = 0;
        }
        std::copy_n(dx, kGates * s, dr);
    }
};

struct Lstm {
    static constexpr int64_t kGates = 4, kStates = 2;  // i, f, g, o; h, c

    template <class A>
    static void forward(const Step<A>& step, A* __restrict states) {
        const int64_t s = step.stride;
        const A *__restrict x = step.x, *__restrict r = step.r;
#pragma omp simd
        for (int64_t k = 0; k < step.width; ++k) {
            const A write = sigmoid(x[k] + r[k]), keep = sigmoid(x[s + k] + r[s + k]);
            const A c = keep * states[s + k] + write * hyperbolic_tangent(x[2 * s + k] + r[2 * s + k]);
            states[k] = sigmoid(x[3 * s + k] + r[3 * s + k]) * hyperbolic_tangent(c);
            states[s + k] = c;
        }
    }
    template <class A>
    static void backward(const Step<A>& step, const A* __restrict before, const A* __restrict after,
                         const StepGradients<A>& g) {
        const int64_t s = step.stride;
        const A *__restrict x = step.x, *__restrict r = step.r;
        A *__restrict dx = g.dx, *__restrict dr = g.dr, *__restrict d = g.dstates;
#pragma omp simd
        for (int64_t k = 0; k < step.width; ++k) {
            const A write = sigmoid(x[k] + r[k]), keep = sigmoid(x[s + k] + r[s + k]);
            const A input = hyperbolic_tangent(x[2 * s + k] + r[2 * s + k]), out = sigmoid(x[3 * s + k] + r[3 * s + k]);
            const A shown = hyperbolic_tangent(after[s + k]);
            const A dc = d[s + k] + d[k] * out * (A(1) - shown * shown);
            dx[k] = dc * input * write * (A(1) - write);
            dx[s + k] = dc * before[s + k] * keep * (A(1) - keep);
            dx[2 * s + k] = dc * write * (A(1) - input * input);
            dx[3 * s + k] = d[k] * shown * out * (A(1) - out);
            d[k] = 0;
            d[s + k] = dc * keep;
        }
        std::copy_n(dx, kGates * s, dr);
    }
};

struct Gru {
    static constexpr int64_t kGates = 3, kStates = 1;  // r, z, n; h

    template <class A>
    static void forward(const Step<A>& step, A* __restrict states) {
        const int64_t s = step.stride;
        const A *__restrict x = step.x, *__restrict r = step.r;
#pragma omp simd
        for (int64_t k = 0; k < step.width; ++k) {
            const A reset = sigmoid(x[k] + r[k]), keep = sigmoid(x[s + k] + r[s + k]);
            const A input = hyperbolic_tangent(x[2 * s + k] + reset * r[2 * s + k]);
            states[k] = input + keep * (states[k] - input);
        }
    }
    template <class A>
    static void backward(const Step<A>& step, const A* __restrict before, const A*, const StepGradients<A>& g) {
        const int64_t s = step.stride;
        const A *__restrict x = step.x, *__restrict r = step.r;
        A *__restrict dx = g.dx, *__restrict dr = g.dr, *__restrict d = g.dstates;
#pragma omp simd
        for (int64_t k = 0; k < step.width; ++k) {
            const A reset = sigmoid(x[k] + r[k]), keep = sigmoid(x[s + k] + r[s + k]);
            const A input = hyperbolic_tangent(x[2 * s + k] + reset * r[2 * s + k]);
            const A dinput = d[k] * (A(1) - keep) * (A(1) - input * input);
            dx[k] = dinput * r[2 * s + k] * reset * (A(1) - reset);
            dx[s + k] = d[k] * (before[k] - input) * keep * (A(1) - keep);
            dx[2 * s + k] = dinput;
            dr[k] = dx[k];
            dr[s + k] = dx[s + k];
            dr[2 * s + k] = dinput * reset;
            d[k] *= keep;
        }
    }
};

}  // namespace seqarch
