// SPDX-License-Identifier: Apache-2.0
// Times the SM90 kernels alone: GEMM1 with SwiGLU, then GEMM2, as a layer launches them, by replay
// of a graph of several layers with different routings (so weights come from HBM), at the shapes
// that the project quotes. Prints the ratio to the floor: bytes of the active experts' weights
// over 3.14 TB/s, or operations over 800 (16-bit) / 1520 (e4m3) TFLOPS, whichever is longer.
//
//   gemm_sm90_bench [bf16|fp8_block|fp8_tensor][:moved|:gathered] [shape|all] [tile_rows or 0]
//                   [tactic1 tactic2] [T ...]
//
// moved: GEMM1's rows lie in the order of positions, as a layer brings them to wide tiles;
// gathered, the default: in the order of tokens.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/gemm.h"

using namespace moesaic;
using namespace moesaic::cuda;

namespace {

struct ModelShape {
  const char* name;
  std::int64_t experts, top_k, hidden, intermediate;
};
constexpr ModelShape kShapes[] = {
    {"mixtral-8x7b", 8, 2, 4096, 14336},       {"qwen3-30b-a3b", 128, 8, 2048, 768},
    {"deepseek-v3-tp8", 256, 8, 7168, 256},    {"deepseek-v3-ep8", 32, 8, 7168, 2048},
    {"gpt-oss-120b-like", 128, 4, 2880, 2880}, {"qwen3-next-512", 512, 10, 2048, 512},
};

__global__ void fill(unsigned char* out, std::size_t bytes, int fp8, unsigned seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < bytes / 2;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    // Sign, some exponents around one, random mantissas. e4m3: exponents 1 to 14.
    unsigned h;
    if (fp8)
      h = static_cast<unsigned>(x & 0xbfbf);
    else
      h = static_cast<unsigned>((x & 0x807f) | ((120 + (x >> 20) % 7) << 7));
    reinterpret_cast<unsigned short*>(out)[i] = static_cast<unsigned short>(h);
  }
}
__global__ void fill_floats(float* out, std::size_t count, float v) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x)
    out[i] = v;
}

void* take(std::size_t bytes) {
  void* p = nullptr;
  check_cuda(cudaMalloc(&p, bytes + 256), "cudaMalloc");
  return p;
}

struct Routing {
  Tile* tiles;
  std::int32_t *count, *slots;
  std::int64_t active = 0;
};

struct Options {
  std::string scheme = "bf16";
  std::int64_t tile_rows = 0;
  int tactic1 = -1, tactic2 = -1;
  bool moved = false;
};

class Bench {
 public:
  Bench(const ModelShape& shape, const Options& options)
      : s_(shape), o_(options), fp8_(o_.scheme != "bf16") {
    cudaDeviceProp p{};
    check_cuda(cudaGetDeviceProperties(&p, 0), "properties");
    device_ = {.sm_count = p.multiProcessorCount, .compute_capability = 90, .use_sm90 = true};
    const std::size_t bytes = fp8_ ? 1 : 2;
    w1_ = random(s_.experts * 2 * s_.intermediate * s_.hidden * bytes, 1);
    w2_ = random(s_.experts * s_.intermediate * s_.hidden * bytes, 2);
    check_cuda(cudaStreamCreate(&stream_), "stream");
    if (fp8_) {
      const std::size_t cells =
          s_.experts * (2 * s_.intermediate / 128 + 1) * (s_.hidden / 128 + 1);
      scale_ = floats(cells, 1.0f / 64);
      a_scale_ =
          floats(8192 * s_.top_k * (std::max(s_.hidden, s_.intermediate) / 128 + 1), 1.0f / 64);
    }
  }

