// Linear attention with any diagonal decay, forward and backward. See seqarch.h for the equation and the arguments.
//
// A task is one sequence and some heads that share their queries and keys (forward also a part of the values). It goes
// over chunks of tokens: pairs of a chunk are matrix products, what came before it is a product with the state at its
// start. Backward goes over the sequence twice: forward for the states at the chunks' starts, back for the gradients.
// How heads are cut into tasks depends on the sizes alone, so sums do not depend on the number of threads.
#include "recurrence.h"

namespace {

using namespace seqarch;

constexpr int64_t kChunk = 64;

// Buffers of one task.
template <class A>
struct Scratch {
    A *q, *k, *turned, *v, *raw, *scores, *decayed_q, *decayed_k, *o, *states;
    ChunkDecay<A> decay;

    Scratch(const Sizes& z, Arena<A>& arena)
        : q(arena.take(kChunk * padded<A>(z.keys))),
          k(arena.take(kChunk * padded<A>(z.keys))),
          turned(arena.take(kChunk * padded<A>(z.keys))),
          v(arena.take(kChunk * padded<A>(z.values))),
          raw(arena.take(kChunk * kChunk)),
          scores(arena.take(kChunk * kChunk)),
          decayed_q(arena.take(kChunk * padded<A>(z.keys))),
          decayed_k(arena.take(kChunk * padded<A>(z.keys))),
          o(arena.take(kChunk * padded<A>(z.values))),
          states(arena.take(z.heads_per_task * z.keys * padded<A>(z.values))),
          decay(z.decay, kChunk, z.keys, arena) {}
};

template <class T>
struct Problem {
    using A = Acc<T>;
    Sizes z;
    Heads<T> q, k, v;
    Heads<A> log_decay;
    A scale;
    const A* state;
    int num_threads;
};

template <class T>
struct Outputs {
    T* o;
    Acc<T>* state;
};

// One token: the state is read and written once.
template <class T>
void step(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& z = p.z;
    const int64_t keys_row = padded<A>(z.keys), columns = task.last_value - task.first_value;
    pack(1, z.keys, p.q.at(task.row, task.group), 0, p.scale, s.q, keys_row);
    pack(1, z.keys, p.k.at(task.row, task.group), 0, A(1), s.k, keys_row);
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
        if (z.decay != DecayKind::none) s.decay.read(1, p.log_decay.at(task.row, h), 0);
        pack(1, columns, p.v.at(task.row, h) + task.first_value, 0, A(1), s.v, padded<A>(columns));
        const int64_t offset = (task.sequence * z.heads + h) * z.keys * z.values + task.first_value;
        std::fill_n(s.o, columns, A(0));
        for (int64_t d = 0; d < z.keys; ++d) {
            const A decay = z.decay == DecayKind::none ? A(1) : s.decay.whole[z.decay == DecayKind::per_key ? d : 0];
            const A query = s.q[d], key = s.k[d];
            const A* __restrict before = p.state + offset + d * z.values;
            A* __restrict after = out.state + offset + d * z.values;
            const A* __restrict value = s.v;
            A* __restrict o = s.o;
#pragma omp simd
            for (int64_t v = 0; v < columns; ++v) {
                const A x = decay * before[v] + key * value[v];
                after[v] = x;
                o[v] += query * x;
            }
        }
        unpack(1, columns, s.o, 0, A(1), out.o + (task.row.token * z.heads + h) * z.values + task.first_value, 0);
    }
}

