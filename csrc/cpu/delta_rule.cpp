// The delta rule with any diagonal decay, forward and backward. See seqarch.h for the equation and the arguments.
//
// Within a chunk that starts from the state S, with x' for x decayed from the chunk's start or to its end
// and r = -read,
//
//   X = V + r' S + M U,   U = beta X,   M[i, j] = r_i . erase_j decayed, j < i:   row after row, a triangular system
//   o = q' S + P U,       S' = decayed S + erase'^T U
//
// and, with erase and k apart, W = beta V:   X = r' S + M U + Mk W,   o += Pk W,   S' += k'^T W.
//
// Tasks are cut as in linear_attention.cpp. Backward goes over the sequence twice: forward for the states at the
// chunks' starts and X, back for the gradients. Of U its gradient follows from the transposed system.
#include "recurrence.h"

namespace {

using namespace seqarch;

constexpr int64_t kChunk = 64;

template <class T>
struct Problem {
    using A = Acc<T>;
    Sizes sizes;
    Heads<T> q, k, v;
    Heads<A> beta, log_decay;
    Heads<T> read, erase;  // without data: k
    A scale;
    const A* state;
    int num_threads;

    bool apart() const { return erase.data != nullptr; }
    int64_t keys_row() const { return padded<A>(sizes.keys); }
};

// Buffers of one task: of a chunk, or where said of its heads' states.
template <class A>
struct Scratch {
    A *q, *k, *r, *erase, *transposed_k, *transposed_erase;        // of the group
    A *raw_p, *raw_m, *raw_pk, *raw_mk;                    // q and r with erase and k
    A *v, *w, *beta, *x, *u, *o, *p, *m, *pk, *mk, *decayed;  // of one head
    A* states;
    ChunkDecay<A> decay;

    Scratch(const Sizes& sizes, bool apart, Arena<A>& arena) : decay(sizes.decay, kChunk, sizes.keys, arena) {
        const int64_t keys = kChunk * padded<A>(sizes.keys), values = kChunk * padded<A>(sizes.values);
        for (A** part : {&q, &k, &r, &transposed_k, &decayed}) *part = arena.take(keys);
        for (A** part : {&v, &x, &u, &o}) *part = arena.take(values);
        for (A** part : {&raw_p, &raw_m, &p, &m}) *part = arena.take(kChunk * kChunk);
        for (A** part : {&raw_pk, &raw_mk, &pk, &mk}) *part = arena.take(apart ? kChunk * kChunk : 0);
        beta = arena.take(kChunk);
        w = arena.take(apart ? values : 0);
        erase = apart ? arena.take(keys) : k;
        transposed_erase = apart ? arena.take(keys) : transposed_k;
        states = arena.take(sizes.heads_per_task * sizes.keys * padded<A>(sizes.values));
    }
};

template <class A>
void clear_diagonal(int64_t n, A* x) {
    for (int64_t i = 0; i < n; ++i) x[i * kChunk + i] = 0;
}

// Queries, keys and their products, for all heads of a task. Only what the states need if not `queries`.
template <class T>
void load_group(const Problem<T>& p, const Task& task, const Row& row, int64_t n, bool queries, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const int64_t keys = p.sizes.keys, keys_row = p.keys_row();
    const Heads<T>& read = p.read.data ? p.read : p.k;
    if (queries) pack(n, keys, p.q.at(row, task.group), p.q.time, p.scale, s.q, keys_row);
    pack(n, keys, read.at(row, task.group), read.time, A(-1), s.r, keys_row);
    pack(n, keys, p.k.at(row, task.group), p.k.time, A(1), s.k, keys_row);
    transpose(n, keys, s.k, keys_row, s.transposed_k, kChunk);
    if (p.apart()) {
        pack(n, keys, p.erase.at(row, task.group), p.erase.time, A(1), s.erase, keys_row);
        transpose(n, keys, s.erase, keys_row, s.transposed_erase, kChunk);
    }
    if (p.sizes.decay == DecayKind::per_key) return;
    const auto products = [&](const A* x, const A* columns, A* to) {
        multiply(Shape::lower_result, n, n, keys, as_is(x, keys_row), columns, kChunk, to, kChunk, false);
    };
    products(s.r, s.transposed_erase, s.raw_m);
    if (queries) products(s.q, s.transposed_erase, s.raw_p);
    if (!p.apart()) return;
    products(s.r, s.transposed_k, s.raw_mk);
    if (queries) products(s.q, s.transposed_k, s.raw_pk);
}

// One head's values, decays and decayed scores.
template <class T>
void load_head(const Problem<T>& p, const Task& task, const Row& row, int64_t h, int64_t n, bool queries,
               Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const int64_t columns = task.last_value - task.first_value, values_row = padded<A>(columns);
    pack(n, columns, p.v.at(row, h) + task.first_value, p.v.time, A(1), s.v, values_row);
    for (int64_t i = 0; i < n; ++i) s.beta[i] = p.beta.at(row, h)[i * p.beta.time];
    if (p.sizes.decay != DecayKind::none) s.decay.read(n, p.log_decay.at(row, h), p.log_decay.time);
    s.decay.scores(n, s.r, s.transposed_erase, s.raw_m, s.m);
    clear_diagonal(n, s.m);
    if (queries) s.decay.scores(n, s.q, s.transposed_erase, s.raw_p, s.p);
    if (!p.apart()) return;
    s.decay.scores(n, s.r, s.transposed_k, s.raw_mk, s.mk);
    clear_diagonal(n, s.mk);
    if (queries) s.decay.scores(n, s.q, s.transposed_k, s.raw_pk, s.pk);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < values_row; ++v) s.w[i * values_row + v] = s.beta[i] * s.v[i * values_row + v];
}

