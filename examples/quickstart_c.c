// SPDX-License-Identifier: Apache-2.0
// quickstart.cpp in C; docs/c_interface.md says what is promised. A test runs it.
#include <moesaic/c_api.h>
#include <stdio.h>

enum { EXPERTS = 8, TOKENS = 4, HIDDEN = 64, INTERMEDIATE = 32 };

static float fc1[EXPERTS][2 * INTERMEDIATE][HIDDEN]; /* gate and up */
static float fc2[EXPERTS][HIDDEN][INTERMEDIATE];     /* down */
static float x[TOKENS][HIDDEN], logits[TOKENS][EXPERTS], y[TOKENS][HIDDEN];

static moesaic_tensor floats(void* data, int rank, int64_t a, int64_t b, int64_t c) {
  const int64_t shape[3] = {a, b, c};
  const moesaic_device cpu = {MOESAIC_CPU, 0};
  return moesaic_tensor_dense(data, MOESAIC_F32, shape, rank, cpu);
}

/* The first failure ends the program with the library's own sentence. */
static int failed(moesaic_status status) {
  if (status != MOESAIC_OK) fprintf(stderr, "%s\n", moesaic_last_error());
  return status != MOESAIC_OK;
}

int main(void) {
  const moesaic_device cpu = {MOESAIC_CPU, 0};
  for (int i = 0; i < EXPERTS * 2 * INTERMEDIATE * HIDDEN; ++i) (&fc1[0][0][0])[i] = 0.02f;
  for (int i = 0; i < EXPERTS * HIDDEN * INTERMEDIATE; ++i) (&fc2[0][0][0])[i] = 0.03f;
  for (int i = 0; i < TOKENS * HIDDEN; ++i) (&x[0][0])[i] = 1.0f;

  moesaic_quant_spec quant = MOESAIC_QUANT_SPEC;
  quant.scheme = MOESAIC_SCHEME_F32;
  moesaic_layer_config config = MOESAIC_LAYER_CONFIG;
  config.experts = EXPERTS;
  config.hidden = HIDDEN;
  config.intermediate = INTERMEDIATE;
  config.top_k = 2;
  config.max_tokens = TOKENS;
  config.quant = &quant;
  config.input_dtype = config.output_dtype = MOESAIC_F32;
  moesaic_layer* layer = NULL;
  if (failed(moesaic_layer_create(&config, cpu, &layer))) return 1;

  const moesaic_tensor w1 = floats(fc1, 3, EXPERTS, 2 * INTERMEDIATE, HIDDEN);
  const moesaic_tensor w2 = floats(fc2, 3, EXPERTS, HIDDEN, INTERMEDIATE);
  moesaic_gemm_weights up = MOESAIC_GEMM_WEIGHTS, down = MOESAIC_GEMM_WEIGHTS;
  up.weight = &w1;
  down.weight = &w2;
  moesaic_layer_weights weights = MOESAIC_LAYER_WEIGHTS;
  weights.fc1 = &up;
  weights.fc2 = &down;
  if (failed(moesaic_layer_load(layer, &weights))) return 1;

  size_t bytes = 0;
  moesaic_workspace* workspace = NULL;
  if (failed(moesaic_layer_workspace_bytes(layer, TOKENS, &bytes))) return 1;
  if (failed(moesaic_workspace_create(cpu, bytes, &workspace))) return 1;

  const moesaic_tensor in = floats(x, 2, TOKENS, HIDDEN, 0);
  const moesaic_tensor router = floats(logits, 2, TOKENS, EXPERTS, 0);
  const moesaic_tensor out = floats(y, 2, TOKENS, HIDDEN, 0);
  moesaic_forward_args args = MOESAIC_FORWARD_ARGS;
  args.hidden_states = &in;
  args.router_logits = &router;
  args.output = &out;
  args.workspace = moesaic_workspace_data(workspace);
  args.workspace_bytes = bytes;
  if (failed(moesaic_layer_forward(layer, &args))) return 1;
  printf("y[0][0] = %.4f\n", (double)y[0][0]); /* 0.96 * silu(1.28) * 1.28 */

  moesaic_workspace_destroy(workspace);
  moesaic_layer_destroy(layer);
  return 0;
}
