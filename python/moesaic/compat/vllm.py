# SPDX-License-Identifier: Apache-2.0
"""vLLM's batched MoE classes and functions, with the signatures of seed 001 (fused_batched_moe.py).

All schemes run, where the original says "NYI". Nothing is synchronized with the host, outside a graph
or inside one, and both give the same bits. The Triton device functions have no counterpart.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Optional

import torch

from .. import gemm as _gemm
from .. import stages as _stages
from ._common import activation_spec, quant_spec

_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
          torch.float8_e4m3fn: "fp8_e4m3", torch.int8: "i8"}


class FusedMoEActivationFormat(enum.Enum):
    Standard = "standard"
    BatchedExperts = "batched_experts"


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

    def _spec(self, weight_dtype, w_scale, w_zp, static):
        per_channel = self.per_act_token_quant or self.per_out_ch_quant
        spec = quant_spec(weight_dtype, **self.flags, per_channel_quant=per_channel,
                          block_shape=self.block_shape, zero_points=w_zp is not None, static_scale=static)
        return spec


def normalize_scales_shape(scales):
    """A scalar scale as [1, 1]; others unchanged."""
    if scales is not None and scales.numel() == 1:
        return scales.view(1, 1)
    return scales


def normalize_batched_scales_shape(scales, num_experts):
    """Activation scales as [E, 1 | tokens, 1 | groups]; a scalar is repeated for every expert."""
    if scales is not None and scales.ndim < 3:
        if scales.numel() == 1:
            return scales.view(1, 1, 1).expand(num_experts, 1, 1).contiguous()
        return scales.view(num_experts, -1, scales.size(-1))
    return scales




class BatchedPrepareAndFinalize:
    """Tokens -> [E_local, max_num_tokens, K] and back. Rows beyond an expert's capacity are dropped and
    counted in `dropped` (i32 [1]), which the caller may read."""

    def __init__(self, max_num_tokens, num_local_experts, num_dispatchers, rank):
        self.max_num_tokens = max_num_tokens
        self.num_local_experts = num_local_experts
        self.rank = rank
        self.num_dispatchers_ = num_dispatchers
        self.dropped = None

    @property
    def activation_format(self):
        return FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self):
        return self.max_num_tokens

    def topk_indices_dtype(self):
        return None

    def num_dispatchers(self):
        return self.num_dispatchers_

    def _config(self, hidden, num_experts, top_k, dtype, spec, weight_on):
        return dict(experts=num_experts, hidden=hidden, intermediate=hidden, top_k=top_k, max_tokens=0,
                    local_first=self.num_local_experts * self.rank, local_count=self.num_local_experts,
                    quant=spec, weight_on=weight_on, input_dtype=dtype,
                    output_dtype=dtype if dtype in ("f32", "f16", "bf16") else "bf16")

    def prepare(self, a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map,
                apply_router_weight_on_input, quant_config):
        """(b_a1, b_a1_scale, tokens_per_expert, None, None). `a1` is not modified; top_k may be any with
        apply_router_weight_on_input."""
        del a2_scale
        hidden, device = a1.shape[1], a1.device
        local, capacity = self.num_local_experts, self.max_num_tokens
        static = a1_scale is not None and quant_config.is_quantized and a1_scale.numel() == 1
        spec = quant_config._spec(a1.dtype, None, None, False) if quant_config.is_quantized else dict(
            scheme=_NAMES[a1.dtype])
        scale = None
        if static:  # one scalar for all: quantize the tokens, then move them
            a1, _ = _gemm.quantize(a1, to=_NAMES[quant_config.quant_dtype], granularity="tensor_static",
                                   static_scale=a1_scale.reshape(1))
            scale = a1_scale.reshape(1)
        config = self._config(hidden, num_experts, topk_ids.shape[1], _NAMES[a1.dtype], spec,
                              "input" if apply_router_weight_on_input else "output")
        dtype = quant_config.quant_dtype or a1.dtype
        rows = torch.empty((local, capacity, hidden), dtype=dtype, device=device)
        row_scale = None
        if quant_config.is_quantized:
            row_scale = torch.ones(quant_config.batched_scale_shape(local, capacity, hidden),
                                   dtype=torch.float32, device=device)
        counts = torch.empty(local, dtype=torch.int32, device=device)
        self.dropped = torch.zeros(1, dtype=torch.int32, device=device)
        _stages.prepare(config, a1, topk_ids.contiguous(), rows, counts, hidden_scale=scale,
                        topk_weights=topk_weights.float().contiguous() if apply_router_weight_on_input else None,
                        row_scale=row_scale, expert_map=expert_map, status=self.dropped)
        return rows, row_scale, counts, None, None

    def finalize(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input):
        """output [T, K] = sum over slots, fp32, slot order. `fused_expert_output` is not modified."""
        hidden = fused_expert_output.shape[2]
        experts = max(int(self.num_local_experts * (self.rank + 1)), self.num_local_experts)
        config = self._config(hidden, experts, topk_ids.shape[1], "f32", dict(scheme="f32"),
                              "input" if apply_router_weight_on_input else "output")
        _stages.finalize(config, fused_expert_output, topk_weights.float().contiguous(), output,
                         topk_ids=topk_ids.contiguous())


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
        del global_num_experts, expert_map, workspace13, workspace2
        experts, hidden = w2.shape[0], w2.shape[1]
        intermediate = w1.shape[1] // 2
        static = a2_scale is not None and self.quant_config.is_quantized and self.quant_config.is_per_tensor
        spec = self.quant_config._spec(w1.dtype, w1_scale, w1_zp, static)
        dtype = _NAMES[hidden_states.dtype]
        config = dict(experts=experts, hidden=hidden, intermediate=intermediate,
                      top_k=1, max_tokens=0, quant=spec, activation=activation_spec(activation),
                      input_dtype=dtype, output_dtype=_NAMES[output.dtype])
        one, two = dict(weight=w1, scale=_plain(w1_scale), zero_point=w1_zp), dict(
            weight=w2, scale=_plain(w2_scale), zero_point=w2_zp)
        if static:
            scalar = a2_scale.float().reshape(-1)
            one["input_scale"] = two["input_scale"] = scalar[:1] if scalar.numel() != experts else scalar
        scale = normalize_batched_scales_shape(a1q_scale, experts) if self.quant_config.is_quantized else None
        _stages.experts(config, hidden_states, output, weights=dict(fc1=one, fc2=two),
                        num_tokens=expert_num_tokens.to(torch.int32), row_scale=scale)


def _plain(scale):
    return scale if scale is None else scale.float()


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
        if self.quant_config.is_per_act_token or self.quant_config.is_per_tensor:
            return t.to(torch.float32) * scale
        repeats = [-(-n // s) for n, s in zip(t.shape, scale.shape)]
        full = scale
        for dim, (count, n) in enumerate(zip(repeats, t.shape)):
            full = full.repeat_interleave(count, dim=dim).narrow(dim, 0, n)
        return t.to(torch.float32) * full


def batched_moe_kernel_quantize_input(A, A_scale, num_tokens, E, N, expert_num_tokens, qtype,
                                      per_act_token_quant, block_shape=None):
    """(A_q, A_q_scale) of the live rows of A [E, max, K]; no host sync, the same in and out of a graph."""
    del num_tokens, N
    if qtype is None:
        return A, normalize_batched_scales_shape(A_scale, E)
    experts, capacity, hidden = A.shape
    quant = FusedMoEQuantConfig(qtype, per_act_token_quant, False, block_shape)
    rows = A.view(experts * capacity, hidden)
    if quant.is_per_tensor:
        flags = "fp8" if qtype == torch.float8_e4m3fn else "int8"
        if flags != "fp8":
            raise ValueError("qtype: int8 is quantized per token or per group; set per_act_token_quant or block_shape")
        if A_scale is None:
            # One absmax per expert over its live rows.
            live = torch.arange(capacity, device=A.device)[None, :] < expert_num_tokens[:, None]
            absmax = (A.abs().amax(dim=2) * live).amax(dim=1)
            A_scale = absmax.float().clamp(min=1e-10) / 448.0
        scale = normalize_batched_scales_shape(A_scale.float(), experts).reshape(experts)
        A_q = torch.empty_like(A, dtype=qtype)
        for e in range(experts):
            _gemm.quantize(A[e], granularity="tensor_static", static_scale=scale[e:e + 1], output=A_q[e])
        return A_q, scale.view(experts, 1, 1)
    to = "fp8_e4m3" if qtype == torch.float8_e4m3fn else "i8"
    granularity = "token" if per_act_token_quant else "group"
    group = hidden if per_act_token_quant else block_shape[1]
    A_q, scale = _gemm.quantize(rows, to=to, granularity=granularity, group_size=group)
    return A_q.view(A.shape), scale.view(experts, capacity, -1)


def invoke_moe_batched_triton_kernel(A, B, C, expert_num_tokens, compute_type, A_scale, B_scale, B_zp,
                                     use_fp8_w8a8, use_int8_w8a16, use_int4_w4a16, config,
                                     per_act_token_quant, block_shape=None):
    """C [E, max, N] = A [E, max, K] x B [E, N, K]^T over the live rows of each expert."""
    del compute_type, config
    spec = quant_spec(B.dtype, use_fp8_w8a8=use_fp8_w8a8, use_int8_w8a16=use_int8_w8a16, use_int4_w4a16=use_int4_w4a16,
                      per_channel_quant=per_act_token_quant, block_shape=block_shape, zero_points=B_zp is not None,
                      static_scale=False)
    scale = normalize_batched_scales_shape(A_scale, A.shape[0]) if use_fp8_w8a8 else None
    _gemm.grouped_gemm(A, dict(weight=B, scale=_plain(B_scale), zero_point=B_zp), C, quant=spec, a_scale=scale,
                       num_tokens=expert_num_tokens.to(torch.int32))
