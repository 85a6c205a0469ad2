// Stick-breaking attention, forward and backward. See seqarch.h for the equation and the arguments.
//
// A tile of queries goes over the keys that it sees from the last to the first. What is left of each query's stick is a
// running product, so that no weight is a difference of large numbers. Once nothing is left of any stick of the tile,
// the keys before have weights and gradients of 0 and are not looked at. Backward first goes the same way, for what is
// left before each tile of keys, and then from the first key on: what a score changes is its own weight, and all
// weights of the keys before it.
#include "dtypes.h"
#include "query_tiles.h"

namespace {

using namespace seqarch;
using namespace seqarch::query_tiles;

constexpr int64_t kFewColumns = 2;  // for which a key is read faster than it is packed

// Beyond these base-2 scores a share is 1; the reciprocal of two to them is still a normal number.
inline float highest_score(float) { return 125.0f; }
inline double highest_score(double) { return 1000.0; }

template <class T>
struct Inputs {
    Sizes sizes;
    Heads<T> q, k, v;
    Acc<T> factor;  // the scale, times log2(e)
    int num_threads;
};

template <class A>
struct Scratch {
    Columns<A> columns;  // `total` is what is left of their sticks
    Keys<A> keys;
    Seen<A> seen;

    template <class T>
    Scratch(const Inputs<T>& in, Arena<A>& arena)
        : columns(in.sizes.key_width, in.sizes.value_width, arena),
          keys(in.sizes.key_width, in.sizes.value_width, arena) {}
    template <class T>
    void load_columns(const Inputs<T>& in, const Sequence& sequence, const Tile& tile) {
        columns.load(tile.columns, in.factor, [&](int64_t c) { return tile.at(in.q, sequence, c); });
        columns.start();
        std::fill_n(columns.total, columns.count, A(1));
    }
    template <class T>
    void load_keys(const Inputs<T>& in, const Row& row, int64_t group) {
        keys.load(seen.keys, in.k.at(row, group), in.k.time, in.v.at(row, group), in.v.time);
    }
    bool nothing_left() const {
        bool nothing = true;
        for (int64_t c = 0; c < columns.count; ++c) nothing &= columns.total[c] == A(0);
        return nothing;
    }
};

// Calls f(score, share, kept) for the keys of which the vector of columns at `column` has a score, from the last on: of
// what is found a key takes the share, and leaves the other.
template <class A, class F>
inline void each_share(const Seen<A>& seen, int64_t column, A* scores, F f) {
    const Vector<A> most = splat(highest_score(A())), one = splat(A(1));
    for (int64_t block = (seen.keys - 1) / kTileRows; block >= 0; --block) {
        if (!seen.covers(block, column)) continue;
        for (int64_t key = std::min<int64_t>((block + 1) * kTileRows, seen.keys) - 1; key >= block * kTileRows; --key) {
            A* at = scores + key * kColumns + column;
            Vector<A> score = load_vector(at);
            if (!seen.whole) score = seen.hide(key, column, score);
            const Vector<A> power = power_of_two(score > most ? most : score), kept = one / (one + power);
            f(at, power * kept, kept);
        }
    }
}

// Scores to weights, and what they leave.
template <class A>
void break_sticks(const Seen<A>& seen, A* scores, Columns<A>& columns) {
    for (int64_t c = 0; c < seen.columns; c += kLanes<A>) {
        Vector<A> left = load_vector(columns.total + c);
        each_share(seen, c, scores, [&](A* at, Vector<A> share, Vector<A> kept) {
            store_vector(at, share * left);
            left *= kept;
        });
        store_vector(columns.total + c, left);
    }
}

template <class T>
void attend_keys(const Inputs<T>& in, const Row& row, const Tile& tile, Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const int64_t o_row = padded<A>(in.sizes.value_width), q_row = padded<A>(in.sizes.key_width);
    Columns<A>& columns = s.columns;
    A* const scores = s.keys.scores;
    if (columns.count > kFewColumns) {
        s.load_keys(in, row, tile.group);
        s.keys.score(s.seen, columns.transposed_q);
        break_sticks(s.seen, scores, columns);
        return multiply_parts(s.seen.columns, transposed(scores, kColumns), s.keys.v, o_row, columns.o, o_row, true,
                              o_row, [&](int64_t i, int64_t) { return s.seen.over_keys(i, columns.value_width); });
    }
    const T *k = in.k.at(row, tile.group), *v = in.v.at(row, tile.group);
    for (int64_t key = 0; key < s.seen.keys; ++key)
        for (int64_t c = 0; c < columns.count; ++c)
            scores[key * kColumns + c] = product(columns.key_width, columns.q + c * q_row, k + key * in.k.time);
    break_sticks(s.seen, scores, columns);
    constexpr int64_t kAtOnce = 4;
    for (int64_t c = 0; c < columns.count; ++c)
        for (int64_t key = s.seen.keys_from[0]; key < s.seen.keys_to[0]; key += kAtOnce)
            add_rows<kAtOnce>(std::min(kAtOnce, s.seen.keys_to[0] - key), columns.value_width,
                              scores + key * kColumns + c, kColumns, v + key * in.v.time, in.v.time,
                              columns.o + c * o_row);
}

// The first key of the last tile of keys.
inline int64_t last_tile(const Tile& tile) {
    return tile.first_key + (tile.last_key - 1 - tile.first_key) / kTileKeys * kTileKeys;
}

template <class T>
void forward_tile(const Inputs<T>& in, const Sequence& sequence, const Tile& tile, T* o, Acc<T>* rest,
                  Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    const int64_t width = in.sizes.value_width;
    s.load_columns(in, sequence, tile);
    if (tile.first_key < tile.last_key)
        for (int64_t key = last_tile(tile); key >= tile.first_key && !s.nothing_left(); key -= kTileKeys) {
            look(in.sizes, sequence, tile, key, s.seen);
            attend_keys(in, sequence.key.later(key), tile, s);
        }
    for (int64_t c = 0; c < tile.columns; ++c) {
        const int64_t place = tile.place(in.sizes, sequence, c);
        unpack(1, width, s.columns.o + c * padded<A>(width), 0, A(1), o + place * width, 0);
        rest[place] = s.columns.total[c];
    }
}

template <class T>
void forward(const Inputs<T>& in, T* o, Acc<T>* rest) {
    using A = Acc<T>;
    const std::vector<TileTask> tasks = tile_tasks(in.sizes);
    run_parallel<A>(
        tasks.size(), threads_for(in.sizes, in.num_threads), [&](Arena<A>& arena) { return Scratch<A>(in, arena); },
        [&](int64_t t, Scratch<A>& scratch) {
            const Sequence sequence(in.sizes, tasks[t].sequence);
            forward_tile(in, sequence, Tile(in.sizes, sequence, tasks[t].group, tasks[t].tile), o, rest, scratch);
        });
}

template <class T>
struct Gradients {
    Heads<T> dout;
    const Acc<T>* drest;
    T *dq, *dk, *dv;
};

template <class A>
struct BackwardScratch : Scratch<A> {
    ColumnGradients<A> gradients;
    A *shares, *below, *left;  // below: the sums of weight times gradient up to a key; left: before each tile of keys

