// SPDX-License-Identifier: Apache-2.0
// The SM90 weight-only kernels: every format and granularity against float64, and the same bits
// from every tactic, tile and layout.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>

#include "cuda/rearrange.h"
#include "product.h"
#include "product_timing.h"

namespace moesaic::test {
namespace {

ActivationSpec swiglu(GateOrder order = GateOrder::kGateFirst,
                      GateLayout layout = GateLayout::kHalves) {
  return {.kind = Activation::kSwiglu, .order = order, .layout = layout};
}

// Every format at every granularity of its scales. K ends inside a stage and inside a group.
// MOESAIC_TEST_OPERANDS: only these, by name, each followed by a comma.
std::vector<ProductCase> operand_cases() {
  using enum WeightFormat;
  std::vector<ProductCase> cases;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    const std::string suffix = dtype == DType::kBF16 ? " bf16" : " f16";
    const ProductCase base{.act_dtype = dtype, .k = 352};
    const auto add = [&](const std::string& name, WeightFormat format, Scales scales,
                         std::int64_t group, bool zeros, std::int64_t group_n = 128) {
      ProductCase c = base;
      c.name = name + suffix, c.format = format, c.scales = scales, c.zero_points = zeros;
      c.group_k = group, c.group_n = group_n;
      cases.push_back(c);
    };
    for (const bool zeros : {false, true}) {
      for (const std::int64_t group : {32, 64, 96, 128, 256, 352}) {
        const std::string name = " g" + std::to_string(group) + (zeros ? " zeros" : "");
        add("int4" + name, kU4, Scales::kGroup, group, zeros);
        add("uint8" + name, kU8, Scales::kGroup, group, zeros);
      }
    }
    add("int8 channel", kI8, Scales::kChannel, 0, false);
    for (const Scales scales : {Scales::kTensor, Scales::kHalves, Scales::kChannel})
      add("fp8_w8a16", kE4M3, scales, 0, false);
    add("fp8_w8a16 block", kE4M3, Scales::kBlock, 128, false);
    add("fp8_w8a16 block 64 x 96", kE4M3, Scales::kBlock, 64, false, 96);
  }
  if (const char* only = std::getenv("MOESAIC_TEST_OPERANDS")) {
    std::erase_if(cases, [&](const ProductCase& c) {
      return std::string(only).find(c.name + ",") == std::string::npos;
    });
  }
  return cases;
}

class GemmSm90Dequant : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!have_device() || device_traits().compute_capability != 90)
      GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  }
  static int failures() {
    return ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
  }

  // All tactics and several tilings: right, and the same bits.
  void check(const ProductCase& c) {
    const cuda::GemmFamily& family = cuda::family_sm90_dequant();
    Product product(c);
    ASSERT_TRUE(family.supports(product.spec())) << c.name;
    const auto tactics = family.tactics(product.spec(), device_traits());
    ASSERT_GE(tactics.size(), 3u);
    const int before = failures();
    const auto first = product.run(family, -1, 16, 16);
    check_tactics(c, product, tactics, first);
    if (c.format != WeightFormat::kU4 || failures() > before) return;
    product.pack(cuda::Arrangement::kRearranged);
    ASSERT_EQ(product.arrangement(), cuda::Arrangement::kRearranged);
    EXPECT_TRUE(product.run(family, -1, 16, 16) == first) << c.name << ": packed differs";
    check_tactics(c, product, tactics, first);
  }

  static void check_tactics(const ProductCase& c, Product& product,
                            const std::vector<Tactic>& tactics,
                            const std::vector<std::uint8_t>& first) {
    const cuda::GemmFamily& family = cuda::family_sm90_dequant();
    const int before = failures();
    for (const Tactic& tactic : tactics) {
      if (failures() > before) return;  // one report per case
      for (const auto& [tile_rows, live] :
           {std::pair<std::int64_t, std::int64_t>{128, 128}, {64, 40}, {8, 1}}) {
        EXPECT_TRUE(product.run(family, tactic.id, tile_rows, live) == first)
            << c.name << ": " << tactic.description << " over tiles of " << live << " rows differs";
      }
    }
  }
};

