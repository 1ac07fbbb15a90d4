// SPDX-License-Identifier: Apache-2.0
// `moesaic inspect`, `run` and `quantize` on a real checkpoint: tensors from files, on a terminal,
// in a pipe.
#include <pty.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cli_testing.h"
#include "moesaic/checkpoint.h"

namespace moesaic::testing {
namespace {

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

// An error of nothing is not a small error: what could not be compared is said.
TEST_F(Cli, NumbersThatAreNotFiniteAreCounted) {
  const json layer = run_json("inspect " + kTiny)["layers"][0];
  const std::int64_t hidden = layer["hidden"], top_k = layer["top_k"];
  ASSERT_EQ(hidden, 128);
  const std::string base =
      "run --checkpoint " + kTiny + " --layer 0 --input " + file("x.safetensors");
  std::vector<float> x(static_cast<std::size_t>(8 * hidden), 0.5f);
  const auto save = [&](std::vector<NamedTensor> more) {
    more.push_back({"hidden_states", Tensor::contiguous(x.data(), DType::kF32, {8, hidden})});
    save_safetensors(file("x.safetensors"), more);
  };
  x[0] = std::nanf("");
  save({});
  EXPECT_NE(run(base).out.find("8 tokens); 128 of 1024 outputs are NaN or Inf, as in float64\n"),
            std::string::npos)
      << run(base).out;
  const json some = run_json(base);
  EXPECT_EQ(some["not_finite"], 128);
  EXPECT_EQ(some["compared"], 1024 - 128);

  std::fill(x.begin(), x.end(), std::nanf(""));
  save({});
  EXPECT_NE(
      run(base).out.find("error    not measured: every output is NaN or Inf, as in float64\n"),
      std::string::npos)
      << run(base).out;
  EXPECT_EQ(run_json(base)["compared"], 0);

  std::fill(x.begin(), x.end(), 0.5f);
  const std::vector<std::int32_t> nobody(static_cast<std::size_t>(8 * top_k), -1);
  const std::vector<float> ones(nobody.size(), 1.0f);
  save({{"topk_ids", Tensor::contiguous(nobody.data(), DType::kI32, {8, top_k})},
        {"topk_weights", Tensor::contiguous(ones.data(), DType::kF32, {8, top_k})}});
  EXPECT_NE(run(base).out.find("error    not measured: no token goes to an expert"),
            std::string::npos)
      << run(base).out;
}

TEST_F(Cli, QuantizeNamesWeightsThatAreNotFinite) {
  fs::copy(kTiny, file("copy"));
  const TensorFile from = TensorFile::open(kTiny);
  std::vector<NamedTensor> tensors;
  std::vector<std::uint16_t> broken;
  const std::string name = "model.layers.1.mlp.experts.3.up_proj.weight";
  for (const StoredTensor& t : from.tensors()) {
    Tensor view = from.tensor(t.name);
    if (t.name == name) {
      broken.assign(view.as<std::uint16_t>(), view.as<std::uint16_t>() + view.numel());
      broken[5] = 0x7f80;  // Inf in bf16
      view.data = broken.data();
    }
    tensors.push_back({t.name, view});
  }
  ASSERT_FALSE(broken.empty());
  save_safetensors(file("copy/model.safetensors"), tensors);
  const std::string base = "quantize " + file("copy") + " " + file("q") + " --scheme bf16 --layer ";
  const Result whole = run(base + "0");
  EXPECT_EQ(whole.err, "");
  const Result warned = run(base + "1");
  EXPECT_EQ(warned.code, 0);
  EXPECT_EQ(warned.err, "moesaic: warning: tensor '" + name + "' holds NaN or Inf\n");
  EXPECT_EQ(run_json(base + "1")["not_finite"], json::array({name}));
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
    const std::string head = file("q.safetensors") + ": moesaic, layer 0\n";
    EXPECT_TRUE(
        run("run --checkpoint " + file("q.safetensors") + " --layer 0").out.starts_with(head));
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
}  // namespace moesaic::testing
