// SPDX-License-Identifier: Apache-2.0
/* The nouns of the C interface (c_api.h): status, names, tensors, workspaces, and what a product
 * is. */
#ifndef MOESAIC_C_TYPES_H_
#define MOESAIC_C_TYPES_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MOESAIC_C_API __attribute__((visibility("default")))
#else
#define MOESAIC_C_API
#endif

/* The address is only stored: a compiler need not warn that an output buffer is uninitialized. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define MOESAIC_C_STORES_ADDRESS __attribute__((access(none, 1)))
#else
#define MOESAIC_C_STORES_ADDRESS
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --- status ---------------------------------------------------------------------------------- */

typedef enum moesaic_status {
  MOESAIC_OK = 0,
  MOESAIC_INVALID_ARGUMENT = 1, /* a shape, dtype, stride or option is wrong: fix the call */
  MOESAIC_UNSUPPORTED = 2,      /* outside the support matrix: the message says what to use */
  MOESAIC_NOT_READY = 3,        /* e.g. forward before every expert has been loaded */
  MOESAIC_IO = 4,
  MOESAIC_CORRUPT_FILE = 5,
  MOESAIC_OUT_OF_MEMORY = 6,
  MOESAIC_DEVICE = 7, /* a CUDA launch or driver call failed */
  MOESAIC_INTERNAL = 8
} moesaic_status;

/* Of this thread's last failed call; "" before any. Valid until the next one. Never NULL. */
MOESAIC_C_API const char* moesaic_last_error(void);
/* "ok", "invalid_argument", ... */
MOESAIC_C_API const char* moesaic_status_name(moesaic_status status);

/* --- names: the numbers are those of the C++ enumerations ------------------------------------- */

typedef enum moesaic_dtype {
  MOESAIC_F32,
  MOESAIC_F16,
  MOESAIC_BF16,
  MOESAIC_FP8_E4M3,
  MOESAIC_E8M0,
  MOESAIC_I8,
  MOESAIC_U8, /* two 4-bit weights: packed along K, low nibble first */
  MOESAIC_I32,
  MOESAIC_I64
} moesaic_dtype;

typedef enum moesaic_device_type { MOESAIC_CPU, MOESAIC_CUDA } moesaic_device_type;

typedef enum moesaic_scheme {
  MOESAIC_SCHEME_F32,
  MOESAIC_SCHEME_F16,
  MOESAIC_SCHEME_BF16,
  MOESAIC_SCHEME_FP8_TENSOR,
  MOESAIC_SCHEME_FP8_CHANNEL,
  MOESAIC_SCHEME_FP8_BLOCK,
  MOESAIC_SCHEME_FP8_W8A16,
  MOESAIC_SCHEME_INT8_CHANNEL,
  MOESAIC_SCHEME_INT8_BLOCK,
  MOESAIC_SCHEME_INT8_W8A16,
  MOESAIC_SCHEME_INT4_W4A16,
  MOESAIC_SCHEME_INT4_W4A8_FP8,
  MOESAIC_SCHEME_INT4_W4A8_INT8,
  MOESAIC_SCHEME_MXFP4_W4A16
} moesaic_scheme;

typedef enum moesaic_weight_scale {
  MOESAIC_WEIGHT_SCALE_DEFAULT,
  MOESAIC_WEIGHT_SCALE_TENSOR,
  MOESAIC_WEIGHT_SCALE_CHANNEL,
  MOESAIC_WEIGHT_SCALE_BLOCK,
  MOESAIC_WEIGHT_SCALE_GROUP
} moesaic_weight_scale;

typedef enum moesaic_act_scale {
  MOESAIC_ACT_SCALE_DEFAULT,
  MOESAIC_ACT_SCALE_TENSOR_STATIC,
  MOESAIC_ACT_SCALE_TENSOR_DYNAMIC,
  MOESAIC_ACT_SCALE_TOKEN,
  MOESAIC_ACT_SCALE_GROUP
} moesaic_act_scale;

typedef enum moesaic_int8_rounding {
  MOESAIC_INT8_NEAREST,
  MOESAIC_INT8_TRUNCATE
} moesaic_int8_rounding;

typedef enum moesaic_activation {
  MOESAIC_SILU,
  MOESAIC_GELU,
  MOESAIC_GELU_TANH,
  MOESAIC_RELU,
  MOESAIC_RELU2,
  MOESAIC_IDENTITY,
  MOESAIC_SWIGLU,
  MOESAIC_GEGLU,
  MOESAIC_GEGLU_TANH,
  MOESAIC_SWIGLU_OAI,
  MOESAIC_SWIGLU_CLAMP,
  MOESAIC_SWIGLU_STEP
} moesaic_activation;

