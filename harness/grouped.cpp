// SPDX-License-Identifier: Apache-2.0
#include "harness/grouped.h"

#include <cmath>
#include <cstring>

#include "reference/align.h"
#include "reference/grouped_gemm.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

// The same call twice, on the device and for the oracle: tensors are made on the host and copied.
class GroupedRun {
 public:
  GroupedRun(const GroupedCase& c, Device device) : c_(c), device_(device) {}

  std::string check() {
    make_weights();
    if (c_.format == Format::kBatched)
      make_batched();
    else
      make_sorted();
    const WorkspaceBuffer workspace(
        device_, std::max<std::size_t>(1, grouped_gemm_workspace_bytes(on_device_)));
    on_device_.workspace = workspace.view();
    grouped_gemm(on_device_);
    return compare_rows();
  }

 private:
  Tensor give(Tensor GroupedGemmArgs::*member, HostTensor host,
              Placement placement = Placement::kDense) {
    hosts_.push_back(std::move(host));
    on_host_.*member = hosts_.back().view();
    devices_.push_back(DeviceTensor::from(hosts_.back(), device_, placement));
    return on_device_.*member = devices_.back().view();
  }
  Tensor copy(const Tensor& host, Placement placement = Placement::kDense) {
    if (!host.defined()) return {};
    devices_.push_back(DeviceTensor::from(host, device_, placement));
    return devices_.back().view();
  }

  LayerConfig config() const {
    LayerConfig config;  // fc1 of an ungated layer is one bare product
    config.experts = c_.experts;
    config.hidden = c_.k;
    config.intermediate = c_.n;
    config.top_k = std::min(c_.top_k, c_.experts);
    config.local = c_.local;
    config.quant = c_.variant.quant;
    config.activation.kind = Activation::kIdentity;
    config.input_dtype = c_.a;
    config.output_dtype = is_16bit(c_.c) ? c_.c : DType::kBF16;
    return config;
  }

  void make_weights() {
    weights_ = harness::make_weights(
        config(),
        {.seed = mix(c_.seed, 1), .bias = c_.bias, .static_scales = c_.variant.static_scales});
    GemmWeights& host = on_host_.b;
    host = weights_.weights.fc1;
    on_host_.quant = on_device_.quant = c_.variant.quant;
    GemmWeights& b = on_device_.b;
    b = {};
    for (const auto member : {&GemmWeights::scale, &GemmWeights::zero_point, &GemmWeights::bias,
                              &GemmWeights::input_scale})
      b.*member = copy(host.*member);
    // Padding behind K belongs to the caller: a larger row stride, filled with poison.
    if (c_.k_padding == 0) {
      b.weight = copy(host.weight);
      return;
    }
    std::vector<std::int64_t> shape(host.weight.shape.begin(), host.weight.shape.begin() + 3);
    const std::int64_t row = shape[2];
    shape[2] += c_.k_padding;
    HostTensor padded(host.weight.dtype, shape);
    std::memset(padded.bytes().data(), 0xff, padded.bytes().size());
    const std::size_t size = size_of(padded.dtype());
    for (std::int64_t i = 0; i < shape[0] * shape[1]; ++i)
      std::memcpy(padded.bytes().data() + static_cast<std::size_t>(i * shape[2]) * size,
                  static_cast<const std::byte*>(host.weight.data) +
                      static_cast<std::size_t>(i * row) * size,
                  static_cast<std::size_t>(row) * size);
    b.weight = copy(padded.view());
    b.weight.shape[2] = row;
  }

  // Rows of A with their scales; `rows` of them in all.
  void make_a(const std::vector<std::int64_t>& shape, std::int64_t rows) {
    LayerConfig one = config();
    Batch batch = make_batch(one, {.tokens = rows, .seed = mix(c_.seed, 2)});
    HostTensor a(c_.a, shape);
    a.bytes() = batch.hidden_states.bytes();
    give(&GroupedGemmArgs::a, std::move(a), c_.placement);
    if (!batch.hidden_scale.defined()) return;
    HostTensor scale = batch.hidden_scale;
    if (c_.format == Format::kBatched && scale.shape().size() == 2) {  // [E, capacity, groups]
      HostTensor deep(DType::kF32, {shape[0], shape[1], scale.shape()[1]});
      deep.bytes() = scale.bytes();
      scale = std::move(deep);
    }
    give(&GroupedGemmArgs::a_scale, std::move(scale));
  }

  void make_batched() {
    const std::int64_t capacity = c_.tokens, experts = on_host_.b.weight.shape[0];
    make_a({experts, capacity, c_.k}, experts * capacity);
    HostTensor live(DType::kI32, {experts});
    Rng rng(mix(c_.seed, 3));
    for (std::int64_t e = 0; e < experts; ++e)  // 0, all, more than fit, or some
      live.as<std::int32_t>()[e] = static_cast<std::int32_t>(e == 0   ? 0
                                                             : e == 1 ? capacity
                                                             : e == 2 ? capacity + 5
                                                                      : rng.below(capacity));
    hosts_.push_back(std::move(live));
    on_host_.batched.num_tokens = hosts_.back().view();
    on_device_.batched.num_tokens = copy(on_host_.batched.num_tokens);
    make_c({experts, capacity, c_.n});
  }

