// SPDX-License-Identifier: Apache-2.0
/* The C interface from C: one small layer at all three levels against a loop that says what a layer
 * is, and the promises of the header (sizes, statuses, messages). */
#include "moesaic/c_api.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 6, E = 5, H = 12, I = 7, K = 2, CAPACITY = T * K, BLOCK = 4 };

static int failures = 0;
#define EXPECT(condition)                                                                      \
  do {                                                                                         \
    if (!(condition)) {                                                                        \
      ++failures;                                                                              \
      printf("line %d: %s\n    last error: %s\n", __LINE__, #condition, moesaic_last_error()); \
    }                                                                                          \
  } while (0)
#define EXPECT_OK(call) EXPECT((call) == MOESAIC_OK)

static const moesaic_device kCpu = {MOESAIC_CPU, 0};

static moesaic_tensor view(void* data, moesaic_dtype dtype, int rank, int64_t a, int64_t b,
                           int64_t c) {
  const int64_t shape[3] = {a, b, c};
  return moesaic_tensor_dense(data, dtype, shape, rank, kCpu);
}

/* Numbers without a pattern in [-1, 1). */
static uint64_t random_state = 88172645463325252u;
static float random_number(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (float)(int32_t)(random_state >> 32) / 2147483648.0f;
}
static void fill(float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) x[i] = random_number();
}

static float x[T][H], router[E][H], fc1[E][2 * I][H], fc2[E][H][I], bias1[E][2 * I], bias2[E][H];
static int32_t ids[T][K];
static float weights[T][K];
static double expected[T][H];

/* --- the layer as a loop ---------------------------------------------------------------------- */

static void choose(int t) {
  double z[E], sum = 0;
  for (int e = 0; e < E; ++e) {
    z[e] = 0;
    for (int h = 0; h < H; ++h) z[e] += (double)x[t][h] * router[e][h];
  }
  for (int j = 0; j < K; ++j) {
    int best = -1;
    for (int e = 0; e < E; ++e)
      if ((j == 0 || e != ids[t][0]) && (best < 0 || z[e] > z[best])) best = e;
    ids[t][j] = best;
    sum += exp(z[best]);
  }
  for (int j = 0; j < K; ++j) weights[t][j] = (float)(exp(z[ids[t][j]]) / sum);
}

static void run_naively(void) {
  memset(expected, 0, sizeof expected);
  for (int t = 0; t < T; ++t) {
    choose(t);
    for (int j = 0; j < K; ++j) {
      const int e = ids[t][j];
      double inner[2 * I], act[I];
      for (int n = 0; n < 2 * I; ++n) {
        inner[n] = bias1[e][n];
        for (int h = 0; h < H; ++h) inner[n] += (double)x[t][h] * fc1[e][n][h];
      }
      for (int i = 0; i < I; ++i) act[i] = inner[i] / (1 + exp(-inner[i])) * inner[I + i];
      for (int h = 0; h < H; ++h) {
        double y = bias2[e][h];
        for (int i = 0; i < I; ++i) y += act[i] * fc2[e][h][i];
        expected[t][h] += weights[t][j] * y;
      }
    }
  }
}

static int is_expected(float y[T][H]) {
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h)
      if (!(fabs(y[t][h] - expected[t][h]) <= 1e-5)) return 0;
  return 1;
}

/* --- shared descriptions ---------------------------------------------------------------------- */

static moesaic_tensor x_view, ids_view, weights_view, router_view;
static moesaic_tensor fc1_view, fc2_view, bias1_view, bias2_view;
static moesaic_quant_spec f32_spec = MOESAIC_QUANT_SPEC;
static moesaic_layer_config config = MOESAIC_LAYER_CONFIG;
static moesaic_gemm_weights gemm1 = MOESAIC_GEMM_WEIGHTS, gemm2 = MOESAIC_GEMM_WEIGHTS;
static moesaic_layer_weights layer_weights = MOESAIC_LAYER_WEIGHTS;

