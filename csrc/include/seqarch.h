/* seqarch's compiled kernels: the whole interface.
 *
 * Plain C over raw pointers, sizes and strides. It knows neither Python nor torch, so it compiles in seconds
 * and outlives every torch release. The caller allocates; a kernel writes every element of its outputs.
 *
 * Conventions
 *   - Every kernel returns SEQARCH_OK, or one of the codes below and has then written nothing of use.
 *   - Sizes, strides and offsets are int64_t. Strides count elements, not bytes. The last dimension has stride 1;
 *     a tensor without stated strides is contiguous.
 *   - `dtype` is the type of the activations. Parameters, their gradients and all sums have the accumulation type:
 *     float for SEQARCH_FLOAT32 and SEQARCH_BFLOAT16, double for SEQARCH_FLOAT64.
 *   - `offsets` (sequences + 1 of them, from 0, never decreasing) packs sequences into one batch row; NULL means
 *     `sequences` rows of `length` steps each.
 *   - At most `num_threads` threads run, and the result does not depend on their number.
 *   - The library is built once for every instruction set, with the same symbols in each (see CMakeLists.txt).
 */
#ifndef SEQARCH_H
#define SEQARCH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SEQARCH_API __attribute__((visibility("default")))

/* Raised with every change of a declaration below; seqarch/ops/common/native.py holds the same number. */
#define SEQARCH_INTERFACE 1

enum { SEQARCH_OK = 0, SEQARCH_BAD_ARGUMENT = 1, SEQARCH_OUT_OF_MEMORY = 2 };
enum { SEQARCH_FLOAT32 = 0, SEQARCH_BFLOAT16 = 1, SEQARCH_FLOAT64 = 2 };

/* SEQARCH_INTERFACE as this library was built. */
SEQARCH_API int32_t seqarch_interface(void);

/* The newest instruction set that this processor and its operating system run: "avx512", "avx2" or "baseline".
 * Ask the baseline library: any other may not run here at all. */
SEQARCH_API const char* seqarch_best_isa(void);

/* The OpenMP version (_OPENMP, a date such as 201511) that this library was built with, 0 without OpenMP. */
SEQARCH_API int32_t seqarch_openmp(void);

/* Causal depthwise convolution over time (T = length, D = channels, W = width, 2 <= W <= 8, S = sequences):
 *
 *   h = [state; x] along time,   z[t, d] = bias[d] + sum_w weight[d, w] h[t + w, d],   y = silu ? z sigmoid(z) : z,
 *   state_out = the last W - 1 rows of h.
 *
 *   x                [S, T, D] or packed [total, D], strides x_batch_stride and x_time_stride
 *   weight, bias     [D, W] and [D], accumulation type; bias may be NULL
 *   state, state_out [S, W - 1, D], oldest first; state may be NULL: zeros
 *   y                like x, contiguous
 */
SEQARCH_API int32_t seqarch_causal_conv1d_forward(
    int32_t dtype, const void* x, int64_t x_batch_stride, int64_t x_time_stride, const void* weight, const void* bias,
    const void* state, void* y, void* state_out, const int64_t* offsets, int64_t sequences, int64_t length,
    int64_t channels, int64_t width, int32_t silu, int32_t num_threads);

/* Its gradients, from dy (like x, with strides of its own) and dstate_out (like state_out).
 *
 *   dx               like x, contiguous
 *   dweight, dbias   [D, W] and [D], accumulation type; dbias may be NULL
 *   dstate           [S, W - 1, D]; may be NULL
 */
SEQARCH_API int32_t seqarch_causal_conv1d_backward(
    int32_t dtype, const void* x, int64_t x_batch_stride, int64_t x_time_stride, const void* weight, const void* bias,
    const void* state, const void* dy, int64_t dy_batch_stride, int64_t dy_time_stride, const void* dstate_out,
    void* dx, void* dweight, void* dbias, void* dstate, const int64_t* offsets, int64_t sequences, int64_t length,
    int64_t channels, int64_t width, int32_t silu, int32_t num_threads);

#ifdef __cplusplus
}
#endif
#endif
