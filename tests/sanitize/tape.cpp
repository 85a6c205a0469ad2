#include "harness.h"

namespace {

// A view of numbers without gaps: the strides of up to five sizes.
seqarch_view view(const Numbers& numbers, std::initializer_list<int64_t> sizes) {
    seqarch_view found{numbers.data(), {0, 0, 0, 0, 0}, numbers.dtype()};
    int64_t step = 1;
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
        found.strides[d] = step;
        step *= sizes.begin()[d];
    }
    return found;
}

seqarch_tape_instruction instruction(int32_t kind, std::initializer_list<int64_t> sizes, int32_t flags = 0) {
    seqarch_tape_instruction found{kind, flags, 0, 0, 0, 0, 0, 0.5, {1, 1, 1, 1, 1, 1}};
    std::copy(sizes.begin(), sizes.end(), found.sizes);
    return found;
}

int32_t run(const seqarch_tape_instruction& one, const std::vector<seqarch_view>& views,
            const std::vector<seqarch_step>& steps, int32_t threads) {
    const seqarch_tape tape{&one, views.data(), steps.data(), nullptr, 1, 0};
    return seqarch_run_tape(&tape, nullptr, threads);
}

// Each size of an instruction in turn as none that there is; then the instruction itself.
void check(const seqarch_tape_instruction& one, const std::vector<seqarch_view>& views, int32_t threads,
           const std::vector<seqarch_step>& steps = {}) {
    for (int64_t d = 0; d < 6; ++d)
        for (int64_t wrong : {int64_t{-1}, int64_t{1} << 60}) {
            seqarch_tape_instruction changed = one;
            changed.sizes[d] = wrong;
            const bool nothing = wrong > 0 && std::any_of(one.sizes, one.sizes + 6, [](int64_t n) { return n == 0; });
            require(nothing || run(changed, views, steps, threads) != SEQARCH_OK, "run_tape took a wrong size");
        }
    require(run(one, views, steps, threads) == SEQARCH_OK, "run_tape refused");
}

}  // namespace

