#include "harness.h"

namespace {

void set_sizes(seqarch_linear_attention_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.length = n[1], in.groups = n[2], in.heads = n[3], in.keys = n[4], in.values = n[5];
}

}  // namespace

void linear_attention(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32;
    const bool narrow = random.coin(), has_decay = narrow || random.coin();
    const int64_t G = random.pick({1, 1, 2, 3});
    const int64_t H = G * (narrow ? random.pick({0, 2, 5, 7, 9, 37}) : random.pick({0, 1, 2, 5}));
    const int64_t K = random.pick({1, 3, 16, 17, 40}), V = narrow ? 1 : random.pick({0, 1, 5, 16, 33, 70});
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3})), per_key = !narrow && random.coin();
    const Sequences s(random);
    const int64_t states = s.count * H * K * V, tokens = s.rows() * s.steps;

    const HeadInputs q(dtype, s, G, K, random), k(dtype, s, G, K, random), v(dtype, s, H, V, random);
    const HeadInputs dout(dtype, s, H, V, random);
    HeadInputs decay(wide, s, H, per_key ? K : 1, random);
    make_log_decays(decay.numbers, random);
    const Numbers state(wide, states, random), dlast(wide, states, random);
    const Numbers o(dtype, tokens * H * V), last(wide, states), dstate(wide, states);
    const Numbers dq(dtype, tokens * G * K), dk(dtype, tokens * G * K), dv(dtype, tokens * H * V);
    const Numbers ddecay(wide, tokens * H * (per_key ? K : 1));

    const seqarch_linear_attention_inputs inputs{dtype, per_key, *q, *k, *v, maybe(has_decay, decay), 0.5,
                                                 state.data()};
    const seqarch_linear_attention_outputs outputs{o.data(), last.data()};
    const seqarch_linear_attention_gradients gradients{*dout, dlast.data(), dq.data(), dk.data(), dv.data(),
                                                       maybe(has_decay, ddecay), dstate.data()};
    const auto forward = with_sizes(seqarch_linear_attention_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_linear_attention_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, G, H, K, V};
    refuses(sizes, s.offsets, forward, "linear_attention_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "linear_attention_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "linear_attention_forward refused");
    all_written(o, "linear_attention o");
    all_written(last, "linear_attention state");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "linear_attention_backward refused");
    all_written(dq, "linear_attention dq");
    all_written(dk, "linear_attention dk");
    all_written(dv, "linear_attention dv");
    if (has_decay) all_written(ddecay, "linear_attention dlog_decay");
    all_written(dstate, "linear_attention dstate");
}
