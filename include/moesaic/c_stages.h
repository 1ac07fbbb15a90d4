// SPDX-License-Identifier: Apache-2.0
/* Level 2 of the C interface (c_api.h): prepare, experts, finalize. stages.h says what each tensor
 * means. */
#ifndef MOESAIC_C_STAGES_H_
#define MOESAIC_C_STAGES_H_

#include "moesaic/c_layer.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- level 2: prepare, experts, finalize ------------------------------------------------------ */

typedef struct moesaic_prepare_args {
  size_t struct_size;
  const moesaic_tensor* hidden_states; /* [T, H] */
  const moesaic_tensor* hidden_scale;  /* with 8-bit hidden_states; [1] for schemes per tensor */
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
  const moesaic_tensor* row_weights; /* optional f32 [T * k] by slot, sorted only: multiplies the output,
                                        with MOESAIC_WEIGHT_ON_INPUT the input */
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

typedef struct moesaic_stage_shape {
  size_t struct_size;
  int32_t format;   /* moesaic_format */
  int32_t reserved; /* 0 */
  int64_t tokens;
  int64_t capacity; /* batched: rows per expert; sorted: the length of `slots` */
  moesaic_device device;
} moesaic_stage_shape;
#define MOESAIC_STAGE_SHAPE \
  { .struct_size = sizeof(moesaic_stage_shape), .format = MOESAIC_BATCHED }
/* What any of the three stages needs at most. */
MOESAIC_C_API moesaic_status moesaic_stage_workspace_bytes(const moesaic_layer_config* config,
                                                           const moesaic_stage_shape* shape,
                                                           size_t* bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MOESAIC_C_STAGES_H_ */
