// Softmax attention over listed blocks, forward and backward. See seqarch.h for the equation and the arguments.
//
// What all lists name is sorted by block, so that a block's keys meet the queries that list it in tiles: gathered,
// scored as in softmax_tiles.h, and put back. A part of the work is some queries of one sequence and head of lists. It
// goes over its blocks in order; sums for keys are the parts', added in order. What a part is depends on the sizes
// alone, so results do not depend on the number of threads.
#include <vector>

#include "arguments.h"
#include "dtypes.h"
#include "key_gradients.h"
#include "softmax_tiles.h"

namespace {

using namespace seqarch;

constexpr int64_t kParts = 32;           // wanted for the threads of large machines
constexpr int64_t kFullTiles = 4;        // of queries per block that a part should have
constexpr int64_t kSmallWork = 1 << 18;  // fewer multiply-adds than starting the threads is worth

struct Sizes {
    const int64_t *index, *first;
    int64_t first_stride, listed, block_size, window;
    int64_t batch, queries, keys, groups, lists, heads, key_width, value_width;

    int64_t sharing() const { return heads / lists; }
    int64_t group_of(int64_t list) const { return list / (lists / groups); }
    int64_t position(int64_t query) const { return query + keys - queries; }
    int64_t start(int64_t row, int64_t query) const { return first[row * first_stride + query]; }
    const int64_t* list_of(int64_t row, int64_t query, int64_t list) const {
        return index + ((row * queries + query) * lists + list) * listed;
    }
    // The most blocks that a query meets: those listed, and those that its window reaches.
    int64_t most_blocks() const { return listed + (window ? (window + block_size - 2) / block_size + 1 : 0); }
};

// The queries [begin, end) of a row, all of one sequence whose keys begin at `first`.
struct Run {
    int64_t row, begin, end, first;
};

std::vector<Run> runs_of(const Sizes& sizes) {
    std::vector<Run> runs;
    for (int64_t row = 0; row < sizes.batch; ++row) {
        int64_t begin = 0;
        for (int64_t t = 1; t <= sizes.queries; ++t)
            if (t == sizes.queries || sizes.start(row, t) != sizes.start(row, begin)) {
                runs.push_back({row, begin, t, std::clamp<int64_t>(sizes.start(row, begin), 0, sizes.keys)});
                begin = t;
            }
        if (sizes.queries == 0) runs.push_back({row, 0, 0, 0});
    }
    return runs;
}

// The keys of each run, and those before it: together all keys.
std::vector<KeySpan> spans_of(const Sizes& sizes, const std::vector<Run>& runs) {
    std::vector<KeySpan> spans;
    for (size_t r = 0; r < runs.size(); ++r) {
        const bool opens = r == 0 || runs[r - 1].row != runs[r].row;
        const bool closes = r + 1 == runs.size() || runs[r + 1].row != runs[r].row;
        spans.push_back({runs[r].row * sizes.keys, opens ? 0 : runs[r].first, closes ? sizes.keys : runs[r + 1].first});
    }
    return spans;
}

// The queries [begin, end) of a run, for one head of lists; `keys` are what they can see.
struct QueriesPart {
    int64_t row, list, begin, end;
    KeyPart keys;
    int64_t items_before, blocks_before;  // of the parts before this one

