// SPDX-License-Identifier: Apache-2.0
// moesaic run: one MoE layer of a real checkpoint, from a file to an answer, with how good and how
// fast the answer is.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "harness/bench.h"
#include "harness/data.h"
#include "harness/formats.h"
#include "harness/stopwatch.h"
#include "tools/checkpoint_flags.h"
#include "tools/command.h"
#include "tools/run_report.h"

namespace moesaic::tool {
namespace {

using harness::DeviceTensor;
using harness::HostTensor;

struct RunFlags {
  CheckpointFlags checkpoint;
  std::int64_t layer = 0, tokens = 16, check = -1;
  std::uint64_t seed = 1;
  std::string input, output, format = "standard";
};

// What the input file gives; everything but hidden_states may be missing.
struct RunInput {
  std::optional<TensorFile> file;
  std::deque<std::vector<std::byte>> copies;
  Tensor hidden_states, router_logits, topk_ids, topk_weights;
};

// A view of the mapped bytes; of a copy where they do not lie on a multiple of their element's
// size, which the format does not ask of a writer. Matrices of the dtypes that any input may have.
Tensor tensor_of(const std::string& path, std::string_view name, RunInput& in) {
  static constexpr std::pair<std::string_view, DType> kDTypes[] = {{"F32", DType::kF32},
                                                                   {"F16", DType::kF16},
                                                                   {"BF16", DType::kBF16},
                                                                   {"I32", DType::kI32},
                                                                   {"I64", DType::kI64}};
  const StoredTensor& stored = *in.file->find(name);
  if (stored.shape.size() != 2)
    throw UsageError(fmt::format("{}: {} has {} dimensions, but 2 are needed; reshape it", path,
                                 name, stored.shape.size()));
  for (const auto& [spelled, dtype] : kDTypes) {
    if (stored.dtype != spelled) continue;
    const bool aligned = reinterpret_cast<std::uintptr_t>(stored.data) % size_of(dtype) == 0;
    if (!aligned) in.copies.emplace_back(stored.data, stored.data + stored.bytes);
    return Tensor::contiguous(aligned ? stored.data : in.copies.back().data(), dtype,
                              {stored.shape[0], stored.shape[1]});
  }
  throw UsageError(
      fmt::format("{}: {} is {}, but F32, F16 or BF16 (ids: I32 or I64) is needed; convert it",
                  path, name, stored.dtype));
}

void expect(const std::string& path, std::string_view what, const Tensor& t, std::int64_t rows,
            std::int64_t columns) {
  if (t.rank != 2 || t.shape[1] != columns || (rows >= 0 && t.shape[0] != rows))
    throw UsageError(fmt::format("{}: {} is {}, but this layer needs [{}, {}]", path, what,
                                 to_string(t), rows < 0 ? "T" : fmt::format("{}", rows), columns));
}

RunInput read_input(const std::string& path, const CheckpointLayer& layer, std::int64_t top_k) {
  RunInput in{.file = TensorFile::open(path)};
  const auto optional = [&](std::string_view tensor) {
    return in.file->find(tensor) ? tensor_of(path, tensor, in) : Tensor{};
  };
  if (!in.file->find("hidden_states"))
    throw UsageError(
        fmt::format("{}: holds no tensor `hidden_states` [T, {}]; add it", path, layer.hidden));
  in.hidden_states = tensor_of(path, "hidden_states", in);
  in.router_logits = optional("router_logits");
  in.topk_ids = optional("topk_ids");
  in.topk_weights = optional("topk_weights");
  expect(path, "hidden_states", in.hidden_states, -1, layer.hidden);
  if (!is_float(in.hidden_states.dtype))
    throw UsageError(fmt::format("{}: hidden_states is {}, but f32, f16 or bf16 is needed", path,
                                 name(in.hidden_states.dtype)));
  const std::int64_t tokens = in.hidden_states.shape[0];
  if (in.topk_ids.defined() != in.topk_weights.defined())
    throw UsageError(path + ": topk_ids and topk_weights come together or not at all");
  if (in.topk_ids.defined() && in.router_logits.defined())
    throw UsageError(path +
                     ": holds topk_ids and router_logits, and either says the routing; keep one");
  if (in.topk_ids.defined()) {
    expect(path, "topk_ids", in.topk_ids, tokens, top_k);
    expect(path, "topk_weights", in.topk_weights, tokens, top_k);
    if (in.topk_ids.dtype != DType::kI32 && in.topk_ids.dtype != DType::kI64)
      throw UsageError(fmt::format("{}: topk_ids is {}, but i32 or i64 is needed", path,
                                   name(in.topk_ids.dtype)));
    if (!is_float(in.topk_weights.dtype))
      throw UsageError(fmt::format("{}: topk_weights is {}, but f32, f16 or bf16 is needed", path,
                                   name(in.topk_weights.dtype)));
  } else if (in.router_logits.defined()) {
    expect(path, "router_logits", in.router_logits, tokens, layer.experts);
    if (!is_float(in.router_logits.dtype))
      throw UsageError(fmt::format("{}: router_logits is {}, but f32, f16 or bf16 is needed", path,
                                   name(in.router_logits.dtype)));
  }
  return in;
}

HostTensor converted(const Tensor& from, DType dtype) {
  HostTensor out(dtype, {from.shape[0], from.shape[1]});
  for (std::int64_t r = 0; r < from.shape[0]; ++r)
    for (std::int64_t c = 0; c < from.shape[1]; ++c)
      harness::store_element(out.bytes().data(), dtype, r * from.shape[1] + c,
                             harness::element(from, {r, c}));
  return out;
}

// Ids that no expert has contribute nothing, whatever number they are: all become -1, which is what
// the sum over slots of the sorted format wants. (An i64 id cut to 32 bits could be some expert's.)
HostTensor known_ids(const Tensor& given, std::int64_t experts) {
  HostTensor ids(DType::kI32, {given.shape[0], given.shape[1]});
  for (std::int64_t r = 0; r < given.shape[0]; ++r)
    for (std::int64_t c = 0; c < given.shape[1]; ++c) {
      const std::int64_t at = r * given.strides[0] + c * given.strides[1];
      const std::int64_t id =
          given.dtype == DType::kI64 ? given.as<std::int64_t>()[at] : given.as<std::int32_t>()[at];
      ids.as<std::int32_t>()[r * given.shape[1] + c] =
          id >= 0 && id < experts ? static_cast<std::int32_t>(id) : -1;
    }
  return ids;
}

HostTensor random_hidden(std::int64_t tokens, std::int64_t hidden, DType dtype,
                         std::uint64_t seed) {
  HostTensor out(dtype, {tokens, hidden});
  harness::Rng rng(seed);
  for (std::int64_t i = 0; i < tokens * hidden; ++i)
    harness::store_element(out.bytes().data(), dtype, i, rng.normal());
  return out;
}

// Ids and weights on the host: as given, or from logits, or from the checkpoint's router.
struct Chosen {
  HostTensor ids, weights;
};
Chosen choose(const Checkpoint& checkpoint, std::int64_t index, const LayerConfig& config,
              const RunInput& in, const DeviceTensor& hidden, Device device) {
  if (in.topk_ids.defined())
    return {known_ids(in.topk_ids, config.experts), converted(in.topk_weights, DType::kF32)};
  const std::int64_t tokens = hidden.view().shape[0];
  DeviceTensor ids(device, DType::kI32, {tokens, config.top_k});
  DeviceTensor weights(device, DType::kF32, {tokens, config.top_k});
  RouteArgs args{.spec = config.routing, .topk_ids = ids.view(), .topk_weights = weights.view()};
  DeviceTensor logits, weight, bias, selection_bias;
  const HostRouter router = checkpoint.router(index);
  bias = DeviceTensor::from(router.weights.bias, device);
  selection_bias = DeviceTensor::from(router.weights.selection_bias, device);
  args.router = {.bias = bias.view(), .selection_bias = selection_bias.view()};
  WorkspaceBuffer workspace(device, route_workspace_bytes(tokens, config.experts));
  args.workspace = workspace.view();
  if (in.router_logits.defined()) {
    // Given logits are final: a router bias is already in them.
    logits = DeviceTensor::from(in.router_logits, device);
    args.logits = logits.view();
    args.router.bias = {};
  } else if (router.weights.weight.defined()) {
    weight = DeviceTensor::from(router.weights.weight, device);
    args.router.weight = weight.view();
    args.hidden_states = hidden.view();
  } else {
    throw UsageError(
        fmt::format("layer {} of {} has no router: give router_logits, or topk_ids and "
                    "topk_weights, in --input",
                    index, checkpoint.path()));
  }
  route(args);
  return {ids.to_host(), weights.to_host()};
}

int run(const RunFlags& flags, const Common& common) {
  const Device device = apply(common);
  const Output out(common);
  Progress progress;
  const Checkpoint checkpoint = open(flags.checkpoint);
  out.keep_off([&](const std::string& path) {
    return checkpoint.reads(path) || is_one_file(path, flags.output);
  });
  if (!flags.output.empty() && checkpoint.reads(flags.output))
    throw UsageError(
        fmt::format("--output: '{}' is a file of the checkpoint; name another", flags.output));
  if (!flags.output.empty()) {
    std::error_code ignored;
    const auto there = std::filesystem::status(flags.output, ignored);
    if (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there))
      throw UsageError(fmt::format(
          "--output: '{}' is no regular file, and would be replaced; name another", flags.output));
    expect_writable("--output", flags.output);
  }
  const CheckpointLayer& stored = checkpoint.layer(flags.layer);
  LayerOverrides wanted = overrides(flags.checkpoint);
  RunInput in;
  std::int64_t tokens = flags.tokens;
  if (!flags.input.empty()) {
    in = read_input(flags.input, stored, wanted.top_k.value_or(stored.top_k));
    out.keep_off([&](const std::string& path) { return in.file->is_mapped(path); });
    if (!flags.output.empty() && in.file->is_mapped(flags.output))
      throw UsageError(fmt::format("--output: '{}' is the input; name another file", flags.output));
    tokens = in.hidden_states.shape[0];
  }
  wanted.max_tokens = std::max<std::int64_t>(tokens, 1);
  LayerConfig config = checkpoint.layer_config(flags.layer, wanted);
  // The answer comes in the input's dtype; what the kernels read is the model's.
  if (in.hidden_states.defined()) config.output_dtype = in.hidden_states.dtype;

