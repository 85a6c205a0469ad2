// Softmax attention, forward and backward. See seqarch.h for the equation and the arguments.
//
// A tile takes up to kColumns queries of one sequence: tokens, and of each the heads that share their keys. Forward goes
// over the keys that a tile sees. Backward does so again, and adds to the gradients of those keys; the tiles of a part
// come in order, and the parts' sums are added in order. What a part is depends on the sizes alone, so sums do not depend
// on the number of threads.
#include <vector>

#include "arguments.h"
#include "dtypes.h"
#include "key_sums.h"
#include "softmax_tiles.h"

namespace {

using namespace seqarch;

constexpr int64_t kParts = 32;           // wanted for the threads of large machines
constexpr int64_t kSmallWork = 1 << 18;  // fewer multiply-adds than starting the threads is worth
constexpr int64_t kFewColumns = 2;       // for which a key is read faster than it is packed

struct Sizes {
    const int64_t *offsets, *key_start;
    int64_t sequences, queries, keys, groups, heads, key_width, value_width, window;
    bool causal;

    int64_t sharing() const { return heads / groups; }
    int64_t query_tokens() const { return offsets ? queries : sequences * queries; }
    int64_t key_tokens() const { return offsets ? keys : sequences * keys; }
};

// One sequence: where its queries and keys begin, and which it has.
struct Sequence {
    Row query, key;
    int64_t queries, keys, first_key;

    Sequence(const Sizes& z, int64_t s) {
        const int64_t begin = z.offsets ? z.offsets[s] : 0;
        query = {z.offsets ? 0 : s, begin, z.offsets ? begin : s * z.queries};
        key = {z.offsets ? 0 : s, begin, z.offsets ? begin : s * z.keys};
        queries = z.offsets ? z.offsets[s + 1] - begin : z.queries;
        keys = z.offsets ? queries : z.keys;
        first_key = z.key_start ? std::clamp<int64_t>(z.key_start[s], 0, keys) : 0;
    }
    // The keys [first, last) that a query sees.
    int64_t first(const Sizes& z, int64_t query) const {
        return z.window ? std::max(first_key, query + keys - queries - z.window + 1) : first_key;
    }
    int64_t last(const Sizes& z, int64_t query) const { return z.causal ? query + keys - queries + 1 : keys; }
};

// Up to kColumns columns of a sequence and group: token and head of each, and the keys that some of them sees.
struct Tile {
    int64_t group, sharing, begin, columns, first_key, last_key;

    Tile(const Sizes& z, const Sequence& sequence, int64_t group, int64_t tile)
        : group(group), sharing(z.sharing()), begin(tile * kColumns) {
        columns = std::min(kColumns, sequence.queries * sharing - begin);
        first_key = sequence.first(z, token(0));
        last_key = sequence.last(z, token(columns - 1));
    }
    int64_t token(int64_t column) const { return (begin + column) / sharing; }
    int64_t head(int64_t column) const { return group * sharing + (begin + column) % sharing; }
    template <class T>
    const T* at(const Heads<T>& heads, const Sequence& sequence, int64_t column) const {
        return heads.at(sequence.query.later(token(column)), head(column));
    }
    // Where the column stands in a contiguous [tokens, heads].
    int64_t place(const Sizes& z, const Sequence& sequence, int64_t column) const {
        return (sequence.query.token + token(column)) * z.heads + head(column);
    }
};

int64_t tiles_of(const Sizes& z, const Sequence& sequence) {
    return (sequence.queries * z.sharing() + kColumns - 1) / kColumns;
}

template <class T>
struct Inputs {
    Sizes z;
    Heads<T> q, k, v;
    Acc<T> factor;  // the scale, times log2(e)
    int num_threads;
};

// What the columns of a tile see of the keys from `key` on.
template <class A>
void look(const Sizes& z, const Sequence& sequence, const Tile& tile, int64_t key, Seen<A>& seen) {
    const int64_t count = std::min(kTileKeys, tile.last_key - key);
    const bool from_first = sequence.first(z, tile.token(tile.columns - 1)) <= key;
    if (from_first && key + count <= sequence.last(z, tile.token(0))) return seen.set_whole(tile.columns, count);
    seen.set(
        tile.columns, count, [&](int64_t c) { return sequence.first(z, tile.token(c)) - key; },
        [&](int64_t c) { return sequence.last(z, tile.token(c)) - key - 1; });
}

// Calls f(key, row) for each tile of keys that the tile of columns sees, from that key and token on.
template <class T, class F>
void each_keys(const Inputs<T>& in, const Sequence& sequence, const Tile& tile, Seen<Acc<T>>& seen, F f) {
    for (int64_t key = tile.first_key; key < tile.last_key; key += kTileKeys) {
        look(in.z, sequence, tile, key, seen);
        f(key, sequence.key.later(key));
    }
}

template <class A>
struct Scratch {
    Columns<A> columns;
    Keys<A> keys;
    Seen<A> seen;

