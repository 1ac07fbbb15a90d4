// SPDX-License-Identifier: Apache-2.0
// The built command, run as a user runs it: exit codes, what it prints, files in and out.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

namespace moesaic::testing {
namespace fs = std::filesystem;
using nlohmann::json;

inline const std::string kTiny = std::string(MOESAIC_SOURCE_DIR) + "/examples/data/qwen3-moe-tiny";

inline std::string read(const fs::path& path) {
  std::ostringstream out;
  out << std::ifstream(path).rdbuf();
  return out.str();
}

class Cli : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("moesaic_cli_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string file(const std::string& name) const { return (folder_ / name).string(); }

  struct Result {
    int code = -1;
    std::string out, err;
  };
  Result run(const std::string& arguments) const {
    const std::string line = std::string(MOESAIC_COMMAND) + " " + arguments + " >" + file("out") +
                             " 2>" + file("err") + " </dev/null";
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(file("out")), read(file("err"))};
  }
  json run_json(const std::string& arguments, int code = 0) const {
    const Result r = run(arguments + " --json -");
    EXPECT_EQ(r.code, code) << r.err;
    json parsed = json::parse(r.out, nullptr, false);
    EXPECT_FALSE(parsed.is_discarded()) << r.out;
    return parsed;
  }
  // Exit code 2 and one sentence that holds `word`.
  void expect_usage(const std::string& arguments, const std::string& word) const {
    const Result r = run(arguments);
    EXPECT_EQ(r.code, 2) << arguments << ": " << r.err;
    EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
    EXPECT_TRUE(r.err.starts_with("moesaic: ")) << r.err;
    EXPECT_NE(r.err.find(word), std::string::npos) << arguments << ": " << r.err;
    EXPECT_EQ(r.out, "") << arguments;
  }

  fs::path folder_;
};

}  // namespace moesaic::testing
