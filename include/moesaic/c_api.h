// SPDX-License-Identifier: Apache-2.0
/* The C interface: the same three levels as the C++ headers, which say what each tensor means.
 *
 * Conventions
 * - Every function that can fail returns a moesaic_status; moesaic_last_error() then holds one
 * sentence of this thread that names the argument, what was expected, what came, and a way out. No
 * exception crosses, nothing is printed. After a failure no output has been touched.
 * - Tensors are views, passed by pointer; NULL means "not given". Shapes in [brackets], T tokens, k
 *   top_k, E experts (of weights and rows: the local ones), H hidden, I intermediate, N and K a
 *   product's output and reduction width.
 * - Structs carry their size in their first field. Initialize them with the macro of their name: it
 *   sets the size and every default. A caller compiled against an older header passes a smaller
 *   struct; what is missing takes its default. A larger one is accepted as long as what this
 * library does not know is zero. Enumerations in structs are int32_t. moesaic_tensor never changes.
 * - Sizes and strides are 64 bit and count elements; only *_bytes counts bytes.
 * - Handles may be used from many threads at once, apart from create, destroy, load* and set_*.
 */
#ifndef MOESAIC_C_API_H_
#define MOESAIC_C_API_H_

#include <stddef.h>
#include <stdint.h>

#include "moesaic/version.h"

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

/* --- level 1: the layer ----------------------------------------------------------------------- */

typedef struct moesaic_layer_config {
  size_t struct_size;
  int64_t experts, hidden, intermediate, top_k; /* of the model; intermediate: one of gate / up */
  int64_t max_tokens;                           /* the largest T of any forward */
  int64_t local_first, local_count;             /* experts held here; count 0: up to the last */
  const moesaic_quant_spec* quant;              /* NULL: bf16 */
  const moesaic_activation_spec* activation;    /* NULL: swiglu */
  const moesaic_routing_spec* routing;          /* NULL: renormalize */
  int32_t weight_on;                            /* moesaic_weight_on */
  int32_t input_dtype, output_dtype;            /* moesaic_dtype */
  int32_t reserved;                             /* 0 */
  int64_t shared_experts, shared_intermediate;  /* joint width; 0: shared_experts * intermediate */
  size_t workspace_cap;                         /* bytes; 0: none */
} moesaic_layer_config;
#define MOESAIC_LAYER_CONFIG                                                  \
  {                                                                           \
    .struct_size = sizeof(moesaic_layer_config), .input_dtype = MOESAIC_BF16, \
    .output_dtype = MOESAIC_BF16                                              \
  }

typedef struct moesaic_forward_args {
  size_t struct_size;
  const moesaic_tensor* hidden_states; /* [T, H] of input_dtype */
  const moesaic_tensor*
      hidden_scale; /* f32, with 8-bit hidden_states: [1] | [T, 1] | [T, groups] */
  /* ids and weights, or logits, or neither (then set_router's weights are used) */
  const moesaic_tensor* topk_ids; /* [T, k] i32 or i64, global; out of range: contributes nothing */
  const moesaic_tensor* topk_weights;      /* [T, k] f32 */
  const moesaic_tensor* router_logits;     /* [T, E] f32, f16 or bf16 */
  const moesaic_tensor* output;            /* out [T, H] of output_dtype */
  const moesaic_tensor* tokens_per_expert; /* optional out i32 [E] */
  int32_t accumulate;                      /* moesaic_accumulate; MOESAIC_ADD: output += y */
  int32_t reserved;                        /* 0 */
  void* workspace;                         /* at least moesaic_layer_workspace_bytes(T) */
  size_t workspace_bytes;
  void* stream; /* cudaStream_t; ignored on the CPU, where the call returns when the work is done */
} moesaic_forward_args;
#define MOESAIC_FORWARD_ARGS \
  { .struct_size = sizeof(moesaic_forward_args) }

typedef struct moesaic_layer moesaic_layer;

