# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.22.0's forms: scales, zero points and biases live in FusedMoEQuantConfig.

    vllm.model_executor.layers.fused_moe.experts.fused_batched_moe, .prepare_finalize.batched,
    .config, .activation, .topk_weight_and_reduce, .modular_kernel  ->  moesaic.compat.vllm.v0_22

`moe_config` is accepted and not read. Where the original asserts "NYI" (int8_w8a8, int8_w8a16,
int4_w4a16, mxfp4_w4a16, zero points, biases) this runs.
"""

from __future__ import annotations

import dataclasses
from typing import Optional

import torch

from ... import gemm as _gemm
from .._common import NotOffered
from . import _batched, seed
from ._batched import (FusedMoEActivationFormat, batched_moe_kernel_quantize_input,
                       invoke_moe_batched_triton_kernel, normalize_batched_scales_shape, normalize_scales_shape)
from .v0_22_config import (FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, FusedMoEQuantDesc, GroupShape,
                           MoEActivation, activation_spec, apply_moe_activation, biased_moe_quant_config,
                           fp8_w8a8_moe_quant_config, fp8_w8a16_moe_quant_config, int4_w4a16_moe_quant_config,
                           int8_w8a8_moe_quant_config, int8_w8a16_moe_quant_config, mxfp4_w4a16_moe_quant_config)

__all__ = ["FUSED_MOE_UNQUANTIZED_CONFIG", "BatchedPrepareAndFinalize", "BatchedTritonExperts", "ExpertTokensMetadata",
           "FusedMoEActivationFormat", "FusedMoEKernel", "FusedMoEModularKernel", "FusedMoEQuantConfig",
           "FusedMoEQuantDesc", "GroupShape", "MoEActivation", "NaiveBatchedExperts", "TopKWeightAndReduceDelegate",
           "TopKWeightAndReduceNaiveBatched", "apply_moe_activation", "batched_moe_kernel_quantize_input",
           "biased_moe_quant_config", "fp8_w8a16_moe_quant_config", "fp8_w8a8_moe_quant_config",
           "int4_w4a16_moe_quant_config", "int8_w8a16_moe_quant_config", "int8_w8a8_moe_quant_config",
           "invoke_moe_batched_triton_kernel", "mxfp4_w4a16_moe_quant_config", "normalize_batched_scales_shape",
           "normalize_scales_shape"]


# --- prepare and finalize ------------------------------------------------------------------------------

@dataclasses.dataclass
class ExpertTokensMetadata:
    """How many rows each local expert has: i32 [E_local], and on the host if somebody knows."""

    expert_num_tokens: torch.Tensor
    expert_num_tokens_cpu: Optional[torch.Tensor]

    @staticmethod
    def make_from_list(expert_num_tokens_list, device):
        host = torch.tensor(expert_num_tokens_list, device="cpu", dtype=torch.int32)
        return ExpertTokensMetadata(host.to(device, non_blocking=True), host)


class TopKWeightAndReduceDelegate:
    """Leaves weights and the sum to finalize."""

    def __eq__(self, other):
        return isinstance(other, TopKWeightAndReduceDelegate)

    def apply(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
        raise RuntimeError("TopKWeightAndReduceDelegate: finalize chooses what sums; it cannot be applied itself")


class TopKWeightAndReduceNaiveBatched:
    """Sums the batched rows [E, max, K] of rank `rank` into [T, K]. Leaves the rows alone."""

    def __init__(self, rank):
        self.rank = rank

    def __eq__(self, other):
        return isinstance(other, TopKWeightAndReduceNaiveBatched) and other.rank == self.rank

    def apply(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
        local, capacity, hidden = fused_expert_output.shape
        if output is None:
            output = torch.empty((topk_ids.shape[0], hidden), dtype=fused_expert_output.dtype, device=topk_ids.device)
        layer = dict(experts=local * (self.rank + 1), first=local * self.rank, local=local, capacity=capacity)
        _batched.finalize(layer, output, fused_expert_output, topk_weights, topk_ids, None,
                          apply_router_weight_on_input)
        return output


class BatchedPrepareAndFinalize(seed.BatchedPrepareAndFinalize):
    """Tokens -> [E_local, max_num_tokens, K] and back; see the older form for `dropped`."""

    def output_is_reduced(self):
        return False

    def supports_async(self):
        return False

    def post_init_setup(self, fused_experts):
        return

    def on_commit(self):
        return

    def prepare(self, a1, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input, quant_config,
                defer_input_quant=False):
        """(b_a1, b_a1_scale, ExpertTokensMetadata, None, None). `a1` is not modified; any top_k with
        apply_router_weight_on_input."""
        if defer_input_quant:
            raise NotImplementedError("BatchedPrepareAndFinalize: defer_input_quant=True is not offered; rows are "
                                      "quantized here")
        rows, scale, counts = self._prepare(a1, quant_config.a1_scale, topk_weights, topk_ids, num_experts, expert_map,
                                            apply_router_weight_on_input, quant_config)
        return rows, scale, ExpertTokensMetadata(counts, None), None, None

    def finalize(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input,
                 weight_and_reduce_impl):
        """output [T, K] = sum over slots, fp32, slot order."""
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            super().finalize(output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input)
        else:
            weight_and_reduce_impl.apply(output, fused_expert_output, topk_weights, topk_ids,
                                         apply_router_weight_on_input)


# --- experts ---------------------------------------------------------------------------------------------

class _BatchedExperts:
    def __init__(self, moe_config, quant_config, max_num_tokens, num_dispatchers):
        if max_num_tokens is None or num_dispatchers is None or max_num_tokens <= 0 or num_dispatchers <= 0:
            raise ValueError(f"max_num_tokens and num_dispatchers must be positive, got {max_num_tokens} and "
                             f"{num_dispatchers}")
        self.moe_config = moe_config
        self.quant_config = quant_config
        self.max_num_tokens = max_num_tokens
        self.num_dispatchers = num_dispatchers

    quant_dtype = property(lambda self: self.quant_config.quant_dtype)
    weight_quant_dtype = property(lambda self: self.quant_config.weight_quant_dtype)
    block_shape = property(lambda self: self.quant_config.block_shape)
    per_act_token_quant = property(lambda self: self.quant_config.per_act_token_quant)
    per_out_ch_quant = property(lambda self: self.quant_config.per_out_ch_quant)
    a1_scale = property(lambda self: self.quant_config.a1_scale)
    a2_scale = property(lambda self: self.quant_config.a2_scale)
    a1_gscale = property(lambda self: self.quant_config.a1_gscale)
    a2_gscale = property(lambda self: self.quant_config.a2_gscale)
    w1_scale = property(lambda self: self.quant_config.w1_scale)
    w2_scale = property(lambda self: self.quant_config.w2_scale)
    w1_zp = property(lambda self: self.quant_config.w1_zp)
    w2_zp = property(lambda self: self.quant_config.w2_zp)
    w1_bias = property(lambda self: self.quant_config.w1_bias)
    w2_bias = property(lambda self: self.quant_config.w2_bias)
    g1_alphas = property(lambda self: self.quant_config.g1_alphas)
    g2_alphas = property(lambda self: self.quant_config.g2_alphas)
    expects_unquantized_inputs = property(lambda self: False)

    @staticmethod
    def activation_format():
        return FusedMoEActivationFormat.BatchedExperts

    @staticmethod
    def is_monolithic():
        return False

    @staticmethod
    def supports_lora():
        return False

    @staticmethod
    def adjust_N_for_activation(N, activation):
        """Columns behind the activation: half of N when it is gated."""
        return N // 2 if activation_spec(activation)["kind"].startswith(("swiglu", "geglu")) else N

    def process_weights_after_loading(self, layer):
        return

    def supports_expert_map(self):
        return False

    def supports_packed_ue8m0_act_scales(self):
        return False

    def finalize_weight_and_reduce_impl(self):
        return TopKWeightAndReduceDelegate()

    def workspace_dtype(self, act_dtype):
        return act_dtype

    def moe_problem_size(self, a1, w1, w2, topk_ids):
        """(E, M, N, K, top_k); M is the capacity of batched rows."""
        del w2
        return w1.shape[0], a1.shape[-2], w1.shape[1], a1.shape[-1], topk_ids.shape[1]

    def activation(self, activation, output, input):
        """The function between the products, on its own."""
        _gemm.activate(input, activation_spec(activation, self.quant_config), output=output)

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input):
        """output [E, max, K] from hidden_states [E, max, K]; only live rows are read or written. The
        workspaces may be None; scratch comes from the framework's allocator."""
        del topk_weights, topk_ids, global_num_experts, expert_map, workspace13, workspace2
        del apply_router_weight_on_input  # prepare has done it, or finalize will
        quant = self.quant_config
        static = a2_scale is not None and quant.is_quantized and quant.is_per_tensor
        fc1 = dict(weight=w1, scale=self.w1_scale, zero_point=self.w1_zp, bias=self.w1_bias)
        fc2 = dict(weight=w2, scale=self.w2_scale, zero_point=self.w2_zp, bias=self.w2_bias)
        if static:
            fc1["input_scale"] = fc2["input_scale"] = a2_scale.float().reshape(-1)
        scale = normalize_batched_scales_shape(a1q_scale, w1.shape[0]) if quant.is_quantized else None
        _batched.experts(quant._spec(w1, self.w1_zp is not None, static), activation_spec(activation, quant), output,
                         hidden_states, fc1, fc2, scale, expert_tokens_meta.expert_num_tokens)


