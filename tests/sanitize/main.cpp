// Calls the C functions of every kernel over random shapes, under the address and undefined behaviour sanitizers.
#include "harness.h"

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
    for (int seed = 0; seed < rounds; ++seed) {
        Random random(seed);
        attention(random);
        block_sparse_attention(random);
        causal_conv1d(random);
        delta_rule(random);
        gated_rnn(random);
        linear(random);
        linear_attention(random);
        log_linear_attention(random);
        quantized_linear(random);
        rms_norm(random);
        rotary(random);
        selective_scan(random);
        stick_breaking_attention(random);
        swiglu(random);
        tape(random);
        team(random);
        transpose(random);
    }
    std::printf("%d rounds: no error\n", rounds);
}