/* UNSUPPORTED: the device cannot run this configuration. OUT_OF_MEMORY: no room for the weights. */
MOESAIC_C_API moesaic_status moesaic_layer_create(const moesaic_layer_config* config,
                                                  moesaic_device device, moesaic_layer** out);
MOESAIC_C_API void moesaic_layer_destroy(moesaic_layer* layer); /* NULL is fine */
/* Weights are copied and packed: the tensors may go away afterwards. All local experts at once ...
 */
MOESAIC_C_API moesaic_status moesaic_layer_load(moesaic_layer* layer,
                                                const moesaic_layer_weights* weights);
/* ... or one by one (leading extent 1), which never holds more than one expert twice. */
MOESAIC_C_API moesaic_status moesaic_layer_load_expert(moesaic_layer* layer, int64_t local_expert,
                                                       const moesaic_layer_weights* weights);
/* Leading extent 1. gate: optional [H]; the shared output is multiplied by sigmoid(x . gate). */
MOESAIC_C_API moesaic_status moesaic_layer_load_shared(moesaic_layer* layer,
                                                       const moesaic_layer_weights* weights,
                                                       const moesaic_tensor* gate);
MOESAIC_C_API moesaic_status moesaic_layer_set_router(moesaic_layer* layer,
                                                      const moesaic_router_weights* router);
/* *ready: 1 when every expert has been loaded. */
MOESAIC_C_API moesaic_status moesaic_layer_ready(const moesaic_layer* layer, int32_t* ready);
MOESAIC_C_API moesaic_status moesaic_layer_weight_bytes(const moesaic_layer* layer, size_t* bytes);
/* A pure function of the configuration and tokens, 0 <= tokens <= max_tokens. */
MOESAIC_C_API moesaic_status moesaic_layer_workspace_bytes(const moesaic_layer* layer,
                                                           int64_t tokens, size_t* bytes);
/* Allocates nothing, synchronizes nothing, reads nothing back: may be captured in a CUDA graph.
 * NOT_READY: experts, or a router that is needed, are missing. */
MOESAIC_C_API moesaic_status moesaic_layer_forward(const moesaic_layer* layer,
                                                   const moesaic_forward_args* args);
/* How many ways each product can run here (all give the same bits), and which to take; -1 or an
 * index out of range: the library's choice. */
MOESAIC_C_API moesaic_status moesaic_layer_tactic_counts(const moesaic_layer* layer, int32_t* gemm1,
                                                         int32_t* gemm2);
MOESAIC_C_API moesaic_status moesaic_layer_set_tactics(moesaic_layer* layer, int32_t gemm1,
                                                       int32_t gemm2);

/* --- level 2: prepare, experts, finalize ------------------------------------------------------ */

typedef struct moesaic_prepare_args {
  size_t struct_size;
  const moesaic_tensor* hidden_states; /* [T, H] */
  const moesaic_tensor* hidden_scale;  /* with 8-bit hidden_states */
  const moesaic_tensor* topk_ids;      /* [T, k] i32 or i64, global */
  const moesaic_tensor* topk_weights;  /* [T, k] f32; only with MOESAIC_WEIGHT_ON_INPUT */
  const moesaic_tensor* expert_map;    /* optional i32 [experts]: global -> local, -1 remote */
  const moesaic_tensor* rows;          /* out [E, capacity, H] in the activation dtype */
  const moesaic_tensor* row_scale;  /* out f32, 8 bit: [E, 1 | capacity, 1 | ceil(H / block_k)] */
  const moesaic_tensor* num_tokens; /* out i32 [E]: live rows, at most capacity */
  const moesaic_tensor* slot_row;   /* optional out i32 [T, k]: e * capacity + i, or -1 */
  const moesaic_tensor* status;     /* optional out i32 [1]: slots dropped for want of capacity */
  void* workspace;                  /* moesaic_stage_workspace_bytes */
  size_t workspace_bytes;
  void* stream;
} moesaic_prepare_args;
#define MOESAIC_PREPARE_ARGS \
  { .struct_size = sizeof(moesaic_prepare_args) }

