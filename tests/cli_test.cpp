// SPDX-License-Identifier: Apache-2.0
// The moesaic command as its users meet it: exit codes, one sentence per mistake, JSON fields,
// files in and out. Runs the built command.
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "moesaic/checkpoint.h"
#include "moesaic/version.h"

namespace {
namespace fs = std::filesystem;
using nlohmann::json;

const std::string kTiny = std::string(MOESAIC_SOURCE_DIR) + "/examples/data/qwen3-moe-tiny";

std::string read(const fs::path& path) {
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

TEST_F(Cli, WhereTheJsonCannotGoIsSaidBeforeTheWork) {
  expect_usage(
      "bench --shape 4,64,64,2 --tokens 1 --seconds 600 --json " + file("no/such/folder.json"),
      "--json");
  const std::string full =
      std::string(MOESAIC_COMMAND) + " info --json - >/dev/full 2>" + file("err");
  EXPECT_EQ(WEXITSTATUS(std::system(full.c_str())), 1);
  EXPECT_NE(read(file("err")).find("writ"), std::string::npos);
}

// Nor is anything written over what is being read.
TEST_F(Cli, OutputsAreCheckedBeforeTheWork) {
  const std::string run = "run --checkpoint " + file("copy") + " --layer 0 ";
  fs::copy(kTiny, file("copy"));
  const std::string before = read(file("copy/model.safetensors"));
  expect_usage(run + "--output " + file("no/such/folder.safetensors"), "--output");
  expect_usage(run + "--output " + file("copy"), "--output");
  expect_usage(run + "--output " + file("copy/model.safetensors"), "of the checkpoint");
  expect_usage(run + "--output /dev/null", "no regular file");
  expect_usage("quantize " + kTiny + " /dev/null --layer 0 --scheme bf16", "no regular file");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  expect_usage("quantize " + file("copy") + " " + file("copy/../copy/model.safetensors") +
                   " --layer 0 --scheme int8_channel",
               "of the checkpoint");
  EXPECT_EQ(read(file("copy/model.safetensors")), before);
  EXPECT_FALSE(fs::exists(file("no")));
}

// Bytes of a stranger's file or path reach neither a terminal nor the JSON as they are.
TEST_F(Cli, ForeignBytesAreMadeHarmless) {
  const std::string folder = file("odd\xff\x1b[31m");
  fs::copy(kTiny, folder);
  EXPECT_EQ(run_json("inspect '" + folder + "'")["layers"].size(), 2u);
  expect_usage("inspect '" + folder + "/none\x1b'", "?[31m/none?");
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
  }
}

TEST_F(Cli, InspectTellsWhatIsThere) {
  const json seen = run_json("inspect " + kTiny);
  ASSERT_FALSE(seen["layers"].empty());
  const json& layer = seen["layers"][0];
  EXPECT_EQ(layer["scheme"], "bf16");
  EXPECT_GT(layer["experts"].get<int>(), 1);
  EXPECT_TRUE(layer["router"]);
}

TEST_F(Cli, RunIsRightAndRepeatable) {
  const std::string base = "run --checkpoint " + kTiny + " --layer 0 --tokens 9 --seed 3";
  const json first = run_json(base + " --output " + file("a.safetensors"));
  EXPECT_EQ(first["checked_tokens"], 9);
  EXPECT_LE(first["bound_ratio"].get<double>(), 1);
  EXPECT_LE(first["relative_error"].get<double>(), 6e-3);
  std::int64_t slots = 0;
  for (const json& load : first["tokens_per_expert"]) slots += load.get<std::int64_t>();
  EXPECT_EQ(slots, 9 * first["top_k"].get<std::int64_t>());

  for (const char* format : {"standard", "sorted", "batched"}) {
    run_json(base + " --threads 1 --format " + format + " --output " + file("b.safetensors"));
    EXPECT_EQ(read(file("a.safetensors")), read(file("b.safetensors"))) << format;
  }
}

TEST_F(Cli, RunTakesTensorsFromAFile) {
  using namespace moesaic;
  const json layer = run_json("inspect " + kTiny)["layers"][0];
  const std::int64_t hidden = layer["hidden"], experts = layer["experts"], top_k = layer["top_k"];
  std::vector<float> x(static_cast<std::size_t>(2 * hidden));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.01f * static_cast<float>(i % 97) - 0.5f;
  // Token 0 wants the last experts, token 1 the first.
  std::vector<float> logits(static_cast<std::size_t>(2 * experts));
  for (std::int64_t e = 0; e < experts; ++e) {
    logits[static_cast<std::size_t>(e)] = static_cast<float>(e);
    logits[static_cast<std::size_t>(experts + e)] = -static_cast<float>(e);
  }
  const NamedTensor named[] = {
      {"hidden_states", Tensor::contiguous(x.data(), DType::kF32, {2, hidden})},
      {"router_logits", Tensor::contiguous(logits.data(), DType::kF32, {2, experts})}};
  save_safetensors(file("x.safetensors"), named);
  const std::string base = "run --checkpoint " + kTiny + " --layer 0 --input ";
  run_json(base + file("x.safetensors") + " --output " + file("y.safetensors"));
  const TensorFile y = TensorFile::open(file("y.safetensors"));
  const Tensor output = y.tensor("output"), ids = y.tensor("topk_ids"),
               weights = y.tensor("topk_weights");
  EXPECT_EQ(output.dtype, DType::kF32);  // of hidden_states
  EXPECT_EQ(ids.as<std::int32_t>()[0], experts - 1);
  EXPECT_EQ(ids.as<std::int32_t>()[top_k], 0);

  // The same routing, given as ids and weights.
  const NamedTensor again[] = {named[0], {"topk_ids", ids}, {"topk_weights", weights}};
  save_safetensors(file("z.safetensors"), again);
  run_json(base + file("z.safetensors") + " --output " + file("w.safetensors"));
  EXPECT_EQ(read(file("y.safetensors")), read(file("w.safetensors")));

  // Two answers to one question.
  const NamedTensor both[] = {named[0], named[1], again[1], again[2]};
  save_safetensors(file("both.safetensors"), both);
  expect_usage(base + file("both.safetensors"), "keep one");
  const NamedTensor ids_alone[] = {named[0], again[1]};
  save_safetensors(file("ids.safetensors"), ids_alone);
  expect_usage(base + file("ids.safetensors"), "come together");

  // What cannot be: said with the file, the tensor and what is needed.
  const NamedTensor flat[] = {
      {"hidden_states", Tensor::contiguous(x.data(), DType::kF32, {2 * hidden})}};
  save_safetensors(file("flat.safetensors"), flat);
  expect_usage(base + file("flat.safetensors"), "hidden_states has 1 dimensions");
  const NamedTensor bytes[] = {
      {"hidden_states", Tensor::contiguous(x.data(), DType::kI8, {2, hidden})}};
  save_safetensors(file("bytes.safetensors"), bytes);
  expect_usage(base + file("bytes.safetensors"), "hidden_states is I8");
  const NamedTensor short_logits[] = {named[0], {"router_logits", named[1].tensor.slice(0, 1)}};
  save_safetensors(file("short.safetensors"), short_logits);
  expect_usage(base + file("short.safetensors"), "router_logits is f32[1, ");
  const NamedTensor one_column[] = {named[0],
                                    {"topk_ids", Tensor::contiguous(ids.data, DType::kI32, {2, 1})},
                                    {"topk_weights", weights}};
  save_safetensors(file("column.safetensors"), one_column);
  expect_usage(base + file("column.safetensors"), "topk_ids is i32[2, 1]");

  const NamedTensor lonely[] = {{"router_logits", named[1].tensor}};
  save_safetensors(file("lonely.safetensors"), lonely);
  expect_usage(base + file("lonely.safetensors"), "hidden_states");
}

// The format does not ask a writer to align its tensors: a header of any length will do.
TEST_F(Cli, InputsNeedNotBeAligned) {
  const std::int64_t hidden = run_json("inspect " + kTiny)["layers"][0]["hidden"];
  std::string answers[2];
  for (const std::size_t shift : {0, 1}) {
    std::string header = "{\"hidden_states\":{\"dtype\":\"F32\",\"shape\":[2," +
                         std::to_string(hidden) + "],\"data_offsets\":[0," +
                         std::to_string(8 * hidden) + "]}}";
    while (header.size() % 8 != shift) header += ' ';
    std::vector<float> x(static_cast<std::size_t>(2 * hidden));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.01f * static_cast<float>(i % 89) - 0.4f;
    const std::uint64_t length = header.size();
    std::ofstream out(file("x.safetensors"), std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), 8) << header;
    out.write(reinterpret_cast<const char*>(x.data()), static_cast<std::streamsize>(4 * x.size()));
    out.close();
    run_json("run --checkpoint " + kTiny + " --layer 0 --input " + file("x.safetensors") +
             " --output " + file("y.safetensors"));
    answers[shift] = read(file("y.safetensors"));
  }
  EXPECT_EQ(answers[0], answers[1]);
}

