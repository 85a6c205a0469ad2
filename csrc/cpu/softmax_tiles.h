// Softmax attention of a tile of queries over a tile of keys, forward and backward: what dense and listed blocks share.
//
// Queries lie along the columns of the scores [kTileKeys, kColumns], so that maxima and sums over keys are sums of
// vectors. Scores are base-2 logarithms: the queries hold the scale times log2(e). Forward is the online softmax of
// Milakov and Gimelshein 2018; backward computes the weights again from the sums' logarithms (Dao 2023,
// "FlashAttention-2", section 3.1).
#pragma once

#include <limits>

#include "heads.h"
#include "simd.h"

namespace seqarch {

constexpr int64_t kColumns = 64, kTileKeys = 64;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Which keys of a tile each column sees: those from `first` to `last`, counted from the tile's first key. By blocks of
// kTileRows it also says what of the scores matters at all.
template <class A>
struct Seen {
    alignas(64) A first[kColumns], last[kColumns];
    int64_t columns_from[kTileKeys / kTileRows], columns_to[kTileKeys / kTileRows];  // that see some key of a block
    int64_t keys_from[kColumns / kTileRows], keys_to[kColumns / kTileRows];          // that some column of a block sees
    int64_t columns = 0, keys = 0;
    bool whole = false;

    void set_whole(int64_t all_columns, int64_t all_keys) {
        columns = all_columns;
        keys = all_keys;
        whole = true;
        std::fill_n(columns_from, kTileKeys / kTileRows, 0);
        std::fill_n(columns_to, kTileKeys / kTileRows, columns);
        std::fill_n(keys_from, kColumns / kTileRows, 0);
        std::fill_n(keys_to, kColumns / kTileRows, keys);
    }
    // From the keys [first_of(c), last_of(c)] that column c sees; those outside the tile do not count.
    template <class First, class Last>
    void set(int64_t all_columns, int64_t all_keys, First first_of, Last last_of) {
        columns = all_columns;
        keys = all_keys;
        whole = false;
        std::fill_n(keys_from, kColumns / kTileRows, keys);
        std::fill_n(keys_to, kColumns / kTileRows, 0);
        std::fill_n(columns_from, kTileKeys / kTileRows, columns);
        std::fill_n(columns_to, kTileKeys / kTileRows, 0);
        for (int64_t c = 0; c < kColumns; ++c) {
            const int64_t from = c < columns ? std::max<int64_t>(first_of(c), 0) : keys;
            const int64_t to = c < columns ? std::min(last_of(c), keys - 1) : -1;
            first[c] = static_cast<A>(std::min(from, keys));
            last[c] = static_cast<A>(std::max<int64_t>(to, -1));
            if (from > to) continue;
            keys_from[c / kTileRows] = std::min(keys_from[c / kTileRows], from);
            keys_to[c / kTileRows] = std::max(keys_to[c / kTileRows], to + 1);
        }
        constexpr int64_t kStep = std::max<int64_t>(kTileRows, kLanes<A>);
        for (int64_t c = 0; c < columns; c += kTileRows)
            for (int64_t k = keys_from[c / kTileRows] / kTileRows; k * kTileRows < keys_to[c / kTileRows]; ++k) {
                columns_from[k] = std::min(columns_from[k], c / kStep * kStep);
                columns_to[k] = std::max(columns_to[k], std::min(c + kTileRows, columns));
            }
    }
    // What of products with a row a key, or a row a column, is computed.
    Part scores_of(int64_t key, int64_t depth) const {
        const int64_t block = key / kTileRows;
        return {columns_from[block], padded<A>(columns_to[block]), 0, depth};
    }
    Part over_columns(int64_t key, int64_t width) const {
        const int64_t block = key / kTileRows;
        const int64_t to = columns_to[block];
        return {0, padded<A>(width), std::min(columns_from[block], to), to};
    }
    Part over_keys(int64_t column, int64_t width) const {
        const int64_t block = column / kTileRows, to = keys_to[block];
        return {0, padded<A>(width), std::min(keys_from[block], to), to};
    }
    bool covers(int64_t block, int64_t column) const {
        return columns_from[block] <= column && column < columns_to[block];
    }
    Vector<A> hide(int64_t key, int64_t column, Vector<A> score) const {
        const Vector<A> at = splat(static_cast<A>(key));
        const auto shown = (at >= load_vector(first + column)) & (at <= load_vector(last + column));
        return shown ? score : splat(-std::numeric_limits<A>::infinity());
    }
};

// Calls f(key, score) for each key of which the vector of columns at `column` has a score.
template <class A, class F>
inline void each_score(const Seen<A>& seen, int64_t column, A* scores, F f) {
    for (int64_t key = 0; key < seen.keys; key += kTileRows) {
        if (!seen.covers(key / kTileRows, column)) continue;
        const int64_t end = std::min<int64_t>(key + kTileRows, seen.keys);
        for (int64_t k = key; k < end; ++k) f(k, scores + k * kColumns + column);
    }
}

// The columns' queries, and what forward carries from tile to tile of keys: of each query (a row of the scores in the
// papers) row_max, the largest score so far, and `total`, the sum of the weights, by which o is not yet divided, or
// where sticks are broken what is left of them.
template <class A>
struct Columns {
    int64_t count = 0, key_width, value_width;
    A *q, *transposed_q, *o, *row_max, *total;

