// SPDX-License-Identifier: Apache-2.0
/* The C interface: the same three levels as the C++ headers, which say what each tensor means.
 *
 * Conventions
 * - Every function that can fail returns a moesaic_status; moesaic_last_error() then holds one
 *   sentence of this thread that names the argument, what was expected, what came, and a way out. No
 *   exception crosses, nothing is printed. After a failure no output has been touched, but for
 *   MOESAIC_DEVICE, after which outputs are undefined.
 * - Tensors are views, passed by pointer; NULL means "not given". Shapes in [brackets], T tokens, k
 *   top_k, E experts (of weights and rows: the local ones), H hidden, I intermediate, N and K a
 *   product's output and reduction width.
 * - Structs carry their size in their first field. Initialize them with the macro of their name: it
 *   sets the size and every default. A caller compiled against an older header passes a smaller
 *   struct; what is missing takes its default. A larger one is accepted as long as what this
 *   library does not know is zero. Enumerations in structs are int32_t. moesaic_tensor never changes.
 * - Sizes and strides are 64 bit and count elements; only *_bytes counts bytes.
 * - Handles may be used from many threads at once, apart from create, destroy, load* and set_*.
 */
#ifndef MOESAIC_C_API_H_
#define MOESAIC_C_API_H_

#include "moesaic/c_gemm.h"   /* level 3 */
#include "moesaic/c_layer.h"  /* level 1 */
#include "moesaic/c_stages.h" /* level 2 */
#include "moesaic/c_types.h"  /* status, names, tensors, specs */
#include "moesaic/version.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- the process ------------------------------------------------------------------------------ */

MOESAIC_C_API const char* moesaic_version(void);

typedef struct moesaic_device_info {
  size_t struct_size;
  moesaic_device device;
  char name[128];   /* "NVIDIA H100 80GB HBM3" */
  char kernels[32]; /* "avx512_bf16", "sm90a" */
  char note[256];
} moesaic_device_info;
#define MOESAIC_DEVICE_INFO \
  { .struct_size = sizeof(moesaic_device_info) }
MOESAIC_C_API moesaic_status moesaic_device_count(int32_t* count);
/* Fills the first struct_size bytes of *out; texts are cut to fit. */
MOESAIC_C_API moesaic_status moesaic_get_device_info(int32_t index, moesaic_device_info* out);

/* *supported: 1, or 0 and then moesaic_last_error() says why not and what to use instead. */
MOESAIC_C_API moesaic_status moesaic_supports(const moesaic_layer_config* config,
                                              moesaic_format format, moesaic_device device,
                                              int32_t* supported);

MOESAIC_C_API moesaic_status moesaic_set_num_threads(int32_t threads);
/* 0 when MOESAIC_THREADS is not a number from 1 to 4096; moesaic_last_error says so. */
MOESAIC_C_API int32_t moesaic_num_threads(void);
/* Runs the CPU's work on a host's own threads: `hook` must call body(body_context, i) once for
 * every i in [0, n), concurrently or not, and return when all are done. NULL: Moesaic's own pool
 * again. */
typedef void (*moesaic_parallel_body)(void* body_context, int32_t i);
typedef void (*moesaic_parallel_hook)(void* user, int32_t n, moesaic_parallel_body body,
                                      void* body_context);
MOESAIC_C_API moesaic_status moesaic_set_parallel_hook(moesaic_parallel_hook hook, void* user);

/* "scalar", "avx2", "avx512", ... or "sm80", "sm90a"; "": the best. Layers made afterwards. */
MOESAIC_C_API moesaic_status moesaic_set_kernels(moesaic_device_type type, const char* level);
/* The levels of this machine, best last, as "scalar,avx2,avx512" in out[0 .. size). */
MOESAIC_C_API moesaic_status moesaic_available_kernels(moesaic_device_type type, char* out,
                                                       size_t size);

/* Where the library says what it has to say; it never prints. NULL: nowhere. */
typedef void (*moesaic_log_sink)(void* user, const char* message);
MOESAIC_C_API moesaic_status moesaic_set_log_sink(moesaic_log_sink sink, void* user);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MOESAIC_C_API_H_ */
