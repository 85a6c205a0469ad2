/* seqarch's compiled kernels: the whole interface.
 *
 * Plain C over raw pointers, sizes and strides. It knows neither Python nor torch, so it compiles in seconds
 * and outlives every torch release. The caller allocates; a kernel writes every element of its outputs.
 *
 * Conventions
 *   - Every kernel returns SEQARCH_OK, or one of the codes below and has then written nothing of use.
 *   - A kernel takes structures of its arguments: its inputs, and what it writes. Forward and backward share the
 *     inputs. Every field counts: one that is left out of an initialiser is 0 or NULL, which is an argument too.
 *   - A pointer that may be NULL is said to; a tensor by value (seqarch_heads, seqarch_rows) is then one whose data is
 *     NULL. A tensor of no elements may have NULL data, wherever it is.
 *   - Sizes below 0, sizes whose products no memory has, offsets that do not pack and fewer threads than 1 are
 *     SEQARCH_BAD_ARGUMENT. Windows and blocks may be of any length, starts and listed blocks any numbers.
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

/* Raised with every change of what a declaration below means; seqarch/ops/native/cpu_library.py holds the same number.
 * The fields of the structures are nowhere else: Python reads this file, installed beside the library. */
#define SEQARCH_INTERFACE 22

enum { SEQARCH_OK = 0, SEQARCH_BAD_ARGUMENT = 1, SEQARCH_OUT_OF_MEMORY = 2 };
enum { SEQARCH_FLOAT32 = 0, SEQARCH_BFLOAT16 = 1, SEQARCH_FLOAT64 = 2 };

/* Activations over time, of a type of their own. The row of sequence s at step t starts s batch_stride + t time_stride
 * elements after data (packed: t time_stride, t counted through all sequences); its elements lie side by side. */
typedef struct {
    void* data;
    int64_t batch_stride, time_stride;
    int32_t dtype;
} seqarch_rows;

/* A tensor [batch, time, heads, width] whose last dimension has stride 1, or [batch, time, heads]. Where `offsets` are
 * given, batch is 1. */
typedef struct seqarch_heads {
    const void* data;
    int64_t batch_stride, time_stride, head_stride;
} seqarch_heads;

/* SEQARCH_INTERFACE as this library was built. */
SEQARCH_API int32_t seqarch_interface(void);

/* The newest instruction set that this processor and its operating system run: "avx512", "avx2" or "baseline".
 * Ask the baseline library: any other may not run here at all. */
SEQARCH_API const char* seqarch_best_isa(void);

/* The OpenMP version (_OPENMP, a date such as 201511) that this library was built with, 0 without OpenMP. */
SEQARCH_API int32_t seqarch_openmp(void);

/* A matrix x [rows, columns] transposed into columns of y [columns, width], from its column `first` on: numbers of any
 * type that takes 2, 4 or 8 bytes. What else is in y stays as it is. */
typedef struct {
    int32_t item_bytes;
    const void* x;
    void* y;
    int64_t rows, columns, first, width;
} seqarch_transpose_arguments;

SEQARCH_API int32_t seqarch_transpose(const seqarch_transpose_arguments* arguments, int32_t num_threads);

/* A linear map of a few rows, y = x weight^T + bias: x [rows, depth], weight [width, depth], bias [width] or NULL and y
 * [rows, width], all of `dtype`, with sums of accumulation type. */
typedef struct {
    int32_t dtype;
    const void *x, *weight, *bias;
    void* y;
    int64_t rows, depth, width;
} seqarch_linear_arguments;

SEQARCH_API int32_t seqarch_linear(const seqarch_linear_arguments* arguments, int32_t num_threads);

/* The same with weights of 8 or 4 bits in groups of 32 or 64, weight = code scale: x, bias and y are float32.
 *
 *   scales           [width, groups], bfloat16
 *   codes            of SEQARCH_INT8 [width, depth]. Of SEQARCH_INT4 [width, ceil(depth / 128) 64] bytes of code + 8,
 *                    two in a byte, the first in bits 0 to 3; rows are filled up to whole blocks of 128 codes.
 *
 * With AVX-512 VNNI a row of x is rounded to integers of which its largest number is 2^22 or more; one that has a
 * number that is not finite gives NaN. */
