// SPDX-License-Identifier: Apache-2.0
// moesaic info: what this build and this machine can do. The matrix is asked of the code, never
// written down.
#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "backend.h"
#include "harness/cases.h"
#include "scheme.h"
#include "tools/command.h"
#include "words.h"

namespace moesaic::tool {
namespace {

struct Cell {
  std::string backend;
  Scheme scheme;
  Format format;
  Support support;
};

// A typical layer: what is asked here is the scheme and the format, not the shape.
LayerConfig typical(Scheme scheme) {
  const harness::Variant& variant = harness::default_variant(scheme);
  LayerConfig config;
  config.experts = 8;
  config.hidden = 1024;
  config.intermediate = 512;
  config.top_k = 2;
  config.local.count = config.experts;
  config.max_tokens = 64;
  config.quant = variant.quant;
  config.input_dtype = variant.input;
  config.output_dtype = variant.output;
  return config;
}

#ifdef MOESAIC_HAS_CUDA
bool has_cuda_device() {
  const std::vector<DeviceInfo> all = devices();
  return std::any_of(all.begin(), all.end(),
                     [](const DeviceInfo& d) { return d.device.type == DeviceType::kCuda; });
}
#endif

Support ask(const LayerConfig& config, Format format, Device device) {
  try {
#ifdef MOESAIC_HAS_CUDA
    // The matrix is the code's, not the machine's.
    if (device.type == DeviceType::kCuda && !has_cuda_device()) return cuda_support(config);
#endif
    return supports(config, format, device);
  } catch (const Error& error) {  // no such device, or built without it
    return {.supported = false, .reason = error.what()};
  }
}

std::vector<Cell> matrix() {
  std::vector<Cell> cells;
  for (const DeviceType type : {DeviceType::kCpu, DeviceType::kCuda})
    for (const SchemeTraits& t : all_schemes())
      for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched})
        cells.push_back({type == DeviceType::kCpu ? "cpu" : "cuda", t.scheme, format,
                         ask(typical(t.scheme), format, {.type = type})});
  return cells;
}

// fp8_tensor's dynamic scale is the largest number of the whole call: the one promise with an
// exception.
bool batch_invariant(Scheme scheme) {
  return traits(scheme).default_act_scale != ActScale::kTensorDynamic;
}

void print(const Output& out, const std::vector<Cell>& cells) {
  out.line(fmt::format("moesaic {}", version()));
  for (const DeviceInfo& d : devices())
    out.line(fmt::format("  {:<8} {}  [{}]{}{}", to_string(d.device), d.name, d.kernels,
                         d.note.empty() ? "" : "  ", d.note));
  std::string levels;
  for (const std::string& level : available_kernels(DeviceType::kCpu))
    append_word(levels, level);
  out.line(fmt::format("  threads  {}   CPU kernels: {}", num_threads(), levels));
  out.line("");

  Table table(
      {"scheme", "cpu: standard", "sorted", "batched", "cuda: standard", "sorted", "batched"});
  std::map<std::string, int> reasons;
  for (const SchemeTraits& t : all_schemes()) {
    std::vector<std::string> row{std::string(t.name) + (batch_invariant(t.scheme) ? "" : " *")};
    for (const Cell& cell : cells)
      if (cell.scheme == t.scheme) {
        if (!cell.support.supported) ++reasons[cell.backend + ": " + cell.support.reason];
        row.push_back(cell.support.supported ? "yes" : "-");
      }
    table.row(std::move(row));
  }
  table.print(out);
  out.line("");
  out.line(
      "Each with every activation, with biases or none. The same bits on every run, and for a");
  out.line(
      "token alone or in any batch; * not with its default scale, the absmax of the whole call.");
#ifdef MOESAIC_HAS_CUDA
  if (!has_cuda_device())
    out.line(
        "There is no CUDA device here: those columns are what one of compute capability 9.0 runs.");
#endif
  for (const auto& [reason, count] : reasons)
    out.line(fmt::format("- {} ({} cells)", reason, count));
}

nlohmann::json to_json(const std::vector<Cell>& cells) {
  nlohmann::json devices_json = nlohmann::json::array(), matrix_json = nlohmann::json::array();
  for (const DeviceInfo& d : devices())
    devices_json.push_back({{"device", to_string(d.device)},
                            {"name", d.name},
                            {"kernels", d.kernels},
                            {"note", d.note}});
  for (const Cell& cell : cells)
    matrix_json.push_back({{"backend", cell.backend},
                           {"scheme", name(cell.scheme)},
                           {"format", name(cell.format)},
                           {"supported", cell.support.supported},
                           {"reason", cell.support.reason},
                           {"batch_invariant", batch_invariant(cell.scheme)}});
  return {{"version", version()},
          {"devices", devices_json},
          {"threads", num_threads()},
          {"cpu_kernels", available_kernels(DeviceType::kCpu)},
          {"cuda_kernels", available_kernels(DeviceType::kCuda)},
          {"matrix", matrix_json}};
}

}  // namespace

Command add_info(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("info", "Version, devices and the support matrix");
  auto common = std::make_shared<Common>();
  add_common(*app, *common);
  return {app, [common] {
            apply(*common);
            const Output out(*common);
            const std::vector<Cell> cells = matrix();
            print(out, cells);
            out.write_json(to_json(cells));
            return 0;
          }};
}

}  // namespace moesaic::tool
