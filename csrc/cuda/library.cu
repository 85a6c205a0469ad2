// What the library says of itself.
#include <cuda_runtime.h>

#include "seqarch_cuda.h"

int32_t seqarch_cuda_interface(void) { return SEQARCH_CUDA_INTERFACE; }

const char* seqarch_cuda_error(int32_t code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code - SEQARCH_CUDA_ERROR));
}