    int64_t blocks(const Sizes& sizes) const {
        return std::max<int64_t>(0, keys.last_key - keys.first_key + sizes.block_size - 1) / sizes.block_size;
    }
    // Its columns: each query, and of each the heads that share the list.
    int64_t columns(const Sizes& sizes) const { return (end - begin) * sizes.sharing(); }
    int64_t head(const Sizes& sizes, int64_t column) const { return list * sizes.sharing() + column % sizes.sharing(); }
    Row token(const Sizes& sizes, int64_t column) const {
        const int64_t query = begin + column / sizes.sharing();
        return {row, query, row * sizes.queries + query};
    }
    // Where a column stands in a contiguous [tokens, heads].
    int64_t place(const Sizes& sizes, int64_t column) const {
        return token(sizes, column).token * sizes.heads + head(sizes, column);
    }
};

std::vector<QueriesPart> cut(const Sizes& sizes, const std::vector<Run>& runs, int64_t queries) {
    std::vector<QueriesPart> parts;
    int64_t rows = 0, items = 0, blocks = 0;
    for (size_t r = 0; r < runs.size(); ++r)
        for (int64_t list = 0; list < sizes.lists; ++list)
            for (int64_t t = runs[r].begin; t < runs[r].end; t += queries) {
                const int64_t end = std::min(t + queries, runs[r].end);
                const int64_t last = std::max(sizes.position(end - 1) + 1, runs[r].first);
                const KeyPart keys{static_cast<int64_t>(r), sizes.group_of(list), runs[r].first, last, rows};
                parts.push_back({runs[r].row, list, t, end, keys, items, blocks});
                rows = parts.back().keys.end();
                items += (end - t) * sizes.most_blocks();
                blocks += parts.back().blocks(sizes) + 1;
            }
    return parts;
}

// As many parts as are wanted, if each has enough queries for full tiles, and their sums take no more memory than twice
// the keys and once the queries.
std::vector<QueriesPart> cut(const Sizes& sizes, const std::vector<Run>& runs) {
    const int64_t most = 2 * sizes.batch * sizes.keys * sizes.groups + sizes.batch * sizes.queries * sizes.heads;
    const int64_t blocks = (sizes.keys + sizes.block_size - 1) / sizes.block_size,
                  rows = sizes.batch * sizes.queries * sizes.lists;
    const int64_t full = kFullTiles * kColumns * blocks / std::max<int64_t>(1, sizes.most_blocks() * sizes.sharing());
    for (int64_t queries = std::max({full, rows / kParts, int64_t{1}});; queries *= 2) {
        std::vector<QueriesPart> parts = cut(sizes, runs, queries);
        if (parts.empty() || parts.back().keys.end() <= most || queries >= sizes.queries) return parts;
    }
}

int threads_for(const Sizes& sizes, int num_threads) {
    const double seen = std::min<double>(static_cast<double>(sizes.most_blocks()) * sizes.block_size, sizes.keys);
    const double scores = static_cast<double>(sizes.batch * sizes.queries) * sizes.heads * seen;
    return scores * (sizes.key_width + sizes.value_width) > kSmallWork ? num_threads : 1;
}

// A query, counted from the first of its part, that meets a block: it lists it, or its window alone reaches it.
struct Item {
    uint32_t bits;
    int64_t query() const { return bits >> 1; }
    bool near() const { return bits & 1; }
};

// The queries that meet each block: of block b of a part, counted from the part's first key, the items
// [starts[b], starts[b + 1]).
class Sorted {
  public:
    Sorted(const Sizes& sizes, const std::vector<QueriesPart>& parts, int num_threads)
        : items_(parts.empty() ? 0 : parts.back().items_before + most_items(sizes, parts.back())),
          starts_(parts.empty() ? 0 : parts.back().blocks_before + parts.back().blocks(sizes) + 1) {
        int64_t blocks = 0;
        for (const QueriesPart& part : parts) blocks = std::max(blocks, part.blocks(sizes));
        run_parallel<int64_t>(
            parts.size(), num_threads, [&](Arena<int64_t>& arena) { return arena.take_unwritten(blocks); },
            [&](int64_t p, int64_t* met) {
                sort(sizes, parts[p], items_ + parts[p].items_before, starts_ + parts[p].blocks_before, met);
            });
    }
    const Item* items(const QueriesPart& part) const { return items_ + part.items_before; }
    const int64_t* starts(const QueriesPart& part) const { return starts_ + part.blocks_before; }

