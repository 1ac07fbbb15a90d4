# SPDX-License-Identifier: Apache-2.0
"""What both of vLLM's forms share: scales, and the three stages of a batched layer.

Nothing is synchronized with the host, outside a graph or inside one, and both give the same bits.
"""

from __future__ import annotations

import enum

import torch

from ... import gemm as _gemm
from ... import stages as _stages
from .._common import quant_spec

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
         torch.float8_e4m3fn: "fp8_e4m3", torch.int8: "i8"}


class FusedMoEActivationFormat(enum.Enum):
    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


def normalize_scales_shape(scales):
    """A scalar scale as [1, 1], others as [rows, last extent]."""
    if scales is None:
        return None
    return scales.view(1, 1) if scales.numel() == 1 else scales.view(-1, scales.size(-1))


def normalize_batched_scales_shape(scales, num_experts):
    """Activation scales as [E, 1 | tokens, 1 | groups]; a scalar is repeated for every expert."""
    if scales is not None and scales.ndim < 3:
        if scales.numel() == 1:
            return scales.view(1, 1, 1).expand(num_experts, 1, 1).contiguous()
        return scales.view(num_experts, -1, scales.size(-1))
    return scales


def plain(scale):
    """A weight scale in a dtype the library reads (e8m0 bytes stay)."""
    return scale if scale is None or scale.dtype == torch.uint8 else scale.float()


def weight_scale(spec, weight, scale):
    """`scale` as the scheme of `spec` takes it: one per expert stands for all of its channels."""
    scale = plain(scale)
    if scale is None or scale.numel() != weight.shape[0]:
        return scale
    if spec["scheme"] in ("fp8_channel", "int8_channel"):
        return scale.reshape(-1, 1).expand(weight.shape[:2])
    return scale.reshape(-1) if spec["scheme"] == "fp8_tensor" or spec.get("weight_scale") == "tensor" else scale


def prepare(layer, quant, a1, a1_scale, topk_weights, topk_ids, expert_map, apply_router_weight_on_input):
    """(rows [E_local, capacity, K], row_scale, counts, dropped). `a1` is not modified; any top_k.

    layer: dict(experts, first, local, capacity). quant: a FusedMoEQuantConfig of either form.
    """
    hidden, device = a1.shape[1], a1.device
    local, capacity = layer["local"], layer["capacity"]
    spec, scale, given = dict(scheme=NAMES.get(a1.dtype)), None, a1
    if quant.is_quantized:
        spec = act_spec(quant)
        if a1.dtype == quant.quant_dtype:  # quantized by the caller: rows and scales only move
            if a1_scale is None:
                raise ValueError(f"a1_scale: {a1.dtype} rows need their scales")
            scale = a1_scale.float().reshape(1) if a1_scale.numel() == 1 else a1_scale.float().contiguous()
        elif a1_scale is not None:
            if a1_scale.numel() != 1 or not quant.is_per_tensor:
                raise ValueError(f"a1_scale: expected one scalar for unquantized rows, got {tuple(a1_scale.shape)}; "
                                 "scales per token or per group are computed here")
            scale = a1_scale.float().reshape(1)
            given, _ = _gemm.quantize(a1, to=NAMES[quant.quant_dtype], granularity="tensor_static", static_scale=scale)
    dtype = NAMES[given.dtype]
    config = dict(experts=layer["experts"], hidden=hidden, intermediate=hidden, top_k=topk_ids.shape[1], max_tokens=0,
                  local_first=layer["first"], local_count=local, quant=spec,
                  weight_on="input" if apply_router_weight_on_input else "output", input_dtype=dtype,
                  output_dtype=dtype if dtype in ("f32", "f16", "bf16") else "bf16")
    rows = torch.empty((local, capacity, hidden), dtype=quant.quant_dtype or a1.dtype, device=device)
    row_scale = None
    if quant.is_quantized:
        row_scale = torch.ones(quant.batched_scale_shape(local, capacity, hidden), dtype=torch.float32, device=device)
    counts = torch.empty(local, dtype=torch.int32, device=device)
    dropped = torch.zeros(1, dtype=torch.int32, device=device)
    _stages.prepare(config, given, topk_ids.contiguous(), rows, counts, hidden_scale=scale,
                    topk_weights=topk_weights.float().contiguous() if apply_router_weight_on_input else None,
                    row_scale=row_scale, expert_map=expert_map, status=dropped)
    return rows, row_scale, counts, dropped


def act_spec(quant):
    """A scheme whose activations are quantized as `quant` says; its weights do not matter to prepare."""
    kind = "fp8" if quant.quant_dtype == torch.float8_e4m3fn else "int8"
    if quant.is_block_quantized:
        return dict(scheme=f"{kind}_block", block_k=quant.block_shape[1])
    if quant.is_per_act_token:
        return dict(scheme=f"{kind}_channel")
    if kind == "int8":
        raise ValueError("int8 activations have a scale per token or per group: set per_act_token_quant or "
                         "block_shape")
    return dict(scheme="fp8_tensor", act_scale="tensor_dynamic")


