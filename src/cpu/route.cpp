// SPDX-License-Identifier: Apache-2.0
// Hidden states to logits to experts: the router's product, then one token after the other through
// select.h. A token's ids and weights do not depend on the others, nor on the threads.
#include "cpu/route.h"

#include <algorithm>

#include "cpu/ranges.h"
#include "cpu/select.h"

namespace moesaic {
namespace {

constexpr std::int64_t kTokenBlock = 16, kExpertBlock = 16;

// z = x W^T, fp32 accumulation in one fixed order of the width (see StageKernels::dots).
class RouterProduct {
 public:
  RouterProduct(const RouteStage& stage, const StageKernels& kernels)
      : kernels_(kernels),
        x_(stage.hidden_states),
        w_(stage.router.weight),
        z_(stage.logits_scratch),
        x_stride_(stage.hidden_states.strides[0]),
        w_stride_(stage.router.weight.strides[0]),
        z_stride_(stage.logits_scratch.strides[0]) {}

  void run() const {
    const std::int64_t token_blocks = (x_.rows() + kTokenBlock - 1) / kTokenBlock;
    const std::int64_t expert_blocks = (w_.rows() + kExpertBlock - 1) / kExpertBlock;
    // Experts inside: consecutive blocks of one part share their tokens.
    parallel_ranges(token_blocks * expert_blocks,
                    std::min(kTokenBlock, x_.rows()) * kExpertBlock * x_.width() / 4,
                    [&](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t i = begin; i < end; ++i)
                        block(i / expert_blocks * kTokenBlock, i % expert_blocks * kExpertBlock);
                    });
  }

 private:
  void block(std::int64_t token, std::int64_t expert) const {
    kernels_.dots({.x = x_.row(token),
                   .x_dtype = x_.dtype(),
                   .tokens = std::min(kTokenBlock, x_.rows() - token),
                   .x_stride = x_stride_,
                   .w = w_.row(expert),
                   .w_dtype = w_.dtype(),
                   .experts = std::min(kExpertBlock, w_.rows() - expert),
                   .w_stride = w_stride_,
                   .width = x_.width(),
                   .z = reinterpret_cast<float*>(z_.at(token, expert)),
                   .z_stride = z_stride_});
  }

  const StageKernels& kernels_;
  RowView x_, w_, z_;
  std::int64_t x_stride_, w_stride_, z_stride_;
};

}  // namespace

void route_cpu(const RouteStage& stage) {
  const StageKernels& kernels = stage_kernels();
  const bool computes = !stage.logits.defined();
  if (computes) RouterProduct(stage, kernels).run();
  const RowView logits(computes ? stage.logits_scratch : stage.logits);
  const RowView bias(stage.router.bias), selection_bias(stage.router.selection_bias);
  const std::int64_t experts = logits.width(), top_k = stage.topk_ids.shape[1];
  const RowView ids(stage.topk_ids), weights(stage.topk_weights);
  parallel_ranges(ids.rows(), experts * 4, [&](std::int64_t begin, std::int64_t end) {
    Selector selector(kernels, stage.spec, experts, top_k, selection_bias);
    for (std::int64_t t = begin; t < end; ++t) {
      logits.read(kernels, t, 0, experts, selector.logits());
      if (bias.rows() > 0) selector.add_router_bias(bias);
      const Selection chosen = selector.select();
      for (std::int64_t j = 0; j < top_k; ++j) {
        *reinterpret_cast<std::int32_t*>(ids.at(t, j)) = chosen.ids[static_cast<std::size_t>(j)];
        *reinterpret_cast<float*>(weights.at(t, j)) = chosen.weights[static_cast<std::size_t>(j)];
      }
    }
  });
}

}  // namespace moesaic
