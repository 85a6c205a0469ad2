// Decay inside a chunk of tokens: of scores, of queries from the chunk's start, of keys to its end, and its gradient.
//
// With a_t the decay of step t, token j reaches token i >= j times a_{j+1} ... a_i. A decay per head: the exponential
// of a difference of sums (float64, split in two for float32), all exponents at most 0. One per key dimension: products
// of the single steps' decays, each at most 1; a buffer of keys is decayed row by row while the queries are scored
// against it, so that a score costs no exponential. Either way nothing overflows, and a decay of 0 is exact.
#pragma once

#include "simd.h"

namespace seqarch {

enum class DecayKind { none, per_head, per_key };

constexpr double kStrongestDecay = -1000.0;  // its exponential is 0; differences of sums stay finite for -inf

// exp(x) for x <= 0; exactly 0 where float32 has no normal number for it.
inline float decay_exponential(float x) {
    const uint32_t keep = x < -87.0f ? 0u : 0xffffffffu;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, exponential(x)) & keep);
}
inline double decay_exponential(double x) { return std::exp(x); }

template <class A>
class ChunkDecay {
    DecayKind kind;
    int64_t size, keys, keys_row, row;
    A *between, *high, *low;  // per head: exp(L_i - L_j) below the diagonal; the sums L in two parts
    A *steps, *scratch;       // per key: the decay of each step
    A *start, *end;           // of each token, per head one number, per key a row
    A *score_terms, *earlier, *later, *sums;  // of the gradient of the log decays, see below

  public:
    A* whole;  // over the chunk, per head one number, per key a row

    ChunkDecay(DecayKind kind, int64_t size, int64_t keys, Arena<A>& arena)
        : kind(kind), size(size), keys(keys), keys_row(padded<A>(keys)), row(padded<A>(size)) {
        const bool vector = kind == DecayKind::per_key;
        between = arena.take(kind == DecayKind::per_head ? size * row : 0);
        high = arena.take(row);
        low = arena.take(row);
        steps = arena.take(vector ? size * keys_row : 0);
        scratch = arena.take(vector ? row * keys_row : 0);
        start = arena.take(vector ? size * keys_row : row);
        end = arena.take(vector ? size * keys_row : row);
        whole = arena.take(keys_row);
        score_terms = arena.take(kind == DecayKind::per_head ? size * row : 0);
        earlier = arena.take(vector ? size * keys_row : row);
        later = arena.take(vector ? size * keys_row : row);
        sums = arena.take(std::max(row, keys_row));
    }

    // Reads the n log decays of a chunk, `stride` numbers apart.
    void read(int64_t n, const A* log_decay, int64_t stride) {
        if (kind == DecayKind::per_head) read_per_head(n, log_decay, stride);
        if (kind == DecayKind::per_key) read_per_key(n, log_decay, stride);
    }

    // y = x, each token decayed from the chunk's start; x itself if there is no decay.
    const A* from_start(int64_t n, const A* x, A* y) const { return scaled(n, x, start, y); }
    // The same to the chunk's end.
    const A* to_end(int64_t n, const A* x, A* y) const { return scaled(n, x, end, y); }

    // A state [V, K] (keys along its rows), decayed over the chunk.
    void over_transposed(int64_t values, A* state) const {
        if (kind == DecayKind::none) return;
        for (int64_t v = 0; v < values; ++v) {
            A* line = state + v * keys_row;
            if (kind == DecayKind::per_key)
                for (int64_t d = 0; d < keys_row; ++d) line[d] *= whole[d];
            else
                for (int64_t d = 0; d < keys_row; ++d) line[d] *= whole[0];
        }
    }
    // A state [K, V].
    void over(int64_t values_row, A* state) const {
        if (kind == DecayKind::none) return;
        for (int64_t d = 0; d < keys; ++d) {
            const A factor = whole[kind == DecayKind::per_key ? d : 0];
            A* line = state + d * values_row;
            for (int64_t v = 0; v < values_row; ++v) line[v] *= factor;
        }
    }

