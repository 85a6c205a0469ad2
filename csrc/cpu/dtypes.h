// From the interface's number types to those of C++.
#pragma once

#include <new>
#include <stdexcept>

#include "flush_denormals.h"
#include "numbers.h"
#include "seqarch.h"

namespace seqarch {

// Calls f with a null pointer of the activation type, and turns a failed allocation into its code.
template <class F>
int32_t with_dtype(int32_t dtype, F f) {
    const FlushDenormals flush;
    try {
        switch (dtype) {
            case SEQARCH_FLOAT32: f(static_cast<float*>(nullptr)); return SEQARCH_OK;
            case SEQARCH_BFLOAT16: f(static_cast<bfloat16*>(nullptr)); return SEQARCH_OK;
            case SEQARCH_FLOAT64: f(static_cast<double*>(nullptr)); return SEQARCH_OK;
            default: return SEQARCH_BAD_ARGUMENT;
        }
    } catch (const std::bad_alloc&) {
        return SEQARCH_OUT_OF_MEMORY;
    } catch (const std::length_error&) {  // of a std::vector
        return SEQARCH_OUT_OF_MEMORY;
    }
}

}  // namespace seqarch
