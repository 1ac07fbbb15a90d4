// SPDX-License-Identifier: Apache-2.0
// Flags of the moesaic command: what one cannot mean is refused by its name, with the way out, and
// nothing that was typed is passed over in silence.
#include <string>

#include "cli_testing.h"

namespace moesaic::testing {
namespace {

const std::string kRun = "run --checkpoint " + kTiny + " --layer 0 ";
const std::string kBench = "bench --shape 4,64,64,2 --tokens 1 --seconds 0.01 ";

TEST_F(Cli, NumbersHaveOneRangeEach) {
  for (const char* seed : {"-1", "abc", "1e3", "0x10", "18446744073709551616", "1.5"})
    for (const std::string& command : {kRun, kBench})
      expect_usage(command + "--seed " + seed,
                   "--seed: expected a whole number from 0 to 18446744073709551615, got '" +
                       std::string(seed) + "'");
  EXPECT_EQ(run(kRun + "--tokens 1 --seed 18446744073709551615").code, 0);
  for (const char* layer : {"-1", "x", "99999999999999999999"}) {
    const std::string words =
        "--layer: expected a whole number from 0 to 2147483647, got '" + std::string(layer) + "'";
    expect_usage("run --checkpoint " + kTiny + " --layer " + layer, words);
    expect_usage("quantize " + kTiny + " " + file("q") + " --scheme bf16 --layer " + layer, words);
  }
  // What --help says is what is meant.
  for (const std::string& command : {std::string("run"), std::string("verify")})
    EXPECT_NE(run(command + " --help").out.find(" to 1000000"), std::string::npos);
  expect_usage(kRun + "--tokens 1000001", "--tokens: expected a whole number from 0 to 1000000");
  expect_usage("bench --tokens 1000001", "--tokens: expected whole numbers from 0 to 1000000");
  expect_usage("verify --tokens 9,1000001", "got '1000001'");
  for (const char* seconds : {"nan", "inf", "-1", "601", "soon"})
    expect_usage("bench --shape 4,64,64,2 --tokens 1 --seconds " + std::string(seconds),
                 "--seconds: expected a number from 0 to 600, got '" + std::string(seconds) + "'");
}

TEST_F(Cli, FlagsThatWouldDoNothingAreRefused) {
  for (const char* tactic : {"99", "-2", "2x"})
    for (const std::string flag : {"--tactic1", "--tactic2"})
      expect_usage(kBench + flag + " " + tactic, flag + ": expected the number of a tactic from 0");
  expect_usage(kBench + "--capacity 1", "--capacity: the batched format alone has one");
  expect_usage(kBench + "--format standard,sorted --capacity 1", "take --format batched");
  EXPECT_EQ(run(kBench + "--format sorted,batched --capacity 1").code, 0);
  for (const std::string flag :
       {"--gate-order up_first", "--gate-layout halves", "--fused auto", "--fused kn"}) {
    const std::string words = flag.substr(0, flag.find(' ')) + ": family ";
    expect_usage(kRun + flag, words + "qwen3_moe has its own; leave it out, or");
    expect_usage("inspect " + kTiny + " " + flag, words);
    EXPECT_EQ(run("inspect " + kTiny + " --family generic " + flag).code, 0) << flag;
  }
  ASSERT_EQ(run("quantize " + kTiny + " " + file("q") + " --layer 0 --scheme bf16").code, 0);
  expect_usage("inspect " + file("q") + " --family generic", "--family: ");
  expect_usage("inspect " + file("q") + " --fused nk", "--fused: family moesaic");
}

// A flag behind a flag that wants a value is no value.
TEST_F(Cli, FlagsAreNoValues) {
  for (const std::string command : {"info --json --threads 1", "info --json --backend"}) {
    const Result r = run(command);
    EXPECT_EQ(r.code, 2);
    EXPECT_NE(r.err.find("--json: expected a value, got the flag '--"), std::string::npos) << r.err;
  }
  EXPECT_FALSE(fs::exists("--threads"));
  expect_usage("--foo", "there is no option '--foo'");
  expect_usage("-x info", "there is no option '-x'");
}

TEST_F(Cli, RefusalsNameTheFlagAndTheWayOut) {
  expect_usage(kBench + "--experts-only", "--experts-only: the standard format is one call; take");
  expect_usage(kBench + "--route logits --format sorted", "--route: ");
}

// What --help gives as an example works, and its lists are whole.
TEST_F(Cli, HelpOfBenchIsTrue) {
  const std::string help = run("bench --help").out;
  const std::string such = "variants such as ";
  const std::size_t at = help.find(such);
  ASSERT_NE(at, std::string::npos);
  const std::string example = help.substr(at + such.size(), help.find('\n', at) - at - such.size());
  EXPECT_EQ(run(kBench + "--scheme " + example).code, 0) << example;
  const std::string err = run(kBench + "--load heavy").err;
  const std::string known = "known: ";
  ASSERT_NE(err.find(known), std::string::npos);
  std::string loads = err.substr(err.find(known) + known.size());
  loads.pop_back();  // the line's end
  EXPECT_NE(help.find(loads), std::string::npos) << loads;
}

TEST_F(Cli, RowsSayWhichTactic) {
  const std::string plain = run(kBench).out, each = run(kBench + "--tactic1 each").out;
  EXPECT_EQ(plain.find("tactic"), std::string::npos);
  const std::size_t header = each.find("tactic1  tactic2");
  ASSERT_NE(header, std::string::npos) << each;
  const std::size_t column = header - each.rfind('\n', header) - 1;
  std::istringstream rows(each.substr(header));
  std::string seen;
  for (std::string row; std::getline(rows, row);)
    if (row.starts_with("4,64,64,2")) {
      const std::string cell = row.substr(column, 7);
      seen += cell.substr(cell.find_last_of(' ') + 1) + " ";
    }
  EXPECT_TRUE(seen.starts_with("own 0 ") && seen.ends_with(" own ")) << seen << each;
}

}  // namespace
}  // namespace moesaic::testing