TEST_F(GemmSm90Dequant, EveryFormatAgainstFloat64) {
  unsigned seed = 1;
  for (ProductCase c : operand_cases()) {
    c.seed = ++seed;
    check(c);
  }
}

TEST_F(GemmSm90Dequant, EveryActivationInEveryLayout) {
  unsigned seed = 100;
  for (int kind = 0; kind < kNumActivations; ++kind) {
    for (const GateOrder order : {GateOrder::kGateFirst, GateOrder::kUpFirst}) {
      for (const GateLayout layout : {GateLayout::kHalves, GateLayout::kInterleaved}) {
        ProductCase c{.name = "activation " + std::to_string(kind), .format = WeightFormat::kU4};
        c.activation =
            ActivationSpec{.kind = static_cast<Activation>(kind), .order = order, .layout = layout};
        if (!is_gated(c.activation->kind) &&
            (order != GateOrder::kGateFirst || layout != GateLayout::kHalves))
          continue;
        c.scales = Scales::kGroup, c.group_k = 64, c.zero_points = true;
        c.activation->limit = 1.5f;
        c.per_expert_terms = kind % 2 == 1;
        c.bias = DType::kF32;
        c.n = 144, c.k = 192, c.seed = ++seed;
        check(c);
      }
    }
  }
}

TEST_F(GemmSm90Dequant, LayoutsBiasesAndStrides) {
  unsigned seed = 200;
  const auto operands = operand_cases();
  for (const Layout layout : {Layout::kSortedPadded, Layout::kCompact, Layout::kBatched}) {
    for (const DType c_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const bool transposed : {false, true}) {
        ProductCase c = operands[seed * 7 % operands.size()];
        c.name += ", layout " + std::to_string(static_cast<int>(layout));
        c.layout = layout;
        c.c_dtype = c_dtype, c.c_transposed = transposed, c.c_padding = seed % 3 * 3;
        c.bias = seed % 3 == 0 ? DType::kF32 : seed % 3 == 1 ? DType::kF16 : DType::kBF16;
        c.row_weights = layout != Layout::kBatched;
        c.alpha = seed % 2;
        c.a_padding = seed % 4 * 8, c.w_padding = seed % 2 * 16;
        if (seed % 2) c.activation = swiglu();
        c.n = seed % 2 ? 16 * (9 + seed % 7) : 190 + 2 * (seed % 7);
        c.seed = ++seed;
        check(c);
      }
    }
  }
}

TEST_F(GemmSm90Dequant, RandomShapes) {
  const char* wanted = std::getenv("MOESAIC_TEST_SEED");
  std::mt19937 random(wanted ? static_cast<unsigned>(std::atoi(wanted)) : std::random_device{}());
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const auto operands = operand_cases();
  const char* rounds = std::getenv("MOESAIC_TEST_ROUNDS");
  for (int i = 0; i < (rounds ? std::atoi(rounds) : 40); ++i) {
    ProductCase c = operands[pick(0, static_cast<std::int64_t>(operands.size()) - 1)];
    c.seed = static_cast<unsigned>(random());
    c.experts = pick(1, 9), c.tokens = pick(1, pick(0, 3) ? 90 : 400), c.top_k = pick(1, 4);
    c.n = 16 * pick(1, 40), c.k = 32 * pick(1, 30);
    if (c.scales == Scales::kGroup || c.scales == Scales::kBlock) {
      c.group_k = std::min<std::int64_t>(pick(0, 1) ? 128 * pick(1, 2) : 32 * pick(1, 4), c.k);
      c.group_n = 8 * pick(1, 20);
    }
    c.layout = static_cast<Layout>(pick(0, 2));
    c.c_dtype = pick(0, 1) ? c.act_dtype : DType::kF32;
    if (pick(0, 1))
      c.activation =
          swiglu(static_cast<GateOrder>(pick(0, 1)), static_cast<GateLayout>(pick(0, 1)));
    else
      c.n -= 2 * pick(0, 7);
    SCOPED_TRACE(c.name + " seed " + std::to_string(c.seed) + " n " + std::to_string(c.n) + " k " +
                 std::to_string(c.k) + " group " + std::to_string(c.group_k));
    check(c);
  }
}