    Columns(int64_t key_width, int64_t value_width, Arena<A>& arena)
        : key_width(key_width),
          value_width(value_width),
          q(arena.take(kColumns * padded<A>(key_width))),
          transposed_q(arena.take(padded<A>(key_width) * kColumns)),
          o(arena.take(kColumns * padded<A>(value_width))),
          row_max(arena.take(kColumns)),
          total(arena.take(kColumns)) {}

    // Queries row_of(c), times `factor`; nothing seen so far.
    template <class RowOf>
    void load(int64_t columns, A factor, RowOf row_of) {
        count = columns;
        load_rows(key_width, factor, row_of, q, transposed_q);
    }
    template <class RowOf>
    void load_rows(int64_t width, A factor, RowOf row_of, A* rows, A* columns) const {
        const int64_t row = padded<A>(width);
        for (int64_t c = 0; c < count; ++c) pack(1, width, row_of(c), 0, factor, rows + c * row, row);
        std::fill_n(rows + count * row, (padded<A>(count) - count) * row, A(0));
        transpose(count, width, rows, row, columns, kColumns);
    }
    void start() {
        std::fill_n(o, kColumns * padded<A>(value_width), A(0));
        std::fill_n(row_max, kColumns, std::numeric_limits<A>::lowest());
        std::fill_n(total, kColumns, A(0));
    }
    // A column's o, row_max and total from those of column `at` of a longer array, and back.
    template <class Sums>
    void load_sums(int64_t c, const Sums& from, int64_t at) {
        const int64_t row = padded<A>(value_width);
        std::copy_n(from.o + at * row, row, o + c * row);
        row_max[c] = from.row_max[at];
        total[c] = from.total[at];
    }
    template <class Sums>
    void save_sums(int64_t c, Sums& to, int64_t at) const {
        const int64_t row = padded<A>(value_width);
        std::copy_n(o + c * row, row, to.o + at * row);
        to.row_max[at] = row_max[c];
        to.total[at] = total[c];
    }
};

// A column's outputs: zeros where it has seen nothing.
template <class A, class T>
void write_outputs(int64_t width, const A* o, A total, T* to) {
    unpack(1, width, o, 0, total == 0 ? A(1) : 1 / total, to, 0);
}

// The base-2 logarithm of a column's sum; 0 where it has seen nothing.
template <class A>
A log_of(A row_max, A total) {
    return total == 0 ? A(0) : row_max + std::log2(total);
}

// A tile of keys and values.
template <class A>
struct Keys {
    int64_t key_width, value_width;
    A *k, *v, *scores, *dscores;
    A* bias = nullptr;  // [kTileKeys, kColumns], added to the scores; its numbers are base-2 logarithms, too

    Keys(int64_t key_width, int64_t value_width, Arena<A>& arena)
        : key_width(key_width),
          value_width(value_width),
          k(arena.take(kTileKeys * padded<A>(key_width))),
          v(arena.take(kTileKeys * padded<A>(value_width))),
          scores(arena.take(kTileKeys * kColumns)),
          dscores(arena.take(kTileKeys * kColumns)) {}

