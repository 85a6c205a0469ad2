// Linear attention of heads whose values are one wide, forward and backward: the heads that share queries and keys are
// the columns of one state [K, R], each of which decays on its own. See linear_attention.cpp for how work is cut.
//
// Within a chunk o = sum_j s_ij v_j a(j -> i), with scores s that no decay is in. That is the sum with which a decay of
// each key dimension gives the gradient of queries, so ChunkDecay has it: here its vectors are of heads. In memory a
// group's states are [R, K].
#include "linear_attention.h"

namespace {

using namespace seqarch;
using namespace seqarch::linear_attention;

constexpr int64_t kChunk = 64;

// Buffers of one task, R the heads that it takes.
template <class A>
struct Scratch {
    int64_t keys, keys_row, heads, heads_row;
    A *q, *k, *transposed_k, *scores, *v, *decayed, *o, *read, *state, *between;
    ChunkDecay<A> decay;

    template <class T>
    Scratch(const Problem<T>& p, Arena<A>& arena)
        : keys(p.sizes.keys),
          keys_row(padded<A>(keys)),
          heads(p.sizes.heads_per_task),
          heads_row(padded<A>(heads)),
          decay(DecayKind::per_key, kChunk, heads, arena) {
        for (A** part : {&q, &k, &transposed_k}) *part = arena.take(kChunk * keys_row);
        for (A** part : {&v, &decayed, &o, &read}) *part = arena.take(kChunk * heads_row);
        scores = arena.take(kChunk * kChunk);
        state = arena.take(keys_row * heads_row);
        between = arena.take(keys_row * heads_row);
    }

    // Keys, and values and decays of the task's heads; with `scores_too` also queries and the scores, without decay.
    template <class T>
    void load(const Problem<T>& p, const Task& task, const Row& row, int64_t n, bool scores_too) {
        pack(n, keys, p.k.at(row, task.group), p.k.time, A(1), k, keys_row);
        pack(n, task.last_head - task.first_head, p.v.at(row, task.first_head), p.v.time, A(1), v, heads_row);
        pack(n, task.last_head - task.first_head, p.log_decay.at(row, task.first_head), p.log_decay.time, A(1), decayed,
             heads_row);
        decay.read(n, decayed, heads_row);
        if (!scores_too) return;
        pack(n, keys, p.q.at(row, task.group), p.q.time, p.scale, q, keys_row);
        transpose(n, keys, k, keys_row, transposed_k, kChunk);
        multiply(Shape::lower_result, n, n, keys, as_is(q, keys_row), transposed_k, kChunk, scores, kChunk, false);
        for (int64_t i = 0; i < n; ++i) std::fill(scores + i * kChunk + i + 1, scores + (i + 1) * kChunk, A(0));
    }
    // The task's states [R, K] as [K, R], and the way back. The last task of a group may have fewer heads than columns:
    // what is beyond them is read, and becomes 0.
    void load_state(const Task& task, const A* from, A* to) const {
        const int64_t count = task.last_head - task.first_head;
        pack(count, keys, from, keys, A(1), between, keys_row);
        std::fill_n(between + count * keys_row, (heads_row - count) * keys_row, A(0));
        transpose(heads_row, keys, between, keys_row, to, heads_row);
    }
    void store_state(const Task& task, const A* from, A* to) const {
        transpose(keys, task.last_head - task.first_head, from, heads_row, between, keys_row);
        unpack(task.last_head - task.first_head, keys, between, keys_row, A(1), to, keys);
    }
    // A state over the chunk.
    void advance(int64_t n, A* to) {
        decay.over_transposed(keys, to);
        multiply(Shape::full, keys, heads, n, transposed(k, keys_row), decay.to_end(n, v, decayed), heads_row, to,
                 heads_row, true);
    }
};

// One token: the rows of the states are read and written once.
template <class T>
void step(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const int64_t keys = p.sizes.keys;
    pack(1, keys, p.q.at(task.row, task.group), 0, p.scale, s.q, s.keys_row);
    pack(1, keys, p.k.at(task.row, task.group), 0, A(1), s.k, s.keys_row);
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
        const A decay = decay_exponential(*p.log_decay.at(task.row, h)), value = load(*p.v.at(task.row, h));
        const A* __restrict before = p.state + p.sizes.state(task.sequence, h);
        const A *__restrict q = s.q, *__restrict k = s.k;
        A* __restrict after = out.state + p.sizes.state(task.sequence, h);
        A o = 0;
#pragma omp simd reduction(+ : o)
        for (int64_t d = 0; d < keys; ++d) {
            const A x = decay * before[d] + k[d] * value;
            after[d] = x;
            o += q[d] * x;
        }
        store(out.o + p.sizes.place(task.row, h), o);
    }
}

