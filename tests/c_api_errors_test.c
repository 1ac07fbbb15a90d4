// SPDX-License-Identifier: Apache-2.0
/* What the C interface promises beside its numbers: structs of other sizes, statuses, messages,
 * names. */
#include "c_fixture.h"

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
  no_scheme.reserved = 1; /* may mean something one day */
  wrong.quant = &no_scheme;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_UNSUPPORTED);
  EXPECT(strstr(moesaic_last_error(), "reserved") != NULL);
  no_scheme.reserved = 0;
  no_scheme.scheme = 99;
  wrong.quant = &no_scheme;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "scheme") != NULL);
  wrong = config;
  wrong.input_dtype = MOESAIC_I64;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_UNSUPPORTED);
  EXPECT_OK(moesaic_supports(&wrong, MOESAIC_STANDARD, kCpu, &supported));
  EXPECT(supported == 0 && strstr(moesaic_last_error(), "input_dtype") != NULL);
  wrong = config;
  wrong.weight_storage = MOESAIC_WEIGHTS_IN_PLACE;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_UNSUPPORTED);
  EXPECT(strstr(moesaic_last_error(), "weight_storage") != NULL);
  wrong.weight_storage = 2;
  EXPECT(moesaic_layer_create(&wrong, kCpu, &layer) == MOESAIC_INVALID_ARGUMENT);
  EXPECT_OK(moesaic_supports(&config, MOESAIC_BATCHED, kCpu, &supported));
  EXPECT(supported == 1);
  bad.rank = 7;
  sum.input = &bad;
  EXPECT(moesaic_sum(&sum) == MOESAIC_INVALID_ARGUMENT);
  EXPECT(strstr(moesaic_last_error(), "input.rank") != NULL);
  bad = moesaic_tensor_dense(x_view.data, MOESAIC_F32, NULL, 2, kCpu);
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

int main(void) {
  EXPECT(strcmp(moesaic_last_error(), "") == 0);
  start();
  test_struct_sizes();
  test_errors();
  return finish("c_api_errors_test");
}
