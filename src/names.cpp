// SPDX-License-Identifier: Apache-2.0
// Every enum's names: the words of the CLI, of JSON and of error messages.
#include <array>
#include <string>
#include <utility>

#include "check.h"
#include "moesaic/moesaic.h"
#include "scheme.h"
#include "words.h"

namespace moesaic {
namespace {

template <typename E, std::size_t N>
using Names = std::array<std::pair<E, std::string_view>, N>;

template <typename E, std::size_t N>
std::string_view find_name(const Names<E, N>& names, E value) {
  for (const auto& [e, text] : names)
    if (e == value) return text;
  return "?";
}

template <typename E, std::size_t N>
E parse(const Names<E, N>& names, std::string_view what, std::string_view text) {
  std::string known;
  for (const auto& [e, n] : names) {
    if (n == text) return e;
    append_word(known, n);
  }
  invalid(std::string(what) + ": unknown name '" + std::string(text) + "'; known: " + known);
}

constexpr Names<ErrorCode, 8> kErrorCodes{{{ErrorCode::kInvalidArgument, "invalid_argument"},
                                           {ErrorCode::kUnsupported, "unsupported"},
                                           {ErrorCode::kNotReady, "not_ready"},
                                           {ErrorCode::kIo, "io"},
                                           {ErrorCode::kCorruptFile, "corrupt_file"},
                                           {ErrorCode::kOutOfMemory, "out_of_memory"},
                                           {ErrorCode::kDevice, "device"},
                                           {ErrorCode::kInternal, "internal"}}};

constexpr Names<DType, 9> kDTypes{{{DType::kF32, "f32"},
                                   {DType::kF16, "f16"},
                                   {DType::kBF16, "bf16"},
                                   {DType::kF8E4M3, "fp8_e4m3"},
                                   {DType::kE8M0, "e8m0"},
                                   {DType::kI8, "i8"},
                                   {DType::kU8, "u8"},
                                   {DType::kI32, "i32"},
                                   {DType::kI64, "i64"}}};

constexpr Names<RoutingMethod, kNumRoutingMethods> kRoutings{
    {{RoutingMethod::kSoftmaxTopK, "softmax_topk"},
     {RoutingMethod::kRenormalize, "renormalize"},
     {RoutingMethod::kDeepSeekV3, "deepseek_v3"},
     {RoutingMethod::kDeepSeekV2, "deepseek_v2"},
     {RoutingMethod::kLlama4, "llama4"},
     {RoutingMethod::kTopK, "topk"},
     {RoutingMethod::kSigmoidRenorm, "sigmoid_renorm"},
     {RoutingMethod::kMiniMax2, "minimax2"},
     {RoutingMethod::kSigmoid, "sigmoid"},
     {RoutingMethod::kSqrtSoftplus, "sqrtsoftplus"},
     {RoutingMethod::kSparseMixer, "sparsemixer"},
     {RoutingMethod::kSoftmaxBias, "softmax_bias"}}};

constexpr Names<Activation, kNumActivations> kActivations{
    {{Activation::kSilu, "silu"},
     {Activation::kGelu, "gelu"},
     {Activation::kGeluTanh, "gelu_tanh"},
     {Activation::kRelu, "relu"},
     {Activation::kRelu2, "relu2"},
     {Activation::kIdentity, "identity"},
     {Activation::kSwiglu, "swiglu"},
     {Activation::kGeglu, "geglu"},
     {Activation::kGegluTanh, "geglu_tanh"},
     {Activation::kSwigluOai, "swiglu_oai"},
     {Activation::kSwigluClamp, "swiglu_clamp"},
     {Activation::kSwigluStep, "swiglu_step"}}};

constexpr Names<Format, 3> kFormats{
    {{Format::kStandard, "standard"}, {Format::kSorted, "sorted"}, {Format::kBatched, "batched"}}};

}  // namespace

std::string_view name(ErrorCode code) { return find_name(kErrorCodes, code); }
std::string_view name(DType dtype) { return find_name(kDTypes, dtype); }
DType parse_dtype(std::string_view text) { return parse(kDTypes, "dtype", text); }
std::string_view name(RoutingMethod method) { return find_name(kRoutings, method); }
RoutingMethod parse_routing(std::string_view text) {
  if (text == "hash")
    unsupported(
        "routing: hash-routed layers choose by token id, which a layer does not see; look the "
        "experts up "
        "outside and pass topk_ids and topk_weights");
  return parse(kRoutings, "routing", text);
}
std::string_view name(Activation activation) { return find_name(kActivations, activation); }
Activation parse_activation(std::string_view text) {
  return parse(kActivations, "activation", text);
}
std::string_view name(Format format) { return find_name(kFormats, format); }
Format parse_format(std::string_view text) { return parse(kFormats, "format", text); }

std::string_view name(Scheme scheme) { return traits(scheme).name; }
Scheme parse_scheme(std::string_view text) {
  std::string known;
  for (const SchemeTraits& t : all_schemes()) {
    if (t.name == text) return t.scheme;
    append_word(known, t.name);
  }
  invalid("scheme: unknown name '" + std::string(text) + "'; known: " + known);
}

}  // namespace moesaic
