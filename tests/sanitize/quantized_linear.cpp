#include "harness.h"

// Codes are any bytes; a call and the same instruction of a tape, on memory of exactly its size.
void quantized_linear(Random& random) {
    const int32_t format = static_cast<int32_t>(random.pick({SEQARCH_INT8, SEQARCH_INT4}));
    const int32_t threads = static_cast<int32_t>(random.pick({1, 2, 3}));
    const int64_t rows = random.pick({0, 1, 2, 3, 4, 5, 9}), group = random.pick({32, 64});
    const int64_t groups = random.pick({0, 1, 2, 3, 4, 16, 17, 33}), depth = group * groups,
                  width = random.pick({0, 1, 7, 40});
    const int64_t bytes = format == SEQARCH_INT8 ? depth : (depth + 127) / 128 * 64;
    std::unique_ptr<uint8_t[]> codes(new uint8_t[width * bytes]);
    for (int64_t i = 0; i < width * bytes; ++i)
        codes[i] = static_cast<uint8_t>(static_cast<int>(random.normal() * 50) & 255);
    const Numbers x(SEQARCH_FLOAT32, rows * depth, random), bias(SEQARCH_FLOAT32, width, random);
    const Numbers scales(SEQARCH_BFLOAT16, width * groups, random), y(SEQARCH_FLOAT32, rows * width);
    const Numbers again(SEQARCH_FLOAT32, rows * width);
    const void* b = random.coin() ? bias.data() : nullptr;
    const auto call = [&](const std::vector<int64_t>& n, const int64_t*) {
        const seqarch_quantized_linear_arguments arguments{format, x.data(), codes.get(), scales.data(), b,
                                                           y.data(), n[0], n[1], n[2], n[3]};
        return seqarch_quantized_linear(&arguments, threads);
    };
    refuses({rows, depth, width, groups}, {}, call, "quantized_linear took a wrong size");
    require(call({rows, depth, width, groups}, nullptr) == SEQARCH_OK, "quantized_linear refused");
    all_written(y, "quantized_linear y");
    seqarch_tape_instruction map{SEQARCH_MAP, format, 0, 0, 0, 0, 0, 1.0, {rows, depth, width, groups, 1, 1}};
    const seqarch_view views[] = {{again.data(), {width, 1, 0, 0, 0}}, {x.data(), {depth, 0, 0, 0, 0}},
                                  {codes.get(), {}}, {const_cast<void*>(b), {}}, {scales.data(), {}}};
    seqarch_tape tape{&map, views, nullptr, nullptr, 1, 0};
    require(seqarch_run_tape(&tape, nullptr, threads) == SEQARCH_OK, "run_tape refused quantised weights");
    for (int64_t i = 0; i < y.count(); ++i) require(y.get(i) == again.get(i), "run_tape has another quantised map");
    map.sizes[1] = depth + 1;
    require(seqarch_run_tape(&tape, nullptr, threads) != SEQARCH_OK, "run_tape took groups that do not divide");
}
