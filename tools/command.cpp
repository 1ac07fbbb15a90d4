// SPDX-License-Identifier: Apache-2.0
#include "tools/command.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>

#include "backend.h"
#include "printable.h"

namespace moesaic::tool {

std::chrono::steady_clock::time_point process_start() {
  static const auto start = std::chrono::steady_clock::now();
  return start;
}

void Output::line(std::string_view text) const {
  if (this->text()) fmt::print("{}\n", text);
}

void expect_writable(std::string_view flag, const std::string& path) {
  std::error_code error;
  const std::filesystem::file_status there = std::filesystem::status(path, error);
  const bool existed = std::filesystem::exists(there);
  // Opening a pipe to try it would be the end of file for who reads it.
  if (existed && !std::filesystem::is_regular_file(there) && !std::filesystem::is_directory(there))
    return;
  if (std::filesystem::is_directory(there) || !std::ofstream(path, std::ios::app))
    throw UsageError(
        fmt::format("{}: '{}' cannot be written; name a file in a folder that exists", flag, path));
  if (!existed) std::filesystem::remove(path, error);  // failed work leaves no empty result
}

bool is_one_file(const std::string& a, const std::string& b) {
  if (a.empty() || b.empty()) return false;
  std::error_code error;
  if (std::filesystem::equivalent(a, b, error)) return true;
  const auto whole = [&](const std::string& path) {
    return std::filesystem::weakly_canonical(std::filesystem::absolute(path, error), error);
  };
  return whole(a) == whole(b) && !error;
}

Output::Output(const Common& common) : json_(common.json) {
  if (!json_.empty() && json_ != "-") expect_writable("--json", json_);
}

void Output::keep_off(const std::function<bool(const std::string&)>& needs) const {
  if (!json_.empty() && json_ != "-" && needs(json_))
    throw UsageError(fmt::format(
        "--json: '{}' is a file that this command reads or writes; name another", json_));
}

void Output::write_json(const nlohmann::json& value) const {
  if (json_.empty()) return;
  // A path may hold any bytes; JSON holds UTF-8.
  const std::string text = value.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
  if (json_ == "-") {
    fmt::print("{}\n", text);
    return;
  }
  std::ofstream file(json_);
  file << text << '\n';
  file.close();
  if (!file)  // the machine's failure, not the command line's: that was tried before the work
    throw std::runtime_error(
        fmt::format("--json: '{}': the result cannot be written; is the disk full?", json_));
}

void say_on_stderr(std::string_view message) {
  fmt::print(stderr, "moesaic: {}\n", printable(message));
}

Progress::Progress() : terminal_(isatty(STDERR_FILENO) != 0) {}
Progress::~Progress() { clear(); }
void Progress::clear() {
  if (shown_) fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  shown_ = false;
}
void Progress::show(std::string_view what) {
  if (!terminal_) return;
  fmt::print(stderr, "\r\x1b[K{}", what.substr(0, 100));
  std::fflush(stderr);
  shown_ = true;
}

void Table::print(const Output& out) const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_)
    for (std::size_t c = 0; c < row.size(); ++c) {
      if (widths.size() <= c) widths.push_back(0);
      widths[c] = std::max(widths[c], row[c].size());
    }
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c)
      line += c == 0 ? fmt::format("{:<{}}", row[c], widths[c])
                     : fmt::format("  {:>{}}", row[c], widths[c]);
    line.erase(line.find_last_not_of(' ') + 1);
    out.line(line);
  }
}

namespace {

template <typename T>
CLI::Validator number_check(T low, T high, std::string_view kind) {
  const std::string range = fmt::format("{} to {}", low, high);
  return {[=, kind = std::string(kind)](std::string& text) -> std::string {
            T value{};
            const char* const end = text.data() + text.size();
            const auto [at, error] = std::from_chars(text.data(), end, value);
            if (error == std::errc{} && at == end && value >= low && value <= high) return {};
            return fmt::format("expected a {} from {}, got '{}'", kind, range, text);
          },
          range};
}

}  // namespace

CLI::Validator whole(std::uint64_t low, std::uint64_t high) {
  return number_check(low, high, "whole number");
}
CLI::Validator real(double low, double high) { return number_check(low, high, "number"); }

void add_layer(CLI::App& app, std::int64_t& layer) {
  app.add_option("--layer", layer, "the model's own number of the layer")
      ->required()
      ->check(whole(0, std::numeric_limits<std::int32_t>::max()).description(""));
}

void add_seed(CLI::App& app, std::uint64_t& seed, const std::string& what) {
  app.add_option("--seed", seed, what)
      ->capture_default_str()
      ->check(whole(0, std::numeric_limits<std::uint64_t>::max()).description(""));
}

void add_common(CLI::App& app, Common& common) {
  app.add_option("--backend", common.backend, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--threads", common.threads, "CPU threads; default: MOESAIC_THREADS or every core")
      ->check(whole(1, 4096));
  app.add_option("--kernels", common.kernels,
                 "force an instruction set or architecture, e.g. avx2, sm80 (see info)");
  app.add_option("--json", common.json, "write the result as JSON to a file; - is stdout");
}

Device apply(const Common& common) {
  if (common.threads > 0) set_num_threads(common.threads);
  const Device device = parse_device(common.backend);
  backend(device);  // says so where there is none, also of a command that would not have used it
  if (!common.kernels.empty()) set_kernels(device.type, common.kernels);
  return device;
}

std::string bytes_text(double bytes) {
  for (const auto& [unit, name] : {std::pair{1e9, "GB"}, {1e6, "MB"}, {1e3, "kB"}})
    if (bytes >= unit)
      return fmt::format("{:.{}f} {}", bytes / unit, bytes < 10 * unit ? 2 : 1, name);
  return fmt::format("{:.0f} B", bytes);
}

std::string time_text(double ms) {
  if (ms < 1) return fmt::format("{:.1f} us", ms * 1e3);
  return fmt::format("{:.{}f} ms", ms, ms < 10 ? 2 : 1);
}

std::vector<std::string> split(std::string_view list) {
  std::vector<std::string> out;
  while (true) {
    const std::size_t comma = list.find(',');
    out.emplace_back(list.substr(0, comma));
    if (comma == std::string_view::npos) return out;
    list.remove_prefix(comma + 1);
  }
}

std::vector<std::int64_t> parse_counts(std::string_view flag, std::string_view list) {
  std::vector<std::int64_t> out;
  for (const std::string& word : split(list)) {
    std::int64_t value = -1;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc{} || end != word.data() + word.size() || value < 0 || value > kMaxCount)
      throw UsageError(fmt::format(
          "{}: expected whole numbers from 0 to {}, got '{}'; give some such as 1,16,128", flag,
          kMaxCount, word));
    out.push_back(value);
  }
  return out;
}

}  // namespace moesaic::tool
