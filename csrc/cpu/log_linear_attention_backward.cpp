// Log-linear attention, backward. See seqarch.h for the arguments, log_linear.h for the chunks and their equations.
//
// A task goes over its sequence twice: forward for the states that are read, back for the gradients, which a counter of
// its own holds. A state that only decays is kept once, where it is made, with its decay since then; with beta it is
// kept before every chunk that reads it. States are [V, K] here, keys along their rows.
#include "log_linear.h"

namespace {

using namespace seqarch;
using namespace seqarch::log_linear;

template <class T>
struct Gradients {
    using A = Acc<T>;
    Heads<T> dout;
    const A* dstate_out;
    Shared<T> dq, dk;
    T* dv;
    A *dlevel_weight, *dbeta, *dlog_decay, *dstate;
};

template <class A>
struct State {
    const A* numbers;
    A factor;  // by which they have decayed since
};

// Buffers of one task.
template <class A>
struct Backward : Scratch<A> {
    A *dout, *transposed_v, *dm, *dv, *dr_states, *dw, *met, *written, *transposed_state, *passed;
    A *dr_start, *dk_end, *dx, *dmr, *transposed_x, *transposed_t, *transposed_keys, *transposed_dw;
    A *dpassing, *transposed_dpassing, *transposed_passing, *dbeta;
    A *head_dq, *head_dk, *head_dr, *group_dq, *group_dk, *dlevels;
    A *begun, *first, *made, *decays, *dbegun, *dheld;
    int64_t values, values_row, size, places, levels, made_per_head, chunks;