enum { SEQARCH_INT8 = 3, SEQARCH_INT4 = 4 };

typedef struct {
    int32_t format;
    const void *x, *codes, *scales, *bias;
    void* y;
    int64_t rows, depth, width, groups;
} seqarch_quantized_linear_arguments;

SEQARCH_API int32_t seqarch_quantized_linear(const seqarch_quantized_linear_arguments* arguments,
                                             int32_t num_threads);

/* Let products with such weights be of integers, as at the start, or forbid it, so that a test computes as processors
 * without AVX-512 VNNI do. Returns 1 if they are from now on, 0 if not. */
SEQARCH_API int32_t seqarch_integer_products(int32_t allow);

/* RMS norm of rows of W = width numbers, with a gate or without, in SEQARCH_FLOAT32 or SEQARCH_FLOAT64:
 *
 *   y = factor norm(x f(z)) weight   if gate_first, else   y = factor norm(x) weight f(z),
 *   norm(u) = u scale,   scale = 1 / sqrt(mean(u^2) + eps).
 *
 *   x, z             [batch, length, heads, W]; z may be NULL: no gate
 *   activation       f: SEQARCH_SILU or SEQARCH_SIGMOID, SEQARCH_IDENTITY without a gate
 *   weight           [weights, W], of head h that of h % weights; may be NULL: 1
 *   y, scale         [batch, length, heads, W] and [batch, length, heads], contiguous
 */
typedef struct {
    int32_t dtype, activation, gate_first;
    seqarch_heads x, z;
    const void* weight;
    double eps, factor;
    int64_t batch, length, heads, width, weights;
} seqarch_rms_norm_inputs;

typedef struct {
    void *y, *scale;
} seqarch_rms_norm_outputs;

SEQARCH_API int32_t seqarch_rms_norm_forward(const seqarch_rms_norm_inputs* inputs,
                                             const seqarch_rms_norm_outputs* outputs, int32_t num_threads);

/* Its gradients, from scale and dy (like y, with strides of its own), contiguous: dx and dz like x, dweight [weights,
 * W]. dz and dweight are NULL where z and weight are. */
typedef struct {
    seqarch_heads dy;
    const void* scale;
    void *dx, *dz, *dweight;
} seqarch_rms_norm_gradients;

SEQARCH_API int32_t seqarch_rms_norm_backward(const seqarch_rms_norm_inputs* inputs,
                                              const seqarch_rms_norm_gradients* gradients, int32_t num_threads);

/* The product of a gated linear unit, y = a sigmoid(a) b, of rows of which a is the first half and b the second: x
 * [rows, 2 width], y [rows, width], in SEQARCH_FLOAT32 or SEQARCH_FLOAT64. */
typedef struct {
    int32_t dtype;
    const void* x;
    void* y;
    int64_t rows, width;
} seqarch_swiglu_arguments;

SEQARCH_API int32_t seqarch_swiglu_forward(const seqarch_swiglu_arguments* arguments, int32_t num_threads);

/* Its gradient dx, from dy. */
typedef struct {
    int32_t dtype;
    const void *x, *dy;
    void* dx;
    int64_t rows, width;
} seqarch_swiglu_gradients;

SEQARCH_API int32_t seqarch_swiglu_backward(const seqarch_swiglu_gradients* gradients, int32_t num_threads);

/* Rotary positions, in SEQARCH_FLOAT32 or SEQARCH_FLOAT64: of each row of W = width numbers the pairs (i, half + i)
 * turn by an angle of the token and of i < half <= W / 2, and numbers from 2 half on stay. `back` turns by the opposite
 * angles, which is the gradient's way.
 *
 *   x, y             [batch, length, heads, W], y contiguous
 *   cosine, sine     [length, half] with table_stride 0, or [batch, length, half] with table_stride `length`
 */
typedef struct {
    int32_t dtype, back;
    seqarch_heads x;
    const void *cosine, *sine;
    void* y;
    int64_t table_stride, batch, length, heads, width, half;
} seqarch_rotary_arguments;

SEQARCH_API int32_t seqarch_rotary(const seqarch_rotary_arguments* arguments, int32_t num_threads);