/* Slot ids (token * top_k + j) grouped by expert, each run padded to block_rows with T * top_k. */
typedef struct moesaic_sorted_rows {
  size_t struct_size;
  const moesaic_tensor* slots;         /* i32 [capacity] */
  const moesaic_tensor* block_experts; /* i32 [capacity / block_rows]; -1: rows become zero */
  const moesaic_tensor* num_padded;    /* i32 [1]: how many of `slots` are in use */
  int64_t block_rows;
} moesaic_sorted_rows;
#define MOESAIC_SORTED_ROWS \
  { .struct_size = sizeof(moesaic_sorted_rows) }

typedef struct moesaic_experts_args {
  size_t struct_size;
  int32_t format;                    /* moesaic_format: batched or sorted */
  int32_t reserved;                  /* 0 */
  const moesaic_tensor* rows;        /* batched [E, capacity, H]; sorted [T, H] */
  const moesaic_tensor* row_scale;   /* of 8-bit rows, as prepare writes it */
  const moesaic_tensor* num_tokens;  /* batched: i32 [E] */
  const moesaic_sorted_rows* sorted; /* sorted */
  const moesaic_tensor* row_weights; /* optional f32 [T * k] by slot, sorted only */
  const moesaic_tensor* output;      /* out: batched [E, capacity, H]; sorted [T * k, H] by slot */
  int64_t expected_tokens;           /* batched: a hint that never changes bits; 0: unknown */
  void* workspace;
  size_t workspace_bytes;
  void* stream;
} moesaic_experts_args;
#define MOESAIC_EXPERTS_ARGS \
  { .struct_size = sizeof(moesaic_experts_args), .format = MOESAIC_BATCHED }

typedef struct moesaic_finalize_args {
  size_t struct_size;
  const moesaic_tensor* expert_output; /* [E, capacity, H]; never modified */
  const moesaic_tensor* topk_ids;      /* [T, k], as given to prepare */
  const moesaic_tensor* topk_weights;  /* [T, k] f32 */
  const moesaic_tensor* expert_map;    /* as given to prepare */
  const moesaic_tensor* slot_row;      /* optional: what prepare wrote */
  const moesaic_tensor* output;        /* out [T, H] */
  int32_t accumulate;                  /* moesaic_accumulate */
  int32_t reserved;                    /* 0 */
  void* workspace;
  size_t workspace_bytes;
  void* stream;
} moesaic_finalize_args;
#define MOESAIC_FINALIZE_ARGS \
  { .struct_size = sizeof(moesaic_finalize_args) }

/* With a layer's packed weights. */
MOESAIC_C_API moesaic_status moesaic_layer_prepare(const moesaic_layer* layer,
                                                   const moesaic_prepare_args* args);
MOESAIC_C_API moesaic_status moesaic_layer_experts(const moesaic_layer* layer,
                                                   const moesaic_experts_args* args);
MOESAIC_C_API moesaic_status moesaic_layer_finalize(const moesaic_layer* layer,
                                                    const moesaic_finalize_args* args);
/* With the caller's own weights, read in place. max_tokens of the configuration is not used. */
MOESAIC_C_API moesaic_status moesaic_prepare(const moesaic_layer_config* config,
                                             const moesaic_prepare_args* args);
MOESAIC_C_API moesaic_status moesaic_experts(const moesaic_layer_config* config,
                                             const moesaic_layer_weights* weights,
                                             const moesaic_experts_args* args);
MOESAIC_C_API moesaic_status moesaic_finalize(const moesaic_layer_config* config,
                                              const moesaic_finalize_args* args);
/* What any of the three needs. capacity: batched, rows per expert; sorted, the length of `slots`.
 */
