#include "harness.h"

namespace {

// Decays from 1 to 0: rates and step sizes of 0, and where no step size is 0, -inf among the rates.
void make_decays(Numbers& A, Numbers& dt, bool softplus, Random& random) {
    const double extremes[] = {0.0, -1e-9, -1e4, -HUGE_VAL};
    for (int64_t i = 0; i < A.count(); ++i)
        A.set(i, random.pick({0, 0, 1}) ? extremes[random.pick({0, 1, 2, softplus ? 3 : 2})] : -std::fabs(random.normal()));
    for (int64_t i = 0; i < dt.count() && !softplus; ++i) dt.set(i, random.coin() ? 0.0 : std::fabs(random.normal()));
}

}  // namespace

void selective_scan(Random& random) {
    const int32_t wide = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_FLOAT64}));
    const auto dtype = [&] { return static_cast<int32_t>(random.pick({wide, wide, SEQARCH_FLOAT32, SEQARCH_BFLOAT16})); };
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

    const auto maybe = [](bool there, const Numbers& numbers) { return there ? numbers.data() : nullptr; };
    const auto forward = [&](const std::vector<int64_t>& n, const int64_t* offsets) {
        return seqarch_selective_scan_forward(wide, &x, &dt, &B, &C, has_z ? &z : nullptr, A.data(), maybe(has_D, D),
                                              maybe(has_bias, bias), offsets, n[0], n[1], n[2], n[3], n[4], chunk,
                                              softplus, scale_input, maybe(has_state, state), &y, last.data(),
                                              maybe(keep, starts), threads);
    };
    const auto backward = [&](const std::vector<int64_t>& n, const int64_t* offsets) {
        return seqarch_selective_scan_backward(
            wide, &x, &dt, &B, &C, has_z ? &z : nullptr, A.data(), maybe(has_D, D), maybe(has_bias, bias), offsets, n[0],
            n[1], n[2], n[3], n[4], chunk, softplus, scale_input, starts.data(), &dy, dlast.data(), &dx, &ddt,
            shared ? &dB : nullptr, shared ? &dC : nullptr, has_z ? &dz : nullptr, dA.data(), maybe(has_D, dD),
            maybe(has_bias, dbias), dstate.data(), threads);
    };
    const std::vector<int64_t> sizes{s.count, s.steps, channels, N, groups};
    refuses(sizes, s.offsets, forward, "selective_scan_forward took a wrong size");
    refuses(sizes, s.offsets, backward, "selective_scan_backward took a wrong size");
    require(forward(sizes, s.packed()) == SEQARCH_OK, "selective_scan_forward refused");
    all_written(y.numbers, "selective_scan y");
    all_written(last, "selective_scan state");
    if (!keep) return;
    all_written(starts, "selective_scan starts");
    require(backward(sizes, s.packed()) == SEQARCH_OK, "selective_scan_backward refused");
    for (const Rows* rows : {std::addressof(dx), std::addressof(ddt)}) all_written(rows->numbers, "selective_scan dx, ddt");
    if (has_z) all_written(dz.numbers, "selective_scan dz");
    if (shared) all_written(dB.numbers, "selective_scan dB");
    if (shared) all_written(dC.numbers, "selective_scan dC");
    all_written(dA, "selective_scan dA");
    if (has_D) all_written(dD, "selective_scan dD");
    if (has_bias) all_written(dbias, "selective_scan dbias");
    all_written(dstate, "selective_scan dstate");
}
