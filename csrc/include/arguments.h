// What every function asks of its sizes before it computes with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace seqarch {

// More numbers than any memory has, few enough that the bytes of some such buffers are counted in 63 bits.
constexpr int64_t kMostNumbers = int64_t{1} << 58;

// Whether sizes are at least 0 and that many numbers, of any of these sizes, can be counted.
inline bool countable(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (int64_t size : sizes) {
        if (size < 0 || size > kMostNumbers / product) return false;
        product *= std::max<int64_t>(size, 1);
    }
    return true;
}

// Whether offsets, if there are any, pack sequences into so many rows; the caller's `sequences` is at least 0.
inline bool packs(const int64_t* offsets, int64_t sequences, int64_t rows) {
    if (!offsets) return true;
    return offsets[0] == 0 && offsets[sequences] == rows && std::is_sorted(offsets, offsets + sequences + 1);
}

}  // namespace seqarch
