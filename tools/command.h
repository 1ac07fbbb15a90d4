// SPDX-License-Identifier: Apache-2.0
// What the six commands share: common flags, where text and JSON go, and how progress shows.
#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/moesaic.h"

namespace moesaic::tool {

// A mistake of whoever typed the command: exit code 2 and this one sentence.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What a count on the command line may be. Every layer can be made for so many tokens, so that no
// second bound comes behind this one.
inline constexpr std::int64_t kMaxCount = 1'000'000;

// When main began: it calls this first.
std::chrono::steady_clock::time_point process_start();

struct Common {
  std::string backend = "cpu";
  int threads = 0;
  std::string kernels;
  std::string json;
};

// Text goes to stdout, unless the JSON does.
class Output {
 public:
  explicit Output(const Common& common);  // throws UsageError where the JSON cannot be written
  bool text() const { return json_ != "-"; }
  void line(std::string_view text) const;
  // Throws UsageError where the JSON would be written over a file that the command needs.
  void keep_off(const std::function<bool(const std::string& path)>& needs) const;
  void write_json(const nlohmann::json& value) const;  // nothing without --json

 private:
  std::string json_;
};

// One line, and nothing that moves a terminal's cursor: parts of it may be a hostile file's bytes.
void say_on_stderr(std::string_view message);

// One line on stderr that overwrites itself; nothing unless stderr is a terminal. Gone when done.
class Progress {
 public:
  Progress();
  ~Progress();
  void show(std::string_view what);
  void clear();

 private:
  bool terminal_;
  bool shown_ = false;
};

// Rows of words in aligned columns: the first column left, the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void row(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  void print(const Output& out) const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// A subcommand: its flags are added at once, `run` is called when it was the one typed. Its result
// is the exit code.
struct Command {
  CLI::App* app;
  std::function<int()> run;
};
void add_common(CLI::App& app, Common& common);
// Checks of flags: what is no number from `low` to `high` is refused in a sentence of its own.
CLI::Validator whole(std::uint64_t low, std::uint64_t high);
CLI::Validator real(double low, double high);
void add_layer(CLI::App& app, std::int64_t& layer);                          // --layer
void add_seed(CLI::App& app, std::uint64_t& seed, const std::string& what);  // --seed
// Sets threads and kernels. The device to use: throws where this machine has none such.
Device apply(const Common& common);
// Before the work, not behind it: a result of minutes must not be lost to a mistyped folder.
void expect_writable(std::string_view flag, const std::string& path);  // throws UsageError
// By whatever spelling or link, also where nothing is yet. An empty path names no file.
bool is_one_file(const std::string& a, const std::string& b);

Command add_info(CLI::App& app);
Command add_inspect(CLI::App& app);
Command add_run(CLI::App& app);
Command add_verify(CLI::App& app);
Command add_bench(CLI::App& app);
Command add_quantize(CLI::App& app);

std::string bytes_text(double bytes);                   // "1.21 GB"
std::string time_text(double ms);                       // "2.31 ms"
std::vector<std::string> split(std::string_view list);  // at commas
std::vector<std::int64_t> parse_counts(std::string_view flag, std::string_view list);

}  // namespace moesaic::tool