// X = V + r' S + M U and U = beta X, row after row.
template <class T>
void correct(const Problem<T>& p, int64_t n, int64_t columns, const Acc<T>* state, Scratch<Acc<T>>& s, Acc<T>* x) {
    using A = Acc<T>;
    const int64_t keys_row = p.keys_row(), row = padded<A>(columns);
    if (!p.apart()) std::copy_n(s.v, n * row, x);
    const A* r = s.decay.from_start(n, s.r, s.decayed);
    multiply(Shape::full, n, columns, p.sizes.keys, as_is(r, keys_row), state, row, x, row, !p.apart());
    if (p.apart()) multiply(Shape::lower_left, n, columns, n, as_is(s.mk, kChunk), s.w, row, x, row, true);
    for (int64_t i = 0; i < n; i += kTileRows) {
        const int64_t end = std::min<int64_t>(n, i + kTileRows);
        multiply(Shape::full, end - i, columns, i, as_is(s.m + i * kChunk, kChunk), s.u, row, x + i * row, row, true);
        for (int64_t own = i; own < end; ++own) {
            A* line = x + own * row;
            for (int64_t j = i; j < own; ++j) {
                const A weight = s.m[own * kChunk + j];
                for (int64_t v = 0; v < row; ++v) line[v] += weight * s.u[j * row + v];
            }
            for (int64_t v = 0; v < row; ++v) s.u[own * row + v] = s.beta[own] * line[v];
        }
    }
}

// A state [K, V] over a chunk.
template <class T>
void advance(const Problem<T>& p, int64_t n, int64_t columns, Scratch<Acc<T>>& s, Acc<T>* state) {
    const int64_t keys = p.sizes.keys, keys_row = p.keys_row(), row = padded<Acc<T>>(columns);
    s.decay.over(row, state);
    const auto write = [&](const Acc<T>* x, const Acc<T>* values) {
        const Acc<T>* decayed = s.decay.to_end(n, x, s.decayed);
        multiply(Shape::full, keys, columns, n, transposed(decayed, keys_row), values, row, state, row, true);
    };
    write(s.erase, s.u);
    if (p.apart()) write(s.k, s.w);
}