// Wide copies the scales of four stages at once, into places of their own: K of one such copy with
// its end inside the last stage; of five, with and without that; and 17 groups, which no copy of 16
// bytes fits. Every CTA gets several tasks, and the first ones of the list, of which there is one
// stage and no scales, belong to no expert.
TEST_F(GemmSm90Dequant, ScalesOfFourStages) {
  constexpr int kWide = 2;
  const cuda::GemmFamily& family = cuda::family_sm90_dequant();
  unsigned seed = 400;
  for (const bool zeros : {false, true}) {
    for (const std::int64_t k : {480, 2176, 2464, 2560}) {
      ProductCase c{.name = "int4 k " + std::to_string(k) + (zeros ? " zeros" : "")};
      c.format = WeightFormat::kU4, c.scales = Scales::kGroup, c.group_k = 128;
      c.zero_points = zeros;
      c.tokens = 60, c.n = 400, c.k = k, c.seed = ++seed;
      Product product(c);
      ASSERT_TRUE(family.supports(product.spec())) << c.name;
      const auto first = product.run(family, -1, 16, 16);
      product.pack(cuda::Arrangement::kRearranged);
      ASSERT_EQ(product.arrangement(), cuda::Arrangement::kRearranged);
      EXPECT_TRUE(product.run(family, -1, 16, 16) == first) << c.name << ": packed differs";
      for (const auto& [tile_rows, live] :
           {std::pair<std::int64_t, std::int64_t>{8, 1}, {128, 112}}) {
        EXPECT_TRUE(product.run(family, kWide, tile_rows, live) == first)
            << c.name << " over tiles of " << live << " rows differs";
      }
    }
  }
}

// Many tasks, dealt out by a counter: each one once, to the bits of tasks that come in turn.
TEST_F(GemmSm90Dequant, TasksDealtOut) {
  const cuda::GemmFamily& family = cuda::family_sm90_dequant();
  for (const std::int64_t k : {256, 1024}) {  // in runs, and alone
    ProductCase c{.name = "int4 k " + std::to_string(k)};
    c.format = WeightFormat::kU4, c.scales = Scales::kGroup, c.group_k = 128;
    c.experts = 8, c.tokens = 100, c.top_k = 2, c.n = k == 256 ? 9600 : 4112, c.k = k;
    c.seed = std::random_device{}();
    SCOPED_TRACE(c.name + " seed " + std::to_string(c.seed));
    Product product(c);
    product.pack(cuda::Arrangement::kRearranged);
    const auto in_turn = product.run(family, -1, 16, 4);
    EXPECT_EQ(product.tasks_dealt(), 0);
    product.deal_tasks();
    // Whoever begins a task asks once for another: the counter ends at the number of tasks.
    std::set<std::int32_t> dealt;
    for (int i = 0; i < 3; ++i) {
      EXPECT_TRUE(product.run(family, -1, 16, 4) == in_turn);
      dealt.insert(product.tasks_dealt());
    }
    EXPECT_EQ(dealt.size(), 1u);
    EXPECT_GT(*dealt.begin(), 800);
  }
}

// A caller's scales in rows with gaps, which are NaN, at every alignment of their copies.
TEST_F(GemmSm90Dequant, ScalesInRowsWithGaps) {
  std::random_device seeds;
  for (const std::int64_t padding : {1, 2, 3}) {
    ProductCase c{.name = "int4, padding " + std::to_string(padding)};
    c.format = WeightFormat::kU4, c.scales = Scales::kGroup, c.group_k = 128;
    c.zero_points = padding == 2;
    c.k = 2176, c.scale_padding = padding, c.seed = seeds();
    SCOPED_TRACE(c.name + " seed " + std::to_string(c.seed));
    check(c);
  }
}

// --- a layer's own 4-bit weights
WeightSpec u4_spec(std::int64_t experts, std::int64_t rows, std::int64_t row_bytes) {
  WeightSpec spec;
  spec.format = WeightFormat::kU4;
  spec.experts = experts, spec.n = rows, spec.k = 2 * row_bytes;
  spec.scale = {.has_scale = true, .group_n = 1, .group_k = spec.k, .grid_n = rows, .grid_k = 1};
  return spec;
}

