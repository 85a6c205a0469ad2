// Products of a few rows of float32 with weights of 8 or 4 bits, which are read once.
//
// A row of `depth` weights has a scale for every `group` of them, in bfloat16: weight = code scale. Codes of 8 bits lie
// side by side. Those of 4 bits are held as code + 8 in the order of their weights, two in a byte, the first in its lower
// half; rows are filled up to whole blocks of 128 in 64 bytes. A word of 32 bits so has eight weights of one group: where a
// vector's words are shifted by 4 j bits, lane l has the weight 8 l + j of its block, and one vector of scales serves all.
// x is put into that order first, by prepare(). integer_products.h has the same for processors with AVX-512 VNNI.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "linear.h"
#include "seqarch.h"
#include "simd.h"

namespace seqarch {

constexpr int64_t kBlockWeights = 128, kBlockBytes = 64;  // of 4 bits
constexpr int64_t kWords = 16, kInWord = 8;               // words of a block, and their weights
constexpr int64_t kScales = 16;                           // widened at once

struct SmallWeights {
    int32_t format;  // SEQARCH_INT8 or SEQARCH_INT4
    const uint8_t* codes;
    const bfloat16* scales;
    int64_t depth, groups;

    int64_t group() const { return groups ? depth / groups : 0; }
    int64_t blocks() const { return (depth + kBlockWeights - 1) / kBlockWeights; }
    int64_t row_bytes() const { return format == SEQARCH_INT8 ? depth : blocks() * kBlockBytes; }
    bool valid() const {
        const bool known = format == SEQARCH_INT8 || format == SEQARCH_INT4;
        return known && groups >= 0 && (groups == 0 ? depth == 0 : depth % groups == 0 && (group() == 32 || group() == 64));
    }
};

// run(bits, group) with those of the weights as constants.
template <class Run>
inline void with_format(const SmallWeights& a, Run run) {
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

#include "integer_products.h"

namespace seqarch {

#ifdef __AVX512F__
constexpr __mmask16 kAll = 0xffff;  // of functions without a mask GCC 12 warns
#endif

typedef int32_t Words __attribute__((vector_size(kVectorBytes)));

// The codes that stand in the 4 bits from `shift` on.
inline Vector<float> codes_at(Words words, int shift) {
#ifdef __AVX512F__
    // a lookup by the lowest 4 bits of each lane, in place of a second shift and a conversion
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return reinterpret_cast<Vector<float>>(_mm512_maskz_permutexvar_ps(kAll, reinterpret_cast<__m512i>(words >> shift), values));
#else
    return __builtin_convertvector((words >> shift & 15) - 8, Vector<float>);
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

// Of a vector of scales the one of each lane's group, of 4 bits.
template <int Group>
inline Vector<float> scales_of_lanes(const float* scales) {
    Words which{};
    for (int l = 0; l < kLanes<float>; ++l) which[l] = l * kInWord / Group;
    return __builtin_shuffle(load_vector(scales), which);
}

// total[w][r] += what one block of 4 bits adds, of `Weights` rows of codes and `Rows` rows of x.
template <int Group, int Weights, int Rows>
inline void add_block(const uint8_t* codes, int64_t row_bytes, const float* x, int64_t stride,
                      const float (&scale)[Weights][2 * kScales], int64_t g, Vector<float> (&total)[Weights][Rows]) {
    constexpr int L = kLanes<float>;
#pragma GCC unroll 4
    for (int l = 0; l < kWords; l += L) {
        Vector<float> sum[Weights][Rows] = {};
        Words words[Weights];
        for (int w = 0; w < Weights; ++w) std::memcpy(&words[w], codes + w * row_bytes + 4 * l, sizeof words[w]);
#pragma GCC unroll 8
        for (int j = 0; j < kInWord; ++j) {
            Vector<float> right[Rows];
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) right[r] = load_vector(x + r * stride + j * kWords + l);
#pragma GCC unroll 4
            for (int w = 0; w < Weights; ++w) {
                const Vector<float> left = codes_at(words[w], 4 * j);
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) sum[w][r] += left * right[r];
            }
        }
#pragma GCC unroll 4
        for (int w = 0; w < Weights; ++w) {
            const Vector<float> own = scales_of_lanes<Group>(scale[w] + g + l * kInWord / Group);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) total[w][r] += sum[w][r] * own;
        }
    }
}

// total[w][r] += what one group of 8 bits adds.
template <int Group, int Weights, int Rows>
inline void add_group(const uint8_t* codes, int64_t row_bytes, const float* x, int64_t stride,
                      const float (&scale)[Weights][2 * kScales], int64_t g, Vector<float> (&total)[Weights][Rows]) {
    Vector<float> sum[Weights][Rows] = {};
#pragma GCC unroll 16
    for (int k = 0; k < Group; k += kLanes<float>)
#pragma GCC unroll 4
        for (int w = 0; w < Weights; ++w) {
            const Vector<float> left = load_codes(codes + w * row_bytes + k);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) sum[w][r] += left * load_vector(x + r * stride + k);
        }
    for (int w = 0; w < Weights; ++w)
        for (int r = 0; r < Rows; ++r) total[w][r] += sum[w][r] * scale[w][g];
}