  private:
    static int64_t most_items(const Sizes& sizes, const QueriesPart& part) {
        return (part.end - part.begin) * sizes.most_blocks();
    }
    // Calls f(block, item) once for each block that a query meets, from the last query to the first; met[block] is the
    // last query that did.
    template <class F>
    static void each_item(const Sizes& sizes, const QueriesPart& part, int64_t* met, F f) {
        std::fill_n(met, part.blocks(sizes), -1);
        for (int64_t t = part.end; t-- > part.begin;) {
            const int64_t at = sizes.position(t) - part.keys.first_key, *list = sizes.list_of(part.row, t, part.list);
            if (at < 0) continue;
            const int64_t own = at / sizes.block_size;
            const auto meet = [&](int64_t block, bool near) {
                if (block < 0 || block > own || met[block] == t) return;
                met[block] = t;
                f(block, Item{static_cast<uint32_t>((t - part.begin) << 1 | near)});
            };
            for (int64_t e = 0; e < sizes.listed; ++e) meet(list[e], false);
            for (int64_t b = std::max<int64_t>(at - sizes.window + 1, 0) / sizes.block_size; sizes.window && b <= own;
                 ++b)
                meet(b, true);
        }
    }
    static void sort(const Sizes& sizes, const QueriesPart& part, Item* items, int64_t* starts, int64_t* met) {
        const int64_t blocks = part.blocks(sizes);
        std::fill_n(starts, blocks + 1, 0);
        each_item(sizes, part, met, [&](int64_t block, Item) { ++starts[block]; });
        for (int64_t b = 0, sum = 0; b <= blocks; ++b) starts[b] = sum += starts[b];  // where each block's items end
        each_item(sizes, part, met, [&](int64_t block, Item item) { items[--starts[block]] = item; });
    }
    Buffer<Item> items_;
    Buffer<int64_t> starts_;
};

template <class T>
struct Inputs {
    Sizes sizes;
    Heads<T> q, k, v;
    Acc<T> factor;  // the scale, times log2(e)
    int num_threads;
};

// Columns of a part that meet one block, and the keys of the block that each sees.
struct Gathered {
    int64_t count = 0;
    int64_t column[kColumns], first[kColumns], last[kColumns];

    void gather(const Sizes& sizes, const QueriesPart& part, const Item* items, int64_t begin, int64_t end, int64_t key,
                int64_t block_end) {
        const int64_t sharing = sizes.sharing();
        count = std::min(kColumns, end - begin);
        for (int64_t c = 0; c < count; ++c) {
            const Item item = items[(begin + c) / sharing];
            const int64_t at = sizes.position(part.begin + item.query());
            column[c] = item.query() * sharing + (begin + c) % sharing;
            first[c] = item.near() ? std::max(key, at - sizes.window + 1) : key;
            last[c] = std::min(at + 1, block_end) - 1;
        }
    }
    template <class A>
    void look(int64_t key, int64_t keys, Seen<A>& seen) const {
        const bool whole = *std::max_element(first, first + count) <= key &&
                           *std::min_element(last, last + count) >= key + keys - 1;
        if (whole) return seen.set_whole(count, keys);
        seen.set(count, keys, [&](int64_t c) { return first[c] - key; }, [&](int64_t c) { return last[c] - key; });
    }
};

// `q` holds all queries of a part, times the factor: side by side they are gathered faster than from the heads' rows.
template <class A>
struct Scratch {
    Columns<A> columns;
    Keys<A> keys;
    Seen<A> seen;
    Gathered gathered;
    A* q;