    template <class T>
    Backward(const Problem<T>& problem, Arena<A>& arena)
        : Scratch<A>(problem, arena),
          values(problem.sizes.values),
          values_row(padded<A>(values)),
          size(values_row * this->keys_row),
          places(problem.places),
          levels(problem.levels),
          made_per_head(0),
          chunks(0) {
        for (int64_t s = 0; s < problem.sizes.sequences; ++s) {
            const Counter counter = problem.counter(s);
            int64_t read = 0;
            for (int64_t c = 0; c < counter.chunks(); ++c) read += ones_of(counter.chunk(c).number);
            made_per_head = std::max(made_per_head, this->delta ? read : counter.chunks() - 1);
            chunks = std::max(chunks, counter.chunks());
        }
        const int64_t heads = problem.sizes.heads_per_task, wide = kChunk * this->keys_row, square = kChunk * kChunk;
        const int64_t own = this->keys_row * this->keys_row, more = this->delta;
        for (A** part : {&dout, &transposed_v, &dv}) *part = arena.take(kChunk * values_row);
        for (A** part : {&dr_states, &dw, &met, &head_dq, &head_dk, &group_dq, &group_dk}) *part = arena.take(wide);
        for (A** part : {&head_dr, &dr_start, &dk_end, &transposed_keys,
             &transposed_dw}) *part = arena.take(more * wide);
        for (A** part : {&dx, &dmr, &transposed_x, &transposed_t}) *part = arena.take(more * square);
        for (A** part : {&dpassing, &transposed_dpassing, &transposed_passing}) *part = arena.take(more * own);
        for (A** part : {&written, &transposed_state, &passed}) *part = arena.take(size);
        dm = arena.take(square);
        dbeta = arena.take(kChunk);
        dlevels = arena.take(kChunk * levels);
        begun = arena.take(heads * kWithin * size);
        dbegun = arena.take(heads * kWithin * size);
        first = arena.take((1 - more) * heads * places * size);
        dheld = arena.take(heads * places * size);
        decays = arena.take(heads * chunks * places);
        made = arena.take_unwritten(heads * made_per_head * size);
    }
    // The state at a place of the counter before a chunk; `read_before`: states that are read by chunks before it.
    State<A> state(int64_t head, const Chunk& chunk, int64_t read_before, int64_t place) const {
        const int64_t bit = place - kWithin;
        if (this->delta) {
            const int64_t rank = ones_of(chunk.number & ((int64_t{1} << bit) - 1));
            return {made + (head * made_per_head + read_before + rank) * size, A(1)};
        }
        const int64_t since = (chunk.number >> bit << bit) - (chunk.number - chunk.index);  // chunks before it was made
        const A factor = decays[(head * chunks + chunk.index) * places + place];
        if (since <= 0) return {first + (head * places + place) * size, factor};
        return {made + (head * made_per_head + since - 1) * size, factor};
    }
    const A* start(int64_t head, int64_t place) const { return begun + (head * kWithin + place) * size; }
    A* dstate(int64_t head, int64_t place, bool of_begun) const {
        return of_begun ? dbegun + (head * kWithin + place) * size : dheld + (head * places + place) * size;
    }
};

template <class A>
void add_scaled(int64_t n, const A* x, A factor, A* y) {
    for (int64_t i = 0; i < n; i += kLanes<A>) store_vector(y + i,
                                                            load_vector(y + i) + load_vector(x + i) * splat(factor));
}

// A state [K, V] of a tensor as a buffer [V, K], and the way back.
template <class T>
void load_state(const Problem<T>& p, const Acc<T>* from, Backward<Acc<T>>& b, Acc<T>* to) {
    load_transposed(p.sizes, from, b.transposed_state, to);
}
template <class T>
void store_state(const Acc<T>* from, Backward<Acc<T>>& b, Acc<T>* to) {
    transpose(b.values, b.keys, from, b.keys_row, b.transposed_state, b.values_row);
    unpack(b.keys, b.values, b.transposed_state, b.values_row, Acc<T>(1), to, b.values);
}

// The states that are read by the chunk after this one.
template <class T>
void make_states(const Problem<T>& p, const Task& task, const Counter& counter, int64_t c, int64_t read_before,
                 int64_t h, Backward<Acc<T>>& b) {
    using A = Acc<T>;
    const Chunk chunk = counter.chunk(c), next = counter.chunk(c + 1);
    const Row row = task.row.later(chunk.begin);
    const int64_t own = h - task.first_head, numbers = b.values * b.keys_row, place = chunk.place();
    const int64_t read = read_before + ones_of(chunk.number);
    b.load_head(p, task, row, h, chunk.n, false);
    if (b.delta && (chunk.number || chunk.shift)) b.load_passing(chunk.n);
    A* to = b.delta ? const_cast<A*>(b.state(own, next, read,
                                             place).numbers) : b.made + (own * b.made_per_head + c) * b.size;
    multiply(Shape::full, b.values, b.keys, chunk.n, transposed(b.v, b.values_row), b.write, b.keys_row, to, b.keys_row,
             false);
    // what passed the chunk, added to `sum` or in place of it
    const auto over = [&](const State<A>& state, A* sum, bool add) {
        if (b.delta)
            multiply(Shape::full, b.values, b.keys, b.keys, as_is(state.numbers, b.keys_row), b.passing, b.keys_row,
                     sum, b.keys_row, add);
        else
            add_scaled(numbers, state.numbers, state.factor * b.kept(), sum);
    };
    if (c == 0) each_bit(chunk.shift, [&](int64_t bit) { over({b.start(own, bit), A(1)}, to, true); });
    A* decays = b.decays + (own * b.chunks + c + 1) * b.places;
    chunk.each_state([&](int64_t bit) {
        const State<A> state = b.state(own, chunk, read_before, bit);
        if (bit < place) return over(state, to, true);
        decays[bit] = state.factor * b.kept();
        if (b.delta) over(state, const_cast<A*>(b.state(own, next, read, bit).numbers), false);
    });
    decays[place] = 1;
}

// Before the first chunk.
template <class T>
void load_states(const Problem<T>& p, const Task& task, const Counter& counter, Backward<Acc<T>>& b) {
    for (int64_t h = task.first_head; h < task.last_head; ++h) {
        const int64_t own = h - task.first_head;
        const auto load = [&](int64_t place, Acc<T>* to) {
            load_state(p, p.state + p.state_at(task.sequence, h, place), b, to);
        };
        each_bit(counter.lead(), [&](int64_t place) { load(place, const_cast<Acc<T>*>(b.start(own, place))); });
        if (!counter.steps) continue;
        const Chunk chunk = counter.chunk(0);
        chunk.each_state([&](int64_t place) {
            b.decays[own * b.chunks * b.places + place] = 1;
            load(place, const_cast<Acc<T>*>(b.state(own, chunk, 0, place).numbers));
        });
    }
}

// What a state, the gradient of what it became and that of itself have to do with the chunk in hand: it passes the
// chunk, and is read with the weights of `place`. `dstate` is first the one gradient and then the other.
template <class T>
void state_backward(const Problem<T>& p, const Chunk& chunk, const Row& row, int64_t h, int64_t place,
                    const State<Acc<T>>& state, Acc<T>* dstate, Acc<T>& through, Backward<Acc<T>>& b) {
    const int64_t n = chunk.n, keys = b.keys, keys_row = b.keys_row;
    if (b.delta) {
        multiply(Shape::full, keys, keys, b.values, transposed(state.numbers, keys_row), dstate, keys_row, b.dpassing,
                 keys_row, true);
        std::copy_n(dstate, b.values * keys_row, b.passed);
        multiply(Shape::full, b.values, keys, keys, as_is(b.passed, keys_row), b.transposed_passing, keys_row, dstate,
                 keys_row, false);
    } else if (b.has_decay) {
        through += b.kept() * state.factor * dot(b.values * keys_row, state.numbers, dstate);
        b.decay.over_transposed(b.values, dstate);
    }
    multiply(Shape::full, n, keys, b.values, as_is(b.dout, b.values_row), state.numbers, keys_row, b.met, keys_row,
             false);
    b.load_factors(p, chunk, row, h, place);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t level = place < kWithin ? begun_level(chunk, i, place) : place + 1;
        b.dlevels[i * b.levels + level] +=
            state.factor * dot(keys_row, b.queries + i * keys_row, b.met + i * keys_row);
        add_scaled(keys_row, b.met + i * keys_row, state.factor * b.factors[i], b.dr_states + i * keys_row);
    }
    scale_rows(n, keys_row, b.factors, b.queries, b.scaled);
    multiply(Shape::full, b.values, keys, n, transposed(b.dout, b.values_row), b.scaled, keys_row, dstate, keys_row,
             true);
}

