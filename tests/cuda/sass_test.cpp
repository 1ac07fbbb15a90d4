// SPDX-License-Identifier: Apache-2.0
// What lies in the library: machine code of every kernel for the parts that README.md names, so
// that nothing is compiled at run time there; PTX of compute_80 alone, for newer parts; and no more
// bytes than promised. Reads the file with cuobjdump, so no GPU is needed.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>

namespace {

std::string output_of(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  std::string out;
  std::array<char, 1 << 16> buffer;
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe.get()))
    out.append(buffer.data(), n);
  return out;
}

// Ends a test that has nothing to read with; a failure where MOESAIC_NEED_CUOBJDUMP says that one
// must be there.
#define NEED_CUOBJDUMP()                                                                     \
  if (output_of(std::string(MOESAIC_CUOBJDUMP) + " --version 2>&1").find("NVIDIA") ==        \
      std::string::npos) {                                                                   \
    ASSERT_EQ(std::getenv("MOESAIC_NEED_CUOBJDUMP"), nullptr) << "no " << MOESAIC_CUOBJDUMP; \
    GTEST_SKIP() << "no cuobjdump at " << MOESAIC_CUOBJDUMP;                                 \
  }

// Kernel -> the architectures it has machine code for.
std::map<std::string, std::set<std::string>> kernels() {
  std::istringstream text(
      output_of(std::string(MOESAIC_CUOBJDUMP) + " -res-usage " + MOESAIC_LIBRARY + " 2>&1"));
  std::map<std::string, std::set<std::string>> found;
  std::string arch;
  for (std::string line; std::getline(text, line);) {
    if (const std::size_t at = line.find("arch = "); at != std::string::npos)
      arch = line.substr(at + 7, line.find_first_of(" \t\r", at + 7) - at - 7);
    if (const std::size_t at = line.find("Function "); at != std::string::npos)
      found[line.substr(at + 9, line.rfind(':') - at - 9)].insert(arch);
  }
  return found;
}

class Library : public testing::Test {
 protected:
  void SetUp() override {
    if (std::string(MOESAIC_ARCHITECTURES) != "80,90-real")
      GTEST_SKIP() << "configured for architectures " << MOESAIC_ARCHITECTURES
                   << ": the shipped library is built for 80,90-real";
  }
};

TEST_F(Library, EveryKernelHasMachineCode) {
  NEED_CUOBJDUMP();
  const auto found = kernels();
  ASSERT_GT(found.size(), 100u);
  int hopper_only = 0, both = 0;
  for (const auto& [kernel, archs] : found) {
    const bool wgmma = archs == std::set<std::string>{"sm_90a"};
    const bool plain = archs == std::set<std::string>{"sm_80", "sm_90"};
    hopper_only += wgmma;
    both += plain;
    std::string list;
    for (const std::string& arch : archs) list += arch + " ";
    EXPECT_TRUE(wgmma || plain) << kernel << " has machine code for " << list;
  }
  EXPECT_GT(hopper_only, 0);
  EXPECT_GT(both, 0);
  std::printf("    %d kernels for sm_80 and sm_90, %d for sm_90a\n", both, hopper_only);
}

TEST_F(Library, PtxIsForNewerPartsOnly) {
  NEED_CUOBJDUMP();
  std::istringstream text(
      output_of(std::string(MOESAIC_CUOBJDUMP) + " -lptx " + MOESAIC_LIBRARY + " 2>&1"));
  int files = 0;
  for (std::string line; std::getline(text, line);) {
    if (line.find("PTX file") == std::string::npos) continue;
    ++files;
    EXPECT_NE(line.find(".sm_80.ptx"), std::string::npos) << line;
  }
  EXPECT_GT(files, 0);
}

TEST_F(Library, IsSmall) {
  const auto bytes = std::filesystem::file_size(std::filesystem::canonical(MOESAIC_LIBRARY));
  EXPECT_LT(bytes, 60'000'000u);
  std::printf("    %.1f MB\n", static_cast<double>(bytes) * 1e-6);
}

}  // namespace