template <class T>
struct Outputs {
    T* o;
    Acc<T>* state;
};

// One token: what is read off the decayed state in one pass, what is written in a second.
template <class T>
void step(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t columns = task.last_value - task.first_value, keys_row = p.keys_row();
    load_group(p, task, task.row, 1, true, s);
    const A on_erase = dot(keys_row, s.q, s.erase), on_key = dot(keys_row, s.q, s.k);
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
        pack(1, columns, p.v.at(task.row, h) + task.first_value, 0, A(1), s.v, padded<A>(columns));
        if (sizes.decay != DecayKind::none) s.decay.read(1, p.log_decay.at(task.row, h), 0);
        const auto decay = [&](int64_t d) {
            return sizes.decay == DecayKind::none ? A(1) : s.decay.whole[sizes.decay == DecayKind::per_key ? d : 0];
        };
        const A beta = *p.beta.at(task.row, h);
        const int64_t offset = sizes.state(task.sequence, h) + task.first_value;
        A *__restrict recalled = s.x, *__restrict o = s.o, *__restrict u = s.u;
        std::fill_n(recalled, columns, A(0));
        std::fill_n(o, columns, A(0));
        for (int64_t d = 0; d < sizes.keys; ++d) {
            const A r = decay(d) * s.r[d], q = decay(d) * s.q[d];
            const A* __restrict before = p.state + offset + d * sizes.values;
#pragma omp simd
            for (int64_t v = 0; v < columns; ++v) {
                recalled[v] += r * before[v];
                o[v] += q * before[v];
            }
        }
        for (int64_t v = 0; v < columns; ++v) {
            u[v] = beta * (p.apart() ? recalled[v] : s.v[v] + recalled[v]);
            o[v] += on_erase * u[v];
            if (p.apart()) o[v] += on_key * (beta * s.v[v]);
        }
        for (int64_t d = 0; d < sizes.keys; ++d) {
            const A kept = decay(d), erase = s.erase[d], key = p.apart() ? beta * s.k[d] : A(0);
            const A *__restrict before = p.state + offset + d * sizes.values, *__restrict value = s.v;
            A* __restrict after = out.state + offset + d * sizes.values;
#pragma omp simd
            for (int64_t v = 0; v < columns; ++v) after[v] = kept * before[v] + erase * u[v] + key * value[v];
        }
        unpack(1, columns, s.o, 0, A(1), out.o + sizes.place(task.row, h) + task.first_value, 0);
    }
}

template <class T>
void forward_task(const Problem<T>& p, const Task& task, const Outputs<T>& out, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t columns = task.last_value - task.first_value, keys_row = p.keys_row(), row = padded<A>(columns);
    if (task.steps == 1) return step(p, task, out, s);
    const auto state_of = [&](int64_t h) { return s.states + (h - task.first_head) * sizes.keys * row; };
    const auto offset_of = [&](int64_t h) {
        return sizes.state(task.sequence, h) + task.first_value;
    };
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        pack(sizes.keys, columns, p.state + offset_of(h), sizes.values, A(1), state_of(h), row);

    for (int64_t t = 0; t < task.steps; t += kChunk) {
        const int64_t n = std::min(kChunk, task.steps - t);
        const Row at = task.row.later(t);
        load_group(p, task, at, n, true, s);
        for (int64_t h = task.first_head; h < task.last_head; ++h) {
            load_head(p, task, at, h, n, true, s);
            correct(p, n, columns, state_of(h), s, s.x);
            multiply(Shape::lower_left, n, columns, n, as_is(s.p, kChunk), s.u, row, s.o, row, false);
            if (p.apart()) multiply(Shape::lower_left, n, columns, n, as_is(s.pk, kChunk), s.w, row, s.o, row, true);
            const A* q = s.decay.from_start(n, s.q, s.decayed);
            multiply(Shape::full, n, columns, sizes.keys, as_is(q, keys_row), state_of(h), row, s.o, row, true);
            unpack(n, columns, s.o, row, A(1), out.o + sizes.place(at, h) + task.first_value,
                   sizes.heads * sizes.values);
            advance(p, n, columns, s, state_of(h));
        }
    }
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        unpack(sizes.keys, columns, state_of(h), row, A(1), out.state + offset_of(h), sizes.values);
}