// What the rows [from, to) of a chunk receive from the gradient of the state that they wrote.
template <class A>
void write_backward(int64_t from, int64_t to, const A* dstate, Backward<A>& b) {
    if (from == to) return;
    const int64_t keys_row = b.keys_row, row = b.values_row;
    transpose(b.values, b.keys, dstate, keys_row, b.written, row);
    multiply(Shape::full, to - from, b.values, b.keys, as_is(b.write + from * keys_row, keys_row), b.written, row,
             b.dv + from * row, row, true);
    multiply(Shape::full, to - from, b.keys, b.values, as_is(b.v + from * row, row), dstate, keys_row,
             b.dw + from * keys_row, keys_row, false);
}

// From the gradients of M, R, W and A those of the decayed queries and keys, of the scores and of beta.
template <class A>
void delta_backward(int64_t n, A& through, Backward<A>& b) {
    const int64_t keys = b.keys, keys_row = b.keys_row;
    // R = q + M r, A = decay + W^T r
    transpose(n, keys, b.starts(), keys_row, b.transposed_keys, kChunk);
    multiply(Shape::lower_result, n, n, keys, as_is(b.dr_states, keys_row), b.transposed_keys, kChunk, b.dm, kChunk,
             true);
    clear_above(n, false, b.dm);
    transpose(keys, keys, b.dpassing, keys_row, b.transposed_dpassing, keys_row);
    multiply(Shape::upper_left, n, keys, n, transposed(b.m, kChunk), b.dr_states, keys_row, b.dr_start, keys_row,
             false);
    multiply(Shape::full, n, keys, keys, as_is(b.w, keys_row), b.transposed_dpassing, keys_row, b.dr_start, keys_row,
             true);
    multiply(Shape::full, n, keys, keys, as_is(b.starts(), keys_row), b.dpassing, keys_row, b.dw, keys_row, true);
    for (int64_t d = 0; d < keys; ++d) through += b.kept() * b.dpassing[d * keys_row + d];
    // W = T^T k, M = P T: the gradient of T in dx
    transpose(n, keys, b.dw, keys_row, b.transposed_dw, kChunk);
    multiply(Shape::lower_result, n, n, keys, as_is(b.ends(), keys_row), b.transposed_dw, kChunk, b.dx, kChunk, false);
    multiply(Shape::lower_left, n, keys, n, as_is(b.t, kChunk), b.dw, keys_row, b.dk_end, keys_row, false);
    upper_product(n, transposed(b.p, kChunk), b.dm, b.dx, true);
    clear_above(n, false, b.dx);
    transpose(n, n, b.t, kChunk, b.transposed_t, kChunk);
    std::copy_n(b.dm, n * kChunk, b.dmr);
    lower_product(n, as_is(b.dmr, kChunk), b.transposed_t, b.dm, false);
    // T = X beta, X = (1 - beta Mr)^-1
    std::fill_n(b.dbeta, kChunk, A(0));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < kChunk; j += kLanes<A>) {
            A* at = b.dx + i * kChunk + j;
            const Vector<A> dt = load_vector(at);
            store_vector(b.dbeta + j, load_vector(b.dbeta + j) + dt * load_vector(b.x + i * kChunk + j));
            store_vector(at, dt * load_vector(b.beta + j));
        }
    transpose(n, n, b.x, kChunk, b.transposed_x, kChunk);
    lower_product(n, as_is(b.dx, kChunk), b.transposed_x, b.t, false);
    upper_product(n, transposed(b.x, kChunk), b.t, b.dmr, false);
    clear_above(n, true, b.dmr);
    for (int64_t i = 0; i < n; ++i) {
        b.dbeta[i] += dot(kChunk, b.dmr + i * kChunk, b.mr + i * kChunk);
        for (int64_t j = 0; j < i; ++j) b.dmr[i * kChunk + j] *= b.beta[i];
    }
}

