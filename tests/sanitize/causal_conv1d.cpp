#include "harness.h"

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

    const void *b = has_bias ? bias.data() : nullptr, *h = has_state ? state.data() : nullptr;
    const auto forward = [&](const std::vector<int64_t>& n, const int64_t* offsets) {
        return seqarch_causal_conv1d_forward(dtype, x.numbers.data(), (*x).batch_stride, (*x).time_stride, weight.data(),
                                             b, h, y.numbers.data(), last.data(), offsets, n[0], n[1], n[2], n[3], silu,
                                             threads);
    };
    const auto backward = [&](const std::vector<int64_t>& n, const int64_t* offsets) {
        return seqarch_causal_conv1d_backward(
            dtype, x.numbers.data(), (*x).batch_stride, (*x).time_stride, weight.data(), b, h, dy.numbers.data(),
            (*dy).batch_stride, (*dy).time_stride, dlast.data(), dx.numbers.data(), dweight.data(),
            has_bias ? dbias.data() : nullptr, has_state ? dstate.data() : nullptr, offsets, n[0], n[1], n[2], n[3],
            silu, threads);
    };
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