/* One token through a tape: a list of instructions, in their order and in one call, for models whose token costs as
 * many calls as it has operations, each of which is short. All numbers are float32, but for weights of MAP, and for
 * those that ELEMENTWISE, ATTEND and LOOKUP read or write as the type that their view names.
 *
 * A view is a place and strides, in numbers, of the dimensions that the instruction names; a pointer may be NULL where
 * brackets say so. Sizes come in the order below.
 *
 *   MAP               y [M, N], x [M], weight, [bias]        y = x weight^T + bias; sizes M, K, N; weight [N, K]
 *                                                            without gaps, of the dtype in the flags; or, with flags
 *                                                            SEQARCH_INT8 or SEQARCH_INT4, codes, and after the bias
 *                                                            scales, as seqarch_quantized_linear, with a size of groups
 *   ELEMENTWISE       outputs, inputs                        steps on numbers of five dimensions; see seqarch_step;
 *                                                            computed in float64 if flags, otherwise in float32
 *   REDUCE            y [3], x [3 + 2]                       factor times the sum over the last two of five sizes, or
 *                                                            the largest (flags 1) or least (2)
 *   PRODUCT           y, a, b                                y [s, t, M, N] = a [s, t, M, K] b [s, t, K, N];
 *                                                            sizes s, t, M, N, K
 *   CONVOLUTION       y [B], x [B], weight, [bias], state [B]  one step of seqarch_causal_conv1d_forward, with silu if
 *                                                            flags; sizes B, D, W
 *   SCAN              y [B], x [B], dt [B], A, B [B], C [B], [D], [z [B]], [dt_bias], state [B]
 *                                                            one step of seqarch_selective_scan_forward; flags: 1
 *                                                            softplus, 2 scale_input; sizes B, D, N
 *   LINEAR_ATTENTION  o, q, k, v, [decay] [B, T, H], state [B]  T steps of seqarch_linear_attention_forward; flags: 0
 *                                                            no decay, 1 by head, 2 by key; sizes B, T, H, K, V, G
 *   DELTA_RULE        the same, beta, [read], [erase] [B, T, H]  of seqarch_delta_rule_forward
 *   ATTEND            room [P, B, H], q [B, H], k, v [B, G, N]  softmax attention of one query a head, times factor, on
 *                                                            up to P parts of the keys; room for V + 2 +
 *                                                            SEQARCH_ATTEND_KEYS numbers; sizes B, H, N, K, V, G;
 *                                                            flags: P; k and v float32, or both bfloat16
 *   ATTEND_JOIN       o [B, H], room [P, B, H]               what its parts come to; sizes B, H, N, V; flags: P
 *   LOOKUP            y [R], index [R], weight               y[r] = weight[index[r]]; the index is int64, the weight
 *                                                            [V, D] without gaps, float32 or bfloat16; sizes R, D, V
 *   ARGMAX            y [R], x [R]                           the place of the largest number of a row, the first of
 *                                                            equals or of NaN, as float64; sizes R, V
 *
 * States are replaced. Values that one instruction reads and writes must not overlap, but for the same numbers in
 * ELEMENTWISE. */
enum {
    SEQARCH_MAP = 0, SEQARCH_ELEMENTWISE = 1, SEQARCH_REDUCE = 2, SEQARCH_PRODUCT = 3, SEQARCH_STEP_CONVOLUTION = 4,
    SEQARCH_STEP_SCAN = 5, SEQARCH_STEP_LINEAR_ATTENTION = 6, SEQARCH_STEP_DELTA_RULE = 7, SEQARCH_ATTEND = 8,
    SEQARCH_LOOKUP = 9, SEQARCH_ARGMAX = 10, SEQARCH_ATTEND_JOIN = 11
};
enum { SEQARCH_ATTEND_KEYS = 32 /* at a time */ };