    template <class T>
    BackwardScratch(const Inputs<T>& in, Arena<A>& arena)
        : Scratch<A>(in, arena),
          gradients(in.sizes.key_width, in.sizes.value_width, arena),
          shares(arena.take(kTileKeys * kColumns)),
          below(arena.take(kColumns)),
          left(arena.take((in.sizes.keys / kTileKeys + 1) * kColumns)) {}
};

// Adds to the gradients of a tile of keys and of the columns.
template <class A>
void attend_keys_backward(BackwardScratch<A>& s, A* dk, A* dv) {
    const Seen<A>& seen = s.seen;
    Columns<A>& columns = s.columns;
    Keys<A>& keys = s.keys;
    const int64_t key_width = columns.key_width, keys_row = padded<A>(key_width);
    const int64_t value_width = columns.value_width, values_row = padded<A>(value_width);
    keys.score(seen, columns.transposed_q);
    multiply_parts(seen.keys, as_is(keys.v, values_row), s.gradients.transposed_dout, kColumns, keys.dscores, kColumns,
                   false, padded<A>(seen.columns), [&](int64_t i, int64_t) { return seen.scores_of(i, value_width); });
    for (int64_t c = 0; c < seen.columns; c += kLanes<A>) {
        Vector<A> left = load_vector(columns.total + c), below = load_vector(s.below + c);
        each_share(seen, c, keys.scores, [&](A* at, Vector<A> share, Vector<A> kept) {
            store_vector(s.shares + (at - keys.scores), share);
            store_vector(at, share * left);
            left *= kept;
        });
        each_score(seen, c, keys.scores, [&](int64_t, A* at) {
            A* dscore = keys.dscores + (at - keys.scores);
            const Vector<A> own = load_vector(at) * load_vector(dscore);
            below += own;
            store_vector(dscore, own - load_vector(s.shares + (at - keys.scores)) * below);
        });
        store_vector(s.below + c, below);
    }
    multiply_parts(seen.keys, as_is(keys.scores, kColumns), s.gradients.dout, values_row, dv, values_row, true,
                   values_row, [&](int64_t i, int64_t) { return seen.over_columns(i, value_width); });
    multiply_parts(seen.keys, as_is(keys.dscores, kColumns), columns.q, keys_row, dk, keys_row, true, keys_row,
                   [&](int64_t i, int64_t) { return seen.over_columns(i, key_width); });
    multiply_parts(seen.columns, transposed(keys.dscores, kColumns), keys.k, keys_row, s.gradients.dq, keys_row, true,
                   keys_row, [&](int64_t i, int64_t) { return seen.over_keys(i, key_width); });
}

template <class T>
void backward_tile(const Inputs<T>& in, const Gradients<T>& g, const Sequence& sequence, const Tile& tile,
                   const PartSums<Acc<T>>& sums, BackwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    s.load_columns(in, sequence, tile);
    s.gradients.load(
        s.columns, [&](int64_t c) { return tile.at(g.dout, sequence, c); }, [](int64_t) { return A(0); },
        [](int64_t) { return A(0); });
    if (tile.first_key < tile.last_key) {
        int64_t key = last_tile(tile);
        const auto left = [&] { return s.left + (key - tile.first_key) / kTileKeys * kColumns; };
        for (; key >= tile.first_key && !s.nothing_left(); key -= kTileKeys) {
            const Row row = sequence.key.later(key);
            std::copy_n(s.columns.total, kColumns, left());
            look(sizes, sequence, tile, key, s.seen);
            pack(s.seen.keys, sizes.key_width, in.k.at(row, tile.group), in.k.time, A(1), s.keys.k,
                 padded<A>(sizes.key_width));
            s.keys.score(s.seen, s.columns.transposed_q);
            for (int64_t c = 0; c < s.seen.columns; c += kLanes<A>) {
                Vector<A> rest = load_vector(s.columns.total + c);
                each_share(s.seen, c, s.keys.scores, [&](A*, Vector<A>, Vector<A> kept) { rest *= kept; });
                store_vector(s.columns.total + c, rest);
            }
        }
        for (int64_t c = 0; c < kColumns; ++c)
            s.below[c] = c < tile.columns ? s.columns.total[c] * g.drest[tile.place(sizes, sequence, c)] : A(0);
        for (key += kTileKeys; key < tile.last_key; key += kTileKeys) {
            const Row row = sequence.key.later(key);
            std::copy_n(left(), kColumns, s.columns.total);
            look(sizes, sequence, tile, key, s.seen);
            s.load_keys(in, row, tile.group);
            attend_keys_backward(s, sums.dk(key), sums.dv(key));
        }
    }
    write_query_gradients(sizes, sequence, tile, s.gradients.dq, in.factor, g.dq);
}

template <class T>
void backward(const Inputs<T>& in, const Gradients<T>& g) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    over_parts(
        sizes, BackwardParts(sizes), threads_for(sizes, in.num_threads), g.dk, g.dv,
        [&](Arena<A>& arena) { return BackwardScratch<A>(in, arena); },
        [&](const TilesPart& part, const Sequence& sequence, const PartSums<A>& sums, BackwardScratch<A>& scratch) {
            for (int64_t tile = part.first; tile < part.last; ++tile)
                backward_tile(in, g, sequence, Tile(sizes, sequence, part.keys.group, tile), sums, scratch);
        });
}