    // scores[i, j] = sum_d q[i, d] k[j, d] a(j -> i), zero for j > i. `raw` holds q k^T where the decay is not per key;
    // `transposed_k` is k^T, which is left as it was.
    void scores(int64_t n, const A* q, const A* transposed_k, const A* raw, A* result) {
        if (kind == DecayKind::per_key) return scores_per_key(n, q, transposed_k, result);
        for (int64_t i = 0; i < n; ++i) mask(i, raw + i * row, between + i * row, result + i * row);
    }

    // Adds to dq and dk what they receive from dscores, and to the gradient of decays per key. Decayed dscores are left
    // where the decay is not per key.
    void scores_backward(int64_t n, const A* q, const A* k, A* dscores, A* dq, A* dk) {
        if (kind == DecayKind::per_key) {
            rows_per_key<true>(n, dscores, q, k, dq);
            columns_per_key(n, dscores, q, k, dk);
            return;
        }
        for (int64_t i = 0; i < n; ++i) mask(i, dscores + i * row, between + i * row, dscores + i * row);
        multiply(Shape::lower_left, n, keys, n, as_is(dscores, row), k, keys_row, dq, keys_row, true);
        multiply(Shape::upper_left, n, keys, n, transposed(dscores, row), q, keys_row, dk, keys_row, true);
    }

    // Per key, where what is decayed are values and the scores of queries and keys are not: o[i] += the sum over j <= i
    // of scores[i, j] v[j] a(j -> i).
    void read_values(int64_t n, const A* scores, const A* v, A* o) { rows_per_key<false>(n, scores, nullptr, v, o); }
    // Its gradient: adds to dv, and to the gradient of the decays.
    void read_values_backward(int64_t n, const A* scores, const A* dout, const A* v, A* o, A* dv) {
        rows_per_key<true>(n, scores, dout, v, o);
        columns_per_key(n, scores, dout, v, dv);
    }

    // Multiplies the gradient of decayed queries (keys) by their decay, in place.
    void from_start_backward(int64_t n, A* dx) const { scaled(n, dx, start, dx); }
    void to_end_backward(int64_t n, A* dx) const { scaled(n, dx, end, dx); }

    // The gradient of the log decay of step t sums what passed through it: score(i, j) dscore(i, j) of queries i >= t
    // and keys j < t; queries i >= t that read the chunk's first state; keys j < t that reached its last one; and
    // the state that passed over the whole chunk. With a decay per head each is summed as it is. With one per key
    // dimension the terms of scores are what the queries i >= t read, less what was read of the keys j >= t.
    void clear_gradient(int64_t n) {
        const int64_t numbers = kind == DecayKind::per_key ? n * keys_row : row;
        std::fill_n(earlier, numbers, A(0));
        std::fill_n(later, numbers, A(0));
        if (kind == DecayKind::per_head) std::fill_n(score_terms, n * row, A(0));
    }
    // dq: what queries received from the chunk's first state.
    void add_from_start(int64_t n, const A* q, const A* dq) {
        if (kind == DecayKind::per_head)
            for (int64_t i = 0; i < n; ++i) later[i] += dot(keys_row, q + i * keys_row, dq + i * keys_row);
        if (kind == DecayKind::per_key) add_product(n * keys_row, q, dq, later);
    }
    // dk: what keys received from its last state.
    void add_to_end(int64_t n, const A* k, const A* dk) {
        if (kind == DecayKind::per_head)
            for (int64_t i = 0; i < n; ++i) earlier[i] += dot(keys_row, k + i * keys_row, dk + i * keys_row);
        if (kind == DecayKind::per_key) add_product(n * keys_row, k, dk, earlier);
    }
    // From the decayed scores and the gradient of them, which may hold anything above the diagonal.
    void add_score_terms(int64_t n, const A* scores, const A* dscores) {
        if (kind == DecayKind::per_head)
            for (int64_t i = 0; i < n; ++i)
                add_product(padded<A>(i + 1), scores + i * row, dscores + i * row, score_terms + i * row);
    }
    // state, dstate: before the chunk, and the gradient after it, [V, K].
    void write_gradient(int64_t n, int64_t values, const A* state, const A* dstate, A* to, int64_t stride) {
        if (kind == DecayKind::per_head)
            write_per_head(n, whole[0] * dot(values * keys_row, state, dstate), to, stride);
        if (kind == DecayKind::per_key) write_per_key(n, values, state, dstate, to, stride);
    }
    // Per head, where several states passed over the chunk: the products of what they became and its gradient, summed.
    void write_gradient(int64_t n, A through, A* to, int64_t stride) {
        if (kind == DecayKind::per_head) write_per_head(n, through, to, stride);
    }

