// Products of a few rows of float32 with weights of 8 or 4 bits, which are read once.
//
// A row of `depth` weights has a scale for every `group` of them, in bfloat16: weight = code scale. Codes of 8 bits lie
// side by side. Those of 4 bits, in two's complement, lie in blocks of 128 in 64 bytes, the last block filled up: as 16
// words of 32 bits, word l of which holds in its j-th 4 bits from below the code 16 j + l of the block. So one shift of a
// vector of words gives codes whose factors lie side by side in x, on vectors of 4, 8 and 16 lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "linear.h"
#include "seqarch.h"
#include "simd.h"

namespace seqarch {

constexpr int64_t kBlockWeights = 128;  // of 4 bits
constexpr int64_t kScales = 16;         // widened at once

struct SmallWeights {
    int32_t format;  // SEQARCH_INT8 or SEQARCH_INT4
    const uint8_t* codes;
    const bfloat16* scales;
    int64_t depth, groups;

    int64_t group() const { return groups ? depth / groups : 0; }
    int64_t row_bytes() const {
        return format == SEQARCH_INT8 ? depth : (depth + kBlockWeights - 1) / kBlockWeights * (kBlockWeights / 2);
    }
    bool valid() const {
        const bool known = format == SEQARCH_INT8 || format == SEQARCH_INT4;
        return known && groups >= 0 && (groups == 0 ? depth == 0 : depth % groups == 0 && (group() == 32 || group() == 64));
    }
};

#ifdef __AVX512F__
constexpr __mmask16 kAll = 0xffff;  // of functions without a mask GCC 12 warns
#endif

typedef int32_t Words __attribute__((vector_size(kVectorBytes)));

// The codes that stand in the 4 bits from `shift` on.
inline Vector<float> codes_at(Words words, int shift) {
#ifdef __AVX512F__
    // a lookup by the lowest 4 bits of each lane, in place of a second shift and a conversion
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return reinterpret_cast<Vector<float>>(_mm512_maskz_permutexvar_ps(kAll, reinterpret_cast<__m512i>(words >> shift), values));
#else
    return __builtin_convertvector(words << (28 - shift) >> 28, Vector<float>);
#endif
}

inline Vector<float> load_codes(const uint8_t* from) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes<float>)));
    Bytes codes;
    std::memcpy(&codes, from, sizeof codes);
#ifdef __AVX512F__
    return reinterpret_cast<Vector<float>>(
        _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, reinterpret_cast<__m128i>(codes))));
#else
    return __builtin_convertvector(__builtin_convertvector(codes, Words), Vector<float>);
#endif
}

// sum[w][r] = the products of group `g` of a block of `Weights` rows of codes and of `Rows` rows of x.
template <int Bits, int Group, int Weights, int Rows>
inline void products_of_group(const uint8_t* codes, int64_t row_bytes, int g, const float* x, int64_t stride,
                              Vector<float> (&sum)[Weights][Rows]) {
    constexpr int L = kLanes<float>;
#pragma GCC unroll 16
    for (int k = 0; k < Group; k += L) {
        Vector<float> right[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) right[r] = load_vector(x + r * stride + g * Group + k);
#pragma GCC unroll 4
        for (int w = 0; w < Weights; ++w) {
            Vector<float> left;
            if constexpr (Bits == 8) {
                left = load_codes(codes + w * row_bytes + g * Group + k);
            } else {
                Words words;
                std::memcpy(&words, codes + w * row_bytes + k % 16 * 4, sizeof words);
                left = codes_at(words, 4 * ((g * Group + k) / 16));
            }
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) sum[w][r] = k == 0 ? left * right[r] : sum[w][r] + left * right[r];
        }
    }
}

