// The part of CUDA that csrc/cuda uses, for a C++ compiler and a processor: kernels run here, thread by thread.
//
// A block's threads are fibers of one thread of the machine (emulation.cpp). Each runs until it meets a barrier or a
// shuffle; in which order is drawn at random, so that what only holds by chance shows. Stricter than a GPU: a barrier
// that not all threads of a block reach, or a shuffle that not all lanes of a warp reach, ends the program with a
// message. Shared memory is full of NaN when a block begins and ends, for the address sanitizer, where the launch said.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

extern dim3 blockIdx, blockDim, gridDim, threadIdx;

namespace emulation {

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void barrier();
uint64_t exchange(uint64_t bits, int other_lane);

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    if (mask != 0xffffffffu) __builtin_trap();
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = emulation::exchange(bits, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...), Actual... arguments) {
    const std::tuple<Formal...> all(arguments...);
    return emulation::run(reinterpret_cast<const void*>(kernel), *config, [&] { std::apply(kernel, all); });
}