    template <class T>
    void load(int64_t count, const T* keys, int64_t keys_row, const T* values, int64_t values_row) {
        pack(count, key_width, keys, keys_row, A(1), k, padded<A>(key_width));
        pack(count, value_width, values, values_row, A(1), v, padded<A>(value_width));
    }
    void score(const Seen<A>& seen, const A* transposed_q) {
        multiply_parts(seen.keys, as_is(k, padded<A>(key_width)), transposed_q, kColumns, scores, kColumns, false,
                       padded<A>(seen.columns), [&](int64_t i, int64_t) { return seen.scores_of(i, key_width); });
        add_bias(seen);
    }
    void add_bias(const Seen<A>& seen) {
        if (!bias) return;
        for (int64_t c = 0; c < seen.columns; c += kLanes<A>)
            each_score(seen, c, scores, [&](int64_t, A* at) {
                store_vector(at, load_vector(at) + load_vector(bias + (at - scores)));
            });
    }
};

// Scores to weights 2^(score - row_max), and the columns' maxima and sums; `factors` is by how much what was summed
// before shrinks. Without it, o shrinks.
template <class A>
void weigh(const Seen<A>& seen, A* scores, Columns<A>& columns, A* factors) {
    for (int64_t c = 0; c < seen.columns; c += kLanes<A>) {
        const Vector<A> before = load_vector(columns.row_max + c);
        Vector<A> row_max = before;
        each_score(seen, c, scores, [&](int64_t key, A* at) {
            Vector<A> score = load_vector(at);
            if (!seen.whole) store_vector(at, score = seen.hide(key, c, score));
            row_max = score > row_max ? score : row_max;
        });
        const Vector<A> factor = power_of_two(before - row_max);
        Vector<A> total = load_vector(columns.total + c) * factor;
        each_score(seen, c, scores, [&](int64_t, A* at) {
            const Vector<A> weight = power_of_two(load_vector(at) - row_max);
            store_vector(at, weight);
            total += weight;
        });
        store_vector(columns.row_max + c, row_max);
        store_vector(columns.total + c, total);
        store_vector(factors + c, factor);
    }
}

template <class A>
void weigh(const Seen<A>& seen, A* scores, Columns<A>& columns) {
    const int64_t row = padded<A>(columns.value_width);
    alignas(64) A factors[kColumns];
    weigh(seen, scores, columns, factors);
    for (int64_t c = 0; c < seen.columns; ++c) {
        if (factors[c] == A(1)) continue;
        A* o = columns.o + c * row;
        for (int64_t x = 0; x < row; x += kLanes<A>) store_vector(o + x, load_vector(o + x) * factors[c]);
    }
}

// Forward over one tile of keys.
template <class A>
void attend(const Seen<A>& seen, Keys<A>& keys, Columns<A>& columns) {
    const int64_t row = padded<A>(columns.value_width);
    keys.score(seen, columns.transposed_q);
    weigh(seen, keys.scores, columns);
    multiply_parts(seen.columns, transposed(keys.scores, kColumns), keys.v, row, columns.o, row, true, row,
                   [&](int64_t i, int64_t) { return seen.over_keys(i, columns.value_width); });
}

// The same for so few columns that reading the keys and values, each once and where they lie, is what takes the time.
template <class A, class T>
void attend_few(const Seen<A>& seen, const T* k, int64_t k_row, const T* v, int64_t v_row, Keys<A>& keys,
                Columns<A>& columns) {
    A* const scores = keys.scores;
    const int64_t q_row = padded<A>(columns.key_width), o_row = padded<A>(columns.value_width);
    for (int64_t key = 0; key < seen.keys; ++key)
        for (int64_t c = 0; c < seen.columns; ++c)
            scores[key * kColumns + c] = product(columns.key_width, columns.q + c * q_row, k + key * k_row);
    keys.add_bias(seen);
    weigh(seen, scores, columns);
    constexpr int64_t kAtOnce = 4;
    for (int64_t key = 0; key < seen.keys; key += kAtOnce)
        for (int64_t c = 0; c < seen.columns; ++c)
            add_rows<kAtOnce>(std::min(kAtOnce, seen.keys - key), columns.value_width, scores + key * kColumns + c,
                              kColumns, v + key * v_row, v_row, columns.o + c * o_row);
}

// What backward knows of the columns beside their queries, and the gradient of those.
template <class A>
struct ColumnGradients {
    A *dout, *transposed_dout, *dq, *log_sum, *delta;  // delta: the products of o and its gradient