    Scratch(const Sizes& sizes, int64_t part_columns, Arena<A>& arena)
        : columns(sizes.key_width, sizes.value_width, arena),
          keys(sizes.key_width, sizes.value_width, arena),
          q(arena.take_unwritten(part_columns * padded<A>(sizes.key_width))) {}
};

// All columns of a part from the heads' rows.
template <class T>
void load_part(const Sizes& sizes, const QueriesPart& part, const Heads<T>& from, int64_t width, Acc<T> factor,
               Acc<T>* to) {
    for (int64_t c = 0; c < part.columns(sizes); ++c)
        pack(1, width, from.at(part.token(sizes, c), part.head(sizes, c)), 0, factor, to + c * padded<Acc<T>>(width),
             padded<Acc<T>>(width));
}

// Calls start() when some columns of a part are gathered, each(key) for each tile of the keys of their block, loaded
// from that key on, then finish().
template <class T, class Start, class Each, class Finish>
void each_tile(const Inputs<T>& in, const QueriesPart& part, const Sorted& sorted, Scratch<Acc<T>>& s, Start start,
               Each each, Finish finish) {
    const Sizes& sizes = in.sizes;
    const int64_t *starts = sorted.starts(part), row = padded<Acc<T>>(sizes.key_width);
    load_part(sizes, part, in.q, sizes.key_width, in.factor, s.q);
    for (int64_t b = 0; b < part.blocks(sizes); ++b) {
        const int64_t block = part.keys.first_key + b * sizes.block_size;
        const int64_t block_end = std::min(block + sizes.block_size, part.keys.last_key);
        const int64_t columns = (starts[b + 1] - starts[b]) * sizes.sharing();
        for (int64_t c = 0, loaded = -1; c < columns; c += kColumns) {
            s.gathered.gather(sizes, part, sorted.items(part) + starts[b], c, columns, block, block_end);
            s.columns.load(s.gathered.count, Acc<T>(1), [&](int64_t c) { return s.q + s.gathered.column[c] * row; });
            start();
            for (int64_t key = block; key < block_end; key += kTileKeys) {
                const int64_t count = std::min(kTileKeys, block_end - key), group = part.keys.group;
                const Row at{part.row, key, part.row * sizes.keys + key};
                if (loaded != key) s.keys.load(count, in.k.at(at, group), in.k.time, in.v.at(at, group), in.v.time);
                loaded = key;
                s.gathered.look(key, count, s.seen);
                each(key);
            }
            finish();
        }
    }
}

// What forward carries from block to block, for all columns of a part.
template <class A>
struct ForwardScratch : Scratch<A> {
    A *o, *row_max, *total;
    ForwardScratch(const Sizes& sizes, int64_t columns, Arena<A>& arena)
        : Scratch<A>(sizes, columns, arena),
          o(arena.take(columns * padded<A>(sizes.value_width))),
          row_max(arena.take(columns)),
          total(arena.take(columns)) {}
};

template <class T>
void forward_part(const Inputs<T>& in, const QueriesPart& part, const Sorted& sorted, T* o, Acc<T>* log_sum,
                  ForwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    const int64_t row = padded<A>(sizes.value_width), count = part.columns(sizes);
    std::fill_n(s.o, count * row, A(0));
    std::fill_n(s.row_max, count, std::numeric_limits<A>::lowest());
    std::fill_n(s.total, count, A(0));
    const auto load = [&] {
        s.columns.start();
        for (int64_t c = 0; c < s.gathered.count; ++c) s.columns.load_sums(c, s, s.gathered.column[c]);
    };
    const auto save = [&] {
        for (int64_t c = 0; c < s.gathered.count; ++c) s.columns.save_sums(c, s, s.gathered.column[c]);
    };
    each_tile(in, part, sorted, s, load, [&](int64_t) { attend(s.seen, s.keys, s.columns); }, save);
    for (int64_t c = 0; c < count; ++c) {
        const int64_t place = part.place(sizes, c);
        write_outputs(sizes.value_width, s.o + c * row, s.total[c], o + place * sizes.value_width);
        log_sum[place] = log_of(s.row_max[c], s.total[c]);
    }
}

int64_t most_columns(const Sizes& sizes, const std::vector<QueriesPart>& parts) {
    int64_t most = 0;
    for (const QueriesPart& part : parts) most = std::max(most, part.columns(sizes));
    return most;
}

template <class T>
void forward(const Inputs<T>& in, T* o, Acc<T>* log_sum) {
    using A = Acc<T>;
    const std::vector<QueriesPart> parts = cut(in.sizes, runs_of(in.sizes));
    const int threads = threads_for(in.sizes, in.num_threads);
    const Sorted sorted(in.sizes, parts, threads);
    const int64_t columns = most_columns(in.sizes, parts);
    run_parallel<A>(
        parts.size(), threads, [&](Arena<A>& arena) { return ForwardScratch<A>(in.sizes, columns, arena); },
        [&](int64_t p, ForwardScratch<A>& scratch) {
            forward_part(in, parts[parts.size() - 1 - p], sorted, o, log_sum, scratch);
        });
}

template <class T>
struct Gradients {
    Heads<T> o, dout;
    const Acc<T>*log_sum, *dlse;
    T *dq, *dk, *dv;
};

// For all columns of a part: the gradients of their queries and outputs, and the products of o and its gradient.
template <class A>
struct BackwardScratch : Scratch<A> {
    ColumnGradients<A> gradients;
    A *dq, *dout, *delta;
    BackwardScratch(const Sizes& sizes, int64_t columns, Arena<A>& arena)
        : Scratch<A>(sizes, columns, arena),
          gradients(sizes.key_width, sizes.value_width, arena),
          dq(arena.take(columns * padded<A>(sizes.key_width))),
          dout(arena.take_unwritten(columns * padded<A>(sizes.value_width))),
          delta(arena.take(columns)) {}
};

template <class T>
void backward_part(const Inputs<T>& in, const Gradients<T>& g, const QueriesPart& part, const Sorted& sorted,
                   const PartSums<Acc<T>>& sums, BackwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    const int64_t row = padded<A>(sizes.key_width), values_row = padded<A>(sizes.value_width),
                  count = part.columns(sizes);
    std::fill_n(s.dq, count * row, A(0));
    load_part(sizes, part, g.dout, sizes.value_width, A(1), s.dout);
    for (int64_t c = 0; c < count; ++c) {
        s.delta[c] =
            product(sizes.value_width, g.o.at(part.token(sizes, c), part.head(sizes, c)), s.dout + c * values_row);
        if (g.dlse) s.delta[c] -= g.dlse[part.place(sizes, c)];
    }
    const Gathered& gathered = s.gathered;
    const auto load = [&] {
        s.gradients.load(
            s.columns, [&](int64_t c) { return s.dout + gathered.column[c] * values_row; },
            [&](int64_t c) { return s.delta[gathered.column[c]]; },
            [&](int64_t c) { return g.log_sum[part.place(sizes, gathered.column[c])]; });
    };
    const auto add = [&] {
        for (int64_t c = 0; c < gathered.count; ++c)
            add_row(row, s.gradients.dq + c * row, s.dq + gathered.column[c] * row);
    };
    const auto each = [&](int64_t key) {
        attend_backward(s.seen, s.keys, s.columns, s.gradients, sums.dk(key), sums.dv(key));
    };
    each_tile(in, part, sorted, s, load, each, add);
    for (int64_t c = 0; c < count; ++c)
        unpack(1, sizes.key_width, s.dq + c * row, 0, in.factor * A(kLn2),
               g.dq + part.place(sizes, c) * sizes.key_width, 0);
}

template <class T>
void backward(const Inputs<T>& in, const Gradients<T>& g) {
    using A = Acc<T>;
    const Sizes& sizes = in.sizes;
    const std::vector<Run> runs = runs_of(sizes);
    const std::vector<QueriesPart> parts = cut(sizes, runs);
    std::vector<KeyPart> key_parts;
    for (const QueriesPart& part : parts) key_parts.push_back(part.keys);
    const KeySums<T> dk(key_parts, sizes.key_width), dv(key_parts, sizes.value_width);
    const int threads = threads_for(sizes, in.num_threads);
    const Sorted sorted(sizes, parts, threads);
    const int64_t columns = most_columns(sizes, parts);
    run_parallel<A>(
        parts.size(), threads, [&](Arena<A>& arena) { return BackwardScratch<A>(sizes, columns, arena); },
        [&](int64_t p, BackwardScratch<A>& scratch) {
            const QueriesPart& part = parts[parts.size() - 1 - p];
            const PartSums<A> sums{dk.start(part.keys), dv.start(part.keys), dk.stride(), dv.stride(),
                                   part.keys.first_key};
            backward_part(in, g, part, sorted, sums, scratch);
        });
    const std::vector<KeySpan> spans = spans_of(sizes, runs);
    dk.add_up(spans, sizes.groups, A(kLn2), g.dk, threads);
    dv.add_up(spans, sizes.groups, A(1), g.dv, threads);
}

// All sizes can be counted, and neither a window nor a block is longer than the keys.
bool valid(Sizes& sizes, int num_threads) {
    constexpr int64_t kPadding = 64;  // of widths to vectors, and of sequences to tiles
    if (num_threads < 1 || sizes.groups < 1 || sizes.lists < 1 || sizes.lists % sizes.groups ||
        sizes.heads % sizes.lists)
        return false;
    if (sizes.block_size < 1 || sizes.window < 0 || sizes.queries >= int64_t{1} << 31 || sizes.first_stride < 0)
        return false;
    if (!countable({sizes.batch, sizes.keys, sizes.groups}) || !countable({sizes.key_width, sizes.value_width}))
        return false;
    sizes.window = std::min(sizes.window, std::max<int64_t>(sizes.keys, 1));
    sizes.block_size = std::min(sizes.block_size, std::max<int64_t>(sizes.keys, 1));
    const int64_t width = sizes.key_width + sizes.value_width + kPadding;
    return countable({sizes.batch, sizes.queries, sizes.lists, sizes.listed}) &&
           countable({sizes.batch, sizes.queries, sizes.lists, sizes.most_blocks()}) &&
           countable({sizes.batch, sizes.queries + kPadding, sizes.heads, width}) &&
           countable({sizes.batch, sizes.keys + kPadding, sizes.groups, width});
}

Sizes sizes_of(const seqarch_block_sparse_attention_inputs& in) {
    return {in.index, in.first, in.first_stride, in.listed, in.block_size, in.window, in.batch,
            in.queries, in.keys, in.groups, in.lists, in.heads, in.key_width, in.value_width};
}

template <class T>
Inputs<T> inputs_of(const Sizes& sizes, const seqarch_block_sparse_attention_inputs& in, int num_threads) {
    return {sizes, Heads<T>(in.q), Heads<T>(in.k), Heads<T>(in.v), static_cast<Acc<T>>(in.scale * kLog2E), num_threads};
}

}  // namespace

int32_t seqarch_block_sparse_attention_forward(const seqarch_block_sparse_attention_inputs* inputs,
                                               const seqarch_attention_outputs* outputs, int32_t num_threads) {
    Sizes sizes = sizes_of(*inputs);
    if (!valid(sizes, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(inputs_of<T>(sizes, *inputs, num_threads), static_cast<T*>(outputs->o),
                static_cast<Acc<T>*>(outputs->log_sum));
    });
}

int32_t seqarch_block_sparse_attention_backward(const seqarch_block_sparse_attention_inputs* inputs,
                                                const seqarch_attention_gradients* gradients, int32_t num_threads) {
    Sizes sizes = sizes_of(*inputs);
    if (!valid(sizes, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(inputs->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto& g = *gradients;
        backward(inputs_of<T>(sizes, *inputs, num_threads),
                 Gradients<T>{Heads<T>(g.o), Heads<T>(g.dout), static_cast<const Acc<T>*>(g.log_sum),
                              static_cast<const Acc<T>*>(g.dlse), static_cast<T*>(g.dq), static_cast<T*>(g.dk),
                              static_cast<T*>(g.dv)});
    });
}
