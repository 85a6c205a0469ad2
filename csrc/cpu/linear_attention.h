// What all kernels of linear attention share: the problem, its outputs and gradients.
#pragma once

#include "recurrence.h"

namespace seqarch::linear_attention {

template <class T>
struct Problem {
    using A = Acc<T>;
    Sizes sizes;
    Heads<T> q, k, v;
    Heads<A> log_decay;
    A scale;
    const A* state;
    int num_threads;

    Problem(const seqarch_linear_attention_inputs& in, int num_threads)
        : sizes(in),
          q(in.q),
          k(in.k),
          v(in.v),
          log_decay(in.log_decay),
          scale(static_cast<A>(in.scale)),
          state(static_cast<const A*>(in.state)),
          num_threads(num_threads) {}
};

template <class T>
struct Outputs {
    T* o;
    Acc<T>* state;

    explicit Outputs(const seqarch_linear_attention_outputs& out)
        : o(static_cast<T*>(out.o)), state(static_cast<Acc<T>*>(out.state_out)) {}
};

template <class T>
struct Gradients {
    using A = Acc<T>;
    Heads<T> dout;
    const A* dstate_out;
    Shared<T> dq, dk;
    T* dv;
    A *dlog_decay, *dstate;

    Gradients(const seqarch_linear_attention_gradients& g, const Sizes& sizes)
        : dout(g.dout),
          dstate_out(static_cast<const A*>(g.dstate_out)),
          dq(static_cast<T*>(g.dq)),
          dk(static_cast<T*>(g.dk)),
          dv(static_cast<T*>(g.dv)),
          dlog_decay(static_cast<A*>(g.dlog_decay)),
          dstate(static_cast<A*>(g.dstate)) {
        dq.allocate(sizes);
        dk.allocate(sizes);
    }
    // Of queries and keys, what the tasks of a group have found.
    void add_up(const Problem<T>& p) const {
        dq.add_up(p.sizes, p.num_threads);
        dk.add_up(p.sizes, p.num_threads);
    }
};

// Heads whose values are one wide (linear_attention_narrow.cpp): whether these share their queries and keys, and have
// decays of their own, side by side in memory.
inline bool is_narrow(const seqarch_linear_attention_inputs& in) {
    return in.values == 1 && in.heads > in.groups && in.log_decay.data && !in.decay_per_key && in.v.head_stride == 1 &&
           in.log_decay.head_stride == 1;
}

// As seqarch_linear_attention_forward and _backward, of valid inputs that are narrow.
int32_t narrow_forward(const seqarch_linear_attention_inputs& in, const seqarch_linear_attention_outputs& outputs,
                       int num_threads);
int32_t narrow_backward(const seqarch_linear_attention_inputs& in, const seqarch_linear_attention_gradients& gradients,
                        int num_threads);

}  // namespace seqarch::linear_attention
