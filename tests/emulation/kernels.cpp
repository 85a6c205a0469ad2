// The CUDA kernels, emulated, against those of the CPU, over random shapes and on memory of exactly the needed size.
#include <algorithm>

#include "harness.h"
#include "seqarch_cuda.h"

namespace {

// Both tables of packed sequences, as the CUDA functions take them.
std::vector<int64_t> tables(const Sequences& s) {
    std::vector<int64_t> all = s.offsets;
    int64_t chunks = 0;
    for (int64_t i = 0; i < s.count && s.packed(); ++i) {
        all.push_back(chunks);
        chunks += (s.length(i) + SEQARCH_CUDA_CHUNK - 1) / SEQARCH_CUDA_CHUNK;
    }
    if (s.packed()) all.push_back(chunks);
    return all;
}

void set_sizes(seqarch_causal_conv1d_inputs& in, const std::vector<int64_t>& n) {
    in.sequences = n[0], in.length = n[1], in.channels = n[2], in.width = n[3];
}

void set_sizes(seqarch_selective_scan_inputs& in, const std::vector<int64_t>& n) {
    in.sequences = n[0], in.length = n[1], in.channels = n[2], in.state_width = n[3], in.groups = n[4];
}

// Calls a CUDA function twice, as the header says, after the calls that it must refuse.
template <class F, class Inputs, class Outputs>
void run(F f, const Inputs& inputs, const Outputs& outputs, const std::vector<int64_t>& sizes, const char* name) {
    int64_t bytes = 0;
    const auto call = [&](const std::vector<int64_t>& n, const int64_t*) {
        Inputs changed = inputs;
        set_sizes(changed, n);
        return f(&changed, &outputs, nullptr, &bytes, nullptr);
    };
    refuses(sizes, {}, call, name);
    require(call(sizes, nullptr) == SEQARCH_OK && bytes > 0, name);
    const std::unique_ptr<char[]> workspace(new char[bytes]);
    std::fill_n(workspace.get(), bytes, static_cast<char>(0xff));  // NaN, whatever the type
    require(f(&inputs, &outputs, workspace.get(), &bytes, nullptr) == SEQARCH_OK, name);
}

void close(const Numbers& found, const Numbers& expected, double bound, const char* name) {
    all_written(found, name);
    double difference = 0, size = 0;
    for (int64_t i = 0; i < expected.count(); ++i) {
        difference += std::pow(found.get(i) - expected.get(i), 2);
        size += std::pow(expected.get(i), 2);
    }
    if (difference <= bound * bound * std::max(size, 1e-20)) return;
    std::fprintf(stderr, "%s: error %g, bound %g\n", name, std::sqrt(difference / size), bound);
    std::exit(1);
}

double bound_of(int32_t dtype) {
    return dtype == SEQARCH_FLOAT64 ? 1e-11 : dtype == SEQARCH_FLOAT32 ? 2e-5 : 1e-2;
}

void convolution(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t wide = dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32;
    const int64_t channels = random.pick({0, 1, 3, 4, 8, 33, 130}), width = random.pick({2, 3, 4, 5, 6, 7, 8});
    const int32_t silu = random.coin();
    const bool has_bias = random.coin(), has_state = random.coin();
    const Sequences s(random);
    const std::vector<int64_t> both = tables(s);
    const int64_t* offsets = s.packed() ? both.data() : nullptr;
    const Numbers weight(wide, channels * width, random), bias(wide, channels, random);
    const Rows x(dtype, s, channels, random), dy(dtype, s, channels, random);
    const Numbers state(dtype, s.count * (width - 1) * channels, random), dlast(dtype, state.count(), random);
    const auto rows = [&] { return Rows(dtype, s, channels); };
    const auto states = [&] { return Numbers(dtype, state.count()); };

    const std::vector<int64_t> sizes{s.count, s.steps, channels, width};

    const Rows y = rows(), y2 = rows(), dx = rows(), dx2 = rows();
    const Numbers last = states(), last2 = states(), dstate = states(), dstate2 = states();
    const Numbers dweight(wide, weight.count()), dweight2(wide, weight.count()), dbias(wide, channels),
        dbias2(wide, channels);
    seqarch_causal_conv1d_inputs in{*x, weight.data(), maybe(has_bias, bias), maybe(has_state, state), s.packed()};
    set_sizes(in, sizes);
    in.silu = silu;
    seqarch_causal_conv1d_inputs in2 = in;
    in2.offsets = offsets;
    const seqarch_causal_conv1d_outputs out{(*y).data, last.data()}, out2{(*y2).data, last2.data()};
    require(seqarch_causal_conv1d_forward(&in, &out, 1) == SEQARCH_OK, "CPU convolution");
    run(seqarch_cuda_causal_conv1d_forward, in2, out2, sizes, "CUDA convolution");
    close(y2.numbers, y.numbers, bound_of(dtype), "convolution y");
    close(last2, last, 0, "convolution state");
    const auto gradients = [&](const Rows& dx, const Numbers& dw, const Numbers& db, const Numbers& dh) {
        return seqarch_causal_conv1d_gradients{*dy, dlast.data(), (*dx).data, dw.data(), db.data(), dh.data()};
    };
    const auto g = gradients(dx, dweight, dbias, dstate), g2 = gradients(dx2, dweight2, dbias2, dstate2);
    require(seqarch_causal_conv1d_backward(&in, &g, 1) == SEQARCH_OK, "CPU convolution backward");
    run(seqarch_cuda_causal_conv1d_backward, in2, g2, sizes, "CUDA convolution backward");
    close(dx2.numbers, dx.numbers, bound_of(dtype), "convolution dx");
    close(dweight2, dweight, bound_of(wide), "convolution dweight");
    close(dbias2, dbias, bound_of(wide), "convolution dbias");
    close(dstate2, dstate, bound_of(dtype), "convolution dstate");
}

struct ScanGradients {
    Rows dx, ddt, dz, dB, dC;
    Numbers dA, dD, dbias, dstate;
};

void scan(Random& random) {
    const int32_t wide = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_FLOAT64, SEQARCH_FLOAT64}));
    const auto dtype = [&] {
        return static_cast<int32_t>(random.pick({wide, wide, SEQARCH_FLOAT32, SEQARCH_BFLOAT16}));
    };
    const int64_t groups = random.pick({1, 1, 2, 5}), channels = groups * random.pick({0, 1, 3, 16, 33, 65});
    const int64_t N = random.pick({0, 1, 1, 3, 5, 8, 16, 16, 17, wide == SEQARCH_FLOAT64 ? 40 : 70});
    const int32_t softplus = random.coin(), scale_input = random.coin();
    const bool has_z = random.coin(), has_D = random.coin(), has_bias = random.coin(), has_state = random.coin();
    const bool shared = random.coin(), keep = random.coin();
    const Sequences s(random);
    const std::vector<int64_t> both = tables(s);
    const int64_t* offsets = s.packed() ? both.data() : nullptr;
    const auto chunks = [&](int64_t size) {
        int64_t all = 0;
        for (int64_t i = 0; i < s.count; ++i) all += (s.length(i) + size - 1) / size;
        return all;
    };

    Numbers A(wide, channels * N, random);
    for (int64_t i = 0; i < A.count(); ++i)
        A.set(i, random.pick({0, 1, 1}) ? -std::fabs(random.normal()) : random.pick({0, -3}));
    const Numbers D(wide, channels, random), bias(wide, channels, random);
    const Rows x(dtype(), s, channels, random), z(dtype(), s, channels, random), dy(dtype(), s, channels, random);
    Rows dt(dtype(), s, channels, random);
    for (int64_t i = 0; i < dt.numbers.count() && !softplus; ++i)
        dt.numbers.set(i, std::fabs(random.normal()) + (has_bias ? 3 : 0));
    const Rows B(dtype(), s, groups * N, random), C(dtype(), s, groups * N, random);
    const Numbers state(wide, s.count * channels * N, random), dlast(wide, state.count(), random);
    const double bound = std::max({bound_of(wide), bound_of((*x).dtype), bound_of((*dt).dtype), bound_of((*z).dtype),
                                   bound_of((*B).dtype), bound_of((*C).dtype)});

    const std::vector<int64_t> sizes{s.count, s.steps, channels, N, groups};
    const Rows y((*x).dtype, s, channels), y2((*x).dtype, s, channels);
    const Numbers last(wide, state.count()), last2(wide, state.count());
    const Numbers starts(wide, chunks(32) * channels * N), starts2(wide, chunks(SEQARCH_CUDA_CHUNK) * channels * N);
    seqarch_selective_scan_inputs in{wide, softplus, scale_input, *x, *dt, *B, *C, maybe(has_z, z), A.data(),
                                     maybe(has_D, D), maybe(has_bias, bias), maybe(has_state, state), s.packed()};
    set_sizes(in, sizes);
    in.chunk = 32;
    seqarch_selective_scan_inputs in2 = in;
    in2.offsets = offsets;
    in2.chunk = SEQARCH_CUDA_CHUNK;
    const seqarch_selective_scan_outputs out{*y, last.data(), starts.data()};
    const seqarch_selective_scan_outputs out2{*y2, last2.data(), maybe(keep, starts2)};
    require(seqarch_selective_scan_forward(&in, &out, 1) == SEQARCH_OK, "CPU scan");
    run(seqarch_cuda_selective_scan_forward, in2, out2, sizes, "CUDA scan");
    close(y2.numbers, y.numbers, bound, "scan y");
    close(last2, last, bound_of(wide), "scan state");
    if (!keep) return;
    all_written(starts2, "scan starts");

    const auto room = [&] {
        return ScanGradients{
            Rows((*x).dtype, s, channels),   Rows((*dt).dtype, s, channels),  Rows((*z).dtype, s, channels),
            Rows((*B).dtype, s, groups * N), Rows((*C).dtype, s, groups * N), Numbers(wide, A.count()),
            Numbers(wide, channels),         Numbers(wide, channels),         Numbers(wide, state.count())};
    };
    const ScanGradients g = room(), g2 = room();
    const auto gradients = [&](const ScanGradients& g, const Numbers& starts) {
        return seqarch_selective_scan_gradients{starts.data(),
                                                *dy,
                                                dlast.data(),
                                                *g.dx,
                                                *g.ddt,
                                                maybe(shared, g.dB),
                                                maybe(shared, g.dC),
                                                maybe(has_z, g.dz),
                                                g.dA.data(),
                                                maybe(has_D, g.dD),
                                                maybe(has_bias, g.dbias),
                                                g.dstate.data()};
    };
    const auto to = gradients(g, starts), to2 = gradients(g2, starts2);
    require(seqarch_selective_scan_backward(&in, &to, 1) == SEQARCH_OK, "CPU scan backward");
    run(seqarch_cuda_selective_scan_backward, in2, to2, sizes, "CUDA scan backward");
    const double wider = std::max(bound, bound_of((*dy).dtype));
    close(g2.dx.numbers, g.dx.numbers, wider, "scan dx");
    close(g2.ddt.numbers, g.ddt.numbers, wider, "scan ddt");
    if (has_z) close(g2.dz.numbers, g.dz.numbers, wider, "scan dz");
    if (shared) close(g2.dB.numbers, g.dB.numbers, wider, "scan dB");
    if (shared) close(g2.dC.numbers, g.dC.numbers, wider, "scan dC");
    close(g2.dA, g.dA, bound_of(wide), "scan dA");
    if (has_D) close(g2.dD, g.dD, bound_of(wide), "scan dD");
    if (has_bias) close(g2.dbias, g.dbias, bound_of(wide), "scan dbias");
    close(g2.dstate, g.dstate, bound_of(wide), "scan dstate");
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 150;
    for (int seed = 0; seed < rounds; ++seed) {
        Random random(static_cast<uint64_t>(seed));
        convolution(random);
        scan(random);
    }
    std::printf("%d random calls of each emulated CUDA kernel, forward and backward: as the CPU's\n", rounds);
}
