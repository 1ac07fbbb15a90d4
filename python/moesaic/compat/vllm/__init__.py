# SPDX-License-Identifier: Apache-2.0
"""vLLM's batched MoE classes and functions.

Two forms: this module has the signatures of seed 001 (scales are arguments of `apply`), and
`moesaic.compat.vllm.v0_22` those of release 0.22.0 (scales live in FusedMoEQuantConfig). All schemes
run, where the originals say "NYI". The Triton device functions have no counterpart.
"""

from ._batched import (FusedMoEActivationFormat, batched_moe_kernel_quantize_input,
                       invoke_moe_batched_triton_kernel, normalize_batched_scales_shape, normalize_scales_shape)
from .seed import BatchedPrepareAndFinalize, BatchedTritonExperts, FusedMoEQuantConfig, NaiveBatchedExperts

__all__ = ["BatchedPrepareAndFinalize", "BatchedTritonExperts", "FusedMoEActivationFormat", "FusedMoEQuantConfig",
           "NaiveBatchedExperts", "batched_moe_kernel_quantize_input", "invoke_moe_batched_triton_kernel",
           "normalize_batched_scales_shape", "normalize_scales_shape"]
