// SPDX-License-Identifier: Apache-2.0
// What the CUDA products refuse of the caller's tensors before any kernel reads them. No device is
// needed.
#include <gtest/gtest.h>

#include <string>

#include "cuda/gemm.h"

namespace moesaic::cuda {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};

Tensor view(DType dtype, std::initializer_list<std::int64_t> shape) {
  static float never_read[1];
  return Tensor::contiguous(never_read, dtype, shape, kDevice);
}

std::string complaint(const GemmStage& stage) {
  try {
    check_views(stage);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << error.what();
    return error.what();
  }
  return "";
}

TEST(GemmViews, RefusedByName) {
  WeightOperand b;
  b.spec.format = WeightFormat::kU4;
  b.plain.weight = view(DType::kU8, {4, 64, 64});
  b.plain.scale = view(DType::kF32, {4, 64, 1});
  b.plain.zero_point = view(DType::kU8, {4, 32, 1});
  GemmStage stage;
  stage.a = view(DType::kBF16, {8, 128});
  stage.b = &b;
  EXPECT_EQ(complaint(stage), "");

  const auto says = [&](const std::string& text, auto change) {
    const WeightOperand kept = b;
    const GemmStage as_it_was = stage;
    change();
    EXPECT_NE(complaint(stage).find(text), std::string::npos) << complaint(stage);
    b = kept;
    stage = as_it_was;
  };
  says("b.scale: CUDA kernels read the scales of weights in place as f32, got bf16",
       [&] { b.plain.scale.dtype = DType::kBF16; });
  says("b.scale: CUDA kernels read the scales of weights in place as f32, got f16",
       [&] { b.plain.scale.dtype = DType::kF16; });
  says("a: dimension 0 has a negative stride", [&] { stage.a.strides[0] = -128; });
  says("b.weight: dimension 1 has a negative stride", [&] { b.plain.weight.strides[1] = -64; });
  says("b.scale: dimension 1 has a negative stride", [&] { b.plain.scale.strides[1] = -1; });
  says("b.zero_point: dimension 0 has a negative stride",
       [&] { b.plain.zero_point.strides[0] = -32; });

  // Scales that are exponents; a stride that is never taken.
  b.spec.e8m0_scales = true;
  b.plain.scale.dtype = DType::kU8;
  b.plain.scale.strides[2] = -1;
  EXPECT_EQ(complaint(stage), "");
}

}  // namespace
}  // namespace moesaic::cuda
