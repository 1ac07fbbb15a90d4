// SPDX-License-Identifier: Apache-2.0
// Where the moesaic command writes, and where it must not: over what it reads, or one result over
// the other.
#include <cstdint>
#include <string>
#include <vector>

#include "cli_testing.h"
#include "moesaic/checkpoint.h"

namespace moesaic::testing {
namespace {

TEST_F(Cli, WhereTheJsonCannotGoIsSaidBeforeTheWork) {
  expect_usage(
      "bench --shape 4,64,64,2 --tokens 1 --seconds 600 --json " + file("no/such/folder.json"),
      "--json");
  const std::string full =
      std::string(MOESAIC_COMMAND) + " info --json - >/dev/full 2>" + file("err");
  EXPECT_EQ(WEXITSTATUS(std::system(full.c_str())), 1);
  EXPECT_NE(read(file("err")).find("writ"), std::string::npos);
  const Result r = run("info --json /dev/full");
  EXPECT_EQ(r.code, 1);
  EXPECT_NE(r.err.find("moesaic: --json: '/dev/full': the result cannot be written"),
            std::string::npos)
      << r.err;
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

// Every file of a checkpoint is one: its settings and its index, too, and by whatever name.
TEST_F(Cli, NothingIsWrittenOverACheckpointsFiles) {
  const std::string copy = file("copy");
  fs::copy(kTiny, copy);
  json index{{"metadata", json::object()}, {"weight_map", json::object()}};
  const TensorFile weights = TensorFile::open(copy + "/model.safetensors");
  for (const StoredTensor& t : weights.tensors()) index["weight_map"][t.name] = "model.safetensors";
  std::ofstream(copy + "/model.safetensors.index.json") << index;
  fs::create_symlink(copy + "/config.json", file("link"));
  const std::vector<std::string> names{copy + "/config.json", copy + "/model.safetensors",
                                       copy + "/model.safetensors.index.json", file("link")};
  std::vector<std::string> before;
  for (const std::string& name : names) before.push_back(read(name));
  const std::string quantize = "quantize " + copy + " ", ran = "run --checkpoint " + copy;
  for (const std::string& name : names) {
    expect_usage(quantize + name + " --layer 0 --scheme int8_channel", "of the checkpoint");
    expect_usage(ran + " --layer 0 --tokens 1 --output " + name, "of the checkpoint");
    expect_usage(ran + " --layer 0 --tokens 1 --json " + name, "--json: '" + name + "' is a file");
    expect_usage("inspect " + copy + " --json " + name, "--json: '" + name + "' is a file");
    expect_usage(quantize + file("q") + " --layer 0 --scheme int8_channel --json " + name,
                 "--json: '" + name + "' is a file");
  }
  for (std::size_t i = 0; i < names.size(); ++i) EXPECT_EQ(read(names[i]), before[i]) << names[i];
  EXPECT_FALSE(fs::exists(file("q")));
}

TEST_F(Cli, OneResultIsNotWrittenOverTheOther) {
  const std::int64_t hidden = run_json("inspect " + kTiny)["layers"][0]["hidden"];
  const std::vector<float> x(static_cast<std::size_t>(hidden), 0.5f);
  const NamedTensor named[] = {
      {"hidden_states", Tensor::contiguous(x.data(), DType::kF32, {1, hidden})}};
  save_safetensors(file("in.safetensors"), named);
  const std::string before = read(file("in.safetensors"));
  const std::string ran = "run --checkpoint " + kTiny + " --layer 0 ";
  const std::string words = "is a file that this command reads or writes; name another";
  expect_usage(ran + "--input " + file("in.safetensors") + " --json " + file("in.safetensors"),
               words);
  EXPECT_EQ(read(file("in.safetensors")), before);
  expect_usage(ran + "--output " + file("one") + " --json " + file("./one"), words);
  expect_usage(
      "quantize " + kTiny + " " + file("one") + " --layer 0 --scheme bf16 --json " + file("one"),
      words);
  EXPECT_FALSE(fs::exists(file("one")));
}

}  // namespace
}  // namespace moesaic::testing