typedef enum moesaic_gate_order { MOESAIC_GATE_FIRST, MOESAIC_UP_FIRST } moesaic_gate_order;
typedef enum moesaic_gate_layout { MOESAIC_HALVES, MOESAIC_INTERLEAVED } moesaic_gate_layout;

typedef enum moesaic_routing {
  MOESAIC_ROUTING_SOFTMAX_TOPK,
  MOESAIC_ROUTING_RENORMALIZE,
  MOESAIC_ROUTING_DEEPSEEK_V3,
  MOESAIC_ROUTING_DEEPSEEK_V2,
  MOESAIC_ROUTING_LLAMA4,
  MOESAIC_ROUTING_TOPK,
  MOESAIC_ROUTING_SIGMOID_RENORM,
  MOESAIC_ROUTING_MINIMAX2,
  MOESAIC_ROUTING_SIGMOID,
  MOESAIC_ROUTING_SQRTSOFTPLUS,
  MOESAIC_ROUTING_SPARSEMIXER,
  MOESAIC_ROUTING_SOFTMAX_BIAS
} moesaic_routing;

typedef enum moesaic_normalize {
  MOESAIC_NORMALIZE_DEFAULT, /* as the routing method says */
  MOESAIC_NORMALIZE_NEVER,
  MOESAIC_NORMALIZE_ALWAYS
} moesaic_normalize;

typedef enum moesaic_weight_on {
  MOESAIC_WEIGHT_ON_OUTPUT,
  MOESAIC_WEIGHT_ON_INPUT
} moesaic_weight_on;
typedef enum moesaic_weight_storage {
  MOESAIC_WEIGHTS_COPIED,
  MOESAIC_WEIGHTS_IN_PLACE
} moesaic_weight_storage;
typedef enum moesaic_accumulate { MOESAIC_OVERWRITE, MOESAIC_ADD } moesaic_accumulate;
typedef enum moesaic_format { MOESAIC_STANDARD, MOESAIC_SORTED, MOESAIC_BATCHED } moesaic_format;
typedef enum moesaic_row_order { MOESAIC_BY_SLOT, MOESAIC_BY_POSITION } moesaic_row_order;

/* "int4_w4a16", "bf16", "swiglu", "deepseek_v3", "batched", ...; "?" for a number that is none. */
MOESAIC_C_API const char* moesaic_scheme_name(moesaic_scheme scheme);
MOESAIC_C_API const char* moesaic_dtype_name(moesaic_dtype dtype);
MOESAIC_C_API const char* moesaic_activation_name(moesaic_activation activation);
MOESAIC_C_API const char* moesaic_routing_name(moesaic_routing routing);
MOESAIC_C_API const char* moesaic_format_name(moesaic_format format);
/* The reverse. MOESAIC_INVALID_ARGUMENT lists the names there are. */
MOESAIC_C_API moesaic_status moesaic_parse_scheme(const char* text, moesaic_scheme* out);
MOESAIC_C_API moesaic_status moesaic_parse_dtype(const char* text, moesaic_dtype* out);
MOESAIC_C_API moesaic_status moesaic_parse_activation(const char* text, moesaic_activation* out);
MOESAIC_C_API moesaic_status moesaic_parse_routing(const char* text, moesaic_routing* out);
MOESAIC_C_API moesaic_status moesaic_parse_format(const char* text, moesaic_format* out);

/* --- tensors and workspaces ------------------------------------------------------------------- */

typedef struct moesaic_device {
  int32_t type; /* moesaic_device_type */
  int32_t index;
} moesaic_device;

/* A strided view of host or device memory; rank 1 to 4. Tensors passed as inputs are never written.
 */
typedef struct moesaic_tensor {
  void* data;
  int32_t dtype; /* moesaic_dtype */
  int32_t rank;
  moesaic_device device;
  int64_t shape[4];
  int64_t strides[4]; /* in elements */
} moesaic_tensor;

/* A dense row-major view of shape[0 .. rank). */
MOESAIC_C_STORES_ADDRESS
MOESAIC_C_API moesaic_tensor moesaic_tensor_dense(const void* data, moesaic_dtype dtype,
                                                  const int64_t* shape, int32_t rank,
                                                  moesaic_device device);

/* Scratch memory on a device. Calls take a pointer and a size, so that a caller's own allocation
 * (256-byte aligned) serves as well. One call at a time per workspace; consecutive calls on one
 * CUDA stream may share one. */
typedef struct moesaic_workspace moesaic_workspace;
MOESAIC_C_API moesaic_status moesaic_workspace_create(moesaic_device device, size_t bytes,
                                                      moesaic_workspace** out);
MOESAIC_C_API void moesaic_workspace_destroy(moesaic_workspace* workspace); /* NULL is fine */
MOESAIC_C_API void* moesaic_workspace_data(const moesaic_workspace* workspace);
MOESAIC_C_API size_t moesaic_workspace_bytes(const moesaic_workspace* workspace);

