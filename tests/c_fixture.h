// SPDX-License-Identifier: Apache-2.0
/* One small layer for the tests in C: its data, its views, and the answer of a loop that says what
 * a layer is. */
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moesaic/c_api.h"

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

static void start(void) {
  fill(&x[0][0], sizeof x / sizeof(float));
  fill(&router[0][0], sizeof router / sizeof(float));
  fill(&fc1[0][0][0], sizeof fc1 / sizeof(float));
  fill(&fc2[0][0][0], sizeof fc2 / sizeof(float));
  fill(&bias1[0][0], sizeof bias1 / sizeof(float));
  fill(&bias2[0][0], sizeof bias2 / sizeof(float));
  run_naively();
  describe();
}

static int finish(const char* name) {
  if (failures == 0) printf("%s: passed\n", name);
  return failures == 0 ? 0 : 1;
}
