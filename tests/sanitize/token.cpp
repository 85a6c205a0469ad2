#include "harness.h"

namespace {

seqarch_operand parameter(const Numbers& numbers, bool given = true) {
    return {given ? static_cast<float*>(numbers.data()) : nullptr, 0};
}

// Values [rows, width] with a gap between them.
struct Values {
    int64_t stride;
    Numbers numbers;

    Values(int64_t rows, int64_t width, Random& random)
        : stride(width + random.pick({0, 3})), numbers(SEQARCH_FLOAT32, rows ? (rows - 1) * stride + width : 0, random) {}
    operator seqarch_operand() const { return {static_cast<float*>(numbers.data()), stride}; }
};

}  // namespace

// A norm, a linear map, a convolution, a gate and a scan, one after the other.
void token(Random& random) {
    const int64_t rows = random.pick({0, 1, 2, 4, 5}), width = random.pick({1, 7, 16, 33, 64});
    const int64_t channels = random.pick({1, 5, 16, 40, 300}), taps = random.pick({2, 4, 8}), states = random.pick({1, 7, 16});
    const auto activation = [&] { return static_cast<int32_t>(random.pick({SEQARCH_IDENTITY, SEQARCH_SILU, SEQARCH_EXP})); };
    const Values x(rows, width, random), normed(rows, width, random), mapped(rows, channels, random);
    const Values convolved(rows, channels, random), gated(rows, channels, random), y(rows, channels, random);
    const Values u(rows, channels, random);
    const Values B(rows, states, random), C(rows, states, random);
    const auto numbers = [&](int64_t count) { return Numbers(SEQARCH_FLOAT32, count, random); };
    const Numbers norm = numbers(width), weight = numbers(channels * width), bias = numbers(channels), D = numbers(channels);
    const Numbers conv = numbers(channels * taps), inputs = numbers(rows * (taps - 1) * channels);
    const Numbers memory = numbers(rows * channels * states);
    Numbers A = numbers(channels * states);
    make_log_decays(A, random);
    const bool with_bias = random.coin(), with_gate = random.coin();
    const seqarch_operand none{nullptr, 0}, z = with_gate ? seqarch_operand(mapped) : none;
    const seqarch_instruction instructions[] = {
        {SEQARCH_NORM, 0, 1e-5, rows, {width, 1}, {normed, x, parameter(norm, random.coin())}},
        {SEQARCH_LINEAR, 0, 1, rows, {width, channels},
         {mapped, normed, parameter(weight), parameter(bias, with_bias), random.coin() ? seqarch_operand(mapped) : none}},
        {SEQARCH_CONVOLVE, activation(), 1, rows, {channels, taps},
         {convolved, mapped, parameter(conv), parameter(bias, with_bias), parameter(inputs)}},
        {SEQARCH_POINTWISE, activation(), -1, rows, {channels, 0}, {gated, convolved, z}},
        {SEQARCH_SCAN, 0, 1, rows, {channels, states},
         {y, u, mapped, B, C, parameter(A), parameter(D, with_bias), z, parameter(memory)}},
    };
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    for (const seqarch_instruction& instruction : instructions) {
        const auto call = [&](const std::vector<int64_t>& n, const int64_t*) {
            seqarch_instruction changed = instruction;
            changed.rows = n[0];
            std::copy_n(n.begin() + 1, 2, changed.sizes);
            return seqarch_run_token(&changed, 1, threads);
        };
        refuses({rows, instruction.sizes[0], instruction.sizes[1]}, {}, call, "run_token took a wrong size");
    }
    require(seqarch_run_token(instructions, 5, threads) == SEQARCH_OK, "run_token refused");
    for (const Numbers* written : {&gated.numbers, &y.numbers, &inputs, &memory}) all_written(*written, "run_token");
}
