// Linear attention with any diagonal decay, forward and backward. See seqarch.h for the equation and the arguments.
//
// A task is one sequence and some heads that share their queries and keys (forward also a part of the values). It goes
// over chunks of tokens: scores within a chunk are matrix products, what came before it is a product with the state at
// its start. Backward goes over the sequence twice: forward for the states at the chunks' starts, back for the
// gradients. How heads are cut into tasks depends on the sizes alone, so sums do not depend on the number of threads.
// Heads whose values are one wide are taken side by side, in linear_attention_narrow.cpp.
#include "linear_attention.h"

namespace {

using namespace seqarch;
using namespace seqarch::linear_attention;

constexpr int64_t kChunk = 64;

// Buffers of one task.
template <class A>
struct Scratch {
    A *q, *k, *transposed_k, *v, *raw, *scores, *decayed_q, *decayed_k, *o, *states;
    ChunkDecay<A> decay;

    Scratch(const Sizes& sizes, Arena<A>& arena)
        : q(arena.take(kChunk * padded<A>(sizes.keys))),
          k(arena.take(kChunk * padded<A>(sizes.keys))),
          transposed_k(arena.take(kChunk * padded<A>(sizes.keys))),
          v(arena.take(kChunk * padded<A>(sizes.values))),
          raw(arena.take(kChunk * kChunk)),
          scores(arena.take(kChunk * kChunk)),
          decayed_q(arena.take(kChunk * padded<A>(sizes.keys))),
          decayed_k(arena.take(kChunk * padded<A>(sizes.keys))),
          o(arena.take(kChunk * padded<A>(sizes.values))),
          states(arena.take(sizes.heads_per_task * sizes.keys * padded<A>(sizes.values))),
          decay(sizes.decay, kChunk, sizes.keys, arena) {}
};

// One token: the state is read and written once.
template <class T>
void step(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys_row = padded<A>(sizes.keys), columns = task.last_value - task.first_value;
    pack(1, sizes.keys, p.q.at(task.row, task.group), 0, p.scale, s.q, keys_row);
    pack(1, sizes.keys, p.k.at(task.row, task.group), 0, A(1), s.k, keys_row);
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
        if (sizes.decay != DecayKind::none) s.decay.read(1, p.log_decay.at(task.row, h), 0);
        pack(1, columns, p.v.at(task.row, h) + task.first_value, 0, A(1), s.v, padded<A>(columns));
        const int64_t offset = sizes.state(task.sequence, h) + task.first_value;
        std::fill_n(s.o, columns, A(0));
        for (int64_t d = 0; d < sizes.keys; ++d) {
            const A decay =
                sizes.decay == DecayKind::none ? A(1) : s.decay.whole[sizes.decay == DecayKind::per_key ? d : 0];
            const A query = s.q[d], key = s.k[d];
            const A* __restrict before = p.state + offset + d * sizes.values;
            A* __restrict after = out.state + offset + d * sizes.values;
            const A* __restrict value = s.v;
            A* __restrict o = s.o;
#pragma omp simd
            for (int64_t v = 0; v < columns; ++v) {
                const A x = decay * before[v] + key * value[v];
                after[v] = x;
                o[v] += query * x;
            }
        }
        unpack(1, columns, s.o, 0, A(1), out.o + sizes.place(task.row, h) + task.first_value, 0);
    }
}

