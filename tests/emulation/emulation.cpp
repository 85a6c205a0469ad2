// Runs a grid of CUDA threads as fibers, block after block.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

constexpr size_t kMemory = 227 * 1024, kWithoutAsking = 48 * 1024, kStack = 256 * 1024;
constexpr unsigned kLanes = 32, kMostThreads = 1024, kMostRows = 65535;

}  // namespace

namespace seqarch::cuda {
alignas(16) unsigned char memory[kMemory];
}

dim3 blockIdx, blockDim, gridDim, threadIdx;

namespace emulation {
namespace {

enum class State { kReady, kBarrier, kExchange, kDone };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::kDone;
    uint64_t bits = 0;
    int other = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
ucontext_t scheduler;
const std::function<void()>* body;
std::map<const void*, size_t> allowed;
std::mt19937 order(1);
std::mutex one_at_a_time;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_size;
#endif

void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation, block (%u, %u): %s\n", blockIdx.x, blockIdx.y, what);
    std::abort();
}

void to_scheduler() {
    Fiber* own = running;
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
#endif
    swapcontext(&own->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

void live() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    for (;;) {
        (*body)();
        running->state = State::kDone;
        to_scheduler();
    }
}

void resume(unsigned thread) {
    running = fibers[thread].get();
    threadIdx = dim3(thread, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, running->stack.get(), kStack);
#endif
    swapcontext(&scheduler, &running->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void wait(State state) {
    running->state = state;
    const dim3 own = threadIdx;
    to_scheduler();
    threadIdx = own;
}

bool all(unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i)
        if (fibers[i]->state != state) return false;
    return true;
}

// Runs each thread of a warp up to a barrier or its end, in an order that differs from time to time.
void run_warp(unsigned first) {
    uint64_t posted[kLanes];
    for (;;) {
        const unsigned start = order() % kLanes, step = order() % 2 ? 1 : kLanes - 1;
        for (unsigned i = 0; i < kLanes; ++i) {
            const unsigned thread = first + (start + i * step) % kLanes;
            if (fibers[thread]->state == State::kReady) resume(thread);
        }
        if (!all(first, first + kLanes, State::kExchange)) break;
        for (unsigned i = 0; i < kLanes; ++i) posted[i] = fibers[first + i]->bits;
        for (unsigned i = 0; i < kLanes; ++i) {
            fibers[first + i]->bits = posted[fibers[first + i]->other];
            fibers[first + i]->state = State::kReady;
        }
    }
    for (unsigned i = first; i < first + kLanes; ++i)
        if (fibers[i]->state == State::kExchange) fail("not all lanes of a warp reach a shuffle");
}

void run_block(unsigned threads, size_t shared) {
    std::memset(seqarch::cuda::memory, 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(seqarch::cuda::memory, shared);
    ASAN_POISON_MEMORY_REGION(seqarch::cuda::memory + shared, kMemory - shared);
#endif
    for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
    const unsigned warps = threads / kLanes;
    while (!all(0, threads, State::kDone)) {
        const unsigned start = order() % warps;
        for (unsigned i = 0; i < warps; ++i) run_warp((start + i) % warps * kLanes);
        if (all(0, threads, State::kDone)) break;
        if (!all(0, threads, State::kBarrier)) fail("not all threads of a block reach a barrier");
        for (unsigned i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(seqarch::cuda::memory, kMemory);
#endif
}

void provide(unsigned threads) {
    while (fibers.size() < threads) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack.reset(new char[kStack]);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = kStack;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, live, 0);
        fibers.push_back(std::move(fiber));
    }
}

}  // namespace

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const dim3 grid = config.gridDim;
    const unsigned threads = config.blockDim.x;
    const auto asked = allowed.find(kernel);
    if (config.dynamicSmemBytes > (asked == allowed.end() ? kWithoutAsking : asked->second))
        return cudaErrorInvalidValue;
    if (!grid.x || !grid.y || grid.x > 0x7fffffffu || grid.y > kMostRows || !threads || threads > kMostThreads ||
        threads % kLanes)
        return cudaErrorInvalidConfiguration;
    provide(threads);
    body = &thread;
    blockDim = config.blockDim;
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            run_block(threads, config.dynamicSmemBytes);
        }
    return cudaSuccess;
}

void barrier() { wait(State::kBarrier); }

uint64_t exchange(uint64_t bits, int other_lane) {
    Fiber* own = running;
    own->bits = bits;
    own->other = other_lane;
    wait(State::kExchange);
    return own->bits;
}

}  // namespace emulation

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value < 0 || static_cast<size_t>(value) > kMemory) return cudaErrorInvalidValue;
    emulation::allowed[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
           : error == cudaErrorInvalidValue       ? "invalid argument"
                                                  : "no error";
}
