#include "harness.h"

void transpose(Random& random) {
    const int32_t dtype = static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}));
    const int32_t bytes = dtype == SEQARCH_FLOAT64 ? 8 : dtype == SEQARCH_FLOAT32 ? 4 : 2;
    const int64_t rows = random.pick({0, 1, 7, 32, 33, 65}), columns = random.pick({0, 1, 15, 32, 64, 70});
    const int64_t first = random.pick({0, 3, 32}), width = first + rows;
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const Numbers x(dtype, rows * columns, random), before(dtype, first * columns, random);
    const Numbers y(dtype, width * columns);
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < first; ++i) y.set(j * width + i, before.get(j * first + i));
    const auto call = [&](const std::vector<int64_t>& n, const int64_t*) {
        const seqarch_transpose_arguments arguments{bytes, x.data(), y.data(), n[0], n[1], n[2], n[3]};
        return seqarch_transpose(&arguments, threads);
    };
    refuses({rows, columns, first, width}, {}, call, "transpose took a wrong size");
    require(call({rows, columns, first, width}, nullptr) == SEQARCH_OK, "transpose refused");
    all_written(y, "transpose y");
    for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < first; ++i)
            require(y.get(j * width + i) == before.get(j * first + i), "transpose wrote beside its place");
        for (int64_t i = 0; i < rows; ++i)
            require(y.get(j * width + first + i) == x.get(i * columns + j), "transpose moved a number elsewhere");
    }
}
