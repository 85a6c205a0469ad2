// What both directions of log-linear attention share: the counter of states, and what the base recurrence does in a
// chunk.
//
// Chunks begin at multiples of kChunk tokens of a sequence, those before the call included. In one, with M the weights
// of its values in its outputs, Lambda those of the levels at which pairs of tokens meet, and of each state S before it
//
//   o = (M o Lambda) V + sum lambda R S,   S' = A S,   and the state that the chunk adds is W^T V.
//
// Without beta, M are the decayed scores, R the queries decayed from the chunk's start, W the keys decayed to its end
// and A is a number. With beta, and r = -k decayed from the start, Mr = r k^T decayed below the diagonal, P = q k^T,
//
//   X = (1 - beta Mr)^-1,   T = X beta,   M = P T,   W = T^T k,   R = q + M r,   A = decay + W^T r.
#pragma once

#include "recurrence.h"

namespace seqarch::log_linear {

constexpr int64_t kChunk = 64, kWithin = 6;  // bits of a count that the tokens of a chunk change
static_assert(kChunk == 1 << kWithin);

inline bool has_bit(int64_t number, int64_t place) { return number >> place & 1; }
inline int64_t bits_of(int64_t number) { return number ? 64 - __builtin_clzll(static_cast<uint64_t>(number)) : 0; }
inline int64_t ones_of(int64_t number) { return __builtin_popcountll(static_cast<uint64_t>(number)); }
// The first of the 2^place tokens that this bit of a count stands for: the count's higher bits.
inline int64_t start_of(int64_t number, int64_t place) { return number >> (place + 1) << (place + 1); }

// Calls f(place) for the bits of a number, lowest first.
template <class F>
void each_bit(int64_t number, F f) {
    for (int64_t place = 0; number >> place; ++place)
        if (has_bit(number, place)) f(place);
}

// Tokens [begin, begin + n) of the call, the whole or a part of a chunk of the sequence, from its row `shift` on.
struct Chunk {
    int64_t index, begin, shift, n, number;  // number: chunks of the sequence before it
    bool complete() const { return shift + n == kChunk; }
    // Where the chunk's state goes: those at lower places are added to it.
    int64_t place() const {
        int64_t free = 0;
        while (has_bit(number, free)) ++free;
        return kWithin + free;
    }
    // Calls f(place) for the states of whole chunks before it.
    template <class F>
    void each_state(F f) const {
        each_bit(number, [&](int64_t place) { f(kWithin + place); });
    }
    // The rows of a chunk's tokens [from, to) that are of this call.
    std::pair<int64_t, int64_t> rows(int64_t from, int64_t to) const {
        return {std::clamp<int64_t>(from - shift, 0, n), std::clamp<int64_t>(to - shift, 0, n)};
    }
};

// The tokens of a sequence: those before the call, and its own.
struct Counter {
    int64_t first, steps;
    int64_t lead() const { return first % kChunk; }
    int64_t after() const { return first + steps; }
    int64_t chunks() const { return steps ? (lead() + steps + kChunk - 1) / kChunk : 0; }
    Chunk chunk(int64_t c) const {
        const int64_t shift = c ? 0 : lead(), begin = c ? c * kChunk - lead() : 0;
        return {c, begin, shift, std::min(kChunk - shift, steps - begin), first / kChunk + c};
    }
    // Calls f(place, from, to) for the places of the last tokens, which fill no chunk, with their rows of its chunk.
    template <class F>
    void each_rest(F f) const {
        const int64_t rest = after() % kChunk;
        each_bit(rest, [&](int64_t place) { f(place, start_of(rest, place), start_of(rest, place) + (1 << place)); });
    }
};

// Calls f(level, from, to) for the rows of a chunk that the token in row i sees at each level.
template <class F>
void each_level(const Chunk& chunk, int64_t i, F f) {
    f(0, i, i + 1);
    const int64_t own = chunk.shift + i;
    for (int64_t level = 1; own >> (level - 1); ++level) {
        if (!has_bit(own, level - 1)) continue;
        const int64_t from = start_of(own, level - 1);
        const auto [first, last] = chunk.rows(from, from + (1 << (level - 1)));
        if (first < last) f(level, first, last);
    }
}
// The level at which row i of the call's first chunk sees the tokens before the call that a bit of their count stands
// for.
inline int64_t begun_level(const Chunk& chunk, int64_t i, int64_t place) {
    return bits_of((chunk.shift + i) ^ start_of(chunk.shift, place));
}

template <class T>
struct Problem {
    using A = Acc<T>;
    Sizes sizes;
    int64_t levels;
    const int64_t* before;
    Heads<T> q, k, v;
    Heads<A> level_weight, beta, log_decay;
    A scale;
    const A* state;
    int num_threads;
    int64_t places;  // of states that some sequence of the call has at some time

