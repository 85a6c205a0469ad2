// Numbers too small for a normal one, taken for 0.
#pragma once

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace seqarch {

enum class Denormals { results = 0x8000, results_and_inputs = 0x8040 };

// While one lives, its thread takes such results for 0, and such inputs unless it is told not to: gates that close and
// states that decay towards 0 stay fast, as processors compute with such numbers in microcode, at a hundred cycles and
// more each.
class FlushDenormals {
#ifdef __SSE2__
    unsigned before = _mm_getcsr();

  public:
    explicit FlushDenormals(Denormals which = Denormals::results_and_inputs) {
        _mm_setcsr(before | static_cast<unsigned>(which));
    }
    ~FlushDenormals() { _mm_setcsr(before); }
#else
  public:
    explicit FlushDenormals(Denormals = Denormals::results_and_inputs) {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace seqarch