template <class T>
void forward_task(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& z = p.z;
    const int64_t columns = task.last_value - task.first_value;
    const int64_t keys_row = padded<A>(z.keys), values_row = padded<A>(columns);
    if (task.steps == 1) return step(p, task, out, s);
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        pack(z.keys, columns, p.state + (task.sequence * z.heads + h) * z.keys * z.values + task.first_value, z.values,
             A(1), s.states + (h - task.first_head) * z.keys * values_row, values_row);

    for (int64_t t = 0; t < task.steps; t += kChunk) {
        const int64_t n = std::min(kChunk, task.steps - t);
        const Row row = task.row.later(t);
        pack(n, z.keys, p.q.at(row, task.group), p.q.time, p.scale, s.q, keys_row);
        pack(n, z.keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
        transpose(n, z.keys, s.k, keys_row, s.turned, kChunk);
        if (z.decay != DecayKind::per_key)
            multiply(Shape::lower_result, n, n, z.keys, as_is(s.q, keys_row), s.turned, kChunk, s.raw, kChunk, false);
        for (int64_t h = task.first_head; h < task.last_head; ++h) {
            A* state = s.states + (h - task.first_head) * z.keys * values_row;
            pack(n, columns, p.v.at(row, h) + task.first_value, p.v.time, A(1), s.v, values_row);
            if (z.decay != DecayKind::none) s.decay.read(n, p.log_decay.at(row, h), p.log_decay.time);
            s.decay.scores(n, s.q, s.turned, s.raw, s.scores);
            multiply(Shape::lower_left, n, columns, n, as_is(s.scores, kChunk), s.v, values_row, s.o, values_row, false);
            const A* q = s.decay.from_start(n, s.q, s.decayed_q);
            multiply(Shape::full, n, columns, z.keys, as_is(q, keys_row), state, values_row, s.o, values_row, true);
            unpack(n, columns, s.o, values_row, A(1),
                   out.o + (row.token * z.heads + h) * z.values + task.first_value, z.heads * z.values);
            const A* k = s.decay.to_end(n, s.k, s.decayed_k);
            s.decay.over(values_row, state);
            multiply(Shape::full, z.keys, columns, n, transposed(k, keys_row), s.v, values_row, state, values_row, true);
        }
    }
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        unpack(z.keys, columns, s.states + (h - task.first_head) * z.keys * values_row, values_row, A(1),
               out.state + (task.sequence * z.heads + h) * z.keys * z.values + task.first_value, z.values);
}

template <class T>
struct Gradients {
    using A = Acc<T>;
    Heads<T> dout;
    const A* dstate_out;
    Shared<T> dq, dk;
    T* dv;
    A *dlog_decay, *dstate;
};

// Buffers of backward beyond those of forward; states are [V, K] here, keys along their rows.
template <class A>
struct BackwardScratch {
    A *dout, *turned_v, *dscores, *dq, *dk, *dv, *head_dq, *head_dk, *dstates, *dstate, *states;

    BackwardScratch(const Sizes& z, Arena<A>& arena)
        : dout(arena.take(kChunk * padded<A>(z.values))),
          turned_v(arena.take(kChunk * padded<A>(z.values))),
          dscores(arena.take(kChunk * kChunk)),
          dq(arena.take(kChunk * padded<A>(z.keys))),
          dk(arena.take(kChunk * padded<A>(z.keys))),
          dv(arena.take(kChunk * padded<A>(z.values))),
          head_dq(arena.take(kChunk * padded<A>(z.keys))),
          head_dk(arena.take(kChunk * padded<A>(z.keys))),
          dstates(arena.take(z.heads_per_task * padded<A>(z.values) * padded<A>(z.keys))),
          dstate(arena.take(padded<A>(z.values) * padded<A>(z.keys))),
          states(arena.take_unwritten(z.heads_per_task * (z.longest / kChunk + 1) * padded<A>(z.values) * padded<A>(z.keys))) {}
};

// The states at the starts of all chunks of the task's heads.
template <class T>
void recompute_states(const Problem<T>& p, const Task& task, Scratch<Acc<T>>& s, BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& z = p.z;
    const int64_t keys_row = padded<A>(z.keys), values_row = padded<A>(z.values), size = values_row * keys_row;
    const int64_t heads = task.last_head - task.first_head;
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = task.sequence * z.heads + task.first_head + h;
        load_turned(z, p.state + head * z.keys * z.values, b.dstate, b.states + h * size);
    }
    for (int64_t t = 0, c = 0; t + kChunk < task.steps; t += kChunk, ++c) {
        const Row row = task.row.later(t);
        pack(kChunk, z.keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
        for (int64_t h = 0; h < heads; ++h) {
            const A* before = b.states + (c * heads + h) * size;
            A* after = b.states + ((c + 1) * heads + h) * size;
            std::copy_n(before, z.values * keys_row, after);
            pack(kChunk, z.values, p.v.at(row, task.first_head + h), p.v.time, A(1), s.v, values_row);
            if (z.decay != DecayKind::none)
                s.decay.read(kChunk, p.log_decay.at(row, task.first_head + h), p.log_decay.time);
            s.decay.over_turned(z.values, after);
            const A* k = s.decay.to_end(kChunk, s.k, s.decayed_k);
            multiply(Shape::full, z.values, z.keys, kChunk, transposed(s.v, values_row), k, keys_row, after, keys_row,
                     true);
        }
    }
}

// The gradients of one head in one chunk, whose queries, keys and raw scores stand in s.
template <class T>
void backward_head(const Problem<T>& p, const Gradients<T>& g, const Row& row, int64_t h, int64_t n, const Acc<T>* state,
                   Acc<T>* dstate, Scratch<Acc<T>>& s, BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& z = p.z;
    const int64_t keys_row = padded<A>(z.keys), values_row = padded<A>(z.values);
    pack(n, z.values, p.v.at(row, h), p.v.time, A(1), s.v, values_row);
    pack(n, z.values, g.dout.at(row, h), g.dout.time, A(1), b.dout, values_row);
    transpose(n, z.values, s.v, values_row, b.turned_v, kChunk);
    transpose(z.values, z.keys, dstate, keys_row, b.dstate, values_row);
    if (z.decay != DecayKind::none) s.decay.read(n, p.log_decay.at(row, h), p.log_decay.time);
    s.decay.clear_gradient(n);
    s.decay.scores(n, s.q, s.turned, s.raw, s.scores);
    const A* q = s.decay.from_start(n, s.q, s.decayed_q);
    const A* k = s.decay.to_end(n, s.k, s.decayed_k);

    multiply(Shape::upper_left, n, z.values, n, transposed(s.scores, kChunk), b.dout, values_row, b.dv, values_row,
             false);
    multiply(Shape::full, n, z.values, z.keys, as_is(k, keys_row), b.dstate, values_row, b.dv, values_row, true);
    unpack(n, z.values, b.dv, values_row, A(1), g.dv + (row.token * z.heads + h) * z.values, z.heads * z.values);

    multiply(Shape::full, n, z.keys, z.values, as_is(b.dout, values_row), state, keys_row, b.head_dq, keys_row, false);
    multiply(Shape::full, n, z.keys, z.values, as_is(s.v, values_row), dstate, keys_row, b.head_dk, keys_row, false);
    s.decay.from_start_backward(n, b.head_dq);
    s.decay.to_end_backward(n, b.head_dk);
    s.decay.add_from_start(n, s.q, b.head_dq);
    s.decay.add_to_end(n, s.k, b.head_dk);
    multiply(Shape::lower_result, n, n, z.values, as_is(b.dout, values_row), b.turned_v, kChunk, b.dscores, kChunk,
             false);
    s.decay.add_pairs(n, s.scores, b.dscores);
    s.decay.scores_backward(n, s.q, s.k, b.dscores, b.head_dq, b.head_dk);
    if (z.decay != DecayKind::none) {
        const int64_t width = z.decay == DecayKind::per_key ? z.keys : 1;
        s.decay.write_gradient(n, z.values, state, dstate, g.dlog_decay + (row.token * z.heads + h) * width,
                               z.heads * width);
    }
    s.decay.over_turned(z.values, dstate);
    multiply(Shape::full, z.values, z.keys, n, transposed(b.dout, values_row), q, keys_row, dstate, keys_row, true);
}

template <class T>
void backward_task(const Problem<T>& p, const Task& task, const Gradients<T>& g, Scratch<Acc<T>>& s,
                   BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& z = p.z;
    const int64_t keys_row = padded<A>(z.keys), values_row = padded<A>(z.values), size = values_row * keys_row;
    const int64_t heads = task.last_head - task.first_head;
    recompute_states(p, task, s, b);
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = task.sequence * z.heads + task.first_head + h;
        load_turned(z, g.dstate_out + head * z.keys * z.values, b.dstate, b.dstates + h * size);
    }
    for (int64_t c = (task.steps - 1) / kChunk; c >= 0 && task.steps; --c) {
        const int64_t n = std::min(kChunk, task.steps - c * kChunk);
        const Row row = task.row.later(c * kChunk);
        pack(n, z.keys, p.q.at(row, task.group), p.q.time, p.scale, s.q, keys_row);
        pack(n, z.keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
        transpose(n, z.keys, s.k, keys_row, s.turned, kChunk);
        if (z.decay != DecayKind::per_key)
            multiply(Shape::lower_result, n, n, z.keys, as_is(s.q, keys_row), s.turned, kChunk, s.raw, kChunk, false);
        std::fill_n(b.dq, n * keys_row, A(0));
        std::fill_n(b.dk, n * keys_row, A(0));
        for (int64_t h = 0; h < heads; ++h) {
            backward_head(p, g, row, task.first_head + h, n, b.states + (c * heads + h) * size, b.dstates + h * size, s,
                          b);
            for (int64_t x = 0; x < n * keys_row; ++x) b.dq[x] += b.head_dq[x];
            for (int64_t x = 0; x < n * keys_row; ++x) b.dk[x] += b.head_dk[x];
        }
        g.dq.write(z, row, task, n, b.dq, keys_row, p.scale);
        g.dk.write(z, row, task, n, b.dk, keys_row, A(1));
    }
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = task.sequence * z.heads + task.first_head + h;
        transpose(z.values, z.keys, b.dstates + h * size, keys_row, b.dstate, values_row);
        unpack(z.keys, z.values, b.dstate, values_row, A(1), g.dstate + head * z.keys * z.values, z.values);
    }
}