static void describe(void) {
  x_view = view(x, MOESAIC_F32, 2, T, H, 0);
  ids_view = view(ids, MOESAIC_I32, 2, T, K, 0);
  weights_view = view(weights, MOESAIC_F32, 2, T, K, 0);
  router_view = view(router, MOESAIC_F32, 2, E, H, 0);
  fc1_view = view(fc1, MOESAIC_F32, 3, E, 2 * I, H);
  fc2_view = view(fc2, MOESAIC_F32, 3, E, H, I);
  bias1_view = view(bias1, MOESAIC_F32, 2, E, 2 * I, 0);
  bias2_view = view(bias2, MOESAIC_F32, 2, E, H, 0);
  f32_spec.scheme = MOESAIC_SCHEME_F32;
  config.experts = E;
  config.hidden = H;
  config.intermediate = I;
  config.top_k = K;
  config.max_tokens = T;
  config.quant = &f32_spec;
  config.input_dtype = config.output_dtype = MOESAIC_F32;
  gemm1.weight = &fc1_view;
  gemm1.bias = &bias1_view;
  gemm2.weight = &fc2_view;
  gemm2.bias = &bias2_view;
  layer_weights.fc1 = &gemm1;
  layer_weights.fc2 = &gemm2;
}

/* --- level 1 ---------------------------------------------------------------------------------- */

static void test_layer(void) {
  moesaic_layer* layer = NULL;
  moesaic_workspace* workspace = NULL;
  moesaic_router_weights router_weights = MOESAIC_ROUTER_WEIGHTS;
  moesaic_forward_args args = MOESAIC_FORWARD_ARGS;
  float y[T][H];
  int32_t counts[E], ready = -1, tactics1 = 0, tactics2 = 0, total = 0;
  size_t bytes = 0;
  const moesaic_tensor y_view = view(y, MOESAIC_F32, 2, T, H, 0);
  const moesaic_tensor counts_view = view(counts, MOESAIC_I32, 1, E, 0, 0);

  EXPECT_OK(moesaic_layer_create(&config, kCpu, &layer));
  if (layer == NULL) return;
  EXPECT_OK(moesaic_layer_ready(layer, &ready));
  EXPECT(ready == 0);
  EXPECT_OK(moesaic_layer_load(layer, &layer_weights));
  EXPECT_OK(moesaic_layer_ready(layer, &ready));
  EXPECT(ready == 1);
  EXPECT_OK(moesaic_layer_weight_bytes(layer, &bytes));
  EXPECT(bytes >= sizeof fc1 + sizeof fc2);
  EXPECT_OK(moesaic_layer_workspace_bytes(layer, T, &bytes));
  EXPECT_OK(moesaic_workspace_create(kCpu, bytes, &workspace));
  EXPECT(moesaic_workspace_bytes(workspace) >= bytes);

  args.hidden_states = &x_view;
  args.output = &y_view;
  args.tokens_per_expert = &counts_view;
  args.workspace = moesaic_workspace_data(workspace);
  args.workspace_bytes = moesaic_workspace_bytes(workspace);
  EXPECT(moesaic_layer_forward(layer, &args) == MOESAIC_NOT_READY); /* no router, no ids */
  router_weights.weight = &router_view;
  EXPECT_OK(moesaic_layer_set_router(layer, &router_weights));
  memset(y, 0xff, sizeof y);
  EXPECT_OK(moesaic_layer_forward(layer, &args));
  EXPECT(is_expected(y));
  for (int e = 0; e < E; ++e) total += counts[e];
  EXPECT(total == T * K);

  args.topk_ids = &ids_view;
  args.topk_weights = &weights_view;
  memset(y, 0xff, sizeof y);
  EXPECT_OK(moesaic_layer_forward(layer, &args));
  EXPECT(is_expected(y));

  EXPECT_OK(moesaic_layer_tactic_counts(layer, &tactics1, &tactics2));
  EXPECT(tactics1 >= 1 && tactics2 >= 1);
  EXPECT_OK(moesaic_layer_set_tactics(layer, 1000, -1));
  EXPECT_OK(moesaic_layer_forward(layer, &args));
  EXPECT(is_expected(y));
  moesaic_workspace_destroy(workspace);
  moesaic_layer_destroy(layer);
  moesaic_layer_destroy(NULL);
  moesaic_workspace_destroy(NULL);
}

/* --- level 2 ---------------------------------------------------------------------------------- */

