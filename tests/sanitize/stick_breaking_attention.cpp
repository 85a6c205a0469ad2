#include "harness.h"

namespace {

void set_sizes(seqarch_stick_breaking_attention_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.queries = n[1], in.keys = n[2], in.groups = n[3], in.heads = n[4];
    in.key_width = n[5], in.value_width = n[6];
}

}  // namespace

void stick_breaking_attention(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32;
    const int64_t G = random.pick({1, 1, 2, 3}), H = G * random.pick({0, 1, 2, 5});
    const int64_t K = random.pick({1, 3, 16, 17, 40}), V = random.pick({0, 1, 5, 16, 33, 70});
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const Sequences s(random);
    Sequences keys = s;
    if (!s.packed()) keys.steps += random.pick({0, 0, 1, 40, 100});
    const int64_t queries = s.rows() * s.steps, seen = keys.rows() * keys.steps;
    const bool has_start = !s.packed() && random.coin();
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < s.count; ++i) starts.push_back(any_count(random, {-1, 0, 3, 64}));

    const HeadInputs q(dtype, s, H, K, random), k(dtype, keys, G, K, random), v(dtype, keys, G, V, random);
    const HeadInputs dout(dtype, s, H, V, random);
    const Numbers o(dtype, queries * H * V), rest(wide, queries * H), drest(wide, queries * H, random);
    const Numbers dq(dtype, queries * H * K), dk(dtype, seen * G * K), dv(dtype, seen * G * V);
    const double scale = random.pick({0, 1}) ? 0.5 : 1e3;  // sticks that are left, and those of which nothing is

    const seqarch_stick_breaking_attention_inputs inputs{dtype, *q, *k, *v, scale, has_start ? starts.data() : nullptr};
    const seqarch_stick_breaking_attention_outputs outputs{o.data(), rest.data()};
    const seqarch_stick_breaking_attention_gradients gradients{*dout, drest.data(), dq.data(), dk.data(), dv.data()};
    const auto forward = with_sizes(seqarch_stick_breaking_attention_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_stick_breaking_attention_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, keys.steps, G, H, K, V};
    refuses(sizes, s.offsets, forward, "stick_breaking_attention_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "stick_breaking_attention_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "stick_breaking_attention_forward refused");
    all_written(o, "stick_breaking_attention o");
    all_written(rest, "stick_breaking_attention rest");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "stick_breaking_attention_backward refused");
    all_written(dq, "stick_breaking_attention dq");
    all_written(dk, "stick_breaking_attention dk");
    all_written(dv, "stick_breaking_attention dv");
}