// y[w][r] = x[r] . weights[w] for `Weights` rows of weights and `Rows` prepared rows of x, `stride` apart.
template <int Bits, int Group, int Weights, int Rows>
inline void small_products(const SmallWeights& a, int64_t first, const float* x, int64_t stride,
                           float (&y)[Weights][Rows]) {
    constexpr int kGroups = (Bits == 4 ? kBlockWeights : 64) / Group;  // of 64 bytes of codes
    const int64_t row_bytes = a.row_bytes();
    const uint8_t* codes = a.codes + first * row_bytes;
    const bfloat16* scales = a.scales + first * a.groups;
    Vector<float> total[Weights][Rows] = {};
    alignas(64) float scale[Weights][2 * kScales] = {};
    for (int64_t from = 0; from < a.groups; from += kScales) {
        const int64_t to = std::min(a.groups, from + kScales);
        for (int w = 0; w < Weights; ++w) {
            for (int64_t g = from; g < to; ++g) scale[w][g - from] = load(scales[w * a.groups + g]);
            std::fill(scale[w] + to - from, scale[w] + kScales, 0.0f);
        }
        for (int64_t g = from; g < to; g += kGroups) {
            const uint8_t* block = codes + (Bits == 4 ? g / kGroups * kBlockBytes : g * Group);
#pragma GCC unroll 4
            for (int w = 0; w < Weights; ++w) __builtin_prefetch(block + w * row_bytes + kAhead);
            if constexpr (Bits == 4)
                add_block<Group>(block, row_bytes, x + g * Group, stride, scale, g - from, total);
            else
                for (int64_t i = 0; i < std::min<int64_t>(kGroups, to - g); ++i)
                    add_group<Group>(block + i * Group, row_bytes, x + (g + i) * Group, stride, scale, g - from + i, total);
        }
    }
    for (int w = 0; w < Weights; ++w)
        for (int r = 0; r < Rows; ++r) y[w][r] = sum_of_lanes(total[w][r]);
}

// Bytes that a row of x takes as the products read it, and the products' kind: of integers, or of numbers as they are.
inline int64_t prepared_bytes(const SmallWeights& a, bool integers) {
#ifdef SEQARCH_INTEGER_PRODUCTS
    if (integers) return a.format == SEQARCH_INT8 ? DigitsOfRow<8>::bytes(a.depth) : DigitsOfRow<4>::bytes(a.depth);
#endif
    static_cast<void>(integers);
    return (a.format == SEQARCH_INT8 ? (a.depth + 15) / 16 * 16 : a.blocks() * kBlockWeights) * sizeof(float);
}

// Rows of x, `stride` apart, as the products read them; `to` has prepared_bytes() for each, and begins at a line of the cache.
inline void prepare(const SmallWeights& a, int64_t rows, const float* x, int64_t stride, bool integers, uint8_t* to) {
    const int64_t bytes = prepared_bytes(a, integers);
    for (int64_t r = 0; r < rows; ++r, x += stride, to += bytes) {
#ifdef SEQARCH_INTEGER_PRODUCTS
        if (integers) {
            a.format == SEQARCH_INT8 ? prepare_integers<8>(x, a.depth, to) : prepare_integers<4>(x, a.depth, to);
            continue;
        }
#endif
        float* row = reinterpret_cast<float*>(to);
        if (a.format == SEQARCH_INT8) {
            std::copy_n(x, a.depth, row);
            continue;
        }
        for (int64_t k = 0; k < a.blocks() * kBlockWeights; ++k) {
            const int64_t in_block = k % kBlockWeights;
            row[k - in_block + in_block % kInWord * kWords + in_block / kInWord] = k < a.depth ? x[k] : 0.0f;
        }
    }
}

// Rows [begin, end) of weights with all rows of x, `Together` rows of weights at a time for a single one:
// products(first of weights, first of x, sums), then finish(row of x, row of weights, sum) for each.
template <int Together, class Products, class Finish>
inline void all_products(int64_t begin, int64_t end, int64_t rows, Products products, Finish finish) {
    const auto some = [&](auto weights, auto count, int64_t j, int64_t r) {
        float sums[decltype(weights)::value][decltype(count)::value];
        products(j, r, sums);
        for (int w = 0; w < weights; ++w)
            for (int i = 0; i < count; ++i) finish(r + i, j + w, sums[w][i]);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    const std::integral_constant<int, 3> three;
    const std::integral_constant<int, 4> four;
    const std::integral_constant<int, Together> together;
    int64_t j = begin;
    if (Together > 1 && rows == 1)
        for (; j + Together <= end; j += Together) some(together, one, j, 0);
    for (; j < end; ++j)
        for (int64_t r = 0; r < rows; r += kRows) switch (rows - r) {
                case 1: some(one, one, j, r); break;
                case 2: some(one, two, j, r); break;
                case 3: some(one, three, j, r); break;
                default: some(one, four, j, r);
            }
}

// Rows [begin, end) of weights with all prepared rows of x: finish(row of x, row of weights, sum) for each.
template <class Finish>
inline void small_products_of_all(const SmallWeights& a, int64_t begin, int64_t end, int64_t rows, bool integers,
                                  const uint8_t* x, Finish finish) {
    const int64_t bytes = prepared_bytes(a, integers);
    with_format(a, [&](auto bits, auto group) {
        constexpr int Bits = decltype(bits)::value, Group = decltype(group)::value;
#ifdef SEQARCH_INTEGER_PRODUCTS
        // Rows of weights share what is read of x: 2 of 8 bits, as 4 came slower from memory.
        if (integers)
            return all_products<Bits == 4 ? 4 : 2>(begin, end, rows, [&](int64_t j, int64_t r, auto& sums) {
                integer_products<Bits, Group>(a, j, x + r * bytes, bytes, sums);
            }, finish);
#endif
        const int64_t stride = bytes / sizeof(float);
        all_products<1>(begin, end, rows, [&](int64_t j, int64_t r, auto& sums) {
            small_products<Bits, Group>(a, j, reinterpret_cast<const float*>(x) + r * stride, stride, sums);
        }, finish);
    });
}

}  // namespace seqarch
