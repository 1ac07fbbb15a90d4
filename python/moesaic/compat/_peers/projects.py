# SPDX-License-Identifier: Apache-2.0
"""For each original: which of its tests there are, and which of its names we answer to.

Reference arithmetic that the tests borrow from the original's kernels (quantizers, SiluAndMul, top-k) is
written here in torch, so that a test never holds our results against themselves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import types
import unittest

import torch

from .. import flashinfer, sglang
from ..vllm import v0_22
from .stand_ins import Record, source_of


@dataclasses.dataclass
class Project:
    tests: list      # files of the checkout, those that exist are run
    offered: dict    # module -> names that answer
    pure: set        # modules whose own source the references need
    beyond: dict = dataclasses.field(default_factory=dict)  # tests of limits that are not here: name -> why
    absent: set = dataclasses.field(default_factory=set)  # third parties to stand in for. Never triton: torch asks for it


# --- references in torch ------------------------------------------------------------------------------

class SiluAndMul:
    def __call__(self, x):
        half = x.shape[-1] // 2
        return torch.nn.functional.silu(x[..., :half].float()).to(x.dtype) * x[..., half:]

    forward_native = __call__


def _to_fp8(x, scale):
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def scaled_fp8_quant(input, scale=None, num_token_padding=None, scale_ub=None, use_per_token_if_dynamic=False):
    if scale is None:
        absmax = input.float().abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else input.float().abs().amax()
        scale = (absmax / 448).clamp(min=1e-12)
        scale = scale if use_per_token_if_dynamic else scale.view(1)
    return _to_fp8(input, scale), scale


def _groups(x, group_size, top):
    parts = x.float().reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    return parts, parts.abs().amax(-1, keepdim=True).clamp(min=1e-10) / top


def per_token_group_quant_fp8(x, group_size, eps=1e-10, **_):
    parts, scale = _groups(x, group_size, 448)
    return _to_fp8(parts, scale).reshape(x.shape), scale.squeeze(-1)


def _int8(x, group_size):
    parts, scale = _groups(x, group_size, 127)
    return (parts / scale).round().to(torch.int8).reshape(x.shape), scale.squeeze(-1)


def moe_kernel_quantize_input(A, A_scale, quant_dtype, per_act_token_quant, block_shape=None, *_, **__):
    if quant_dtype is None:
        return A, A_scale
    if quant_dtype == torch.int8:
        return _int8(A, A.shape[-1] if block_shape is None else block_shape[1])
    if block_shape is not None:
        return per_token_group_quant_fp8(A, block_shape[1])
    return scaled_fp8_quant(A, A_scale, use_per_token_if_dynamic=per_act_token_quant)


def _topk(logits, k, renormalize):
    weights, ids = torch.softmax(logits.float(), -1).topk(k)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids.to(torch.int32)


def fused_topk(hidden_states, gating_output, topk, renormalize, **_):
    return (*_topk(gating_output, topk, renormalize), None)


TopKOutput = collections.namedtuple("TopKOutput", ["topk_weights", "topk_ids", "router_logits"])


def select_experts(hidden_states, router_logits, topk_config, **_):
    return TopKOutput(*_topk(router_logits, topk_config.top_k, topk_config.renormalize), router_logits)


# --- vLLM ------------------------------------------------------------------------------------------------

class _Platform:
    """A CUDA device of compute capability 9.0, as far as the tests ask."""

    simple_compile_backend = "eager"
    device_type = "cuda"

    def __getattr__(self, name):
        if name == "fp8_dtype":
            return lambda: torch.float8_e4m3fn
        if name == "has_device_capability":
            return lambda capability, *_: (capability if isinstance(capability, int) else capability[0] * 10) <= 90
        if name.startswith("is_"):
            return lambda *_, **__: name in ("is_cuda", "is_cuda_alike")
        raise AttributeError(name)


def vllm_project(checkout):
    layers = "vllm.model_executor.layers."
    moe = layers + "fused_moe"
    records = dict(FusedMoEConfig=Record, FusedMoEParallelConfig=type("Parallel", (Record,), {
        "make_no_parallel": staticmethod(Record)}))
    config = dict(vars(v0_22), **records)
    ops = {"scaled_fp8_quant": scaled_fp8_quant,
           "scaled_int8_quant": lambda x, *_, **__: _int8(x, x.shape[-1])}
    tl = types.SimpleNamespace(float16="fp16", bfloat16="bf16", float32="fp32")
    return Project(
        ["tests/kernels/moe/test_batched_moe.py"],
        {moe: {"fused_topk": fused_topk}, moe + ".router.fused_topk_router": {"fused_topk": fused_topk},
         moe + ".experts.fused_batched_moe": v0_22, moe + ".prepare_finalize.batched": v0_22, moe + ".config": config,
         moe + ".modular_kernel": v0_22, moe + ".topk_weight_and_reduce": v0_22, moe + ".activation": v0_22,
         moe + ".utils": {"moe_kernel_quantize_input": moe_kernel_quantize_input},
         layers + "activation": {"SiluAndMul": SiluAndMul},
         "vllm.model_executor.custom_op": {"op_registry": {"silu_and_mul": SiluAndMul}},
         "vllm._custom_ops": ops, "vllm": {"_custom_ops": types.SimpleNamespace(**ops)},
         "vllm.platforms": {"current_platform": _Platform()}, "vllm.triton_utils": {"tl": tl},
         "vllm.utils.torch_utils": {"set_random_seed": torch.manual_seed},
         "vllm.config": {"VllmConfig": Record, "set_current_vllm_config": lambda *_: contextlib.nullcontext()}},
        {"vllm.utils.math_utils", "vllm.utils.deep_gemm", layers + "quantization.utils.quant_utils"})


# --- SGLang ----------------------------------------------------------------------------------------------

def sglang_project(checkout):
    srt = "sglang.srt."
    moe = srt + "layers.moe."
    utils = {"is_hip": lambda: False, "is_sm100_supported": lambda *_: False, "is_sm120_supported": lambda *_: False,
             "is_cuda": lambda: True, "get_device": lambda *_: "cuda", "get_device_capability": lambda *_: (9, 0)}
    fp8 = {"per_token_group_quant_fp8": sglang.per_token_group_quant_fp8,
           "sglang_per_token_group_quant_fp8": sglang.sglang_per_token_group_quant_fp8,
           "scaled_fp8_quant": sglang.scaled_fp8_quant, "is_fp8_fnuz": lambda: False,
           "static_quant_fp8": sglang.static_quant_fp8}
    int8 = {"per_token_quant_int8": sglang.per_token_quant_int8,
            "per_token_group_quant_int8": sglang.per_token_group_quant_int8}
    quiet = {"CustomTestCase": unittest.TestCase, "empty_gpu_cache": lambda: None,
             "register_cuda_ci": lambda **_: None, "register_amd_ci": lambda **_: None}
    return Project(
        ["test/registered/moe/test_fused_moe.py", "test/registered/moe/test_triton_fused_moe.py",
         "test/registered/moe/test_triton_moe_channel_fp8_kernel.py", "test/registered/quant/test_block_int8.py",
         "test/registered/quant/test_int8_kernel.py", "test/srt/test_fused_moe.py",
         "test/srt/test_triton_fused_moe.py", "test/srt/test_triton_moe_channel_fp8_kernel.py",
         "test/srt/test_triton_moe_wna16.py", "test/srt/test_block_int8.py", "test/srt/test_int8_kernel.py",
         "sglang/test/test_block_fp8.py", "python/sglang/test/test_block_fp8.py"],
        {moe + "fused_moe_triton.fused_moe": sglang, moe + "fused_moe_triton": sglang,
         moe + "moe_runner.triton_utils.fused_moe": sglang, moe + "moe_runner.triton_utils": sglang,
         moe + "topk": {"select_experts": select_experts, "TopKConfig": type("TopKConfig", (Record,), {
             "renormalize": True}), "StandardTopKOutput": TopKOutput},
         moe + "moe_runner": {"MoeRunnerConfig": Record}, moe + "utils": {},
         srt + "layers.activation": {"SiluAndMul": SiluAndMul},
         srt + "layers.quantization.fp8_kernel": fp8, srt + "layers.quantization.int8_kernel": int8,
         "sglang.kernels.ops.quantization.int8_kernel": int8,
         srt + "utils": utils, srt + "server_args": {"ServerArgs": Record,
                                                     "set_global_server_args_for_scheduler": lambda *_: None},
         "sglang.test.test_utils": quiet, "sglang.test.ci.ci_register": quiet},
        set(), absent={"sgl_kernel", "deep_gemm", "triton_kernels", "tqdm"})


# --- FlashInfer ------------------------------------------------------------------------------------------

def flashinfer_project(checkout):
    capability = {"get_compute_capability": lambda *_: torch.cuda.get_device_capability(),
                  "is_sm90a_supported": lambda *_: True, "is_sm100a_supported": lambda *_: False,
                  "is_sm12x_supported": lambda *_: False}
    # Newer releases add activations: the numbers are the checkout's own where it has the file.
    enums = source_of(checkout, "flashinfer.tllm_enums") or {"ActivationType": flashinfer.ActivationType}
    kinds = {"ActivationType": enums["ActivationType"]}
    return Project(
        ["tests/moe/test_trtllm_cutlass_fused_moe.py"],
        {"flashinfer": {"autotune": flashinfer.autotune}, "flashinfer.fused_moe": dict(vars(flashinfer), **kinds),
         "flashinfer.fused_moe.core": dict(vars(flashinfer), **kinds), "flashinfer.tllm_enums": enums,
         "flashinfer.utils": capability},
        set(), absent={"cutlass"},
        beyond={"test_vectorized_kernel_rejects_misaligned_input": "checks a limit: rows need no alignment here",
                "test_workspace_undersized_rejected": "checks a limit: workspace_buffer is a hint here"})


PROJECTS = {"vllm": vllm_project, "sglang": sglang_project, "flashinfer": flashinfer_project}