  Layer layer(config, device);
  checkpoint.load(flags.layer, layer, [&](std::int64_t done, std::int64_t total) {
    progress.show(fmt::format("loading expert {} of {}", done, total));
  });
  const HostTensor hidden =
      in.hidden_states.defined()
          ? converted(in.hidden_states, config.input_dtype)
          : random_hidden(tokens, config.hidden, config.input_dtype, flags.seed);
  const DeviceTensor device_hidden = DeviceTensor::from(hidden, device);
  const Chosen chosen = choose(checkpoint, flags.layer, config, in, device_hidden, device);
  const DeviceTensor ids = DeviceTensor::from(chosen.ids, device);
  const DeviceTensor weights = DeviceTensor::from(chosen.weights, device);
  const DeviceTensor answer(device, config.output_dtype, {tokens, config.hidden});
  const harness::FormatInputs inputs{.hidden_states = device_hidden.view(),
                                     .topk_ids = ids.view(),
                                     .topk_weights = weights.view(),
                                     .output = answer.view()};
  const Format format = parse_format(flags.format);
  const harness::FormatRunner runner(layer, format, tokens);
  runner.run(inputs, {});

  RunReport report{.checkpoint = &checkpoint,
                   .stored = &stored,
                   .config = config,
                   .format = format,
                   .device = device,
                   .tokens = tokens,
                   .packed_bytes = static_cast<double>(layer.weight_bytes()),
                   .hidden = &hidden,
                   .ids = &chosen.ids,
                   .weights = &chosen.weights};
  const HostTensor output = answer.to_host();
  progress.show("comparing with the float64 oracle");
  report.compare(output, flags.layer, flags.check);
  progress.show("timing");
  report.time([&](Stream stream) { runner.run(inputs, stream); });
  if (!flags.output.empty()) {
    const NamedTensor named[] = {{"output", output.view()},
                                 {"topk_ids", chosen.ids.view()},
                                 {"topk_weights", chosen.weights.view()}};
    save_safetensors(flags.output, named);
  }
  progress.clear();
  report.print(out);
  out.write_json(report.to_json());
  return report.within_bound() ? 0 : 1;
}

}  // namespace

