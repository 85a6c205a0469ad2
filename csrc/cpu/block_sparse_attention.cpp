// Softmax attention over listed blocks, forward and backward. See seqarch.h for the equation and the arguments.
//
// What all lists name is sorted by block, so that a block's keys meet the queries that list it in tiles: gathered,
// scored as in softmax_tiles.h, and put back. A part of the work is some queries of one sequence and head of lists. It
// goes over its blocks in order; sums for keys are the parts', added in order. What a part is depends on the sizes alone,
// so results do not depend on the number of threads.
#include <vector>

#include "arguments.h"
#include "dtypes.h"
#include "key_sums.h"
#include "softmax_tiles.h"

namespace {

using namespace seqarch;

constexpr int64_t kParts = 32;           // wanted for the threads of large machines
constexpr int64_t kFullTiles = 4;        // of queries a block that a part should have
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

std::vector<Run> runs_of(const Sizes& z) {
    std::vector<Run> runs;
    for (int64_t row = 0; row < z.batch; ++row) {
        int64_t begin = 0;
        for (int64_t t = 1; t <= z.queries; ++t)
            if (t == z.queries || z.start(row, t) != z.start(row, begin)) {
                runs.push_back({row, begin, t, std::clamp<int64_t>(z.start(row, begin), 0, z.keys)});
                begin = t;
            }
        if (z.queries == 0) runs.push_back({row, 0, 0, 0});
    }
    return runs;
}

// The keys of each run, and those before it: together all keys.
std::vector<KeySpan> spans_of(const Sizes& z, const std::vector<Run>& runs) {
    std::vector<KeySpan> spans;
    for (size_t r = 0; r < runs.size(); ++r) {
        const bool opens = r == 0 || runs[r - 1].row != runs[r].row;
        const bool closes = r + 1 == runs.size() || runs[r + 1].row != runs[r].row;
        spans.push_back({runs[r].row * z.keys, opens ? 0 : runs[r].first, closes ? z.keys : runs[r + 1].first});
    }
    return spans;
}

// The queries [begin, end) of a run, for one head of lists; `keys` are what they can see.
struct QueriesPart {
    int64_t row, list, begin, end;
    KeyPart keys;
    int64_t items_before, blocks_before;  // of the parts before this one

