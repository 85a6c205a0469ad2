// Softmax attention, forward and backward. See seqarch.h for the equation and the arguments.
//
// Forward goes over the keys that a tile of queries sees. Backward does so again, and adds to the gradients of those
// keys.
#include "dtypes.h"
#include "query_tiles.h"

namespace {

using namespace seqarch;
using namespace seqarch::query_tiles;

constexpr int64_t kFewColumns = 2;  // for which a key is read faster than it is packed

template <class T>
struct Inputs {
    Sizes sizes;
    Heads<T> q, k, v;
    const Acc<T>* key_bias;  // [tokens, heads], or null
    Acc<T> factor;           // the scale, times log2(e)
    int num_threads;
};

template <class A>
struct Scratch {
    Columns<A> columns;
    Keys<A> keys;
    Seen<A> seen;

    template <class T>
    Scratch(const Inputs<T>& in, Arena<A>& arena)
        : columns(in.sizes.key_width, in.sizes.value_width, arena),
          keys(in.sizes.key_width, in.sizes.value_width, arena) {
        if (in.key_bias) keys.bias = arena.take(kTileKeys * kColumns);
    }
    template <class T>
    void load_keys(const Inputs<T>& in, const Row& row, int64_t group) {
        keys.load(seen.keys, in.k.at(row, group), in.k.time, in.v.at(row, group), in.v.time);
    }
    // What is added to the scores of the keys from `row` on: of each the numbers of the columns' heads.
    template <class T>
    void load_bias(const Inputs<T>& in, const Row& row, const Tile& tile) {
        if (!in.key_bias) return;
        for (int64_t key = 0; key < seen.keys; ++key) {
            const A* from = in.key_bias + (row.token + key) * in.sizes.heads;
            A* to = keys.bias + key * kColumns;
            if (tile.sharing == 1)
                std::fill_n(to, tile.columns, from[tile.group] * A(kLog2E));
            else
                tile.each_head(0, tile.columns, [&](int64_t c, int64_t head) { to[c] = from[head] * A(kLog2E); });
            std::fill(to + tile.columns, to + padded<A>(tile.columns), A(0));
        }
    }
};

// Calls f(key, row) for each tile of keys that the tile of columns sees, from that key and token on.
template <class A, class F>
void each_keys(const Sizes& sizes, const Sequence& sequence, const Tile& tile, Seen<A>& seen, F f) {
    for (int64_t key = tile.first_key; key < tile.last_key; key += kTileKeys) {
        look(sizes, sequence, tile, key, seen);
        f(key, sequence.key.later(key));
    }
}

template <class T>
void forward_tile(const Inputs<T>& in, const Sequence& sequence, const Tile& tile, T* o, Acc<T>* log_sum,
                  Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    Columns<A>& columns = s.columns;
    columns.load(tile.columns, in.factor, [&](int64_t c) { return tile.at(in.q, sequence, c); });
    columns.start();
    each_keys(in.sizes, sequence, tile, s.seen, [&](int64_t, const Row& row) {
        s.load_bias(in, row, tile);
        if (columns.count <= kFewColumns)
            return attend_few(s.seen, in.k.at(row, tile.group), in.k.time, in.v.at(row, tile.group), in.v.time, s.keys,
                              columns);
        s.load_keys(in, row, tile.group);
        attend(s.seen, s.keys, columns);
    });
    for (int64_t c = 0; c < tile.columns; ++c) {
        const int64_t place = tile.place(in.sizes, sequence, c), width = in.sizes.value_width;
        write_outputs(width, columns.o + c * padded<A>(width), columns.total[c], o + place * width);
        log_sum[place] = log_of(columns.row_max[c], columns.total[c]);
    }
}

template <class T>
void forward(const Inputs<T>& in, T* o, Acc<T>* log_sum) {
    using A = Acc<T>;
    const std::vector<TileTask> tasks = tile_tasks(in.sizes);
    run_parallel<A>(
        tasks.size(), threads_for(in.sizes, in.num_threads),
        [&](Arena<A>& arena) { return Scratch<A>(in, arena); },
        [&](int64_t t, Scratch<A>& scratch) {
            const Sequence sequence(in.sizes, tasks[t].sequence);
            forward_tile(in, sequence, Tile(in.sizes, sequence, tasks[t].group, tasks[t].tile), o, log_sum, scratch);
        });
}

template <class T>
struct Gradients {
    Heads<T> o, dout;
    const Acc<T>*log_sum, *dlse;
    T *dq, *dk, *dv;
    Acc<T>* dkey_bias;
};

template <class A>
struct BackwardScratch : Scratch<A> {
    ColumnGradients<A> gradients;
    template <class T>
    BackwardScratch(const Inputs<T>& in, Arena<A>& arena)
        : Scratch<A>(in, arena), gradients(in.sizes.key_width, in.sizes.value_width, arena) {}
};

// Where the gradients of a part's keys are added up: rows of dk, of dv, and of what was added to the scores of each of
// the heads that share a key (null where nothing was).
template <class A>
struct Sums {
    PartSums<A> keys;
    A* bias;
    int64_t bias_stride;
};

// Adds the gradients of a tile's scores to those of what was added to them: of each key a row of the heads that share
// it.
template <class A>
void add_bias_gradients(const Seen<A>& seen, const A* dscores, const Tile& tile, A* to, int64_t stride) {
    for (int64_t key = 0; key < seen.keys; ++key, dscores += kColumns, to += stride) {
        const int64_t from = seen.columns_from[key / kTileRows], end = seen.columns_to[key / kTileRows];
        if (tile.sharing == 1) {
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = from; c < end; ++c) sum += dscores[c];
            to[0] += sum;
        } else {
            const int64_t first = tile.group * tile.sharing;
            tile.each_head(from, end, [&](int64_t c, int64_t head) { to[head - first] += dscores[c]; });
        }
    }
}