    Scratch(const Sizes& z, Arena<A>& arena)
        : columns(z.key_width, z.value_width, arena), keys(z.key_width, z.value_width, arena) {}
    template <class T>
    void load_keys(const Inputs<T>& in, const Row& row, int64_t group) {
        keys.load(seen.keys, in.k.at(row, group), in.k.time, in.v.at(row, group), in.v.time);
    }
};

template <class T>
void forward_tile(const Inputs<T>& in, const Sequence& sequence, const Tile& tile, T* o, Acc<T>* log_sum,
                  Scratch<Acc<T>>& s) {
    using A = Acc<T>;
    Columns<A>& columns = s.columns;
    columns.load(tile.columns, in.factor, [&](int64_t c) { return tile.at(in.q, sequence, c); });
    columns.start();
    each_keys(in, sequence, tile, s.seen, [&](int64_t, const Row& row) {
        if (columns.count <= kFewColumns)
            return attend_few(s.seen, in.k.at(row, tile.group), in.k.time, in.v.at(row, tile.group), in.v.time,
                              s.keys.scores, columns);
        s.load_keys(in, row, tile.group);
        attend(s.seen, s.keys, columns);
    });
    for (int64_t c = 0; c < tile.columns; ++c) {
        const int64_t place = tile.place(in.z, sequence, c), width = in.z.value_width;
        write_outputs(width, columns.o + c * padded<A>(width), columns.total[c], o + place * width);
        log_sum[place] = log_of(columns.largest[c], columns.total[c]);
    }
}

struct TileTask {
    int64_t sequence, group, tile;
};

std::vector<TileTask> tile_tasks(const Sizes& z) {
    std::vector<TileTask> tasks;
    for (int64_t s = 0; s < z.sequences; ++s) {
        const int64_t tiles = tiles_of(z, Sequence(z, s));
        for (int64_t g = 0; g < z.groups; ++g)
            for (int64_t t = 0; t < tiles; ++t) tasks.push_back({s, g, tiles - 1 - t});  // those with most keys first
    }
    return tasks;
}

int threads_for(const Sizes& z, int num_threads) {
    const int64_t seen = z.window ? std::min(z.window, z.keys) : z.keys;
    const double pairs = static_cast<double>(z.query_tokens()) * z.heads * seen;
    return pairs * (z.key_width + z.value_width) > kSmallWork ? num_threads : 1;
}

template <class T>
void forward(const Inputs<T>& in, T* o, Acc<T>* log_sum) {
    using A = Acc<T>;
    const std::vector<TileTask> tasks = tile_tasks(in.z);
    run_parallel<A>(
        tasks.size(), threads_for(in.z, in.num_threads), [&](Arena<A>& arena) { return Scratch<A>(in.z, arena); },
        [&](int64_t t, Scratch<A>& scratch) {
            const Sequence sequence(in.z, tasks[t].sequence);
            forward_tile(in, sequence, Tile(in.z, sequence, tasks[t].group, tasks[t].tile), o, log_sum, scratch);
        });
}

template <class T>
struct Gradients {
    Heads<T> o, dout;
    const Acc<T>* log_sum;
    T *dq, *dk, *dv;
};

// Some tiles of one sequence and group, and the keys that they see.
struct TilesPart {
    int64_t first, last;
    KeyPart keys;
};

std::vector<TilesPart> cut(const Sizes& z, int64_t tiles_a_part) {
    std::vector<TilesPart> parts;
    int64_t rows = 0;
    for (int64_t s = 0; s < z.sequences; ++s) {
        const Sequence sequence(z, s);
        const int64_t tiles = tiles_of(z, sequence);
        for (int64_t g = 0; g < z.groups; ++g)
            for (int64_t t = 0; t < tiles; t += tiles_a_part) {
                const int64_t end = std::min(t + tiles_a_part, tiles), first = Tile(z, sequence, g, t).first_key;
                const int64_t last = std::max(first, Tile(z, sequence, g, end - 1).last_key);
                parts.push_back({t, end, {s, g, first, last, rows}});
                rows = parts.back().keys.end();
            }
    }
    return parts;
}

// As many parts as are wanted, if their sums take no more memory than twice the keys and once the queries.
std::vector<TilesPart> cut(const Sizes& z) {
    int64_t tiles = 0;
    for (int64_t s = 0; s < z.sequences; ++s) tiles += tiles_of(z, Sequence(z, s)) * z.groups;
    const int64_t most = 2 * z.key_tokens() * z.groups + z.query_tokens() * z.heads;
    for (int64_t tiles_a_part = std::max<int64_t>((tiles + kParts - 1) / kParts, 1);; tiles_a_part *= 2) {
        std::vector<TilesPart> parts = cut(z, tiles_a_part);
        if (parts.empty() || parts.back().keys.end() <= most || tiles_a_part >= tiles) return parts;
    }
}

template <class A>
struct BackwardScratch : Scratch<A> {
    ColumnGradients<A> gradients;
    BackwardScratch(const Sizes& z, Arena<A>& arena)
        : Scratch<A>(z, arena), gradients(z.key_width, z.value_width, arena) {}
};

template <class T>
void backward_tile(const Inputs<T>& in, const Gradients<T>& g, const Sequence& sequence, const Tile& tile,
                   const PartSums<Acc<T>>& sums, BackwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& z = in.z;
    s.columns.load(tile.columns, in.factor, [&](int64_t c) { return tile.at(in.q, sequence, c); });
    s.gradients.load(
        s.columns, [&](int64_t c) { return tile.at(g.dout, sequence, c); },
        [&](int64_t c) { return product(z.value_width, tile.at(g.o, sequence, c), tile.at(g.dout, sequence, c)); },
        [&](int64_t c) { return g.log_sum[tile.place(z, sequence, c)]; });
    each_keys(in, sequence, tile, s.seen, [&](int64_t key, const Row& row) {
        s.load_keys(in, row, tile.group);
        attend_backward(s.seen, s.keys, s.columns, s.gradients, sums.dk(key), sums.dv(key));
    });
    const A scale = in.factor * A(kLn2);
    for (int64_t c = 0; c < tile.columns; ++c)
        unpack(1, z.key_width, s.gradients.dq + c * padded<A>(z.key_width), 0, scale,
               g.dq + tile.place(z, sequence, c) * z.key_width, 0);
}

template <class T>
void backward(const Inputs<T>& in, const Gradients<T>& g) {
    using A = Acc<T>;
    const Sizes& z = in.z;
    const std::vector<TilesPart> parts = cut(z);
    std::vector<KeyPart> key_parts;
    for (const TilesPart& part : parts) key_parts.push_back(part.keys);
    std::vector<KeySpan> spans;
    for (int64_t s = 0; s < z.sequences; ++s) spans.push_back({Sequence(z, s).key.token, 0, Sequence(z, s).keys});
    const KeySums<T> dk(key_parts, z.key_width), dv(key_parts, z.value_width);
    const int threads = threads_for(z, in.num_threads);
    run_parallel<A>(
        parts.size(), threads, [&](Arena<A>& arena) { return BackwardScratch<A>(z, arena); },
        [&](int64_t t, BackwardScratch<A>& scratch) {
            const TilesPart& part = parts[parts.size() - 1 - t];  // those with most keys first
            const Sequence sequence(z, part.keys.span);
            const PartSums<A> sums{dk.start(part.keys), dv.start(part.keys), dk.stride(), dv.stride(),
                                   part.keys.first_key};
            for (int64_t tile = part.first; tile < part.last; ++tile)
                backward_tile(in, g, sequence, Tile(z, sequence, part.keys.group, tile), sums, scratch);
        });
    dk.add_up(spans, z.groups, A(kLn2), g.dk, threads);
    dv.add_up(spans, z.groups, A(1), g.dv, threads);
}

// All sizes can be counted, and a window is no longer than the keys.
bool valid(Sizes& z, int num_threads) {
    constexpr int64_t kPadding = 64;  // of widths to vectors, and of sequences to tiles
    if (num_threads < 1 || z.groups < 1 || z.heads % z.groups || z.window < 0 || (!z.causal && z.window)) return false;
    if (!countable({z.sequences, z.queries, z.heads}) || !countable({z.sequences, z.keys, z.groups})) return false;
    if (!countable({z.key_width, z.value_width}) || (z.offsets && (z.queries != z.keys || z.key_start))) return false;
    const int64_t rows = z.offsets ? 1 : z.sequences, width = z.key_width + z.value_width + kPadding;
    z.window = std::min(z.window, std::max<int64_t>(z.keys, 1));
    return countable({rows, z.queries + kPadding, z.heads, width}) &&
           countable({rows, z.keys + kPadding, z.groups, width}) && packs(z.offsets, z.sequences, z.queries);
}

template <class T>
Inputs<T> inputs(const Sizes& z, const seqarch_heads* q, const seqarch_heads* k, const seqarch_heads* v, double scale,
                 int32_t num_threads) {
    return {z, Heads<T>(q), Heads<T>(k), Heads<T>(v), static_cast<Acc<T>>(scale * kLog2E), num_threads};
}

}  // namespace

