// SPDX-License-Identifier: Apache-2.0
// The checkpoint: open, describe, load. How things are stored is the business of the files beside
// this one.
#include "moesaic/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/layer_source.h"
#include "checkpoint/native.h"
#include "checkpoint/slice.h"
#include "checkpoint/stack.h"
#include "checkpoint/writer.h"
#include "words.h"

namespace moesaic {
namespace {

bool contains(std::span<const WeightScale> list, WeightScale s) {
  return std::find(list.begin(), list.end(), s) != list.end();
}

// `scheme` for numbers stored as `stored`: the same granularity where the scheme has it, so that
// nothing needs to be quantized again; else the scheme's own.
QuantSpec spec_for_scheme(const StoredLayout& stored, Scheme scheme) {
  if (scheme == stored.advertised.scheme) return stored.advertised;
  const SchemeTraits& have = traits(stored.numbers.scheme);
  const SchemeTraits& want = traits(scheme);
  if (have.weight != want.weight || have.default_weight_scale == WeightScale::kDefault)
    return {.scheme = scheme};
  QuantSpec spec = stored.numbers;
  spec.scheme = scheme;
  spec.act_scale = ActScale::kDefault;
  if (!contains(want.weight_scales, spec.weight_scale)) spec.weight_scale = WeightScale::kDefault;
  spec.zero_points = spec.zero_points && want.may_have_zero_points;
  return spec;
}

DType dtype_for(const QuantSpec& quant, DType checkpoint) {
  const DType own = weight_dtype(traits(quant.scheme).weight);
  if (is_float(own)) return own;
  return is_16bit(checkpoint) ? checkpoint : DType::kBF16;
}

// A complaint about tensors says of which checkpoint, unless it begins with one of its files.
template <typename Read>
auto naming(const std::string& path, const std::string& config_path, Read read) {
  try {
    return read();
  } catch (const Error& e) {
    const std::string_view text = e.what();
    if (text.starts_with(path) || text.starts_with(config_path)) throw;
    throw Error(e.code(), fmt::format("{}: {}", path, text));
  }
}

}  // namespace

ProductSpecs product_specs(const CheckpointLayer& layer, const QuantSpec& quant, DType dtype,
                           std::int64_t width, Activation activation) {
  LayerConfig c;
  c.experts = 1;
  c.hidden = layer.hidden;
  c.intermediate = width;
  c.quant = quant;
  c.activation = layer.activation;
  c.activation.kind = activation;
  c.input_dtype = c.output_dtype = dtype_for(quant, dtype);
  return {.fc1 = weight_spec(c, Product::kFc1), .fc2 = weight_spec(c, Product::kFc2)};
}

struct Checkpoint::Impl {
  std::string path, family;
  std::string config_path;  // empty: not read
  TensorFile files;
  bool native = false;
  std::vector<LayerSource> sources;
  std::vector<CheckpointLayer> layers;

  const LayerSource& source(std::int64_t index) const {
    for (const LayerSource& s : sources)
      if (s.layer.index == index) return s;
    std::string known;
    for (std::size_t i = 0; i < sources.size() && i < 64; ++i)
      append_word(known, std::to_string(sources[i].layer.index));
    invalid(fmt::format("layer {}: not an MoE layer of {}; there are {}{}", index, path, known,
                        sources.size() > 64 ? ", ..." : ""));
  }

  // The stand-in for an activation that nobody named: only gated or not matters to storage.
  Activation activation_of(const LayerSource& s) const {
    if (s.model.activation_refusal.empty()) return s.layer.activation.kind;
    return s.experts.gated ? Activation::kSwiglu : Activation::kRelu2;
  }

  LayerWeights read(const LayerSource& s, std::int64_t expert, const ProductSpecs& from,
                    Arena& arena) const {
    return native ? read_native_expert(files, s, expert)
                  : read_expert(files, s.experts, from, expert, arena);
  }

  LayerWeights expert(const LayerSource& s, const QuantSpec& quant, DType dtype,
                      std::int64_t expert, Arena& arena) const {
    check_range("expert", expert, 0, s.layer.experts - 1);
    const Activation act = activation_of(s);
    const ProductSpecs from =
        product_specs(s.layer, s.experts.numbers, dtype, s.layer.intermediate, act);
    const ProductSpecs to = product_specs(s.layer, quant, dtype, s.layer.intermediate, act);
    const LayerWeights w = read(s, expert, from, arena);
    return {.fc1 = convert(from.fc1, to.fc1, w.fc1, arena),
            .fc2 = convert(from.fc2, to.fc2, w.fc2, arena),
            .activation = {}};
  }