template <class T>
void forward_task(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t columns = task.last_value - task.first_value;
    const int64_t keys_row = padded<A>(sizes.keys), values_row = padded<A>(columns);
    if (task.steps == 1) return step(p, task, out, s);
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        pack(sizes.keys, columns, p.state + sizes.state(task.sequence, h) + task.first_value, sizes.values,
             A(1), s.states + (h - task.first_head) * sizes.keys * values_row, values_row);

    for (int64_t t = 0; t < task.steps; t += kChunk) {
        const int64_t n = std::min(kChunk, task.steps - t);
        const Row row = task.row.later(t);
        pack(n, sizes.keys, p.q.at(row, task.group), p.q.time, p.scale, s.q, keys_row);
        pack(n, sizes.keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
        transpose(n, sizes.keys, s.k, keys_row, s.transposed_k, kChunk);
        if (sizes.decay != DecayKind::per_key)
            multiply(Shape::lower_result, n, n, sizes.keys, as_is(s.q, keys_row), s.transposed_k, kChunk, s.raw, kChunk,
                     false);
        for (int64_t h = task.first_head; h < task.last_head; ++h) {
            A* state = s.states + (h - task.first_head) * sizes.keys * values_row;
            pack(n, columns, p.v.at(row, h) + task.first_value, p.v.time, A(1), s.v, values_row);
            if (sizes.decay != DecayKind::none) s.decay.read(n, p.log_decay.at(row, h), p.log_decay.time);
            s.decay.scores(n, s.q, s.transposed_k, s.raw, s.scores);
            multiply(Shape::lower_left, n, columns, n, as_is(s.scores, kChunk), s.v, values_row, s.o, values_row,
                     false);
            const A* q = s.decay.from_start(n, s.q, s.decayed_q);
            multiply(Shape::full, n, columns, sizes.keys, as_is(q, keys_row), state, values_row, s.o, values_row, true);
            unpack(n, columns, s.o, values_row, A(1),
                   out.o + sizes.place(row, h) + task.first_value, sizes.heads * sizes.values);
            const A* k = s.decay.to_end(n, s.k, s.decayed_k);
            s.decay.over(values_row, state);
            multiply(Shape::full, sizes.keys, columns, n, transposed(k, keys_row), s.v, values_row, state, values_row,
                     true);
        }
    }
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        unpack(sizes.keys, columns, s.states + (h - task.first_head) * sizes.keys * values_row, values_row, A(1),
               out.state + sizes.state(task.sequence, h) + task.first_value, sizes.values);
}

// Buffers of backward beyond those of forward; states are [V, K] here, keys along their rows.
template <class A>
struct BackwardScratch {
    A *dout, *transposed_v, *dscores, *dq, *dk, *dv, *head_dq, *head_dk, *dstates, *dstate, *states;

    BackwardScratch(const Sizes& sizes, Arena<A>& arena)
        : dout(arena.take(kChunk * padded<A>(sizes.values))),
          transposed_v(arena.take(kChunk * padded<A>(sizes.values))),
          dscores(arena.take(kChunk * kChunk)),
          dq(arena.take(kChunk * padded<A>(sizes.keys))),
          dk(arena.take(kChunk * padded<A>(sizes.keys))),
          dv(arena.take(kChunk * padded<A>(sizes.values))),
          head_dq(arena.take(kChunk * padded<A>(sizes.keys))),
          head_dk(arena.take(kChunk * padded<A>(sizes.keys))),
          dstates(arena.take(sizes.heads_per_task * padded<A>(sizes.values) * padded<A>(sizes.keys))),
          dstate(arena.take(padded<A>(sizes.values) * padded<A>(sizes.keys))),
          states(arena.take_unwritten(sizes.heads_per_task * (sizes.longest / kChunk + 1) * padded<A>(sizes.values) *
                                      padded<A>(sizes.keys))) {}
};

// The states at the starts of all chunks of the task's heads.
template <class T>
void recompute_states(const Problem<T>& p, const Task& task, Scratch<Acc<T>>& s, BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys_row = padded<A>(sizes.keys), values_row = padded<A>(sizes.values), size = values_row * keys_row;
    const int64_t heads = task.last_head - task.first_head;
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t state = sizes.state(task.sequence, task.first_head + h);
        load_transposed(sizes, p.state + state, b.dstate, b.states + h * size);
    }
    for (int64_t t = 0, c = 0; t + kChunk < task.steps; t += kChunk, ++c) {
        const Row row = task.row.later(t);
        pack(kChunk, sizes.keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
        for (int64_t h = 0; h < heads; ++h) {
            const A* before = b.states + (c * heads + h) * size;
            A* after = b.states + ((c + 1) * heads + h) * size;
            std::copy_n(before, sizes.values * keys_row, after);
            pack(kChunk, sizes.values, p.v.at(row, task.first_head + h), p.v.time, A(1), s.v, values_row);
            if (sizes.decay != DecayKind::none)
                s.decay.read(kChunk, p.log_decay.at(row, task.first_head + h), p.log_decay.time);
            s.decay.over_transposed(sizes.values, after);
            const A* k = s.decay.to_end(kChunk, s.k, s.decayed_k);
            multiply(Shape::full, sizes.values, sizes.keys, kChunk, transposed(s.v, values_row), k, keys_row, after,
                     keys_row, true);
        }
    }
}

// The gradients of one head in one chunk, whose queries, keys and raw scores stand in s.
template <class T>
void backward_head(const Problem<T>& p, const Gradients<T>& g, const Row& row, int64_t h, int64_t n,
                   const Acc<T>* state, Acc<T>* dstate, Scratch<Acc<T>>& s, BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys_row = padded<A>(sizes.keys), values_row = padded<A>(sizes.values);
    pack(n, sizes.values, p.v.at(row, h), p.v.time, A(1), s.v, values_row);
    pack(n, sizes.values, g.dout.at(row, h), g.dout.time, A(1), b.dout, values_row);
    transpose(n, sizes.values, s.v, values_row, b.transposed_v, kChunk);
    transpose(sizes.values, sizes.keys, dstate, keys_row, b.dstate, values_row);
    if (sizes.decay != DecayKind::none) s.decay.read(n, p.log_decay.at(row, h), p.log_decay.time);
    s.decay.clear_gradient(n);
    s.decay.scores(n, s.q, s.transposed_k, s.raw, s.scores);
    const A* q = s.decay.from_start(n, s.q, s.decayed_q);
    const A* k = s.decay.to_end(n, s.k, s.decayed_k);

    multiply(Shape::upper_left, n, sizes.values, n, transposed(s.scores, kChunk), b.dout, values_row, b.dv, values_row,
             false);
    multiply(Shape::full, n, sizes.values, sizes.keys, as_is(k, keys_row), b.dstate, values_row, b.dv, values_row,
             true);
    unpack(n, sizes.values, b.dv, values_row, A(1), g.dv + sizes.place(row, h), sizes.heads * sizes.values);

    multiply(Shape::full, n, sizes.keys, sizes.values, as_is(b.dout, values_row), state, keys_row, b.head_dq, keys_row,
             false);
    multiply(Shape::full, n, sizes.keys, sizes.values, as_is(s.v, values_row), dstate, keys_row, b.head_dk, keys_row,
             false);
    s.decay.from_start_backward(n, b.head_dq);
    s.decay.to_end_backward(n, b.head_dk);
    s.decay.add_from_start(n, s.q, b.head_dq);
    s.decay.add_to_end(n, s.k, b.head_dk);
    multiply(Shape::lower_result, n, n, sizes.values, as_is(b.dout, values_row), b.transposed_v, kChunk, b.dscores,
             kChunk, false);
    s.decay.add_score_terms(n, s.scores, b.dscores);
    s.decay.scores_backward(n, s.q, s.k, b.dscores, b.head_dq, b.head_dk);
    if (sizes.decay != DecayKind::none) {
        const int64_t width = sizes.decay == DecayKind::per_key ? sizes.keys : 1;
        s.decay.write_gradient(n, sizes.values, state, dstate, g.dlog_decay + (row.token * sizes.heads + h) * width,
                               sizes.heads * width);
    }
    s.decay.over_transposed(sizes.values, dstate);
    multiply(Shape::full, sizes.values, sizes.keys, n, transposed(b.dout, values_row), q, keys_row, dstate, keys_row,
             true);
}

template <class T>
void backward_task(const Problem<T>& p, const Task& task, const Gradients<T>& g, Scratch<Acc<T>>& s,
                   BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys_row = padded<A>(sizes.keys), values_row = padded<A>(sizes.values), size = values_row * keys_row;
    const int64_t heads = task.last_head - task.first_head;
    recompute_states(p, task, s, b);
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t state = sizes.state(task.sequence, task.first_head + h);
        load_transposed(sizes, g.dstate_out + state, b.dstate, b.dstates + h * size);
    }
    for (int64_t c = (task.steps - 1) / kChunk; c >= 0 && task.steps; --c) {
        const int64_t n = std::min(kChunk, task.steps - c * kChunk);
        const Row row = task.row.later(c * kChunk);
        pack(n, sizes.keys, p.q.at(row, task.group), p.q.time, p.scale, s.q, keys_row);
        pack(n, sizes.keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
        transpose(n, sizes.keys, s.k, keys_row, s.transposed_k, kChunk);
        if (sizes.decay != DecayKind::per_key)
            multiply(Shape::lower_result, n, n, sizes.keys, as_is(s.q, keys_row), s.transposed_k, kChunk, s.raw, kChunk,
                     false);
        std::fill_n(b.dq, n * keys_row, A(0));
        std::fill_n(b.dk, n * keys_row, A(0));
        for (int64_t h = 0; h < heads; ++h) {
            backward_head(p, g, row, task.first_head + h, n, b.states + (c * heads + h) * size, b.dstates + h * size, s,
                          b);
            for (int64_t x = 0; x < n * keys_row; ++x) b.dq[x] += b.head_dq[x];
            for (int64_t x = 0; x < n * keys_row; ++x) b.dk[x] += b.head_dk[x];
        }
        g.dq.write(sizes, row, task, n, b.dq, keys_row, p.scale);
        g.dk.write(sizes, row, task, n, b.dk, keys_row, A(1));
    }
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t state = sizes.state(task.sequence, task.first_head + h);
        transpose(sizes.values, sizes.keys, b.dstates + h * size, keys_row, b.dstate, values_row);
        unpack(sizes.keys, sizes.values, b.dstate, values_row, A(1), g.dstate + state, sizes.values);
    }
}