/* Codes of steps, f(a, b, c) with two numbers of the step's own, n and m. */
enum {
    SEQARCH_COPY, SEQARCH_ADD /* a + n b */, SEQARCH_MULTIPLY, SEQARCH_DIVIDE, SEQARCH_AFFINE /* n a + m */,
    SEQARCH_OVER /* n / a */, SEQARCH_MAXIMUM, SEQARCH_MINIMUM, SEQARCH_CLAMP /* of a to n and m */,
    SEQARCH_WHERE /* a ? b : c */, SEQARCH_LESS /* 1 or 0 */, SEQARCH_LESS_EQUAL, SEQARCH_EQUAL, SEQARCH_NOT,
    SEQARCH_ABSOLUTE, SEQARCH_SQRT, SEQARCH_RSQRT, SEQARCH_EXPONENTIAL, SEQARCH_SIGMOID_OF, SEQARCH_SILU_OF,
    SEQARCH_SOFTPLUS, SEQARCH_POWER /* a^n */, SEQARCH_TANH, SEQARCH_LOG, SEQARCH_LOG1P, SEQARCH_EXPM1, SEQARCH_SINE,
    SEQARCH_COSINE, SEQARCH_ERF, SEQARCH_FLOOR, SEQARCH_SIGN_OF, SEQARCH_REMAINDER /* of a by n, with n's sign */
};
enum { SEQARCH_IDENTITY = 0, SEQARCH_SILU = 1, SEQARCH_SIGMOID = 3 }; /* activations of seqarch_rms_norm_forward */

enum { SEQARCH_INT64 = 5 /* the type of a view, beside those of all numbers */ };

typedef struct {
    void* data;
    int64_t strides[5];
    int64_t dtype;
} seqarch_view;

/* A source (a, b, c) is an input, from 0 on, or after these the result of a step before. After the `count` steps of an
 * instruction there is one for each output, whose a is its source. */
typedef struct {
    int32_t code, a, b, c;
    double number, other;
} seqarch_step;

/* `views` and `steps` are where those of the instruction begin in the tape's lists. */
typedef struct {
    int32_t kind, flags, views, steps, outputs, inputs, count;
    double factor;
    int64_t sizes[6];
} seqarch_tape_instruction;

/* What changes from token to token: before the run, `field` becomes base + factor registers[number]. */
typedef struct {
    void* field;
    int64_t base, factor, number;
} seqarch_patch;

/* `wanted` are addresses that the caller will look at next, which weights have pushed out of the cache: they are
 * fetched at the end, and never read. */
typedef struct {
    const seqarch_tape_instruction* instructions;
    const seqarch_view* views;
    const seqarch_step* steps;
    const seqarch_patch* patches;
    int64_t count, patch_count;
    const int64_t* wanted;
    int64_t wanted_count;
} seqarch_tape;

SEQARCH_API int32_t seqarch_run_tape(const seqarch_tape* tape, const int64_t* registers, int32_t num_threads);

/* Causal depthwise convolution over time (T = length, D = channels, W = width, 2 <= W <= 8, S = sequences):
 *
 *   h = [state; x] along time,   z[t, d] = bias[d] + sum_w weight[d, w] h[t + w, d],   y = silu ? z sigmoid(z) : z,
 *   state_out = the last W - 1 rows of h.
 *
 *   x                [S, T, D] or packed [total, D]: rows of D elements. Its dtype is that of all activations.
 *   weight, bias     [D, W] and [D], accumulation type; bias may be NULL
 *   state, state_out [S, W - 1, D], oldest first; state may be NULL: zeros
 *   y                like x, contiguous
 */
typedef struct {
    seqarch_rows x;
    const void *weight, *bias, *state;
    const int64_t* offsets;
    int64_t sequences, length, channels, width;
    int32_t silu;
} seqarch_causal_conv1d_inputs;

typedef struct {
    void *y, *state_out;
} seqarch_causal_conv1d_outputs;

SEQARCH_API int32_t seqarch_causal_conv1d_forward(const seqarch_causal_conv1d_inputs* inputs,
                                                  const seqarch_causal_conv1d_outputs* outputs, int32_t num_threads);

/* Its gradients, from dy (like x, with strides of its own) and dstate_out (like state_out).
 *
 *   dx               like x, contiguous
 *   dweight, dbias   [D, W] and [D], accumulation type; dbias may be NULL
 *   dstate           [S, W - 1, D]; may be NULL
 */
typedef struct {
    seqarch_rows dy;
    const void* dstate_out;
    void *dx, *dweight, *dbias, *dstate;
} seqarch_causal_conv1d_gradients;

