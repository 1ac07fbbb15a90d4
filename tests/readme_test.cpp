// SPDX-License-Identifier: Apache-2.0
// README.md tells the truth: its C++ example is examples/quickstart.cpp (which is compiled and
// run), and its support matrix is the one that the command prints. So do the links of docs/, and
// its table of environment variables.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
const fs::path kRoot = MOESAIC_SOURCE_DIR;

std::string read(const std::string& name) {
  std::ostringstream out;
  out << std::ifstream(std::string(MOESAIC_SOURCE_DIR) + "/" + name).rdbuf();
  return out.str();
}

// The text of the first block fenced with ```language that holds `word`.
std::string block(const std::string& text, const std::string& language, const std::string& word) {
  const std::string fence = "```" + language + "\n";
  for (std::size_t at = text.find(fence); at != std::string::npos; at = text.find(fence, at)) {
    at += fence.size();
    const std::size_t end = text.find("```", at);
    const std::string body = text.substr(at, end - at);
    if (body.find(word) != std::string::npos) return body;
    at = end + 3;
  }
  return {};
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) out.push_back(line);
  return out;
}

std::string output_of(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  std::string out;
  std::array<char, 4096> buffer;
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe.get()))
    out.append(buffer.data(), n);
  return out;
}

// "bf16  yes  yes  yes  -  -  -" -> {"bf16", "yes", "yes", "yes", "-", ...}
std::vector<std::string> words(const std::string& line) {
  std::vector<std::string> out;
  std::istringstream stream(line);
  for (std::string word; stream >> word;)
    if (word != "*") out.push_back(word);
  return out;
}

TEST(Readme, ExampleIsTheOneThatIsCompiled) {
  const std::string shown = block(read("README.md"), "cpp", "int main");
  ASSERT_FALSE(shown.empty());
  EXPECT_NE(read("examples/quickstart.cpp").find(shown), std::string::npos)
      << "README.md's example differs from examples/quickstart.cpp";
}

TEST(Readme, CommandsAreThere) {
  const std::string readme = read("README.md");
  EXPECT_NE(readme.find("make demo"), std::string::npos);
  EXPECT_NE(readme.find("make test"), std::string::npos);
  // What `make test` leaves out without Python it says at its end, and README.md how to have it.
  EXPECT_NE(readme.find("scripts/setup_venv.sh .venv"), std::string::npos);
  if (std::system("make --version >/dev/null 2>&1") == 0) {
    const std::string steps = output_of("make -n -C " + kRoot.string() + " test");
    EXPECT_LT(steps.find("ctest"), steps.find("cat build/cpu/not_tested.txt")) << steps;
    EXPECT_NE(steps.find("cat build/cpu/not_tested.txt"), std::string::npos) << steps;
  }
}

// All columns in a build with CUDA, with or without a device; the CPU's in one without.
TEST(Readme, MatrixIsWhatTheCodePrints) {
  const std::vector<std::string> shown = lines(block(read("README.md"), "text", "cpu: standard"));
  int compared = 0;
  for (const std::string& line : lines(output_of(std::string(MOESAIC_COMMAND) + " info"))) {
    const std::vector<std::string> cells = words(line);
    if (cells.size() != 7 || cells[1] == "cpu:") continue;
    ++compared;
    bool found = false;
    for (const std::string& row : shown) {
      const std::vector<std::string> theirs = words(row);
      if (theirs.size() != 7 || theirs[0] != cells[0]) continue;
      found = true;
#ifdef MOESAIC_HAS_CUDA
      constexpr int kColumns = 6;
#else
      constexpr int kColumns = 3;
#endif
      for (int c = 1; c <= kColumns; ++c)
        EXPECT_EQ(theirs[c], cells[c]) << cells[0] << ", column " << c;
    }
    EXPECT_TRUE(found) << "README.md's matrix lacks " << cells[0];
  }
  EXPECT_EQ(compared, 14);
}