template <class T>
void forward(const Problem<T>& p, const Outputs<T>& out) {
    using A = Acc<T>;
    run_tasks<A>(
        p.sizes, forward_tasks<A>(p.sizes, p.num_threads), p.num_threads,
        [&](Arena<A>& arena) { return Scratch<A>(p.sizes, arena); },
        [&](const Task& task, Scratch<A>& scratch) { forward_task(p, task, out, scratch); });
}

template <class T>
void backward(const Problem<T>& p, const Gradients<T>& g) {
    using A = Acc<T>;
    using Both = std::pair<Scratch<A>, BackwardScratch<A>>;
    run_tasks<A>(
        p.sizes, head_tasks(p.sizes), p.num_threads,
        [&](Arena<A>& arena) {
            Scratch<A> first(p.sizes, arena);
            return Both(first, BackwardScratch<A>(p.sizes, arena));
        },
        [&](const Task& task, Both& scratch) { backward_task(p, task, g, scratch.first, scratch.second); });
    g.add_up(p);
}

}  // namespace

int32_t seqarch_linear_attention_forward(const seqarch_linear_attention_inputs* inputs,
                                         const seqarch_linear_attention_outputs* outputs, int32_t num_threads) {
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    if (linear_attention::is_narrow(*inputs)) return linear_attention::narrow_forward(*inputs, *outputs, num_threads);
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(Problem<T>(*inputs, num_threads), Outputs<T>(*outputs));
    });
}

int32_t seqarch_linear_attention_backward(const seqarch_linear_attention_inputs* inputs,
                                          const seqarch_linear_attention_gradients* gradients, int32_t num_threads) {
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    if (linear_attention::is_narrow(*inputs))
        return linear_attention::narrow_backward(*inputs, *gradients, num_threads);
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Problem<T> p(*inputs, num_threads);
        backward(p, Gradients<T>(*gradients, p.sizes));
    });
}