SEQARCH_API int32_t seqarch_causal_conv1d_backward(const seqarch_causal_conv1d_inputs* inputs,
                                                   const seqarch_causal_conv1d_gradients* gradients,
                                                   int32_t num_threads);

/* Selective scan of a diagonal state-space model (T = length, D = channels, N = state_width, G = groups):
 *
 *   delta = softplus ? log(1 + exp(dt + dt_bias)) : dt + dt_bias,   u = scale_input ? delta x : x,
 *   h[t, d, n] = exp(delta[t, d] A[d, n]) h[t - 1, d, n] + u[t, d] B[t, g, n],   g = d G / D,
 *   y[t, d] = (sum_n C[t, g, n] h[t, d, n] + D[d] x[t, d]) (z ? z sigmoid(z) : 1)
 *
 *   dtype              the type of A, D, dt_bias, the states and all sums: SEQARCH_FLOAT32 or SEQARCH_FLOAT64
 *   x, dt, z, y        rows of D elements; z may be NULL
 *   B, C               rows of G N elements
 *   A, D, dt_bias      [D, N], at most 0, and [D]; the last two may be NULL. -inf counts as the lowest finite number.
 *   state, state_out   [S, D, N]; state may be NULL: zeros. Backward does not read it.
 *   starts             the state before every `chunk` steps of every sequence, sequence after sequence, each [N, D];
 *                      NULL where no backward pass follows
 */
typedef struct {
    int32_t dtype, softplus, scale_input;
    seqarch_rows x, dt, B, C, z;
    const void *A, *D, *dt_bias, *state;
    const int64_t* offsets;
    int64_t sequences, length, channels, state_width, groups, chunk;
} seqarch_selective_scan_inputs;

typedef struct {
    seqarch_rows y;
    void *state_out, *starts;
} seqarch_selective_scan_outputs;

SEQARCH_API int32_t seqarch_selective_scan_forward(const seqarch_selective_scan_inputs* inputs,
                                                   const seqarch_selective_scan_outputs* outputs, int32_t num_threads);

/* Its gradients, from starts, dy and dstate_out: each like what it is of. dB and dC may both be NULL, and so may dD,
 * ddt_bias; dz is NULL where z is. */
typedef struct {
    const void* starts;
    seqarch_rows dy;
    const void* dstate_out;
    seqarch_rows dx, ddt, dB, dC, dz;
    void *dA, *dD, *ddt_bias, *dstate;
} seqarch_selective_scan_gradients;

SEQARCH_API int32_t seqarch_selective_scan_backward(const seqarch_selective_scan_inputs* inputs,
                                                    const seqarch_selective_scan_gradients* gradients,
                                                    int32_t num_threads);

/* Linear attention with any diagonal decay (T = length, G = groups, H = heads, a multiple of G, K = keys, V = values,
 * S = sequences); head h uses the queries and keys h / (H / G):
 *
 *   S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t,   o_t = scale q_t S_t.
 *
 *   q, k             [S, T, G, K] or packed [1, total, G, K]; so are the others
 *   v                [S, T, H, V]
 *   log_decay        accumulation type, at most 0: [S, T, H, K] if decay_per_key, else [S, T, H]; NULL: no decay
 *   state, state_out [S, H, K, V], accumulation type
 *   o                like v, contiguous
 */
typedef struct {
    int32_t dtype, decay_per_key;
    seqarch_heads q, k, v, log_decay;
    double scale;
    const void* state;
    const int64_t* offsets;
    int64_t sequences, length, groups, heads, keys, values;
} seqarch_linear_attention_inputs;

typedef struct {
    void *o, *state_out;
} seqarch_linear_attention_outputs;

SEQARCH_API int32_t seqarch_linear_attention_forward(const seqarch_linear_attention_inputs* inputs,
                                                     const seqarch_linear_attention_outputs* outputs,
                                                     int32_t num_threads);

/* Its gradients, from dout (like o, with strides of its own) and dstate_out (like state_out): dq, dk, dv, dlog_decay
 * and dstate, like what they are the gradients of, contiguous. dlog_decay is NULL where log_decay is. */
