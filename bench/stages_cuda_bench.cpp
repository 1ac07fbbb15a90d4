// SPDX-License-Identifier: Apache-2.0
// Times the CUDA stages around the products, each alone: a graph of many launches of one stage on
// one stream, replayed; the time of a launch is the replay's over their number, boundaries between
// dependent launches included, as a layer pays them. Medians of 20 replays. Link with the library's
// objects.
//
//   stages_cuda_bench [experts hidden intermediate top_k] (default qwen3-30b-a3b: 128 2048 768 8)
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "backend.h"
#include "harness/data.h"

using namespace moesaic;

namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};
constexpr int kLaunches = 50, kReplays = 20;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

// Microseconds per launch.
double time_of(const std::function<void(Stream)>& launch) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) launch({stream});
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kReplays + 3; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(exec, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  return 1000.0 * times[times.size() / 2] / kLaunches;
}

// Device memory that lives as long as the program; random bytes of small bf16 numbers.
void* take(std::int64_t bytes, bool random = true) {
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<std::size_t>(bytes) + 256));
  if (!random) return data;
  std::vector<std::uint16_t> host(
      static_cast<std::size_t>(std::min<std::int64_t>(bytes, 1 << 24)) / 2 + 1);
  harness::Rng rng(static_cast<std::uint64_t>(bytes));
  for (std::uint16_t& h : host) h = static_cast<std::uint16_t>(0x3f00u | (rng.bits() & 0x80ffu));
  for (std::int64_t at = 0; at < bytes; at += 1 << 24)
    check(cudaMemcpy(static_cast<char*>(data) + at, host.data(),
                     static_cast<std::size_t>(std::min<std::int64_t>(bytes - at, 1 << 24)),
                     cudaMemcpyHostToDevice));
  return data;
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t experts = argc > 4 ? std::atoll(argv[1]) : 128,
                     hidden = argc > 4 ? std::atoll(argv[2]) : 2048;
  const std::int64_t intermediate = argc > 4 ? std::atoll(argv[3]) : 768,
                     top_k = argc > 4 ? std::atoll(argv[4]) : 8;
  const Backend* gpu = cuda_backend(0);
  if (gpu == nullptr) {
    std::puts("no CUDA device");
    return 0;
  }
  std::printf("%s, kernels %s; E %ld H %ld I %ld k %ld; us per launch\n", gpu->info().name.c_str(),
              gpu->info().kernels.c_str(), long(experts), long(hidden), long(intermediate),
              long(top_k));
  for (const std::int64_t tokens : {1, 16, 128, 1024, 4096, 8192}) {
    const std::int64_t slots = tokens * top_k;
    const std::int64_t tile_rows = tokens <= 128 ? 16 : tokens <= 1024 ? 64 : 256;
    const auto tensor = [](void* data, DType dtype, std::int64_t rows, std::int64_t columns) {
      return Tensor::contiguous(data, dtype, {rows, columns}, kGpu);
    };
    std::vector<std::int32_t> id(static_cast<std::size_t>(slots));
    harness::Rng rng(7);
    for (std::int64_t t = 0; t < tokens; ++t)  // distinct experts per token
      for (std::int64_t j = 0; j < top_k; ++j) {
        std::int32_t& mine = id[static_cast<std::size_t>(t * top_k + j)];
        do mine = static_cast<std::int32_t>(rng.below(experts));
        while (std::find(&id[static_cast<std::size_t>(t * top_k)], &mine, mine) != &mine);
      }
    auto* ids = static_cast<std::int32_t*>(take(slots * 4));
    check(cudaMemcpy(ids, id.data(), id.size() * 4, cudaMemcpyHostToDevice));
    const std::int64_t tiles = max_tiles(slots, experts, tile_rows);
    RowMap rows{.tiles = static_cast<Tile*>(take(tiles * 16)),
                .num_tiles = static_cast<std::int32_t*>(take(4)),
                .row_slot = static_cast<std::int32_t*>(take(slots * 4)),
                .max_tiles = tiles,
                .tile_rows = tile_rows,
                .positions = slots,
                .slot_count = slots};
    auto* slot_row = static_cast<std::int32_t*>(take(slots * 4));
    const AlignStage align{
        .topk_ids = tensor(ids, DType::kI32, tokens, top_k),
        .experts = experts,
        .local = {0, experts},
        .rows = rows,
        .slot_row = slot_row,
        .scratch = take(static_cast<std::int64_t>(gpu->align_scratch_bytes(slots, experts)))};
    gpu->align(align, {});
    const Tensor x = tensor(take(tokens * hidden * 2), DType::kBF16, tokens, hidden);
    const Tensor h = tensor(take(slots * intermediate * 2), DType::kBF16, slots, intermediate);
    const Tensor y = tensor(take(slots * hidden * 2), DType::kBF16, slots, hidden);
    const Tensor out = tensor(take(tokens * hidden * 2), DType::kBF16, tokens, hidden);
    const Tensor xq = tensor(take(tokens * hidden), DType::kF8E4M3, tokens, hidden);
    const Tensor hq = tensor(take(slots * intermediate), DType::kF8E4M3, slots, intermediate);
    auto* scale = static_cast<float*>(take(slots * std::max(hidden, intermediate) / 8));
    auto* weights = static_cast<float*>(take(slots * 4));
    void* scratch = take(static_cast<std::int64_t>(gpu->quantize_scratch_bytes(slots, experts)));
    const Tensor logits = tensor(take(tokens * experts * 2), DType::kBF16, tokens, experts);
    const RouteStage route{.spec = {.method = RoutingMethod::kRenormalize},
                           .logits = logits,
                           .topk_ids = tensor(take(slots * 4), DType::kI32, tokens, top_k),
                           .topk_weights = tensor(weights, DType::kF32, tokens, top_k)};
    RouteStage router = route;
    router.logits = {};
    router.hidden_states = x;
    router.router.weight = tensor(take(experts * hidden * 2), DType::kBF16, experts, hidden);
    router.logits_scratch = tensor(take(tokens * experts * 4), DType::kF32, tokens, experts);
    const Tensor fixed = Tensor::contiguous(take(4), DType::kF32, {1}, kGpu);
    const auto quantize = [&](const Tensor& in, const Tensor& to, const RowMap* map,
                              ActScale granularity) {
      return QuantizeStage{.input = in,
                           .rows = map,
                           .granularity = granularity,
                           .group = 128,
                           .static_scale = fixed,
                           .output = to,
                           .scale = scale,
                           .scale_row_stride = granularity == ActScale::kGroup   ? in.shape[1] / 128
                                               : granularity == ActScale::kToken ? 1
                                                                                 : 0,
                           .scratch = scratch};
    };
    const double row_bytes = static_cast<double>(slots + tokens) * static_cast<double>(hidden) * 2;
    const double t_combine = time_of([&](Stream s) {
      gpu->combine(
          {.rows = y, .slot_row = slot_row, .weights = weights, .top_k = top_k, .output = out}, s);
    });
    std::printf(
        "T %5ld: route %6.2f  logits+route %6.2f  align %6.2f  x group %6.2f  x token %6.2f  x "
        "tensor %6.2f  x static %6.2f  h group %6.2f"
        "  h token %6.2f  h tensor %6.2f  combine %7.2f (%.0f GB/s)\n",
        long(tokens), time_of([&](Stream s) { gpu->route(route, s); }),
        time_of([&](Stream s) { gpu->route(router, s); }),
        time_of([&](Stream s) { gpu->align(align, s); }),
        time_of([&](Stream s) { gpu->quantize(quantize(x, xq, nullptr, ActScale::kGroup), s); }),
        time_of([&](Stream s) { gpu->quantize(quantize(x, xq, nullptr, ActScale::kToken), s); }),
        time_of([&](Stream s) {
          gpu->quantize(quantize(x, xq, nullptr, ActScale::kTensorDynamic), s);
        }),
        time_of(
            [&](Stream s) { gpu->quantize(quantize(x, xq, nullptr, ActScale::kTensorStatic), s); }),
        time_of([&](Stream s) { gpu->quantize(quantize(h, hq, &rows, ActScale::kGroup), s); }),
        time_of([&](Stream s) { gpu->quantize(quantize(h, hq, &rows, ActScale::kToken), s); }),
        time_of(
            [&](Stream s) { gpu->quantize(quantize(h, hq, &rows, ActScale::kTensorDynamic), s); }),
        t_combine, row_bytes / t_combine / 1000);
  }
  return 0;
}
