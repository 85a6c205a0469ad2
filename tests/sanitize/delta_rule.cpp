#include "harness.h"

namespace {

// Keys of a length that no step multiplies a state by more than a little.
void shorten(Numbers& keys, int64_t width) {
    for (int64_t i = 0; i < keys.count(); ++i) keys.set(i, keys.get(i) / std::sqrt(2.0 * static_cast<double>(width)));
}

void set_sizes(seqarch_delta_rule_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.length = n[1], in.groups = n[2], in.heads = n[3], in.keys = n[4], in.values = n[5];
}

}  // namespace

void delta_rule(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32;
    const int64_t G = random.pick({1, 1, 2, 3}), H = G * random.pick({0, 1, 2, 5});
    const int64_t K = random.pick({1, 3, 16, 17, 40}), V = random.pick({0, 1, 5, 16, 33, 70});
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3})), per_key = random.coin();
    const bool has_decay = random.coin(), has_read = random.coin(), has_erase = random.coin();
    const Sequences s(random);
    const int64_t states = s.count * H * K * V, tokens = s.rows() * s.steps;

    const HeadInputs q(dtype, s, G, K, random), v(dtype, s, H, V, random), dout(dtype, s, H, V, random);
    HeadInputs k(dtype, s, G, K, random), read(dtype, s, G, K, random), erase(dtype, s, G, K, random);
    HeadInputs beta(wide, s, H, 1, random), decay(wide, s, H, per_key ? K : 1, random);
    for (HeadInputs* keys : {&k, &read, &erase}) shorten(keys->numbers, K);
    for (int64_t i = 0; i < beta.numbers.count(); ++i) beta.numbers.set(i, std::fmod(std::fabs(random.normal()), 2.0));
    make_log_decays(decay.numbers, random);
    const Numbers state(wide, states, random), dlast(wide, states, random);
    const Numbers o(dtype, tokens * H * V), last(wide, states), dstate(wide, states);
    const Numbers dq(dtype, tokens * G * K), dk(dtype, dq.count()), dread(dtype, dq.count()), derase(dtype, dq.count());
    const Numbers dv(dtype, tokens * H * V), dbeta(wide, tokens * H), ddecay(wide, tokens * H * (per_key ? K : 1));

    const seqarch_delta_rule_inputs inputs{dtype, per_key, *q, *k, *v, *beta, maybe(has_decay, decay),
                                           maybe(has_read, read), maybe(has_erase, erase), 0.5, state.data()};
    const seqarch_delta_rule_outputs outputs{o.data(), last.data()};
    const seqarch_delta_rule_gradients gradients{
        *dout, dlast.data(), dq.data(), dk.data(), dv.data(), dbeta.data(), maybe(has_decay, ddecay),
        maybe(has_read, dread), maybe(has_erase, derase), dstate.data()};
    const auto forward = with_sizes(seqarch_delta_rule_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_delta_rule_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, G, H, K, V};
    refuses(sizes, s.offsets, forward, "delta_rule_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "delta_rule_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "delta_rule_forward refused");
    all_written(o, "delta_rule o");
    all_written(last, "delta_rule state");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "delta_rule_backward refused");
    all_written(dq, "delta_rule dq");
    all_written(dk, "delta_rule dk");
    all_written(dv, "delta_rule dv");
    all_written(dbeta, "delta_rule dbeta");
    if (has_decay) all_written(ddecay, "delta_rule dlog_decay");
    if (has_read) all_written(dread, "delta_rule dread");
    if (has_erase) all_written(derase, "delta_rule derase");
    all_written(dstate, "delta_rule dstate");
}
