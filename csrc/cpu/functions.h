// Functions of one number of float32, beside those of numbers.h, that compilers turn into vector code; of float64,
// those of the library of C. The error of sines is below 2e-7, that of the others below 4e-7 of the value, where the
// exponential is a number.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "numbers.h"

namespace seqarch {

constexpr float kMostAngle = 1 << 26;  // |x| of which sines and cosines are right

// sin(x + quarters pi / 2). What is left of x after whole quarters is found in float64.
inline float sine_from(float x, int64_t quarters) {
    // adding 1.5 2^52 leaves the nearest integer in the low bits of the sum
    const double wide = x, shifted = wide * 0.63661977236758134 + 6755399441055744.0;
    const double whole = shifted - 6755399441055744.0;
    const float r = static_cast<float>((wide - whole * 1.5707963267948966) - whole * 6.123233995736766e-17), q = r * r;
    const int64_t quarter = __builtin_bit_cast(int64_t, shifted) + quarters;
    const float sine = r + r * q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880))));
    const float last = 1.0f / 40320 - q * (1.0f / 3628800);
    const float cosine = 1.0f + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * last)));
    const float found = quarter & 1 ? cosine : sine;
    return quarter & 2 ? -found : found;
}
inline float sine(float x) { return sine_from(x, 0); }
inline float cosine(float x) { return sine_from(x, 1); }

// exp(x) - 1, without cancellation; beyond 87.3 on either side the value there, as exponential().
inline float exponential_minus_one(float x) {
    x = clamp_magnitude(x, 87.3f);
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1.0f / 40320;
    series = series * r + 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    const float minus_one = r + r * r * series;
    const float power = __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23);
    return power * minus_one + (power - 1.0f);
}

inline float tanh_of(float x) {
    const float change = exponential_minus_one(-2.0f * std::fabs(x)), size = -change / (change + 2.0f);
    return std::copysign(size, x);
}

// 2 artanh(s) for |s| up to .18
inline float twice_artanh(float s) {
    const float q = s * s;
    return 2.0f * (s + s * q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}

inline float logarithm(float x) {
    // x = m 2^n with m from 1 / sqrt(2) to sqrt(2); numbers below the smallest normal one are scaled first
    const bool small = x < std::numeric_limits<float>::min();
    const uint32_t bits = __builtin_bit_cast(uint32_t, small ? x * 8388608.0f : x);
    const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
    const float m = __builtin_bit_cast(float, bits - (static_cast<uint32_t>(exponent) << 23));
    const float n = static_cast<float>(exponent) - (small ? 23.0f : 0.0f);
    const float found = n * 0.693359375f + (twice_artanh((m - 1.0f) / (m + 1.0f)) - n * 2.12194440e-4f);
    const float infinity = std::numeric_limits<float>::infinity();
    const float of_others = x == 0.0f ? -infinity : x > 0.0f ? x : std::numeric_limits<float>::quiet_NaN();
    return x > 0.0f && x < infinity ? found : of_others;
}

inline float logarithm_of_one_plus(float x) {
    const float u = 1.0f + x, lost = x - (u - 1.0f);
    const float found = logarithm(u) + lost / u;
    return u > 0.0f && u < std::numeric_limits<float>::infinity() ? found : logarithm(u);
}

inline double sine(double x) { return std::sin(x); }
inline double cosine(double x) { return std::cos(x); }
inline double exponential_minus_one(double x) { return std::expm1(x); }
inline double tanh_of(double x) { return std::tanh(x); }
inline double logarithm(double x) { return std::log(x); }
inline double logarithm_of_one_plus(double x) { return std::log1p(x); }

}  // namespace seqarch