  LayerWeights shared(const LayerSource& s, const QuantSpec& quant, DType dtype,
                      Arena& arena) const {
    if (s.layer.shared_experts == 0)
      invalid(fmt::format("layer {}: has no shared experts", s.layer.index));
    const Activation act = activation_of(s);
    const std::int64_t width = s.layer.shared_intermediate;
    const QuantSpec& stored = native ? s.layer.quant : s.shared->numbers;
    // Shared experts come from tensors of their own, never interleaved.
    CheckpointLayer halves = s.layer;
    if (!native) halves.activation.layout = GateLayout::kHalves;
    const ProductSpecs from = product_specs(halves, stored, dtype, width, act);
    const ProductSpecs to = product_specs(s.layer, quant, dtype, width, act);
    const LayerWeights w =
        native ? read_native_shared(files, s) : read_expert(files, *s.shared, from, 0, arena);
    return {.fc1 = convert(from.fc1, to.fc1, w.fc1, arena),
            .fc2 = convert(from.fc2, to.fc2, w.fc2, arena),
            .activation = {}};
  }

  RouterWeights router(const LayerSource& s, Arena& arena) const {
    const auto read = [&](const std::string& name) {
      return name.empty() ? Tensor{} : read_floats(files, name, arena);
    };
    return {.weight = read(s.router.weight),
            .bias = flat(read(s.router.bias)),
            .selection_bias = flat(read(s.router.selection_bias))};
  }

  Tensor shared_gate(const LayerSource& s, Arena& arena) const {
    return s.shared_gate.empty() ? Tensor{} : flat(read_floats(files, s.shared_gate, arena));
  }

  // [1, E] (ERNIE's bias, Qwen's gate) as [E].
  static Tensor flat(const Tensor& t) {
    return t.defined() ? Tensor::contiguous(t.data, t.dtype, {t.numel()}) : Tensor{};
  }

