// A linear map of a few rows with weights of 8 or 4 bits. See seqarch.h.
#include "small_weights.h"

#include <atomic>

#include "arguments.h"
#include "buffer.h"
#include "parallel.h"

namespace {

using namespace seqarch;

constexpr int64_t kSmallWork = 1 << 20;  // weights fewer than starting the threads is worth
constexpr int64_t kPart = 16;            // rows of weights at a time: their results fill a line of the cache

bool can_multiply_integers() {
#ifdef SEQARCH_INTEGER_PRODUCTS
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

std::atomic<bool> integers_allowed{can_multiply_integers()};

}  // namespace

bool seqarch::has_integer_products() { return integers_allowed.load(std::memory_order_relaxed); }

int32_t seqarch_integer_products(int32_t allow) {
    integers_allowed = allow && can_multiply_integers();
    return integers_allowed;
}

int32_t seqarch_quantized_linear(const seqarch_quantized_linear_arguments* arguments, int32_t num_threads) {
    const auto& a = *arguments;
    if (num_threads < 1 || !countable({a.rows, a.depth}) || !countable({a.rows, a.width}) ||
        !countable({a.depth, a.width}) || !countable({a.width, a.groups}))
        return SEQARCH_BAD_ARGUMENT;
    const SmallWeights weights{a.format, static_cast<const uint8_t*>(a.codes), static_cast<const bfloat16*>(a.scales),
                               a.depth, a.groups};
    if (!weights.valid()) return SEQARCH_BAD_ARGUMENT;
    const float *x = static_cast<const float*>(a.x), *bias = static_cast<const float*>(a.bias);
    float* y = static_cast<float*>(a.y);
    const int team = a.width * a.depth < kSmallWork ? 1 : num_threads;
    const int64_t parts = (a.width + kPart - 1) / kPart;
    const bool integers = has_integer_products();
    const FlushDenormals flush;
    static thread_local Kept kept;
    uint8_t* prepared;
    try {
        prepared = kept.at_least(prepared_bytes(weights, a.rows, integers));
    } catch (const std::bad_alloc&) {
        return SEQARCH_OUT_OF_MEMORY;
    }
    prepare(weights, a.rows, x, a.depth, integers, prepared);
    parallel_for(parts, team, [&](int64_t part) {
        small_products_of_all(
            weights, part * kPart, std::min(a.width, (part + 1) * kPart), a.rows, integers, prepared,
            [=](int64_t r, int64_t j, float sum) { y[r * a.width + j] = sum + (bias ? bias[j] : 0.0f); });
    });
    return SEQARCH_OK;
}
