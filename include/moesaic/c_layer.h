// SPDX-License-Identifier: Apache-2.0
/* Level 1 of the C interface (c_api.h): the layer. layer.h says what each tensor means. */
#ifndef MOESAIC_C_LAYER_H_
#define MOESAIC_C_LAYER_H_

#include "moesaic/c_types.h"

#ifdef __cplusplus
extern "C" {
#endif

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
  int32_t weight_storage;                       /* moesaic_weight_storage */
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
 * MOESAIC_WEIGHTS_IN_PLACE: the weights are the layer's from the call on; see Layer::load in
 * layer.h. */
MOESAIC_C_API moesaic_status moesaic_layer_load(moesaic_layer* layer,
                                                const moesaic_layer_weights* weights);
/* ... or one by one (leading extent 1), which never holds more than one expert twice. Ready when all
 * came, and with the same tensors. */
MOESAIC_C_API moesaic_status moesaic_layer_load_expert(moesaic_layer* layer, int64_t local_expert,
                                                       const moesaic_layer_weights* weights);
/* The way back, bit for bit, into the caller's [1, N, K]. UNSUPPORTED for 4 bits on the CPU. */
MOESAIC_C_API moesaic_status moesaic_layer_unpack_expert(const moesaic_layer* layer,
                                                         int64_t local_expert,
                                                         const moesaic_tensor* fc1,
                                                         const moesaic_tensor* fc2);
/* Leading extent 1. gate: optional [H]; the shared output is multiplied by sigmoid(x . gate). */
MOESAIC_C_API moesaic_status moesaic_layer_load_shared(moesaic_layer* layer,
                                                       const moesaic_layer_weights* weights,
                                                       const moesaic_tensor* gate);
/* A router or gate that is replaced is freed: capture CUDA graphs of forward again. */
MOESAIC_C_API moesaic_status moesaic_layer_set_router(moesaic_layer* layer,
                                                      const moesaic_router_weights* router);
/* *ready: 1 when every expert has been loaded. */
MOESAIC_C_API moesaic_status moesaic_layer_ready(const moesaic_layer* layer, int32_t* ready);
MOESAIC_C_API moesaic_status moesaic_layer_weight_bytes(const moesaic_layer* layer, size_t* bytes);
/* A pure function of the configuration and tokens, 0 <= tokens <= max_tokens; never less for more. */
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

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MOESAIC_C_LAYER_H_ */
