// SPDX-License-Identifier: Apache-2.0
// Times both products of a layer as a drop-in module calls them: grouped_gemm on unpacked weights
// and a caller's sorted lists, twice; each of them alone; and moesaic::experts on the same. A graph
// of several calls with their own routings, replayed; us per call, medians.
//
//   products_cuda_bench [shape] [bf16|fp8_block|int4_w4a16 ...] [block_rows or 0] [T ...]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "harness/data.h"
#include "moesaic/moesaic.h"

using namespace moesaic;

namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

struct ModelShape {
  const char* name;
  std::int64_t experts, top_k, hidden, intermediate;
};
constexpr ModelShape kShapes[] = {
    {"mixtral-8x7b", 8, 2, 4096, 14336},       {"qwen3-30b-a3b", 128, 8, 2048, 768},
    {"deepseek-v3-tp8", 256, 8, 7168, 256},    {"deepseek-v3-ep8", 32, 8, 7168, 2048},
    {"gpt-oss-120b-like", 128, 4, 2880, 2880}, {"qwen3-next-512", 512, 10, 2048, 512},
};

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

using Call = std::function<void(int, Stream)>;

class Replay {
 public:
  Replay(int calls, const Call& call) : calls_(calls) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (int i = 0; i < calls; ++i) call(i, {stream_});
    check(cudaStreamSynchronize(stream_));
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) call(i, {stream_});
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&exec_, graph, 0));
    check(cudaGraphDestroy(graph));
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
    once();
    times_.clear();
  }
  ~Replay() {
    check(cudaGraphExecDestroy(exec_));
    check(cudaStreamDestroy(stream_));
  }
  void once() {
    check(cudaEventRecord(begin_, stream_));
    check(cudaGraphLaunch(exec_, stream_));
    check(cudaEventRecord(end_, stream_));
    check(cudaEventSynchronize(end_));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin_, end_));
    times_.push_back(1000.0 * ms / calls_);
  }
  double median() {
    std::sort(times_.begin(), times_.end());
    return times_[times_.size() / 2];
  }

 private:
  int calls_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t begin_{}, end_{};
  std::vector<double> times_;
};

