// SPDX-License-Identifier: Apache-2.0
// Which slot goes to which expert, and the padded lists made of it: the naive model of `align`.
#pragma once

#include <cstdint>
#include <vector>

#include "moesaic/gemm.h"

namespace moesaic::reference {

// Local expert of a global id: by map when given, else by range (count 0: all of `experts`). -1:
// none.
std::int64_t local_expert(std::int64_t id, std::int64_t experts, const ExpertRange& local,
                          const Tensor& expert_map);
// Id of every slot, from [T, k] i32 or i64 in any strides.
std::vector<std::int64_t> slot_ids(const Tensor& topk_ids);

struct Aligned {
  std::vector<std::int32_t> slots;          // padded; its length is num_padded
  std::vector<std::int32_t> block_experts;  // local ids, -1: not here
  std::vector<std::int32_t> slot_row;       // position of each slot, -1: in no list
  std::vector<std::int32_t> tokens_per_expert;
};
// Valid ids in ascending global order, slots of one expert in ascending order, runs padded to
// block_rows with the slot count.
Aligned align(const Tensor& topk_ids, std::int64_t experts, const ExpertRange& local,
              const Tensor& expert_map, std::int64_t block_rows);

}  // namespace moesaic::reference
