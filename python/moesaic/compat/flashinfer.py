# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's cutlass_fused_moe (0.7.2, and the SM80 form of seed 003) on this library.

fc1 rows are [up; gate]. Weights are read where they lie.
"""

from __future__ import annotations

import contextlib
import enum

import torch

from .. import gemm as _gemm
from .. import stages as _stages
from ._common import NotOffered


class ActivationType(enum.IntEnum):
    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9


_KINDS = {ActivationType.Gelu: "gelu", ActivationType.Relu: "relu", ActivationType.Silu: "silu",
          ActivationType.Swiglu: "swiglu", ActivationType.Geglu: "geglu",
          ActivationType.SwigluBias: "swiglu_oai", ActivationType.Relu2: "relu2",
          ActivationType.SwigluStep: "swiglu_step", ActivationType.GegluTanh: "geglu_tanh",
          ActivationType.Identity: "identity"}
_NO_LIMIT = 3e38  # what no f32 is clamped at but the last few
_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8_e4m3"}


def _mode(x, fc1, quant_scales, use_deepseek_fp8_block_scale, use_w4_group_scaling):
    """(quant, fc1 tensors, fc2 tensors, hidden_scale) of the modes that quant_scales stands for."""
    scales = list(quant_scales or [])
    if fc1.dtype not in (*_NAMES, torch.uint8):
        raise NotOffered(f"fc1_expert_weights: {fc1.dtype} weights are not offered; known: "
                         f"{', '.join(map(str, _NAMES))}, torch.uint8 (two 4-bit values)")
    if len(scales) in (5, 6):
        raise NotOffered(f"quant_scales: {len(scales)} tensors (NVFP4, or MXFP4 with fp8 rows) are not offered; use fp8 "
                         "block scales, or MXFP4 with bf16 rows")
    if use_deepseek_fp8_block_scale:
        if fc1.dtype != torch.float8_e4m3fn:
            raise ValueError("use_deepseek_fp8_block_scale=True: expected float8_e4m3fn weights, got "
                             f"{fc1.dtype}; quantize them, or leave the flag off")
        if len(scales) != 2:
            raise ValueError(f"quant_scales: fp8 block scaling takes [fc1_scales, fc2_scales], got {len(scales)}")
        return dict(scheme="fp8_block"), dict(scale=scales[0]), dict(scale=scales[1]), None
    if use_w4_group_scaling and len(scales) == 2:  # MXFP4 weights, 16-bit rows; scales may come viewed as int32
        one, two = (s if s.dtype == torch.uint8 else s.contiguous().view(torch.uint8) for s in scales)
        return dict(scheme="mxfp4_w4a16"), dict(scale=one), dict(scale=two), None
    if use_w4_group_scaling:
        if len(scales) != 8:
            raise ValueError("quant_scales: W4A8 takes 8 tensors (weight scales, activation prequant scales, zero "
                             f"points, alphas; fc1 and fc2 each), got {len(scales)}")
        groups = scales[0].shape[-1]
        group = fc1.shape[2] * 2 // groups
        zeros = [None if z is None or z.numel() == 0 else z for z in (scales[4], scales[5])]
        one = torch.ones(1, dtype=torch.float32, device=x.device)
        # The weights' scales are bf16 bits, in tensors that may be called float16; prequant scales are what they say.
        bits = lambda t: t.view(torch.bfloat16) if t.dtype == torch.float16 else t  # noqa: E731
        scales[:2] = (bits(t) for t in scales[:2])
        make = lambda s, p, z, a: dict(scale=s, prequant=p.reshape(p.shape[0], -1) if p.dim() == 3 else p,  # noqa: E731
                                       zero_point=z, alpha=a.reshape(-1), input_scale=one)
        return (dict(scheme="int4_w4a8_fp8", group_size=group, act_scale="tensor_static",
                     zero_points=zeros[0] is not None),
                make(scales[0], scales[2], zeros[0], scales[6]), make(scales[1], scales[3], zeros[1], scales[7]), None)
    if fc1.dtype == torch.uint8 and len(scales) == 2:
        if scales[0].dtype == torch.uint8 and fc1.shape[2] * 2 == scales[0].shape[-1] * 32:
            return dict(scheme="mxfp4_w4a16"), dict(scale=scales[0]), dict(scale=scales[1]), None
        group = fc1.shape[2] * 2 // scales[0].shape[-1]
        return (dict(scheme="int4_w4a16", group_size=group), dict(scale=scales[0]), dict(scale=scales[1]), None)
    if fc1.dtype == torch.float8_e4m3fn:
        if len(scales) != 4:
            raise ValueError("quant_scales: fp8 per tensor takes [fc1_dequant, fc2_quant, fc2_dequant, "
                             f"input_dequant], got {len(scales)}")
        # fc1_dequant and fc2_dequant hold weight scale x activation scale; fc2_quant is the reciprocal of
        # the activation scale of the second product.
        fc1_dequant, fc2_quant, fc2_dequant, input_dequant = (s.float().reshape(-1) for s in scales)
        experts = fc1.shape[0]
        act2 = 1.0 / fc2_quant
        weight1 = (fc1_dequant / input_dequant).expand(experts).contiguous()
        weight2 = (fc2_dequant / act2).expand(experts).contiguous()
        return (dict(scheme="fp8_tensor", act_scale="tensor_static"),
                dict(scale=weight1, input_scale=input_dequant[:1].contiguous()),
                dict(scale=weight2, input_scale=act2.contiguous()),
                input_dequant[:1].contiguous() if x.dtype == torch.float8_e4m3fn else None)
    if scales:
        raise ValueError(f"quant_scales: {len(scales)} tensors do not fit {fc1.dtype} weights")
    if fc1.dtype == torch.uint8:
        raise ValueError("quant_scales: 4-bit weights need [fc1_scales, fc2_scales], got none")
    return dict(scheme=_NAMES[fc1.dtype]), {}, {}, None


def _name(argument, dtype):
    if dtype not in _NAMES:
        raise ValueError(f"{argument}: {dtype} is not offered; known: {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


# What is refused when it is not this value, and what to do instead.
_REFUSED = {
    "min_latency_mode": (False, "there is one mode; decode is fast without it"),
    "enable_alltoall": (False, "exchange tokens around moesaic.prepare and moesaic.finalize instead"),
    "use_mxfp8_act_scaling": (False, "use fp8 block scales, or MXFP4 weights with bf16 activations"),
    "cluster_size": (1, "expected 1; use ep_size for expert parallelism"),
    "use_wfp4afp8_humming": (False, "use MXFP4 weights with bf16 activations (use_w4_group_scaling, two scales)"),
    "situ_beta": (None, "the activation Situ is not offered"),
    "situ_linear_beta": (None, "the activation Situ is not offered"),
}


def _refuse(given, later):
    for name in later:
        if "lora" in name:
            raise NotOffered(f"{name}: adapters are not run here; merge them into the weights")
        if name not in _REFUSED:
            raise TypeError(f"cutlass_fused_moe() got an unexpected keyword argument '{name}'")
    for name, (expected, why) in _REFUSED.items():
        value = given[name] if name in given else later.get(name, expected)
        if value is not expected and value != expected:
            shown = tuple(value.shape) if isinstance(value, torch.Tensor) else value
            raise NotOffered(f"{name}={shown}: {why}")


def cutlass_fused_moe(input, token_selected_experts, token_final_scales, fc1_expert_weights,
                      fc2_expert_weights, output_dtype, quant_scales, fc1_expert_biases=None,
                      fc2_expert_biases=None, input_sf=None, swiglu_alpha=None, swiglu_beta=None,
                      swiglu_limit=None, tp_size=1, tp_rank=0, ep_size=1, ep_rank=0, cluster_size=1,
                      cluster_rank=0, output=None, enable_alltoall=False,
                      use_deepseek_fp8_block_scale=False, use_w4_group_scaling=False,
                      use_mxfp8_act_scaling=False, min_latency_mode=False, use_packed_weights=False,
                      tune_max_num_tokens=8192, enable_pdl=None,
                      activation_type=ActivationType.Swiglu, swizzled_input_sf=True, use_fused_finalize=True,
                      profile_ids=None, workspace_buffer=None, **later):
    """y [T, H] = sum_j scale_j * (FC2(act(FC1 x)) + b2), local experts only; fc1 order is [up; gate].

    input [T, H]; token_selected_experts i32 [T, k] (global ids; others than this rank's contribute
    nothing); fc1_expert_weights [E_l, 2I or I, H]; fc2_expert_weights [E_l, H, I]. quant_scales as in the
    modes of FlashInfer. swiglu_alpha, swiglu_beta, swiglu_limit: f32 [E_l]; absent ones are 1, 0 and no limit
    (SwigluStep: 7). tune_max_num_tokens, enable_pdl, swizzled_input_sf, use_fused_finalize,
    profile_ids and workspace_buffer are hints: accepted, and never change bits. `later`: what releases
    after 0.7.2 added, refused by name like every mode that is not run here.
    """
    _refuse(dict(min_latency_mode=min_latency_mode, enable_alltoall=enable_alltoall, cluster_size=cluster_size,
                 use_mxfp8_act_scaling=use_mxfp8_act_scaling), later)
    if use_packed_weights and not use_w4_group_scaling:
        raise NotOffered("use_packed_weights=True: only W4A8 (use_w4_group_scaling) has packed weights; pass them as [E, N, K]")
    del swizzled_input_sf, use_fused_finalize, profile_ids, workspace_buffer, cluster_rank
    del tune_max_num_tokens, enable_pdl
    for kind, size, rank in (("tp", tp_size, tp_rank), ("ep", ep_size, ep_rank)):
        if size < 1:
            raise ValueError(f"{kind}_size: expected 1 or more, got {size}")
        if not 0 <= rank < size:
            raise ValueError(f"{kind}_rank: expected 0 to {size - 1} ({kind}_size - 1), got {rank}")
    x, fc1, fc2 = input, fc1_expert_weights, fc2_expert_weights
    tokens, top_k = token_selected_experts.shape
    local, hidden = fc2.shape[0], fc2.shape[1]
    if int(activation_type) not in _KINDS:
        raise NotOffered(f"activation_type={activation_type!r}: not offered; known: "
                         f"{', '.join(kind.name for kind in _KINDS)}")
    kind = _KINDS[int(activation_type)]
    gated = kind.startswith(("swiglu", "geglu"))
    intermediate = fc1.shape[1] // (2 if gated else 1)
    parameters = {}
    if kind == "swiglu" and (swiglu_alpha is not None or swiglu_beta is not None):
        kind = "swiglu_oai"
    elif kind == "swiglu" and swiglu_limit is not None:
        kind = "swiglu_clamp"
    if kind == "swiglu_oai":  # what is absent does nothing; the library's own defaults are GPT-OSS's. (SwigluStep's limit is 7.)
        parameters = {"alpha": 1.0, "beta": 0.0, "limit": _NO_LIMIT}
    quant, one, two, hidden_scale = _mode(x, fc1, quant_scales, use_deepseek_fp8_block_scale, use_w4_group_scaling)
    if input_sf is not None:
        hidden_scale = input_sf
    config = dict(experts=local * ep_size, hidden=hidden, intermediate=intermediate, top_k=top_k, max_tokens=tokens,
                  local_first=ep_rank * local, local_count=local, quant=quant,
                  activation={"kind": kind, "order": "up_first", **parameters},
                  input_dtype=_name("input", x.dtype), output_dtype=_name("output_dtype", output_dtype))
    weights = dict(fc1=dict(weight=fc1, bias=fc1_expert_biases, **one),
                   # The bias of FC2 belongs to one rank of a tensor-parallel group.
                   fc2=dict(weight=fc2, bias=fc2_expert_biases if tp_rank == 0 else None, **two),
                   alpha=swiglu_alpha, beta=swiglu_beta, limit=swiglu_limit)
    if output is None:
        output = torch.empty((tokens, hidden), dtype=output_dtype, device=x.device)
    elif tuple(output.shape) != (tokens, hidden) or output.dtype != output_dtype or output.device != x.device:
        raise ValueError(f"output: expected {output_dtype} of shape {(tokens, hidden)} on {x.device}, got {output.dtype} of shape "
                         f"{tuple(output.shape)} on {output.device}; leave it out, and one is made")
    if tokens == 0:
        return [output]
    block_rows = 16 if tokens * top_k <= 16 * local else 64
    # Where each slot's row lies, or -1 for other ranks' experts: which slots the sum is over. The same from the ids in
    # torch lost: six kernels, each of them as long in the host's time as the sum.
    here = torch.empty((tokens, top_k), dtype=torch.int32, device=x.device)
    slots, block_experts, num_padded = _gemm.align(
        token_selected_experts.contiguous(), local * ep_size, block_rows, local_first=ep_rank * local,
        local_count=local, slot_row=here)
    rows = torch.empty((tokens * top_k, hidden), dtype=torch.float32 if x.device.type == "cpu" else output_dtype,
                       device=x.device)
    _stages.experts(config, x, rows, weights=weights, slots=slots, block_experts=block_experts, num_padded=num_padded,
                    block_rows=block_rows, row_scale=hidden_scale)
    _gemm.sum_slots(rows.view(tokens, top_k, hidden), token_final_scales.float().contiguous(), topk_ids=here,
                    output=output)
    return [output]


def interleave_moe_weights_for_sm90_mixed_gemm(weight, quant_type="fp4"):
    """What a model calls once per weight. No layout changes here: "fp4" comes back as it is, and "int4" with
    its two's-complement nibbles as the offset ones (value + 8) that this library reads."""
    if quant_type not in ("fp4", "int4"):
        raise NotOffered(f"quant_type='{quant_type}': expected 'fp4' or 'int4'")
    return weight if quant_type == "fp4" else weight.bitwise_xor(0x88)


def interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size=32):
    """The scales as they are."""
    del group_size
    return scales


def fused_topk_deepseek(scores, bias, n_group, topk_group, topk, routed_scaling_factor, topk_values, topk_indices,
                        launch_with_pdl=True):
    """DeepSeek-V3's routing of scores [T, E] into topk_values f32 and topk_indices i32 [T, k]: sigmoid, bias for
    the selection, the best topk_group of n_group groups, weights normalized and scaled."""
    del launch_with_pdl
    if topk_values.dtype != torch.float32 or topk_indices.dtype != torch.int32:
        raise NotOffered(f"topk_values, topk_indices: expected float32 and int32, got {topk_values.dtype} and "
                         f"{topk_indices.dtype}")
    _gemm.route(scores, topk, method="deepseek_v3", groups=n_group, topk_groups=topk_group,
                scale=float(routed_scaling_factor), selection_bias=bias, topk_ids=topk_indices, topk_weights=topk_values)


def cutlass_fused_moe_sm80(output, input, token_selected_experts, token_final_scales, fc1_expert_weights,
                           fc2_expert_weights, output_dtype, quant_scales, input_sf=None, tp_size=1,
                           tp_rank=0, ep_size=1, ep_rank=0, cluster_size=1, cluster_rank=0,
                           use_fp8_block_scaling=False, use_w4a8_group_scaling=False,
                           min_latency_mode=False, tune_max_num_tokens=8192):
    """The form of seed 003: SwiGLU, output first. The modes it refused (fp8, W4A8) work here."""
    return cutlass_fused_moe(input, token_selected_experts, token_final_scales, fc1_expert_weights,
                             fc2_expert_weights, output_dtype, quant_scales, input_sf=input_sf, tp_size=tp_size,
                             tp_rank=tp_rank, ep_size=ep_size, ep_rank=ep_rank, cluster_size=cluster_size,
                             cluster_rank=cluster_rank, output=output,
                             use_deepseek_fp8_block_scale=use_fp8_block_scaling,
                             use_w4_group_scaling=use_w4a8_group_scaling, min_latency_mode=min_latency_mode,
                             tune_max_num_tokens=tune_max_num_tokens)


@contextlib.contextmanager
def autotune(tune_mode=True, *args, **kwargs):
    """A documented no-op: tile choices ship with the library, and every choice gives the same bits."""
    yield