  private:
    void write_per_head(int64_t n, A through, A* to, int64_t stride) {
        A after = 0;
        std::fill_n(sums, row, A(0));
        for (int64_t t = n - 1; t >= 0; --t) {
            after += later[t];
            for (int64_t j = 0; j < padded<A>(t + 1); ++j) sums[j] += score_terms[t * row + j];
            A from_scores = 0;
#pragma omp simd reduction(+ : from_scores)
            for (int64_t j = 0; j < t; ++j) from_scores += sums[j];
            to[t * stride] = after + from_scores;
        }
        for (int64_t t = 0; t < n; ++t) {
            to[t * stride] += through;
            through += earlier[t];
        }
    }

    void write_per_key(int64_t n, int64_t values, const A* state, const A* dstate, A* to, int64_t stride) {
        std::fill_n(sums, keys_row, A(0));
        for (int64_t t = n - 1; t >= 0; --t) {
            A* line = later + t * keys_row;
            for (int64_t d = 0; d < keys_row; ++d) line[d] = sums[d] += line[d];
        }
        std::fill_n(sums, keys_row, A(0));
        for (int64_t v = 0; v < values; ++v) add_product(keys_row, state + v * keys_row, dstate + v * keys_row, sums);
        for (int64_t d = 0; d < keys_row; ++d) sums[d] *= whole[d];
        for (int64_t t = 0; t < n; ++t) {
            const A *before = earlier + t * keys_row, *line = later + t * keys_row, *step = steps + t * keys_row;
            for (int64_t d = 0; d < keys; ++d) to[t * stride + d] = step[d] == 0 ? A(0) : line[d] + sums[d];
            for (int64_t d = 0; d < keys_row; ++d) sums[d] += before[d];
        }
    }

