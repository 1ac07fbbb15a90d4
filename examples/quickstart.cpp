// SPDX-License-Identifier: Apache-2.0
// The example of README.md, word for word (a test compares them).
#include <moesaic/moesaic.h>

#include <cstdio>
#include <vector>
using namespace moesaic;

int main() {  // 8 experts, 4 tokens, each goes to the 2 experts with the largest logits
  Layer layer({.experts = 8, .hidden = 64, .intermediate = 32, .top_k = 2, .max_tokens = 4,
               .quant = {.scheme = Scheme::kF32}, .input_dtype = DType::kF32, .output_dtype = DType::kF32});
  std::vector<float> fc1(8 * 64 * 64, 0.02f), fc2(8 * 64 * 32, 0.03f);  // gate and up; down
  std::vector<float> x(4 * 64, 1.0f), logits(4 * 8, 0.0f), y(4 * 64);
  layer.load({.fc1 = {.weight = Tensor::contiguous(fc1.data(), DType::kF32, {8, 64, 64})},
              .fc2 = {.weight = Tensor::contiguous(fc2.data(), DType::kF32, {8, 64, 32})}});
  WorkspaceBuffer workspace({}, layer.workspace_bytes(4));
  layer.forward({.hidden_states = Tensor::contiguous(x.data(), DType::kF32, {4, 64}),
                 .router_logits = Tensor::contiguous(logits.data(), DType::kF32, {4, 8}),
                 .output = Tensor::contiguous(y.data(), DType::kF32, {4, 64}),
                 .workspace = workspace.view()});
  std::printf("y[0][0] = %.4f\n", y[0]);  // 0.96 * silu(1.28) * 1.28
}
