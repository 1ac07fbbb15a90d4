// SPDX-License-Identifier: Apache-2.0
#include "reference/align.h"

namespace moesaic::reference {

std::int64_t local_expert(std::int64_t id, std::int64_t experts, const ExpertRange& local,
                          const Tensor& expert_map) {
  if (id < 0 || id >= experts) return -1;
  const std::int64_t count = local.count > 0 ? local.count : experts;
  std::int64_t at = id - local.first;
  if (expert_map.defined()) at = expert_map.as<std::int32_t>()[id * expert_map.strides[0]];
  return at >= 0 && at < count ? at : -1;
}

std::vector<std::int64_t> slot_ids(const Tensor& topk_ids) {
  std::vector<std::int64_t> ids;
  for (std::int64_t t = 0; t < topk_ids.shape[0]; ++t) {
    for (std::int64_t j = 0; j < topk_ids.shape[1]; ++j) {
      const std::int64_t at = t * topk_ids.strides[0] + j * topk_ids.strides[1];
      ids.push_back(topk_ids.dtype == DType::kI64 ? topk_ids.as<std::int64_t>()[at]
                                                  : topk_ids.as<std::int32_t>()[at]);
    }
  }
  return ids;
}

Aligned align(const Tensor& topk_ids, std::int64_t experts, const ExpertRange& local,
              const Tensor& expert_map, std::int64_t block_rows) {
  const std::vector<std::int64_t> ids = slot_ids(topk_ids);
  Aligned out;
  out.slot_row.assign(ids.size(), -1);
  out.tokens_per_expert.assign(static_cast<std::size_t>(local.count > 0 ? local.count : experts),
                               0);
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t here = local_expert(e, experts, local, expert_map);
    for (std::size_t s = 0; s < ids.size(); ++s) {
      if (ids[s] != e) continue;
      out.slot_row[s] = static_cast<std::int32_t>(out.slots.size());
      out.slots.push_back(static_cast<std::int32_t>(s));
      if (here >= 0) ++out.tokens_per_expert[static_cast<std::size_t>(here)];
    }
    while (static_cast<std::int64_t>(out.slots.size()) % block_rows != 0)
      out.slots.push_back(static_cast<std::int32_t>(ids.size()));
    while (static_cast<std::int64_t>(out.block_experts.size()) * block_rows <
           static_cast<std::int64_t>(out.slots.size()))
      out.block_experts.push_back(static_cast<std::int32_t>(here));
  }
  return out;
}

}  // namespace moesaic::reference