typedef struct {
    seqarch_heads dout;
    const void* dstate_out;
    void *dq, *dk, *dv, *dlog_decay, *dstate;
} seqarch_linear_attention_gradients;

SEQARCH_API int32_t seqarch_linear_attention_backward(const seqarch_linear_attention_inputs* inputs,
                                                      const seqarch_linear_attention_gradients* gradients,
                                                      int32_t num_threads);

/* The delta rule with any diagonal decay; letters, shapes and types as in linear attention:
 *
 *   P = exp(log_decay_t) S_{t-1},   S_t = P + beta_t (k_t^T v_t - erase_t^T (read_t P)),   o_t = scale q_t S_t.
 *
 *   beta             [S, T, H], accumulation type
 *   read, erase      like k; NULL: k itself
 */
typedef struct {
    int32_t dtype, decay_per_key;
    seqarch_heads q, k, v, beta, log_decay, read, erase;
    double scale;
    const void* state;
    const int64_t* offsets;
    int64_t sequences, length, groups, heads, keys, values;
} seqarch_delta_rule_inputs;

typedef struct {
    void *o, *state_out;
} seqarch_delta_rule_outputs;

SEQARCH_API int32_t seqarch_delta_rule_forward(const seqarch_delta_rule_inputs* inputs,
                                               const seqarch_delta_rule_outputs* outputs, int32_t num_threads);

/* Its gradients, from dout (like o, with strides of its own) and dstate_out (like state_out), each contiguous and like
 * what it is the gradient of. dlog_decay, dread and derase are not written where log_decay, read and erase are NULL;
 * the gradient through k then holds what they would. */
typedef struct {
    seqarch_heads dout;
    const void* dstate_out;
    void *dq, *dk, *dv, *dbeta, *dlog_decay, *dread, *derase, *dstate;
} seqarch_delta_rule_gradients;

SEQARCH_API int32_t seqarch_delta_rule_backward(const seqarch_delta_rule_inputs* inputs,
                                                const seqarch_delta_rule_gradients* gradients, int32_t num_threads);

/* Log-linear attention (L = levels): linear attention, or with beta the delta rule, with a state for each power of two
 * of tokens; letters, shapes and types as there. Tokens are counted from the first of a sequence, those before the call
 * included. With bits(x) the binary digits of x and S(j, t) what the base recurrence holds at t of token j's k_j^T v_j,
 *
 *   o_t = scale sum_{j <= t} level_weight[t, bits(j xor t)] q_t S(j, t).
 *
 *   level_weight     [S, T, H, L], accumulation type
 *   beta, log_decay  [S, T, H], accumulation type; NULL: linear attention, no decay
 *   state, state_out [S, H, L - 1, K, V], accumulation type: entry b is that of the 2^b tokens that bit b of the number
 *                    of tokens so far stands for. Where the bit is not set it is not read, and written as zeros.
 *   before           [S]: tokens before the first, at least 0; with those of the call at most 2^(L - 1)
 */
typedef struct {
    int32_t dtype;
    seqarch_heads q, k, v, level_weight, beta, log_decay;
    double scale;
    const void* state;
    const int64_t *before, *offsets;
    int64_t sequences, length, groups, heads, keys, values, levels;
} seqarch_log_linear_attention_inputs;

typedef struct {
    void *o, *state_out;
} seqarch_log_linear_attention_outputs;

SEQARCH_API int32_t seqarch_log_linear_attention_forward(const seqarch_log_linear_attention_inputs* inputs,
                                                         const seqarch_log_linear_attention_outputs* outputs,
                                                         int32_t num_threads);

/* Its gradients, from dout (like o, with strides of its own) and dstate_out (like state_out), each contiguous and like
 * what it is the gradient of. dbeta and dlog_decay are NULL where beta and log_decay are. */
typedef struct {
    seqarch_heads dout;
    const void* dstate_out;
    void *dq, *dk, *dv, *dlevel_weight, *dbeta, *dlog_decay, *dstate;
} seqarch_log_linear_attention_gradients;

SEQARCH_API int32_t seqarch_log_linear_attention_backward(const seqarch_log_linear_attention_inputs* inputs,
                                                          const seqarch_log_linear_attention_gradients* gradients,
                                                          int32_t num_threads);

