#include "harness.h"

void linear(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int64_t rows = random.pick({0, 1, 2, 3, 4, 5, 9}), depth = random.pick({0, 1, 15, 16, 63, 64, 65, 257});
    const int64_t width = random.pick({0, 1, 7, 64});
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const Numbers x(dtype, rows * depth, random), weight(dtype, width * depth, random), bias(dtype, width, random);
    const Numbers y(dtype, rows * width);
    const void* b = random.coin() ? bias.data() : nullptr;
    const auto call = [&](const std::vector<int64_t>& n, const int64_t*) {
        const seqarch_linear_arguments arguments{dtype, x.data(), weight.data(), b, y.data(), n[0], n[1], n[2]};
        return seqarch_linear(&arguments, threads);
    };
    refuses({rows, depth, width}, {}, call, "linear took a wrong size");
    require(call({rows, depth, width}, nullptr) == SEQARCH_OK, "linear refused");
    all_written(y, "linear y");
}
