// SPDX-License-Identifier: Apache-2.0
// One direction only: public headers <- nouns <- the backend contract <- {cpu, cuda}, core <- what
// stands on top. Reads every #include of the sources.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {
namespace fs = std::filesystem;

const fs::path kRoot = MOESAIC_SOURCE_DIR;

// Houses by path; the first prefix that matches counts.
const std::vector<std::pair<std::string, std::string>> kHouses = {
    {"include/moesaic/", "public"}, {"src/scheme.", "nouns"},     {"src/row_map.", "nouns"},
    {"src/check.", "nouns"},        {"src/numeric.", "nouns"},    {"src/log.", "nouns"},
    {"src/divide.", "nouns"},       {"src/printable.", "nouns"},  {"src/words.", "nouns"},
    {"src/backend.", "contract"},   {"src/cpu/", "cpu"},
    {"src/cuda/", "cuda"},          {"src/reference/", "reference"},
    {"src/checkpoint/", "checkpoint"}, {"src/", "core"},          {"harness/", "harness"},
    {"tools/", "tools"},            {"examples/", "examples"},    {"python/", "python"}};

// Who may include whom, apart from itself.
const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"public", {}},
    {"nouns", {"public"}},
    {"contract", {"public", "nouns"}},
    {"cpu", {"public", "nouns", "contract"}},
    {"cuda", {"public", "nouns", "contract"}},
    {"core", {"public", "nouns", "contract"}},
    // The oracle knows nothing of the code that it judges.
    {"reference", {"public", "nouns"}},
    {"checkpoint", {"public", "nouns"}},
    {"harness", {"public", "nouns", "contract", "core", "reference"}},
    {"tools", {"public", "nouns", "contract", "core", "reference", "harness"}},
    {"examples", {"public"}},
    {"python", {"public"}},
};

std::string house(const std::string& path) {
  for (const auto& [prefix, name] : kHouses)
    if (path.starts_with(prefix)) return name;
  return {};
}

struct Include {
  std::string from, name;
  bool quoted;
};

std::vector<Include> includes(const std::string& folder) {
  std::vector<Include> out;
  if (!fs::exists(kRoot / folder)) return out;
  for (const auto& entry : fs::recursive_directory_iterator(kRoot / folder)) {
    const std::string extension = entry.path().extension().string();
    if (!std::set<std::string>{".h", ".cpp", ".cu", ".cuh", ".c"}.contains(extension)) continue;
    std::ifstream file(entry.path());
    std::string line;
    while (std::getline(file, line)) {
      if (!line.starts_with("#include")) continue;
      const std::size_t open = line.find_first_of("<\"");
      const std::size_t close = line.find_last_of(">\"");
      if (open == std::string::npos || close <= open) continue;
      out.push_back({fs::relative(entry.path(), kRoot).generic_string(),
                     line.substr(open + 1, close - open - 1), line[open] == '"'});
    }
  }
  return out;
}

// The file of this project that an include names, or empty.
std::string resolve(const Include& include) {
  for (const fs::path& base : {fs::path(include.from).parent_path(), fs::path("include"),
                               fs::path("src"), fs::path(".")}) {
    const fs::path path = (base / include.name).lexically_normal();
    if (fs::exists(kRoot / path)) return path.generic_string();
  }
  return {};
}

TEST(Layering, OneDirectionOnly) {
  int seen = 0;
  for (const std::string folder : {"include", "src", "harness", "tools", "examples", "python"})
    for (const Include& include : includes(folder)) {
      const std::string target = resolve(include);
      if (target.empty()) continue;
      ++seen;
      const std::string from = house(include.from), to = house(target);
      ASSERT_FALSE(from.empty()) << include.from << " belongs to no house";
      if (from == to) continue;
      EXPECT_TRUE(kMayInclude.at(from).contains(to))
          << include.from << " (" << from << ") must not include " << target << " (" << to << ")";
    }
  EXPECT_GT(seen, 100);
}

TEST(Layering, PublicHeadersNeedOnlyTheStandardLibrary) {
  for (const Include& include : includes("include")) {
    if (include.quoted) {
      EXPECT_TRUE(include.name.starts_with("moesaic/")) << include.from << " includes " << include.name;
    } else {
      // Standard headers have neither a folder nor, but for C's, an extension.
      EXPECT_EQ(include.name.find('/'), std::string::npos) << include.from << ": " << include.name;
      EXPECT_FALSE(include.name.starts_with("cuda") || include.name.starts_with("fmt") ||
                   include.name.starts_with("json"))
          << include.from << ": " << include.name;
    }
  }
}

TEST(Layering, ExamplesUsePublicHeadersOnly) {
  for (const Include& include : includes("examples"))
    EXPECT_TRUE(!include.quoted) << include.from << " includes \"" << include.name << "\"";
}

// Kernels of this project alone: no product, template or compiler of NVIDIA's on any path.
TEST(Layering, NoForeignKernels) {
  for (const std::string folder : {"include", "src"})
    for (const Include& include : includes(folder))
      for (const char* foreign : {"cublas", "cudnn", "cutlass", "cute/", "nvrtc", "curand"})
        EXPECT_FALSE(include.name.starts_with(foreign)) << include.from << " includes " << include.name;
}

// forward allocates nothing and waits for nothing: what does stands where weights are loaded and in
// the backend's own memory functions.
TEST(Layering, OnlyLoadingAllocatesAndWaits) {
  const std::set<std::string> may{"src/cuda/weights.cu", "src/cuda/backend_cuda.cpp"};
  const char* const words[] = {"cudaMalloc", "cudaFree",     "cudaMemcpy",     "cudaMemset",
                               "cudaHost",   "Synchronize(", "cudaMemGetInfo", "cudaEventCreate"};
  std::set<std::string> seen;
  for (const auto& entry : fs::recursive_directory_iterator(kRoot / "src")) {
    if (!entry.is_regular_file()) continue;
    const std::string path = fs::relative(entry.path(), kRoot).generic_string();
    std::ifstream file(entry.path());
    int number = 0;
    for (std::string line; std::getline(file, line);) {
      ++number;
      line = line.substr(0, line.find("//"));
      for (const char* word : words) {
        if (line.find(word) == std::string::npos) continue;
        seen.insert(path);
        EXPECT_TRUE(may.contains(path)) << path << ":" << number << " has " << word;
      }
    }
  }
  EXPECT_EQ(seen, may);
}

}  // namespace
