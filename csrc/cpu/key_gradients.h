// Gradients of keys that several parts of the work add to: each part has sums of its own, which are added in order.
#pragma once

#include <vector>

#include "heads.h"
#include "parallel.h"

namespace seqarch {

// The keys [first, last) of a sequence; key j is token `token + j` of a contiguous [tokens, groups, width].
struct KeySpan {
    int64_t token, first, last;
};

// A part's sums for the keys [first_key, last_key) of a span, in rows after those of the parts before it.
struct KeyPart {
    int64_t span, group, first_key, last_key, rows_before;
    int64_t end() const { return rows_before + last_key - first_key; }
};

// Sums for the keys of all parts, which come in the order of their spans and groups.
template <class T>
class KeySums {
  public:
    using A = Acc<T>;
    KeySums(const std::vector<KeyPart>& parts, int64_t width)
        : parts_(parts),
          width_(width),
          stride_(padded<A>(width)),
          sums_((parts.empty() ? 0 : parts.back().end()) * stride_) {}

    // A part's sums, set to zero.
    A* start(const KeyPart& part) const {
        A* rows = sums_ + part.rows_before * stride_;
        std::fill_n(rows, (part.last_key - part.first_key) * stride_, A(0));
        return rows;
    }
    int64_t stride() const { return stride_; }

    // The sums over all parts, times `factor`.
    void add_up(const std::vector<KeySpan>& spans, int64_t groups, A factor, T* to, int num_threads) const {
        const std::vector<size_t> first = first_parts(spans.size(), groups);
        const std::vector<KeyPart> blocks = blocks_of(spans, groups);
        run_parallel<A>(
            blocks.size(), num_threads, [&](Arena<A>& arena) { return arena.take(stride_); },
            [&](int64_t b, A* sum) {
                const KeyPart& block = blocks[b];
                const size_t place = block.span * groups + block.group;
                for (int64_t key = block.first_key; key < block.last_key; ++key) {
                    std::fill_n(sum, stride_, A(0));
                    for (size_t p = first[place]; p < first[place + 1]; ++p) add(parts_[p], key, sum);
                    const int64_t token = spans[block.span].token + key;
                    unpack(1, width_, sum, 0, factor, to + (token * groups + block.group) * width_, 0);
                }
            });
    }

  private:
    void add(const KeyPart& part, int64_t key, A* sum) const {
        if (key < part.first_key || key >= part.last_key) return;
        add_row(stride_, sums_ + (part.rows_before + key - part.first_key) * stride_, sum);
    }
    // Of each span and group, and one more.
    std::vector<size_t> first_parts(int64_t spans, int64_t groups) const {
        std::vector<size_t> first(spans * groups + 1, parts_.size());
        for (size_t p = parts_.size(); p-- > 0;) first[parts_[p].span * groups + parts_[p].group] = p;
        for (size_t i = first.size() - 1; i-- > 0;) first[i] = std::min(first[i], first[i + 1]);
        return first;
    }
    static std::vector<KeyPart> blocks_of(const std::vector<KeySpan>& spans, int64_t groups) {
        constexpr int64_t kKeys = 256;
        std::vector<KeyPart> blocks;
        for (size_t s = 0; s < spans.size(); ++s)
            for (int64_t g = 0; g < groups; ++g)
                for (int64_t key = spans[s].first; key < spans[s].last; key += kKeys)
                    blocks.push_back({static_cast<int64_t>(s), g, key, std::min(key + kKeys, spans[s].last), 0});
        return blocks;
    }

    const std::vector<KeyPart>& parts_;
    int64_t width_, stride_;
    Buffer<A> sums_;
};

}  // namespace seqarch
