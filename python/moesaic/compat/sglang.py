# SPDX-License-Identifier: Apache-2.0
"""SGLang's fused MoE functions (0.5.23 and the 27-argument form of invoke_fused_moe_kernel).

Tile `config` entries are accepted; only BLOCK_SIZE_M has a meaning: it is the padding of the lists.
"""

from __future__ import annotations

import torch

from .. import gemm as _gemm
from ._common import NotOffered, activation_spec, quant_spec


def invoke_fused_moe_kernel(A, B, bias, C, A_scale, B_scale, B_zp, topk_weights, topk_ids,
                            sorted_token_ids, expert_ids, num_tokens_post_padded,
                            mul_routed_weight, top_k, config, compute_type, use_fp8_w8a8,
                            use_int8_w8a8, use_int8_w8a16, use_int4_w4a16, per_channel_quant,
                            block_shape=None, no_combine=False, a_use_tma=False, b_use_tma=False,
                            c_sorted=False, filter_expert=True):
    """One grouped GEMM: C[slot] = A[slot // top_k] x B[expert]^T, with scales, bias and routed weight.

    A [T, K], B [E, N, K (+ padding)], C [T, k, N] or [T * k, N]. With use_fp8_w8a8 or use_int8_w8a8 and a
    float A, A is quantized here and A_scale is the optional static scalar. `compute_type` is C's dtype.
    filter_expert=False is treated as True: an id of -1 has no other defined meaning.
    """
    del compute_type, no_combine, b_use_tma, filter_expert  # C carries its dtype; a call sums nothing
    columns = A.shape[1] // 2 if use_int4_w4a16 else A.shape[1]
    weights = dict(weight=B[..., :columns] if B.shape[2] != columns else B, scale=B_scale, zero_point=B_zp,
                   bias=bias)
    float_input = A.dtype in (torch.float32, torch.float16, torch.bfloat16)
    quantizes = float_input and (use_fp8_w8a8 or use_int8_w8a8)
    tensor_wise = use_fp8_w8a8 and not per_channel_quant and block_shape is None
    quant = quant_spec(B.dtype, use_fp8_w8a8=use_fp8_w8a8, use_int8_w8a8=use_int8_w8a8,
                       use_int8_w8a16=use_int8_w8a16, use_int4_w4a16=use_int4_w4a16,
                       per_channel_quant=per_channel_quant, block_shape=block_shape,
                       zero_points=B_zp is not None, static_scale=tensor_wise and A_scale is not None)
    scale = A_scale
    if quantizes and use_fp8_w8a8 and per_channel_quant and block_shape is None and A_scale is not None:
        # The weights' scales would call for one a token; the original takes the given scalar for all of them.
        if A_scale.numel() != 1:
            raise NotOffered(f"A_scale: expected one scalar for unquantized rows, got shape {tuple(A_scale.shape)}; pass None, "
                             "and scales per token are made here")
        A, scale = static_quant_fp8(A, A_scale, repeat_scale=True)
    elif quantizes and not tensor_wise:
        scale = None  # per token and per group scales are made here
    elif tensor_wise and scale is not None:
        scale = scale.reshape(1)
    weights["scale"] = _f32(B_scale)
    _gemm.grouped_gemm(A, weights, C, quant=quant, a_scale=scale, slots=sorted_token_ids,
                       block_experts=expert_ids, num_padded=num_tokens_post_padded.reshape(1),
                       block_rows=config["BLOCK_SIZE_M"], top_k=top_k,
                       a_order="sorted" if a_use_tma else "slot",
                       c_order="sorted" if c_sorted else "slot",
                       row_weights=topk_weights.reshape(-1) if mul_routed_weight else None)


def _f32(scale):
    """Scales as the kernels read them in place: f32, and on the CPU 16-bit floats, too."""
    if scale is None or scale.dtype == torch.float32:
        return scale
    return scale if scale.dtype in (torch.float16, torch.bfloat16) and not scale.is_cuda else scale.float()


def moe_align_block_size(topk_ids, block_size, num_experts):
    """(sorted_token_ids, expert_ids, num_tokens_post_pad). Slots of one expert keep their order."""
    return _gemm.align(topk_ids.contiguous(), num_experts, block_size)


