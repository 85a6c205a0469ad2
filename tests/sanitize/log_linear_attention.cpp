#include "harness.h"

namespace {

void set_sizes(seqarch_log_linear_attention_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.length = n[1], in.groups = n[2], in.heads = n[3], in.keys = n[4], in.values = n[5];
    in.levels = n[6];
}

}  // namespace

void log_linear_attention(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32;
    const int64_t G = random.pick({1, 1, 2, 3}), H = G * random.pick({0, 1, 2, 5}), L = random.pick({9, 10, 14});
    const int64_t K = random.pick({1, 3, 16, 17, 40}), V = random.pick({0, 1, 5, 16, 33, 70});
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const bool has_decay = random.coin(), delta = random.coin();
    const Sequences s(random);
    const int64_t states = s.count * H * (L - 1) * K * V, tokens = s.rows() * s.steps;
    std::vector<int64_t> before;
    for (int64_t i = 0; i < s.count; ++i)
        before.push_back(random.coin() ? (int64_t{1} << (L - 1)) - s.length(i) : random.pick({0, 1, 37, 64, 100}));

    const HeadInputs q(dtype, s, G, K, random), v(dtype, s, H, V, random), dout(dtype, s, H, V, random);
    const HeadInputs weight(wide, s, H, L, random);
    HeadInputs k(dtype, s, G, K, random), beta(wide, s, H, 1, random), decay(wide, s, H, 1, random);
    for (int64_t i = 0; i < k.numbers.count(); ++i) k.numbers.set(i, k.numbers.get(i) / std::sqrt(2.0 * K));
    for (int64_t i = 0; i < beta.numbers.count(); ++i) beta.numbers.set(i, std::fmod(std::fabs(random.normal()), 2.0));
    make_log_decays(decay.numbers, random);
    const Numbers state(wide, states, random), dlast(wide, states, random);
    const Numbers o(dtype, tokens * H * V), last(wide, states), dstate(wide, states);
    const Numbers dq(dtype, tokens * G * K), dk(dtype, dq.count()), dv(dtype, tokens * H * V);
    const Numbers dweight(wide, tokens * H * L), dbeta(wide, tokens * H), ddecay(wide, tokens * H);

    const seqarch_log_linear_attention_inputs inputs{
        dtype, *q, *k, *v, *weight, maybe(delta, beta), maybe(has_decay, decay), 0.5, state.data(), before.data()};
    const seqarch_log_linear_attention_outputs outputs{o.data(), last.data()};
    const seqarch_log_linear_attention_gradients gradients{
        *dout,          dlast.data(),        dq.data(), dk.data(), dv.data(), dweight.data(), maybe(delta, dbeta),
        maybe(has_decay, ddecay), dstate.data()};
    const auto forward = with_sizes(seqarch_log_linear_attention_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_log_linear_attention_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, G, H, K, V, L};
    refuses(sizes, s.offsets, forward, "log_linear_attention_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "log_linear_attention_backward took a wrong size");
    for (size_t i = 0; i < before.size(); ++i)
        for (int64_t wrong : {INT64_MIN, int64_t{-1}, (int64_t{1} << (L - 1)) + 1, INT64_MAX}) {
            const int64_t right = before[i];
            before[i] = wrong;
            require(forward(sizes, s.packed()) == SEQARCH_BAD_ARGUMENT,
                    "log_linear_attention_forward took a wrong count");
            require(backward(sizes, s.packed()) == SEQARCH_BAD_ARGUMENT,
                    "log_linear_attention_backward took a wrong count");
            before[i] = right;
        }
    require(forward(sizes, s.packed()) == SEQARCH_OK, "log_linear_attention_forward refused");
    all_written(o, "log_linear_attention o");
    all_written(last, "log_linear_attention state");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "log_linear_attention_backward refused");
    all_written(dq, "log_linear_attention dq");
    all_written(dk, "log_linear_attention dk");
    all_written(dv, "log_linear_attention dv");
    all_written(dweight, "log_linear_attention dlevel_weight");
    if (delta) all_written(dbeta, "log_linear_attention dbeta");
    if (has_decay) all_written(ddecay, "log_linear_attention dlog_decay");
    all_written(dstate, "log_linear_attention dstate");
}
