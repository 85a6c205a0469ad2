// Tiles of queries of a sequence, the keys that they see, and how the work on them is cut.
//
// A tile takes up to kColumns queries of one sequence: tokens, and of each the heads that share their keys. The tiles
// of a part come in order, and the parts' sums are added in order. What a part is depends on the sizes alone, so sums
// do not depend on the number of threads.
#pragma once

#include <vector>

#include "arguments.h"
#include "key_gradients.h"
#include "softmax_tiles.h"

namespace seqarch::query_tiles {

constexpr int64_t kParts = 32;           // wanted for the threads of large machines
constexpr int64_t kSmallWork = 1 << 18;  // fewer multiply-adds than starting the threads is worth

struct Sizes {
    const int64_t *offsets, *key_start;
    int64_t sequences, queries, keys, groups, heads, key_width, value_width, window;
    bool causal, own_key = true;  // own_key: whether a causal query sees the key at its own place

    int64_t sharing() const { return heads / groups; }
    int64_t query_tokens() const { return offsets ? queries : sequences * queries; }
    int64_t key_tokens() const { return offsets ? keys : sequences * keys; }
};

// One sequence: where its queries and keys begin, and which it has.
struct Sequence {
    Row query, key;
    int64_t queries, keys, first_key;

    Sequence(const Sizes& sizes, int64_t s) {
        const int64_t begin = sizes.offsets ? sizes.offsets[s] : 0;
        query = {sizes.offsets ? 0 : s, begin, sizes.offsets ? begin : s * sizes.queries};
        key = {sizes.offsets ? 0 : s, begin, sizes.offsets ? begin : s * sizes.keys};
        queries = sizes.offsets ? sizes.offsets[s + 1] - begin : sizes.queries;
        keys = sizes.offsets ? queries : sizes.keys;
        first_key = sizes.key_start ? std::clamp<int64_t>(sizes.key_start[s], 0, keys) : 0;
    }
    // The keys [first, last) that a query sees.
    int64_t first(const Sizes& sizes, int64_t query) const {
        return sizes.window ? std::max(first_key, query + keys - queries - sizes.window + 1) : first_key;
    }
    int64_t last(const Sizes& sizes, int64_t query) const {
        return sizes.causal ? query + keys - queries + sizes.own_key : keys;
    }
};

// Up to kColumns columns of a sequence and group: token and head of each, and the keys that some of them sees.
struct Tile {
    int64_t group, sharing, begin, columns, first_key, last_key;

    Tile(const Sizes& sizes, const Sequence& sequence, int64_t group, int64_t tile)
        : group(group), sharing(sizes.sharing()), begin(tile * kColumns) {
        columns = std::min(kColumns, sequence.queries * sharing - begin);
        first_key = sequence.first(sizes, token(0));
        last_key = sequence.last(sizes, token(columns - 1));
    }
    int64_t token(int64_t column) const { return (begin + column) / sharing; }
    int64_t head(int64_t column) const { return group * sharing + (begin + column) % sharing; }
    // Calls f(column, head) for columns from one to another.
    template <class F>
    void each_head(int64_t from, int64_t to, F f) const {
        int64_t among = (begin + from) % sharing;
        for (int64_t c = from; c < to; ++c) {
            f(c, group * sharing + among);
            if (++among == sharing) among = 0;
        }
    }
    template <class T>
    const T* at(const Heads<T>& heads, const Sequence& sequence, int64_t column) const {
        return heads.at(sequence.query.later(token(column)), head(column));
    }
    // Where the column stands in a contiguous [tokens, heads].
    int64_t place(const Sizes& sizes, const Sequence& sequence, int64_t column) const {
        return (sequence.query.token + token(column)) * sizes.heads + head(column);
    }
};

inline int64_t tiles_of(const Sizes& sizes, const Sequence& sequence) {
    return (sequence.queries * sizes.sharing() + kColumns - 1) / kColumns;
}

// What the columns of a tile see of the keys from `key` on.
template <class A>
void look(const Sizes& sizes, const Sequence& sequence, const Tile& tile, int64_t key, Seen<A>& seen) {
    const int64_t count = std::min(kTileKeys, tile.last_key - key);
    const bool from_first = sequence.first(sizes, tile.token(tile.columns - 1)) <= key;
    if (from_first && key + count <= sequence.last(sizes, tile.token(0))) return seen.set_whole(tile.columns, count);
    seen.set(
        tile.columns, count, [&](int64_t c) { return sequence.first(sizes, tile.token(c)) - key; },
        [&](int64_t c) { return sequence.last(sizes, tile.token(c)) - key - 1; });
}

struct TileTask {
    int64_t sequence, group, tile;
};

inline std::vector<TileTask> tile_tasks(const Sizes& sizes) {
    std::vector<TileTask> tasks;
    for (int64_t s = 0; s < sizes.sequences; ++s) {
        const int64_t tiles = tiles_of(sizes, Sequence(sizes, s));
        for (int64_t g = 0; g < sizes.groups; ++g)
            for (int64_t t = 0; t < tiles; ++t) tasks.push_back({s, g, tiles - 1 - t});  // those with most keys first
    }
    return tasks;
}

inline int threads_for(const Sizes& sizes, int num_threads) {
    const int64_t seen = sizes.window ? std::min(sizes.window, sizes.keys) : sizes.keys;
    const double scores = static_cast<double>(sizes.query_tokens()) * sizes.heads * seen;
    return scores * (sizes.key_width + sizes.value_width) > kSmallWork ? num_threads : 1;
}

// Some tiles of one sequence and group, and the keys that they see.
struct TilesPart {
    int64_t first, last;
    KeyPart keys;
};

inline std::vector<TilesPart> cut(const Sizes& sizes, int64_t tiles_a_part) {
    std::vector<TilesPart> parts;
    int64_t rows = 0;
    for (int64_t s = 0; s < sizes.sequences; ++s) {
        const Sequence sequence(sizes, s);
        const int64_t tiles = tiles_of(sizes, sequence);
        for (int64_t g = 0; g < sizes.groups; ++g)
            for (int64_t t = 0; t < tiles; t += tiles_a_part) {
                const int64_t end = std::min(t + tiles_a_part, tiles), first = Tile(sizes, sequence, g, t).first_key;
                const int64_t last = std::max(first, Tile(sizes, sequence, g, end - 1).last_key);
                parts.push_back({t, end, {s, g, first, last, rows}});
                rows = parts.back().keys.end();
            }
    }
    return parts;
}

// As many parts as are wanted, if their sums take no more memory than twice the keys and once the queries.
inline std::vector<TilesPart> cut(const Sizes& sizes) {
    int64_t tiles = 0;
    for (int64_t s = 0; s < sizes.sequences; ++s) tiles += tiles_of(sizes, Sequence(sizes, s)) * sizes.groups;
    const int64_t most = 2 * sizes.key_tokens() * sizes.groups + sizes.query_tokens() * sizes.heads;
    for (int64_t tiles_a_part = std::max<int64_t>((tiles + kParts - 1) / kParts, 1);; tiles_a_part *= 2) {
        std::vector<TilesPart> parts = cut(sizes, tiles_a_part);
        if (parts.empty() || parts.back().keys.end() <= most || tiles_a_part >= tiles) return parts;
    }
}

// The parts of a backward pass, and the keys of every sequence.
struct BackwardParts {
    std::vector<TilesPart> parts;
    std::vector<KeyPart> keys;
    std::vector<KeySpan> spans;