    void read_per_head(int64_t n, const A* log_decay, int64_t stride) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            sum += std::max<double>(log_decay[i * stride], kStrongestDecay);
            high[i] = static_cast<A>(sum);
            low[i] = static_cast<A>(sum - high[i]);
        }
        const A last_high = high[n - 1], last_low = low[n - 1];
        for (int64_t i = 0; i < n; ++i) start[i] = decay_exponential(high[i]);
        for (int64_t i = 0; i < n; ++i) end[i] = decay_exponential((last_high - high[i]) + (last_low - low[i]));
        whole[0] = start[n - 1];
        for (int64_t i = 0; i < n; ++i) {
            A* __restrict line = between + i * row;
            const A own_high = high[i], own_low = low[i];
            const int64_t stop = padded<A>(i + 1);
#pragma omp simd
            for (int64_t j = 0; j < stop; ++j)
                line[j] = decay_exponential((own_high - high[j]) + (own_low - low[j]));
        }
    }

    void read_per_key(int64_t n, const A* log_decay, int64_t stride) {
        A* __restrict exact = whole;
        for (int64_t d = 0; d < keys; ++d) {
            double sum = 0;
            for (int64_t i = 0; i < n; ++i) sum += log_decay[i * stride + d];
            exact[d] = static_cast<A>(sum);
        }
        for (int64_t d = 0; d < keys; ++d) exact[d] = decay_exponential(exact[d]);
        for (int64_t i = 0; i < n; ++i) {
            const A* __restrict in = log_decay + i * stride;
            A* __restrict out = steps + i * keys_row;
#pragma omp simd
            for (int64_t d = 0; d < keys; ++d) out[d] = decay_exponential(in[d]);
            A* __restrict product = start + i * keys_row;
            const A* before = product - keys_row;
            for (int64_t d = 0; d < keys_row; ++d) product[d] = i ? before[d] * out[d] : out[d];
        }
        for (int64_t i = n - 1; i >= 0; --i) {
            A* product = end + i * keys_row;
            const A *after = product + keys_row, *step = steps + (i + 1) * keys_row;
            for (int64_t d = 0; d < keys_row; ++d) product[d] = i + 1 < n ? after[d] * step[d] : A(1);
        }
    }

    const A* scaled(int64_t n, const A* x, const A* factors, A* y) const {
        if (kind == DecayKind::none) return x;
        for (int64_t i = 0; i < n; ++i) {
            const A *in = x + i * keys_row, *each = factors + i * keys_row;
            A* out = y + i * keys_row;
            if (kind == DecayKind::per_key)
                for (int64_t d = 0; d < keys_row; d += kLanes<A>)
                    store_vector(out + d, load_vector(in + d) * load_vector(each + d));
            else
                for (int64_t d = 0; d < keys_row; d += kLanes<A>)
                    store_vector(out + d, load_vector(in + d) * splat(factors[i]));
        }
        return y;
    }

    // Row i of scores: decayed up to the diagonal, zero beyond it.
    void mask(int64_t i, const A* raw, const A* decay, A* to) const {
        constexpr int64_t L = kLanes<A>;
        const Vector<A> numbers = lane_numbers<A>();
        for (int64_t j = 0; j < row; j += L) {
            if (j > i) {
                store_vector(to + j, Vector<A>{});
                continue;
            }
            Vector<A> x = load_vector(raw + j);
            if (kind == DecayKind::per_head) x *= load_vector(decay + j);
            store_vector(to + j, j + L > i ? numbers <= splat(A(i - j)) ? x : Vector<A>{} : x);
        }
    }

    // The scores of L keys, transposed, and Rows queries: the keys' buffer is decayed by each query's step first.
    template <int Rows, bool Diagonal>
    void meet(int64_t i, int64_t j, const A* q, A* result) {
        const Vector<A> numbers = lane_numbers<A>(), one = splat(A(1));
        Vector<A> sum[Rows] = {}, distance[Rows];
        for (int r = 0; r < Rows; ++r) distance[r] = splat(A(i + r - j));
        const A *step = steps + i * keys_row, *query = q + i * keys_row;
        for (int64_t d = 0; d < keys; ++d) {
            A* at = scratch + d * row + j;
            Vector<A> x = load_vector(at);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                Vector<A> decay = splat(step[r * keys_row + d]);
                if (Diagonal) decay = numbers < distance[r] ? decay : one;
                x *= decay;
                sum[r] += splat(query[r * keys_row + d]) * x;
            }
            store_vector(at, x);
        }
        for (int r = 0; r < Rows; ++r)
            store_vector(result + (i + r) * row + j,
                         Diagonal ? (numbers <= distance[r] ? sum[r] : Vector<A>{}) : sum[r]);
    }

    void scores_per_key(int64_t n, const A* q, const A* transposed_k, A* result) {
        constexpr int64_t L = kLanes<A>;
        std::copy_n(transposed_k, keys * row, scratch);
        for (int64_t j = 0; j < n; j += L) {
            for (int64_t i = 0; i < j; ++i) store_vector(result + i * row + j, Vector<A>{});
            for (int64_t i = j; i < n;) {
                const bool diagonal = i < j + L;
                if (n - i >= 4)
                    diagonal ? meet<4, true>(i, j, q, result) : meet<4, false>(i, j, q, result), i += 4;
                else
                    diagonal ? meet<1, true>(i, j, q, result) : meet<1, false>(i, j, q, result), i += 1;
            }
        }
    }

    // dq[i] += x, where x = sum_{j <= i} dscores[i, j] k[j] a(j -> i), and if Decays later[i] += q[i] x without j = i:
    // no decay acts on a token that meets itself, and what cancels would leave its rounding behind.
    template <bool Decays>
    void rows_per_key(int64_t n, const A* dscores, const A* q, const A* k, A* dq) {
        constexpr int64_t L = kLanes<A>, R = 4;
        for (int64_t d = 0; d < keys_row; d += L) {
            A* lane = scratch;  // [n, L]: one column of vectors of the keys
            for (int64_t j = 0; j < n; ++j) store_vector(lane + j * L, load_vector(k + j * keys_row + d));
            for (int64_t i = 0; i < n; i += R) {
                const int64_t count = std::min(R, n - i);
                Vector<A> sum[R] = {}, step[R] = {};
                for (int64_t r = 0; r < count; ++r) step[r] = load_vector(steps + (i + r) * keys_row + d);
                const A* weights[R];
                for (int64_t r = 0; r < R; ++r) weights[r] = dscores + std::min(i + r, n - 1) * row;
                for (int64_t j = 0; j < i; ++j) {
                    Vector<A> x = load_vector(lane + j * L);
#pragma GCC unroll 8
                    for (int64_t r = 0; r < R; ++r) {
                        x *= step[r];
                        sum[r] += splat(weights[r][j]) * x;
                    }
                    store_vector(lane + j * L, x);
                }
                for (int64_t own = 0; own < count; ++own) {
                    Vector<A> x = load_vector(lane + (i + own) * L);
                    const int64_t at = (i + own) * keys_row + d;
                    if (Decays) store_vector(later + at, load_vector(later + at) + load_vector(q + at) * sum[own]);
                    sum[own] += splat(weights[own][i + own]) * x;
                    for (int64_t r = own + 1; r < count; ++r) {
                        x *= step[r];
                        sum[r] += splat(weights[r][i + own]) * x;
                    }
                    store_vector(lane + (i + own) * L, x);
                }
                for (int64_t r = 0; r < count; ++r) {
                    const int64_t at = (i + r) * keys_row + d;
                    store_vector(dq + at, load_vector(dq + at) + sum[r]);
                }
            }
        }
    }

    // dk[j] += x, where x = sum_{i >= j} dscores[i, j] q[i] a(j -> i), and later[j] -= k[j] x without i = j; from the
    // last key to the first.
    void columns_per_key(int64_t n, const A* dscores, const A* q, const A* k, A* dk) {
        constexpr int64_t L = kLanes<A>, R = 4;
        for (int64_t d = 0; d < keys_row; d += L) {
            A* lane = scratch;
            for (int64_t i = 0; i < n; ++i) store_vector(lane + i * L, load_vector(q + i * keys_row + d));
            for (int64_t stop = n; stop > 0; stop -= R) {
                const int64_t first = std::max<int64_t>(0, stop - R), count = stop - first;
                Vector<A> sum[R] = {}, step[R] = {};  // step[r]: from token first + r to the next
                for (int64_t r = 0; r < count; ++r)
                    if (first + r + 1 < n) step[r] = load_vector(steps + (first + r + 1) * keys_row + d);
                for (int64_t i = first; i < stop; ++i) {
                    Vector<A> x = load_vector(lane + i * L);
                    for (int64_t r = i - first - 1; r >= 0; --r) {
                        x *= step[r];
                        sum[r] += splat(dscores[i * row + first + r]) * x;
                    }
                    store_vector(lane + i * L, x);
                }
                for (int64_t i = stop; i < n; ++i) {
                    Vector<A> x = load_vector(lane + i * L);
                    const A* weights = dscores + i * row + first;
                    if (count == R) {
#pragma GCC unroll 8
                        for (int64_t r = R - 1; r >= 0; --r) {
                            x *= step[r];
                            sum[r] += splat(weights[r]) * x;
                        }
                    } else {
                        for (int64_t r = count - 1; r >= 0; --r) {
                            x *= step[r];
                            sum[r] += splat(weights[r]) * x;
                        }
                    }
                    store_vector(lane + i * L, x);
                }
                for (int64_t r = 0; r < count; ++r) {
                    const int64_t at = (first + r) * keys_row + d;
                    const Vector<A> own = splat(dscores[(first + r) * row + first + r]) * load_vector(q + at);
                    store_vector(dk + at, load_vector(dk + at) + (sum[r] + own));
                    store_vector(later + at, load_vector(later + at) - load_vector(k + at) * sum[r]);
                }
            }
        }
    }
};

}  // namespace seqarch