// Device memory that lives as long as the program.
void* take(std::int64_t bytes, unsigned mask = 0x80ffu, unsigned base = 0x3c00u) {
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<std::size_t>(bytes) + 256));
  static std::vector<std::uint16_t> host;
  host.resize(1 << 23);
  harness::Rng rng(static_cast<std::uint64_t>(bytes));
  for (std::size_t i = 0; i < host.size(); i += 4) {
    const std::uint64_t bits = rng.bits();
    for (int j = 0; j < 4; ++j)
      host[i + j] = static_cast<std::uint16_t>(base | ((bits >> (16 * j)) & mask));
  }
  for (std::int64_t at = 0; at < bytes; at += 1 << 24)
    check(cudaMemcpy(static_cast<char*>(data) + at, host.data(),
                     static_cast<std::size_t>(std::min<std::int64_t>(bytes - at, 1 << 24)),
                     cudaMemcpyHostToDevice));
  return data;
}
float* floats(std::int64_t count, float value) {
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<std::size_t>(count) * 4));
  std::vector<float> host(static_cast<std::size_t>(count), value);
  check(cudaMemcpy(data, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
  return static_cast<float*>(data);
}
Tensor dense(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return Tensor::contiguous(data, dtype, shape, kGpu);
}
Workspace workspace(std::size_t bytes) {  // as long-lived
  void* data = nullptr;
  check(cudaMalloc(&data, bytes + 256));
  return {data, bytes};
}

class Bench {
 public:
  Bench(const ModelShape& shape, Scheme scheme) : s_(shape), scheme_(scheme) {
    fc1_ = weights(2 * s_.intermediate, s_.hidden);
    fc2_ = weights(s_.hidden, s_.intermediate);
  }

  void run(std::int64_t tokens, std::int64_t block) {
    const int calls = tokens <= 64 ? 10 : tokens <= 128 ? 8 : tokens <= 1024 ? 4 : 2;
    if (block == 0) block = tokens <= s_.experts ? 16 : tokens <= 1024 ? 64 : 128;
    const std::int64_t slots = tokens * s_.top_k;
    const bool fp8 = scheme_ == Scheme::kFp8Block;
    const DType act = fp8 ? DType::kF8E4M3 : DType::kBF16;
    const unsigned mask = fp8 ? 0xbfbfu : 0x80ffu, base = fp8 ? 0u : 0x3c00u;
    const auto rows = [&](std::int64_t count, std::int64_t k) {
      return dense(take(count * k * 2, mask, base), act, {count, k});
    };
    const auto scale = [&](std::int64_t count, std::int64_t k) {
      return fp8 ? dense(floats(count * (k / 128), 1.0f / 64), DType::kF32, {count, k / 128})
                 : Tensor{};
    };
    const Tensor x = rows(tokens, s_.hidden), x_scale = scale(tokens, s_.hidden);
    const Tensor h = rows(slots, s_.intermediate), h_scale = scale(slots, s_.intermediate);
    const Tensor up =
        dense(take(slots * 2 * s_.intermediate * 2), DType::kBF16, {slots, 2 * s_.intermediate});
    const Tensor y = dense(take(slots * s_.hidden * 2), DType::kBF16, {slots, s_.hidden});
    const Tensor p = dense(floats(slots, 0.125f), DType::kF32, {slots});
    std::vector<SortedRows> lists;
    for (int i = 0; i < calls; ++i) lists.push_back(align_lists(route(tokens, i), tokens, block));
    GroupedGemmArgs one{
        .quant = quant(), .a = x, .a_scale = x_scale, .b = fc1_, .top_k = s_.top_k, .c = up};
    GroupedGemmArgs two{
        .quant = quant(), .a = h, .a_scale = h_scale, .b = fc2_, .row_weights = p, .c = y};
    one.sorted = two.sorted = lists[0];
    one.workspace = workspace(grouped_gemm_workspace_bytes(one));
    two.workspace = workspace(grouped_gemm_workspace_bytes(two));
    const auto product = [&](GroupedGemmArgs args, int i, Stream s) {
      args.sorted = lists[static_cast<std::size_t>(i)];
      args.stream = s;
      grouped_gemm(args);
    };
    LayerConfig config{.experts = s_.experts,
                       .hidden = s_.hidden,
                       .intermediate = s_.intermediate,
                       .top_k = s_.top_k,
                       .max_tokens = tokens,
                       .quant = quant(),
                       .input_dtype = act,
                       .output_dtype = DType::kBF16};
    const LayerWeights both{.fc1 = fc1_, .fc2 = fc2_};
    ExpertsArgs staged{
        .format = Format::kSorted, .rows = x, .row_scale = x_scale, .row_weights = p, .output = y};
    staged.workspace = workspace(
        stage_workspace_bytes(config, {Format::kSorted, tokens, lists[0].slots.shape[0], kGpu}));
    struct Row {
      std::string name;
      Call call;
    };
    std::vector<Row> list{{"both",
                           [&](int i, Stream s) {
                             product(one, i, s);
                             product(two, i, s);
                           }},
                          {"1st", [&](int i, Stream s) { product(one, i, s); }},
                          {"2nd", [&](int i, Stream s) { product(two, i, s); }},
                          {"experts", [&](int i, Stream s) {
                             ExpertsArgs args = staged;
                             args.sorted = lists[static_cast<std::size_t>(i)];
                             args.stream = s;
                             experts(config, both, args);
                           }}};
    // Rows between the products in the order of the lists, as some callers have them.
    const std::int64_t positions = lists[0].slots.shape[0];
    GroupedGemmArgs to_sorted = one, from_sorted = two;
    if (tokens >= 512) {
      to_sorted.c_order = from_sorted.a_order = RowOrder::kSorted;
      to_sorted.c = dense(take(positions * 2 * s_.intermediate * 2), DType::kBF16,
                          {positions, 2 * s_.intermediate});
      from_sorted.a = rows(positions, s_.intermediate);
      from_sorted.a_scale = scale(positions, s_.intermediate);
      list.push_back({"both, sorted between", [&](int i, Stream s) {
                        product(to_sorted, i, s);
                        product(from_sorted, i, s);
                      }});
    }
    std::vector<std::unique_ptr<Replay>> graphs;
    for (const Row& row : list) graphs.push_back(std::make_unique<Replay>(calls, row.call));
    const int rounds = tokens <= 128 ? 25 : 9;
    for (int r = 0; r < rounds; ++r)
      for (auto& g : graphs) g->once();
    std::printf("%s %s T=%lld block %lld:", s_.name, std::string(name(scheme_)).c_str(),
                static_cast<long long>(tokens), static_cast<long long>(block));
    for (std::size_t i = 0; i < list.size(); ++i)
      std::printf("%s %s %.2f", i ? "," : "", list[i].name.c_str(), graphs[i]->median());
    std::printf("\n");
    std::fflush(stdout);
    check(cudaDeviceSynchronize());
  }

 private:
  QuantSpec quant() const { return {.scheme = scheme_}; }
  GemmWeights weights(std::int64_t n, std::int64_t k) const {
    GemmWeights w;
    const std::int64_t e = s_.experts;
    if (scheme_ == Scheme::kBF16) {
      w.weight = dense(take(e * n * k * 2), DType::kBF16, {e, n, k});
    } else if (scheme_ == Scheme::kFp8Block) {
      w.weight = dense(take(e * n * k, 0xbfbf, 0), DType::kF8E4M3, {e, n, k});
      w.scale =
          dense(floats(e * (n / 128) * (k / 128), 1.0f / 64), DType::kF32, {e, n / 128, k / 128});
    } else {
      w.weight = dense(take(e * n * k / 2, 0xffff, 0), DType::kU8, {e, n, k / 2});
      w.scale = dense(floats(e * n * (k / 128), 1.0f / 64), DType::kF32, {e, n, k / 128});
    }
    return w;
  }
  std::int32_t* route(std::int64_t tokens, int seed) const {
    const std::int64_t k = s_.top_k;
    std::vector<std::int32_t> id(static_cast<std::size_t>(tokens * k));
    harness::Rng rng(static_cast<std::uint64_t>(seed * 7919 + tokens));
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t j = 0; j < k; ++j) {
        std::int32_t& mine = id[static_cast<std::size_t>(t * k + j)];
        do mine = static_cast<std::int32_t>(rng.below(s_.experts));
        while (std::find(&id[static_cast<std::size_t>(t * k)], &mine, mine) != &mine);
      }
    void* ids = nullptr;
    check(cudaMalloc(&ids, id.size() * 4));
    check(cudaMemcpy(ids, id.data(), id.size() * 4, cudaMemcpyHostToDevice));
    return static_cast<std::int32_t*>(ids);
  }
  SortedRows align_lists(std::int32_t* ids, std::int64_t tokens, std::int64_t block) const {
    const std::int64_t slots = tokens * s_.top_k;
    const std::int64_t capacity = align_capacity(slots, s_.experts, block);
    const auto ints = [](std::int64_t n) {
      return dense(workspace(static_cast<std::size_t>(n) * 4).data, DType::kI32, {n});
    };
    SortedRows rows{.slots = ints(capacity),
                    .block_experts = ints((capacity + block - 1) / block),
                    .num_padded = ints(1),
                    .block_rows = block};
    align({.topk_ids = dense(ids, DType::kI32, {tokens, s_.top_k}),
           .experts = s_.experts,
           .rows = rows,
           .workspace = workspace(align_workspace_bytes(slots, s_.experts, kGpu))});
    check(cudaDeviceSynchronize());
    return rows;
  }

  ModelShape s_;
  Scheme scheme_;
  GemmWeights fc1_, fc2_;
};

}  // namespace

int main(int argc, char** argv) try {
  std::string shape = "qwen3-30b-a3b";
  std::vector<Scheme> schemes;
  std::vector<std::int64_t> numbers;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a[0] >= '0' && a[0] <= '9')
      numbers.push_back(std::atoll(argv[i]));
    else if (a.find('-') != std::string::npos)
      shape = a;
    else
      schemes.push_back(parse_scheme(a));
  }
  if (schemes.empty()) schemes = {Scheme::kBF16, Scheme::kFp8Block, Scheme::kInt4W4A16};
  const std::int64_t block = numbers.empty() ? 0 : numbers[0];
  std::vector<std::int64_t> tokens(numbers.begin() + !numbers.empty(), numbers.end());
  if (tokens.empty()) tokens = {1, 4, 16, 128, 1024, 8192};
  for (const ModelShape& s : kShapes) {
    if (shape != s.name) continue;
    for (const Scheme scheme : schemes) {
      Bench bench(s, scheme);
      for (const std::int64_t t : tokens) bench.run(t, block);
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
