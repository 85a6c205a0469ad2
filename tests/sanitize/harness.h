// Random shapes and exactly sized memory for calls of the kernels' C functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "seqarch.h"

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    double normal() { return std::normal_distribution<double>()(engine_); }
    bool coin() { return pick({0, 1}) != 0; }
    int64_t pick(std::initializer_list<int64_t> choices) {
        return choices.begin()[std::uniform_int_distribution<size_t>(0, choices.size() - 1)(engine_)];
    }

  private:
    std::mt19937_64 engine_;
};

// Numbers of one dtype in heap memory of exactly their size, so that the sanitizer sees the first byte beyond.
class Numbers {
  public:
    Numbers(int32_t dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(new char[count * size()]) {
        for (int64_t i = 0; i < count; ++i) set(i, __builtin_nan(""));
    }
    Numbers(int32_t dtype, int64_t count, Random& random) : Numbers(dtype, count) {
        for (int64_t i = 0; i < count; ++i) set(i, random.normal());
    }
    void* data() const { return bytes_.get(); }
    int64_t count() const { return count_; }
    int32_t dtype() const { return dtype_; }
    void set(int64_t i, double value) const {
        const float narrow = static_cast<float>(value);
        if (dtype_ == SEQARCH_FLOAT64) reinterpret_cast<double*>(data())[i] = value;
        if (dtype_ == SEQARCH_FLOAT32) reinterpret_cast<float*>(data())[i] = narrow;
        if (dtype_ == SEQARCH_BFLOAT16)
            reinterpret_cast<uint16_t*>(data())[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, narrow) >> 16);
    }
    double get(int64_t i) const {
        if (dtype_ == SEQARCH_FLOAT64) return reinterpret_cast<double*>(data())[i];
        if (dtype_ == SEQARCH_FLOAT32) return reinterpret_cast<float*>(data())[i];
        return __builtin_bit_cast(float, static_cast<uint32_t>(reinterpret_cast<uint16_t*>(data())[i]) << 16);
    }

  private:
    int64_t size() const { return dtype_ == SEQARCH_FLOAT64 ? 8 : dtype_ == SEQARCH_FLOAT32 ? 4 : 2; }
    int32_t dtype_;
    int64_t count_;
    std::unique_ptr<char[]> bytes_;
};

// Sequences of a batch, of `steps` each, or packed into one row.
struct Sequences {
    int64_t count, steps;
    std::vector<int64_t> offsets;

    explicit Sequences(Random& random)
        : count(random.pick({0, 1, 2, 3})), steps(random.pick({0, 1, 2, 3, 7, 31, 32, 33, 65, 130})) {
        if (count == 0 || random.coin()) return;
        offsets.push_back(0);
        for (int64_t s = 0; s < count; ++s) offsets.push_back(offsets.back() + random.pick({0, 1, 5, 33}));
        steps = offsets.back();
    }
    const int64_t* packed() const { return offsets.empty() ? nullptr : offsets.data(); }
    int64_t rows() const { return offsets.empty() ? count : 1; }
    int64_t length(int64_t s) const { return offsets.empty() ? steps : offsets[s + 1] - offsets[s]; }
};

// Activations [B, T, width], with gaps between rows where they are inputs.
class Rows {
  public:
    Rows(int32_t dtype, const Sequences& s, int64_t width, Random& random)
        : Rows(dtype, s, width, width + random.pick({0, 1, 5}), random.pick({0, 3}), &random) {}
    Rows(int32_t dtype, const Sequences& s, int64_t width) : Rows(dtype, s, width, width, 0, nullptr) {}
    const seqarch_rows& operator*() const { return rows_; }
    Numbers numbers;

  private:
    Rows(int32_t dtype, const Sequences& s, int64_t width, int64_t stride, int64_t gap, Random* random)
        : Rows(dtype, extent(s, width, stride, s.steps * stride + gap), random, s.steps * stride + gap, stride) {}
    Rows(int32_t dtype, int64_t count, Random* random, int64_t batch_stride, int64_t stride)
        : numbers(random ? Numbers(dtype, count, *random) : Numbers(dtype, count)),
          rows_{numbers.data(), batch_stride, stride, dtype} {}
    static int64_t extent(const Sequences& s, int64_t width, int64_t stride, int64_t batch_stride) {
        if (!s.rows() || !s.steps) return 0;
        return (s.rows() - 1) * batch_stride + (s.steps - 1) * stride + width;
    }
    seqarch_rows rows_;
};

// Inputs [B, T, H, width], with gaps between heads, steps and sequences; a width of 1 stands for [B, T, H].
class HeadInputs {
  public:
    HeadInputs(int32_t dtype, const Sequences& s, int64_t heads, int64_t width, Random& random)
        : HeadInputs(dtype, s, heads, width, Strides(s, heads, width, random), random) {}
    const seqarch_heads& operator*() const { return heads_; }
    Numbers numbers;

