#include "harness.h"

namespace {

const std::initializer_list<int64_t> kWidths = {0, 1, 3, 16, 17, 64};

int32_t float_dtype(Random& random) {
    return static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_FLOAT64}));
}

}  // namespace

void rms_norm(Random& random) {
    const int32_t dtype = float_dtype(random), threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    Sequences s(random);
    s.offsets.clear();
    const int64_t heads = random.pick({1, 2, 4}), width = random.pick(kWidths), weights = random.coin() ? heads : 1;
    const bool gated = random.coin(), weighted = random.coin();
    const int32_t kind = gated ? static_cast<int32_t>(random.pick({SEQARCH_SILU, SEQARCH_SIGMOID})) : SEQARCH_IDENTITY;
    const HeadInputs x(dtype, s, heads, width, random), z(dtype, s, heads, width, random);
    const HeadInputs dy(dtype, s, heads, width, random);
    const Numbers weight(dtype, weights * width, random);
    const int64_t rows = s.count * s.steps * heads;
    const Numbers y(dtype, rows * width), scale(dtype, rows), dx(dtype, rows * width);
    const Numbers dz(dtype, gated ? rows * width : 0), dweight(dtype, weighted ? weights * width : 0);
    const seqarch_rms_norm_inputs inputs{dtype, kind, random.coin(), *x, maybe(gated, z), maybe(weighted, weight), 1e-5,
                                         0.5, s.count, s.steps, heads, width, weights};
    const seqarch_rms_norm_outputs outputs{y.data(), scale.data()};
    const auto set = [](seqarch_rms_norm_inputs& in, const std::vector<int64_t>& n, const int64_t*) {
        in.batch = n[0], in.length = n[1], in.heads = n[2], in.width = n[3];
    };
    const std::vector<int64_t> sizes{s.count, s.steps, heads, width};
    refuses(sizes, {}, with_sizes(seqarch_rms_norm_forward, inputs, outputs, set, threads), "rms_norm: a wrong size");
    require(seqarch_rms_norm_forward(&inputs, &outputs, threads) == SEQARCH_OK, "rms_norm refused");
    all_written(y, "rms_norm y");
    if (width) all_written(scale, "rms_norm scale");
    const seqarch_rms_norm_gradients gradients{*dy, scale.data(), dx.data(), maybe(gated, dz),
                                               maybe(weighted, dweight)};
    refuses(sizes, {}, with_sizes(seqarch_rms_norm_backward, inputs, gradients, set, threads),
            "rms_norm backward: a wrong size");
    require(seqarch_rms_norm_backward(&inputs, &gradients, threads) == SEQARCH_OK, "rms_norm backward refused");
    all_written(dx, "rms_norm dx");
    all_written(dz, "rms_norm dz");
    all_written(dweight, "rms_norm dweight");
}

void swiglu(Random& random) {
    const int32_t dtype = float_dtype(random), threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const int64_t rows = random.pick({0, 1, 2, 70}), width = random.pick(kWidths);
    const Numbers x(dtype, 2 * rows * width, random), dy(dtype, rows * width, random);
    const Numbers y(dtype, rows * width), dx(dtype, 2 * rows * width);
    const auto forward = [&](const std::vector<int64_t>& n, const int64_t*) {
        const seqarch_swiglu_arguments arguments{dtype, x.data(), y.data(), n[0], n[1]};
        return seqarch_swiglu_forward(&arguments, threads);
    };
    const auto backward = [&](const std::vector<int64_t>& n, const int64_t*) {
        const seqarch_swiglu_gradients arguments{dtype, x.data(), dy.data(), dx.data(), n[0], n[1]};
        return seqarch_swiglu_backward(&arguments, threads);
    };
    refuses({rows, width}, {}, forward, "swiglu: a wrong size");
    refuses({rows, width}, {}, backward, "swiglu backward: a wrong size");
    require(forward({rows, width}, nullptr) == SEQARCH_OK, "swiglu refused");
    require(backward({rows, width}, nullptr) == SEQARCH_OK, "swiglu backward refused");
    all_written(y, "swiglu y");
    all_written(dx, "swiglu dx");
}

void rotary(Random& random) {
    const int32_t dtype = float_dtype(random), threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    Sequences s(random);
    s.offsets.clear();
    const int64_t heads = random.pick({1, 2}), width = random.pick(kWidths), half = random.coin() ? width / 2 : 0;
    const bool apart = random.coin();
    const HeadInputs x(dtype, s, heads, width, random);
    const Numbers y(dtype, s.count * s.steps * heads * width);
    const int64_t places = (apart ? s.count : 1) * s.steps * half;
    const Numbers cosine(dtype, places, random), sine(dtype, places, random);
    const auto call = [&](const std::vector<int64_t>& n, const int64_t*) {
        const seqarch_rotary_arguments arguments{dtype, random.coin(), *x, cosine.data(), sine.data(), y.data(),
                                                 apart ? s.steps : 0, n[0], n[1], n[2], n[3], n[4]};
        return seqarch_rotary(&arguments, threads);
    };
    const std::vector<int64_t> sizes{s.count, s.steps, heads, width, half};
    refuses(sizes, {}, call, "rotary: a wrong size");
    require(call(sizes, nullptr) == SEQARCH_OK, "rotary refused");
    all_written(y, "rotary y");
}
