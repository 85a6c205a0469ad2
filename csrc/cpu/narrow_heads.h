// Linear attention of heads whose values are one wide, side by side (linear_attention_narrow.cpp).
#pragma once

#include "seqarch.h"

namespace seqarch::narrow {

// Whether heads that share their queries and keys have values one wide and decays of their own, beside each other.
inline bool serves(const seqarch_linear_attention_inputs& in) {
    return in.values == 1 && in.heads > in.groups && in.log_decay.data && !in.decay_per_key && in.v.head_stride == 1 &&
           in.log_decay.head_stride == 1;
}

// As seqarch_linear_attention_forward and _backward, of valid inputs that are served.
int32_t forward(const seqarch_linear_attention_inputs& in, const seqarch_linear_attention_outputs& outputs,
                int num_threads);
int32_t backward(const seqarch_linear_attention_inputs& in, const seqarch_linear_attention_gradients& gradients,
                 int num_threads);

}  // namespace seqarch::narrow