def scaled_fp8_quant(input, scale=None, num_token_padding=None, use_per_token_if_dynamic=False):
    """e4m3 rows and their scale: static scalar, per token, or one scale from the absmax of all."""
    rows = input if num_token_padding is None else torch.nn.functional.pad(
        input, (0, 0, 0, max(0, num_token_padding - input.shape[0])))
    if scale is not None:
        q, _ = _gemm.quantize(rows, granularity="tensor_static", static_scale=scale.reshape(1).float())
        return q, scale
    return _gemm.quantize(rows, granularity="token" if use_per_token_if_dynamic else "tensor_dynamic")


def static_quant_fp8(x, x_s, repeat_scale=False):
    """e4m3 values of x [..., K] by a given scalar scale, and that scale (with repeat_scale: per row, [R, 1])."""
    flat = x.reshape(-1, x.shape[-1])
    q, _ = _gemm.quantize(flat, granularity="tensor_static", static_scale=x_s.reshape(1).float())
    return q.view(x.shape), x_s.float().expand(flat.shape[0], 1).contiguous() if repeat_scale else x_s


def per_token_quant_int8(x, scale_dtype=torch.float32, cal_sum=False):
    """int8 rows and scales [..., 1]: absmax / 127, rounded half away from zero."""
    if cal_sum:
        raise NotOffered("cal_sum=True: not offered here; no product of this library needs the rows' sums")
    flat = x.reshape(-1, x.shape[-1])
    q, s = _gemm.quantize(flat, to="i8", granularity="token")
    return q.view(x.shape), s.view(*x.shape[:-1], 1).to(scale_dtype)


