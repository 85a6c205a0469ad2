// What the library says of itself: its interface, the processor's instruction sets, OpenMP.
#include "seqarch.h"

int32_t seqarch_interface(void) { return SEQARCH_INTERFACE; }

const char* seqarch_best_isa(void) {
#if defined(__x86_64__)
    // The features that CMakeLists.txt compiles each library for, no more and no fewer.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? "avx512" : avx2 ? "avx2" : "baseline";
#else
    return "baseline";
#endif
}

int32_t seqarch_openmp(void) {
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
}