// An id that is some expert's only after a cut to 32 bits is nobody's.
TEST_F(Cli, LongIdsAreNotCut) {
  using namespace moesaic;
  const json layer = run_json("inspect " + kTiny)["layers"][0];
  const std::int64_t hidden = layer["hidden"], top_k = layer["top_k"];
  const std::vector<float> x(static_cast<std::size_t>(hidden), 0.5f),
      w(static_cast<std::size_t>(top_k), 1.0f);
  std::vector<std::int64_t> ids(w.size(), (std::int64_t{1} << 32) + 3);
  const NamedTensor named[] = {
      {"hidden_states", Tensor::contiguous(x.data(), DType::kF32, {1, hidden})},
      {"topk_ids", Tensor::contiguous(ids.data(), DType::kI64, {1, top_k})},
      {"topk_weights", Tensor::contiguous(w.data(), DType::kF32, {1, top_k})}};
  save_safetensors(file("long.safetensors"), named);
  const std::string base = "run --checkpoint " + kTiny + " --layer 0 --input ";
  for (const char* format : {"standard", "sorted", "batched"}) {
    run_json(base + file("long.safetensors") + " --output " + file("none.safetensors") +
             " --format " + format);
    const TensorFile answer = TensorFile::open(file("none.safetensors"));
    for (std::int64_t h = 0; h < hidden; ++h)
      ASSERT_EQ(answer.tensor("output").as<float>()[h], 0) << format;
    EXPECT_EQ(answer.tensor("topk_ids").as<std::int32_t>()[0], -1);
  }
  const NamedTensor floats[] = {named[0], {"topk_ids", named[2].tensor}, named[2]};
  save_safetensors(file("floats.safetensors"), floats);
  expect_usage(base + file("floats.safetensors"), "topk_ids is f32");
}