    int64_t blocks(const Sizes& z) const {
        return std::max<int64_t>(0, keys.last_key - keys.first_key + z.block_size - 1) / z.block_size;
    }
    // Its columns: each query, and of each the heads that share the list.
    int64_t columns(const Sizes& z) const { return (end - begin) * z.sharing(); }
    int64_t head(const Sizes& z, int64_t column) const { return list * z.sharing() + column % z.sharing(); }
    Row token(const Sizes& z, int64_t column) const {
        const int64_t query = begin + column / z.sharing();
        return {row, query, row * z.queries + query};
    }
    // Where a column stands in a contiguous [tokens, heads].
    int64_t place(const Sizes& z, int64_t column) const { return token(z, column).token * z.heads + head(z, column); }
};

std::vector<QueriesPart> cut(const Sizes& z, const std::vector<Run>& runs, int64_t queries) {
    std::vector<QueriesPart> parts;
    int64_t rows = 0, items = 0, blocks = 0;
    for (size_t r = 0; r < runs.size(); ++r)
        for (int64_t list = 0; list < z.lists; ++list)
            for (int64_t t = runs[r].begin; t < runs[r].end; t += queries) {
                const int64_t end = std::min(t + queries, runs[r].end);
                const int64_t last = std::max(z.position(end - 1) + 1, runs[r].first);
                const KeyPart keys{static_cast<int64_t>(r), z.group_of(list), runs[r].first, last, rows};
                parts.push_back({runs[r].row, list, t, end, keys, items, blocks});
                rows = parts.back().keys.end();
                items += (end - t) * z.most_blocks();
                blocks += parts.back().blocks(z) + 1;
            }
    return parts;
}

// As many parts as are wanted, if each has enough queries for full tiles, and their sums take no more memory than twice
// the keys and once the queries.
std::vector<QueriesPart> cut(const Sizes& z, const std::vector<Run>& runs) {
    const int64_t most = 2 * z.batch * z.keys * z.groups + z.batch * z.queries * z.heads;
    const int64_t blocks = (z.keys + z.block_size - 1) / z.block_size, rows = z.batch * z.queries * z.lists;
    const int64_t full = kFullTiles * kColumns * blocks / std::max<int64_t>(1, z.most_blocks() * z.sharing());
    for (int64_t queries = std::max({full, rows / kParts, int64_t{1}});; queries *= 2) {
        std::vector<QueriesPart> parts = cut(z, runs, queries);
        if (parts.empty() || parts.back().keys.end() <= most || queries >= z.queries) return parts;
    }
}

int threads_for(const Sizes& z, int num_threads) {
    const double seen = std::min<double>(static_cast<double>(z.most_blocks()) * z.block_size, z.keys);
    const double pairs = static_cast<double>(z.batch * z.queries) * z.heads * seen;
    return pairs * (z.key_width + z.value_width) > kSmallWork ? num_threads : 1;
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
    Sorted(const Sizes& z, const std::vector<QueriesPart>& parts, int num_threads)
        : items_(parts.empty() ? 0 : parts.back().items_before + most_items(z, parts.back())),
          starts_(parts.empty() ? 0 : parts.back().blocks_before + parts.back().blocks(z) + 1) {
        int64_t blocks = 0;
        for (const QueriesPart& part : parts) blocks = std::max(blocks, part.blocks(z));
        run_parallel<int64_t>(
            parts.size(), num_threads, [&](Arena<int64_t>& arena) { return arena.take_unwritten(blocks); },
            [&](int64_t p, int64_t* met) {
                sort(z, parts[p], items_ + parts[p].items_before, starts_ + parts[p].blocks_before, met);
            });
    }
    const Item* items(const QueriesPart& part) const { return items_ + part.items_before; }
    const int64_t* starts(const QueriesPart& part) const { return starts_ + part.blocks_before; }

  private:
    static int64_t most_items(const Sizes& z, const QueriesPart& part) {
        return (part.end - part.begin) * z.most_blocks();
    }
    // Calls f(block, item) once for each block that a query meets, from the last query to the first; met[block] is the
    // last query that did.
    template <class F>
    static void each_item(const Sizes& z, const QueriesPart& part, int64_t* met, F f) {
        std::fill_n(met, part.blocks(z), -1);
        for (int64_t t = part.end; t-- > part.begin;) {
            const int64_t at = z.position(t) - part.keys.first_key, *list = z.list_of(part.row, t, part.list);
            if (at < 0) continue;
            const int64_t own = at / z.block_size;
            const auto meet = [&](int64_t block, bool near) {
                if (block < 0 || block > own || met[block] == t) return;
                met[block] = t;
                f(block, Item{static_cast<uint32_t>((t - part.begin) << 1 | near)});
            };
            for (int64_t e = 0; e < z.listed; ++e) meet(list[e], false);
            for (int64_t b = std::max<int64_t>(at - z.window + 1, 0) / z.block_size; z.window && b <= own; ++b)
                meet(b, true);
        }
    }
    static void sort(const Sizes& z, const QueriesPart& part, Item* items, int64_t* starts, int64_t* met) {
        const int64_t blocks = part.blocks(z);
        std::fill_n(starts, blocks + 1, 0);
        each_item(z, part, met, [&](int64_t block, Item) { ++starts[block]; });
        for (int64_t b = 0, sum = 0; b <= blocks; ++b) starts[b] = sum += starts[b];  // where each block's items end
        each_item(z, part, met, [&](int64_t block, Item item) { items[--starts[block]] = item; });
    }
    Buffer<Item> items_;
    Buffer<int64_t> starts_;
};

template <class T>
struct Inputs {
    Sizes z;
    Heads<T> q, k, v;
    Acc<T> factor;  // the scale, times log2(e)
    int num_threads;
};

// Columns of a part that meet one block, and the keys of the block that each sees.
struct Gathered {
    int64_t count = 0;
    int64_t column[kColumns], first[kColumns], last[kColumns];