  void check_config(const LayerSource& s, const LayerConfig& c) const {
    if (c.experts != s.layer.experts || c.hidden != s.layer.hidden ||
        c.intermediate != s.layer.intermediate)
      invalid(
          fmt::format("config: {} experts of [{}, {}], layer {} of the checkpoint has {} of [{}, "
                      "{}]; make it with "
                      "layer_config",
                      c.experts, c.hidden, c.intermediate, s.layer.index, s.layer.experts,
                      s.layer.hidden, s.layer.intermediate));
    if (is_gated(c.activation.kind) != s.experts.gated)
      invalid(fmt::format("activation: {} is {}gated, the checkpoint's experts are{}; name {} one",
                          name(c.activation.kind), is_gated(c.activation.kind) ? "" : "not ",
                          s.experts.gated ? "" : " not",
                          s.experts.gated ? "a gated" : "an ungated"));
  }
};

// What host weights point into: the map, and what had to be copied.
struct Checkpoint::Kept {
  explicit Kept(std::shared_ptr<const Impl> i) : impl(std::move(i)) {}
  std::shared_ptr<const Impl> impl;
  Arena arena;
};

Checkpoint Checkpoint::open(const std::string& path, const CheckpointOptions& options) {
  if (!is_directory(path) && !is_file(path))
    io_error(path + ": there is no such checkpoint, neither a file nor a directory");
  auto impl = std::make_shared<Impl>();
  impl->path = path;
  const std::string directory = is_directory(path) ? path : parent_directory(path);
  const std::string config_path = join_path(directory, "config.json");
  nlohmann::json json;
  // A directory's config.json first: a checkpoint without weights then fails with the right words.
  const bool has_config = is_file(config_path);
  impl->files = TensorFile::open(path);
  if (is_native(impl->files)) {
    impl->native = true;
    impl->family = "moesaic";
    impl->sources.push_back(naming(path, config_path, [&] { return native_layer(impl->files); }));
  } else {
    if (has_config) {
      json = read_json_object(config_path);
      impl->config_path = config_path;
    }
    const ModelConfig config(has_config ? &json : nullptr, config_path);
    if (!has_config && options.family.empty())
      unsupported(fmt::format(
          "{}: there is no config.json, and the file is not this library's own; say how to read it "
          "(--family)",
          directory));
    const Family& family = find_family(options, config);
    impl->family = family.name;
    impl->sources = naming(path, config_path,
                           [&] { return find_layers(impl->files, family, config, options); });
  }
  for (const LayerSource& s : impl->sources) impl->layers.push_back(s.layer);
  Checkpoint checkpoint;
  checkpoint.impl_ = std::move(impl);
  return checkpoint;
}

const std::string& Checkpoint::family() const { return impl_->family; }
const std::string& Checkpoint::path() const { return impl_->path; }
std::span<const CheckpointLayer> Checkpoint::layers() const { return impl_->layers; }
const CheckpointLayer& Checkpoint::layer(std::int64_t index) const {
  return impl_->source(index).layer;
}
const TensorFile& Checkpoint::files() const { return impl_->files; }
bool Checkpoint::reads(const std::string& path) const {
  return impl_->files.is_mapped(path) ||
         (!impl_->config_path.empty() && is_same_file(impl_->config_path, path));
}

LayerConfig Checkpoint::layer_config(std::int64_t index, const LayerOverrides& o) const {
  const LayerSource& s = impl_->source(index);
  const CheckpointLayer& l = s.layer;
  LayerConfig c;
  c.experts = l.experts;
  c.hidden = l.hidden;
  c.intermediate = l.intermediate;
  c.top_k = o.top_k.value_or(l.top_k);
  if (c.top_k == 0)
    invalid("top_k: the checkpoint does not say how many experts a token takes; name it (--top-k)");
  check_range("top_k", c.top_k, 1, l.experts);
  c.max_tokens = o.max_tokens;
  c.local = o.local;

  c.routing = l.routing;
  if (o.routing) {
    // The checkpoint's scale, groups and floors stay; whether to divide is part of the method.
    if (*o.routing != l.routing.method) c.routing.renormalize = Renormalize::kDefault;
    c.routing.method = *o.routing;
  } else if (!s.model.routing_refusal.empty()) {
    unsupported(s.model.routing_refusal);
  }
  c.activation = l.activation;
  if (o.activation) {
    c.activation.kind = *o.activation;
  } else if (!s.model.activation_refusal.empty()) {
    unsupported(s.model.activation_refusal);
  }
  if (o.quant) {
    c.quant = *o.quant;
  } else if (o.scheme) {
    c.quant = spec_for_scheme(s.experts, *o.scheme);
  } else {
    if (!s.refusal.empty()) unsupported(s.refusal);
    c.quant = l.quant;
  }
  c.weight_on = l.weight_on;
  c.input_dtype = c.output_dtype = o.dtype.value_or(dtype_for(c.quant, l.dtype));
  c.workspace_cap = o.workspace_cap;
  if (o.shared == SharedExperts::kOn) {
    if (l.shared_experts == 0)
      invalid(fmt::format(
          "shared: layer {} has no shared experts; leave --shared (SharedExperts::kOn) out",
          index));
    c.shared_experts = l.shared_experts;
    c.shared_intermediate = l.shared_intermediate;
  }
  impl_->check_config(s, c);
  return c;
}

void Checkpoint::load(std::int64_t index, Layer& layer, const LoadProgress& progress) const {
  const LayerSource& s = impl_->source(index);
  const LayerConfig& c = layer.config();
  impl_->check_config(s, c);
  const std::int64_t count = c.local.count > 0 ? c.local.count : c.experts;
  for (std::int64_t i = 0; i < count; ++i) {
    Arena arena;  // at most this expert
    const std::int64_t e = c.local.first + i;
    layer.load_expert(i, impl_->expert(s, c.quant, intermediate_dtype(c), e, arena));
    if (!impl_->native) release_expert(impl_->files, s.experts, e);
    if (progress) progress(i + 1, count);
  }
  Arena arena;
  if (c.shared_experts > 0)
    layer.load_shared(impl_->shared(s, c.quant, intermediate_dtype(c), arena),
                      impl_->shared_gate(s, arena));
  const RouterWeights router = impl_->router(s, arena);
  if (router.weight.defined() || router.bias.defined() || router.selection_bias.defined())
    layer.set_router(router);
}

HostWeights Checkpoint::expert(std::int64_t index, const LayerConfig& config,
                               std::int64_t global_expert) const {
  const LayerSource& s = impl_->source(index);
  impl_->check_config(s, config);
  const auto kept = std::make_shared<Kept>(impl_);
  HostWeights out{.weights = impl_->expert(s, config.quant, intermediate_dtype(config),
                                           global_expert, kept->arena),
                  .storage = kept};
  return out;
}

HostWeights Checkpoint::experts(std::int64_t index, const LayerConfig& config) const {
  const LayerSource& s = impl_->source(index);
  impl_->check_config(s, config);
  const std::int64_t count = config.local.count > 0 ? config.local.count : config.experts;
  const auto arena = std::make_shared<Arena>();
  Stack stack(count, *arena);
  for (std::int64_t i = 0; i < count; ++i) {
    Arena scratch;
    stack.put(i, impl_->expert(s, config.quant, intermediate_dtype(config), config.local.first + i,
                               scratch));
  }
  return {.weights = stack.all(), .storage = arena};
}

HostShared Checkpoint::shared(std::int64_t index, const LayerConfig& config) const {
  const LayerSource& s = impl_->source(index);
  const auto kept = std::make_shared<Kept>(impl_);
  HostShared out{.weights = impl_->shared(s, config.quant, intermediate_dtype(config), kept->arena),
                 .gate = impl_->shared_gate(s, kept->arena),
                 .storage = kept};
  return out;
}

HostRouter Checkpoint::router(std::int64_t index) const {
  const LayerSource& s = impl_->source(index);
  const auto kept = std::make_shared<Kept>(impl_);
  HostRouter out{.weights = impl_->router(s, kept->arena), .storage = kept};
  return out;
}

void quantize_layer(const Checkpoint& checkpoint, const QuantizeLayerArgs& args) {
  const QuantSpec& quant = args.quant;
  const std::string& out_path = args.out_path;
  const Checkpoint::Impl& impl = *checkpoint.impl_;
  const LayerSource& s = impl.source(args.layer);
  if (checkpoint.reads(out_path))
    invalid(fmt::format("out: '{}' is a file of the checkpoint itself; name another", out_path));
  const DType dtype = dtype_for(quant, s.layer.dtype);
  NativeDescription description{.layer = s.layer, .model = s.model};
  description.layer.quant = quant;
  description.layer.dtype = dtype;
  description.layer.activation.kind = impl.activation_of(s);

  // What is written beside the experts is small and kept; the experts come one by one.
  Arena arena;
  std::vector<NamedTensor> small;
  const RouterWeights router = impl.router(s, arena);
  for (const auto& [name, tensor] : {std::pair{"router.weight", &router.weight},
                                     {"router.bias", &router.bias},
                                     {"router.selection_bias", &router.selection_bias}})
    if (tensor->defined()) small.push_back({name, *tensor});
  if (s.layer.shared_experts > 0)
    append_native("shared.", impl.shared(s, quant, dtype, arena), small);
  if (const Tensor gate = impl.shared_gate(s, arena); gate.defined())
    small.push_back({"shared.gate", gate});

  const auto expert_tensors = [&](std::int64_t e, Arena& memory) {
    std::vector<NamedTensor> tensors;
    append_native(fmt::format("experts.{}.", e), impl.expert(s, quant, dtype, e, memory), tensors);
    return tensors;
  };
  std::vector<SafetensorsWriter::Entry> entries;
  const auto declare = [&](const std::string& name, const Tensor& t) {
    entries.push_back({name, t.dtype, {t.shape.begin(), t.shape.begin() + t.rank}});
  };
  for (const NamedTensor& t : small) declare(t.name, t.tensor);
  {
    Arena first;
    constexpr std::string_view kFirst = "experts.0.";
    for (const NamedTensor& t : expert_tensors(0, first))
      for (std::int64_t e = 0; e < s.layer.experts; ++e)
        declare(fmt::format("experts.{}.{}", e, t.name.substr(kFirst.size())), t.tensor);
  }
  SafetensorsWriter writer(out_path, std::move(entries), native_metadata(description));
  for (const NamedTensor& t : small) writer.write(t.name, t.tensor);
  for (std::int64_t e = 0; e < s.layer.experts; ++e) {
    Arena memory;
    for (const NamedTensor& t : expert_tensors(e, memory)) writer.write(t.name, t.tensor);
    if (!impl.native) release_expert(impl.files, s.experts, e);
    if (args.progress) args.progress(e + 1, s.layer.experts);
  }
  writer.finish();
}

}  // namespace moesaic