// Each kind of instruction on memory of exactly its size.
void tape(Random& random) {
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const int64_t rows = random.pick({1, 2, 5, 8}), width = random.pick({1, 7, 16, 33, 64});
    const int64_t channels = random.pick({1, 5, 16, 40, 300}), taps = random.pick({2, 4, 8}),
                  states = random.pick({1, 7, 16});
    const int64_t groups = random.pick({1, 2, 3}), sharing = random.pick({1, 2, 5, 9}), heads = groups * sharing;
    const int64_t keys = random.pick({1, 8, 33}), values = random.pick({1, 8, 70}),
                  tokens = random.pick({1, 5, 64, 130});
    const auto numbers = [&](int64_t count) { return Numbers(SEQARCH_FLOAT32, count, random); };
    const auto empty = [](int64_t count) { return Numbers(SEQARCH_FLOAT32, count); };
    const int32_t half = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16}));
    const Numbers x = numbers(rows * width), weight = numbers(channels * width), bias = numbers(channels);
    const Numbers stored(half, channels * width, random);
    const seqarch_view none{nullptr, {0, 0, 0, 0, 0}, SEQARCH_FLOAT32};
    const seqarch_view added = random.coin() ? view(bias, {}) : none;

    const Numbers mapped = empty(rows * channels);
    check(instruction(SEQARCH_MAP, {rows, width, channels}, half),
          {view(mapped, {rows, channels}), view(x, {rows, width}), view(stored, {}), added}, threads);
    all_written(mapped, "run_tape map");
    if (threads > 1 && random.coin()) {  // large enough for several threads
        const Numbers wide_x = numbers(rows * 1024), wide_weight = numbers(300 * 1024), wide_y = empty(rows * 300);
        require(run(instruction(SEQARCH_MAP, {rows, 1024, 300}, SEQARCH_FLOAT32),
                    {view(wide_y, {rows, 300}), view(wide_x, {rows, 1024}), view(wide_weight, {}), none}, {},
                    threads) == SEQARCH_OK,
                "run_tape refused a wide map");
        all_written(wide_y, "run_tape wide map");
    }

    const Numbers y = empty(rows * channels), other(random.coin() ? SEQARCH_FLOAT64 : half, rows * channels);
    const std::vector<seqarch_step> steps = {{SEQARCH_SILU_OF, 0, -1, -1, 0, 0}, {SEQARCH_MULTIPLY, 1, 0, -1, 0, 0},
                                             {SEQARCH_COPY, 2, -1, -1, 0, 0}, {SEQARCH_COPY, 1, -1, -1, 0, 0}};
    seqarch_tape_instruction gate = instruction(SEQARCH_ELEMENTWISE, {1, 1, 1, rows, channels}, random.coin());
    gate.outputs = 2, gate.inputs = 1, gate.count = 2;
    const seqarch_view from = view(mapped, {1, 1, 1, rows, channels}), to = view(y, {1, 1, 1, rows, channels});
    check(gate, {to, view(other, {1, 1, 1, rows, channels}), from}, threads, steps);
    all_written(y, "run_tape elementwise");
    all_written(other, "run_tape elementwise to another type");
    gate.outputs = 1, gate.count = 1;
    check(gate, {to, view(other, {1, 1, 1, rows, channels})}, threads, steps);
    all_written(y, "run_tape elementwise from another type");
    gate.count = 40;
    require(run(gate, {to, from}, steps, threads) != SEQARCH_OK, "run_tape took too many steps");

    const Numbers sums = empty(rows);
    check(instruction(SEQARCH_REDUCE, {1, 1, rows, 1, channels}, static_cast<int32_t>(random.pick({0, 1, 2}))),
          {view(sums, {1, 1, rows}), view(mapped, {1, 1, rows, 1, channels})}, threads);
    all_written(sums, "run_tape reduce");

    const Numbers product = empty(rows * channels), right = numbers(width * channels);
    check(instruction(SEQARCH_PRODUCT, {1, 1, rows, channels, width}),
          {view(product, {1, 1, rows, channels}), view(x, {1, 1, rows, width}), view(right, {1, 1, width, channels})},
          threads);
    all_written(product, "run_tape product");
    const Numbers by_rows = empty(rows * channels);
    seqarch_view turned = view(weight, {1, 1, channels, width});
    std::swap(turned.strides[2], turned.strides[3]);
    check(instruction(SEQARCH_PRODUCT, {1, 1, rows, channels, width}),
          {view(by_rows, {1, 1, rows, channels}), view(x, {1, 1, rows, width}), turned}, threads);
    all_written(by_rows, "run_tape product with rows of b side by side");

    std::vector<int64_t> chosen(rows, channels - 1);
    const Numbers found = empty(rows * width), places(SEQARCH_FLOAT64, rows);
    const seqarch_view index{chosen.data(), {1, 0, 0, 0, 0}, SEQARCH_INT64};
    const std::vector<seqarch_view> looked = {view(found, {rows, width}), index, view(stored, {})};
    check(instruction(SEQARCH_LOOKUP, {rows, width, channels}), looked, threads);
    all_written(found, "run_tape lookup");
    chosen[0] = random.coin() ? -1 : channels;
    require(run(instruction(SEQARCH_LOOKUP, {rows, width, channels}), looked, {}, threads) != SEQARCH_OK,
            "run_tape took a row that there is not");
    check(instruction(SEQARCH_ARGMAX, {rows, channels}), {view(places, {rows}), view(mapped, {rows, channels})},
          threads);
    all_written(places, "run_tape argmax");

    const Numbers convolved = empty(rows * channels), conv = numbers(channels * taps);
    const Numbers inputs = numbers(rows * (taps - 1) * channels);
    check(instruction(SEQARCH_STEP_CONVOLUTION, {rows, channels, taps}, random.coin()),
          {view(convolved, {rows, channels}), view(mapped, {rows, channels}), view(conv, {}), added,
           view(inputs, {rows, (taps - 1) * channels})},
          threads);
    all_written(convolved, "run_tape convolution");

    const Numbers scanned = empty(rows * channels), B = numbers(rows * states), C = numbers(rows * states);
    const Numbers memory = numbers(rows * channels * states);
    Numbers A = numbers(channels * states);
    make_log_decays(A, random);
    check(instruction(SEQARCH_STEP_SCAN, {rows, channels, states}, static_cast<int32_t>(random.pick({1, 3}))),
          {view(scanned, {rows, channels}), view(y, {rows, channels}), view(mapped, {rows, channels}), view(A, {}),
           view(B, {rows, states}), view(C, {rows, states}), added,
           random.coin() ? view(convolved, {rows, channels}) : none, none, view(memory, {rows, channels * states})},
          threads);
    all_written(scanned, "run_tape scan");

    const int64_t T = random.pick({1, 2});
    const Numbers o = empty(rows * T * heads * values), q = numbers(rows * T * groups * keys),
                  k = numbers(rows * T * groups * keys);
    const Numbers v = numbers(rows * T * heads * values), beta = numbers(rows * T * heads);
    const Numbers state = numbers(rows * heads * keys * values);
    Numbers decay = numbers(rows * T * heads * keys);
    make_log_decays(decay, random);
    const int32_t kind = static_cast<int32_t>(random.pick({0, 1, 2}));
    const seqarch_view decays = kind == 2 ? view(decay, {rows, T, heads, keys})
                                : kind    ? view(decay, {rows, T, heads})
                                          : none;
    const auto shared = [&](const Numbers& each) { return view(each, {rows, T, groups, keys}); };
    const seqarch_view out = view(o, {rows, T, heads, values}), read = random.coin() ? shared(q) : none;
    const std::initializer_list<int64_t> sizes = {rows, T, heads, keys, values, groups};
    const seqarch_view held = view(state, {rows, heads * keys * values}), in = view(v, {rows, T, heads, values});
    check(instruction(SEQARCH_STEP_LINEAR_ATTENTION, sizes, kind), {out, shared(q), shared(k), in, decays, held},
          threads);
    all_written(o, "run_tape linear_attention");
    check(
        instruction(SEQARCH_STEP_DELTA_RULE, sizes, kind),
        {out, shared(q), shared(k), in, decays, held, view(beta, {rows, T, heads}), read, random.coin() ? read : none},
        threads);

    const Numbers answer = empty(rows * heads * values), query = numbers(rows * heads * keys);
    const Numbers cached(half, rows * groups * tokens * keys, random);
    const Numbers written(half, rows * groups * tokens * values, random);
    const int64_t parts = random.pick({1, 2, 16}), own = values + 2 + SEQARCH_ATTEND_KEYS;
    const Numbers partial = numbers(parts * rows * heads * own);
    const seqarch_view room = view(partial, {parts, rows, heads, own});
    check(instruction(SEQARCH_ATTEND, {rows, heads, tokens, keys, values, groups}, static_cast<int32_t>(parts)),
          {room, view(query, {rows, heads, keys}), view(cached, {rows, groups, tokens, keys}),
           view(written, {rows, groups, tokens, values})},
          threads);
    check(instruction(SEQARCH_ATTEND_JOIN, {rows, heads, tokens, values}, static_cast<int32_t>(parts)),
          {view(answer, {rows, heads, values}), room}, threads);
    all_written(answer, "run_tape attend");
}
