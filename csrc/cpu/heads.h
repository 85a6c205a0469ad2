// Where the rows of a token's heads lie (seqarch_heads).
#pragma once

#include "numbers.h"
#include "seqarch.h"

namespace seqarch {

template <class T>
using Acc = typename accumulation<T>::type;

// A token: its batch row and its place in it, and its place among all tokens.
struct Row {
    int64_t batch, time, token;
    Row later(int64_t steps) const { return {batch, time + steps, token + steps}; }
};

template <class T>
struct Heads {
    const T* data;
    int64_t batch, time, head;

    explicit Heads(const seqarch_heads& heads)
        : data(static_cast<const T*>(heads.data)),
          batch(heads.batch_stride),
          time(heads.time_stride),
          head(heads.head_stride) {}
    const T* at(const Row& row, int64_t h) const { return data + row.batch * batch + row.time * time + h * head; }
};

}  // namespace seqarch
