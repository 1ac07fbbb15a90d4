// SPDX-License-Identifier: Apache-2.0
/* Level 3 of the C interface (c_api.h): the grouped GEMM and the pieces around it. gemm.h,
 * routing.h, quant.h and activation.h say what each tensor means. */
#ifndef MOESAIC_C_GEMM_H_
#define MOESAIC_C_GEMM_H_

#include "moesaic/c_stages.h"

#ifdef __cplusplus
extern "C" {
#endif

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

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MOESAIC_C_GEMM_H_ */