int32_t seqarch_attention_forward(int32_t dtype, const seqarch_heads* q, const seqarch_heads* k, const seqarch_heads* v,
                                  int32_t causal, int64_t window, double scale, const int64_t* key_start, void* o,
                                  void* log_sum, const int64_t* offsets, int64_t sequences, int64_t queries,
                                  int64_t keys, int64_t groups, int64_t heads, int64_t key_width, int64_t value_width,
                                  int32_t num_threads) {
    Sizes z{offsets, key_start, sequences, queries, keys, groups, heads, key_width, value_width, window, causal != 0};
    if (!valid(z, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(inputs<T>(z, q, k, v, scale, num_threads), static_cast<T*>(o), static_cast<Acc<T>*>(log_sum));
    });
}

int32_t seqarch_attention_backward(int32_t dtype, const seqarch_heads* q, const seqarch_heads* k,
                                   const seqarch_heads* v, int32_t causal, int64_t window, double scale,
                                   const int64_t* key_start, const seqarch_heads* o, const void* log_sum,
                                   const seqarch_heads* dout, void* dq, void* dk, void* dv, const int64_t* offsets,
                                   int64_t sequences, int64_t queries, int64_t keys, int64_t groups, int64_t heads,
                                   int64_t key_width, int64_t value_width, int32_t num_threads) {
    Sizes z{offsets, key_start, sequences, queries, keys, groups, heads, key_width, value_width, window, causal != 0};
    if (!valid(z, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        backward(inputs<T>(z, q, k, v, scale, num_threads),
                 Gradients<T>{Heads<T>(o), Heads<T>(dout), static_cast<const Acc<T>*>(log_sum), static_cast<T*>(dq),
                              static_cast<T*>(dk), static_cast<T*>(dv)});
    });
}
