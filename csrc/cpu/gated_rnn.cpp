// Recurrences whose gates read their last output, forward and backward. See seqarch.h for the equations.
//
// A task takes a few sequences of one head step by step, so that the head's matrices are read once a step for all of
// them. Forward keeps the states of every step. Backward computes the gates of some steps again from these, in one
// product, goes back through the steps, and adds their gradients to the matrices' in one product. How sequences are put
// together depends on the sizes alone, and sums over them are added in order, so results do not depend on the number of
// threads.
#include <numeric>
#include <vector>

#include "arguments.h"
#include "dtypes.h"
#include "heads.h"
#include "parallel.h"
#include "rnn_cells.h"
#include "rows.h"

namespace {

using namespace seqarch;

constexpr int64_t kSequences = kTileRows;  // that a task takes at a time
constexpr int64_t kSteps = 16;             // whose gates backward computes at a time
constexpr int64_t kParts = 8;              // of the sequences at most, each with sums for the matrices
constexpr int64_t kSmallWork = 1 << 16;    // fewer multiply-adds than starting the threads is worth

template <class A, class Cell>
struct Problem {
    static constexpr int64_t kGates = Cell::kGates, kStates = Cell::kStates;
    seqarch_rows x;
    const A *weight, *bias, *state;
    const int64_t* offsets;
    int64_t sequences, length, heads, width;
    int num_threads;
    std::vector<int64_t> order;  // the sequences, longest first

    Problem(const seqarch_gated_rnn_inputs& in, int num_threads)
        : x(in.x),
          weight(static_cast<const A*>(in.weight)),
          bias(static_cast<const A*>(in.bias)),
          state(static_cast<const A*>(in.state)),
          offsets(in.offsets),
          sequences(in.sequences),
          length(in.length),
          heads(in.heads),
          width(in.width),
          num_threads(num_threads),
          order(in.sequences) {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return steps(a) > steps(b); });
    }
    int64_t stride() const { return padded<A>(width); }
    int64_t steps(int64_t sequence) const {
        return offsets ? offsets[sequence + 1] - offsets[sequence] : length;
    }
    int64_t token(int64_t sequence, int64_t t) const { return offsets ? offsets[sequence] + t : sequence * length + t; }
    // Where a step's channels of a head and gate begin in rows of `gates` a head.
    int64_t place(const seqarch_rows& rows, int64_t sequence, int64_t t, int64_t head_gate) const {
        const int64_t row = offsets ? (offsets[sequence] + t) * rows.time_stride
                                    : sequence * rows.batch_stride + t * rows.time_stride;
        return row + head_gate * width;
    }
    // Where a head's states begin in a tensor [.., kStates, H, W] at row `row`; they are `heads * width` apart.
    int64_t states(int64_t row, int64_t head) const { return (row * kStates * heads + head) * width; }
    int64_t blocks() const { return (sequences + kSequences - 1) / kSequences; }
    int threads() const {
        const double tokens = static_cast<double>(offsets ? length : sequences * length);
        return tokens * heads * kGates * width * width > kSmallWork ? num_threads : 1;
    }
};

// Some sequences of one head: those from `first` on in the order of lengths, of which the longest has so many steps.
struct Block {
    int64_t head, first, count, steps;
};

template <class P>
Block block_of(const P& p, int64_t head, int64_t number) {
    const int64_t first = number * kSequences, count = std::min(kSequences, p.sequences - first);
    return {head, first, count, p.steps(p.order[first])};
}

// How many of a block's sequences have a step t.
template <class P>
int64_t active(const P& p, const Block& block, int64_t t) {
    int64_t count = block.count;
    while (count > 0 && p.steps(p.order[block.first + count - 1]) <= t) --count;
    return count;
}

template <class A>
void copy_states(int64_t count, int64_t width, const A* from, int64_t from_stride, A* to, int64_t to_stride) {
    for (int64_t n = 0; n < count; ++n) std::copy_n(from + n * from_stride, width, to + n * to_stride);
}

// The matrices of a head's gates side by side, [W, kGates, stride], for products with outputs from the left.
template <class P, class A>
void load_weight(const P& p, int64_t head, A* to) {
    const int64_t s = p.stride(), W = p.width, row = P::kGates * s;
    const A* from = p.weight + head * P::kGates * W * W;
    for (int64_t g = 0; g < P::kGates; ++g)
        for (int64_t i = 0; i < W; ++i)
            for (int64_t j = 0; j < W; ++j) to[j * row + g * s + i] = from[(g * W + i) * W + j];
}

template <class P, class A>
void add_bias(const P& p, int64_t head, int64_t rows, A* to) {
    const int64_t s = p.stride(), W = p.width;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < P::kGates; ++g) {
            const A* bias = p.bias + (head * P::kGates + g) * W;
            A* row = to + (r * P::kGates + g) * s;
            for (int64_t k = 0; k < W; ++k) row[k] += bias[k];
        }
}