  void run(std::int64_t tokens) {
    const std::int64_t slots = tokens * s_.top_k, bytes = fp8_ ? 1 : 2;
    WeightOperand fc1 = operand(w1_, 2 * s_.intermediate, s_.hidden),
                  fc2 = operand(w2_, s_.hidden, s_.intermediate);
    fc1.spec.gated = true;
    std::int64_t tile =
        o_.tile_rows ? o_.tile_rows : family_sm90().tile_rows(fc1.spec, slots, device_);
    const int reps = tokens >= 2048 ? 2 : tokens >= 128 ? 4 : 12;
    const std::int64_t x_rows = o_.moved ? slots : tokens;
    void* x = random(x_rows * s_.hidden * bytes, 3);
    void* h = take(slots * s_.intermediate * 2);
    check_cuda(cudaMemset(h, 0x31, slots * s_.intermediate * 2), "memset");
    void* y = take(slots * s_.hidden * 2);
    std::vector<Routing> routings;
    double active = 0;
    for (int r = 0; r < reps; ++r) {
      routings.push_back(route(tokens, tile, r));
      active += static_cast<double>(routings.back().active) / reps;
    }
    const Device on{DeviceType::kCuda, 0};
    ActivationSpec swiglu{};
    const DType dtype = fp8_ ? DType::kF8E4M3 : DType::kBF16;
    const auto layer = [&](int r, int which) {
      GemmStage g;
      g.rows = {.tiles = routings[r].tiles,
                .num_tiles = routings[r].count,
                .row_slot = routings[r].slots,
                .max_tiles = max_tiles(slots, s_.experts, tile),
                .tile_rows = tile,
                .positions = slots,
                .slot_count = slots};
      if (which & 1) {
        g.a = Tensor::contiguous(x, dtype, {x_rows, s_.hidden}, on);
        g.a_row = o_.moved ? RowOf::kPosition : RowOf::kToken;
        g.top_k = s_.top_k;
        g.b = &fc1;
        g.activation = &swiglu;
        g.c = Tensor::contiguous(h, DType::kBF16, {slots, s_.intermediate}, on);
        g.tactic = o_.tactic1;
        scales(g, s_.hidden);
        family_sm90().run(g, device_, stream_);
      }
      if (which & 2) {
        g.list_age = ListAge::kSettled;
        g.a = Tensor::contiguous(h, dtype, {slots, s_.intermediate}, on);
        g.a_row = RowOf::kPosition;
        g.b = &fc2;
        g.activation = nullptr;
        g.c = Tensor::contiguous(y, DType::kBF16, {slots, s_.hidden}, on);
        g.tactic = o_.tactic2;
        scales(g, s_.intermediate);
        family_sm90().run(g, device_, stream_);
      }
    };
    double ms[4];
    for (int which = 1; which <= 3; ++which) {
      cudaGraph_t graph;
      cudaGraphExec_t exec;
      check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), "capture");
      for (int r = 0; r < reps; ++r) layer(r, which);
      check_cuda(cudaStreamEndCapture(stream_, &graph), "capture");
      check_cuda(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
      cudaEvent_t a, b;
      cudaEventCreate(&a);
      cudaEventCreate(&b);
      std::vector<float> times;
      for (int i = 0; i < 9; ++i) {
        cudaEventRecord(a, stream_);
        check_cuda(cudaGraphLaunch(exec, stream_), "launch");
        cudaEventRecord(b, stream_);
        check_cuda(cudaEventSynchronize(b), "run");
        float t;
        cudaEventElapsedTime(&t, a, b);
        if (i >= 2) times.push_back(t / reps);
      }
      std::sort(times.begin(), times.end());
      ms[which] = times[times.size() / 2];
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    }
    const double read = active * 3 * s_.hidden * s_.intermediate * bytes;
    const double work = 6.0 * slots * s_.hidden * s_.intermediate;
    const double floor = std::max(read / 3.14e12, work / (fp8_ ? 1520e12 : 800e12)) * 1e3;
    std::printf(
        "%-18s %-10s %s T=%-5lld tile %-3lld t%d,%d  %8.4f ms  ratio %.3f  "
        "(gemm1 %.4f + gemm2 %.4f)  %6.0f TFLOPS %6.0f GB/s\n",
        s_.name, o_.scheme.c_str(), o_.moved ? "moved" : "gathered",
        static_cast<long long>(tokens), static_cast<long long>(tile),
        o_.tactic1, o_.tactic2, ms[3], ms[3] / floor, ms[1], ms[2], work / ms[3] * 1e-9,
        read / ms[3] * 1e-6);
    std::fflush(stdout);
    for (const Routing& r : routings) {
      cudaFree(r.tiles);
      cudaFree(r.count);
      cudaFree(r.slots);
    }
    cudaFree(x);
    cudaFree(h);
    cudaFree(y);
  }
  ~Bench() {
    cudaFree(w1_);
    cudaFree(w2_);
    cudaFree(scale_);
    cudaFree(a_scale_);
  }

 private:
  void* random(std::size_t bytes, unsigned seed) {
    void* p = take(bytes);
    fill<<<1024, 256>>>(static_cast<unsigned char*>(p), bytes, fp8_, seed);
    check_cuda(cudaDeviceSynchronize(), "fill");
    return p;
  }
  float* floats(std::size_t count, float v) {
    auto* p = static_cast<float*>(take(count * 4));
    fill_floats<<<256, 256>>>(p, count, v);
    return p;
  }
  WeightOperand operand(void* w, std::int64_t n, std::int64_t k) {
    WeightOperand b{};
    const Device on{DeviceType::kCuda, 0};
    b.spec.format = fp8_ ? WeightFormat::kE4M3 : WeightFormat::kBF16;
    b.spec.act = fp8_ ? ActFormat::kE4M3 : ActFormat::k16;
    b.spec.act_dtype = fp8_ ? DType::kF8E4M3 : DType::kBF16;
    b.spec.experts = s_.experts;
    b.spec.n = n;
    b.spec.k = k;
    b.spec.scale = {.has_scale = fp8_, .group_n = n, .group_k = k};
    b.plain.weight = Tensor::contiguous(w, b.spec.act_dtype, {s_.experts, n, k}, on);
    if (o_.scheme == "fp8_block") {
      b.spec.act_scale = ActScale::kGroup;
      b.spec.act_group = 128;
      b.spec.scale = {.has_scale = true,
                      .group_n = 128,
                      .group_k = 128,
                      .grid_n = (n + 127) / 128,
                      .grid_k = (k + 127) / 128};
      b.plain.scale = Tensor::contiguous(
          scale_, DType::kF32, {s_.experts, b.spec.scale.grid_n, b.spec.scale.grid_k}, on);
    } else if (fp8_) {
      b.spec.act_scale = ActScale::kTensorDynamic;
      b.plain.scale = Tensor::contiguous(scale_, DType::kF32, {s_.experts}, on);
    }
    return b;
  }
  void scales(GemmStage& g, std::int64_t k) {
    if (o_.scheme == "fp8_block")
      g.a_scale = {a_scale_, (k + 127) / 128, 1, 0};
    else if (fp8_)
      g.a_scale = {a_scale_, 0, 0, 0};
  }
  Routing route(std::int64_t tokens, std::int64_t tile, int seed) {
    std::mt19937 random(static_cast<unsigned>(seed * 7919 + tokens));
    std::vector<std::vector<std::int32_t>> of(s_.experts);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<int> ids;
      while (static_cast<std::int64_t>(ids.size()) < s_.top_k) {
        const int e = static_cast<int>(random() % static_cast<unsigned>(s_.experts));
        if (std::find(ids.begin(), ids.end(), e) == ids.end()) {
          of[e].push_back(static_cast<std::int32_t>(t * s_.top_k + ids.size()));
          ids.push_back(e);
        }
      }
    }
    std::vector<Tile> tiles;
    std::vector<std::int32_t> slots;
    Routing r{};
    for (std::int64_t e = 0; e < s_.experts; ++e) {
      const auto rows = static_cast<std::int64_t>(of[e].size());
      r.active += rows > 0;
      for (std::int64_t first = 0; first < rows; first += tile) {
        tiles.push_back({static_cast<std::int32_t>(e),
                         static_cast<std::int32_t>(std::min(tile, rows - first)),
                         static_cast<std::int64_t>(slots.size()) + first});
      }
      slots.insert(slots.end(), of[e].begin(), of[e].end());
    }
    const auto count = static_cast<std::int32_t>(tiles.size());
    tiles.resize(max_tiles(tokens * s_.top_k, s_.experts, tile));
    r.tiles = static_cast<Tile*>(take(tiles.size() * sizeof(Tile)));
    r.count = static_cast<std::int32_t*>(take(4));
    r.slots = static_cast<std::int32_t*>(take(slots.size() * 4));
    cudaMemcpy(r.tiles, tiles.data(), tiles.size() * sizeof(Tile), cudaMemcpyHostToDevice);
    cudaMemcpy(r.count, &count, 4, cudaMemcpyHostToDevice);
    cudaMemcpy(r.slots, slots.data(), slots.size() * 4, cudaMemcpyHostToDevice);
    return r;
  }

  ModelShape s_;
  Options o_;
  bool fp8_;
  DeviceTraits device_;
  void *w1_, *w2_;
  float *scale_ = nullptr, *a_scale_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace

int main(int argc, char** argv) try {
  Options options;
  if (argc > 1) options.scheme = argv[1];
  if (const std::size_t colon = options.scheme.find(':'); colon != std::string::npos) {
    options.moved = options.scheme.substr(colon) == ":moved";
    options.scheme.resize(colon);
  }
  const std::string only = argc > 2 ? argv[2] : "all";
  if (argc > 3) options.tile_rows = std::atoll(argv[3]);
  if (argc > 5) {
    options.tactic1 = std::atoi(argv[4]);
    options.tactic2 = std::atoi(argv[5]);
  }
  std::vector<std::int64_t> tokens;
  for (int i = 6; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  if (tokens.empty()) tokens = {1, 4, 16, 128, 1024, 8192};
  for (const ModelShape& shape : kShapes) {
    if (only != "all" && only != shape.name) continue;
    Bench bench(shape, options);
    for (const std::int64_t t : tokens) bench.run(t);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