template <class T>
void forward(const Problem<T>& p, const Outputs<T>& out) {
    using A = Acc<T>;
    run_tasks<A>(
        p.z, forward_tasks<A>(p.z, p.num_threads), p.num_threads,
        [&](Arena<A>& arena) { return Scratch<A>(p.z, arena); },
        [&](const Task& task, Scratch<A>& scratch) { forward_task(p, task, out, scratch); });
}

template <class T>
void backward(const Problem<T>& p, Gradients<T> g) {
    using A = Acc<T>;
    using Both = std::pair<Scratch<A>, BackwardScratch<A>>;
    g.dq.allocate(p.z);
    g.dk.allocate(p.z);
    run_tasks<A>(
        p.z, head_tasks(p.z), p.num_threads,
        [&](Arena<A>& arena) {
            Scratch<A> first(p.z, arena);
            return Both(first, BackwardScratch<A>(p.z, arena));
        },
        [&](const Task& task, Both& scratch) { backward_task(p, task, g, scratch.first, scratch.second); });
    g.dq.add_up(p.z, p.num_threads);
    g.dk.add_up(p.z, p.num_threads);
}

template <class T>
Problem<T> problem(const seqarch_heads* q, const seqarch_heads* k, const seqarch_heads* v,
                   const seqarch_heads* log_decay, double scale, const void* state, const Sizes& sizes,
                   int32_t num_threads) {
    using A = Acc<T>;
    return {sizes, Heads<T>(q), Heads<T>(k), Heads<T>(v), Heads<A>(log_decay), static_cast<A>(scale),
            static_cast<const A*>(state), num_threads};
}

}  // namespace

