// SPDX-License-Identifier: Apache-2.0
// Schemes (how weights and activations are stored) and the quantizers around them.
#pragma once

#include <cstdint>
#include <string_view>

#include "moesaic/types.h"

namespace moesaic {

// The closed list. The names (see `name`) are the ones used in the CLI, in JSON and in tables.
enum class Scheme : std::uint8_t {
  kF32,           // f32             weights f32, activations f32
  kF16,           // f16             weights f16, activations f16
  kBF16,          // bf16            weights bf16, activations bf16
  kFp8Tensor,     // fp8_tensor      e4m3 x e4m3; one weight scale per expert (fc1: or two, gate and up)
  kFp8Channel,    // fp8_channel     e4m3 x e4m3; weight scale per output channel, one per token
  kFp8Block,      // fp8_block       e4m3 x e4m3; scale per (block_n x block_k), per (token, block_k)
  kFp8W8A16,      // fp8_w8a16       e4m3 weights (tensor, channel or block scales), 16-bit activations
  kInt8Channel,   // int8_channel    int8 x int8; scale per output channel, one per token
  kInt8Block,     // int8_block      int8 x int8; as fp8_block
  kInt8W8A16,     // int8_w8a16      int8 per channel, or uint8 groups with zero points; 16-bit acts
  kInt4W4A16,     // int4_w4a16      uint4 groups with zero points (or 8); 16-bit activations
  kInt4W4A8Fp8,   // int4_w4a8_fp8   uint4 groups, e4m3 activations
  kInt4W4A8Int8,  // int4_w4a8_int8  uint4 groups, int8 activations
  kMxfp4W4A16,    // mxfp4_w4a16     e2m1 in groups of 32 with E8M0 scales, 16-bit activations
};
inline constexpr int kNumSchemes = 14;
MOESAIC_API std::string_view name(Scheme scheme);
MOESAIC_API Scheme parse_scheme(std::string_view text);  // throws kInvalidArgument, lists the names

// Granularity of the weight scales. kDefault is the scheme's own.
enum class WeightScale : std::uint8_t {
  kDefault,
  kTensor,   // (E), or for fc1 of a gated layer (E, 2): first and second half of N
  kChannel,  // (E, N) or (E, N, 1)
  kBlock,    // (E, ceil(N / block_n), ceil(K / block_k))
  kGroup,    // (E, N, ceil(K / group_size)); a last group may be short
};

// How activations get their scale. Weight-only schemes have none.
enum class ActScale : std::uint8_t {
  kDefault,        // the scheme's own: fp8_tensor kTensorDynamic, *_block kGroup, others kToken
  kTensorStatic,   // from the file or the caller: scalar, or one per expert
  kTensorDynamic,  // absmax over the live rows (sorted), or per expert (batched)
  kToken,          // absmax of each row
  kGroup,          // absmax of each (row, block_k)
};

// SGLang's int8 group quantizer truncates toward zero; ours rounds to nearest unless asked.
enum class Int8Rounding : std::uint8_t { kNearest, kTruncate };

struct QuantSpec {
  Scheme scheme = Scheme::kBF16;
  WeightScale weight_scale = WeightScale::kDefault;
  ActScale act_scale = ActScale::kDefault;
  std::int64_t block_n = 128;     // kBlock only
  std::int64_t block_k = 128;     // kBlock and ActScale::kGroup
  std::int64_t group_size = 128;  // kGroup only; 0: the whole of K is one group
  bool zero_points = false;       // int4_* and grouped int8_w8a16; otherwise 8 and 128
  Int8Rounding int8_rounding = Int8Rounding::kNearest;
};

// One product's weights for every local expert, as the caller holds them. Views only. E below is
// the number of local experts, N and K the product's output and reduction width.
struct GemmWeights {
  Tensor weight;       // [E, N, K], K contiguous unless the scheme is 16-bit or f32, which take any
                       // strides; 4-bit: u8 [E, N, K/2]. Columns of padding behind K (a row stride
                       // above K) are skipped: view them away.
  Tensor scale;        // f32, f16 or bf16 (f32 alone where CUDA reads it in place; mxfp4: u8 or e8m0)
                       // in the shape WeightScale gives. Undefined with schemes f32, f16 and bf16
  Tensor zero_point;   // int4: u8 [E, N/2, K/g], low nibble = even n. int8: u8 [E, N, K/g]. Or [E, N]
                       // counting as one group.
  Tensor bias;         // [E, N] in f32, f16 or bf16; added in fp32 behind the scales
  Tensor input_scale;  // static activation scale, f32 [1] or [E]: needed with
                       // ActScale::kTensorStatic, not read otherwise
  Tensor prequant;     // int4_w4a8_fp8 and int4_w4a8_int8 only: f32, f16 or bf16 [K] or [E, K], the
                       // AWQ factor of the activations before they are quantized (FlashInfer's W4A8
                       // mode of 8 tensors). Rows that come quantized are refused with it
  Tensor alpha;        // extra factor on the product, f32 [E] (the same mode's)
};

// --- Quantizers (contracts: SGLang's scaled_fp8_quant, per_token_quant_int8, ...) --------------
struct QuantizeArgs {
  Tensor input;   // [R, K] f32, f16 or bf16; unit inner stride. Batched: [E, capacity, K]
  Tensor num_tokens;  // batched only: [E] i32, how many rows of each expert are live; others are not touched
  DType to = DType::kF8E4M3;                  // kF8E4M3 or kI8
  ActScale granularity = ActScale::kToken;
  std::int64_t group_size = 128;              // kGroup
  Int8Rounding int8_rounding = Int8Rounding::kNearest;
  Tensor static_scale;                        // kTensorStatic: f32 [1]; batched also [E]
  Tensor output;                              // [R, K] of `to`; batched [E, capacity, K]
  Tensor scale;                               // out, f32: [1] | [R, 1] | [R, ceil(K / group_size)]; batched
                                              // [E, 1, 1] (per tensor: an expert's own; left as it is where
                                              // an expert has no rows) | [E, capacity, ...]
  Workspace workspace{};                      // quantize_workspace_bytes; dynamic per tensor, and batched
  Stream stream{};
};
// Bytes of workspace for `rows` plain rows (needed with kTensorDynamic only).
MOESAIC_API std::size_t quantize_workspace_bytes(std::int64_t rows, Device device = {});
// The same from the call's shapes: what the batched form needs. Throws as quantize does.
MOESAIC_API std::size_t quantize_workspace_bytes(const QuantizeArgs& args);
// Scales: absmax / 448 (e4m3) or / 127 (int8), absmax clamped at 1e-10. The bits do not depend on
// the other rows, kTensorDynamic excepted. e4m3 rounds to nearest even, int8 to nearest with halves
// away from zero (docs/numerics.md). SGLang defines the plain forms, vLLM's
// batched_moe_kernel_quantize_input the batched one. Throws kInvalidArgument for shapes, strides,
// dtypes and a workspace that do not fit, kUnsupported for another `to`; values never raise.
MOESAIC_API void quantize(const QuantizeArgs& args);

}  // namespace moesaic