template <class T>
struct Gradients {
    using A = Acc<T>;
    Heads<T> dout;
    const A* dstate_out;
    Shared<T> dq, dk, dread, derase;
    T* dv;
    A *dbeta, *dlog_decay, *dstate;
};

// Buffers of backward beyond those of forward.
template <class A>
struct BackwardScratch {
    // transposed_state is [V, K], dstate [K, V]; the states and their gradients over all chunks are [K, V] and [V, K].
    A *dout, *du, *dx, *dw, *dv, *transposed_values, *dscores, *transposed_state, *dstate;
    A *dq, *dk, *dr, *derase;                                // of one head
    A *group_dq, *group_dk, *group_dr, *group_derase;        // summed over the task's heads
    A *dstates, *states, *corrections;                       // of all heads; of all heads and chunks: states and X

    BackwardScratch(const Sizes& sizes, bool apart, Arena<A>& arena) {
        const int64_t keys = kChunk * padded<A>(sizes.keys), values = kChunk * padded<A>(sizes.values);
        const int64_t state = padded<A>(sizes.values) * padded<A>(sizes.keys);
        const int64_t chunks = sizes.heads_per_task * (sizes.longest / kChunk + 1);
        for (A** part : {&dout, &du, &dx, &transposed_values, &dv}) *part = arena.take(values);
        for (A** part : {&dq, &dk, &dr, &group_dq, &group_dk, &group_dr}) *part = arena.take(keys);
        for (A** part : {&transposed_state, &dstate}) *part = arena.take(state);
        dw = arena.take(apart ? values : 0);
        dscores = arena.take(kChunk * kChunk);
        derase = apart ? arena.take(keys) : dk;
        group_derase = apart ? arena.take(keys) : group_dk;
        dstates = arena.take(sizes.heads_per_task * state);
        states = arena.take_unwritten(chunks * state);
        corrections = arena.take_unwritten(chunks * values);
    }
};

// The states at the starts of all chunks of the task's heads, and X.
template <class T>
void recompute(const Problem<T>& p, const Task& task, Scratch<Acc<T>>& s, BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t row = padded<A>(sizes.values), size = row * p.keys_row(), heads = task.last_head - task.first_head;
    for (int64_t h = 0; h < heads; ++h) {
        A* state = b.states + h * size;
        pack(sizes.keys, sizes.values, p.state + sizes.state(task.sequence, task.first_head + h), sizes.values,
             A(1), state, row);
        std::fill(state + sizes.keys * row, state + size, A(0));
    }
    for (int64_t t = 0, c = 0; t < task.steps; t += kChunk, ++c) {
        const int64_t n = std::min(kChunk, task.steps - t);
        const Row at = task.row.later(t);
        load_group(p, task, at, n, false, s);
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t place = c * heads + h;
            load_head(p, task, at, task.first_head + h, n, false, s);
            correct(p, n, sizes.values, b.states + place * size, s, b.corrections + place * kChunk * row);
            if (t + n == task.steps) continue;
            A* next = b.states + (place + heads) * size;
            std::copy_n(b.states + place * size, size, next);
            advance(p, n, sizes.values, s, next);
        }
    }
}