int32_t seqarch_linear_attention_forward(int32_t dtype, const seqarch_heads* q, const seqarch_heads* k,
                                         const seqarch_heads* v, const seqarch_heads* log_decay, int32_t decay_per_key,
                                         double scale, const void* state, void* o, void* state_out,
                                         const int64_t* offsets, int64_t sequences, int64_t length, int64_t groups,
                                         int64_t heads, int64_t keys, int64_t values, int32_t num_threads) {
    if (!valid(offsets, sequences, length, groups, heads, keys, values, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Sizes sizes(offsets, sequences, length, groups, heads, keys, values, log_decay, decay_per_key);
        forward(problem<T>(q, k, v, log_decay, scale, state, sizes, num_threads),
                Outputs<T>{static_cast<T*>(o), static_cast<Acc<T>*>(state_out)});
    });
}

int32_t seqarch_linear_attention_backward(int32_t dtype, const seqarch_heads* q, const seqarch_heads* k,
                                          const seqarch_heads* v, const seqarch_heads* log_decay,
                                          int32_t decay_per_key, double scale, const void* state,
                                          const seqarch_heads* dout, const void* dstate_out, void* dq, void* dk,
                                          void* dv, void* dlog_decay, void* dstate, const int64_t* offsets,
                                          int64_t sequences, int64_t length, int64_t groups, int64_t heads,
                                          int64_t keys, int64_t values, int32_t num_threads) {
    if (!valid(offsets, sequences, length, groups, heads, keys, values, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const Sizes sizes(offsets, sequences, length, groups, heads, keys, values, log_decay, decay_per_key);
        backward(problem<T>(q, k, v, log_decay, scale, state, sizes, num_threads),
                 Gradients<T>{Heads<T>(dout), static_cast<const A*>(dstate_out), Shared<T>(static_cast<T*>(dq)),
                              Shared<T>(static_cast<T*>(dk)), static_cast<T*>(dv), static_cast<A*>(dlog_decay),
                              static_cast<A*>(dstate)});
    });
}