MOESAIC_C_API moesaic_status moesaic_stage_workspace_bytes(const moesaic_layer_config* config,
                                                           moesaic_format format, int64_t tokens,
                                                           int64_t capacity, moesaic_device device,
                                                           size_t* bytes);

/* --- level 3: the grouped GEMM and the pieces around it --------------------------------------- */

typedef struct moesaic_align_args {
  size_t struct_size;
  const moesaic_tensor* topk_ids;          /* [T, k] i32 or i64 */
  int64_t experts;                         /* ids in [0, experts) are valid */
  int64_t local_first, local_count;        /* count 0: up to the last */
  const moesaic_tensor* expert_map;        /* optional i32 [experts] */
  const moesaic_sorted_rows* rows;         /* out: its tensors are written */
  const moesaic_tensor* slot_row;          /* optional out i32 [T * k] */
  const moesaic_tensor* tokens_per_expert; /* optional out i32 [E] */
  void* workspace;                         /* moesaic_align_workspace_bytes */
  size_t workspace_bytes;
  void* stream;
} moesaic_align_args;
#define MOESAIC_ALIGN_ARGS \
  { .struct_size = sizeof(moesaic_align_args) }

/* Length of `slots` that suffices for any routing of slot_count = T * k slots. */
MOESAIC_C_API moesaic_status moesaic_align_capacity(int64_t slot_count, int64_t experts,
                                                    int64_t block_rows, int64_t* capacity);
MOESAIC_C_API moesaic_status moesaic_align_workspace_bytes(int64_t slot_count, int64_t experts,
                                                           moesaic_device device, size_t* bytes);
/* Stable: the same ids give the same lists, always. */
MOESAIC_C_API moesaic_status moesaic_align(const moesaic_align_args* args);

typedef struct moesaic_grouped_gemm_args {
  size_t struct_size;
  const moesaic_quant_spec* quant;   /* NULL: bf16 */
  const moesaic_tensor* a;           /* sorted [T, K] or [T * k, K]; batched [E, capacity, K] */
  const moesaic_tensor* a_scale;     /* of 8-bit a, or a static scale */
  const moesaic_gemm_weights* b;     /* unpacked, read in place */
  const moesaic_sorted_rows* sorted; /* exactly one of */
  const moesaic_tensor* num_tokens;  /* the two formats; i32 [E]: batched */
  int64_t top_k;                     /* row of a = slot / top_k */
  int32_t a_order, c_order;          /* moesaic_row_order */
  const moesaic_tensor* row_weights; /* optional f32 [T * k] by slot, behind the bias */
  const moesaic_tensor* c;           /* out, f32, f16 or bf16, any strides */
  void* workspace;                   /* moesaic_grouped_gemm_workspace_bytes */
  size_t workspace_bytes;
  void* stream;
} moesaic_grouped_gemm_args;
#define MOESAIC_GROUPED_GEMM_ARGS \
  { .struct_size = sizeof(moesaic_grouped_gemm_args), .top_k = 1 }

MOESAIC_C_API moesaic_status
moesaic_grouped_gemm_workspace_bytes(const moesaic_grouped_gemm_args* args, size_t* bytes);
MOESAIC_C_API moesaic_status moesaic_grouped_gemm(const moesaic_grouped_gemm_args* args);

typedef struct moesaic_sum_args {
  size_t struct_size;
  const moesaic_tensor* input;        /* [T, k, H]; or [R, H] addressed through slot_row */
  const moesaic_tensor* slot_row;     /* optional i32 [T, k]; -1: none */
  const moesaic_tensor* topk_weights; /* optional f32 [T, k] */
  const moesaic_tensor* topk_ids; /* optional i32 [T, k]: slots with a negative id are skipped */
  const moesaic_tensor* output;   /* out [T, H] */
  float scale;
  int32_t accumulate; /* moesaic_accumulate */
  void* stream;
} moesaic_sum_args;
#define MOESAIC_SUM_ARGS \
  { .struct_size = sizeof(moesaic_sum_args), .scale = 1.0f }