// From dU without what it owes to later rows: dU in full and dX = beta dU, from the last row to the first.
template <class A>
void correct_backward(int64_t n, int64_t columns, const Scratch<A>& s, BackwardScratch<A>& b) {
    const int64_t row = padded<A>(columns);
    for (int64_t end = n; end > 0;) {
        const int64_t i = (end - 1) / kTileRows * kTileRows;
        multiply(Shape::full, end - i, columns, n - end, transposed(s.m + end * kChunk + i, kChunk), b.dx + end * row,
                 row, b.du + i * row, row, true);
        for (int64_t own = end - 1; own >= i; --own) {
            A* line = b.du + own * row;
            for (int64_t j = own + 1; j < end; ++j) {
                const A weight = s.m[j * kChunk + own];
                for (int64_t v = 0; v < row; ++v) line[v] += weight * b.dx[j * row + v];
            }
            for (int64_t v = 0; v < row; ++v) b.dx[own * row + v] = s.beta[own] * line[v];
        }
        end = i;
    }
}

// What `keys`, which wrote `values`, and the queries q and r that were scored against them receive.
template <class T>
void scores_backward(const Problem<T>& p, int64_t n, const Acc<T>* keys, const Acc<T>* values, const Acc<T>* scores_q,
                    const Acc<T>* scores_r, const Acc<T>* dstate, Scratch<Acc<T>>& s, BackwardScratch<Acc<T>>& b,
                    Acc<T>* dkeys) {
    using A = Acc<T>;
    const int64_t keys_row = p.keys_row(), row = padded<A>(p.sizes.values);
    multiply(Shape::full, n, p.sizes.keys, p.sizes.values, as_is(values, row), dstate, keys_row, dkeys, keys_row,
             false);
    s.decay.to_end_backward(n, dkeys);
    s.decay.add_to_end(n, keys, dkeys);
    transpose(n, p.sizes.values, values, row, b.transposed_values, kChunk);
    const auto scores = [&](const A* upstream, const A* queries, const A* found, bool diagonal, A* dqueries) {
        multiply(Shape::lower_result, n, n, p.sizes.values, as_is(upstream, row), b.transposed_values, kChunk,
                 b.dscores, kChunk, false);
        if (!diagonal) clear_diagonal(n, b.dscores);
        s.decay.add_score_terms(n, found, b.dscores);
        s.decay.scores_backward(n, queries, keys, b.dscores, dqueries, dkeys);
    };
    scores(b.dout, s.q, scores_q, true, b.dq);
    scores(b.dx, s.r, scores_r, false, b.dr);
}