def experts(spec, activation, output, rows, fc1, fc2, row_scale, counts):
    """output [E, capacity, K] from rows [E, capacity, K]; only live rows are read or written."""
    gated = activation["kind"].startswith(("swiglu", "geglu"))
    fc1, fc2 = ({k: v for k, v in fc.items() if v is not None} for fc in (fc1, fc2))
    config = dict(experts=fc2["weight"].shape[0], hidden=fc2["weight"].shape[1],
                  intermediate=fc1["weight"].shape[1] // (2 if gated else 1), top_k=1, max_tokens=0,
                  quant=spec, activation=activation, input_dtype=NAMES[rows.dtype], output_dtype=NAMES[output.dtype])
    for fc in (fc1, fc2):
        fc["scale"] = weight_scale(spec, fc["weight"], fc.get("scale"))
    _stages.experts(config, rows, output, weights=dict(fc1=fc1, fc2=fc2), num_tokens=counts.to(torch.int32),
                    row_scale=row_scale)


def finalize(layer, output, expert_output, topk_weights, topk_ids, expert_map, apply_router_weight_on_input):
    """output [T, K] = sum over slots, fp32, slot order. `expert_output` is not modified."""
    config = dict(experts=layer["experts"], hidden=expert_output.shape[2], intermediate=expert_output.shape[2],
                  top_k=topk_ids.shape[1], max_tokens=0, local_first=layer["first"], local_count=layer["local"],
                  quant=dict(scheme="f32"), weight_on="input" if apply_router_weight_on_input else "output",
                  input_dtype="f32", output_dtype="f32")
    _stages.finalize(config, expert_output, topk_weights.float().contiguous(), output,
                     topk_ids=topk_ids.contiguous(), expert_map=expert_map)


def dequant(quant, t, scale):
    """Float32 values of quantized rows t [N, K]: scalar, per row [N, 1], or per block scales. Multiplied by the one
    kernel that has such a product, the sum over slots, with a slot for every group of a row."""
    rows, columns = t.shape
    group = columns
    if quant.is_per_act_token or quant.is_per_tensor:
        scale = scale.reshape(-1, 1).expand(rows, 1)
    else:
        (block, group), (down, across) = quant.block_shape, scale.shape
        scale = scale[:, None].expand(down, block, across).reshape(-1, across)[:rows]
    groups = scale.shape[1]
    values = torch.nn.functional.pad(t.to(torch.float32), (0, groups * group - columns))
    full = _gemm.sum_slots(values.view(-1, 1, group), scale.float().reshape(-1, 1).contiguous())
    return full.view(rows, groups * group)[:, :columns]


def batched_moe_kernel_quantize_input(A, A_scale, num_tokens, E, N, expert_num_tokens, qtype,
                                      per_act_token_quant, block_shape=None):
    """(A_q, A_q_scale) of the live rows of A [E, max, K]: one stage, no host sync, in and out of a graph.

    Per tensor: one scale per expert, static from A_scale (a scalar or one per expert) or from the absmax
    of that expert's live rows. A_q_scale is [E, 1, 1], [E, max, 1] or [E, max, groups].
    """
    del num_tokens, N
    if qtype is None:
        return A, normalize_batched_scales_shape(A_scale, E)
    experts_, capacity, hidden = A.shape
    per_tensor = not per_act_token_quant and block_shape is None
    if per_tensor and qtype != torch.float8_e4m3fn:
        raise ValueError("qtype: int8 is quantized per token or per group; set per_act_token_quant or block_shape")
    group = block_shape[1] if block_shape is not None else hidden
    granularity, static = "token" if per_act_token_quant else "group", None
    if per_tensor:
        granularity = "tensor_dynamic" if A_scale is None else "tensor_static"
        static = None if A_scale is None else A_scale.float().reshape(-1)
    elif A_scale is not None:
        raise ValueError("A_scale: scales per token or per group are computed here; expected None")
    scale = torch.zeros((experts_, 1 if per_tensor else capacity, -(-hidden // group) if block_shape else 1),
                        dtype=torch.float32, device=A.device)
    return _gemm.quantize(A, to=NAMES[qtype], granularity=granularity, group_size=group, static_scale=static,
                          num_tokens=expert_num_tokens.to(torch.int32), scale=scale)


def invoke_moe_batched_triton_kernel(A, B, C, expert_num_tokens, compute_type, A_scale, B_scale, B_zp,
                                     use_fp8_w8a8, use_int8_w8a16, use_int4_w4a16, config,
                                     per_act_token_quant, block_shape=None):
    """C [E, max, N] = A [E, max, K] x B [E, N, K]^T over the live rows of each expert."""
    del compute_type, config
    spec = quant_spec(B.dtype, use_fp8_w8a8=use_fp8_w8a8, use_int8_w8a16=use_int8_w8a16, use_int4_w4a16=use_int4_w4a16,
                      per_channel_quant=per_act_token_quant, block_shape=block_shape, zero_points=B_zp is not None,
                      static_scale=False)
    scale = normalize_batched_scales_shape(A_scale, A.shape[0]) if use_fp8_w8a8 else None
    _gemm.grouped_gemm(A, dict(weight=B, scale=weight_scale(spec, B, B_scale), zero_point=B_zp), C, quant=spec,
                       a_scale=scale, num_tokens=expert_num_tokens.to(torch.int32))