Command add_run(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("run", "Run one MoE layer of a checkpoint");
  auto common = std::make_shared<Common>();
  auto flags = std::make_shared<RunFlags>();
  app->add_option("--checkpoint", flags->checkpoint.path,
                  "a folder, a .safetensors file or an index.json")
      ->required();
  add_layer(*app, flags->layer);
  CLI::Option* input = app->add_option(
      "--input", flags->input,
      "safetensors with hidden_states, and router_logits or topk_ids and topk_weights if you like");
  app->add_option("--tokens", flags->tokens, "without --input: so many random tokens")
      ->capture_default_str()
      ->check(whole(0, kMaxCount))
      ->excludes(input);
  add_seed(*app, flags->seed, "of the random tokens");
  app->add_option("--output", flags->output, "write output, topk_ids and topk_weights here");
  app->add_option("--format", flags->format, "standard, sorted or batched")->capture_default_str();
  app->add_option("--check", flags->check,
                  "tokens to compare with the oracle; default: as many as take seconds")
      ->check(whole(0, kMaxCount));
  add_reading(*app, flags->checkpoint);
  add_overrides(*app, flags->checkpoint);
  add_common(*app, *common);
  return {app, [common, flags] { return run(*flags, *common); }};
}

}  // namespace moesaic::tool