// The gradients of one head in one chunk, whose group stands in s; `dstate` is [V, K].
template <class T>
void backward_head(const Problem<T>& p, const Gradients<T>& g, const Task& task, const Row& at, int64_t h, int64_t n,
                   const Acc<T>* state, const Acc<T>* x, Acc<T>* dstate, Scratch<Acc<T>>& s,
                   BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys_row = p.keys_row(), row = padded<A>(sizes.values);
    load_head(p, task, at, h, n, true, s);
    pack(n, sizes.values, g.dout.at(at, h), g.dout.time, A(1), b.dout, row);
    transpose(sizes.keys, sizes.values, state, row, b.transposed_state, keys_row);
    transpose(sizes.values, sizes.keys, dstate, keys_row, b.dstate, row);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t v = 0; v < row; ++v) s.u[i * row + v] = s.beta[i] * x[i * row + v];

    const auto written = [&](const A* keys, const A* scores, A* dvalues) {
        multiply(Shape::upper_left, n, sizes.values, n, transposed(scores, kChunk), b.dout, row, dvalues, row, false);
        const A* decayed = s.decay.to_end(n, keys, s.decayed);
        multiply(Shape::full, n, sizes.values, sizes.keys, as_is(decayed, keys_row), b.dstate, row, dvalues, row, true);
    };
    written(s.erase, s.p, b.du);
    correct_backward(n, sizes.values, s, b);
    A* dbeta = g.dbeta + at.token * sizes.heads + h;
    for (int64_t i = 0; i < n; ++i) dbeta[i * sizes.heads] = dot(row, b.du + i * row, x + i * row);
    const A* dv = b.dx;
    if (p.apart()) {
        written(s.k, s.pk, b.dw);
        multiply(Shape::upper_left, n, sizes.values, n, transposed(s.mk, kChunk), b.dx, row, b.dw, row, true);
        for (int64_t i = 0; i < n; ++i) {
            dbeta[i * sizes.heads] += dot(row, b.dw + i * row, s.v + i * row);
            for (int64_t v = 0; v < row; ++v) b.dv[i * row + v] = s.beta[i] * b.dw[i * row + v];
        }
        dv = b.dv;
    }
    unpack(n, sizes.values, dv, row, A(1), g.dv + sizes.place(at, h), sizes.heads * sizes.values);

    s.decay.clear_gradient(n);
    const auto from_state = [&](const A* upstream, const A* queries, A* dqueries) {
        multiply(Shape::full, n, sizes.keys, sizes.values, as_is(upstream, row), b.transposed_state, keys_row, dqueries,
                 keys_row, false);
        s.decay.from_start_backward(n, dqueries);
        s.decay.add_from_start(n, queries, dqueries);
    };
    from_state(b.dout, s.q, b.dq);
    from_state(b.dx, s.r, b.dr);
    scores_backward(p, n, s.erase, s.u, s.p, s.m, dstate, s, b, b.derase);
    if (p.apart()) scores_backward(p, n, s.k, s.w, s.pk, s.mk, dstate, s, b, b.dk);
    if (sizes.decay != DecayKind::none) {
        const int64_t width = sizes.decay == DecayKind::per_key ? sizes.keys : 1;
        s.decay.write_gradient(n, sizes.values, b.transposed_state, dstate,
                               g.dlog_decay + (at.token * sizes.heads + h) * width, sizes.heads * width);
    }
    s.decay.over_transposed(sizes.values, dstate);
    const auto receive = [&](const A* upstream, const A* queries) {
        const A* decayed = s.decay.from_start(n, queries, s.decayed);
        multiply(Shape::full, sizes.values, sizes.keys, n, transposed(upstream, row), decayed, keys_row, dstate,
                 keys_row, true);
    };
    receive(b.dout, s.q);
    receive(b.dx, s.r);
}

template <class T>
void backward_task(const Problem<T>& p, const Task& task, const Gradients<T>& g, Scratch<Acc<T>>& s,
                   BackwardScratch<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t keys_row = p.keys_row(), row = padded<A>(sizes.values), size = row * keys_row;
    const int64_t heads = task.last_head - task.first_head;
    recompute(p, task, s, b);
    for (int64_t h = 0; h < heads; ++h)
        load_transposed(sizes, g.dstate_out + sizes.state(task.sequence, task.first_head + h), b.dstate,
                        b.dstates + h * size);
    for (int64_t c = (task.steps - 1) / kChunk; c >= 0 && task.steps; --c) {
        const int64_t n = std::min(kChunk, task.steps - c * kChunk), numbers = n * keys_row;
        const Row at = task.row.later(c * kChunk);
        load_group(p, task, at, n, true, s);
        for (A* sum : {b.group_dq, b.group_dk, b.group_dr, b.group_derase}) std::fill_n(sum, numbers, A(0));
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t place = c * heads + h;
            backward_head(p, g, task, at, task.first_head + h, n, b.states + place * size,
                          b.corrections + place * kChunk * row, b.dstates + h * size, s, b);
            const auto add = [&](const A* from, A* to) {
                for (int64_t i = 0; i < numbers; ++i) to[i] += from[i];
            };
            add(b.dq, b.group_dq);
            add(b.dk, b.group_dk);
            add(b.dr, b.group_dr);
            if (p.apart()) add(b.derase, b.group_derase);
        }
        if (!p.read.data)
            for (int64_t i = 0; i < numbers; ++i) b.group_dk[i] -= b.group_dr[i];
        g.dq.write(sizes, at, task, n, b.group_dq, keys_row, p.scale);
        g.dk.write(sizes, at, task, n, b.group_dk, keys_row, A(1));
        if (p.read.data) g.dread.write(sizes, at, task, n, b.group_dr, keys_row, A(-1));
        if (p.apart()) g.derase.write(sizes, at, task, n, b.group_derase, keys_row, A(1));
    }
    for (int64_t h = 0; h < heads; ++h) {
        transpose(sizes.values, sizes.keys, b.dstates + h * size, keys_row, b.dstate, row);
        unpack(sizes.keys, sizes.values, b.dstate, row, A(1),
               g.dstate + sizes.state(task.sequence, task.first_head + h), sizes.values);
    }
}

