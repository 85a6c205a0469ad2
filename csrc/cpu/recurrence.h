// What the recurrences with a state [K, V] share: sizes, where rows lie, and how the work is cut into tasks.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "decay.h"
#include "dtypes.h"
#include "heads.h"
#include "seqarch.h"
#include "parallel.h"

namespace seqarch {

struct Sizes {
    const int64_t* offsets;
    int64_t sequences, length, groups, heads, keys, values;
    DecayKind decay;
    int64_t longest;                           // steps of the longest sequence
    int64_t heads_per_task, tasks_per_group;   // heads of one group that a task takes

    static constexpr int64_t kFewTasks = 8;
    static constexpr int64_t kSmallWork = 1 << 18;  // fewer multiply-adds than starting the threads is worth

    // Of the inputs of any of the recurrences, which are valid.
    template <class Inputs>
    explicit Sizes(const Inputs& in)
        : Sizes(in, !in.log_decay.data  ? DecayKind::none
                    : in.decay_per_key ? DecayKind::per_key
                                       : DecayKind::per_head) {}
    template <class Inputs>
    Sizes(const Inputs& in, DecayKind decay)
        : offsets(in.offsets),
          sequences(in.sequences),
          length(in.length),
          groups(in.groups),
          heads(in.heads),
          keys(in.keys),
          values(in.values),
          decay(decay),
          longest(offsets ? 0 : length) {
        for (int64_t s = 0; offsets && s < sequences; ++s) longest = std::max(longest, offsets[s + 1] - offsets[s]);
        const int64_t sharing = heads / groups, wanted = kFewTasks / std::max<int64_t>(1, sequences * groups);
        heads_per_task = std::max<int64_t>(1, wanted > 1 ? sharing / wanted : sharing);
        tasks_per_group = heads_per_task ? (sharing + heads_per_task - 1) / heads_per_task : 0;
    }

    int64_t steps(int64_t sequence) const {
        return offsets ? offsets[sequence + 1] - offsets[sequence] : length;
    }
    // Where a head's state begins in a tensor [S, H, K, V], and a token's values of a head in one of [S, T, H, V].
    int64_t state(int64_t sequence, int64_t head) const { return (sequence * heads + head) * keys * values; }
    int64_t place(const Row& row, int64_t head) const { return (row.token * heads + head) * values; }
    int64_t tokens() const { return offsets ? length : sequences * length; }
    bool worth_threads() const { return static_cast<double>(tokens()) * heads * keys * values > kSmallWork; }
};

// Whether a kernel computes with these sizes: also the states at the starts of all chunks can be counted.
template <class Inputs>
bool valid(const Inputs& in, int num_threads) {
    constexpr int64_t kPadding = 64;  // of widths to vectors, and of sequences to chunks
    if (num_threads < 1 || in.groups < 1 || in.heads % in.groups) return false;
    if (!countable({in.sequences, in.length, in.heads, in.keys, in.values})) return false;
    const int64_t rows = in.offsets ? 1 : in.sequences, keys = in.keys + kPadding, values = in.values + kPadding;
    return countable({rows, in.length + kPadding, std::max(in.groups, in.heads), keys, values}) &&
           countable({in.sequences, in.heads, keys, values}) && packs(in.offsets, in.sequences, in.length);
}

struct Task {
    int64_t sequence, steps, group, first_head, last_head, first_value, last_value, part;
    Row row;  // its first token
};

inline std::vector<Task> head_tasks(const Sizes& sizes) {
    std::vector<Task> tasks;
    const int64_t sharing = sizes.heads / sizes.groups;
    for (int64_t s = 0; s < sizes.sequences; ++s)
        for (int64_t g = 0; g < sizes.groups; ++g)
            for (int64_t h = 0, part = 0; h < sharing; h += sizes.heads_per_task, ++part) {
                const Row row =
                    sizes.offsets ? Row{0, sizes.offsets[s], sizes.offsets[s]} : Row{s, 0, s * sizes.length};
                const int64_t first = g * sharing + h;
                const int64_t last = first + std::min(sizes.heads_per_task, sharing - h);
                tasks.push_back({s, sizes.steps(s), g, first, last, 0, sizes.values, part, row});
            }
    return tasks;
}

// Where there are fewer tasks than threads, each also takes a part of the values only: no result depends on it.
template <class A>
std::vector<Task> forward_tasks(const Sizes& sizes, int num_threads) {
    const std::vector<Task> whole = head_tasks(sizes);
    const int64_t count = static_cast<int64_t>(whole.size());
    if (count == 0 || count >= num_threads) return whole;
    const int64_t parts = num_threads / count;
    const int64_t width = padded<A>(std::max<int64_t>((sizes.values + parts - 1) / parts, 2 * kLanes<A>));
    std::vector<Task> tasks;
    for (Task task : whole)
        for (int64_t v = 0; v < std::max<int64_t>(sizes.values, 1); v += width) {
            task.first_value = v;
            task.last_value = std::min(v + width, sizes.values);
            tasks.push_back(task);
        }
    return tasks;
}

// A gradient [tokens, groups, keys] that the tasks of a group share: each writes its own part, which are added up.
template <class T>
struct Shared {
    T* to;
    std::vector<Acc<T>> parts;

