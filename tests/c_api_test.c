// SPDX-License-Identifier: Apache-2.0
/* The C interface from C: one small layer at all three levels against a loop that says what a layer
 * is. What the header promises about sizes, statuses and messages: c_api_errors_test.c. */
#include "c_fixture.h"

static int is_expected(float y[T][H]) {
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h)
      if (!(fabs(y[t][h] - expected[t][h]) <= 1e-5)) return 0;
  return 1;
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

/* Expert by expert and back again, and an expert that every token visits. */
static void test_loading(void) {
  moesaic_layer* layer = NULL;
  moesaic_layer_config with_shared = config;
  moesaic_gemm_weights one1 = MOESAIC_GEMM_WEIGHTS, one2 = MOESAIC_GEMM_WEIGHTS;
  moesaic_layer_weights one = MOESAIC_LAYER_WEIGHTS;
  moesaic_tensor w1, w2, b1, b2;
  float back1[2 * I][H], back2[H][I];
  const moesaic_tensor to1 = view(back1, MOESAIC_F32, 3, 1, 2 * I, H);
  const moesaic_tensor to2 = view(back2, MOESAIC_F32, 3, 1, H, I);
  int32_t ready = -1;
  with_shared.shared_experts = 1;
  EXPECT_OK(moesaic_layer_create(&with_shared, kCpu, &layer));
  if (layer == NULL) return;
  one.fc1 = &one1;
  one.fc2 = &one2;
  one1.weight = &w1;
  one1.bias = &b1;
  one2.weight = &w2;
  one2.bias = &b2;
  for (int e = E - 1; e >= 0; --e) {
    w1 = view(fc1[e], MOESAIC_F32, 3, 1, 2 * I, H);
    w2 = view(fc2[e], MOESAIC_F32, 3, 1, H, I);
    b1 = view(bias1[e], MOESAIC_F32, 2, 1, 2 * I, 0);
    b2 = view(bias2[e], MOESAIC_F32, 2, 1, H, 0);
    EXPECT(moesaic_layer_unpack_expert(layer, e, &to1, &to2) == MOESAIC_NOT_READY);
    EXPECT_OK(moesaic_layer_load_expert(layer, e, &one));
  }
  EXPECT(moesaic_layer_load_expert(layer, E, &one) == MOESAIC_INVALID_ARGUMENT);
  EXPECT_OK(moesaic_layer_ready(layer, &ready));
  EXPECT(ready == 0); /* the shared expert is missing */
  EXPECT_OK(moesaic_layer_load_shared(layer, &one, NULL));
  EXPECT_OK(moesaic_layer_ready(layer, &ready));
  EXPECT(ready == 1);
  EXPECT_OK(moesaic_layer_unpack_expert(layer, 2, &to1, &to2));
  EXPECT(memcmp(back1, fc1[2], sizeof back1) == 0);
  EXPECT(memcmp(back2, fc2[2], sizeof back2) == 0);
  EXPECT(moesaic_layer_unpack_expert(layer, 2, &to1, NULL) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "fc2") != NULL);
  moesaic_layer_destroy(layer);
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
  moesaic_stage_shape shape = MOESAIC_STAGE_SHAPE;

  shape.tokens = T;
  shape.capacity = CAPACITY;
  EXPECT_OK(moesaic_stage_workspace_bytes(&config, &shape, &bytes));
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

/* --- the process ------------------------------------------------------------------------------ */

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
  start();
  test_layer();
  test_loading();
  test_stages();
  test_grouped_gemm();
  test_quantize();
  test_quantize_batched();
  test_process();
  return finish("c_api_test");
}