/* fp32 sum in slot order, one rounding at the end. */
MOESAIC_C_API moesaic_status moesaic_sum(const moesaic_sum_args* args);

typedef struct moesaic_route_args {
  size_t struct_size;
  const moesaic_routing_spec* spec;     /* NULL: renormalize */
  const moesaic_tensor* logits;         /* [T, E]; or */
  const moesaic_tensor* hidden_states;  /* [T, H] with router->weight */
  const moesaic_router_weights* router; /* optional with logits */
  const moesaic_tensor* topk_ids;       /* out i32 [T, k], best first */
  const moesaic_tensor* topk_weights;   /* out f32 [T, k] */
  void* workspace;                      /* moesaic_route_workspace_bytes; not with logits */
  size_t workspace_bytes;
  void* stream;
} moesaic_route_args;
#define MOESAIC_ROUTE_ARGS \
  { .struct_size = sizeof(moesaic_route_args) }
MOESAIC_C_API moesaic_status moesaic_route_workspace_bytes(int64_t tokens, int64_t experts,
                                                           size_t* bytes);
MOESAIC_C_API moesaic_status moesaic_route(const moesaic_route_args* args);

typedef struct moesaic_quantize_args {
  size_t struct_size;
  const moesaic_tensor* input; /* [R, K] f32, f16 or bf16; batched: [E, capacity, K] */
  int32_t to;                  /* MOESAIC_FP8_E4M3 or MOESAIC_I8 */
  int32_t granularity;         /* moesaic_act_scale, not DEFAULT */
  int32_t int8_rounding;       /* moesaic_int8_rounding */
  int32_t reserved;            /* 0 */
  int64_t group_size;
  const moesaic_tensor* static_scale; /* f32 [1]; batched also [E] */
  const moesaic_tensor* output;       /* out [R, K] of `to`; batched: [E, capacity, K] */
  const moesaic_tensor* scale;        /* out f32 [1] | [R, 1] | [R, ceil(K / group_size)]; batched:
                                         [E, 1, 1] | [E, capacity, ...] */
  void* workspace; /* dynamic per tensor, and batched: moesaic_quantize_call_workspace_bytes */
  size_t workspace_bytes;
  void* stream;
  const moesaic_tensor* num_tokens; /* i32 [E] makes it batched: live rows of each expert; the
                                       others are not touched */
} moesaic_quantize_args;
#define MOESAIC_QUANTIZE_ARGS                                             \
  {                                                                       \
    .struct_size = sizeof(moesaic_quantize_args), .to = MOESAIC_FP8_E4M3, \
    .granularity = MOESAIC_ACT_SCALE_TOKEN, .group_size = 128             \
  }
MOESAIC_C_API moesaic_status moesaic_quantize_workspace_bytes(int64_t rows, moesaic_device device,
                                                              size_t* bytes);
/* The same from the call's shapes; what a batched call needs. */
MOESAIC_C_API moesaic_status
moesaic_quantize_call_workspace_bytes(const moesaic_quantize_args* args, size_t* bytes);
MOESAIC_C_API moesaic_status moesaic_quantize(const moesaic_quantize_args* args);

typedef struct moesaic_activate_args {
  size_t struct_size;
  const moesaic_activation_spec* spec; /* NULL: swiglu */
  const moesaic_tensor* alpha;         /* optional f32 [E] */
  const moesaic_tensor* beta;
  const moesaic_tensor* limit;
  const moesaic_tensor* input;      /* [R, N] f32, f16 or bf16 */
  const moesaic_tensor* row_expert; /* i32 [R], with tensors above; -1: the row becomes zero */
  const moesaic_tensor* output;     /* out [R, N or N / 2] */
  void* stream;
} moesaic_activate_args;
#define MOESAIC_ACTIVATE_ARGS \
  { .struct_size = sizeof(moesaic_activate_args) }
MOESAIC_C_API moesaic_status moesaic_activate(const moesaic_activate_args* args);

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