// y[w][r] = x[r] . weights[w] for `Weights` rows of weights and `Rows` rows of x, `stride` apart.
template <int Bits, int Group, int Weights, int Rows>
inline void small_products(const SmallWeights& a, int64_t first, const float* x, int64_t stride,
                           float (&y)[Weights][Rows]) {
    constexpr int kGroups = kBlockWeights / Group, kBytes = kBlockWeights * Bits / 8;
    const int64_t row_bytes = a.row_bytes();
    const uint8_t* codes = a.codes + first * row_bytes;
    const bfloat16* scales = a.scales + first * a.groups;
    Vector<float> total[Weights][Rows] = {};
    alignas(64) float scale[Weights][kScales];
    for (int64_t from = 0; from < a.groups; from += kScales) {
        const int64_t to = std::min(a.groups, from + kScales);
        for (int w = 0; w < Weights; ++w)
            for (int64_t g = from; g < to; ++g) scale[w][g - from] = load(scales[w * a.groups + g]);
        for (int64_t g = from; g < to; g += kGroups) {
            const uint8_t* block = codes + g / kGroups * kBytes;
            const float* part = x + g * Group;
#pragma GCC unroll 4
            for (int w = 0; w < Weights; ++w)
#pragma GCC unroll 2
                for (int line = 0; line < kBytes; line += 64)
                    __builtin_prefetch(block + w * row_bytes + line + kAhead);
            const auto add = [&](int inner) __attribute__((always_inline)) {
                Vector<float> sum[Weights][Rows];
                products_of_group<Bits, Group>(block, row_bytes, inner, part, stride, sum);
#pragma GCC unroll 4
                for (int w = 0; w < Weights; ++w)
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; ++r) total[w][r] += sum[w][r] * scale[w][g - from + inner];
            };
            if (g + kGroups <= to) {
#pragma GCC unroll 4
                for (int inner = 0; inner < kGroups; ++inner) add(inner);
            } else {
                for (int inner = 0; inner < to - g; ++inner) add(inner);
            }
        }
    }
    for (int w = 0; w < Weights; ++w)
        for (int r = 0; r < Rows; ++r) y[w][r] = sum_of_lanes(total[w][r]);
}

// Rows [begin, end) of weights with all rows of x: finish(row of x, row of weights, sum) for each.
template <int Bits, int Group, class Finish>
inline void small_products_of_all(const SmallWeights& a, int64_t begin, int64_t end, int64_t rows, const float* x,
                                  int64_t stride, Finish finish) {
    const auto some = [&](auto weights, auto count, int64_t j, int64_t r) {
        float sums[decltype(weights)::value][decltype(count)::value];
        small_products<Bits, Group>(a, j, x + r * stride, stride, sums);
        for (int w = 0; w < weights; ++w)
            for (int i = 0; i < count; ++i) finish(r + i, j + w, sums[w][i]);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    const std::integral_constant<int, 3> three;
    const std::integral_constant<int, 4> four;
    int64_t j = begin;
    // Of 4 bits several rows of weights share what is read of x, as reading is not all there is to do. Codes of 8 bits come
    // from memory 1.6 times as fast where they are read in their order.
    if (Bits == 4 && rows == 1)
        for (; j + 4 <= end; j += 4) some(four, one, j, 0);
    for (; j < end; ++j)
        for (int64_t r = 0; r < rows; r += kRows) switch (rows - r) {
                case 1: some(one, one, j, r); break;
                case 2: some(one, two, j, r); break;
                case 3: some(one, three, j, r); break;
                default: some(one, four, j, r);
            }
}

template <class Finish>
inline void small_products_of_all(const SmallWeights& a, int64_t begin, int64_t end, int64_t rows, const float* x,
                                  int64_t stride, Finish finish) {
    const auto run = [&](auto bits, auto group) {
        small_products_of_all<decltype(bits)::value, decltype(group)::value>(a, begin, end, rows, x, stride, finish);
    };
    const std::integral_constant<int, 4> four;
    const std::integral_constant<int, 8> eight;
    const std::integral_constant<int, 32> narrow;
    const std::integral_constant<int, 64> wide;
    if (a.format == SEQARCH_INT8)
        a.group() == 64 ? run(eight, wide) : run(eight, narrow);
    else
        a.group() == 64 ? run(four, wide) : run(four, narrow);
}

}  // namespace seqarch
