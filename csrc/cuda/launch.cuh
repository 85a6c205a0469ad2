// Launches of kernels, their workspace, and sums that several kernels need.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "arguments.h"
#include "seqarch_cuda.h"

namespace seqarch::cuda {

constexpr int kWarp = 32;
constexpr size_t kShared = 48 * 1024;  // bytes of shared memory that a block may have without asking

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The shared memory of a block, of which each kernel has a structure of its own.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// Launches on one stream, up to the first that fails.
class Launches {
  public:
    explicit Launches(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

    // Nothing for an empty grid, which CUDA takes for an error.
    template <class... Formal, class... Actual>
    void operator()(void (*kernel)(Formal...), dim3 grid, unsigned threads, size_t shared, const Actual&... arguments) {
        if (error_ != cudaSuccess || !grid.x || !grid.y) return;
        if (shared > kShared)
            error_ = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error_ != cudaSuccess) return;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared;
        config.stream = stream_;
        error_ = cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...);
    }

    // SEQARCH_OK or the code of the first failure, which the runtime then forgets.
    int32_t code() const {
        if (error_ == cudaSuccess) return SEQARCH_OK;
        cudaGetLastError();
        return SEQARCH_CUDA_ERROR + static_cast<int32_t>(error_);
    }

  private:
    cudaStream_t stream_;
    cudaError_t error_ = cudaSuccess;
};

// A grid of so many blocks.
inline dim3 grid_of(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

// Hands out pieces of the caller's workspace, at multiples of 256 bytes as cudaMalloc does; of none, it counts what it
// would hand out.
class Workspace {
  public:
    explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
        return piece;
    }
    int64_t bytes() const { return std::max<int64_t>(1, used_); }

  private:
    unsigned char* memory_;
    int64_t used_ = 0;
};

// Sums over the lanes of a warp whose numbers differ in log2(kLanes) neighbouring bits, the lowest of weight kStride,
// of kCount values at once: each exchange of lanes halves the values that a lane still adds up, so that it takes about
// kCount shuffles in all. Then lane `place` of the kLanes has in v the sums from Fold::first(place) on.
template <int kCount, int kLanes, int kStride>
struct Fold {
    static constexpr int kKept = kCount > kLanes ? kCount / kLanes : 1;
    static constexpr int kCopies = kLanes > kCount ? kLanes / kCount : 1;
    static __device__ int first(int place) { return place / kCopies * kKept; }
    // Whether this lane is the one to write its sums.
    static __device__ bool writes(int place) { return place % kCopies == 0; }

    template <class A>
    static __device__ __forceinline__ void sum(A* v, int place) {
        step<kCount, kLanes / 2>(v, place);
    }

  private:
    template <int kLive, int kHalf, class A>
    static __device__ __forceinline__ void step(A* v, int place) {
        if constexpr (kHalf >= 1) {
            if constexpr (kLive > 1) {
                const bool upper = place & kHalf;
#pragma unroll
                for (int i = 0; i < kLive / 2; ++i) {
                    const A low = v[i], high = v[i + kLive / 2];
                    v[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kHalf * kStride);
                }
                step<kLive / 2, kHalf / 2>(v, place);
            } else {
                v[0] += __shfl_xor_sync(0xffffffffu, v[0], kHalf * kStride);
                step<1, kHalf / 2>(v, place);
            }
        }
    }
};

constexpr int kSlices = 8;

// Sums `count` shares of `size` numbers each: a block takes 32 numbers, in slices of shares, in a fixed order.
template <class A>
__global__ void __launch_bounds__(kWarp* kSlices)
    sum_shares(const A* __restrict__ shares, int64_t count, int64_t size, A* __restrict__ to) {
    A* sums = reinterpret_cast<A*>(shared_memory());
    const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
    A sum = 0;
    if (i < size)
        for (int64_t share = slice; share < count; share += kSlices) sum += shares[share * size + i];
    sums[slice * kWarp + lane] = sum;
    __syncthreads();
    if (slice || i >= size) return;
    for (int other = 1; other < kSlices; ++other) sum += sums[other * kWarp + lane];
    to[i] = sum;
}

template <class A>
void launch_sum(Launches& launch, const A* shares, int64_t count, int64_t size, A* to) {
    launch(sum_shares<A>, grid_of(ceil_div(size, kWarp)), kWarp * kSlices, sizeof(A) * kWarp * kSlices, shares, count,
           size, to);
}

// The last of the sequences that begin at `item` or before it: of empty ones at the same place, none.
__device__ __forceinline__ int64_t find_sequence(const int64_t* begins, int64_t sequences, int64_t item) {
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (begins[middle] <= item ? low : high) = middle;
    }
    return low;
}

}  // namespace seqarch::cuda