// They lie as rearrange.h says, and come back as they were given: loaded in any order, one twice,
// from host and device, dense and not, and read back to the same.
TEST_F(GemmSm90Dequant, RearrangedWeightsComeBack) {
  constexpr std::int64_t kExperts = 4, kRows = 40, kRowBytes = 48, kPitch = 80;
  constexpr Device kCpu{}, kGpu{DeviceType::kCuda, 0};
  const auto packed = cuda::make_cuda_weights(u4_spec(kExperts, kRows, kRowBytes), device_traits(),
                                              cuda::Arrangement::kRearranged);
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const std::vector<float> scale(kRows, 1.0f);
  const Buffer scale_there = upload(scale);
  std::vector<std::vector<std::uint8_t>> given(kExperts);  // the last of each, dense
  // Expert e from rows `pitch` apart, on the device where its number is odd.
  const auto load = [&](std::int64_t e, std::int64_t pitch) {
    std::vector<std::uint8_t> rows(kRows * pitch);
    for (auto& byte : rows) byte = static_cast<std::uint8_t>(random());
    given[e].clear();
    for (std::int64_t row = 0; row < kRows; ++row)
      given[e].insert(given[e].end(), &rows[row * pitch], &rows[row * pitch] + kRowBytes);
    const Buffer there = upload(rows);
    GemmWeights one;
    one.weight = Tensor::contiguous(e % 2 ? there->data() : rows.data(), DType::kU8,
                                    {1, kRows, pitch}, e % 2 ? kGpu : kCpu);
    one.weight.shape[2] = kRowBytes;
    one.scale = Tensor::contiguous(scale_there->data(), DType::kF32, {1, kRows, 1}, kGpu);
    packed->load(e, one);
  };
  load(3, kPitch), load(2, kPitch), load(1, kRowBytes), load(0, kRowBytes), load(3, kPitch);

  for (std::int64_t e = 0; e < kExperts; ++e) {
    std::vector<std::uint8_t> held(kRows * kRowBytes), expected(kRows * kRowBytes);
    cuda_ok(cudaMemcpy(held.data(), packed->view().weight.slice(e, 1).data, held.size(),
                       cudaMemcpyDeviceToHost));
    for (std::size_t at = 0; at < held.size(); at += 16) {
      std::uint32_t plain[4], words[4];
      std::memcpy(plain, &given[e][at], 16);
      cuda::rearrange(plain, words);
      std::memcpy(&expected[at], words, 16);
    }
    EXPECT_EQ(held, expected) << "expert " << e;
    // In place where rows are dense and begin at a multiple of 16 bytes, by way of a copy else.
    for (const std::int64_t pitch : {kRowBytes, kPitch}) {
      for (const std::int64_t offset : {0, 8}) {
        for (const Device device : {kCpu, kGpu}) {
          const std::vector<std::uint8_t> poison(kRows * pitch + 16, 0xfb);
          std::vector<std::uint8_t> back = poison, wanted = poison;
          const Buffer there = upload(poison);
          void* const memory = device == kCpu ? back.data() : there->data();
          Tensor to = Tensor::contiguous(static_cast<char*>(memory) + offset, DType::kU8,
                                         {1, kRows, pitch}, device);
          to.shape[2] = kRowBytes;
          packed->unpack(e, to);
          if (device == kGpu) back = there->read();
          for (std::int64_t row = 0; row < kRows; ++row) {
            std::memcpy(&wanted[offset + row * pitch], &given[e][row * kRowBytes], kRowBytes);
          }
          EXPECT_EQ(back, wanted) << "expert " << e << ", rows " << pitch << " apart, offset "
                                  << offset << ", " << to_string(device);
        }
      }
    }
  }
}