static void test_stages(void) {
  float rows[E][CAPACITY][H], out[E][CAPACITY][H], y[T][H];
  int32_t num_tokens[E], slot_row[T][K], dropped = -1;
  size_t bytes = 0;
  moesaic_workspace* workspace = NULL;
  const moesaic_tensor rows_view = view(rows, MOESAIC_F32, 3, E, CAPACITY, H);
  const moesaic_tensor out_view = view(out, MOESAIC_F32, 3, E, CAPACITY, H);
  const moesaic_tensor y_view = view(y, MOESAIC_F32, 2, T, H, 0);
  const moesaic_tensor num_view = view(num_tokens, MOESAIC_I32, 1, E, 0, 0);
  const moesaic_tensor slot_view = view(slot_row, MOESAIC_I32, 2, T, K, 0);
  const moesaic_tensor status_view = view(&dropped, MOESAIC_I32, 1, 1, 0, 0);
  moesaic_prepare_args prepare = MOESAIC_PREPARE_ARGS;
  moesaic_experts_args experts = MOESAIC_EXPERTS_ARGS;
  moesaic_finalize_args finalize = MOESAIC_FINALIZE_ARGS;

  EXPECT_OK(moesaic_stage_workspace_bytes(&config, MOESAIC_BATCHED, T, CAPACITY, kCpu, &bytes));
  EXPECT_OK(moesaic_workspace_create(kCpu, bytes, &workspace));
  prepare.hidden_states = &x_view;
  prepare.topk_ids = &ids_view;
  prepare.rows = &rows_view;
  prepare.num_tokens = &num_view;
  prepare.slot_row = &slot_view;
  prepare.status = &status_view;
  experts.rows = &rows_view;
  experts.num_tokens = &num_view;
  experts.output = &out_view;
  finalize.expert_output = &out_view;
  finalize.topk_ids = &ids_view;
  finalize.topk_weights = &weights_view;
  finalize.slot_row = &slot_view;
  finalize.output = &y_view;
  prepare.workspace = experts.workspace = finalize.workspace = moesaic_workspace_data(workspace);
  prepare.workspace_bytes = experts.workspace_bytes = finalize.workspace_bytes = bytes;
  memset(rows, 0xff, sizeof rows);
  memset(out, 0xff, sizeof out);
  EXPECT_OK(moesaic_prepare(&config, &prepare));
  EXPECT(dropped == 0);
  EXPECT_OK(moesaic_experts(&config, &layer_weights, &experts));
  EXPECT_OK(moesaic_finalize(&config, &finalize));
  EXPECT(is_expected(y));
  moesaic_workspace_destroy(workspace);
}

/* --- level 3 ---------------------------------------------------------------------------------- */