    explicit BackwardParts(const Sizes& sizes) : parts(cut(sizes)) {
        for (const TilesPart& part : parts) keys.push_back(part.keys);
        for (int64_t s = 0; s < sizes.sequences; ++s) {
            const Sequence sequence(sizes, s);
            spans.push_back({sequence.key.token, 0, sequence.keys});
        }
    }
};

// Calls f(part, sequence, its sums, scratch) for each part, those with most keys first, and adds the parts' sums up
// to dk, times ln(2) as scores are of base 2, and dv.
template <class T, class LayOut, class F>
void over_parts(const Sizes& sizes, const BackwardParts& all, int threads, T* dk, T* dv, LayOut lay_out, F f) {
    using A = Acc<T>;
    const KeySums<T> of_keys(all.keys, sizes.key_width), of_values(all.keys, sizes.value_width);
    run_parallel<A>(all.parts.size(), threads, lay_out, [&](int64_t t, auto& scratch) {
        const TilesPart& part = all.parts[all.parts.size() - 1 - t];
        const Sequence sequence(sizes, part.keys.span);
        const PartSums<A> sums{of_keys.start(part.keys), of_values.start(part.keys), of_keys.stride(),
                               of_values.stride(), part.keys.first_key};
        f(part, sequence, sums, scratch);
    });
    of_keys.add_up(all.spans, sizes.groups, A(kLn2), dk, threads);
    of_values.add_up(all.spans, sizes.groups, A(1), dv, threads);
}

// A tile's gradients of queries, of which q was loaded times `factor`.
template <class T>
void write_query_gradients(const Sizes& sizes, const Sequence& sequence, const Tile& tile, const Acc<T>* dq,
                           Acc<T> factor, T* to) {
    using A = Acc<T>;
    for (int64_t c = 0; c < tile.columns; ++c)
        unpack(1, sizes.key_width, dq + c * padded<A>(sizes.key_width), 0, factor * A(kLn2),
               to + tile.place(sizes, sequence, c) * sizes.key_width, 0);
}

// All sizes can be counted, and a window is no longer than the keys.
inline bool valid(Sizes& sizes, int num_threads) {
    constexpr int64_t kPadding = 64;  // of widths to vectors, and of sequences to tiles
    if (num_threads < 1 || sizes.groups < 1 || sizes.heads % sizes.groups || sizes.window < 0 ||
        (!sizes.causal && sizes.window))
        return false;
    if (!countable({sizes.sequences, sizes.queries, sizes.heads}) ||
        !countable({sizes.sequences, sizes.keys, sizes.groups}))
        return false;
    if (!countable({sizes.key_width, sizes.value_width}) ||
        (sizes.offsets && (sizes.queries != sizes.keys || sizes.key_start)))
        return false;
    const int64_t rows = sizes.offsets ? 1 : sizes.sequences, width = sizes.key_width + sizes.value_width + kPadding;
    sizes.window = std::min(sizes.window, std::max<int64_t>(sizes.keys, 1));
    return countable({rows, sizes.queries + kPadding, sizes.heads, width}) &&
           countable({rows, sizes.keys + kPadding, sizes.heads, kPadding}) &&
           countable({rows, sizes.keys + kPadding, sizes.groups, width}) &&
           packs(sizes.offsets, sizes.sequences, sizes.queries);
}

}  // namespace seqarch::query_tiles