def per_token_group_quant_fp8(x, group_size, eps=1e-10, column_major_scales=False, scale_tma_aligned=False,
                              scale_ue8m0=False, fuse_silu_and_mul=False, masked_m=None, enable_v2=None):
    """e4m3 rows and scales [..., ceil(K / group_size)]. The scales of rows [T, K] are also to be had as columns
    (column_major_scales), those with padding to a multiple of four rows (scale_tma_aligned). enable_v2 is a hint."""
    del enable_v2
    if scale_ue8m0:
        raise NotOffered("scale_ue8m0=True: activation scales are float32 here; leave it False")
    if fuse_silu_and_mul:
        raise NotOffered("fuse_silu_and_mul=True: call silu_and_mul first")
    if masked_m is not None:
        raise NotOffered("masked_m: use moesaic.quantize(x, granularity='group', num_tokens=masked_m)")
    q, s = _groups(x, group_size, eps, "fp8_e4m3")
    if not column_major_scales:
        return q, s
    if s.dim() != 2:
        raise NotOffered(f"column_major_scales=True: expected x of shape [T, K], got {tuple(x.shape)}")
    rows, groups = s.shape
    columns = torch.empty((groups, -(-rows // 4) * 4 if scale_tma_aligned else rows), dtype=s.dtype, device=s.device)
    return q, columns.t()[:rows].copy_(s)


def per_token_group_quant_int8(x, group_size, eps=1e-10, dtype=torch.int8, enable_v2=None, *, int8_rounding="nearest"):
    """int8 rows and scales per group. The original truncates toward zero: int8_rounding="truncate"."""
    del enable_v2
    if dtype != torch.int8:
        raise NotOffered(f"dtype={dtype}: expected torch.int8; per_token_group_quant_fp8 makes float8_e4m3fn")
    return _groups(x, group_size, eps, "i8", int8_rounding)


def _groups(x, group_size, eps, to, int8_rounding="nearest"):
    if eps != 1e-10:
        raise NotOffered(f"eps={eps}: the absmax is clamped at 1e-10; leave the default")
    q, s = _gemm.quantize(x.reshape(-1, x.shape[-1]), to=to, granularity="group", group_size=group_size,
                          int8_rounding=int8_rounding)
    return q.view(x.shape), s.view(*x.shape[:-1], s.shape[-1])


sglang_per_token_group_quant_fp8 = per_token_group_quant_fp8
sglang_per_token_group_quant_int8 = per_token_group_quant_int8


def silu_and_mul(input, out=None):
    """silu(first half) * second half of the last dimension."""
    return _activate(input, "swiglu", out)


def gelu_and_mul(input, out=None):
    """gelu (erf form) of the first half times the second half."""
    return _activate(input, "geglu", out)


def gelu_tanh_and_mul(input, out=None):
    """gelu (tanh form) of the first half times the second half."""
    return _activate(input, "geglu_tanh", out)


def _activate(input, kind, out):
    flat = input.reshape(-1, input.shape[-1])
    shape = (*input.shape[:-1], input.shape[-1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=input.dtype, device=input.device)
    _gemm.activate(flat, kind, output=out.view(-1, shape[-1]))
    return out


def moe_sum_reduce(input, output, routed_scaling_factor=1.0):
    """output [T, H] = routed_scaling_factor * sum over k of input [T, k, H]: fp32, one rounding."""
    _gemm.sum_slots(input, scale=routed_scaling_factor, output=output)


def fused_experts(hidden_states, w1, w2, topk_output, moe_runner_config=None, b1=None, b2=None,
                  use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
                  use_int4_w4a16=False, per_channel_quant=False, w1_scale=None, w2_scale=None,
                  w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None, block_shape=None):
    """The whole layer on unpacked weights: [T, H] -> [T, H] (or [T, k, H] with no_combine).

    topk_output: (topk_weights, topk_ids, ...). moe_runner_config: any object with the attributes
    activation, is_gated, apply_router_weight_on_input, inplace, no_combine, routed_scaling_factor,
    gemm1_alpha, gemm1_clamp_limit; absent ones take SGLang's defaults.
    """
    option = lambda name, default: getattr(moe_runner_config, name, default)  # noqa: E731
    if not isinstance(topk_output, (tuple, list)) or len(topk_output) < 2:
        raise TypeError("topk_output: expected (topk_weights, topk_ids, ...), got "
                        f"{type(topk_output).__name__}; pass what routing gave, weights first")
    topk_weights, topk_ids = topk_output[0], topk_output[1]
    tokens, top_k = topk_ids.shape
    experts, n = w1.shape[0], w1.shape[1]
    gated = option("is_gated", True)
    on_input = option("apply_router_weight_on_input", False)
    no_combine = option("no_combine", False)
    if on_input and top_k != 1:
        raise ValueError(f"apply_router_weight_on_input: needs top_k = 1, got {top_k}")
    block_rows = 16 if tokens * top_k <= 16 * experts else 64
    slots, block_experts, num_padded = moe_align_block_size(topk_ids, block_rows, experts)
    flags = dict(use_fp8_w8a8=use_fp8_w8a8, use_int8_w8a8=use_int8_w8a8, use_int8_w8a16=use_int8_w8a16,
                 use_int4_w4a16=use_int4_w4a16, per_channel_quant=per_channel_quant, block_shape=block_shape)
    lists = (slots, block_experts, num_padded)
    weights = topk_weights.float().contiguous()
    dtype = hidden_states.dtype
    up = torch.empty((tokens * top_k, n), dtype=dtype, device=hidden_states.device)
    invoke_fused_moe_kernel(hidden_states, w1, b1, up, a1_scale, w1_scale, w1_zp, weights, topk_ids, *lists,
                            on_input, top_k, {"BLOCK_SIZE_M": block_rows}, dtype, **flags)
    spec = activation_spec(option("activation", "silu"), gated)
    alpha, limit = option("gemm1_alpha", None), option("gemm1_clamp_limit", None)
    if alpha is not None:  # GPT-OSS: interleaved rows
        spec = {"kind": "swiglu_oai", "alpha": alpha, "layout": "interleaved",
                "limit": 3e38 if limit is None else limit}
    elif limit is not None:
        spec = {"kind": "swiglu_clamp", "limit": limit}
    hidden = torch.empty((tokens * top_k, n // 2 if gated else n), dtype=dtype, device=up.device)
    _gemm.activate(up, spec, output=hidden)
    down = torch.empty((tokens, top_k, w2.shape[1]), dtype=dtype, device=up.device)
    # GEMM2's rows are slots already: top_k = 1 over [T * k, I].
    invoke_fused_moe_kernel(hidden, w2, b2, down.view(tokens * top_k, w2.shape[1]), a2_scale, w2_scale, w2_zp, weights,
                            topk_ids, *lists, not on_input, 1, {"BLOCK_SIZE_M": block_rows}, dtype, **flags)
    if no_combine:
        return down
    output = hidden_states if option("inplace", False) else torch.empty_like(hidden_states)
    factor = option("routed_scaling_factor", None)
    moe_sum_reduce(down, output, 1.0 if factor is None else factor)
    return output


def fused_moe(hidden_states, w1, w2, topk_output, moe_runner_config=None, b1=None, b2=None, **kwargs):
    """The same function under SGLang's other name."""
    return fused_experts(hidden_states, w1, w2, topk_output, moe_runner_config, b1, b2, **kwargs)