/* Softmax attention (Tq = queries, Tk = keys, G = groups, H = heads, a multiple of G, K = key_width, V = value_width,
 * S = sequences); head h uses the keys and values h / (H / G):
 *
 *   o_i = sum_j w_ij v_j / sum_j w_ij,   w_ij = exp(scale q_i k_j + b_j),   over the keys j that query i sees.
 *
 * Query i stands at position p = i + Tk - Tq. With `causal` it sees keys up to p, with `window` > 0 (which needs
 * `causal`) those after p - window. A query that sees none gives 0, with gradient 0.
 *
 *   q                [S, Tq, H, K] or packed [1, total, H, K], with `queries` and `keys` the total
 *   k, v             [S, Tk, G, K] and [S, Tk, G, V], or packed
 *   key_start        [S], the first key of each row that is seen; NULL: 0. NULL where `offsets` are given.
 *   key_bias         b: [S, Tk, H] or packed, accumulation type, of each key for each head; NULL: 0
 *   o                [S, Tq, H, V] in forward contiguous
 *   log_sum          [S, Tq, H], accumulation type: the base-2 logarithm of sum_j w_ij; 0 where a query sees no key
 */
typedef struct {
    int32_t dtype, causal;
    seqarch_heads q, k, v;
    int64_t window;
    double scale;
    const int64_t *key_start, *offsets;
    const void* key_bias;
    int64_t sequences, queries, keys, groups, heads, key_width, value_width;
} seqarch_attention_inputs;

typedef struct {
    void *o, *log_sum;
} seqarch_attention_outputs;

SEQARCH_API int32_t seqarch_attention_forward(const seqarch_attention_inputs* inputs,
                                              const seqarch_attention_outputs* outputs, int32_t num_threads);

/* Its gradients, from dout (like o, each with strides of its own) and dlse (like log_sum), that of the natural
 * logarithm of sum_j w_ij, or NULL: dq, dk and dv, and dkey_bias like key_bias, all contiguous; dkey_bias is NULL where
 * key_bias is or where it is not wanted. */
typedef struct {
    seqarch_heads o, dout;
    const void *log_sum, *dlse;
    void *dq, *dk, *dv, *dkey_bias;
} seqarch_attention_gradients;

SEQARCH_API int32_t seqarch_attention_backward(const seqarch_attention_inputs* inputs,
                                               const seqarch_attention_gradients* gradients, int32_t num_threads);

/* Stick-breaking attention; letters, shapes and types as in softmax attention. Query i, at p = i + Tk - Tq, sees the
 * keys before p from key_start on, of which each from the last on takes its share of what the later ones left:
 *
 *   o_i = sum_j s_ij (prod_{j < l < p} (1 - s_il)) v_j,   rest_i = prod_{j < p} (1 - s_ij),
 *   s_ij = sigmoid(scale q_i k_j).
 *
 *   o                [S, Tq, H, V]
 *   rest             [S, Tq, H], accumulation type
 */
typedef struct {
    int32_t dtype;
    seqarch_heads q, k, v;
    double scale;
    const int64_t *key_start, *offsets;
    int64_t sequences, queries, keys, groups, heads, key_width, value_width;
} seqarch_stick_breaking_attention_inputs;

typedef struct {
    void *o, *rest;
} seqarch_stick_breaking_attention_outputs;

SEQARCH_API int32_t seqarch_stick_breaking_attention_forward(const seqarch_stick_breaking_attention_inputs* inputs,
                                                             const seqarch_stick_breaking_attention_outputs* outputs,
                                                             int32_t num_threads);

/* Its gradients, from dout (like o, with strides of its own) and drest (like rest, contiguous): dq, dk and dv, like q,
 * k and v, contiguous. */
typedef struct {
    seqarch_heads dout;
    const void* drest;
    void *dq, *dk, *dv;
} seqarch_stick_breaking_attention_gradients;

SEQARCH_API int32_t seqarch_stick_breaking_attention_backward(
    const seqarch_stick_breaking_attention_inputs* inputs, const seqarch_stick_breaking_attention_gradients* gradients,
    int32_t num_threads);