template <class P, class A>
void read_gates(const P& p, int64_t sequence, int64_t t, int64_t head, A* to) {
    for (int64_t g = 0; g < P::kGates; ++g)
        read(p.x, p.place(p.x, sequence, t, head * P::kGates + g), p.width, to + g * p.stride());
}

template <class A>
struct Outputs {
    seqarch_rows o;
    A *steps, *last;
};

template <class A, class Cell>
struct Scratch {
    A *weight, *states, *x, *r;

    Scratch(const Problem<A, Cell>& p, Arena<A>& arena)
        : weight(arena.take(p.width * Cell::kGates * p.stride())),
          states(arena.take(kSequences * Cell::kStates * p.stride())),
          x(arena.take(Cell::kGates * p.stride())),
          r(arena.take(kSequences * Cell::kGates * p.stride())) {}
};

template <class A, class Cell>
void forward_block(const Problem<A, Cell>& p, const Block& block, const Outputs<A>& out, Scratch<A, Cell>& s) {
    constexpr int64_t kGates = Cell::kGates, kStates = Cell::kStates;
    const int64_t W = p.width, stride = p.stride(), between = p.heads * W, row = kStates * stride;
    for (int64_t q = 0; q < block.count; ++q)
        copy_states(kStates, W, p.state + p.states(p.order[block.first + q], block.head), between, s.states + q * row,
                    stride);
    for (int64_t t = 0; t < block.steps; ++t) {
        const int64_t rows = active(p, block, t);
        multiply(Shape::full, rows, kGates * stride, W, as_is(s.states, row), s.weight, kGates * stride, s.r,
                 kGates * stride, false);
        add_bias(p, block.head, rows, s.r);
        for (int64_t q = 0; q < rows; ++q) {
            const int64_t sequence = p.order[block.first + q];
            read_gates(p, sequence, t, block.head, s.x);
            Cell::forward(Step<A>{W, stride, s.x, s.r + q * kGates * stride}, s.states + q * row);
            write(out.o, p.place(out.o, sequence, t, block.head), W, s.states + q * row);
            if (out.steps)
                copy_states(kStates, W, s.states + q * row, stride,
                            out.steps + p.states(p.token(sequence, t), block.head), between);
        }
    }
    for (int64_t q = 0; q < block.count; ++q)
        copy_states(kStates, W, s.states + q * row, stride, out.last + p.states(p.order[block.first + q], block.head),
                    between);
}

template <class A, class Cell>
void forward(const Problem<A, Cell>& p, const Outputs<A>& out) {
    run_parallel<A>(
        p.heads * p.blocks(), p.threads(), [&](Arena<A>& arena) { return Scratch<A, Cell>(p, arena); },
        [&](int64_t task, Scratch<A, Cell>& scratch) {
            const Block block = block_of(p, task / p.blocks(), task % p.blocks());
            load_weight(p, block.head, scratch.weight);
            forward_block(p, block, out, scratch);
        });
}

template <class A>
struct Gradients {
    seqarch_rows dout;
    const A *steps, *dlast;
    seqarch_rows dx;
    A *dweight, *dbias, *dstate;
};

template <class A, class Cell>
struct BackwardScratch {
    // as of a call, as of a head's gates one below the other [kGates, stride, stride], and of kSteps steps
    A *weight, *stacked, *outputs, *r, *dr, *x, *dx, *before, *after, *dstates;

    BackwardScratch(const Problem<A, Cell>& p, Arena<A>& arena)
        : weight(arena.take(p.width * Cell::kGates * p.stride())),
          stacked(arena.take(Cell::kGates * p.stride() * p.stride())),
          outputs(arena.take(kSteps * kSequences * p.stride())),
          r(arena.take(kSteps * kSequences * Cell::kGates * p.stride())),
          dr(arena.take(kSteps * kSequences * Cell::kGates * p.stride())),
          x(arena.take(Cell::kGates * p.stride())),
          dx(arena.take(Cell::kGates * p.stride())),
          before(arena.take(Cell::kStates * p.stride())),
          after(arena.take(Cell::kStates * p.stride())),
          dstates(arena.take(kSequences * Cell::kStates * p.stride())) {}

    void load(const Problem<A, Cell>& p, int64_t head) {
        load_weight(p, head, weight);
        const A* from = p.weight + head * Cell::kGates * p.width * p.width;
        for (int64_t g = 0; g < Cell::kGates; ++g)
            copy_states(p.width, p.width, from + g * p.width * p.width, p.width, stacked + g * p.stride() * p.stride(),
                        p.stride());
    }
};

