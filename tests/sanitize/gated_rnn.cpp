#include "harness.h"

namespace {

void set_sizes(seqarch_gated_rnn_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.length = n[1], in.heads = n[2], in.width = n[3];
}

}  // namespace

void gated_rnn(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32;
    const int32_t cell = static_cast<int32_t>(random.pick({SEQARCH_SLSTM, SEQARCH_LSTM, SEQARCH_GRU}));
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const int64_t gates = cell == SEQARCH_GRU ? 3 : 4, count = cell == SEQARCH_SLSTM ? 4 : cell == SEQARCH_LSTM ? 2 : 1;
    const int64_t heads = random.pick({0, 1, 2, 3}), width = random.pick({0, 1, 3, 16, 33});
    Sequences s(random);
    if (s.offsets.empty()) s.count *= random.pick({1, 3});
    const int64_t channels = heads * width, tokens = s.rows() * s.steps;

    const Rows x(dtype, s, gates * channels, random), dout(dtype, s, channels, random);
    const Numbers weight(wide, gates * channels * width, random), bias(wide, gates * channels, random);
    const Numbers state(wide, s.count * count * channels), dlast(wide, s.count * count * channels, random);
    for (int64_t i = 0; i < state.count(); ++i) state.set(i, random.pick({0, 1}) ? 0 : std::fabs(random.normal()));
    const Rows o(dtype, s, channels), dx(dtype, s, gates * channels);
    const Numbers steps(wide, tokens * count * channels), last(wide, state.count()), dstate(wide, state.count());
    const Numbers dweight(wide, weight.count()), dbias(wide, bias.count());

    const seqarch_gated_rnn_inputs inputs{wide, cell, *x, weight.data(), bias.data(), state.data()};
    const seqarch_gated_rnn_outputs outputs{*o, steps.data(), last.data()};
    const seqarch_gated_rnn_gradients gradients{*dout,          steps.data(), dlast.data(),  *dx,
                                                dweight.data(), dbias.data(), dstate.data()};
    const auto forward = with_sizes(seqarch_gated_rnn_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_gated_rnn_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, heads, width};
    refuses(sizes, s.offsets, forward, "gated_rnn_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "gated_rnn_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "gated_rnn_forward refused");
    all_written(o.numbers, "gated_rnn o");
    all_written(steps, "gated_rnn steps");
    all_written(last, "gated_rnn last");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "gated_rnn_backward refused");
    all_written(dx.numbers, "gated_rnn dx");
    all_written(dweight, "gated_rnn dweight");
    all_written(dbias, "gated_rnn dbias");
    all_written(dstate, "gated_rnn dstate");
}
