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

inline int64_t load(int64_t value) { return value; }

inline void store(float* to, float value) { *to = value; }
inline void store(int64_t* to, double value) { *to = static_cast<int64_t>(value); }
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

// The bound with the sign of x where |x| is larger, else x; a NaN stays a NaN. Written on the bits: from a comparison
// of floats, compilers make a second path that multiplies by constants near the smallest normal number, for all lanes.
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

// 2^r for |r| <= 1/2, of a number or a vector.
template <class F>
inline F power_of_two_series(F r) {
    F series = 1.5321155e-4f * r + 1.3390160e-3f;
    series = series * r + 9.6185263e-3f;
    series = series * r + 5.5503622e-2f;
    series = series * r + 2.4022648e-1f;
    series = series * r + 6.9314718e-1f;
    return series * r + 1.0f;
}

// 2^x for x up to 127, to 1 ulp; exactly 1 at 0 and exactly 0 from -127 down.
inline float power_of_two(float x) {
    x = std::max(x, -127.0f);
    // Leaves the nearest integer n to x, plus the exponent's bias, in the low bits of the sum.
    const float shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127
    const float series = power_of_two_series(x - (shifted - 12583039.0f));
    return series * __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, shifted) << 23);
}
inline double power_of_two(double x) { return std::exp2(x); }

template <class A>
inline A sigmoid(A x) {
    return A(1) / (A(1) + exponential(-x));
}

// tanh(x), to 1e-7 of 1 in float.
template <class A>
inline A hyperbolic_tangent(A x) {
    const A e = exponential(A(-2) * std::fabs(x)), size = (A(1) - e) / (A(1) + e);
    return x < A(0) ? -size : size;
}

// log(1 + exp(x)), which is x from 20 on.
inline float softplus(float x) {
    // log(1 + e) = 2 artanh(s) with s = e / (2 + e), at most 1/3
    const float e = exponential(-std::fabs(x)), s = e / (2.0f + e), q = s * s;
    float series = 1.2144895e-1f;
    series = series * q + 1.0715342e-1f;
    series = series * q + 1.4308301e-1f;
    series = series * q + 1.9999444e-1f;
    series = series * q + 3.3333337e-1f;
    const float tail = 2.0f * (s + s * q * series);
    return x > 20.0f ? x : x > 0.0f ? x + tail : tail;
}
inline double softplus(double x) { return x > 20.0 ? x : std::log1p(std::exp(x)); }

// Its derivative.
template <class A>
inline A softplus_slope(A x) {
    return x > A(20) ? A(1) : sigmoid(x);
}

}  // namespace seqarch