  private:
    struct Strides {
        int64_t head, time, batch;
        Strides(const Sequences& s, int64_t heads, int64_t width, Random& random)
            : head(width + random.pick({0, 1, 5})), time(heads * head + random.pick({0, 2})),
              batch(s.steps * time + random.pick({0, 3})) {}
    };
    HeadInputs(int32_t dtype, const Sequences& s, int64_t heads, int64_t width, const Strides& by, Random& random)
        : numbers(dtype, extent(s, heads, width, by), random), heads_{numbers.data(), by.batch, by.time, by.head} {}
    static int64_t extent(const Sequences& s, int64_t heads, int64_t width, const Strides& by) {
        if (!s.rows() || !s.steps || !heads || !width) return 0;
        return (s.rows() - 1) * by.batch + (s.steps - 1) * by.time + (heads - 1) * by.head + width;
    }
    seqarch_heads heads_;
};

// What stands in a structure for a tensor that may be absent.
inline void* maybe(bool there, const Numbers& numbers) { return there ? numbers.data() : nullptr; }
inline seqarch_rows maybe(bool there, const Rows& rows) { return there ? *rows : seqarch_rows{}; }
inline seqarch_heads maybe(bool there, const HeadInputs& heads) { return there ? *heads : seqarch_heads{}; }

// A function of inputs and of what it writes, called with those inputs whose sizes and offsets `set` has changed.
template <class F, class Inputs, class Outputs, class Set>
auto with_sizes(F f, const Inputs& inputs, const Outputs& outputs, Set set, int32_t threads) {
    return [=](const std::vector<int64_t>& n, const int64_t* offsets) {
        Inputs changed = inputs;
        set(changed, n, offsets);
        return f(&changed, &outputs, threads);
    };
}

// Log decays from 0 to -inf.
inline void make_log_decays(Numbers& decays, Random& random) {
    const double extremes[] = {0.0, -1e-9, -1e4, -HUGE_VAL};
    for (int64_t i = 0; i < decays.count(); ++i)
        decays.set(i, random.pick({0, 0, 1}) ? extremes[random.pick({0, 1, 2, 3})] : -std::fabs(random.normal()));
}

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

inline void all_written(const Numbers& numbers, const char* name) {
    for (int64_t i = 0; i < numbers.count(); ++i) {
        if (numbers.get(i) == numbers.get(i)) continue;
        std::fprintf(stderr, "%s: element %lld of %lld is NaN\n", name, static_cast<long long>(i),
                     static_cast<long long>(numbers.count()));
        std::exit(1);
    }
}

// A function called with each size in turn that no memory has, and with offsets that do not pack, refuses each.
template <class Call>
void refuses(const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets, Call call, const char* name) {
    const int64_t* given = offsets.empty() ? nullptr : offsets.data();
    for (size_t i = 0; i < sizes.size(); ++i)
        for (int64_t wrong : {INT64_MIN, int64_t{-1}, int64_t{1} << 60, INT64_MAX}) {
            std::vector<int64_t> changed = sizes;
            changed[i] = wrong;
            require(call(changed, given) == SEQARCH_BAD_ARGUMENT, name);
        }
    for (size_t i = 0; i < offsets.size(); ++i)
        for (int64_t wrong : {INT64_MIN, int64_t{-1}, offsets.back() + 1, INT64_MAX}) {
            std::vector<int64_t> changed = offsets;
            changed[i] = wrong;
            require(call(sizes, changed.data()) == SEQARCH_BAD_ARGUMENT, name);
        }
}

// Counts of tokens that a caller may name whatever there are.
inline int64_t any_count(Random& random, std::initializer_list<int64_t> usual) {
    const int64_t unusual[] = {int64_t{1} << 31, int64_t{1} << 62, INT64_MAX};
    return random.pick({0, 0, 0, 1}) ? unusual[random.pick({0, 1, 2})] : random.pick(usual);
}

// One call of each kernel's functions on random sizes, and the calls that they refuse.
void attention(Random& random);
void block_sparse_attention(Random& random);
void causal_conv1d(Random& random);
void delta_rule(Random& random);
void gated_rnn(Random& random);
void linear(Random& random);
void linear_attention(Random& random);
void log_linear_attention(Random& random);
void quantized_linear(Random& random);
void rms_norm(Random& random);
void rotary(Random& random);
void selective_scan(Random& random);
void stick_breaking_attention(Random& random);
void swiglu(Random& random);
void tape(Random& random);
void team(Random& random);
void transpose(Random& random);