// The gradients of one head in one chunk, whose group stands in b.
template <class T>
void backward_head(const Problem<T>& p, const Gradients<T>& g, const Task& task, const Counter& counter,
                   const Chunk& chunk, int64_t read_before, int64_t h, Backward<Acc<T>>& b) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const Row row = task.row.later(chunk.begin);
    const int64_t n = chunk.n, keys_row = b.keys_row, own = h - task.first_head, begun = chunk.index ? 0 : chunk.shift;
    b.load_head(p, task, row, h, n, true);
    b.load_levels(p, chunk, row, h);
    pack(n, b.values, g.dout.at(row, h), g.dout.time, A(1), b.dout, b.values_row);
    transpose(n, b.values, b.v, b.values_row, b.transposed_v, kChunk);
    std::fill_n(b.dlevels, n * b.levels, A(0));
    std::fill_n(b.dr_states, n * keys_row, A(0));
    std::fill_n(b.dw, n * keys_row, A(0));
    b.decay.clear_gradient(n);

    // (M o Lambda) V; afterwards level_weights holds M o Lambda, and dm what M receives
    multiply(Shape::lower_result, n, n, b.values, as_is(b.dout, b.values_row), b.transposed_v, kChunk, b.dm, kChunk,
             false);
    for (int64_t i = 0; i < n; ++i)
        each_level(chunk, i, [&](int64_t level, int64_t from, int64_t to) {
            const A *mixing = b.mixing + i * kChunk, *dm = b.dm + i * kChunk;
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = from; j < to; ++j) sum += mixing[j] * dm[j];
            b.dlevels[i * b.levels + level] += sum;
        });
    times_lower(n, b.level_weights, b.dm);
    times_lower(n, b.mixing, b.level_weights);
    multiply(Shape::upper_left, n, b.values, n, transposed(b.level_weights, kChunk), b.dout, b.values_row, b.dv,
             b.values_row, false);

    // what the chunk wrote, then the states before it
    A through = 0;
    if (b.delta) {
        b.load_passing(n);
        transpose(b.keys, b.keys, b.passing, keys_row, b.transposed_passing, keys_row);
        std::fill_n(b.dpassing, b.keys * keys_row, A(0));
    }
    if (chunk.complete()) {
        const int64_t place = chunk.place();
        const A* dstate = b.dstate(own, place, false);
        write_backward(0, n, dstate, b);
        for (int64_t bit = kWithin; bit < place; ++bit) std::copy_n(dstate, b.size, b.dstate(own, bit, false));
        each_bit(begun, [&](int64_t bit) { std::copy_n(dstate, b.size, b.dstate(own, bit, true)); });
    } else {
        counter.each_rest([&](int64_t place, int64_t from, int64_t to) {
            const auto [first, last] = chunk.rows(from, to);
            const A* dstate = b.dstate(own, place, false);
            write_backward(first, last, dstate, b);
            each_bit(begun, [&](int64_t bit) {
                const int64_t at = start_of(begun, bit);
                if (from <= at && at < to) std::copy_n(dstate, b.size, b.dstate(own, bit, true));
            });
        });
    }
    chunk.each_state([&](int64_t place) {
        state_backward(p, chunk, row, h, place, b.state(own, chunk, read_before, place), b.dstate(own, place, false),
                       through, b);
    });
    each_bit(begun, [&](int64_t place) {
        state_backward(p, chunk, row, h, place, State<A>{b.start(own, place), A(1)}, b.dstate(own, place, true),
                       through, b);
    });
    unpack(n, b.values, b.dv, b.values_row, A(1), g.dv + sizes.place(row, h), sizes.heads * sizes.values);
    unpack(n, b.levels, b.dlevels, b.levels, A(1), g.dlevel_weight + (row.token * sizes.heads + h) * b.levels,
           sizes.heads * b.levels);

    // M, R, W and A are of the queries, the keys and their decays
    if (b.delta) delta_backward(n, through, b);
    const A* dk = b.delta ? b.dk_end : b.dw;
    std::copy_n(b.dr_states, n * keys_row, b.head_dq);
    std::copy_n(dk, n * keys_row, b.head_dk);
    b.decay.from_start_backward(n, b.head_dq);
    b.decay.to_end_backward(n, b.head_dk);
    b.decay.add_from_start(n, b.q, b.head_dq);
    b.decay.add_to_end(n, b.k, b.head_dk);
    b.decay.add_score_terms(n, b.p, b.dm);
    b.decay.scores_backward(n, b.q, b.k, b.dm, b.head_dq, b.head_dk);
    if (b.delta) {
        std::copy_n(b.dr_start, n * keys_row, b.head_dr);
        b.decay.from_start_backward(n, b.head_dr);
        b.decay.add_from_start(n, b.r, b.head_dr);
        b.decay.add_score_terms(n, b.mr, b.dmr);
        b.decay.scores_backward(n, b.r, b.k, b.dmr, b.head_dr, b.head_dk);
        add_scaled(n * keys_row, b.head_dr, A(-1), b.head_dk);
        unpack(n, 1, b.dbeta, 1, A(1), g.dbeta + row.token * sizes.heads + h, sizes.heads);
    }
    if (b.has_decay)
        b.decay.write_gradient(n, through, g.dlog_decay + row.token * sizes.heads + h, sizes.heads);
    add_row(n * keys_row, b.head_dq, b.group_dq);
    add_row(n * keys_row, b.head_dk, b.group_dk);
}

