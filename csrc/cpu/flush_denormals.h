// Numbers too small for a normal one, taken for 0.
#pragma once

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace seqarch {

// While one lives, its thread takes such numbers for 0, given ones and results: gates that close and states that decay
// towards 0 stay fast, as processors compute with such numbers in microcode, at a hundred cycles and more each.
class FlushDenormals {
#ifdef __SSE2__
    unsigned before = _mm_getcsr();

  public:
    FlushDenormals() { _mm_setcsr(before | 0x8040u); }
    ~FlushDenormals() { _mm_setcsr(before); }
#else
  public:
    FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace seqarch