template <class T>
void forward_task(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    if (task.steps == 1) return step(p, task, out, s);
    s.load_state(task, p.state + sizes.state(task.sequence, task.first_head), s.state);
    for (int64_t t = 0; t < task.steps; t += kChunk) {
        const int64_t n = std::min(kChunk, task.steps - t);
        const Row row = task.row.later(t);
        s.load(p, task, row, n, true);
        multiply(Shape::full, n, s.heads, s.keys, as_is(s.q, s.keys_row), s.state, s.heads_row, s.o, s.heads_row,
                 false);
        s.decay.from_start_backward(n, s.o);
        s.decay.read_values(n, s.scores, s.v, s.o);
        unpack(n, task.last_head - task.first_head, s.o, s.heads_row, A(1), out.o + sizes.place(row, task.first_head),
               sizes.heads);
        s.advance(n, s.state);
    }
    s.store_state(task, s.state, out.state + sizes.state(task.sequence, task.first_head));
}

// Buffers of backward beyond those of forward.
template <class A>
struct BackwardScratch : Scratch<A> {
    A *dout, *decayed_dout, *transposed_v, *dscores, *dv, *dq, *dk, *dstate, *transposed_state, *states;

    template <class T>
    BackwardScratch(const Problem<T>& p, Arena<A>& arena) : Scratch<A>(p, arena) {
        const int64_t size = this->keys_row * this->heads_row;
        for (A** part : {&dout, &decayed_dout, &transposed_v, &dv}) *part = arena.take(kChunk * this->heads_row);
        for (A** part : {&dq, &dk}) *part = arena.take(kChunk * this->keys_row);
        for (A** part : {&dstate, &transposed_state}) *part = arena.take(size);
        dscores = arena.take(kChunk * kChunk);
        states = arena.take_unwritten((p.sizes.longest / kChunk + 1) * size);
    }
};

