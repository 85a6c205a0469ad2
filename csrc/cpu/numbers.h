// Number types and elementwise functions that compilers turn into vector code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace seqarch {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(bfloat16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }

inline void store(float* to, float value) { *to = value; }
inline void store(double* to, double value) { *to = value; }
inline void store(bfloat16* to, float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;                 // rounding could carry a NaN into inf
    to->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// The accumulation type of an activation type.
template <class T>
struct accumulation {
    using type = float;
};
template <>
struct accumulation<double> {
    using type = double;
};

// The bound with the sign of x where |x| is larger, else x; a NaN stays a NaN. Written on the bits: from a comparison of
// floats, compilers make a second path that multiplies by constants near the smallest normal number, for all lanes.
inline float clamp_magnitude(float x, float bound) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu;
    const uint32_t clamped = std::min(magnitude, __builtin_bit_cast(uint32_t, bound));
    const uint32_t nan = magnitude > 0x7f800000u ? 0x7fc00000u : 0u;
    return __builtin_bit_cast(float, clamped | (bits & 0x80000000u) | nan);
}

// exp(x) to 1.5 ulp. Beyond 87.3 on either side it returns the value there; a NaN stays a NaN.
inline float exponential(float x) {
    x = clamp_magnitude(x, 87.3f);
    // Adding 1.5 * 2^23 leaves the nearest integer n to x / ln 2 in the low bits of the sum.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    // ln 2 in two parts, so that r keeps its low bits; |r| <= ln 2 / 2.
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const uint32_t exponent = (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23;
    return series * __builtin_bit_cast(float, exponent);
}
inline double exponential(double x) { return std::exp(x); }

template <class A>
inline A sigmoid(A x) {
    return A(1) / (A(1) + exponential(-x));
}

}  // namespace seqarch