// Of the states after the last token: into the counter of gradients.
template <class T>
void load_gradients(const Problem<T>& p, const Gradients<T>& g, const Task& task, const Counter& counter,
                    Backward<Acc<T>>& b) {
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        each_bit(counter.after(), [&](int64_t place) {
            const bool still_begun = !counter.steps && place < kWithin;
            Acc<T>* to = b.dstate(h - task.first_head, place, still_begun);
            if (place < p.levels - 1)
                load_state(p, g.dstate_out + p.state_at(task.sequence, h, place), b, to);
            else
                std::fill_n(to, b.size, Acc<T>(0));
        });
}

template <class T>
void store_gradients(const Problem<T>& p, const Gradients<T>& g, const Task& task, const Counter& counter,
                     Backward<Acc<T>>& b) {
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        for (int64_t place = 0; place < p.levels - 1; ++place) {
            Acc<T>* to = g.dstate + p.state_at(task.sequence, h, place);
            if (has_bit(counter.first, place))
                store_state<T>(b.dstate(h - task.first_head, place, place < kWithin), b, to);
            else
                std::fill_n(to, b.keys * b.values, Acc<T>(0));
        }
}

template <class T>
void backward_task(const Problem<T>& p, const Task& task, const Gradients<T>& g, Backward<Acc<T>>& b) {
    const Counter counter = p.counter(task.sequence);
    int64_t read_before = 0;
    load_states(p, task, counter, b);
    for (int64_t c = 0; c + 1 < counter.chunks(); ++c) {
        const Chunk chunk = counter.chunk(c);
        b.load_group(p, task, task.row.later(chunk.begin), chunk.n, false);
        for (int64_t h = task.first_head; h < task.last_head; ++h) make_states(p, task, counter, c, read_before, h, b);
        read_before += ones_of(chunk.number);
    }
    load_gradients(p, g, task, counter, b);
    for (int64_t c = counter.chunks() - 1; c >= 0; --c) {
        const Chunk chunk = counter.chunk(c);
        const Row row = task.row.later(chunk.begin);
        b.load_group(p, task, row, chunk.n, true);
        std::fill_n(b.group_dq, chunk.n * b.keys_row, Acc<T>(0));
        std::fill_n(b.group_dk, chunk.n * b.keys_row, Acc<T>(0));
        for (int64_t h = task.first_head; h < task.last_head; ++h)
            backward_head(p, g, task, counter, chunk, read_before, h, b);
        g.dq.write(p.sizes, row, task, chunk.n, b.group_dq, b.keys_row, p.scale);
        g.dk.write(p.sizes, row, task, chunk.n, b.group_dk, b.keys_row, Acc<T>(1));
        if (c) read_before -= ones_of(chunk.number - 1);
    }
    store_gradients(p, g, task, counter, b);
}

