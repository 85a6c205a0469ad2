// Products of one row of float32 with weights of 8 or 4 bits as sums of integers, for processors with AVX-512 VNNI.
//
// x becomes integers: its largest number 2^22, or nearly 2^23 for codes of 4 bits, so that all of them are within
// 2^-23 of the largest, as the sums of float32 are. They are written with three digits of 8 bits with a sign. One
// instruction adds the products of 64 unsigned codes with 64 digits into 16 sums; those of three digits make the exact
// sum of a lane, which then meets the scale of its group. Codes are made unsigned by adding 8 or 128, and what that
// adds, which x alone says, is taken off. Sums of lanes stay below 2^31 (8 8 2^23 and 4 127 2^22); what overflows on
// the way does so modulo 2^32. An x with a number that is not finite gives NaN.
//
// Included by small_weights.h alone. What the compiler may use is said here and not for the whole library, as
// processors with AVX-512 lack these instructions or have them; has_integer_products() says which.
#pragma once

#include <cstdint>
#include <cstring>

namespace seqarch {

// Whether products are computed so: if the processor can, and seqarch_integer_products() does not forbid it.
bool has_integer_products();

}  // namespace seqarch

#ifdef __AVX512BW__
#define SEQARCH_INTEGER_PRODUCTS

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512vnni")
#pragma GCC diagnostic push  // of functions without a mask GCC 12 warns
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace seqarch {

constexpr int kDigits = 3;
template <int Bits>
constexpr float kLargest = Bits == 8 ? 1 << 22 : (1 << 23) - (1 << 16);

// 64 bytes of codes' share of a row of x, as the products take it.
template <int Bits>
struct Digits {
    static constexpr int kVectors = 8 / Bits, kWeights = 64 * kVectors;
    int8_t digits[kDigits][kVectors][64];
    int32_t less[16];  // of each lane, for what codes are more than they stand for
};

// The largest of `count` numbers, a multiple of 16, without their signs; NaN counts as larger than all.
inline float largest_of(const float* x, int64_t count) {
    __m512i bits = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 16)
        bits = _mm512_max_epi32(bits, _mm512_and_si512(_mm512_loadu_si512(x + k), _mm512_set1_epi32(0x7fffffff)));
    const int32_t found = _mm512_reduce_max_epi32(bits);
    float largest;
    std::memcpy(&largest, &found, sizeof largest);
    return largest;
}

// The digits of `count` numbers of x times `factor`, a multiple of 32 and at most kWeights; the others are 0.
template <int Bits>
inline void prepare_block(const float* x, int64_t count, float factor, Digits<Bits>& to) {
    std::memset(&to, 0, sizeof to);
    const __m512i signs = _mm512_set1_epi32(0x808080);
    for (int64_t k = 0; k < count; k += 32) {
        __m512i halves[2];
        for (int h = 0; h < 2; ++h) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + k + 16 * h), _mm512_set1_ps(factor));
            halves[h] = _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(scaled), signs), signs);
        }
        for (int d = kDigits - 1; d >= 0; --d) {
            const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(halves[1]), _mm512_cvtepi32_epi8(halves[0]));
            if constexpr (Bits == 8) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.digits[d][0] + k), bytes);
            } else {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to.digits[d][0] + k / 2), _mm256_cvtepi16_epi8(bytes));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to.digits[d][1] + k / 2),
                                 _mm256_cvtepi16_epi8(_mm256_srli_epi16(bytes, 8)));
            }
            for (int h = 0; h < 2; ++h) halves[h] = _mm512_srli_epi32(halves[h], 8);
        }
    }
    __m512i sum = _mm512_setzero_si512();
    for (int d = 0; d < kDigits; ++d) {
        sum = _mm512_slli_epi32(sum, 8);
        for (int v = 0; v < Digits<Bits>::kVectors; ++v)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(to.digits[d][v]));
    }
    _mm512_storeu_si512(to.less, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, Bits - 1)));
}

// A row of x: what one in its sums stands for, and its digits, block after block.
template <int Bits>
struct DigitsOfRow {
    alignas(64) float unit;
    Digits<Bits> blocks[1];

    static int64_t bytes(int64_t depth) { return 64 + (depth + kWeights - 1) / kWeights * sizeof(Digits<Bits>); }
    static constexpr int64_t kWeights = Digits<Bits>::kWeights;
};