TEST_F(GemmSm90Dequant, RearrangedWeightsAreRefusedWhereNobodyKnowsThem) {
  const auto make = [](const WeightSpec& spec, cuda::Arrangement arrangement) {
    return cuda::make_cuda_weights(spec, device_traits(), arrangement);
  };
  const WeightSpec cut_off = u4_spec(2, 16, 24);
  WeightSpec bytes = u4_spec(2, 16, 32);
  bytes.format = WeightFormat::kI8;
  for (const WeightSpec& spec : {cut_off, bytes}) {
    EXPECT_THROW(make(spec, cuda::Arrangement::kRearranged), Error);
    EXPECT_NO_THROW(make(spec, cuda::Arrangement::kPlain));
  }
  const ProductCase c{.name = "int4",
                      .format = WeightFormat::kU4,
                      .scales = Scales::kGroup,
                      .group_k = 128,
                      .k = 352,
                      .seed = std::random_device{}()};
  Product plain(c), rearranged(c);
  plain.pack(cuda::Arrangement::kPlain);
  plain.run(cuda::family_sm80(), -1, 16, 16);  // the numbers of a layer's plain copy
  rearranged.pack(cuda::Arrangement::kRearranged);
  EXPECT_THROW(rearranged.run(cuda::family_sm80(), -1, 16, 16), Error);
}

constexpr TimedShape kShapes[] = {{"mixtral-8x7b", 8, 4096, 14336, 2},
                                  {"qwen3-30b-a3b", 128, 2048, 768, 8},
                                  {"deepseek-v3-tp8", 256, 7168, 256, 8},
                                  {"qwen3-next-512", 512, 2048, 512, 10}};

// Not tests. MOESAIC_TIMING: "shape format tokens [tile_rows [tactic]]; ...", shape an index of the
// above, format u4, e4m3 or i8, tactic -2 the SM80 family. The first prints what GEMM1 and GEMM2
// take, the second runs GEMM1 for a profiler.
struct Timed {
  int shape = 0, tactic = -1;
  std::int64_t tokens = 0, rows = 0;
  std::string format;
  WeightFormat weights() const {
    return format == "u4"   ? WeightFormat::kU4
           : format == "i8" ? WeightFormat::kI8
                            : WeightFormat::kE4M3;
  }
};
std::vector<Timed> timed() {
  const char* wanted = std::getenv("MOESAIC_TIMING");
  std::istringstream lines(wanted ? wanted : "");
  std::vector<Timed> out;
  for (std::string line; std::getline(lines, line, ';');) {
    std::istringstream words(line);
    Timed t;
    if (!(words >> t.shape >> t.format >> t.tokens)) continue;
    words >> t.rows >> t.tactic;
    out.push_back(t);
  }
  return out;
}

TEST_F(GemmSm90Dequant, DISABLED_Timing) {
  std::unique_ptr<TimedLayer> layer;
  std::string made;
  for (Timed t : timed()) {
    const TimedShape& shape = kShapes[t.shape];
    if (shape.name + t.format != made) {
      layer.reset();
      layer = std::make_unique<TimedLayer>(shape, t.weights());
      made = shape.name + t.format;
    }
    const cuda::GemmFamily& family =
        t.tactic == -2 ? cuda::family_sm80() : cuda::family_sm90_dequant();
    if (t.rows == 0)
      t.rows = family.tile_rows(layer->fc1(), t.tokens * shape.top_k, layer->traits());
    const int forced = t.tactic == -2 ? -1 : t.tactic;
    // As the layer hands them over (without the copy that puts them so).
    const RowOf input =
        t.rows >= 64 && shape.intermediate >= 2048 ? RowOf::kPosition : RowOf::kToken;
    const auto ms = layer->time(family, t.tokens, t.rows, forced, forced, input);
    std::printf("%-16s %-4s T=%-5ld rows %-3ld tactic %2d  %8.4f ms  ratio %.3f  (%.4f + %.4f)\n",
                shape.name, t.format.c_str(), static_cast<long>(t.tokens),
                static_cast<long>(t.rows), t.tactic, ms.both, ms.both / ms.floor, ms.gemm1,
                ms.gemm2);
    std::fflush(stdout);
  }
}

TEST_F(GemmSm90Dequant, DISABLED_Profile) {
  for (Timed t : timed()) {
    TimedLayer layer(kShapes[t.shape], t.weights());
    const cuda::GemmFamily& family = cuda::family_sm90_dequant();
    if (t.rows == 0)
      t.rows = family.tile_rows(layer.fc1(), t.tokens * kShapes[t.shape].top_k, layer.traits());
    layer.once(family, static_cast<int>(t.tokens), t.rows, t.tactic);
  }
}

}  // namespace
}  // namespace moesaic::test