  void make_sorted() {
    const LayerConfig one = config();
    const Batch batch =
        make_batch(one, {.tokens = c_.tokens, .load = c_.load, .seed = mix(c_.seed, 4)});
    const std::int64_t slots = c_.tokens * one.top_k;
    const reference::Aligned lists =
        reference::align(batch.topk_ids.view(), c_.experts, c_.local, {}, c_.block_rows);
    const std::int64_t capacity = align_capacity(slots, c_.experts, c_.block_rows);
    const std::int64_t blocks = (capacity + c_.block_rows - 1) / c_.block_rows;
    HostTensor list(DType::kI32, {capacity}), experts(DType::kI32, {blocks}),
        used(DType::kI32, {1});
    std::memset(list.bytes().data(), 0x7f, list.bytes().size());  // behind num_padded: nonsense
    std::memset(experts.bytes().data(), 0x7f, experts.bytes().size());
    std::copy(lists.slots.begin(), lists.slots.end(), list.as<std::int32_t>());
    std::copy(lists.block_experts.begin(), lists.block_experts.end(), experts.as<std::int32_t>());
    used.as<std::int32_t>()[0] = static_cast<std::int32_t>(lists.slots.size());
    const auto both = [&](Tensor SortedRows::*member, HostTensor host) {
      hosts_.push_back(std::move(host));
      on_host_.sorted.*member = hosts_.back().view();
      on_device_.sorted.*member = copy(on_host_.sorted.*member);
    };
    both(&SortedRows::slots, std::move(list));
    both(&SortedRows::block_experts, std::move(experts));
    both(&SortedRows::num_padded, std::move(used));
    on_host_.sorted.block_rows = on_device_.sorted.block_rows = c_.block_rows;
    on_host_.top_k = on_device_.top_k = one.top_k;
    on_host_.a_order = on_device_.a_order = c_.a_order;
    on_host_.c_order = on_device_.c_order = c_.c_order;
    const std::int64_t a_rows = c_.a_order == RowOrder::kSorted ? capacity : c_.tokens;
    make_a({a_rows, c_.k}, a_rows);
    if (c_.row_weights == GroupedCase::RowWeights::kGiven) {
      HostTensor w(DType::kF32, {slots});
      w.bytes() = batch.topk_weights.bytes();
      give(&GroupedGemmArgs::row_weights, std::move(w));
    }
    if (c_.c_order == RowOrder::kSorted)
      make_c({capacity, c_.n});
    else
      make_c({c_.tokens, one.top_k, c_.n});
  }

  void make_c(std::vector<std::int64_t> shape) {
    c_tensor_ = DeviceTensor(device_, c_.c, shape, c_.placement);
    on_device_.c = c_tensor_.view();
    on_host_.c = Tensor::contiguous(nullptr, c_.c, shape);
  }

  std::string compare_rows() const {
    reference::Choices choices = device_choices(config(), device_);
    std::string complaint = compare_with(choices);
    if (!complaint.empty() && may_round_weights(config())) {
      choices.weights = reference::WeightRounding::k16Bit;
      if (compare_with(choices).empty()) return {};
    }
    return complaint;
  }

  std::string compare_with(const reference::Choices& choices) const {
    const reference::GroupedOutput want = reference::grouped_gemm(on_host_, choices);
    const HostTensor got = c_tensor_.to_host();
    if (!c_tensor_.guards_intact()) return "c: written outside";
    const std::size_t row_bytes = static_cast<std::size_t>(want.n) * size_of(got.dtype());
    for (std::size_t r = 0; r < want.rows.size(); ++r) {
      const std::byte* row = got.bytes().data() + r * row_bytes;
      const std::string where = "row " + std::to_string(r) + ": ";
      if (want.rows[r] == reference::RowState::kUntouched) {
        for (std::size_t i = 0; i < row_bytes; ++i)
          if (row[i] != DeviceTensor::kPoison) return where + "was written, and belongs to no slot";
        continue;
      }
      for (std::int64_t n = 0; n < want.n; ++n) {
        const double v = load_element(row, got.dtype(), n);
        if (want.rows[r] == reference::RowState::kZero) {
          if (v != 0) return where + "of a filtered block, must be zero, is " + std::to_string(v);
          continue;
        }
        const reference::Bounded& b =
            want.values[r * static_cast<std::size_t>(want.n) + static_cast<std::size_t>(n)];
        if (!(std::abs(v - b.value) <= reference::stored_error(b, got.dtype())))
          return where + "column " + std::to_string(n) + ": got " + std::to_string(v) +
                 ", expected " + std::to_string(b.value) + " within " +
                 std::to_string(reference::stored_error(b, got.dtype()));
      }
    }
    return {};
  }

  const GroupedCase& c_;
  Device device_;
  WeightData weights_;
  GroupedGemmArgs on_host_, on_device_;
  std::deque<HostTensor> hosts_;
  std::deque<DeviceTensor> devices_;
  DeviceTensor c_tensor_;
};

}  // namespace

std::string check_grouped(const GroupedCase& c, Device device) {
  return GroupedRun(c, device).check();
}

}  // namespace moesaic::harness