template <int Bits>
inline void prepare_integers(const float* x, int64_t depth, void* to) {
    constexpr int64_t kWeights = Digits<Bits>::kWeights;
    auto& row = *static_cast<DigitsOfRow<Bits>*>(to);
    const float largest = largest_of(x, depth), factor = kLargest<Bits> / std::max(largest, 1e-30f);
    row.unit = largest <= std::numeric_limits<float>::max() ? 1.0f / factor : std::numeric_limits<float>::quiet_NaN();
    for (int64_t k = 0; k < depth; k += kWeights)
        prepare_block(x + k, std::min(kWeights, depth - k), factor, row.blocks[k / kWeights]);
}

// Of a block of `Groups` groups the scales in the lanes of each, from the first `count` of them on.
template <int Groups>
[[gnu::always_inline]] inline __m512 scales_of_block(const bfloat16* from, int64_t count) {
    if constexpr (Groups == 1) return _mm512_set1_ps(load(*from));
    alignas(64) static constexpr struct Order {
        uint8_t bytes[64];
        constexpr Order() : bytes() {
            for (int l = 0; l < 16; ++l)
                for (int k = 0; k < 4; ++k) bytes[4 * l + k] = k < 2 ? 0x80 : l * Groups / 16 * 2 + k - 2;
        }
    } order;  // the upper half of each lane, of bytes that repeat
    uint64_t bits = 0;
    std::memcpy(&bits, from, count * sizeof *from);
    const __m512i all = _mm512_shuffle_epi8(_mm512_set1_epi64(bits), _mm512_load_si512(order.bytes));
    return _mm512_castsi512_ps(all);
}

// total[w] += what block `b` adds, of which `count` groups are there.
template <int Bits, int Group, bool Whole, int Weights>
[[gnu::always_inline]] inline void add_integers(const uint8_t* codes, int64_t row_bytes, const DigitsOfRow<Bits>& x,
                                                int64_t b, const bfloat16* scales, int64_t groups, int64_t count,
                                                __m512 (&total)[Weights]) {
    constexpr int kVectors = Digits<Bits>::kVectors, kGroups = Digits<Bits>::kWeights / Group;
    const Digits<Bits>& right = x.blocks[b];
#pragma GCC unroll 4
    for (int w = 0; w < Weights; ++w) {
        const uint8_t* from = codes + w * row_bytes + b * 64;
        const __mmask64 there = Whole || Bits == 4 ? ~uint64_t{0} : 0xffffffff;
        const __m512i words = _mm512_maskz_loadu_epi8(there, from);
        __m512i left[kVectors];
        if constexpr (Bits == 4) {
            left[0] = _mm512_and_si512(words, _mm512_set1_epi8(15));
            left[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi8(15));
        } else {
            left[0] = _mm512_xor_si512(words, _mm512_set1_epi8(-128));
        }
        __m512i sum[kDigits];
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) {
            sum[d] = d + 1 == kDigits ? _mm512_loadu_si512(right.less) : _mm512_setzero_si512();
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
                sum[d] = _mm512_dpbusd_epi32(sum[d], left[v], _mm512_loadu_si512(right.digits[d][v]));
        }
        const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sum[0], 8), sum[1]);
        const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high, 8), sum[2]);
        const __m512 scale = scales_of_block<kGroups>(scales + w * groups + b * kGroups, Whole ? kGroups : count);
        total[w] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, total[w]);
    }
}

// y[w] = x . weights[w] for `Weights` rows of weights and a prepared row of x.
template <int Bits, int Group, int Weights>
inline void integer_products(const SmallWeights& a, int64_t first, const void* x, float (&y)[Weights]) {
    constexpr int kGroups = Digits<Bits>::kWeights / Group;
    const int64_t row_bytes = a.row_bytes(), whole = a.groups / kGroups, left = a.groups - whole * kGroups;
    const uint8_t* codes = a.codes + first * row_bytes;
    const bfloat16* scales = a.scales + first * a.groups;
    const auto& row = *static_cast<const DigitsOfRow<Bits>*>(x);
    __m512 total[Weights];
    for (int w = 0; w < Weights; ++w) total[w] = _mm512_setzero_ps();
    for (int64_t b = 0; b < whole; ++b) {
        // in the order in which they lie, as the processor fetches lines that follow one another best
        for (int w = 0; w < Weights; ++w) __builtin_prefetch(codes + (b * Weights + w) * 64 + kAhead);
        add_integers<Bits, Group, true>(codes, row_bytes, row, b, scales, a.groups, kGroups, total);
    }
    if (left) add_integers<Bits, Group, false>(codes, row_bytes, row, whole, scales, a.groups, left, total);
    for (int w = 0; w < Weights; ++w) y[w] = _mm512_reduce_add_ps(total[w]) * row.unit;
}

}  // namespace seqarch

#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