Sizes sizes_of(const seqarch_stick_breaking_attention_inputs& in) {
    return {in.offsets, in.key_start, in.sequences,   in.queries, in.keys, in.groups, in.heads,
            in.key_width, in.value_width, 0, true, false};
}

template <class T>
Inputs<T> inputs_of(const Sizes& sizes, const seqarch_stick_breaking_attention_inputs& in, int num_threads) {
    return {sizes, Heads<T>(in.q), Heads<T>(in.k), Heads<T>(in.v), static_cast<Acc<T>>(in.scale * kLog2E), num_threads};
}

}  // namespace

int32_t seqarch_stick_breaking_attention_forward(const seqarch_stick_breaking_attention_inputs* inputs,
                                                 const seqarch_stick_breaking_attention_outputs* outputs,
                                                 int32_t num_threads) {
    Sizes sizes = sizes_of(*inputs);
    if (!valid(sizes, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(inputs_of<T>(sizes, *inputs, num_threads), static_cast<T*>(outputs->o),
                static_cast<Acc<T>*>(outputs->rest));
    });
}

int32_t seqarch_stick_breaking_attention_backward(const seqarch_stick_breaking_attention_inputs* inputs,
                                                  const seqarch_stick_breaking_attention_gradients* gradients,
                                                  int32_t num_threads) {
    Sizes sizes = sizes_of(*inputs);
    if (!valid(sizes, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto& g = *gradients;
        backward(inputs_of<T>(sizes, *inputs, num_threads),
                 Gradients<T>{Heads<T>(g.dout), static_cast<const Acc<T>*>(g.drest), static_cast<T*>(g.dq),
                              static_cast<T*>(g.dk), static_cast<T*>(g.dv)});
    });
}
