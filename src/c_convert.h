// SPDX-License-Identifier: Apache-2.0
// From the C interface's structs to the C++ ones: sizes, enumerations and tensors are checked here
// and nowhere else.
#pragma once

#include <string>

#include "check.h"
#include "moesaic/c_api.h"
#include "moesaic/moesaic.h"

namespace moesaic::c {

// Copies what both sides know of a size-tagged struct over `out`, which holds the defaults. Throws
// when it has no size, or carries something beyond `known` bytes that is not zero.
void read_struct(const char* argument, const void* given, std::size_t known, void* out);
template <typename T>
T read(const char* argument, const T* given, T defaults) {
  read_struct(argument, given, sizeof(T), &defaults);
  defaults.struct_size = sizeof(T);
  if constexpr (requires { defaults.reserved; }) {
    if (defaults.reserved != 0)
      unsupported(std::string(argument) + ".reserved: expected 0, got " +
                  std::to_string(defaults.reserved) + "; this library knows no meaning of it yet");
  }
  return defaults;
}
// The same for a nested struct, where null means all defaults.
template <typename T>
T read_optional(const char* argument, const T* given, T defaults) {
  return given == nullptr ? defaults : read(argument, given, defaults);
}

template <typename E>
E to_enum(const char* argument, std::int32_t value, std::int32_t count) {
  check_enum(argument, std::int64_t{value}, count);
  return static_cast<E>(value);
}

Device to_device(const moesaic_device& device);
Tensor to_tensor(const char* argument, const moesaic_tensor* tensor);  // null: undefined
DType to_dtype(const char* argument, std::int32_t dtype);
Format to_format(std::int32_t format);
Accumulate to_accumulate(std::int32_t accumulate);

QuantSpec to_quant(const moesaic_quant_spec* spec);
ActivationSpec to_activation(const moesaic_activation_spec* spec);
RoutingSpec to_routing(const moesaic_routing_spec* spec);
GemmWeights to_gemm_weights(const char* argument, const moesaic_gemm_weights* weights);
LayerWeights to_layer_weights(const moesaic_layer_weights* weights);
RouterWeights to_router(const moesaic_router_weights* router);
LayerConfig to_config(const moesaic_layer_config* config);
SortedRows to_sorted(const char* argument, const moesaic_sorted_rows* rows);
BatchedRows to_batched(const moesaic_tensor* num_tokens);

}  // namespace moesaic::c
