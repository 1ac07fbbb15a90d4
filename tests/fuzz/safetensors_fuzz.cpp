// SPDX-License-Identifier: Apache-2.0
// Arbitrary bytes as a safetensors file: an Error or a list of tensors whose every byte can be
// read.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "moesaic/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // An allocation of exactly this size: AddressSanitizer sees the first byte too many.
  const std::vector<std::uint8_t> exact(data, data + size);
  try {
    const auto file = moesaic::TensorFile::from_bytes(std::as_bytes(std::span(exact)));
    unsigned sum = 0;
    for (const moesaic::StoredTensor& t : file.tensors()) {
      for (std::size_t i = 0; i < t.bytes; ++i) sum += static_cast<unsigned>(t.data[i]);
      if (file.find(t.name) != &t) std::abort();
      try {
        const moesaic::Tensor view = file.tensor(t.name);
        if (static_cast<std::size_t>(view.numel()) * size_of(view.dtype) != t.bytes) std::abort();
      } catch (const moesaic::Error&) {
      }
    }
    volatile unsigned keep = sum;
    static_cast<void>(keep);
  } catch (const moesaic::Error&) {
  }
  return 0;
}
