// SPDX-License-Identifier: Apache-2.0
// A checkpoint made of three texts, split by zero bytes: family, config.json and a safetensors
// header. The data behind the header is made up, as long as the header says, so that the search is
// spent on names, shapes and quantization rather than on byte counts.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "moesaic/moesaic.h"

namespace {

namespace fs = std::filesystem;
constexpr std::uint64_t kMaxData = 1 << 20;
constexpr std::int64_t kMaxWeights = 1 << 18;  // of one expert, to keep a run short

// The largest offset that the header names, if it is small.
std::uint64_t data_bytes(const std::string& header) {
  std::uint64_t end = 0;
  const auto json = nlohmann::json::parse(header, nullptr, false);
  if (!json.is_object()) return 0;
  for (const auto& tensor : json) {
    if (!tensor.is_object()) continue;
    const auto offsets = tensor.find("data_offsets");
    if (offsets == tensor.end() || !offsets->is_array() || offsets->size() != 2 ||
        !(*offsets)[1].is_number_unsigned())
      continue;
    end = std::max(end, (*offsets)[1].get<std::uint64_t>());
  }
  return std::min(end, kMaxData);
}

template <typename Body>
void expect_error_at_most(const Body& body) {
  try {
    body();
  } catch (const moesaic::Error&) {
  }
}

void read_everything(const moesaic::Checkpoint& c) {
  using namespace moesaic;
  for (const CheckpointLayer& l : c.layers()) {
    const LayerOverrides told{
        .top_k = 1, .routing = RoutingMethod::kRenormalize, .activation = l.activation.kind};
    expect_error_at_most([&] { c.layer_config(l.index); });
    expect_error_at_most([&] { c.router(l.index); });
    if (l.hidden * l.intermediate > kMaxWeights || l.shared_intermediate * l.hidden > kMaxWeights)
      continue;
    for (const auto scheme : {std::optional<Scheme>{}, std::optional(Scheme::kF32),
                              std::optional(Scheme::kInt4W4A16)}) {
      expect_error_at_most([&] {
        LayerOverrides o = told;
        o.scheme = scheme;
        const LayerConfig config = c.layer_config(l.index, o);
        const HostWeights w = c.expert(l.index, config, l.experts - 1);
        volatile auto first = *w.weights.fc1.weight.as<const std::uint8_t>();
        static_cast<void>(first);
      });
      expect_error_at_most([&] {
        LayerOverrides o = told;
        o.scheme = scheme;
        o.shared = SharedExperts::kOn;
        c.shared(l.index, c.layer_config(l.index, o));
      });
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::string folder = [] {
    std::string pattern = (fs::temp_directory_path() / "moesaic-fuzz-XXXXXX").string();
    return std::string(::mkdtemp(pattern.data()));
  }();
  static const bool registered = std::atexit([] { fs::remove_all(folder); }) == 0;
  static_cast<void>(registered);

  const std::string text(reinterpret_cast<const char*>(data), size);
  const std::size_t one = text.find('\0');
  const std::size_t two = one == std::string::npos ? one : text.find('\0', one + 1);
  if (two == std::string::npos) return 0;
  const std::string family = text.substr(0, one), config = text.substr(one + 1, two - one - 1),
                    header = text.substr(two + 1);
  const std::string weights = folder + "/model.safetensors";
  {
    std::ofstream(folder + "/config.json", std::ios::binary) << config;
    std::ofstream out(weights, std::ios::binary);
    const std::uint64_t length = header.size();
    out.write(reinterpret_cast<const char*>(&length), sizeof(length));
    out << header;
    std::string body(data_bytes(header), '\0');
    for (std::size_t i = 0; i < body.size(); ++i) body[i] = static_cast<char>(i * 167 + i / 251);
    out << body;
  }
  expect_error_at_most(
      [&] { read_everything(moesaic::Checkpoint::open(folder, {.family = family})); });
  return 0;
}
