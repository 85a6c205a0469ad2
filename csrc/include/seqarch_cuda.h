/* seqarch's CUDA kernels: the functions of seqarch.h for the GPU.
 *
 * Structures of arguments, equations and conventions are those of seqarch.h, with these differences:
 *
 *   - Pointers to numbers point into device memory; only the structures themselves lie on the host.
 *   - `offsets` points into device memory too, and holds two tables of sequences + 1 numbers each, one after the other:
 *     the first row of every sequence, and its first chunk among the chunks of all sequences (ignored by the
 *     convolution); each ends with the total.
 *   - In place of a number of threads stand `workspace`, `workspace_bytes` and `stream`. With workspace NULL a function
 *     only writes the bytes of device memory that it needs, at least 1, to *workspace_bytes. Otherwise it launches its
 *     kernels on the stream (a cudaStream_t) and returns without waiting for them. The device must be the current one.
 *   - Activations may be SEQARCH_FLOAT16 too, with sums of float.
 *   - Results do not depend on the device, nor on the order in which blocks run.
 *   - A failed call of the CUDA runtime returns SEQARCH_CUDA_ERROR plus its code; seqarch_cuda_error names it.
 */
#ifndef SEQARCH_CUDA_H
#define SEQARCH_CUDA_H

#include "seqarch.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of what a declaration below, or a structure of seqarch.h, means;
 * seqarch/ops/native/cuda_library.py holds the same number. */
#define SEQARCH_CUDA_INTERFACE 2

enum { SEQARCH_FLOAT16 = 3 };
enum { SEQARCH_CUDA_ERROR = 1000 };

/* Steps of a chunk of the selective scan, and the most states that it takes, in all and with sums of float64. */
enum { SEQARCH_CUDA_CHUNK = 16, SEQARCH_CUDA_STATES = 128, SEQARCH_CUDA_STATES64 = 64 };

/* SEQARCH_CUDA_INTERFACE as this library was built. */
SEQARCH_API int32_t seqarch_cuda_interface(void);

/* The text of a code from SEQARCH_CUDA_ERROR on. */
SEQARCH_API const char* seqarch_cuda_error(int32_t code);

SEQARCH_API int32_t seqarch_cuda_causal_conv1d_forward(const seqarch_causal_conv1d_inputs* inputs,
                                                       const seqarch_causal_conv1d_outputs* outputs, void* workspace,
                                                       int64_t* workspace_bytes, void* stream);

SEQARCH_API int32_t seqarch_cuda_causal_conv1d_backward(const seqarch_causal_conv1d_inputs* inputs,
                                                        const seqarch_causal_conv1d_gradients* gradients,
                                                        void* workspace, int64_t* workspace_bytes, void* stream);

/* `chunk` must be SEQARCH_CUDA_CHUNK, `state_width` at most SEQARCH_CUDA_STATES or SEQARCH_CUDA_STATES64. Each of
 * `starts` is [D, N]. */
SEQARCH_API int32_t seqarch_cuda_selective_scan_forward(const seqarch_selective_scan_inputs* inputs,
                                                        const seqarch_selective_scan_outputs* outputs, void* workspace,
                                                        int64_t* workspace_bytes, void* stream);

SEQARCH_API int32_t seqarch_cuda_selective_scan_backward(const seqarch_selective_scan_inputs* inputs,
                                                         const seqarch_selective_scan_gradients* gradients,
                                                         void* workspace, int64_t* workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