template <class T>
void backward(const Problem<T>& p, Gradients<T> g) {
    using A = Acc<T>;
    g.dq.allocate(p.sizes);
    g.dk.allocate(p.sizes);
    run_tasks<A>(
        p.sizes, head_tasks(p.sizes), p.num_threads, [&](Arena<A>& arena) { return Backward<A>(p, arena); },
        [&](const Task& task, Backward<A>& scratch) { backward_task(p, task, g, scratch); });
    g.dq.add_up(p.sizes, p.num_threads);
    g.dk.add_up(p.sizes, p.num_threads);
}

}  // namespace

int32_t seqarch_log_linear_attention_backward(const seqarch_log_linear_attention_inputs* inputs,
                                              const seqarch_log_linear_attention_gradients* gradients,
                                              int32_t num_threads) {
    if (!log_linear::valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Acc<T>;
        const auto& g = *gradients;
        const auto shared = [](void* to) { return Shared<T>(static_cast<T*>(to)); };
        backward(Problem<T>(*inputs, num_threads),
                 Gradients<T>{Heads<T>(g.dout), static_cast<const A*>(g.dstate_out), shared(g.dq), shared(g.dk),
                              static_cast<T*>(g.dv), static_cast<A*>(g.dlevel_weight), static_cast<A*>(g.dbeta),
                              static_cast<A*>(g.dlog_decay), static_cast<A*>(g.dstate)});
    });
}