/* Recurrences whose gates read their last output (T = length, H = heads, W = width):
 *
 *   r = R h_{t-1} + b, of each head and gate, and with a = x_t + r, by `cell`,
 *
 *   SEQARCH_SLSTM   gates z, i, f, o, states h, c, n, m:  m = max(log sigmoid(f) + m, i), or i where n is 0,
 *                   c = f' c + i' tanh(z), n = f' n + i', h = sigmoid(o) c / n,  i' = exp(i - m),
 *                   f' = exp(log sigmoid(f) + m_{t-1} - m)
 *   SEQARCH_LSTM    gates i, f, g, o, states h, c:  c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c)
 *   SEQARCH_GRU     gates r, z, n, state h:  h = (1 - z') n' + z' h,  n' = tanh(x_n + sigmoid(r) r_n), z' = sigmoid(z)
 *
 *   dtype            of all but x, o and their gradients: SEQARCH_FLOAT32 or SEQARCH_FLOAT64
 *   x                [S, T, H, gates, W], or packed [1, total, ...], with `length` the total
 *   weight, bias     R [H, gates, W, W], of each gate's rows, and b [H, gates, W]
 *   state            [S, states, H, W]
 *   o                h of every step, [S, T, H, W]
 *   steps            the states of every step, [S, T, states, H, W], for backward; may be NULL: not kept
 *   last             the states after the last step, like `state`
 */
enum { SEQARCH_SLSTM = 0, SEQARCH_LSTM = 1, SEQARCH_GRU = 2 };

typedef struct {
    int32_t dtype, cell;
    seqarch_rows x;
    const void *weight, *bias, *state;
    const int64_t* offsets;
    int64_t sequences, length, heads, width;
} seqarch_gated_rnn_inputs;

typedef struct {
    seqarch_rows o;
    void *steps, *last;
} seqarch_gated_rnn_outputs;

SEQARCH_API int32_t seqarch_gated_rnn_forward(const seqarch_gated_rnn_inputs* inputs,
                                              const seqarch_gated_rnn_outputs* outputs, int32_t num_threads);

/* Its gradients, from dout (like o) and dlast (like last): dx (like x, contiguous) and dweight, dbias and dstate. What
 * a gradient of m comes to is none: no output depends on it. */
typedef struct {
    seqarch_rows dout;
    const void *steps, *dlast;
    seqarch_rows dx;
    void *dweight, *dbias, *dstate;
} seqarch_gated_rnn_gradients;

SEQARCH_API int32_t seqarch_gated_rnn_backward(const seqarch_gated_rnn_inputs* inputs,
                                               const seqarch_gated_rnn_gradients* gradients, int32_t num_threads);

/* Softmax attention over listed blocks; letters, shapes and o as in attention, with S = batch and I = lists, a multiple
 * of G that divides H. Head h uses list h / (H / I), whose keys and values are those of head h / (H / G).
 *
 *   index            [S, Tq, I, listed]: the blocks of each query, in any order; negative for none. A block listed
 *                    twice counts once, one that begins after the query not at all.
 *   first            [S, Tq], or [1, Tq] with first_stride 0: the key with which a query's sequence begins, never
 *                    decreasing along a row. Block b has the block_size keys from first + b block_size on.
 *   window           if not 0, a query also sees its own key and the window - 1 before it
 */
typedef struct {
    int32_t dtype;
    seqarch_heads q, k, v;
    const int64_t *index, *first;
    int64_t listed, first_stride, block_size, window;
    double scale;
    int64_t batch, queries, keys, groups, lists, heads, key_width, value_width;
} seqarch_block_sparse_attention_inputs;

SEQARCH_API int32_t seqarch_block_sparse_attention_forward(const seqarch_block_sparse_attention_inputs* inputs,
                                                           const seqarch_attention_outputs* outputs,
                                                           int32_t num_threads);

/* Its gradients, as those of attention. */
SEQARCH_API int32_t seqarch_block_sparse_attention_backward(const seqarch_block_sparse_attention_inputs* inputs,
                                                            const seqarch_attention_gradients* gradients,
                                                            int32_t num_threads);

#ifdef __cplusplus
}
#endif
#endif
