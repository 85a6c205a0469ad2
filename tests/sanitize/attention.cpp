#include "harness.h"

namespace {

struct Sizes {
    int32_t dtype, wide, threads;
    int64_t groups, heads, key_width, value_width;
    Sequences queries, keys;

    explicit Sizes(Random& random)
        : dtype(static_cast<int32_t>(random.pick({SEQARCH_FLOAT32, SEQARCH_BFLOAT16, SEQARCH_FLOAT64}))),
          wide(dtype == SEQARCH_FLOAT64 ? SEQARCH_FLOAT64 : SEQARCH_FLOAT32),
          threads(static_cast<int32_t>(random.pick({1, 2, 3}))),
          groups(random.pick({1, 2})),
          heads(groups * random.pick({0, 1, 2, 4})),
          key_width(random.pick({0, 1, 8, 17, 64})),
          value_width(random.pick({0, 1, 8, 33})),
          queries(random),
          keys(queries) {
        if (!queries.packed() && random.coin()) keys.steps = random.pick({0, 1, 33, 64, 200});
        if (queries.steps < 40 && random.coin()) heads *= 35;  // more than a tile of one token
    }
};

// A call's inputs, and all that it writes.
struct Tensors {
    HeadInputs q, k, v, dout;
    Numbers o, log_sum, dlse, dq, dk, dv, key_bias, dkey_bias;
    bool biased;
    seqarch_attention_outputs outputs;
    seqarch_attention_gradients gradients;

    Tensors(const Sizes& z, Random& random)
        : Tensors(z, z.queries.rows() * z.queries.steps * z.heads, z.keys.rows() * z.keys.steps, random) {}
    Tensors(const Sizes& z, int64_t query_rows, int64_t keys, Random& random)
        : q(z.dtype, z.queries, z.heads, z.key_width, random),
          k(z.dtype, z.keys, z.groups, z.key_width, random),
          v(z.dtype, z.keys, z.groups, z.value_width, random),
          dout(z.dtype, z.queries, z.heads, z.value_width, random),
          o(z.dtype, query_rows * z.value_width),
          log_sum(z.wide, query_rows),
          dlse(z.wide, query_rows, random),
          dq(z.dtype, query_rows * z.key_width),
          dk(z.dtype, keys * z.groups * z.key_width),
          dv(z.dtype, keys * z.groups * z.value_width),
          key_bias(z.wide, keys * z.heads, random),
          dkey_bias(z.wide, keys * z.heads),
          biased(random.coin()),
          outputs{o.data(), log_sum.data()},
          gradients{{o.data(), z.queries.steps * z.heads * z.value_width, z.heads * z.value_width, z.value_width},
                    *dout, log_sum.data(), random.coin() ? dlse.data() : nullptr, dq.data(), dk.data(), dv.data(),
                    maybe(biased, dkey_bias)} {}

    void written(int32_t forward, int32_t backward, const char* name) const {
        require(forward == SEQARCH_OK && backward == SEQARCH_OK, name);
        for (const Numbers* numbers : {&o, &log_sum, &dq, &dk, &dv}) all_written(*numbers, name);
    }
};

void set_sizes(seqarch_attention_inputs& in, const std::vector<int64_t>& n, const int64_t* offsets) {
    in.offsets = offsets;
    in.sequences = n[0], in.queries = n[1], in.keys = n[2], in.groups = n[3], in.heads = n[4];
    in.key_width = n[5], in.value_width = n[6];
}

void set_lists(seqarch_block_sparse_attention_inputs& in, const std::vector<int64_t>& n, const int64_t*) {
    in.listed = n[0], in.batch = n[1], in.queries = n[2], in.keys = n[3], in.groups = n[4], in.lists = n[5];
    in.heads = n[6], in.key_width = n[7], in.value_width = n[8];
}

}  // namespace

void attention(Random& random) {
    const Sizes z(random);
    const bool causal = random.coin();
    const int64_t window = causal ? any_count(random, {0, 1, 20, 64, 1000}) : 0;
    std::vector<int64_t> starts;
    for (int64_t s = 0; s < z.keys.count; ++s) starts.push_back(random.pick({0, 0, 5, 64, 500, INT64_MIN, INT64_MAX}));
    const int64_t* start = z.keys.packed() || random.coin() ? nullptr : starts.data();
    const Tensors t(z, random);
    seqarch_attention_inputs inputs{z.dtype, causal, *t.q, *t.k, *t.v, window, 0.3, start};
    inputs.key_bias = maybe(t.biased, t.key_bias);
    const auto forward = with_sizes(seqarch_attention_forward, inputs, t.outputs, set_sizes, z.threads);
    const auto backward = with_sizes(seqarch_attention_backward, inputs, t.gradients, set_sizes, z.threads);
    const std::vector<int64_t> sizes{z.queries.count, z.queries.steps, z.keys.steps, z.groups,
                                     z.heads,         z.key_width,     z.value_width};
    refuses(sizes, z.queries.offsets, forward, "attention_forward took a wrong size");
    refuses(sizes, z.queries.offsets, backward, "attention_backward took a wrong size");
    const int32_t first = forward(sizes, z.queries.packed()), second = backward(sizes, z.queries.packed());
    t.written(first, second, "attention");
    if (t.biased) all_written(t.dkey_bias, "attention dkey_bias");
}

void block_sparse_attention(Random& random) {
    const Sizes z(random);
    const int64_t sharing = z.heads / z.groups, lists = z.groups * (sharing && random.coin() ? sharing : 1);
    const int64_t rows = z.queries.rows(), steps = z.queries.steps, listed = random.pick({0, 1, 3});
    const int64_t block_size = std::max<int64_t>(1, any_count(random, {1, 7, 64, 100, 1000}));
    const int64_t window = any_count(random, {0, 0, 1, 20, 1000});
    std::vector<int64_t> index(rows * steps * lists * listed), first(rows * steps);
    for (int64_t& block : index) block = random.pick({INT64_MIN, -1, 0, 0, 1, 2, 3, 100, int64_t{1} << 62, INT64_MAX});
    for (int64_t s = 0; s < z.queries.count; ++s) {
        const int64_t begin = z.queries.packed() ? z.queries.offsets[s] : s * steps;
        const int64_t start = z.queries.packed() ? begin : random.pick({0, 0, 5, 64, 500, INT64_MIN, INT64_MAX});
        std::fill_n(first.begin() + begin, z.queries.length(s), start);
    }
    const Tensors t(z, random);
    seqarch_block_sparse_attention_inputs inputs{z.dtype, *t.q, *t.k, *t.v, index.data(), first.data()};
    inputs.first_stride = steps, inputs.block_size = block_size, inputs.window = window, inputs.scale = 0.3;
    const auto forward = with_sizes(seqarch_block_sparse_attention_forward, inputs, t.outputs, set_lists, z.threads);
    const auto backward =
        with_sizes(seqarch_block_sparse_attention_backward, inputs, t.gradients, set_lists, z.threads);
    const std::vector<int64_t> sizes{listed, rows,    steps,       z.keys.steps, z.groups,
                                     lists,  z.heads, z.key_width, z.value_width};
    refuses(sizes, {}, forward, "block_sparse_attention_forward took a wrong size");
    refuses(sizes, {}, backward, "block_sparse_attention_backward took a wrong size");
    const int32_t done = forward(sizes, nullptr), differentiated = backward(sizes, nullptr);
    t.written(done, differentiated, "block_sparse_attention");
}