TEST_F(Cli, NoTokensAreFine) {
  const json none = run_json("run --checkpoint " + kTiny + " --layer 0 --tokens 0");
  EXPECT_EQ(none["tokens"], 0);
}

TEST_F(Cli, QuantizedLayersRun) {
  for (const char* scheme : {"fp8_block", "int8_channel", "int4_w4a16+g32+zp", "mxfp4_w4a16"}) {
    const json made = run_json("quantize " + kTiny + " " + file("q.safetensors") +
                               " --layer 0 --scheme " + scheme);
    EXPECT_LT(made["bytes_after"].get<double>(), made["bytes_before"].get<double>());
    const json ran =
        run_json("run --checkpoint " + file("q.safetensors") + " --layer 0 --tokens 4");
    EXPECT_EQ(ran["scheme"], made["scheme"]);
    EXPECT_LE(ran["bound_ratio"].get<double>(), 1) << ran;
  }
}

// On a terminal (of its own): one line of progress that comes and goes, and bars of blocks.
TEST_F(Cli, ProgressAndBlocksOnATerminal) {
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, nullptr);
  ASSERT_GE(child, 0);
  if (child == 0) {
    setenv("LC_ALL", "C.UTF-8", 1);
    execl(MOESAIC_COMMAND, "moesaic", "run", "--checkpoint", kTiny.c_str(), "--layer", "0",
          "--tokens", "3", nullptr);
    _exit(127);
  }
  std::string seen;
  std::array<char, 4096> buffer;
  for (ssize_t n; (n = ::read(terminal, buffer.data(), buffer.size())) > 0;)
    seen.append(buffer.data(), static_cast<std::size_t>(n));
  int status = -1;
  waitpid(child, &status, 0);
  close(terminal);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << seen;
  EXPECT_NE(seen.find("\r\x1b[Kloading expert 16 of 16"), std::string::npos) << seen;
  EXPECT_NE(seen.find("\u2588"), std::string::npos) << seen;
  for (const char* part : {"16 experts", "bf16", "error", "time", "x the floor", "load per expert"})
    EXPECT_NE(seen.find(part), std::string::npos) << part;
}

TEST_F(Cli, NoColourAndNoProgressInAPipe) {
  for (const std::string& command :
       {std::string("info"), "run --checkpoint " + kTiny + " --layer 0", "inspect " + kTiny}) {
    const Result r = run(command);
    EXPECT_EQ(r.code, 0) << r.err;
    EXPECT_EQ(r.out.find('\x1b'), std::string::npos);
    EXPECT_EQ(r.err, "");
  }
}

}  // namespace
