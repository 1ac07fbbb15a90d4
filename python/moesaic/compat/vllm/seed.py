# SPDX-License-Identifier: Apache-2.0
"""The classes of seed 001 (fused_batched_moe.py): flags in constructors, scales in `prepare` and `apply`."""

from __future__ import annotations

import dataclasses
from typing import Optional

import torch

from .._common import activation_spec, quant_spec
from . import _batched
from ._batched import FusedMoEActivationFormat


@dataclasses.dataclass
class FusedMoEQuantConfig:
    """How weights and activations are quantized: the flags of the original, and what they imply."""

    quant_dtype: Optional[torch.dtype] = None
    per_act_token_quant: bool = False
    per_out_ch_quant: bool = False
    block_shape: Optional[list] = None
    flags: dict = dataclasses.field(default_factory=dict)

    @staticmethod
    def make(use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
             per_act_token_quant=False, per_out_ch_quant=False, block_shape=None):
        """Raises ValueError when more than one scheme is asked for."""
        flags = dict(use_fp8_w8a8=use_fp8_w8a8, use_int8_w8a8=use_int8_w8a8,
                     use_int8_w8a16=use_int8_w8a16, use_int4_w4a16=use_int4_w4a16)
        if sum(flags.values()) > 1:
            raise ValueError(f"give at most one of {', '.join(n for n, on in flags.items() if on)}")
        dtype = torch.float8_e4m3fn if use_fp8_w8a8 else torch.int8 if use_int8_w8a8 else None
        return FusedMoEQuantConfig(dtype, per_act_token_quant, per_out_ch_quant, block_shape, flags)

    @property
    def is_quantized(self):
        return self.quant_dtype is not None

    @property
    def is_per_act_token(self):
        return self.per_act_token_quant

    @property
    def is_block_quantized(self):
        return self.block_shape is not None

    @property
    def is_per_tensor(self):
        return not self.per_act_token_quant and self.block_shape is None

    def scale_shape(self, max_tokens, hidden_dim):
        """Of activation scales: [1, 1], [tokens, 1] or [tokens, groups]; None when not quantized."""
        if not self.is_quantized:
            return None
        if self.is_block_quantized:
            return (max_tokens, -(-hidden_dim // self.block_shape[1]))
        return (max_tokens, 1) if self.is_per_act_token else (1, 1)

    def batched_scale_shape(self, num_experts, max_tokens, hidden_dim):
        """The same with a leading expert dimension."""
        shape = self.scale_shape(max_tokens, hidden_dim)
        return None if shape is None else (num_experts, *shape)

    def _spec(self, weight_dtype, zero_points, static):
        return quant_spec(weight_dtype, **self.flags, per_channel_quant=self.per_act_token_quant or self.per_out_ch_quant,
                          block_shape=self.block_shape, zero_points=zero_points, static_scale=static)


class BatchedPrepareAndFinalize:
    """Tokens -> [E_local, max_num_tokens, K] and back. Rows beyond an expert's capacity are dropped and
    counted in `dropped` (i32 [1]), which the caller may read."""

    def __init__(self, max_num_tokens, num_local_experts, num_dispatchers, rank):
        for name, value, least in (("max_num_tokens", max_num_tokens, 0), ("num_local_experts", num_local_experts, 1),
                                   ("num_dispatchers", num_dispatchers, 1), ("rank", rank, 0)):
            if value is None or value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        self.max_num_tokens = max_num_tokens
        self.num_local_experts = num_local_experts
        self.rank = rank
        self.num_dispatchers_ = num_dispatchers
        self.dropped = None
        self._expert_map = None

    @property
    def activation_format(self):
        return FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self):
        return self.max_num_tokens

    def topk_indices_dtype(self):
        return None

    def num_dispatchers(self):
        return self.num_dispatchers_

    def _layer(self, num_experts):
        return dict(experts=max(num_experts, self.num_local_experts * (self.rank + 1)),
                    first=self.num_local_experts * self.rank, local=self.num_local_experts,
                    capacity=self.max_num_tokens)

    def _prepare(self, a1, a1_scale, topk_weights, topk_ids, num_experts, expert_map, on_input, quant_config):
        last = self.num_local_experts * (self.rank + 1)
        if expert_map is None and -1 != num_experts < last:  # -1: nobody said
            raise ValueError(f"num_experts: expected {last} or more for rank {self.rank} with {self.num_local_experts} local experts, "
                             f"got {num_experts}; pass the number of all ranks' experts, or an expert_map")
        # finalize is not told the map: it uses the one its rows were made with.
        self._expert_map = expert_map
        rows, row_scale, counts, self.dropped = _batched.prepare(
            self._layer(num_experts), quant_config, a1, a1_scale, topk_weights, topk_ids, expert_map, on_input)
        return rows, row_scale, counts

    def prepare(self, a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map,
                apply_router_weight_on_input, quant_config):
        """(b_a1, b_a1_scale, tokens_per_expert, None, None). `a1` is not modified; top_k may be any with
        apply_router_weight_on_input."""
        del a2_scale
        return (*self._prepare(a1, a1_scale, topk_weights, topk_ids, num_experts, expert_map,
                               apply_router_weight_on_input, quant_config), None, None)

    def finalize(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
        """output [T, K] = sum over slots, fp32, slot order. `fused_expert_output` is not modified."""
        experts = 0 if self._expert_map is None else self._expert_map.numel()
        _batched.finalize(self._layer(experts), output, fused_expert_output, topk_weights, topk_ids, self._expert_map,
                          apply_router_weight_on_input)


class _BatchedExperts:
    def __init__(self, max_num_tokens, num_dispatchers, use_fp8_w8a8=False, use_int8_w8a8=False,
                 use_int8_w8a16=False, use_int4_w4a16=False, per_act_token_quant=False, block_shape=None):
        if max_num_tokens <= 0 or num_dispatchers <= 0:
            raise ValueError(f"max_num_tokens and num_dispatchers must be positive, got {max_num_tokens} and "
                             f"{num_dispatchers}")
        self.quant_config = FusedMoEQuantConfig.make(
            use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16, per_act_token_quant,
            block_shape=block_shape)
        self.use_fp8_w8a8 = use_fp8_w8a8
        self.use_int8_w8a8 = use_int8_w8a8
        self.use_int8_w8a16 = use_int8_w8a16
        self.use_int4_w4a16 = use_int4_w4a16
        self.max_num_tokens = max_num_tokens
        self.num_dispatchers = num_dispatchers

    quant_dtype = property(lambda self: self.quant_config.quant_dtype)
    block_shape = property(lambda self: self.quant_config.block_shape)
    per_act_token_quant = property(lambda self: self.quant_config.per_act_token_quant)

    @property
    def activation_formats(self):
        return (FusedMoEActivationFormat.BatchedExperts, FusedMoEActivationFormat.BatchedExperts)

    def supports_chunking(self):
        return False

    def supports_expert_map(self):
        return False

    def apply(self, output, hidden_states, w1, w2, topk_ids, activation, global_num_experts, expert_map, w1_scale,
              w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale, workspace13, workspace2, expert_num_tokens):
        """output [E, max, K] from hidden_states [E, max, K]; only live rows are read or written. The
        workspaces are accepted; scratch comes from the framework's allocator."""
        del topk_ids, global_num_experts, expert_map, workspace13, workspace2
        quant = self.quant_config
        static = a2_scale is not None and quant.is_quantized and quant.is_per_tensor
        fc1 = dict(weight=w1, scale=w1_scale, zero_point=w1_zp)
        fc2 = dict(weight=w2, scale=w2_scale, zero_point=w2_zp)
        if static:
            fc1["input_scale"] = fc2["input_scale"] = a2_scale.float().reshape(-1)
        scale = _batched.normalize_batched_scales_shape(a1q_scale, w1.shape[0]) if quant.is_quantized else None
        _batched.experts(quant._spec(w1.dtype, w1_zp is not None, static), activation_spec(activation), output,
                         hidden_states, fc1, fc2, scale, expert_num_tokens)


class BatchedTritonExperts(_BatchedExperts):
    """The batched experts. Workspace shapes are those of the original."""

    def workspace_shapes(self, a, aq, M, N, K, topk, global_num_experts, local_num_experts):
        rows = self.max_num_tokens * self.num_dispatchers
        return ((local_num_experts, rows, max(K, N)), (local_num_experts, rows, N // 2),
                (local_num_experts, rows, K), a.dtype)


class NaiveBatchedExperts(_BatchedExperts):
    """The original's oracle; here the same product as BatchedTritonExperts, with its workspace shapes."""

    def __init__(self, max_num_tokens, num_dispatchers, use_fp8_w8a8=False, use_int8_w8a8=False,
                 use_int8_w8a16=False, use_int4_w4a16=False, block_shape=None, per_act_token_quant=False):
        super().__init__(max_num_tokens, num_dispatchers, use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16,
                         use_int4_w4a16, per_act_token_quant, block_shape)

    def workspace_shapes(self, a, aq, M, N, K, topk, global_num_experts, local_num_experts):
        rows = self.max_num_tokens * self.num_dispatchers
        workspace13 = (local_num_experts, rows, K)
        return (workspace13, (rows, N), workspace13, a.dtype)

    def dequant(self, t, scale):
        """Float32 values of quantized ones: scalar, per row, or per block scales."""
        return _batched.dequant(self.quant_config, t, scale)