// A head's states before step t, in the tensor that has them.
template <class A, class Cell>
const A* states_before(const Problem<A, Cell>& p, const A* steps, int64_t sequence, int64_t t, int64_t head) {
    return t ? steps + p.states(p.token(sequence, t - 1), head) : p.state + p.states(sequence, head);
}

// The gates' shares of the last outputs at steps [from, to), and these outputs; zeros where a sequence has no such
// step.
template <class A, class Cell>
void recompute(const Problem<A, Cell>& p, const Block& block, const A* steps, int64_t from, int64_t to,
               BackwardScratch<A, Cell>& s) {
    const int64_t stride = p.stride(), row = Cell::kGates * stride, rows = (to - from) * kSequences;
    std::fill_n(s.outputs, rows * stride, A(0));
    std::fill_n(s.dr, rows * row, A(0));
    for (int64_t t = from; t < to; ++t)
        for (int64_t q = 0; q < active(p, block, t); ++q)
            std::copy_n(states_before(p, steps, p.order[block.first + q], t, block.head), p.width,
                        s.outputs + ((t - from) * kSequences + q) * stride);
    multiply(Shape::full, rows, row, p.width, as_is(s.outputs, stride), s.weight, row, s.r, row, false);
    add_bias(p, block.head, rows, s.r);
}

// Back through the step t of one of a block's sequences, `at` among the steps whose gates were computed.
template <class A, class Cell>
void step_back(const Problem<A, Cell>& p, const Block& block, int64_t q, int64_t t, int64_t at, const Gradients<A>& g,
               BackwardScratch<A, Cell>& s) {
    constexpr int64_t kGates = Cell::kGates, kStates = Cell::kStates;
    const int64_t sequence = p.order[block.first + q], stride = p.stride(), between = p.heads * p.width;
    A* const dstates = s.dstates + q * kStates * stride;
    read(g.dout, p.place(g.dout, sequence, t, block.head), p.width, s.dx);
    add_row(stride, s.dx, dstates);
    read_gates(p, sequence, t, block.head, s.x);
    copy_states(kStates, p.width, states_before(p, g.steps, sequence, t, block.head), between, s.before, stride);
    copy_states(kStates, p.width, g.steps + p.states(p.token(sequence, t), block.head), between, s.after, stride);
    const StepGradients<A> to{s.dx, s.dr + at * kGates * stride, dstates};
    Cell::backward(Step<A>{p.width, stride, s.x, s.r + at * kGates * stride}, s.before, s.after, to);
    for (int64_t gate = 0; gate < kGates; ++gate)
        write(g.dx, p.place(g.dx, sequence, t, block.head * kGates + gate), p.width, s.dx + gate * stride);
}

// Adds a block's gradients to the sums for the head's matrices [kGates stride, stride] and biases [kGates stride].
template <class A, class Cell>
void backward_block(const Problem<A, Cell>& p, const Block& block, const Gradients<A>& g, A* dweight, A* dbias,
                    BackwardScratch<A, Cell>& s) {
    constexpr int64_t kGates = Cell::kGates, kStates = Cell::kStates;
    const int64_t stride = p.stride(), row = kGates * stride, between = p.heads * p.width;
    for (int64_t q = 0; q < block.count; ++q)
        copy_states(kStates, p.width, g.dlast + p.states(p.order[block.first + q], block.head), between,
                    s.dstates + q * kStates * stride, stride);
    for (int64_t to = block.steps; to > 0; to = std::max<int64_t>(to - kSteps, 0)) {
        const int64_t from = std::max<int64_t>(to - kSteps, 0);
        recompute(p, block, g.steps, from, to, s);
        for (int64_t t = to - 1; t >= from; --t) {
            const int64_t rows = active(p, block, t), at = (t - from) * kSequences;
            for (int64_t q = 0; q < rows; ++q) step_back(p, block, q, t, at + q, g, s);
            multiply(Shape::full, rows, stride, row, as_is(s.dr + at * row, row), s.stacked, stride, s.dstates,
                     kStates * stride, true);
        }
        multiply(Shape::full, row, stride, (to - from) * kSequences, transposed(s.dr, row), s.outputs, stride, dweight,
                 stride, true);
        for (int64_t r = 0; r < (to - from) * kSequences; ++r) add_row(row, s.dr + r * row, dbias);
    }
    for (int64_t q = 0; q < block.count; ++q)
        copy_states(kStates, p.width, s.dstates + q * kStates * stride, stride,
                    g.dstate + p.states(p.order[block.first + q], block.head), between);
}