    ColumnGradients(int64_t key_width, int64_t value_width, Arena<A>& arena)
        : dout(arena.take(kColumns * padded<A>(value_width))),
          transposed_dout(arena.take(padded<A>(value_width) * kColumns)),
          dq(arena.take(kColumns * padded<A>(key_width))),
          log_sum(arena.take(kColumns)),
          delta(arena.take(kColumns)) {}

    // Of the loaded columns: rows of o's gradient, their products with o, the sums' logarithms; dq starts from zero.
    template <class GradientOf, class OwnOf, class LogSumOf>
    void load(const Columns<A>& columns, GradientOf gradient_of, OwnOf own_of, LogSumOf log_sum_of) {
        columns.load_rows(columns.value_width, A(1), gradient_of, dout, transposed_dout);
        for (int64_t c = 0; c < padded<A>(columns.count); ++c) {
            delta[c] = c < columns.count ? own_of(c) : A(0);
            log_sum[c] = c < columns.count ? log_sum_of(c) : A(0);
        }
        std::fill_n(dq, kColumns * padded<A>(columns.key_width), A(0));
    }
};

// A part's sums for its keys from `first_key` on, in rows of the strides.
template <class A>
struct PartSums {
    A *dk_rows, *dv_rows;
    int64_t dk_stride, dv_stride, first_key;
    A* dk(int64_t key) const { return dk_rows + (key - first_key) * dk_stride; }
    A* dv(int64_t key) const { return dv_rows + (key - first_key) * dv_stride; }
};

// Backward over one tile of keys: adds to dq, and to the rows of dk and dv, which are padded. dq lacks the scale, dk
// log2(e).
template <class A>
void attend_backward(const Seen<A>& seen, Keys<A>& keys, const Columns<A>& columns, ColumnGradients<A>& gradients,
                     A* dk, A* dv) {
    const int64_t key_width = columns.key_width, keys_row = padded<A>(key_width);
    const int64_t value_width = columns.value_width, values_row = padded<A>(value_width);
    keys.score(seen, columns.transposed_q);
    multiply_parts(seen.keys, as_is(keys.v, values_row), gradients.transposed_dout, kColumns, keys.dscores, kColumns,
                   false, padded<A>(seen.columns), [&](int64_t i, int64_t) { return seen.scores_of(i, value_width); });
    for (int64_t c = 0; c < seen.columns; c += kLanes<A>) {
        const Vector<A> log_sum = load_vector(gradients.log_sum + c), delta = load_vector(gradients.delta + c);
        each_score(seen, c, keys.scores, [&](int64_t key, A* at) {
            A* dscore = keys.dscores + (at - keys.scores);
            Vector<A> score = load_vector(at);
            if (!seen.whole) score = seen.hide(key, c, score);
            const Vector<A> weight = power_of_two(score - log_sum);
            store_vector(at, weight);
            store_vector(dscore, weight * (load_vector(dscore) - delta));
        });
    }
    multiply_parts(seen.keys, as_is(keys.scores, kColumns), gradients.dout, values_row, dv, values_row, true,
                   values_row, [&](int64_t i, int64_t) { return seen.over_columns(i, value_width); });
    multiply_parts(seen.keys, as_is(keys.dscores, kColumns), columns.q, keys_row, dk, keys_row, true, keys_row,
                   [&](int64_t i, int64_t) { return seen.over_columns(i, key_width); });
    multiply_parts(seen.columns, transposed(keys.dscores, kColumns), keys.k, keys_row, gradients.dq, keys_row, true,
                   keys_row, [&](int64_t i, int64_t) { return seen.over_keys(i, key_width); });
}

}  // namespace seqarch
