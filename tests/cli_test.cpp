// SPDX-License-Identifier: Apache-2.0
// The moesaic command as its users meet it: one sentence per mistake, JSON fields, verify, bench.
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cli_testing.h"
#include "moesaic/version.h"

namespace moesaic::testing {
namespace {

TEST_F(Cli, VersionIsTheHeaders) {
  const Result r = run("--version");
  EXPECT_EQ(r.code, 0);
  EXPECT_EQ(r.out, "moesaic " MOESAIC_VERSION_STRING "\n");
  const std::string parts = std::to_string(MOESAIC_VERSION_MAJOR) + "." +
                            std::to_string(MOESAIC_VERSION_MINOR) + "." +
                            std::to_string(MOESAIC_VERSION_PATCH);
  EXPECT_EQ(parts, MOESAIC_VERSION_STRING);
}

TEST_F(Cli, HelpNamesTheCommands) {
  const Result r = run("--help");
  EXPECT_EQ(r.code, 0);
  for (const char* command : {"info", "inspect", "run", "verify", "bench", "quantize"})
    EXPECT_NE(r.out.find(command), std::string::npos) << command;
}

TEST_F(Cli, InfoHoldsTheWholeMatrix) {
  const json info = run_json("info");
  EXPECT_EQ(info["version"], MOESAIC_VERSION_STRING);
  std::set<std::string> cells;
  for (const json& cell : info["matrix"]) {
    cells.insert(cell["backend"].get<std::string>() + cell["scheme"].get<std::string>() +
                 cell["format"].get<std::string>());
    const bool supported = cell["supported"];
    EXPECT_TRUE(supported || cell["backend"] != "cpu") << cell;
    EXPECT_TRUE(supported || cell["reason"] != "") << cell;
  }
  EXPECT_EQ(cells.size(), 2u * 14u * 3u);
}

TEST_F(Cli, MistakesExitWithTwoAndOneSentence) {
  expect_usage("", "subcommand");
  expect_usage("dance", "dance");
  expect_usage("info --colour", "--colour");
  expect_usage("info --backend tpu", "tpu");
  expect_usage("info --threads 0", "--threads");
  expect_usage("info --kernels mmx", "mmx");
  expect_usage("inspect", "checkpoint");
  expect_usage("inspect " + file("missing"), "missing");
  expect_usage("inspect " + kTiny + "/config.json", "config.json: is no index; name the folder");
  expect_usage("run --checkpoint " + kTiny, "--layer");
  expect_usage("run --checkpoint " + kTiny + " --layer 99", "99");
  expect_usage("run --checkpoint " + kTiny + " --layer 0 --tokens -1", "--tokens");
  expect_usage("run --checkpoint " + kTiny + " --layer 0 --format heap", "heap");
  expect_usage("run --checkpoint " + kTiny + " --layer 0 --top-k 999", "top_k");
  expect_usage("run --checkpoint " + kTiny + " --layer 0 --input " + file("none"), "none");
  expect_usage("verify --scheme int3", "int3");
  expect_usage("verify --tokens many", "many");
  expect_usage("bench --shape 8,64,64", "64");
  expect_usage("bench --shape 2,64,64,3 --tokens 1", "top_k");
  expect_usage("bench --tokens 0", "--tokens");
  expect_usage("bench --shape 4,64,64,2 --load heavy", "heavy");
  expect_usage("bench --shape 4,64,64,2 --tokens 1 --tactic1 2x", "--tactic1");
  expect_usage("quantize " + kTiny + " " + file("q") + " --layer 0 --scheme int5", "int5");
}

// Skipping every case is not success: what cannot run is said.
TEST_F(Cli, VerifyOfNothingFails) {
  const Result shape = run("verify --shape 4,64,64,9 --tokens 1 --limit 3");
  EXPECT_EQ(shape.code, 2);
  EXPECT_NE(shape.err.find("top_k"), std::string::npos) << shape.err;
  bool has_cuda = false;
  const json info = run_json("info");
  for (const json& device : info["devices"])
    has_cuda = has_cuda || device["device"].get<std::string>().starts_with("cuda");
  if (!has_cuda) expect_usage("verify --backend cuda --limit 1", "cuda");
}

// A backend that is not there is said by every command, also by one that would not have used it.
TEST_F(Cli, ABackendThatIsNotThereIsSaidByEveryCommand) {
  for (const std::string& command :
       {std::string("info"), "inspect " + kTiny, "run --checkpoint " + kTiny + " --layer 0",
        std::string("verify --limit 1"), std::string("bench --shape 4,64,64,2 --tokens 1"),
        "quantize " + kTiny + " " + file("q") + " --layer 0 --scheme bf16"})
    expect_usage(command + " --backend cuda:93", "cuda:93");
}

TEST_F(Cli, VerifyTakesVariants) {
  const json one = run_json("verify --scheme int4_w4a16+g64+zp --limit 2");
  for (const json& c : one["cases"])
    EXPECT_TRUE(c["name"].get<std::string>().starts_with("int4_w4a16+g64+zp/")) << c;
  expect_usage("verify --scheme int4_w4a16+g65", "int4_w4a16+g64+zp");
  expect_usage("bench --scheme fp8_block+1x1", "fp8_block+64x32");
  expect_usage("verify --scheme int3+g64", "int4_w4a16");
}

TEST_F(Cli, WhatHasNoMeaningIsRefused) {
  expect_usage(
      "quantize " + kTiny + " " + file("q") + " --layer 0 --scheme int8_channel --group 32",
      "--group");
  expect_usage("run --checkpoint " + kTiny + " --layer 0 --seed -1", "--seed");
  expect_usage("run --checkpoint " + kTiny + " --layer 0 --routing hash", "hash");
  expect_usage("verify --tokens ''", "--tokens");
  expect_usage("inspect ''", "inspect");
}

// Bytes of a stranger's file or path reach neither a terminal nor the JSON as they are.
TEST_F(Cli, ForeignBytesAreMadeHarmless) {
  const std::string folder = file("odd\xff\x1b[31m");
  fs::copy(kTiny, folder);
  EXPECT_EQ(run_json("inspect '" + folder + "'")["layers"].size(), 2u);
  expect_usage("inspect '" + folder + "/none\x1b'", "?[31m/none?");
  // UTF-8 stays; what is none (cut short, too long, a surrogate) and its control codes do not.
  expect_usage("inspect " + file("h\u00e9\u20ac\U0001f600"), "h\u00e9\u20ac\U0001f600:");
  expect_usage("inspect " + file("a\xc2\x9b"
                                 "b\xe2\x82"
                                 "c\xc0\xaf"
                                 "d\xed\xa0\x80"),
               "a??b??c??d???:");
  // Of the JSON library's words only those that say what is wrong.
  fs::copy(kTiny, file("torn"));
  std::ofstream(file("torn/config.json")) << "{\"model_type\": \"\xff\x9b\"}";
  const std::string err = run("inspect " + file("torn")).err;
  EXPECT_NE(err.find("config.json: is not valid JSON: parse error at line 1"), std::string::npos)
      << err;
  EXPECT_EQ(std::count_if(err.begin(), err.end(), [](char c) { return c < 0; }), 0) << err;
  EXPECT_EQ(err.find("json.exception"), std::string::npos) << err;
}

TEST_F(Cli, GarbageFilesFailCleanly) {
  std::ofstream(file("short.safetensors")) << "abc";
  std::ofstream(file("noise.safetensors")) << std::string(4096, '\xff');
  std::ofstream(file("empty.safetensors"));
  for (const char* name : {"short.safetensors", "noise.safetensors", "empty.safetensors"}) {
    expect_usage("inspect " + file(name), name);
    expect_usage("run --checkpoint " + file(name) + " --layer 0", name);
  }
}

TEST_F(Cli, VerifyListsItsCases) {
  const json verified = run_json("verify --scheme int8_channel --limit 4");
  ASSERT_EQ(verified["cases"].size(), 4u);
  for (const json& c : verified["cases"]) {
    EXPECT_EQ(c["status"], "passed") << c;
    EXPECT_LE(c["ratio"].get<double>(), 1.0);
  }
  EXPECT_EQ(verified["failed"], 0);
}

TEST_F(Cli, VerifyPartsAreTheWholeList) {
  const std::string list = "verify --scheme int8_channel --limit 5";
  const auto append_names = [&](const std::string& arguments, std::vector<std::string>* names) {
    const json verified = run_json(arguments);
    for (const json& c : verified["cases"]) names->push_back(c["name"]);
  };
  std::vector<std::string> whole, parts;
  append_names(list, &whole);
  for (const char* part : {"1/3", "2/3", "3/3"}) append_names(list + " --part " + part, &parts);
  std::sort(whole.begin(), whole.end());
  std::sort(parts.begin(), parts.end());
  EXPECT_EQ(parts, whole);
  for (const char* wrong : {"0/3", "4/3", "1", "1/", "1/0", "1/3x", "-1/3"})
    expect_usage(list + " --part " + wrong, "--part");
  expect_usage(list + " --part 6/6", "5 cases");
}

// Static activation scales belong to the weights, which prepare does not see: experts quantizes.
TEST_F(Cli, BenchTimesEveryFormatOfStaticScales) {
  for (const char* format : {"standard", "sorted", "batched"})
    EXPECT_EQ(run_json(std::string("bench --shape 4,64,64,2 --tokens 3 --seconds 0.01 "
                                   "--scheme fp8_tensor+static --format ") +
                       format)["rows"]
                  .size(),
              1u)
        << format;
}

TEST_F(Cli, BenchRowsHoldEveryField) {
  const json bench =
      run_json("bench --shape 4,64,64,2 --tokens 1,3 --seconds 0.01 --scheme int8_channel");
  ASSERT_EQ(bench["rows"].size(), 2u);
  for (const json& row : bench["rows"]) {
    for (const char* field : {"backend",        "device",         "scheme",
                              "format",         "shape",          "experts",
                              "hidden",         "intermediate",   "top_k",
                              "tokens",         "load",           "ms_median",
                              "ms_min",         "ms_max",         "runs",
                              "active_experts", "weight_bytes",   "floor_ms",
                              "floor_bound",    "ratio_to_floor", "fraction_of_roof",
                              "gflops",         "gbytes_s"})
      EXPECT_TRUE(row.contains(field)) << field;
    EXPECT_LE(row["ms_min"], row["ms_median"]);
    EXPECT_LE(row["ms_median"], row["ms_max"]);
    EXPECT_GT(row["floor_ms"].get<double>(), 0);
    // One expert: fc1 [128, 64] and fc2 [64, 64] int8 with a scale per row.
    const double expert = 192.0 * 64 + 192.0 * 4;
    EXPECT_DOUBLE_EQ(row["weight_bytes"].get<double>(),
                     row["active_experts"].get<double>() * expert);
    EXPECT_NEAR(row["ratio_to_floor"].get<double>() * row["fraction_of_roof"].get<double>(), 1,
                1e-9);
  }
  EXPECT_GT(bench["machine"]["probes"]["before"]["read_gbytes_s"].get<double>(), 0);
  EXPECT_GT(bench["machine"]["probes"]["after"]["fma_gflops"].get<double>(), 0);
}

TEST_F(Cli, EveryTacticCanBeTimed) {
  const json bench =
      run_json("bench --shape 4,64,64,2 --tokens 2,5 --seconds 0.01 --tactic1 each --tactic2 each");
  const auto pair = [](const json& row) {
    return std::pair{row["tactic1"].get<int>(), row["tactic2"].get<int>()};
  };
  const json& rows = bench["rows"];
  std::vector<std::pair<int, int>> expected{{-1, -1}};
  for (std::size_t i = 1; i < rows.size() && rows[i]["tactic2"] == -1 && rows[i]["tactic1"] != -1;
       ++i)
    expected.emplace_back(static_cast<int>(i) - 1, -1);
  const std::size_t first_of_gemm2 = expected.size();
  for (std::size_t i = first_of_gemm2; i < rows.size() && rows[i]["tactic2"] != -1; ++i)
    expected.emplace_back(-1, static_cast<int>(i - first_of_gemm2));
  expected.emplace_back(-1, -1);
  EXPECT_GE(expected.size(), 4u);
  ASSERT_EQ(rows.size(), 2 * expected.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(rows[i]["tokens"], i < expected.size() ? 2 : 5);
    EXPECT_EQ(pair(rows[i]), expected[i % expected.size()]) << i;
  }
  const json forced = run_json("bench --shape 4,64,64,2 --tokens 2 --seconds 0.01 --tactic2 0");
  ASSERT_EQ(forced["rows"].size(), 1u);
  EXPECT_EQ(pair(forced["rows"][0]), (std::pair{-1, 0}));
}

TEST_F(Cli, EveryFormatCanBeTimed) {
  for (const char* format : {"sorted", "batched"}) {
    const json bench = run_json(
        std::string("bench --shape 4,64,64,2 --tokens 5 --seconds 0.01 --load zipf --format ") +
        format);
    EXPECT_EQ(bench["rows"][0]["format"], format);
    EXPECT_EQ(bench["rows"][0]["load"], "zipf");
    const json alone = run_json(
        std::string("bench --shape 4,64,64,2 --tokens 5 --seconds 0.01 --experts-only --format ") +
        format);
    EXPECT_EQ(alone["rows"][0]["experts_only"], true);
    EXPECT_GE(alone["machine"]["start_ms"], alone["machine"]["first_forward_ms"]);
  }
  expect_usage("bench --shape 4,64,64,2 --tokens 1 --experts-only", "one call");
}

}  // namespace
}  // namespace moesaic::testing