    void gather(const Sizes& z, const QueriesPart& part, const Item* items, int64_t begin, int64_t end, int64_t key,
                int64_t block_end) {
        const int64_t sharing = z.sharing();
        count = std::min(kColumns, end - begin);
        for (int64_t c = 0; c < count; ++c) {
            const Item item = items[(begin + c) / sharing];
            const int64_t at = z.position(part.begin + item.query());
            column[c] = item.query() * sharing + (begin + c) % sharing;
            first[c] = item.near() ? std::max(key, at - z.window + 1) : key;
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

    Scratch(const Sizes& z, int64_t part_columns, Arena<A>& arena)
        : columns(z.key_width, z.value_width, arena),
          keys(z.key_width, z.value_width, arena),
          q(arena.take_unwritten(part_columns * padded<A>(z.key_width))) {}
};

// All columns of a part from the heads' rows.
template <class T>
void load_part(const Sizes& z, const QueriesPart& part, const Heads<T>& from, int64_t width, Acc<T> factor, Acc<T>* to) {
    for (int64_t c = 0; c < part.columns(z); ++c)
        pack(1, width, from.at(part.token(z, c), part.head(z, c)), 0, factor, to + c * padded<Acc<T>>(width),
             padded<Acc<T>>(width));
}

// Calls start() when some columns of a part are gathered, each(key) for each tile of the keys of their block, loaded from
// that key on, then finish().
template <class T, class Start, class Each, class Finish>
void each_tile(const Inputs<T>& in, const QueriesPart& part, const Sorted& sorted, Scratch<Acc<T>>& s, Start start,
               Each each, Finish finish) {
    const Sizes& z = in.z;
    const int64_t *starts = sorted.starts(part), row = padded<Acc<T>>(z.key_width);
    load_part(z, part, in.q, z.key_width, in.factor, s.q);
    for (int64_t b = 0; b < part.blocks(z); ++b) {
        const int64_t block = part.keys.first_key + b * z.block_size;
        const int64_t block_end = std::min(block + z.block_size, part.keys.last_key);
        const int64_t columns = (starts[b + 1] - starts[b]) * z.sharing();
        for (int64_t c = 0, loaded = -1; c < columns; c += kColumns) {
            s.gathered.gather(z, part, sorted.items(part) + starts[b], c, columns, block, block_end);
            s.columns.load(s.gathered.count, Acc<T>(1), [&](int64_t c) { return s.q + s.gathered.column[c] * row; });
            start();
            for (int64_t key = block; key < block_end; key += kTileKeys) {
                const int64_t count = std::min(kTileKeys, block_end - key), group = part.keys.group;
                const Row at{part.row, key, part.row * z.keys + key};
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
    A *o, *largest, *total;
    ForwardScratch(const Sizes& z, int64_t columns, Arena<A>& arena)
        : Scratch<A>(z, columns, arena),
          o(arena.take(columns * padded<A>(z.value_width))),
          largest(arena.take(columns)),
          total(arena.take(columns)) {}
};

template <class T>
void forward_part(const Inputs<T>& in, const QueriesPart& part, const Sorted& sorted, T* o, Acc<T>* log_sum,
                  ForwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& z = in.z;
    const int64_t row = padded<A>(z.value_width), count = part.columns(z);
    std::fill_n(s.o, count * row, A(0));
    std::fill_n(s.largest, count, std::numeric_limits<A>::lowest());
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
        const int64_t place = part.place(z, c);
        write_outputs(z.value_width, s.o + c * row, s.total[c], o + place * z.value_width);
        log_sum[place] = log_of(s.largest[c], s.total[c]);
    }
}

int64_t most_columns(const Sizes& z, const std::vector<QueriesPart>& parts) {
    int64_t most = 0;
    for (const QueriesPart& part : parts) most = std::max(most, part.columns(z));
    return most;
}

template <class T>
void forward(const Inputs<T>& in, T* o, Acc<T>* log_sum) {
    using A = Acc<T>;
    const std::vector<QueriesPart> parts = cut(in.z, runs_of(in.z));
    const int threads = threads_for(in.z, in.num_threads);
    const Sorted sorted(in.z, parts, threads);
    const int64_t columns = most_columns(in.z, parts);
    run_parallel<A>(
        parts.size(), threads, [&](Arena<A>& arena) { return ForwardScratch<A>(in.z, columns, arena); },
        [&](int64_t p, ForwardScratch<A>& scratch) {
            forward_part(in, parts[parts.size() - 1 - p], sorted, o, log_sum, scratch);
        });
}

template <class T>
struct Gradients {
    Heads<T> o, dout;
    const Acc<T>* log_sum;
    T *dq, *dk, *dv;
};

// For all columns of a part: the gradients of their queries and outputs, and the products of o and its gradient.
template <class A>
struct BackwardScratch : Scratch<A> {
    ColumnGradients<A> gradients;
    A *dq, *dout, *own;
    BackwardScratch(const Sizes& z, int64_t columns, Arena<A>& arena)
        : Scratch<A>(z, columns, arena),
          gradients(z.key_width, z.value_width, arena),
          dq(arena.take(columns * padded<A>(z.key_width))),
          dout(arena.take_unwritten(columns * padded<A>(z.value_width))),
          own(arena.take(columns)) {}
};

template <class T>
void backward_part(const Inputs<T>& in, const Gradients<T>& g, const QueriesPart& part, const Sorted& sorted,
                   const PartSums<Acc<T>>& sums, BackwardScratch<Acc<T>>& s) {
    using A = Acc<T>;
    const Sizes& z = in.z;
    const int64_t row = padded<A>(z.key_width), values_row = padded<A>(z.value_width), count = part.columns(z);
    std::fill_n(s.dq, count * row, A(0));
    load_part(z, part, g.dout, z.value_width, A(1), s.dout);
    for (int64_t c = 0; c < count; ++c)
        s.own[c] = product(z.value_width, g.o.at(part.token(z, c), part.head(z, c)), s.dout + c * values_row);
    const Gathered& gathered = s.gathered;
    const auto load = [&] {
        s.gradients.load(
            s.columns, [&](int64_t c) { return s.dout + gathered.column[c] * values_row; },
            [&](int64_t c) { return s.own[gathered.column[c]]; },
            [&](int64_t c) { return g.log_sum[part.place(z, gathered.column[c])]; });
    };
    const auto add = [&] {
        for (int64_t c = 0; c < gathered.count; ++c) add_row(row, s.gradients.dq + c * row, s.dq + gathered.column[c] * row);
    };
    const auto each = [&](int64_t key) {
        attend_backward(s.seen, s.keys, s.columns, s.gradients, sums.dk(key), sums.dv(key));
    };
    each_tile(in, part, sorted, s, load, each, add);
    for (int64_t c = 0; c < count; ++c)
        unpack(1, z.key_width, s.dq + c * row, 0, in.factor * A(kLn2), g.dq + part.place(z, c) * z.key_width, 0);
}

template <class T>
void backward(const Inputs<T>& in, const Gradients<T>& g) {
    using A = Acc<T>;
    const Sizes& z = in.z;
    const std::vector<Run> runs = runs_of(z);
    const std::vector<QueriesPart> parts = cut(z, runs);
    std::vector<KeyPart> key_parts;
    for (const QueriesPart& part : parts) key_parts.push_back(part.keys);
    const KeySums<T> dk(key_parts, z.key_width), dv(key_parts, z.value_width);
    const int threads = threads_for(z, in.num_threads);
    const Sorted sorted(z, parts, threads);
    const int64_t columns = most_columns(z, parts);
    run_parallel<A>(
        parts.size(), threads, [&](Arena<A>& arena) { return BackwardScratch<A>(z, columns, arena); },
        [&](int64_t p, BackwardScratch<A>& scratch) {
            const QueriesPart& part = parts[parts.size() - 1 - p];
            const PartSums<A> sums{dk.start(part.keys), dv.start(part.keys), dk.stride(), dv.stride(),
                                   part.keys.first_key};
            backward_part(in, g, part, sorted, sums, scratch);
        });
    const std::vector<KeySpan> spans = spans_of(z, runs);
    dk.add_up(spans, z.groups, A(kLn2), g.dk, threads);
    dv.add_up(spans, z.groups, A(1), g.dv, threads);
}

// All sizes can be counted, and neither a window nor a block is longer than the keys.
bool valid(Sizes& z, int num_threads) {
    constexpr int64_t kPadding = 64;  // of widths to vectors, and of sequences to tiles
    if (num_threads < 1 || z.groups < 1 || z.lists < 1 || z.lists % z.groups || z.heads % z.lists) return false;
    if (z.block_size < 1 || z.window < 0 || z.queries >= int64_t{1} << 31 || z.first_stride < 0) return false;
    if (!countable({z.batch, z.keys, z.groups}) || !countable({z.key_width, z.value_width})) return false;
    z.window = std::min(z.window, std::max<int64_t>(z.keys, 1));
    z.block_size = std::min(z.block_size, std::max<int64_t>(z.keys, 1));
    const int64_t width = z.key_width + z.value_width + kPadding;
    return countable({z.batch, z.queries, z.lists, z.listed}) &&
           countable({z.batch, z.queries, z.lists, z.most_blocks()}) &&
           countable({z.batch, z.queries + kPadding, z.heads, width}) &&
           countable({z.batch, z.keys + kPadding, z.groups, width});
}

template <class T>
Inputs<T> inputs(const Sizes& z, const seqarch_heads* q, const seqarch_heads* k, const seqarch_heads* v, double scale,
                 int32_t num_threads) {
    return {z, Heads<T>(q), Heads<T>(k), Heads<T>(v), static_cast<Acc<T>>(scale * kLog2E), num_threads};
}

}  // namespace

int32_t seqarch_block_sparse_attention_forward(
    int32_t dtype, const seqarch_heads* q, const seqarch_heads* k, const seqarch_heads* v, const int64_t* index,
    int64_t listed, const int64_t* first, int64_t first_stride, int64_t block_size, int64_t window, double scale, void* o,
    void* log_sum, int64_t batch, int64_t queries, int64_t keys, int64_t groups, int64_t lists, int64_t heads,
    int64_t key_width, int64_t value_width, int32_t num_threads) {
    Sizes z{index,   first, first_stride, listed, block_size, window,    batch,
                  queries, keys,  groups,       lists,  heads,      key_width, value_width};
    if (!valid(z, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        forward(inputs<T>(z, q, k, v, scale, num_threads), static_cast<T*>(o), static_cast<Acc<T>*>(log_sum));
    });
}

int32_t seqarch_block_sparse_attention_backward(
    int32_t dtype, const seqarch_heads* q, const seqarch_heads* k, const seqarch_heads* v, const int64_t* index,
    int64_t listed, const int64_t* first, int64_t first_stride, int64_t block_size, int64_t window, double scale,
    const seqarch_heads* o, const void* log_sum, const seqarch_heads* dout, void* dq, void* dk, void* dv, int64_t batch,
    int64_t queries, int64_t keys, int64_t groups, int64_t lists, int64_t heads, int64_t key_width, int64_t value_width,
    int32_t num_threads) {
    Sizes z{index,   first, first_stride, listed, block_size, window,    batch,
                  queries, keys,  groups,       lists,  heads,      key_width, value_width};
    if (!valid(z, num_threads)) return SEQARCH_BAD_ARGUMENT;
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        backward(inputs<T>(z, q, k, v, scale, num_threads),
                 Gradients<T>{Heads<T>(o), Heads<T>(dout), static_cast<const Acc<T>*>(log_sum), static_cast<T*>(dq),
                              static_cast<T*>(dk), static_cast<T*>(dv)});
    });
}