// The gradients of the task's heads in one chunk.
template <class T>
void backward_chunk(const Problem<T>& p, const Gradients<T>& g, const Task& task, const Row& row, int64_t n,
                    const Acc<T>* state, BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys = b.keys, keys_row = b.keys_row, heads_row = b.heads_row;
    const int64_t count = task.last_head - task.first_head;
    b.load(p, task, row, n, true);
    // the gradient's heads need not lie side by side
    for (int64_t h = 0; h < count; ++h)
        for (int64_t i = 0; i < n; ++i)
            b.dout[i * heads_row + h] = load(g.dout.at(row, task.first_head + h)[i * g.dout.time]);
    for (int64_t i = 0; i < n; ++i) std::fill(b.dout + i * heads_row + count, b.dout + (i + 1) * heads_row, A(0));
    transpose(n, b.heads, b.v, heads_row, b.transposed_v, kChunk);
    b.decay.clear_gradient(n);

    // what was read of the state, and of the values of the chunk
    multiply(Shape::full, n, b.heads, keys, as_is(b.q, keys_row), state, heads_row, b.o, heads_row, false);
    b.decay.from_start_backward(n, b.o);
    b.decay.add_from_start(n, b.dout, b.o);
    multiply(Shape::full, n, b.heads, keys, as_is(b.k, keys_row), b.dstate, heads_row, b.dv, heads_row, false);
    b.decay.to_end_backward(n, b.dv);
    b.decay.add_to_end(n, b.v, b.dv);
    b.decay.read_values_backward(n, b.scores, b.dout, b.v, b.o, b.dv);
    unpack(n, count, b.dv, heads_row, A(1), g.dv + sizes.place(row, task.first_head), sizes.heads);

    // queries and keys
    b.decay.scores(n, b.dout, b.transposed_v, nullptr, b.dscores);
    multiply(Shape::lower_left, n, keys, n, as_is(b.dscores, kChunk), b.k, keys_row, b.dq, keys_row, false);
    multiply(Shape::upper_left, n, keys, n, transposed(b.dscores, kChunk), b.q, keys_row, b.dk, keys_row, false);
    const A* decayed_dout = b.decay.from_start(n, b.dout, b.decayed_dout);
    transpose(keys, b.heads, state, heads_row, b.transposed_state, keys_row);
    multiply(Shape::full, n, keys, b.heads, as_is(decayed_dout, heads_row), b.transposed_state, keys_row, b.dq,
             keys_row, true);
    transpose(keys, b.heads, b.dstate, heads_row, b.transposed_state, keys_row);
    multiply(Shape::full, n, keys, b.heads, as_is(b.decay.to_end(n, b.v, b.decayed), heads_row), b.transposed_state,
             keys_row, b.dk, keys_row, true);
    g.dq.write(sizes, row, task, n, b.dq, keys_row, p.scale);
    g.dk.write(sizes, row, task, n, b.dk, keys_row, A(1));

    b.decay.write_gradient(n, keys, state, b.dstate, b.decayed, heads_row);
    unpack(n, count, b.decayed, heads_row, A(1), g.dlog_decay + row.token * sizes.heads + task.first_head,
           sizes.heads);
    b.decay.over_transposed(keys, b.dstate);
    multiply(Shape::full, keys, b.heads, n, transposed(b.q, keys_row), decayed_dout, heads_row, b.dstate, heads_row,
             true);
}

template <class T>
void backward_task(const Problem<T>& p, const Task& task, const Gradients<T>& g, BackwardScratch<Acc<T>>& b) {
    const int64_t size = b.keys_row * b.heads_row, first = p.sizes.state(task.sequence, task.first_head);
    b.load_state(task, p.state + first, b.states);
    for (int64_t c = 0; (c + 1) * kChunk < task.steps; ++c) {
        std::copy_n(b.states + c * size, size, b.states + (c + 1) * size);
        b.load(p, task, task.row.later(c * kChunk), kChunk, false);
        b.advance(kChunk, b.states + (c + 1) * size);
    }
    b.load_state(task, g.dstate_out + first, b.dstate);
    for (int64_t c = (task.steps - 1) / kChunk; c >= 0 && task.steps; --c)
        backward_chunk(p, g, task, task.row.later(c * kChunk), std::min(kChunk, task.steps - c * kChunk),
                       b.states + c * size, b);
    b.store_state(task, b.dstate, g.dstate + first);
}

}  // namespace

int32_t seqarch::linear_attention::narrow_forward(const seqarch_linear_attention_inputs& in,
                                                  const seqarch_linear_attention_outputs& outputs, int num_threads) {
    return with_dtype(in.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Problem<T> p(in, num_threads);
        const Outputs<T> out(outputs);
        run_tasks<A>(
            p.sizes, head_tasks(p.sizes), num_threads, [&](Arena<A>& arena) { return Scratch<A>(p, arena); },
            [&](const Task& task, Scratch<A>& scratch) { forward_task(p, task, out, scratch); });
    });
}

int32_t seqarch::linear_attention::narrow_backward(const seqarch_linear_attention_inputs& in,
                                                   const seqarch_linear_attention_gradients& gradients,
                                                   int num_threads) {
    return with_dtype(in.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Problem<T> p(in, num_threads);
        const Gradients<T> g(gradients, p.sizes);
        run_tasks<A>(
            p.sizes, head_tasks(p.sizes), num_threads, [&](Arena<A>& arena) { return BackwardScratch<A>(p, arena); },
            [&](const Task& task, BackwardScratch<A>& scratch) { backward_task(p, task, g, scratch); });
        g.add_up(p);
    });
}
