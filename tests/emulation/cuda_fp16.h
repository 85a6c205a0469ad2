// Half precision as in CUDA's header of this name, as far as csrc/cuda uses it.
#pragma once

#include <cstring>

struct __half {
    unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
    _Float16 half;
    memcpy(&half, &value.bits, sizeof half);
    return half;
}
inline __half __float2half_rn(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    __half result;
    memcpy(&result.bits, &half, sizeof half);
    return result;
}