// The sums of a head's parts, each [kGates stride, stride] and then [kGates stride], into its gradients.
template <class A, class Cell>
void add_up(const Problem<A, Cell>& p, int64_t head, int64_t parts, const A* sums, const Gradients<A>& g) {
    const int64_t stride = p.stride(), row = Cell::kGates * stride, W = p.width, each = row * (stride + 1);
    for (int64_t gate = 0; gate < Cell::kGates; ++gate)
        for (int64_t i = 0; i < W; ++i) {
            const int64_t from = gate * stride + i, to = (head * Cell::kGates + gate) * W + i;
            A bias = 0;
            std::fill_n(g.dweight + to * W, W, A(0));
            for (int64_t part = 0; part < parts; ++part) {
                const A* own = sums + part * each;
                bias += own[row * stride + from];
                for (int64_t j = 0; j < W; ++j) g.dweight[to * W + j] += own[from * stride + j];
            }
            g.dbias[to] = bias;
        }
}

template <class A, class Cell>
void backward(const Problem<A, Cell>& p, const Gradients<A>& g) {
    const int64_t blocks = p.blocks(), parts = std::min(blocks, kParts), row = Cell::kGates * p.stride();
    const int64_t each = row * (p.stride() + 1);
    const Buffer<A> sums(p.heads * parts * each);
    run_parallel<A>(
        p.heads * parts, p.threads(), [&](Arena<A>& arena) { return BackwardScratch<A, Cell>(p, arena); },
        [&](int64_t task, BackwardScratch<A, Cell>& scratch) {
            const int64_t head = task / parts, part = task % parts;
            A* const own = sums + task * each;
            std::fill_n(own, each, A(0));
            scratch.load(p, head);
            for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b)
                backward_block(p, block_of(p, head, b), g, own, own + row * p.stride(), scratch);
        });
    for (int64_t head = 0; head < p.heads; ++head) add_up(p, head, parts, sums + head * parts * each, g);
}

// The cell is known, and all sizes can be counted.
bool valid(const seqarch_gated_rnn_inputs& in, int num_threads) {
    constexpr int64_t kPadding = 64, kMost = 4;  // of widths to vectors; gates or states of a cell
    if (num_threads < 1 || in.dtype == SEQARCH_BFLOAT16 || !known(in.x)) return false;
    if (in.cell < SEQARCH_SLSTM || in.cell > SEQARCH_GRU) return false;
    if (!countable({in.sequences, in.length, in.heads, in.width})) return false;
    const int64_t rows = in.offsets ? 1 : in.sequences, width = in.width + kPadding;
    return countable({rows, in.length + kPadding, in.heads, kMost, width}) &&
           countable({in.sequences + kPadding, in.heads, kMost, width}) &&
           countable({in.heads + 1, kParts, kMost, width, width}) && packs(in.offsets, in.sequences, in.length);
}

// Calls f with a cell of the kind that the inputs ask for.
template <class F>
int32_t with_cell(const seqarch_gated_rnn_inputs& in, F f) {
    return with_dtype(in.dtype, [&](auto* type) {
        using A = Acc<std::remove_pointer_t<decltype(type)>>;
        if (in.cell == SEQARCH_SLSTM) return f(static_cast<A*>(nullptr), Slstm());
        if (in.cell == SEQARCH_LSTM) return f(static_cast<A*>(nullptr), Lstm());
        return f(static_cast<A*>(nullptr), Gru());
    });
}

}  // namespace

int32_t seqarch_gated_rnn_forward(const seqarch_gated_rnn_inputs* inputs, const seqarch_gated_rnn_outputs* outputs,
                                  int32_t num_threads) {
    if (!valid(*inputs, num_threads) || !known(outputs->o)) return SEQARCH_BAD_ARGUMENT;
    return with_cell(*inputs, [&](auto* type, auto cell) {
        using A = std::remove_pointer_t<decltype(type)>;
        const Problem<A, decltype(cell)> problem(*inputs, num_threads);
        forward(problem, Outputs<A>{outputs->o, static_cast<A*>(outputs->steps), static_cast<A*>(outputs->last)});
    });
}

int32_t seqarch_gated_rnn_backward(const seqarch_gated_rnn_inputs* inputs,
                                   const seqarch_gated_rnn_gradients* gradients, int32_t num_threads) {
    const auto& g = *gradients;
    if (!valid(*inputs, num_threads) || !known(g.dout) || !known(g.dx)) return SEQARCH_BAD_ARGUMENT;
    return with_cell(*inputs, [&](auto* type, auto cell) {
        using A = std::remove_pointer_t<decltype(type)>;
        const Problem<A, decltype(cell)> problem(*inputs, num_threads);
        backward(problem,
                 Gradients<A>{g.dout, static_cast<const A*>(g.steps), static_cast<const A*>(g.dlast), g.dx,
                              static_cast<A*>(g.dweight), static_cast<A*>(g.dbias), static_cast<A*>(g.dstate)});
    });
}