// Every page that README.md and docs/ point to exists.
TEST(Readme, LinksLeadSomewhere) {
  std::vector<std::string> pages{"README.md"};
  for (const auto& entry : fs::directory_iterator(kRoot / "docs"))
    if (entry.path().extension() == ".md")
      pages.push_back("docs/" + entry.path().filename().string());
  ASSERT_GT(pages.size(), 9u);
  for (const std::string& page : pages) {
    const std::string text = read(page);
    ASSERT_FALSE(text.empty()) << page;
    const std::string folder = page.find('/') == std::string::npos ? "" : "docs/";
    for (std::size_t at = text.find("]("); at != std::string::npos; at = text.find("](", at + 2)) {
      const std::string link = text.substr(at + 2, text.find(')', at) - at - 2);
      if (link.find("://") != std::string::npos || link.starts_with("#")) continue;
      const std::string target = link.substr(0, link.find('#'));
      EXPECT_TRUE(std::ifstream(std::string(MOESAIC_SOURCE_DIR) + "/" + folder + target).good())
          << page << " points to " << target;
    }
  }
}

// A script that says by its first line what runs it can be typed as the pages type it.
TEST(Readme, ScriptsCanBeRun) {
  int scripts = 0;
  for (const char* folder : {"bench", "scripts"})
    for (const auto& entry : fs::directory_iterator(kRoot / folder)) {
      if (!entry.is_regular_file()) continue;
      std::string first;
      std::getline(std::ifstream(entry.path()), first);
      if (!first.starts_with("#!")) continue;
      ++scripts;
      EXPECT_NE(entry.status().permissions() & fs::perms::owner_exec, fs::perms::none)
          << entry.path();
    }
  EXPECT_GE(scripts, 8);
}

// bench/compare.py says in one line what is wrong with its files, and reads what is right.
TEST(Readme, ComparingSaysWhatIsWrong) {
  if (std::system("python3 --version >/dev/null 2>&1") != 0) GTEST_SKIP() << "no python3";
  const std::string compare = "cd " + kRoot.string() + " && bench/compare.py ";
  const auto said = [&](const std::string& arguments) {
    return output_of(compare + arguments + " 2>&1; echo exit $?");
  };
  for (const std::string arguments :
       {"rows.json --peers nope.json", "--glance README.md", "--glance nope.md",
        "rows.json --peers README.md", "rows.json --peers CMakePresets.json"}) {
    const std::string text = said(arguments);
    EXPECT_TRUE(text.starts_with("compare.py: ") && text.ends_with("\nexit 2\n")) << text;
    EXPECT_EQ(lines(text).size(), 2u) << text;
  }
  const std::string table = said("--glance docs/performance_cuda.md");
  EXPECT_TRUE(table.starts_with("| best peer / ours | T=1 |") && table.ends_with("exit 0\n"))
      << table;
}

// Every variable that the sources read is in the table.
TEST(Readme, EnvironmentTableIsComplete) {
  const std::string table = read("docs/environment.md");
  const std::regex reads(R"re((?:getenv\(|environ\.get\(|environ\[)"([A-Z_0-9]+)")re");
  std::set<std::string> names;
  for (const char* folder : {"src", "tools", "harness", "tests", "bench", "examples", "python"})
    for (const auto& entry : fs::recursive_directory_iterator(kRoot / folder)) {
      const std::string extension = entry.path().extension().string();
      if (extension != ".cpp" && extension != ".h" && extension != ".cu" && extension != ".py")
        continue;
      const std::string text = read(fs::relative(entry.path(), kRoot).string());
      for (std::sregex_iterator at(text.begin(), text.end(), reads), end; at != end; ++at)
        names.insert((*at)[1]);
    }
  EXPECT_GE(names.size(), 8u);
  for (const std::string& name : names)
    EXPECT_NE(table.find("`" + name + "`"), std::string::npos)
        << "docs/environment.md lacks " << name;
}

}  // namespace
