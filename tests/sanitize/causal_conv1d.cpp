#include "harness.h"

namespace {

void set_sizes(seqarch_causal_conv1d_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.length = n[1], in.channels = n[2], in.width = n[3];
}

}  // namespace

void causal_conv1d(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32, silu = random.coin();
    const int64_t channels = random.pick({0, 1, 3, 16, 33, 257}), width = random.pick({2, 3, 4, 5, 8});
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const Sequences s(random);
    const bool has_bias = random.coin(), has_state = random.coin();
    const int64_t states = s.count * (width - 1) * channels;

    const Rows x(dtype, s, channels, random), dy(dtype, s, channels, random);
    const Numbers weight(wide, channels * width, random), bias(wide, channels, random), state(dtype, states, random);
    const Numbers dlast(dtype, states, random);
    const Rows y(dtype, s, channels), dx(dtype, s, channels);
    const Numbers last(dtype, states), dweight(wide, channels * width), dbias(wide, channels), dstate(dtype, states);

    seqarch_causal_conv1d_inputs inputs{*x, weight.data(), maybe(has_bias, bias), maybe(has_state, state)};
    inputs.silu = silu;
    const seqarch_causal_conv1d_outputs outputs{y.numbers.data(), last.data()};
    const seqarch_causal_conv1d_gradients gradients{*dy, dlast.data(), dx.numbers.data(), dweight.data(),
                                                    maybe(has_bias, dbias), maybe(has_state, dstate)};
    const auto forward = with_sizes(seqarch_causal_conv1d_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_causal_conv1d_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, channels, width};
    refuses(sizes, s.offsets, forward, "causal_conv1d_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "causal_conv1d_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "causal_conv1d_forward refused");
    all_written(y.numbers, "causal_conv1d y");
    all_written(last, "causal_conv1d state");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "causal_conv1d_backward refused");
    all_written(dx.numbers, "causal_conv1d dx");
    all_written(dweight, "causal_conv1d dweight");
    if (has_bias) all_written(dbias, "causal_conv1d dbias");
    if (has_state) all_written(dstate, "causal_conv1d dstate");
}