class BatchedTritonExperts(_BatchedExperts):
    """The batched experts. Workspace shapes are those of the original."""

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        rows = self.max_num_tokens * self.num_dispatchers
        return ((local_num_experts, rows, max(K, N)),
                (local_num_experts, rows, self.adjust_N_for_activation(N, activation)), (local_num_experts, rows, K))


class NaiveBatchedExperts(_BatchedExperts):
    """The original's oracle; here the same product as BatchedTritonExperts, with its workspace shapes."""

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        rows = self.max_num_tokens * self.num_dispatchers
        return ((local_num_experts, rows, K), (rows, N), (local_num_experts, rows, K))

    def dequant(self, t, scale):
        """Float32 values of quantized ones: scalar, per row, or per block scales."""
        return _batched.dequant(self.quant_config, t, scale)


# --- the composition ---------------------------------------------------------------------------------------

class FusedMoEKernel:
    """prepare -> experts -> finalize. The two parts may be these classes or anything with their methods."""

    def __init__(self, prepare_finalize, fused_experts, inplace=False):
        if prepare_finalize.activation_format.value != fused_experts.activation_format().value:
            raise ValueError(f"activation_format: {prepare_finalize.activation_format} is not what the experts take, "
                             f"{fused_experts.activation_format()}")
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts
        self.inplace = inplace
        prepare_finalize.post_init_setup(fused_experts)

    is_monolithic = property(lambda self: False)
    can_overlap_shared_experts = property(lambda self: False)
    moe_config = property(lambda self: self.fused_experts.moe_config)

    def supports_expert_map(self):
        return self.fused_experts.supports_expert_map()

    def supports_lora(self):
        return self.fused_experts.supports_lora()

    def output_is_reduced(self):
        return self.prepare_finalize.output_is_reduced()

    def apply(self, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              apply_router_weight_on_input, shared_experts=None, shared_experts_input=None):
        """[T, K] -> [T, K]."""
        if shared_experts is not None or shared_experts_input is not None:
            raise NotOffered("shared_experts: not run here; add their output yourself, or use moesaic.Layer with "
                             "shared_experts")
        experts, local = self.fused_experts, w1.shape[0]
        if global_num_experts != -1 and global_num_experts < local:
            raise ValueError(f"global_num_experts: expected {local} or more (w1 has {local}), or -1 for as many, got "
                             f"{global_num_experts}")
        output = hidden_states if self.inplace else torch.empty_like(hidden_states)
        global_num_experts = local if global_num_experts == -1 else global_num_experts
        rows, scale, meta, ids, weights = self.prepare_finalize.prepare(
            hidden_states, topk_weights, topk_ids, global_num_experts, expert_map, apply_router_weight_on_input,
            experts.quant_config, defer_input_quant=experts.expects_unquantized_inputs)
        topk_ids = topk_ids if ids is None else ids
        topk_weights = topk_weights if weights is None else weights
        _, capacity, n, k, top_k = experts.moe_problem_size(rows, w1, w2, topk_ids)
        # Our experts need no workspaces; another's get the shapes that they ask for.
        shapes = experts.workspace_shapes(capacity, n, k, top_k, global_num_experts, local, meta, activation)
        make = lambda shape: torch.empty(shape, dtype=experts.workspace_dtype(hidden_states.dtype),  # noqa: E731
                                         device=rows.device)
        ours = isinstance(experts, _BatchedExperts)
        expert_output = make((*rows.shape[:2], k) if ours else shapes[2])
        experts.apply(output=expert_output, hidden_states=rows, w1=w1, w2=w2, topk_weights=topk_weights,
                      topk_ids=topk_ids, activation=activation, global_num_experts=global_num_experts,
                      expert_map=expert_map, a1q_scale=scale, a2_scale=experts.a2_scale,
                      workspace13=None if ours else make(shapes[0]), workspace2=None if ours else make(shapes[1]),
                      expert_tokens_meta=meta, apply_router_weight_on_input=apply_router_weight_on_input)
        self.prepare_finalize.finalize(output, expert_output, topk_weights, topk_ids, apply_router_weight_on_input,
                                       experts.finalize_weight_and_reduce_impl())
        return output


FusedMoEModularKernel = FusedMoEKernel  # the name of earlier releases