template <class T>
void forward(const Problem<T>& p, const Outputs<T>& out) {
    using A = Acc<T>;
    run_tasks<A>(
        p.sizes, forward_tasks<A>(p.sizes, p.num_threads), p.num_threads,
        [&](Arena<A>& arena) { return Scratch<A>(p.sizes, p.apart(), arena); },
        [&](const Task& task, Scratch<A>& scratch) { forward_task(p, task, out, scratch); });
}

template <class T>
void backward(const Problem<T>& p, Gradients<T> g) {
    using A = Acc<T>;
    using Both = std::pair<Scratch<A>, BackwardScratch<A>>;
    for (Shared<T>* shared : {&g.dq, &g.dk, &g.dread, &g.derase}) shared->allocate(p.sizes);
    run_tasks<A>(
        p.sizes, head_tasks(p.sizes), p.num_threads,
        [&](Arena<A>& arena) {
            Scratch<A> first(p.sizes, p.apart(), arena);
            return Both(first, BackwardScratch<A>(p.sizes, p.apart(), arena));
        },
        [&](const Task& task, Both& scratch) { backward_task(p, task, g, scratch.first, scratch.second); });
    for (Shared<T>* shared : {&g.dq, &g.dk, &g.dread, &g.derase}) shared->add_up(p.sizes, p.num_threads);
}

template <class T>
Problem<T> problem(const seqarch_delta_rule_inputs& in, int num_threads) {
    using A = Acc<T>;
    return {Sizes(in), Heads<T>(in.q), Heads<T>(in.k), Heads<T>(in.v), Heads<A>(in.beta), Heads<A>(in.log_decay),
            Heads<T>(in.read), Heads<T>(in.erase), static_cast<A>(in.scale), static_cast<const A*>(in.state),
            num_threads};
}

}  // namespace

int32_t seqarch_delta_rule_forward(const seqarch_delta_rule_inputs* inputs, const seqarch_delta_rule_outputs* outputs,
                                   int32_t num_threads) {
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(problem<T>(*inputs, num_threads),
                Outputs<T>{static_cast<T*>(outputs->o), static_cast<Acc<T>*>(outputs->state_out)});
    });
}

int32_t seqarch_delta_rule_backward(const seqarch_delta_rule_inputs* inputs,
                                    const seqarch_delta_rule_gradients* gradients, int32_t num_threads) {
    if (!valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const auto& g = *gradients;
        const auto shared = [](void* to, bool wanted = true) {
            return Shared<T>(wanted ? static_cast<T*>(to) : nullptr);
        };
        backward(problem<T>(*inputs, num_threads),
                 Gradients<T>{Heads<T>(g.dout), static_cast<const A*>(g.dstate_out), shared(g.dq), shared(g.dk),
                              shared(g.dread, inputs->read.data), shared(g.derase, inputs->erase.data),
                              static_cast<T*>(g.dv), static_cast<A*>(g.dbeta), static_cast<A*>(g.dlog_decay),
                              static_cast<A*>(g.dstate)});
    });
}