    explicit Shared(T* to) : to(to) {}
    void allocate(const Sizes& sizes) {
        if (to && sizes.tasks_per_group == 0) std::fill_n(to, sizes.tokens() * sizes.groups * sizes.keys, T{});
        if (to && sizes.tasks_per_group > 1)
            parts.resize(sizes.tasks_per_group * sizes.tokens() * sizes.groups * sizes.keys);
    }
    void write(const Sizes& sizes, const Row& row, const Task& task, int64_t n, const Acc<T>* from, int64_t from_row,
               Acc<T> factor) const {
        const int64_t offset = (row.token * sizes.groups + task.group) * sizes.keys, stride = sizes.groups * sizes.keys;
        if (parts.empty()) return unpack(n, sizes.keys, from, from_row, factor, to + offset, stride);
        auto* part = const_cast<Acc<T>*>(parts.data()) + task.part * sizes.tokens() * stride;
        unpack(n, sizes.keys, from, from_row, factor, part + offset, stride);
    }
    void add_up(const Sizes& sizes, int num_threads) const {
        if (parts.empty()) return;
        const int64_t width = sizes.groups * sizes.keys, tokens = sizes.tokens();
        parallel_for(tokens, num_threads, [&](int64_t t) {
            for (int64_t x = 0; x < width; ++x) {
                Acc<T> sum = 0;
                for (int64_t part = 0; part < sizes.tasks_per_group; ++part)
                    sum += parts[(part * tokens + t) * width + x];
                store(to + t * width + x, sum);
            }
        });
    }
};

// A state [K, V] as a buffer [V, K], by way of the buffer `between`.
template <class A>
void load_transposed(const Sizes& sizes, const A* state, A* between, A* to) {
    const int64_t values_row = padded<A>(sizes.values), keys_row = padded<A>(sizes.keys);
    pack(sizes.keys, sizes.values, state, sizes.values, A(1), between, values_row);
    std::fill_n(between + sizes.keys * values_row, (keys_row - sizes.keys) * values_row, A(0));
    transpose(sizes.keys, sizes.values, between, values_row, to, keys_row);
}

// Runs the tasks on threads, each with buffers of its own that `lay_out` takes from an arena.
template <class A, class LayOut, class Run>
void run_tasks(const Sizes& sizes, const std::vector<Task>& tasks, int num_threads, LayOut lay_out, Run run) {
    run_parallel<A>(static_cast<int64_t>(tasks.size()), sizes.worth_threads() ? num_threads : 1, lay_out,
                    [&](int64_t t, auto& scratch) { run(tasks[t], scratch); });
}

}  // namespace seqarch