static void test_grouped_gemm(void) {
  float inner[T * K][2 * I], act[T * K][I], slots_out[T][K][H], y[T][H], own_weights[T][K];
  int32_t own_ids[T][K], num_padded = 0;
  int64_t capacity = 0;
  size_t bytes = 0, more = 0;
  moesaic_workspace* workspace = NULL;
  moesaic_sorted_rows sorted = MOESAIC_SORTED_ROWS;
  moesaic_route_args route = MOESAIC_ROUTE_ARGS;
  moesaic_router_weights router_weights = MOESAIC_ROUTER_WEIGHTS;
  moesaic_align_args align = MOESAIC_ALIGN_ARGS;
  moesaic_grouped_gemm_args product = MOESAIC_GROUPED_GEMM_ARGS;
  moesaic_activate_args activate = MOESAIC_ACTIVATE_ARGS;
  moesaic_sum_args sum = MOESAIC_SUM_ARGS;
  const moesaic_tensor own_ids_view = view(own_ids, MOESAIC_I32, 2, T, K, 0);
  const moesaic_tensor own_weights_view = view(own_weights, MOESAIC_F32, 2, T, K, 0);
  const moesaic_tensor inner_view = view(inner, MOESAIC_F32, 2, T * K, 2 * I, 0);
  const moesaic_tensor act_view = view(act, MOESAIC_F32, 2, T * K, I, 0);
  const moesaic_tensor slots_out_view = view(slots_out, MOESAIC_F32, 3, T, K, H);
  const moesaic_tensor flat_weights_view = view(own_weights, MOESAIC_F32, 1, T * K, 0, 0);
  const moesaic_tensor y_view = view(y, MOESAIC_F32, 2, T, H, 0);
  const moesaic_tensor num_padded_view = view(&num_padded, MOESAIC_I32, 1, 1, 0, 0);
  moesaic_tensor slots_view, blocks_view;
  int32_t *slots, *blocks;

  EXPECT_OK(moesaic_route_workspace_bytes(T, E, &bytes));
  EXPECT_OK(moesaic_align_workspace_bytes(T * K, E, kCpu, &more));
  bytes = bytes > more ? bytes : more;
  bytes = bytes > 65536 ? bytes : 65536;
  EXPECT_OK(moesaic_workspace_create(kCpu, bytes, &workspace));
  EXPECT_OK(moesaic_align_capacity(T * K, E, BLOCK, &capacity));
  slots = malloc((size_t)capacity * sizeof *slots);
  blocks = malloc((size_t)(capacity / BLOCK + 1) * sizeof *blocks);
  if (slots == NULL || blocks == NULL) exit(2);
  slots_view = view(slots, MOESAIC_I32, 1, capacity, 0, 0);
  blocks_view = view(blocks, MOESAIC_I32, 1, (capacity + BLOCK - 1) / BLOCK, 0, 0);

  router_weights.weight = &router_view;
  route.hidden_states = &x_view;
  route.router = &router_weights;
  route.topk_ids = &own_ids_view;
  route.topk_weights = &own_weights_view;
  route.workspace = moesaic_workspace_data(workspace);
  route.workspace_bytes = bytes;
  EXPECT_OK(moesaic_route(&route));
  EXPECT(memcmp(ids, own_ids, sizeof ids) == 0);

  sorted.slots = &slots_view;
  sorted.block_experts = &blocks_view;
  sorted.num_padded = &num_padded_view;
  sorted.block_rows = BLOCK;
  align.topk_ids = &own_ids_view;
  align.experts = E;
  align.rows = &sorted;
  align.workspace = route.workspace;
  align.workspace_bytes = bytes;
  EXPECT_OK(moesaic_align(&align));
  EXPECT(num_padded % BLOCK == 0 && num_padded >= T * K);

  product.quant = &f32_spec;
  product.a = &x_view;
  product.b = &gemm1;
  product.sorted = &sorted;
  product.top_k = K;
  product.c = &inner_view;
  product.workspace = route.workspace;
  product.workspace_bytes = bytes;
  EXPECT_OK(moesaic_grouped_gemm_workspace_bytes(&product, &more));
  EXPECT(more <= bytes);
  EXPECT_OK(moesaic_grouped_gemm(&product));
  activate.input = &inner_view;
  activate.output = &act_view;
  EXPECT_OK(moesaic_activate(&activate));
  product.a = &act_view;
  product.b = &gemm2;
  product.top_k = 1;
  product.row_weights = &flat_weights_view;
  product.c = &slots_out_view;
  EXPECT_OK(moesaic_grouped_gemm(&product));
  sum.input = &slots_out_view;
  sum.output = &y_view;
  EXPECT_OK(moesaic_sum(&sum));
  EXPECT(is_expected(y));
  free(slots);
  free(blocks);
  moesaic_workspace_destroy(workspace);
}

static void test_quantize(void) {
  signed char q[T][H];
  float scale[T];
  const moesaic_tensor q_view = view(q, MOESAIC_I8, 2, T, H, 0);
  const moesaic_tensor scale_view = view(scale, MOESAIC_F32, 2, T, 1, 0);
  moesaic_quantize_args args = MOESAIC_QUANTIZE_ARGS;
  args.input = &x_view;
  args.to = MOESAIC_I8;
  args.output = &q_view;
  args.scale = &scale_view;
  EXPECT_OK(moesaic_quantize(&args));
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h)
      EXPECT(fabsf(x[t][h] - scale[t] * (float)q[t][h]) <= 0.5001f * scale[t]);
}

/* Two experts of three rows, of which two and one are live: the others stay as they are. */
static void test_quantize_batched(void) {
  signed char q[2][3][H], own[2][3][H];
  float scale[2][3], own_scale[2][3];
  int32_t live[2] = {2, 1};
  size_t bytes = 0;
  moesaic_workspace* workspace = NULL;
  const moesaic_tensor x3 = view(x, MOESAIC_F32, 3, 2, 3, H);
  const moesaic_tensor q_view = view(q, MOESAIC_I8, 3, 2, 3, H);
  const moesaic_tensor scale_view = view(scale, MOESAIC_F32, 3, 2, 3, 1);
  const moesaic_tensor own_view = view(own, MOESAIC_I8, 2, T, H, 0);
  const moesaic_tensor own_scale_view = view(own_scale, MOESAIC_F32, 2, T, 1, 0);
  const moesaic_tensor live_view = view(live, MOESAIC_I32, 1, 2, 0, 0);
  moesaic_quantize_args args = MOESAIC_QUANTIZE_ARGS;
  args.to = MOESAIC_I8;
  args.input = &x_view;
  args.output = &own_view;
  args.scale = &own_scale_view;
  EXPECT_OK(moesaic_quantize(&args));
  memset(q, 77, sizeof q);
  args.input = &x3;
  args.output = &q_view;
  args.scale = &scale_view;
  args.num_tokens = &live_view;
  EXPECT(moesaic_quantize(&args) == MOESAIC_INVALID_ARGUMENT); /* no workspace */
  EXPECT_OK(moesaic_quantize_call_workspace_bytes(&args, &bytes));
  EXPECT_OK(moesaic_workspace_create(kCpu, bytes, &workspace));
  args.workspace = moesaic_workspace_data(workspace);
  args.workspace_bytes = bytes;
  EXPECT_OK(moesaic_quantize(&args));
  for (int e = 0; e < 2; ++e)
    for (int r = 0; r < 3; ++r)
      for (int h = 0; h < H; ++h) EXPECT(q[e][r][h] == (r < live[e] ? own[e][r][h] : 77));
  moesaic_workspace_destroy(workspace);
}

