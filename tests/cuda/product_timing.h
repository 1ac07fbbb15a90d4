// SPDX-License-Identifier: Apache-2.0
// Times the two products of a layer in a replayed graph: every call with its own routing, weights
// from HBM. Prints; decides nothing.
#pragma once

#include <cstdio>

#include "product.h"

namespace moesaic::test {

struct TimedShape {
  const char* name;
  std::int64_t experts, hidden, intermediate, top_k;
};

class TimedLayer {
 public:
  static constexpr double kReadRate = 3.14e12, kProductRate = 800e12;  // of the floors

  TimedLayer(const TimedShape& shape, WeightFormat format)
      : shape_(shape),
        traits_(device_traits()),
        fc1_(operand(format, 2 * shape.intermediate, shape.hidden)),
        fc2_(operand(format, shape.hidden, shape.intermediate)) {
    fc1_.spec.gated = true;
  }

  // ms of GEMM1, GEMM2 and both per call; -1 tactics: the policy's.
  struct Times {
    double gemm1, gemm2, both, floor;
  };
  // `input`: how GEMM1's rows lie, kToken (gathered) or kPosition.
  Times time(const cuda::GemmFamily& family, std::int64_t tokens, std::int64_t tile_rows,
             int tactic1, int tactic2, RowOf input = RowOf::kToken) {
    input_ = input;
    take_weights(family);
    const int calls = tokens == 1 ? 16 : tokens <= 128 ? 8 : tokens <= 1024 ? 4 : 2;
    prepare(tokens, tile_rows, calls);
    const double active = active_ / static_cast<double>(calls);
    const double bytes = active * static_cast<double>(fc1_.spec.n * fc1_.spec.row_bytes() +
                                                      fc2_.spec.n * fc2_.spec.row_bytes());
    const double operations =
        6.0 * static_cast<double>(tokens * shape_.top_k) * shape_.hidden * shape_.intermediate;
    const auto run = [&](int which, cudaStream_t stream) {
      for (int i = 0; i < calls; ++i) {
        if (which & 1) family.run(stage1(i, tactic1), traits_, stream);
        if (which & 2) family.run(stage2(i, tactic2), traits_, stream);
      }
    };
    return {replay(run, 1) / calls, replay(run, 2) / calls, replay(run, 3) / calls,
            1e3 * std::max(bytes / kReadRate, operations / kProductRate)};
  }

  // One GEMM1 without a graph, for a profiler.
  void once(const cuda::GemmFamily& family, std::int64_t tokens, std::int64_t tile_rows,
            int tactic) {
    take_weights(family);
    prepare(tokens, tile_rows, 2);
    for (int i = 0; i < 2; ++i) family.run(stage1(i, tactic), traits_, nullptr);
    cuda_ok(cudaDeviceSynchronize());
  }

  const WeightSpec& fc1() const { return fc1_.spec; }
  const WeightSpec& fc2() const { return fc2_.spec; }
  const cuda::DeviceTraits& traits() const { return traits_; }

 private:
  static constexpr Device kGpu{DeviceType::kCuda, 0};

  WeightOperand operand(WeightFormat format, std::int64_t n, std::int64_t k) {
    WeightOperand out;
    WeightSpec& s = out.spec;
    s.format = format;
    s.act_dtype = s.dtype16 = DType::kBF16;
    s.act = ActFormat::k16;
    s.experts = shape_.experts, s.n = n, s.k = k;
    s.scale = {.group_n = n, .group_k = k};
    const bool four = format == WeightFormat::kU4;
    const bool bytes = format == WeightFormat::kE4M3 || format == WeightFormat::kI8;
    const std::size_t total = static_cast<std::size_t>(s.experts * n * s.row_bytes());
    out.plain.weight = Tensor::contiguous(fill(total, four || bytes ? 1 : 2),
                                          four ? DType::kU8 : weight_dtype(format),
                                          {s.experts, n, four ? k / 2 : k}, kGpu);
    if (four || bytes) {
      s.scale = {.has_scale = true,
                 .group_n = 1,
                 .group_k = four ? 128 : k,
                 .grid_n = n,
                 .grid_k = four ? k / 128 : 1};
      const std::vector<float> scales(s.experts * n * s.scale.grid_k, 0.01f);
      buffers_.push_back(upload(scales));
      out.plain.scale = Tensor::contiguous(buffers_.back()->data(), DType::kF32,
                                           {s.experts, n, s.scale.grid_k}, kGpu);
    }
    if (four) {  // as a layer on SM90 has them
      packed_.push_back(cuda::make_cuda_weights(s, traits_, cuda::Arrangement::kRearranged));
      for (std::int64_t e = 0; e < s.experts; ++e) {
        GemmWeights one = out.plain;
        one.weight = one.weight.slice(e, 1), one.scale = one.scale.slice(e, 1);
        packed_.back()->load(e, one);
      }
    }
    return out;
  }

  // The caller's, or those of a layer that the family would run.
  void take_weights(const cuda::GemmFamily& family) {
    const bool packed = family.rearranges_u4 && !packed_.empty();  // FC1's, then FC2's
    fc1_.packed = packed ? packed_[0].get() : nullptr;
    fc2_.packed = packed ? packed_[1].get() : nullptr;
  }