/* --- what a product is ------------------------------------------------------------------------ */

typedef struct moesaic_quant_spec {
  size_t struct_size;
  int32_t scheme;        /* moesaic_scheme */
  int32_t weight_scale;  /* moesaic_weight_scale */
  int32_t act_scale;     /* moesaic_act_scale */
  int32_t int8_rounding; /* moesaic_int8_rounding */
  int64_t block_n;       /* block scales only */
  int64_t block_k;       /* block weight scales, and group activation scales */
  int64_t group_size;    /* group scales; 0: the whole of K */
  int32_t zero_points;   /* not 0: the weights carry them (int4, grouped int8_w8a16) */
  int32_t reserved;      /* 0 */
} moesaic_quant_spec;
#define MOESAIC_QUANT_SPEC                                                                    \
  {                                                                                           \
    .struct_size = sizeof(moesaic_quant_spec), .scheme = MOESAIC_SCHEME_BF16, .block_n = 128, \
    .block_k = 128, .group_size = 128                                                         \
  }

typedef struct moesaic_activation_spec {
  size_t struct_size;
  int32_t kind;   /* moesaic_activation */
  int32_t order;  /* moesaic_gate_order */
  int32_t layout; /* moesaic_gate_layout */
  float alpha;    /* swiglu_oai */
  float beta;     /* swiglu_oai */
  float limit;    /* swiglu_oai, swiglu_clamp, swiglu_step */
} moesaic_activation_spec;
#define MOESAIC_ACTIVATION_SPEC                                                              \
  {                                                                                          \
    .struct_size = sizeof(moesaic_activation_spec), .kind = MOESAIC_SWIGLU, .alpha = 1.702f, \
    .beta = 1.0f, .limit = 7.0f                                                              \
  }

typedef struct moesaic_routing_spec {
  size_t struct_size;
  int32_t method;      /* moesaic_routing */
  int32_t renormalize; /* moesaic_normalize */
  float scale;         /* routed scaling factor, applied exactly once, by the routing */
  int32_t groups;      /* deepseek_*: experts are split into this many groups ... */
  int32_t topk_groups; /* ... of which this many stay */
  float jitter;        /* sparsemixer's threshold is 2 * jitter */
  float sum_floor;     /* softmax_bias */
  int32_t reserved;    /* 0 */
} moesaic_routing_spec;
#define MOESAIC_ROUTING_SPEC                                                            \
  {                                                                                     \
    .struct_size = sizeof(moesaic_routing_spec), .method = MOESAIC_ROUTING_RENORMALIZE, \
    .scale = 1.0f, .groups = 1, .topk_groups = 1, .jitter = 0.01f, .sum_floor = 1e-12f  \
  }

/* moesaic/quant.h, GemmWeights, says which tensors a scheme needs and in which shapes. */
typedef struct moesaic_gemm_weights {
  size_t struct_size;
  const moesaic_tensor* weight;      /* [E, N, K]; 4 bit: u8 [E, N, K/2] */
  const moesaic_tensor* scale;       /* f32; mxfp4: e8m0 or u8 */
  const moesaic_tensor* zero_point;  /* u8 */
  const moesaic_tensor* bias;        /* [E, N] f32, f16 or bf16 */
  const moesaic_tensor* input_scale; /* f32 [1] or [E]: static activation scales */
  const moesaic_tensor* prequant;    /* [K] or [E, K]: factors of the activations (AWQ) */
  const moesaic_tensor* alpha;       /* f32 [E]: factor of the product */
} moesaic_gemm_weights;
#define MOESAIC_GEMM_WEIGHTS \
  { .struct_size = sizeof(moesaic_gemm_weights) }

typedef struct moesaic_layer_weights {
  size_t struct_size;
  const moesaic_gemm_weights* fc1;        /* N = I, or 2 I when gated; K = H */
  const moesaic_gemm_weights* fc2;        /* N = H, K = I */
  const moesaic_tensor* activation_alpha; /* f32 [E]; NULL: the scalar of the spec */
  const moesaic_tensor* activation_beta;  /* f32 [E] */
  const moesaic_tensor* activation_limit; /* f32 [E] */
} moesaic_layer_weights;
#define MOESAIC_LAYER_WEIGHTS \
  { .struct_size = sizeof(moesaic_layer_weights) }

typedef struct moesaic_router_weights {
  size_t struct_size;
  const moesaic_tensor* weight;         /* [E, H] f32, f16 or bf16; E of the whole model */
  const moesaic_tensor* bias;           /* [E], added to the logits */
  const moesaic_tensor* selection_bias; /* [E], affects which experts are chosen only */
} moesaic_router_weights;
#define MOESAIC_ROUTER_WEIGHTS \
  { .struct_size = sizeof(moesaic_router_weights) }

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MOESAIC_C_TYPES_H_ */