    Problem(const seqarch_log_linear_attention_inputs& in, int num_threads)
        : sizes(in, in.log_decay.data ? DecayKind::per_head : DecayKind::none),
          levels(in.levels),
          before(in.before),
          q(in.q),
          k(in.k),
          v(in.v),
          level_weight(in.level_weight),
          beta(in.beta),
          log_decay(in.log_decay),
          scale(static_cast<A>(in.scale)),
          state(static_cast<const A*>(in.state)),
          num_threads(num_threads),
          places(kWithin) {
        for (int64_t s = 0; s < sizes.sequences; ++s) places = std::max(places, bits_of(counter(s).after()));
    }
    bool delta() const { return beta.data != nullptr; }
    int64_t keys_row() const { return padded<A>(sizes.keys); }
    Counter counter(int64_t sequence) const { return {before[sequence], sizes.steps(sequence)}; }
    // Where a state begins in a tensor [S, H, L - 1, K, V].
    int64_t state_at(int64_t sequence, int64_t head, int64_t place) const {
        return sizes.state(sequence, head) * (levels - 1) + place * sizes.keys * sizes.values;
    }
    // The weights of a token's levels.
    const A* weights(const Row& row, int64_t i, int64_t h) const { return level_weight.at(row.later(i), h); }
};

// Whether a kernel computes with these sizes.
inline bool valid(const seqarch_log_linear_attention_inputs& in, int num_threads) {
    constexpr int64_t kMostLevels = 58;
    if (!seqarch::valid(in, num_threads) || in.levels < 2 || in.levels > kMostLevels) return false;
    const int64_t rows = in.offsets ? 1 : in.sequences;
    if (!countable({in.sequences, in.heads, in.levels, in.keys + kChunk, in.values + kChunk})) return false;
    if (!countable({rows, in.length + kChunk, in.heads, in.levels, in.values + kChunk, in.keys + kChunk})) return false;
    const int64_t most = int64_t{1} << (in.levels - 1);
    for (int64_t s = 0; s < in.sequences; ++s) {
        const int64_t steps = in.offsets ? in.offsets[s + 1] - in.offsets[s] : in.length;
        if (in.before[s] < 0 || in.before[s] > most || steps > most - in.before[s]) return false;
    }
    return true;
}

// c = (add ? c : 0) + a b up to the diagonal, a having zeros above it.
template <class A>
void lower_product(int64_t n, Left<A> a, const A* b, A* c, bool add) {
    multiply_parts(n, a, b, kChunk, c, kChunk, add, kChunk,
                   [](int64_t, int64_t end) -> Part { return {0, padded<A>(end), 0, end}; });
}
// The same of a with zeros below it.
template <class A>
void upper_product(int64_t n, Left<A> a, const A* b, A* c, bool add) {
    multiply_parts(n, a, b, kChunk, c, kChunk, add, kChunk,
                   [=](int64_t i, int64_t end) -> Part { return {0, padded<A>(end), i, n}; });
}
// Zeros above the diagonal, or from it on.
template <class A>
void clear_above(int64_t n, bool diagonal, A* x) {
    for (int64_t i = 0; i < n; ++i) std::fill(x + i * kChunk + i + !diagonal, x + (i + 1) * kChunk, A(0));
}
template <class A>
void scale_rows(int64_t n, int64_t width, const A* factors, const A* x, A* y) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; d += kLanes<A>)
            store_vector(y + i * width + d, load_vector(x + i * width + d) * splat(factors[i]));
}
// y = x y of what stands on and below the diagonal, and beside it in its block.
template <class A>
void times_lower(int64_t n, const A* x, A* y) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < padded<A>(std::min(n, (i / kTileRows + 1) * kTileRows)); j += kLanes<A>)
            store_vector(y + i * kChunk + j, load_vector(x + i * kChunk + j) * load_vector(y + i * kChunk + j));
}

// Buffers of one task: of a chunk's group, or of one head in it.
template <class A>
struct Scratch {
    A *q, *k, *r, *transposed_k, *raw, *raw_r;
    A *v, *beta, *p, *mr, *x, *t, *m, *r_start, *k_end, *r_states, *w, *passing, *level_weights, *factors, *scaled;
    const A *mixing, *queries, *write;  // M, R and W of the head in hand
    ChunkDecay<A> decay;
    int64_t keys, keys_row;
    bool delta, has_decay;

    template <class T>
    Scratch(const Problem<T>& p, Arena<A>& arena)
        : decay(p.sizes.decay, kChunk, p.sizes.keys, arena),
          keys(p.sizes.keys),
          keys_row(p.keys_row()),
          delta(p.delta()),
          has_decay(p.sizes.decay != DecayKind::none) {
        const int64_t wide = kChunk * keys_row, square = kChunk * kChunk, values = padded<A>(p.sizes.values);
        for (A** part : {&q, &k, &transposed_k, &r_states, &w, &scaled}) *part = arena.take(wide);
        for (A** part : {&r, &r_start, &k_end}) *part = arena.take(delta ? wide : 0);
        for (A** part : {&raw, &this->p, &level_weights}) *part = arena.take(square);
        for (A** part : {&raw_r, &mr, &x, &t, &m}) *part = arena.take(delta ? square : 0);
        v = arena.take(kChunk * values);
        beta = arena.take(kChunk);
        factors = arena.take(kChunk);
        passing = arena.take(delta ? keys_row * keys_row : 0);
    }
    A kept() const { return has_decay ? decay.whole[0] : A(1); }