template <class T>
void backward_tile(const Inputs<T>& in, const Gradients<T>& g, const Sequence& sequence, const Tile& tile,
                   const Sums<Acc<T>>& sums, BackwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    s.columns.load(tile.columns, in.factor, [&](int64_t c) { return tile.at(in.q, sequence, c); });
    s.gradients.load(
        s.columns, [&](int64_t c) { return tile.at(g.dout, sequence, c); },
        [&](int64_t c) {
            const A own = product(sizes.value_width, tile.at(g.o, sequence, c), tile.at(g.dout, sequence, c));
            return g.dlse ? own - g.dlse[tile.place(sizes, sequence, c)] : own;
        },
        [&](int64_t c) { return g.log_sum[tile.place(sizes, sequence, c)]; });
    each_keys(in.sizes, sequence, tile, s.seen, [&](int64_t key, const Row& row) {
        s.load_bias(in, row, tile);
        s.load_keys(in, row, tile.group);
        attend_backward(s.seen, s.keys, s.columns, s.gradients, sums.keys.dk(key), sums.keys.dv(key));
        if (sums.bias)
            add_bias_gradients(s.seen, s.keys.dscores, tile,
                               sums.bias + (key - sums.keys.first_key) * sums.bias_stride, sums.bias_stride);
    });
    write_query_gradients(sizes, sequence, tile, s.gradients.dq, in.factor, g.dq);
}

template <class T>
void backward(const Inputs<T>& in, const Gradients<T>& g) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    const BackwardParts all(sizes);
    const KeySums<A> dbias(all.keys, g.dkey_bias ? sizes.sharing() : 0);
    const int threads = threads_for(sizes, in.num_threads);
    over_parts(
        sizes, all, threads, g.dk, g.dv, [&](Arena<A>& arena) { return BackwardScratch<A>(in, arena); },
        [&](const TilesPart& part, const Sequence& sequence, const PartSums<A>& keys, BackwardScratch<A>& scratch) {
            const Sums<A> sums{keys, g.dkey_bias ? dbias.start(part.keys) : nullptr, dbias.stride()};
            for (int64_t tile = part.first; tile < part.last; ++tile)
                backward_tile(in, g, sequence, Tile(sizes, sequence, part.keys.group, tile), sums, scratch);
        });
    if (g.dkey_bias) dbias.add_up(all.spans, sizes.groups, A(1), g.dkey_bias, threads);
}

Sizes sizes_of(const seqarch_attention_inputs& in) {
    return {in.offsets, in.key_start, in.sequences, in.queries, in.keys, in.groups, in.heads, in.key_width,
            in.value_width, in.window, in.causal != 0};
}

template <class T>
Inputs<T> inputs_of(const Sizes& sizes, const seqarch_attention_inputs& in, int num_threads) {
    return {sizes, Heads<T>(in.q), Heads<T>(in.k), Heads<T>(in.v), static_cast<const Acc<T>*>(in.key_bias),
            static_cast<Acc<T>>(in.scale * kLog2E), num_threads};
}

}  // namespace

int32_t seqarch_attention_forward(const seqarch_attention_inputs* inputs, const seqarch_attention_outputs* outputs,
                                  int32_t num_threads) {
    Sizes sizes = sizes_of(*inputs);
    if (!valid(sizes, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(inputs_of<T>(sizes, *inputs, num_threads), static_cast<T*>(outputs->o),
                static_cast<Acc<T>*>(outputs->log_sum));
    });
}

int32_t seqarch_attention_backward(const seqarch_attention_inputs* inputs, const seqarch_attention_gradients* gradients,
                                   int32_t num_threads) {
    Sizes sizes = sizes_of(*inputs);
    if (!valid(sizes, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto& g = *gradients;
        backward(inputs_of<T>(sizes, *inputs, num_threads),
                 Gradients<T>{Heads<T>(g.o), Heads<T>(g.dout), static_cast<const Acc<T>*>(g.log_sum),
                              static_cast<const Acc<T>*>(g.dlse), static_cast<T*>(g.dq), static_cast<T*>(g.dk),
                              static_cast<T*>(g.dv), static_cast<Acc<T>*>(g.dkey_bias)});
    });
}
