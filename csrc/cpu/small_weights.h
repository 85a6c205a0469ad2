// Products of a few rows of float32 with weights of 8 or 4 bits, which are read once.
//
// A row of `depth` weights has a scale for every `group` of them, in bfloat16: weight = code scale. Codes of 8 bits lie
// side by side. Those of 4 bits are held as code + 8 in the order of their weights, two in a byte, the first in its
// lower half; rows are filled up to whole blocks of 128 in 64 bytes. A word of 32 bits so has eight weights of one
// group: where a vector's words are shifted by 4 j bits, lane l has the weight 8 l + j of its block, and one vector of
// scales serves all. x is put into that order first, by prepare(). integer_products.h has the same for processors with
// AVX-512 VNNI.
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
constexpr int kRowsOfX = 4;                               // that share what is read of a row of weights

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
        return known && groups >= 0 &&
               (groups == 0 ? depth == 0 : depth % groups == 0 && (group() == 32 || group() == 64));
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
    return reinterpret_cast<Vector<float>>(
        _mm512_maskz_permutexvar_ps(kAll, reinterpret_cast<__m512i>(words >> shift), values));
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

// total[r] += what one block of 4 bits adds, for `Rows` rows of x; `scale` begins at the block's first.
template <int Group, int Rows>
inline void add_block(const uint8_t* codes, const float* x, int64_t stride, const float* scale,
                      Vector<float> (&total)[Rows]) {
    constexpr int L = kLanes<float>;
#pragma GCC unroll 4
    for (int l = 0; l < kWords; l += L) {
        Vector<float> sum[Rows] = {};
        Words words;
        std::memcpy(&words, codes + 4 * l, sizeof words);
#pragma GCC unroll 8
        for (int j = 0; j < kInWord; ++j) {
            const Vector<float> left = codes_at(words, 4 * j);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) sum[r] += left * load_vector(x + r * stride + j * kWords + l);
        }
        const Vector<float> own = scales_of_lanes<Group>(scale + l * kInWord / Group);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) total[r] += sum[r] * own;
    }
}

// total[r] += what one group of 8 bits adds.
template <int Group, int Rows>
inline void add_group(const uint8_t* codes, const float* x, int64_t stride, float scale, Vector<float> (&total)[Rows]) {
    Vector<float> sum[Rows] = {};
#pragma GCC unroll 16
    for (int k = 0; k < Group; k += kLanes<float>) {
        const Vector<float> left = load_codes(codes + k);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) sum[r] += left * load_vector(x + r * stride + k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) total[r] += sum[r] * scale;
}

// y[r] = x[r] . weights[row] for `Rows` prepared rows of x, `stride` apart.
template <int Bits, int Group, int Rows>
inline void small_products(const SmallWeights& a, int64_t row, const float* x, int64_t stride, float (&y)[Rows]) {
    constexpr int kGroups = (Bits == 4 ? kBlockWeights : 64) / Group;  // of 64 bytes of codes
    const uint8_t* codes = a.codes + row * a.row_bytes();
    const bfloat16* scales = a.scales + row * a.groups;
    Vector<float> total[Rows] = {};
    alignas(64) float scale[2 * kScales] = {};  // a vector of them is read from any
    for (int64_t from = 0; from < a.groups; from += kScales) {
        const int64_t to = std::min(a.groups, from + kScales);
        for (int64_t g = from; g < to; ++g) scale[g - from] = load(scales[g]);
        std::fill(scale + to - from, scale + kScales, 0.0f);
        for (int64_t g = from; g < to; g += kGroups) {
            const uint8_t* block = codes + (Bits == 4 ? g / kGroups * kBlockBytes : g * Group);
            __builtin_prefetch(block + kAhead);
            if constexpr (Bits == 4)
                add_block<Group>(block, x + g * Group, stride, scale + g - from, total);
            else
                for (int64_t i = 0; i < std::min<int64_t>(kGroups, to - g); ++i)
                    add_group<Group>(block + i * Group, x + (g + i) * Group, stride, scale[g - from + i], total);
        }
    }
    for (int r = 0; r < Rows; ++r) y[r] = sum_of_lanes(total[r]);
}

// How x is read: one row as integers where that may be, as several cost no less so than as they are.
inline bool by_integers(int64_t rows, bool allowed) { return allowed && rows == 1; }

// Bytes that a row of x takes as the products read it.
inline int64_t row_bytes_of_x(const SmallWeights& a, bool integers) {
#ifdef SEQARCH_INTEGER_PRODUCTS
    if (integers) return a.format == SEQARCH_INT8 ? DigitsOfRow<8>::bytes(a.depth) : DigitsOfRow<4>::bytes(a.depth);
#endif
    static_cast<void>(integers);
    return (a.format == SEQARCH_INT8 ? (a.depth + 15) / 16 * 16 : a.blocks() * kBlockWeights) * sizeof(float);
}
inline int64_t prepared_bytes(const SmallWeights& a, int64_t rows, bool allowed) {
    return rows * row_bytes_of_x(a, by_integers(rows, allowed));
}

// Rows of x, `stride` apart, as the products read them; `to` has prepared_bytes() and begins at a line of the cache.
inline void prepare(const SmallWeights& a, int64_t rows, const float* x, int64_t stride, bool allowed, uint8_t* to) {
#ifdef SEQARCH_INTEGER_PRODUCTS
    if (by_integers(rows, allowed))
        return a.format == SEQARCH_INT8 ? prepare_integers<8>(x, a.depth, to) : prepare_integers<4>(x, a.depth, to);
#endif
    static_cast<void>(allowed);
    const int64_t bytes = row_bytes_of_x(a, false);
    for (int64_t r = 0; r < rows; ++r, x += stride, to += bytes) {
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

// Rows [begin, end) of weights with all prepared rows of x: finish(row of x, row of weights, sum) for each.
template <class Finish>
inline void small_products_of_all(const SmallWeights& a, int64_t begin, int64_t end, int64_t rows, bool allowed,
                                  const uint8_t* x, Finish finish) {
    const auto floats = [&](auto bits, auto group) {
        const int64_t stride = row_bytes_of_x(a, false) / sizeof(float);
        const auto some = [&](auto count, int64_t j, int64_t r) {
            float sums[decltype(count)::value];
            const float* from = reinterpret_cast<const float*>(x) + r * stride;
            small_products<decltype(bits)::value, decltype(group)::value>(a, j, from, stride, sums);
            for (int i = 0; i < count; ++i) finish(r + i, j, sums[i]);
        };
        for (int64_t j = begin; j < end; ++j)
            in_groups<kRowsOfX>(rows, [&](auto count, int64_t r) { some(count, j, r); });
    };
#ifdef SEQARCH_INTEGER_PRODUCTS
    const auto integers = [&](auto bits, auto group) {
        constexpr int Bits = decltype(bits)::value, Group = decltype(group)::value;
        constexpr int kTogether = Bits == 4 ? 4 : 2;  // rows that share what is read of x; 4 of 8 bits came slower
        int64_t j = begin;
        for (; j + kTogether <= end; j += kTogether) {
            float sums[kTogether];
            integer_products<Bits, Group>(a, j, x, sums);
            for (int w = 0; w < kTogether; ++w) finish(0, j + w, sums[w]);
        }
        for (; j < end; ++j) {
            float sum[1];
            integer_products<Bits, Group>(a, j, x, sum);
            finish(0, j, sum[0]);
        }
    };
    if (by_integers(rows, allowed)) return with_format(a, integers);
#endif
    static_cast<void>(allowed);
    with_format(a, floats);
}

}  // namespace seqarch
