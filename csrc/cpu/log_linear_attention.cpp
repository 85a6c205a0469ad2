// Log-linear attention, forward. See seqarch.h for the equation and the arguments, log_linear.h for the chunks.
//
// Tasks are cut as in linear_attention.cpp. A task holds of each of its heads a state for every place of the counter; a
// chunk's queries read each by a product, and a state passes a chunk by its decay, or with beta by one more product.
#include "log_linear.h"

namespace {

using namespace seqarch;
using namespace seqarch::log_linear;

template <class T>
struct Outputs {
    T* o;
    Acc<T>* state;
};

// The states of one task.
template <class A>
struct States : Scratch<A> {
    A *o, *before, *begun, *held;  // begun: of the tokens before the call that fill no chunk
    int64_t size, places;

    template <class T>
    States(const Problem<T>& problem, Arena<A>& arena) : Scratch<A>(problem, arena), places(problem.places) {
        const int64_t values = padded<A>(problem.sizes.values);
        size = problem.sizes.keys * values;
        o = arena.take(kChunk * values);
        before = arena.take(std::max(size, kChunk * values));
        begun = arena.take(problem.sizes.heads_per_task * kWithin * size);
        held = arena.take(problem.sizes.heads_per_task * places * size);
    }
    A* state(int64_t head, int64_t place) const { return held + (head * places + place) * size; }
    A* start(int64_t head, int64_t place) const {
        return place < kWithin ? begun + (head * kWithin + place) * size : state(head, place);
    }
};

// o += lambda R S.
template <class T>
void read(const Problem<T>& p, const Chunk& chunk, const Row& row, int64_t h, int64_t columns, int64_t place,
          const Acc<T>* state, States<Acc<T>>& s) {
    using A = Acc<T>;
    const int64_t keys_row = s.keys_row, values_row = padded<A>(columns);
    s.load_factors(p, chunk, row, h, place);
    scale_rows(chunk.n, keys_row, s.factors, s.queries, s.scaled);
    multiply(Shape::full, chunk.n, columns, s.keys, as_is(s.scaled, keys_row), state, values_row, s.o, values_row,
             true);
}

// S = A S. Fewer tokens than half of the keys change a state by less work than a whole product.
template <class A>
void pass(int64_t n, int64_t columns, A* state, States<A>& s) {
    const int64_t row = padded<A>(columns);
    if (!s.delta) return s.decay.over(row, state);
    if (2 * n < s.keys) {
        multiply(Shape::full, n, columns, s.keys, as_is(s.starts(), s.keys_row), state, row, s.before, row, false);
        s.decay.over(row, state);
        return multiply(Shape::full, s.keys, columns, n, transposed(s.write, s.keys_row), s.before, row, state, row,
                        true);
    }
    std::copy_n(state, s.keys * row, s.before);
    multiply(Shape::full, s.keys, columns, s.keys, transposed(s.passing, s.keys_row), s.before, row, state, row, false);
}

// The chunk's own state of its rows [from, to).
template <class A>
void write(int64_t from, int64_t to, int64_t columns, const States<A>& s, A* state) {
    const int64_t row = padded<A>(columns);
    multiply(Shape::full, s.keys, columns, to - from, transposed(s.write + from * s.keys_row, s.keys_row),
             s.v + from * row, row, state, row, false);
}

template <class T>
void forward_head(const Problem<T>& p, const Task& task, const Counter& counter, const Chunk& chunk, int64_t h,
                  const Outputs<T>& out, States<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const int64_t n = chunk.n, columns = task.last_value - task.first_value, values_row = padded<A>(columns);
    const int64_t own = h - task.first_head, begun = chunk.index ? 0 : chunk.shift;
    const Row row = task.row.later(chunk.begin);
    const auto each_state = [&](auto f) {
        chunk.each_state([&](int64_t place) { f(place, s.state(own, place)); });
        each_bit(begun, [&](int64_t place) { f(place, s.start(own, place)); });
    };
    s.load_head(p, task, row, h, n, true);
    s.load_levels(p, chunk, row, h);
    times_lower(n, s.mixing, s.level_weights);
    multiply(Shape::lower_left, n, columns, n, as_is(s.level_weights, kChunk), s.v, values_row, s.o, values_row, false);
    each_state([&](int64_t place, const A* state) { read(p, chunk, row, h, columns, place, state, s); });
    unpack(n, columns, s.o, values_row, A(1), out.o + sizes.place(row, h) + task.first_value,
           sizes.heads * sizes.values);

    if (s.delta && 2 * n >= s.keys && (chunk.number || begun)) s.load_passing(n);
    each_state([&](int64_t, A* state) { pass(n, columns, state, s); });
    if (chunk.complete()) {
        A* to = s.state(own, chunk.place());
        write(0, n, columns, s, to);
        each_bit(begun, [&](int64_t place) { add_row(s.keys * values_row, s.start(own, place), to); });
        for (int64_t place = kWithin; place < chunk.place(); ++place)
            add_row(s.keys * values_row, s.state(own, place), to);
    } else {
        counter.each_rest([&](int64_t place, int64_t from, int64_t to) {
            const auto [first, last] = chunk.rows(from, to);
            write(first, last, columns, s, s.state(own, place));
            each_bit(begun, [&](int64_t bit) {
                const int64_t at = start_of(begun, bit);
                if (from <= at && at < to) add_row(s.keys * values_row, s.start(own, bit), s.state(own, place));
            });
        });
    }
}

template <class T>
void forward_task(const Problem<T>& p, const Task& task, const Outputs<T>& out, States<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = p.sizes;
    const Counter counter = p.counter(task.sequence);
    const int64_t columns = task.last_value - task.first_value, row = padded<A>(columns);
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        each_bit(counter.first, [&](int64_t place) {
            if (place < p.levels - 1)
                pack(sizes.keys, columns, p.state + p.state_at(task.sequence, h, place) + task.first_value,
                     sizes.values, A(1), s.start(h - task.first_head, place), row);
        });
    for (int64_t c = 0; c < counter.chunks(); ++c) {
        const Chunk chunk = counter.chunk(c);
        s.load_group(p, task, task.row.later(chunk.begin), chunk.n, true);
        for (int64_t h = task.first_head; h < task.last_head; ++h)
            forward_head(p, task, counter, chunk, h, out, s);
    }
    for (int64_t h = task.first_head; h < task.last_head; ++h)
        for (int64_t place = 0; place < p.levels - 1; ++place) {
            A* to = out.state + p.state_at(task.sequence, h, place) + task.first_value;
            const int64_t own = h - task.first_head;
            if (has_bit(counter.after(), place))
                unpack(sizes.keys, columns, counter.steps ? s.state(own, place) : s.start(own, place), row, A(1), to,
                       sizes.values);
            else
                for (int64_t d = 0; d < sizes.keys; ++d) std::fill_n(to + d * sizes.values, columns, A(0));
        }
}

template <class T>
void forward(const Problem<T>& p, const Outputs<T>& out) {
    using A = Acc<T>;
    run_tasks<A>(
        p.sizes, forward_tasks<A>(p.sizes, p.num_threads), p.num_threads,
        [&](Arena<A>& arena) { return States<A>(p, arena); },
        [&](const Task& task, States<A>& scratch) { forward_task(p, task, out, scratch); });
}

}  // namespace

int32_t seqarch_log_linear_attention_forward(const seqarch_log_linear_attention_inputs* inputs,
                                             const seqarch_log_linear_attention_outputs* outputs, int32_t num_threads) {
    if (!log_linear::valid(*inputs, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(Problem<T>(*inputs, num_threads),
                Outputs<T>{static_cast<T*>(outputs->o), static_cast<Acc<T>*>(outputs->state_out)});
    });
}
