// Numbers on the device: dtypes of memory, four neighbours at a time, and elementwise functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "seqarch_cuda.h"

namespace seqarch::cuda {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Tags of the dtypes: how each lies in memory, and to and from a number of accumulation type.
struct Float32 {
    using Bits = float;
    static __device__ float load(float bits) { return bits; }
    static __device__ float store(float value) { return value; }
};
struct Float64 {
    using Bits = double;
    static __device__ double load(double bits) { return bits; }
    static __device__ double store(double value) { return value; }
};
struct Float16 {
    using Bits = unsigned short;
    static __device__ float load(Bits bits) { return __half2float(__ushort_as_half(bits)); }
    static __device__ Bits store(float value) { return __half_as_ushort(__float2half_rn(value)); }
};
struct BFloat16 {
    using Bits = unsigned short;
    static __device__ float load(Bits bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
    static __device__ Bits store(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

constexpr int kFour = 4;

template <class Bits>
struct alignas(sizeof(Bits) * kFour) Four {
    Bits at[kFour];
};

// Calls f with the tag of a dtype; the same branch for all threads. Sums of float meet no float64.
template <class A, class F>
__device__ __forceinline__ void with_dtype(int32_t dtype, F f) {
    if (dtype == SEQARCH_BFLOAT16)
        f(BFloat16());
    else if (dtype == SEQARCH_FLOAT16)
        f(Float16());
    else if (std::is_same_v<A, float> || dtype == SEQARCH_FLOAT32)
        f(Float32());
    else
        f(Float64());
}

inline __host__ __device__ int64_t bytes_of(int32_t dtype) {
    return dtype == SEQARCH_FLOAT64 ? 8 : dtype == SEQARCH_FLOAT32 ? 4 : 2;
}

// Reads `count` of four neighbours, 0 for the others, in one access where they are all there and `aligned`.
template <class A>
__device__ __forceinline__ void load_four(const void* data, int32_t dtype, bool aligned, int64_t element, int count,
                                          A (&to)[kFour]) {
    with_dtype<A>(dtype, [&](auto tag) {
        using Tag = decltype(tag);
        using Bits = typename Tag::Bits;
        const Bits* from = static_cast<const Bits*>(data) + element;
        if (aligned && count >= kFour) {
            const Four<Bits> all = *reinterpret_cast<const Four<Bits>*>(from);
#pragma unroll
            for (int i = 0; i < kFour; ++i) to[i] = static_cast<A>(Tag::load(all.at[i]));
        } else {
#pragma unroll
            for (int i = 0; i < kFour; ++i) to[i] = i < count ? static_cast<A>(Tag::load(from[i])) : A(0);
        }
    });
}

template <class A>
__device__ __forceinline__ void store_four(void* data, int32_t dtype, bool aligned, int64_t element, int count,
                                           const A (&values)[kFour]) {
    with_dtype<A>(dtype, [&](auto tag) {
        using Tag = decltype(tag);
        using Bits = typename Tag::Bits;
        Bits* to = static_cast<Bits*>(data) + element;
        if (aligned && count >= kFour) {
            Four<Bits> all;
#pragma unroll
            for (int i = 0; i < kFour; ++i) all.at[i] = Tag::store(values[i]);
            *reinterpret_cast<Four<Bits>*>(to) = all;
        } else {
#pragma unroll
            for (int i = 0; i < kFour; ++i)
                if (i < count) to[i] = Tag::store(values[i]);
        }
    });
}

template <class A>
__device__ __forceinline__ A load_one(const void* data, int32_t dtype, int64_t element) {
    A value;
    with_dtype<A>(dtype, [&](auto tag) {
        using Tag = decltype(tag);
        value = static_cast<A>(Tag::load(static_cast<const typename Tag::Bits*>(data)[element]));
    });
    return value;
}

template <class A>
__device__ __forceinline__ void store_one(void* data, int32_t dtype, int64_t element, A value) {
    with_dtype<A>(dtype, [&](auto tag) {
        using Tag = decltype(tag);
        static_cast<typename Tag::Bits*>(data)[element] = Tag::store(value);
    });
}

// Compiled with -ftz=true, the first is one instruction.
__device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
    return A(1) / (A(1) + power_of_two(x * static_cast<A>(-kLog2E)));
}

// log(1 + exp(x)), which is x from 20 on.
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ __forceinline__ double softplus(double x) { return x > 20.0 ? x : log1p(exp(x)); }

template <class A>
__device__ __forceinline__ A softplus_slope(A x) {
    return x > A(20) ? A(1) : sigmoid(x);
}

}  // namespace seqarch::cuda