    // Queries, keys and their products, for all heads of a task. Only what the states need if not `all`.
    template <class T>
    void load_group(const Problem<T>& problem, const Task& task, const Row& row, int64_t n, bool all) {
        pack(n, keys, problem.k.at(row, task.group), problem.k.time, A(1), k, keys_row);
        if (delta || all) transpose(n, keys, k, keys_row, transposed_k, kChunk);
        const auto products = [&](const A* left, A* to) {
            multiply(Shape::lower_result, n, n, keys, as_is(left, keys_row), transposed_k, kChunk, to, kChunk, false);
        };
        if (all) {
            pack(n, keys, problem.q.at(row, task.group), problem.q.time, problem.scale, q, keys_row);
            products(q, raw);
        }
        if (!delta) return;
        pack(n, keys, problem.k.at(row, task.group), problem.k.time, A(-1), r, keys_row);
        products(r, raw_r);
    }

    // One head's values, decays, and what the recurrence does in the chunk.
    template <class T>
    void load_head(const Problem<T>& problem, const Task& task, const Row& row, int64_t h, int64_t n, bool all) {
        const int64_t columns = task.last_value - task.first_value;
        pack(n, columns, problem.v.at(row, h) + task.first_value, problem.v.time, A(1), v, padded<A>(columns));
        if (has_decay) decay.read(n, problem.log_decay.at(row, h), problem.log_decay.time);
        if (all) decay.scores(n, q, transposed_k, raw, p);
        mixing = p;
        if (all) queries = decay.from_start(n, q, r_states);
        write = decay.to_end(n, k, delta ? k_end : w);
        if (!delta) return;
        for (int64_t i = 0; i < kChunk; ++i) beta[i] = i < n ? problem.beta.at(row, h)[i * problem.beta.time] : A(0);
        solve(n);
        const A *ends = write, *starts = decay.from_start(n, r, r_start);
        multiply(Shape::upper_left, n, keys, n, transposed(t, kChunk), ends, keys_row, w, keys_row, false);
        write = w;
        if (!all) return;
        lower_product(n, as_is(p, kChunk), t, m, false);
        mixing = m;
        if (queries != r_states) std::copy_n(queries, n * keys_row, r_states);
        multiply(Shape::lower_left, n, keys, n, as_is(m, kChunk), starts, keys_row, r_states, keys_row, true);
        queries = r_states;
    }
    const A* starts() const { return has_decay ? r_start : r; }
    const A* ends() const { return has_decay ? k_end : k; }

    // A^T of the head in hand.
    void load_passing(int64_t n) {
        multiply(Shape::full, keys, keys, n, transposed(starts(), keys_row), write, keys_row, passing, keys_row, false);
        for (int64_t d = 0; d < keys; ++d) passing[d * keys_row + d] += kept();
    }

    // The weights of the level at which each pair meets; zeros above the diagonal.
    template <class T>
    void load_levels(const Problem<T>& problem, const Chunk& chunk, const Row& row, int64_t h) {
        for (int64_t i = 0; i < chunk.n; ++i) {
            A* line = level_weights + i * kChunk;
            const A* weights = problem.weights(row, i, h);
            std::fill_n(line, kChunk, A(0));
            each_level(chunk, i, [&](int64_t level, int64_t from, int64_t to) {
                std::fill(line + from, line + to, weights[level]);
            });
        }
    }
    // The weights with which the tokens read a state of whole chunks, or one of the tokens before the call.
    template <class T>
    void load_factors(const Problem<T>& problem, const Chunk& chunk, const Row& row, int64_t h, int64_t place) {
        for (int64_t i = 0; i < chunk.n; ++i)
            factors[i] = problem.weights(row, i, h)[place < kWithin ? begun_level(chunk, i, place) : place + 1];
    }

  private:
    // X and T, row after row.
    void solve(int64_t n) {
        decay.scores(n, r, transposed_k, raw_r, mr);
        for (int64_t i = 0; i < n; i += kTileRows) {
            const int64_t end = std::min<int64_t>(n, i + kTileRows);
            std::fill_n(x + i * kChunk, (end - i) * kChunk, A(0));
            multiply(Shape::full, end - i, i, i, as_is(mr + i * kChunk, kChunk), x, kChunk, x + i * kChunk, kChunk,
                     true);
            for (int64_t own = i; own < end; ++own) {
                A* line = x + own * kChunk;
                for (int64_t j = i; j < own; ++j) {
                    const A weight = mr[own * kChunk + j];
                    for (int64_t c = 0; c < padded<A>(end); ++c) line[c] += weight * x[j * kChunk + c];
                }
                for (int64_t c = 0; c < padded<A>(end); ++c) line[c] *= beta[own];
                line[own] = 1;
            }
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t c = 0; c < kChunk; c += kLanes<A>)
                store_vector(t + i * kChunk + c, load_vector(x + i * kChunk + c) * load_vector(beta + c));
    }
};

}  // namespace seqarch::log_linear