  // Random bytes, or random bf16 of small magnitude: power depends on the data.
  void* fill(std::size_t total, int element) {
    std::mt19937 random(7);
    std::vector<std::uint16_t> block(8 << 20);
    for (auto& h : block) {
      const auto r = static_cast<std::uint16_t>(random());
      h = element == 1 ? r : static_cast<std::uint16_t>((r & 0x807f) | (0x3c00 + (r & 0x180)));
    }
    buffers_.push_back(std::make_unique<DeviceBuffer>(total));
    char* data = static_cast<char*>(buffers_.back()->data());
    for (std::size_t at = 0; at < total; at += block.size() * 2) {
      cuda_ok(cudaMemcpy(data + at, block.data(), std::min(total - at, block.size() * 2),
                         cudaMemcpyHostToDevice));
    }
    return data;
  }

  void prepare(std::int64_t tokens, std::int64_t tile_rows, int calls) {
    maps_.clear();
    map_buffers_.clear();
    active_ = 0;
    std::mt19937 random(11);
    const std::int64_t slots = tokens * shape_.top_k;
    for (int call = 0; call < calls; ++call) {
      std::vector<std::vector<std::int32_t>> rows(shape_.experts);
      std::vector<std::int64_t> experts(shape_.experts);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t e = 0; e < shape_.experts; ++e) experts[e] = e;
        for (std::int64_t j = 0; j < shape_.top_k; ++j) {
          std::swap(experts[j], experts[j + random() % (shape_.experts - j)]);
          rows[experts[j]].push_back(static_cast<std::int32_t>(t * shape_.top_k + j));
        }
      }
      std::vector<Tile> tiles;
      std::vector<std::int32_t> slot_list;
      for (std::int64_t e = 0; e < shape_.experts; ++e) {
        const auto count = static_cast<std::int64_t>(rows[e].size());
        active_ += count > 0;
        for (std::int64_t r = 0; r < count; r += tile_rows) {
          tiles.push_back({static_cast<std::int32_t>(e),
                           static_cast<std::int32_t>(std::min(tile_rows, count - r)),
                           static_cast<std::int64_t>(slot_list.size()) + r});
        }
        slot_list.insert(slot_list.end(), rows[e].begin(), rows[e].end());
      }
      RowMap map;
      const auto keep = [&](Buffer b) {
        map_buffers_.push_back(std::move(b));
        return map_buffers_.back()->data();
      };
      const auto live = static_cast<std::int32_t>(tiles.size());
      map.max_tiles = max_tiles(slots, shape_.experts, tile_rows);
      tiles.resize(static_cast<std::size_t>(std::max<std::int64_t>(map.max_tiles, live)));
      map.tiles = static_cast<Tile*>(keep(upload(tiles)));
      map.num_tiles = static_cast<std::int32_t*>(keep(upload(std::vector<std::int32_t>{live})));
      map.row_slot = static_cast<std::int32_t*>(keep(upload(slot_list)));
      map.tile_rows = tile_rows, map.positions = slots, map.slot_count = slots;
      maps_.push_back(map);
    }
    const auto activations = [&](std::int64_t rows, std::int64_t columns) {
      std::vector<std::uint16_t> data(rows * columns);
      for (auto& h : data) {
        const auto r = static_cast<std::uint16_t>(random());
        h = static_cast<std::uint16_t>((r & 0x807f) | (0x3e80 + (r & 0x180)));
      }
      map_buffers_.push_back(upload(data));
      return Tensor::contiguous(map_buffers_.back()->data(), DType::kBF16, {rows, columns}, kGpu);
    };
    x_ = activations(input_ == RowOf::kToken ? tokens : slots, shape_.hidden);
    h_ = activations(slots, shape_.intermediate);
    y_ = activations(slots, shape_.hidden);
  }

  GemmStage stage1(int i, int tactic) const {
    GemmStage s;
    s.rows = maps_[i];
    s.a = x_, s.a_row = input_, s.top_k = shape_.top_k;
    s.b = &fc1_, s.activation = &swiglu_;
    s.c = h_, s.c_row = RowOf::kPosition, s.tactic = tactic;
    return s;
  }
  GemmStage stage2(int i, int tactic) const {
    GemmStage s;
    s.rows = maps_[i];
    s.a = h_, s.b = &fc2_, s.top_k = shape_.top_k;
    s.c = y_, s.c_row = RowOf::kSlot, s.tactic = tactic;
    return s;
  }

  template <typename Run>
  static double replay(const Run& run, int which) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cuda_ok(cudaStreamCreate(&stream));
    cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    run(which, stream);
    cuda_ok(cudaStreamEndCapture(stream, &graph));
    cuda_ok(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin, end;
    cudaEventCreate(&begin), cudaEventCreate(&end);
    std::vector<float> times;
    double total = 0;
    for (int i = 0; i < 40 && (i < 5 || total < 60); ++i) {
      cudaEventRecord(begin, stream);
      cuda_ok(cudaGraphLaunch(exec, stream));
      cudaEventRecord(end, stream);
      cuda_ok(cudaStreamSynchronize(stream));
      float ms = 0;
      cudaEventElapsedTime(&ms, begin, end);
      if (i >= 2) times.push_back(ms);
      total += ms;
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

  TimedShape shape_;
  RowOf input_ = RowOf::kToken;
  cuda::DeviceTraits traits_;
  std::vector<Buffer> buffers_, map_buffers_;
  std::vector<std::unique_ptr<cuda::CudaWeights>> packed_;
  WeightOperand fc1_, fc2_;
  ActivationSpec swiglu_{};
  std::vector<RowMap> maps_;
  Tensor x_, h_, y_;
  double active_ = 0;
};

}  // namespace moesaic::test
