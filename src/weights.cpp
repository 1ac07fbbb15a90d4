// SPDX-License-Identifier: Apache-2.0
#include "weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "divide.h"
#include "numeric.h"

namespace moesaic {
namespace {

bool has_shape(const Tensor& t, std::initializer_list<std::int64_t> shape) {
  return t.rank == static_cast<int>(shape.size()) &&
         std::equal(shape.begin(), shape.end(), t.shape.begin());
}

// A view of `t` as [a, b, c] with the given strides.
Tensor view3(const Tensor& t, std::array<std::int64_t, 3> shape,
             std::array<std::int64_t, 3> strides) {
  Tensor v = t;
  v.rank = 3;
  for (int i = 0; i < 3; ++i) {
    v.shape[i] = shape[i];
    v.strides[i] = strides[i];
  }
  return v;
}

// Scales in any of the shapes WeightScale allows -> [E, grid_n, grid_k], stride 0 where broadcast.
Tensor normalize_scale(const WeightSpec& spec, std::int64_t e, const Tensor& t,
                       const std::string& argument) {
  const Check checked = check(argument, t);
  if (spec.e8m0_scales)
    checked.dtype({DType::kU8, DType::kE8M0});
  else
    checked.dtype({DType::kF32, DType::kF16, DType::kBF16});
  const std::int64_t gn = spec.scale.grid_n, gk = spec.scale.grid_k;
  if (has_shape(t, {e, gn, gk})) return t;
  if (gk == 1 && has_shape(t, {e, gn}))
    return view3(t, {e, gn, 1}, {t.strides[0], t.strides[1], 0});
  if (gk == 1 && gn <= 2 && (has_shape(t, {e}) || has_shape(t, {e, 1}) || has_shape(t, {e, 1, 1})))
    return view3(t, {e, gn, 1}, {t.strides[0], 0, 0});
  invalid(fmt::format("{}: expected shape [{}, {}, {}]{}, got {}; pass a view of that shape",
                      argument, e, gn, gk,
                      gk == 1 ? fmt::format(" or [{}, {}]", e, gn) : std::string(), to_string(t)));
}

// Zero points -> [E, N/2 or N, grid_k]; one per channel counts as one group.
Tensor normalize_zero(const WeightSpec& spec, std::int64_t e, const Tensor& t,
                      const std::string& argument) {
  check(argument, t).dtype({DType::kU8});
  const std::int64_t rows = spec.format == WeightFormat::kU4 ? spec.n / 2 : spec.n;
  if (has_shape(t, {e, rows, spec.scale.grid_k})) return t;
  if (has_shape(t, {e, rows}) || has_shape(t, {e, rows, 1}))
    return view3(t, {e, rows, spec.scale.grid_k}, {t.strides[0], t.strides[1], 0});
  invalid(
      fmt::format("{}: expected shape [{}, {}, {}] or [{}, {}], got {}; pass a view of that shape",
                  argument, e, rows, spec.scale.grid_k, e, rows, to_string(t)));
}

void check_float_if_given(const std::string& argument, const Tensor& t) {
  if (t.defined()) check(argument, t).dtype({DType::kF32, DType::kF16, DType::kBF16});
}

}  // namespace

GemmWeights normalize(const WeightSpec& spec, std::int64_t experts, const GemmWeights& given,
                      std::string_view argument) {
  const std::string arg(argument);
  const bool four_bit = is_four_bit(spec.format);
  const std::int64_t columns = four_bit ? spec.k / 2 : spec.k;
  GemmWeights w = given;
  const std::string weight_argument = arg + ".weight";  // a Check keeps a view of its name
  const Check weight = check(weight_argument, given.weight);
  weight.shape({experts, spec.n, columns}).dtype({weight_dtype(spec.format)});
  // 16-bit and f32 weights come in transposed, too (GPT-OSS, Llama-4); packed bytes do not.
  if (!is_float(given.weight.dtype)) weight.inner_contiguous();
  if (spec.scale.has_scale) {
    w.scale = normalize_scale(spec, experts, given.scale, arg + ".scale");
  } else if (given.scale.defined()) {
    invalid(fmt::format("{}.scale: scheme {} has no weight scales, got {}; leave it undefined", arg,
                        traits(spec.scheme).name, to_string(given.scale)));
  }
  if (spec.zero_points) {
    w.zero_point = normalize_zero(spec, experts, given.zero_point, arg + ".zero_point");
  } else if (given.zero_point.defined()) {
    invalid(
        fmt::format("{}.zero_point: quant.zero_points is false, got {}; set it, or leave the "
                    "tensor undefined",
                    arg, to_string(given.zero_point)));
  }
  if (given.bias.defined()) check(arg + ".bias", given.bias).shape({experts, spec.n});
  check_float_if_given(arg + ".bias", given.bias);
  if (given.prequant.defined()) {
    if (!may_have_prequant(spec.scheme))
      unsupported(
          fmt::format("{}.prequant: only int4_w4a8_fp8 and int4_w4a8_int8 take it, not {}; fold "
                      "the factors into the weights",
                      arg, traits(spec.scheme).name));
    Tensor& t = w.prequant;
    if (t.rank == 1) {  // [K]: shared by all experts
      check(arg + ".prequant", t).shape({spec.k});
    } else {
      check(arg + ".prequant", t).shape({experts, spec.k});
    }
    check(arg + ".prequant", t).inner_contiguous();
  }
  check_float_if_given(arg + ".prequant", given.prequant);
  if (given.input_scale.defined()) {
    const std::string scale_argument = arg + ".input_scale";
    const Check c = check(scale_argument, given.input_scale);
    c.dtype({DType::kF32}).rank(1);
    if (given.input_scale.shape[0] != 1) c.shape({experts});
  }
  if (spec.act_scale == ActScale::kTensorStatic && !given.input_scale.defined())
    invalid(fmt::format(
        "{}.input_scale: quant.act_scale is tensor_static, which needs it; pass f32 [1] "
        "or [{}], or use a dynamic act_scale",
        arg, experts));
  if (given.alpha.defined())
    check(arg + ".alpha", given.alpha).dtype({DType::kF32}).shape({experts});
  return w;
}

void check_within(Device device, const GemmWeights& given, const ActivationWeights& activation,
                  std::string_view argument) {
  const std::pair<std::string_view, const Tensor*> all[] = {
      {"weight", &given.weight},
      {"scale", &given.scale},
      {"zero_point", &given.zero_point},
      {"bias", &given.bias},
      {"input_scale", &given.input_scale},
      {"prequant", &given.prequant},
      {"alpha", &given.alpha},
      {"activation.alpha", &activation.alpha},
      {"activation.beta", &activation.beta},
      {"activation.limit", &activation.limit}};
  for (const auto& [member, tensor] : all)
    if (tensor->defined()) check(fmt::format("{}.{}", argument, member), *tensor).within(device);
}

void check_in_place(Device device, const GemmWeights& given, const ActivationWeights& activation,
                    std::string_view argument) {
  const auto there = [&](std::string_view member, const Tensor& t) {
    if (t.defined()) check(fmt::format("{}.{}", argument, member), t).on(device);
  };
  const auto dense = [&](std::string_view member, const Tensor& t) {
    if (t.defined()) check(fmt::format("{}.{}", argument, member), t).on(device).contiguous();
  };
  there("weight", given.weight);
  there("scale", given.scale);
  there("zero_point", given.zero_point);
  there("bias", given.bias);
  there("prequant", given.prequant);
  dense("input_scale", given.input_scale);
  dense("alpha", given.alpha);
  dense("activation.alpha", activation.alpha);
  dense("activation.beta", activation.beta);
  dense("activation.limit", activation.limit);
}

void check_keepable(Device device, const Tensor& weight, std::string_view argument) {
  check(argument, weight).on(device).contiguous();
  const auto beyond = reinterpret_cast<std::uintptr_t>(weight.data) % kInPlaceAlignment;
  if (beyond != 0)
    invalid(fmt::format(
        "{}: weight_storage is in_place, which needs data aligned to {} bytes, got {} bytes behind "
        "that; pass an aligned copy",
        argument, kInPlaceAlignment, beyond));
}

SideTensors side_views(const WeightSpec& spec, std::int64_t experts, const GemmWeights& w,
                       const ActivationWeights& activation, std::string_view argument) {
  SideTensors side{.bias = w.bias,
                   .input_scale = w.input_scale,
                   .prequant = w.prequant,
                   .alpha = w.alpha,
                   .activation = activation};
  if (spec.act_scale != ActScale::kTensorStatic) side.input_scale = {};
  const auto parameter = [&](std::string_view name, const Tensor& t) {
    if (t.defined())
      check(fmt::format("{}.{}", argument, name), t).dtype({DType::kF32}).shape({experts});
  };
  parameter("activation.alpha", activation.alpha);
  parameter("activation.beta", activation.beta);
  parameter("activation.limit", activation.limit);
  return side;
}

std::vector<float> to_host_f32(const Backend& backend, const Tensor& t) {
  // One contiguous span covers every element; copy that, then pick. Side tensors are small.
  const std::size_t element = size_of(t.dtype);
  std::int64_t low = 0, high = t.numel() > 0 ? 1 : 0;  // strides may be negative
  for (int i = 0; i < t.rank && high > 0; ++i)
    (t.strides[i] < 0 ? low : high) += (t.shape[i] - 1) * t.strides[i];
  std::vector<char> raw(static_cast<std::size_t>(high - low) * element);
  backend.copy(raw.data(), t.as<const char>() + low * static_cast<std::int64_t>(element),
               raw.size(), {});
  std::vector<float> out(static_cast<std::size_t>(t.numel()));
  std::array<std::int64_t, Tensor::kMaxRank> index{};
  for (float& value : out) {
    std::int64_t offset = -low;
    for (int i = 0; i < t.rank; ++i) offset += index[i] * t.strides[i];
    const char* at = raw.data() + static_cast<std::size_t>(offset) * element;
    std::uint16_t half = 0;
    if (t.dtype == DType::kF32) {
      std::memcpy(&value, at, 4);
    } else {
      std::memcpy(&half, at, 2);
      value = t.dtype == DType::kBF16 ? bf16_to_float(half) : f16_to_float(half);
    }
    for (int i = t.rank - 1; i >= 0 && ++index[i] == t.shape[i]; --i) index[i] = 0;
  }
  return out;
}

SideStore::~SideStore() {
  for (void* p : memory_) backend_->deallocate(p);
}

Tensor& SideStore::slot(const Entry& entry) {
  return entry.tensor ? tensors_.*entry.tensor : tensors_.activation.*entry.parameter;
}

void SideStore::load(std::int64_t expert, const SideTensors& one, std::string_view argument) {
  const std::lock_guard lock(mutex_);
  if (entries_.empty()) {
    entries_ = {{.name = "bias", .tensor = &SideTensors::bias, .width = spec_.n},
                {.name = "input_scale", .tensor = &SideTensors::input_scale},
                {.name = "prequant", .tensor = &SideTensors::prequant, .width = spec_.k},
                {.name = "alpha", .tensor = &SideTensors::alpha},
                {.name = "activation.alpha", .parameter = &ActivationWeights::alpha},
                {.name = "activation.beta", .parameter = &ActivationWeights::beta},
                {.name = "activation.limit", .parameter = &ActivationWeights::limit}};
  }
  for (Entry& entry : entries_) {
    const Tensor& given = entry.tensor ? one.*entry.tensor : one.activation.*entry.parameter;
    if (!given.defined()) {  // what replacing weights leave out is gone
      if (!entry.seen.empty()) entry.seen[static_cast<std::size_t>(expert)] = false;
      continue;
    }
    if (!entry.memory.defined()) {
      const std::size_t size =
          static_cast<std::size_t>(spec_.experts * entry.width) * sizeof(float);
      memory_.push_back(backend_->allocate(size));
      bytes_ += size;
      const std::int64_t shape[2] = {spec_.experts, entry.width};
      entry.memory = Tensor::contiguous(memory_.back(), DType::kF32,
                                        std::span(shape).first(entry.width > 1 ? 2 : 1),
                                        backend_->info().device);
      entry.seen.assign(static_cast<std::size_t>(spec_.experts), false);
    }
    Tensor& stored = slot(entry) = entry.memory;
    const std::vector<float> values = to_host_f32(*backend_, given);
    if (static_cast<std::int64_t>(values.size()) != entry.width)
      invalid(
          fmt::format("{}.{}: expected {} values for one expert, got {}; pass a view of that width",
                      argument, entry.name, entry.width, to_string(given)));
    backend_->copy(stored.as<float>() + expert * entry.width, values.data(),
                   values.size() * sizeof(float), {});
    entry.seen[static_cast<std::size_t>(expert)] = true;
  }
}

std::string SideStore::missing(std::string_view argument) const {
  for (const Entry& entry : entries_) {
    const auto without = std::find(entry.seen.begin(), entry.seen.end(), false);
    if (without == entry.seen.end() || !entry.given()) continue;
    return fmt::format(
        "{}.{} was given for some experts and not for local expert {}; give it for all or for none",
        argument, entry.name, without - entry.seen.begin());
  }
  return {};
}

void SideStore::complete() {
  for (const Entry& entry : entries_)
    if (!entry.given()) slot(entry) = {};
}

}  // namespace moesaic
