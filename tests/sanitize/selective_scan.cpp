#include "harness.h"

namespace {

// Decays from 1 to 0: rates and step sizes of 0, and where no step size is 0, -inf among the rates.
void make_decays(Numbers& A, Numbers& dt, bool softplus, Random& random) {
    const double extremes[] = {0.0, -1e-9, -1e4, -HUGE_VAL};
    for (int64_t i = 0; i < A.count(); ++i)
        A.set(i, random.pick({0, 0, 1}) ? extremes[random.pick({0, 1, 2, softplus ? 3 : 2})]
                                        : -std::fabs(random.normal()));
    for (int64_t i = 0; i < dt.count() && !softplus; ++i) dt.set(i, random.coin() ? 0.0 : std::fabs(random.normal()));
}

void set_sizes(seqarch_selective_scan_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.length = n[1], in.channels = n[2], in.state_width = n[3], in.groups = n[4];
}

}  // namespace

void selective_scan(Random& random) {
    const int32_t wide = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_FLOAT64}));
    const auto dtype = [&] {
        return static_cast<int32_t>(random.pick({wide, wide, SEQARCH_FLOAT32, SEQARCH_BFLOAT16}));
    };
    const int64_t groups = random.pick({1, 1, 2, 5}), channels = groups * random.pick({0, 1, 3, 16, 33, 130, 300});
    const int64_t N = random.pick({0, 1, 1, 3, 8, 16, 17}), chunk = std::max<int64_t>(1, any_count(random, {1, 3, 32}));
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3})), softplus = random.coin();
    const int32_t scale_input = random.coin();
    const bool has_z = random.coin(), has_D = random.coin(), has_bias = softplus && random.coin();
    const bool has_state = random.coin(), shared = random.coin(), keep = random.coin();
    const Sequences s(random);
    int64_t chunks = 0;
    for (int64_t i = 0; i < s.count; ++i) chunks += s.length(i) / chunk + (s.length(i) % chunk != 0);

    Numbers A(wide, channels * N, random);
    const Numbers D(wide, channels, random), bias(wide, channels, random);
    const Rows x(dtype(), s, channels, random), z(dtype(), s, channels, random), dy(dtype(), s, channels, random);
    Rows dt(dtype(), s, channels, random);
    const Rows B(dtype(), s, groups * N, random), C(dtype(), s, groups * N, random);
    make_decays(A, dt.numbers, softplus != 0, random);
    const Numbers state(wide, s.count * channels * N, random), dlast(wide, s.count * channels * N, random);

    const Rows y((*x).dtype, s, channels), dx((*x).dtype, s, channels), ddt((*dt).dtype, s, channels);
    const Rows dz((*z).dtype, s, channels), dB((*B).dtype, s, groups * N), dC((*C).dtype, s, groups * N);
    const Numbers last(wide, s.count * channels * N), starts(wide, chunks * N * channels), dstate(wide, last.count());
    const Numbers dA(wide, channels * N), dD(wide, channels), dbias(wide, channels);

    seqarch_selective_scan_inputs inputs{wide, softplus, scale_input, *x, *dt, *B, *C, maybe(has_z, z), A.data(),
                                         maybe(has_D, D), maybe(has_bias, bias), maybe(has_state, state)};
    inputs.chunk = chunk;
    const seqarch_selective_scan_outputs outputs{*y, last.data(), maybe(keep, starts)};
    const seqarch_selective_scan_gradients gradients{
        starts.data(), *dy, dlast.data(), *dx, *ddt, maybe(shared, dB), maybe(shared, dC), maybe(has_z, dz), dA.data(),
        maybe(has_D, dD), maybe(has_bias, dbias), dstate.data()};
    const auto forward = with_sizes(seqarch_selective_scan_forward, inputs, outputs, set_sizes, threads);
    const auto backward = with_sizes(seqarch_selective_scan_backward, inputs, gradients, set_sizes, threads);
    const std::vector<int64_t> sizes{s.count, s.steps, channels, N, groups};
    refuses(sizes, s.offsets, forward, "selective_scan_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "selective_scan_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "selective_scan_forward refused");
    all_written(y.numbers, "selective_scan y");
    all_written(last, "selective_scan state");
    if (!keep) return;
    all_written(starts, "selective_scan starts");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "selective_scan_backward refused");
    for (const Rows* rows : {&dx, &ddt}) all_written(rows->numbers, "selective_scan dx, ddt");
    if (has_z) all_written(dz.numbers, "selective_scan dz");
    if (shared) all_written(dB.numbers, "selective_scan dB");
    if (shared) all_written(dC.numbers, "selective_scan dC");
    all_written(dA, "selective_scan dA");
    if (has_D) all_written(dD, "selective_scan dD");
    if (has_bias) all_written(dbias, "selective_scan dbias");
    all_written(dstate, "selective_scan dstate");
}
