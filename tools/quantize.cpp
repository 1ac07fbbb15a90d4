// SPDX-License-Identifier: Apache-2.0
// moesaic quantize: one layer into any scheme, in a layout that `run` and `inspect` read.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>

#include "scheme.h"
#include "tools/checkpoint_flags.h"
#include "tools/command.h"

namespace moesaic::tool {
namespace {

struct QuantizeFlags {
  CheckpointFlags checkpoint;
  std::string out, scheme;
  std::int64_t layer = 0, group = -1;
  bool zero_points = false;
};

// The tensors of a layer that hold NaN or Inf. No scheme of integers can keep those.
std::vector<std::string> not_finite(const Checkpoint& checkpoint, const CheckpointLayer& layer) {
  const auto some = [](const StoredTensor& t, auto word, auto is) {
    using Word = decltype(word);
    const std::size_t count = t.bytes / sizeof(Word);
    bool found = false;
    for (std::size_t i = 0; i < count; ++i) {
      std::memcpy(&word, t.data + i * sizeof(Word), sizeof(Word));
      found |= is(word);
    }
    return found;
  };
  const auto exponent = [](auto mask) { return [mask](auto w) { return (w & mask) == mask; }; };
  // Other families keep their layers in one set of files; this library's own file is one layer.
  const std::string prefix = checkpoint.family() == "moesaic" ? "" : layer.name + ".";
  std::vector<std::string> names;
  for (const StoredTensor& t : checkpoint.files().tensors()) {
    if (!t.name.starts_with(prefix)) continue;
    const bool bad = t.dtype == "F32"       ? some(t, std::uint32_t{}, exponent(0x7f800000u))
                     : t.dtype == "BF16"    ? some(t, std::uint16_t{}, exponent(0x7f80))
                     : t.dtype == "F16"     ? some(t, std::uint16_t{}, exponent(0x7c00))
                     : t.dtype == "F8_E4M3" ? some(t, std::uint8_t{}, exponent(0x7f))  // has no Inf
                                            : false;
    if (bad) names.push_back(t.name);
    checkpoint.files().release(t);
  }
  return names;
}

void warn(const std::vector<std::string>& names) {
  constexpr std::size_t kShown = 8;
  for (std::size_t i = 0; i < std::min(names.size(), kShown); ++i)
    say_on_stderr(fmt::format("warning: tensor '{}' holds NaN or Inf", names[i]));
  if (names.size() > kShown)
    say_on_stderr(fmt::format("warning: so do {} more; see not_finite in the JSON (--json)",
                              names.size() - kShown));
}

int quantize(const QuantizeFlags& flags, const Common& common) {
  apply(common);
  const Output out(common);
  QuantSpec quant = parse_quant(flags.scheme);
  if (flags.group >= 0) {
    const SchemeTraits& t = traits(quant.scheme);
    const bool can = quant.scheme != Scheme::kMxfp4W4A16 &&
                     std::find(t.weight_scales.begin(), t.weight_scales.end(),
                               WeightScale::kGroup) != t.weight_scales.end();
    if (!can)
      throw UsageError(fmt::format(
          "--group: scheme {} has no groups to choose; leave it out, or take a scheme of "
          "integer groups such as int4_w4a16",
          t.name));
    quant.weight_scale = WeightScale::kGroup;
    quant.group_size = flags.group;
  }
  if (flags.zero_points) quant.zero_points = true;
  const Checkpoint checkpoint = open(flags.checkpoint);
  out.keep_off([&](const std::string& path) {
    return checkpoint.reads(path) || is_one_file(path, flags.out);
  });
  const CheckpointLayer& layer = checkpoint.layer(flags.layer);
  const std::vector<std::string> bad = not_finite(checkpoint, layer);
  warn(bad);
  {
    Progress progress;
    quantize_layer(checkpoint, {.layer = flags.layer,
                                .quant = quant,
                                .out_path = flags.out,
                                .progress = [&](std::int64_t done, std::int64_t total) {
                                  progress.show(fmt::format("expert {} of {}", done, total));
                                }});
  }
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(flags.out, error);
  out.line(fmt::format("{} ({}): {} -> {}", layer.name, shape_text(layer), quant_text(layer.quant),
                       quant_text(quant)));
  out.line(fmt::format("{}: {} -> {}", flags.out, bytes_text(static_cast<double>(layer.bytes)),
                       bytes_text(static_cast<double>(size))));
  out.write_json({{"layer", flags.layer},
                  {"from", quant_text(layer.quant)},
                  {"scheme", name(quant.scheme)},
                  {"quantization", quant_text(quant)},
                  {"path", flags.out},
                  {"not_finite", bad},
                  {"bytes_before", layer.bytes},
                  {"bytes_after", size}});
  return 0;
}

}  // namespace

Command add_quantize(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("quantize", "Convert a checkpoint's layer into a scheme");
  auto common = std::make_shared<Common>();
  auto flags = std::make_shared<QuantizeFlags>();
  app->add_option("checkpoint", flags->checkpoint.path,
                  "a folder, a .safetensors file or an index.json")
      ->required();
  app->add_option("out", flags->out, "the .safetensors file to write")->required();
  add_layer(*app, flags->layer);
  app->add_option("--scheme", flags->scheme, "scheme, or a variant such as int4_w4a16+g64+zp")
      ->required();
  app->add_option("--group", flags->group, "elements of K per scale; 0: the whole of K")
      ->check(whole(0, kMaxCount));
  app->add_flag("--zero-points", flags->zero_points, "asymmetric, where the scheme can");
  add_reading(*app, flags->checkpoint);
  add_common(*app, *common);
  return {app, [common, flags] { return quantize(*flags, *common); }};
}

}  // namespace moesaic::tool