/* --- what the header promises ----------------------------------------------------------------- */

static void test_struct_sizes(void) {
  moesaic_layer* layer = NULL;
  moesaic_layer_config old_config = config;
  struct {
    moesaic_layer_config config;
    int64_t from_the_future;
  } newer;
  memset(&newer, 0, sizeof newer);

  /* An older caller's struct ends earlier; what lies behind is not read. */
  old_config.struct_size = offsetof(moesaic_layer_config, shared_experts);
  old_config.shared_experts = -12345;
  old_config.workspace_cap = 1;
  EXPECT_OK(moesaic_layer_create(&old_config, kCpu, &layer));
  moesaic_layer_destroy(layer);

  newer.config = config;
  newer.config.struct_size = sizeof newer;
  layer = NULL;
  EXPECT_OK(moesaic_layer_create(&newer.config, kCpu, &layer));
  moesaic_layer_destroy(layer);
  newer.from_the_future = 1;
  EXPECT(moesaic_layer_create(&newer.config, kCpu, &layer) == MOESAIC_UNSUPPORTED);
  EXPECT(layer == NULL);
  EXPECT(strstr(moesaic_last_error(), "newer header") != NULL);

  newer.config.struct_size = 0; /* nobody initialized it */
  EXPECT(moesaic_layer_create(&newer.config, kCpu, &layer) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "struct_size") != NULL);
}

static void test_errors(void) {
  moesaic_layer* layer = NULL;
  moesaic_layer_config wrong = config;
  moesaic_quant_spec no_scheme = MOESAIC_QUANT_SPEC;
  moesaic_sum_args sum = MOESAIC_SUM_ARGS;
  moesaic_scheme scheme = MOESAIC_SCHEME_F32;
  moesaic_format format = MOESAIC_STANDARD;
  int32_t supported = -1;
  moesaic_tensor bad = x_view;

  EXPECT(moesaic_layer_create(NULL, kCpu, &layer) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(moesaic_layer_create(&config, kCpu, NULL) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(moesaic_layer_load(NULL, &layer_weights) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(moesaic_layer_forward(NULL, NULL) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(moesaic_sum(&sum) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strlen(moesaic_last_error()) > 0);
  wrong.top_k = E + 1;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "top_k") != NULL);
  wrong = config;
  no_scheme.scheme = 99;
  wrong.quant = &no_scheme;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "scheme") != NULL);
  wrong = config;
  wrong.input_dtype = MOESAIC_I64;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_UNSUPPORTED);
  EXPECT_OK(moesaic_supports(&wrong, MOESAIC_STANDARD, kCpu, &supported));
  EXPECT(supported == 0 && strstr(moesaic_last_error(), "input_dtype") != NULL);
  EXPECT_OK(moesaic_supports(&config, MOESAIC_BATCHED, kCpu, &supported));
  EXPECT(supported == 1);
  bad.rank = 7;
  sum.input = &bad;
  EXPECT(moesaic_sum(&sum) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "input.rank") != NULL);
  bad = x_view;
  bad.data = NULL;
  EXPECT(moesaic_sum(&sum) == MOESAIC_INVALID_ARGUMENT);

  EXPECT_OK(moesaic_parse_scheme("int4_w4a16", &scheme));
  EXPECT(scheme == MOESAIC_SCHEME_INT4_W4A16);
  EXPECT(strcmp(moesaic_scheme_name(MOESAIC_SCHEME_MXFP4_W4A16), "mxfp4_w4a16") == 0);
  EXPECT(strcmp(moesaic_routing_name(MOESAIC_ROUTING_SOFTMAX_BIAS), "softmax_bias") == 0);
  EXPECT(strcmp(moesaic_activation_name(MOESAIC_SWIGLU_STEP), "swiglu_step") == 0);
  EXPECT(strcmp(moesaic_dtype_name(MOESAIC_I64), "i64") == 0);
  EXPECT(strcmp(moesaic_format_name(MOESAIC_BATCHED), "batched") == 0);
  EXPECT(strcmp(moesaic_status_name(MOESAIC_INTERNAL), "internal") == 0);
  EXPECT_OK(moesaic_parse_format("sorted", &format));
  EXPECT(format == MOESAIC_SORTED);
  EXPECT(strcmp(moesaic_scheme_name((moesaic_scheme)99), "?") == 0);
  EXPECT(strcmp(moesaic_dtype_name((moesaic_dtype)256), "?") == 0); /* not 256 modulo a byte */
  EXPECT(strcmp(moesaic_activation_name((moesaic_activation)-1), "?") == 0);
  EXPECT(strcmp(moesaic_routing_name((moesaic_routing)12), "?") == 0);
  EXPECT(strcmp(moesaic_format_name((moesaic_format)3), "?") == 0);
  EXPECT(strcmp(moesaic_status_name((moesaic_status)77), "?") == 0);
  EXPECT(moesaic_parse_scheme("fp3", &scheme) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "int4_w4a16") != NULL); /* lists what there is */
  EXPECT(moesaic_parse_scheme(NULL, &scheme) == MOESAIC_INVALID_ARGUMENT);
}

