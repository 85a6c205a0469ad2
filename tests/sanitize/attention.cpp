#include "harness.h"

namespace {

int64_t clamp_start(int64_t start, int64_t keys) { return start < keys ? start : keys; }

// Tensors [rows, steps, heads, width] with gaps between tokens.
class HeadRows {
  public:
    HeadRows(int32_t dtype, int64_t rows, int64_t steps, int64_t heads, int64_t width, Random& random)
        : stride_(heads * width + random.pick({0, 0, 3})),
          numbers(dtype, rows && steps ? (rows * steps - 1) * stride_ + heads * width : 0, random),
          heads_{numbers.data(), steps * stride_, stride_, width} {}
    const seqarch_heads* operator&() const { return &heads_; }

  private:
    int64_t stride_;

  public:
    Numbers numbers;

  private:
    seqarch_heads heads_;
};

struct Shape {
    int32_t dtype, wide, threads;
    int64_t rows, queries, keys, groups, heads, key_width, value_width;

    explicit Shape(Random& random)
        : dtype(static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}))),
          wide(dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32),
          threads(static_cast<int32_t>(random.pick({1, 2, 3}))),
          rows(random.pick({0, 1, 2})),
          queries(random.pick({0, 1, 2, 31, 64, 65, 130})),
          keys(random.coin() ? queries : random.pick({0, 1, 33, 64, 200})),
          groups(random.pick({1, 2})),
          heads(groups * random.pick({0, 1, 2, 3, 70})),
          key_width(random.pick({0, 1, 8, 17, 64})),
          value_width(random.pick({0, 1, 8, 33, 64})) {
        if (heads > 10) queries = std::min<int64_t>(queries, 31), keys = std::min<int64_t>(keys, 64);
    }
};

// Memory for a call's inputs, and for all that it writes.
struct Tensors {
    HeadRows q, k, v, dout;
    Numbers o, log_sum, dq, dk, dv;
    seqarch_heads o_heads;

    Tensors(const Shape& z, Random& random)
        : q(z.dtype, z.rows, z.queries, z.heads, z.key_width, random),
          k(z.dtype, z.rows, z.keys, z.groups, z.key_width, random),
          v(z.dtype, z.rows, z.keys, z.groups, z.value_width, random),
          dout(z.dtype, z.rows, z.queries, z.heads, z.value_width, random),
          o(z.dtype, z.rows * z.queries * z.heads * z.value_width),
          log_sum(z.wide, z.rows * z.queries * z.heads),
          dq(z.dtype, z.rows * z.queries * z.heads * z.key_width),
          dk(z.dtype, z.rows * z.keys * z.groups * z.key_width),
          dv(z.dtype, z.rows * z.keys * z.groups * z.value_width),
          o_heads{o.data(), z.queries * z.heads * z.value_width, z.heads * z.value_width, z.value_width} {}

    void written(int32_t forward, int32_t backward, const char* name) const {
        require(forward == SEQARCH_OK && backward == SEQARCH_OK, name);
        for (const Numbers* numbers : {&o, &log_sum, &dq, &dk, &dv}) all_written(*numbers, name);
    }
};

// Up to three sequences over one row of `length` tokens.
std::vector<int64_t> cut(int64_t length, Random& random) {
    std::vector<int64_t> offsets{0};
    for (int i = 0; i < 2; ++i) offsets.push_back(clamp_start(offsets.back() + random.pick({0, 1, 33, 70}), length));
    offsets.push_back(length);
    return offsets;
}

}  // namespace

void attention(Random& random) {
    Shape z(random);
    const bool packed = z.rows == 1 && z.queries == z.keys && random.coin(), causal = packed || random.coin();
    const int64_t window = causal ? random.pick({0, 1, 20, 64, 1000}) : 0;
    const std::vector<int64_t> offsets = cut(z.queries, random);
    std::vector<int64_t> starts;
    for (int64_t s = 0; s < z.rows; ++s) starts.push_back(random.pick({0, 0, 5, 64, 500}));
    const int64_t* start = packed || random.coin() ? nullptr : starts.data();
    const int64_t* packing = packed ? offsets.data() : nullptr;
    const int64_t sequences = packed ? static_cast<int64_t>(offsets.size()) - 1 : z.rows;
    const Tensors t(z, random);

    const int32_t forward = seqarch_attention_forward(
        z.dtype, &t.q, &t.k, &t.v, causal, window, 0.3, start, t.o.data(), t.log_sum.data(), packing, sequences,
        z.queries, z.keys, z.groups, z.heads, z.key_width, z.value_width, z.threads);
    const int32_t backward = seqarch_attention_backward(
        z.dtype, &t.q, &t.k, &t.v, causal, window, 0.3, start, &t.o_heads, t.log_sum.data(), &t.dout, t.dq.data(),
        t.dk.data(), t.dv.data(), packing, sequences, z.queries, z.keys, z.groups, z.heads, z.key_width, z.value_width,
        z.threads);
    t.written(forward, backward, "attention");
}

void block_sparse_attention(Random& random) {
    Shape z(random);
    const int64_t lists = z.heads % 2 || random.coin() ? z.groups : std::max(z.heads / 2 / z.groups, int64_t{1}) * z.groups;
    if (lists == 0 || z.heads % lists) return;
    const int64_t listed = random.pick({0, 1, 3}), block_size = random.pick({1, 7, 64, 100, 1000});
    const int64_t window = random.pick({0, 0, 1, 20, 1000});
    std::vector<int64_t> index(z.rows * z.queries * lists * listed), first(z.rows * z.queries);
    for (int64_t& block : index) block = random.pick({-5, -1, 0, 0, 1, 2, 3, 100, int64_t{1} << 62});
    const std::vector<int64_t> offsets = cut(z.queries, random);
    const bool packed = z.queries == z.keys && random.coin();
    for (int64_t s = 0; s < z.rows; ++s) {
        const int64_t start = random.pick({0, 0, 5, 64, 500});
        for (int64_t i = 0; i < z.queries; ++i) first[s * z.queries + i] = start;
        for (size_t part = 0; packed && part + 1 < offsets.size(); ++part)
            for (int64_t i = offsets[part]; i < offsets[part + 1]; ++i) first[s * z.queries + i] = offsets[part];
    }
    const int64_t stride = packed ? 0 : z.queries;
    const Tensors t(z, random);

    const int32_t forward = seqarch_block_sparse_attention_forward(
        z.dtype, &t.q, &t.k, &t.v, index.data(), listed, first.data(), stride, block_size, window, 0.3, t.o.data(),
        t.log_sum.data(), z.rows, z.queries, z.keys, z.groups, lists, z.heads, z.key_width, z.value_width, z.threads);
    const int32_t backward = seqarch_block_sparse_attention_backward(
        z.dtype, &t.q, &t.k, &t.v, index.data(), listed, first.data(), stride, block_size, window, 0.3, &t.o_heads,
        t.log_sum.data(), &t.dout, t.dq.data(), t.dk.data(), t.dv.data(), z.rows, z.queries, z.keys, z.groups, lists,
        z.heads, z.key_width, z.value_width, z.threads);
    t.written(forward, backward, "block_sparse_attention");
}