static int hook_calls = 0;
static void serial_hook(void* user, int32_t n, moesaic_parallel_body body, void* body_context) {
  ++*(int*)user;
  for (int32_t i = n - 1; i >= 0; --i) body(body_context, i);
}

static void test_process(void) {
  moesaic_device_info info = MOESAIC_DEVICE_INFO;
  int32_t count = 0;
  char levels[256];
  EXPECT(strcmp(moesaic_version(), MOESAIC_VERSION_STRING) == 0);
  EXPECT_OK(moesaic_device_count(&count));
  EXPECT(count >= 1);
  EXPECT_OK(moesaic_get_device_info(0, &info));
  EXPECT(info.device.type == MOESAIC_CPU && strlen(info.kernels) > 0);
  EXPECT(moesaic_get_device_info(count, &info) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(moesaic_set_num_threads(0) == MOESAIC_INVALID_ARGUMENT);
  EXPECT_OK(moesaic_set_num_threads(3));
  EXPECT(moesaic_num_threads() == 3);
  EXPECT_OK(moesaic_set_parallel_hook(serial_hook, &hook_calls));
  test_layer();
  EXPECT_OK(moesaic_set_parallel_hook(NULL, NULL));
  EXPECT_OK(moesaic_available_kernels(MOESAIC_CPU, levels, sizeof levels));
  EXPECT(strncmp(levels, "scalar", 6) == 0);
  EXPECT(moesaic_available_kernels(MOESAIC_CPU, levels, 3) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(moesaic_set_kernels(MOESAIC_CPU, "abacus") != MOESAIC_OK);
  EXPECT_OK(moesaic_set_kernels(MOESAIC_CPU, "scalar"));
  test_layer();
  EXPECT_OK(moesaic_set_kernels(MOESAIC_CPU, ""));
  EXPECT_OK(moesaic_set_log_sink(NULL, NULL));
}

int main(void) {
  EXPECT(strcmp(moesaic_last_error(), "") == 0);
  fill(&x[0][0], sizeof x / sizeof(float));
  fill(&router[0][0], sizeof router / sizeof(float));
  fill(&fc1[0][0][0], sizeof fc1 / sizeof(float));
  fill(&fc2[0][0][0], sizeof fc2 / sizeof(float));
  fill(&bias1[0][0], sizeof bias1 / sizeof(float));
  fill(&bias2[0][0], sizeof bias2 / sizeof(float));
  run_naively();
  describe();
  test_layer();
  test_stages();
  test_grouped_gemm();
  test_quantize();
  test_quantize_batched();
  test_struct_sizes();
  test_errors();
  test_process();
  if (failures == 0) printf("c_api_test: passed\n");
  return failures == 0 ? 0 : 1;
}
