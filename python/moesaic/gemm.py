# SPDX-License-Identifier: Apache-2.0
"""Level 3: align, the grouped GEMM and the pieces around it. Outputs may be given or are made."""

from __future__ import annotations

from typing import Optional, Union

from . import _ffi
from ._ffi import Array, lib
from .layer import _workspace


def align(topk_ids: Array, experts: int, block_rows: int, *, local_first: int = 0, local_count: int = 0,
          expert_map: Optional[Array] = None, slots: Optional[Array] = None, block_experts: Optional[Array] = None,
          num_padded: Optional[Array] = None, slot_row: Optional[Array] = None,
          tokens_per_expert: Optional[Array] = None) -> tuple[Array, Array, Array]:
    """moe_align_block_size, stable: (slots, block_experts, num_padded).

    topk_ids [T, k] i32 or i64. slots [capacity] i32: slot ids grouped by expert, each run padded to
    block_rows with T * k. block_experts i32: local expert of each block, -1: not here.
    """
    capacity = lib.align_capacity(_size(topk_ids), experts, block_rows)
    make = lambda n: _ffi.empty(topk_ids, (n,), "i32")  # noqa: E731
    slots = make(capacity) if slots is None else slots
    block_experts = make(-(-capacity // block_rows)) if block_experts is None else block_experts
    num_padded = make(1) if num_padded is None else num_padded
    device = _ffi.device_name(topk_ids)
    arg = _ffi.arg
    lib.align(arg(topk_ids), experts, local_first, local_count, arg(expert_map), block_rows, arg(slots),
              arg(block_experts), arg(num_padded), arg(slot_row), arg(tokens_per_expert),
              _workspace(topk_ids, 0 if device == "cpu" else
                         lib.align_workspace_bytes(_size(topk_ids), experts, device)))
    return slots, block_experts, num_padded


def grouped_gemm(a: Array, b: dict, c: Array, *, quant: Union[str, dict] = "bf16", a_scale: Optional[Array] = None,
                 slots: Optional[Array] = None, block_experts: Optional[Array] = None,
                 num_padded: Optional[Array] = None, block_rows: int = 0, num_tokens: Optional[Array] = None,
                 top_k: int = 1, a_order: str = "slot", c_order: str = "slot",
                 row_weights: Optional[Array] = None) -> Array:
    """C = A x B[expert]^T over rows gathered through a routing (invoke_fused_moe_kernel).

    Sorted: a [T, K], c [T * top_k, N] by slot, with slots, block_experts, num_padded, block_rows.
    Batched: a [E, capacity, K], c [E, capacity, N] with num_tokens [E].
    b: dict(weight=[E, N, K], scale=, zero_point=, bias=). quant: scheme name or dict(scheme=, ...).
    """
    quant = {"scheme": quant} if isinstance(quant, str) else dict(quant)
    call = dict(quant=quant, b=b, a=a, a_scale=a_scale, slots=slots, block_experts=block_experts,
                num_padded=num_padded, num_tokens=num_tokens, top_k=top_k, a_order=a_order,
                c_order=c_order, row_weights=row_weights, c=c)
    if block_rows:
        call["block_rows"] = block_rows
    call = _ffi.options(call)
    if _ffi.device_name(a) != "cpu":
        call["workspace"] = _workspace(a, lib.grouped_gemm_workspace_bytes(call))
    lib.grouped_gemm(call)
    return c


def route(logits: Optional[Array] = None, top_k: Optional[int] = None, *, method: str = "renormalize",
          hidden_states: Optional[Array] = None, weight: Optional[Array] = None, bias: Optional[Array] = None,
          selection_bias: Optional[Array] = None, topk_ids: Optional[Array] = None,
          topk_weights: Optional[Array] = None, **spec: Union[str, int, float]) -> tuple[Array, Array]:
    """Expert ids i32 [T, k] and weights f32 [T, k] from logits [T, E], or from hidden_states and `weight`."""
    like = logits if logits is not None else hidden_states
    tokens = like.shape[0]
    topk_ids = _ffi.empty(like, (tokens, top_k), "i32") if topk_ids is None else topk_ids
    topk_weights = _ffi.empty(like, (tokens, top_k), "f32") if topk_weights is None else topk_weights
    scratch = 0 if logits is not None else tokens * weight.shape[0] * 4
    arg = _ffi.arg
    lib.route(dict(spec, method=method), arg(logits), arg(hidden_states), arg(weight), arg(bias),
              arg(selection_bias), arg(topk_ids), arg(topk_weights), _workspace(like, scratch))
    return topk_ids, topk_weights


def quantize(x: Array, to: str = "fp8_e4m3", granularity: str = "token", *, group_size: int = 128,
             int8_rounding: str = "nearest", static_scale: Optional[Array] = None, num_tokens: Optional[Array] = None,
             output: Optional[Array] = None, scale: Optional[Array] = None) -> tuple[Array, Array]:
    """Rows [R, K] -> (quantized [R, K], scale f32). granularity: tensor_static, tensor_dynamic, token, group.

    With num_tokens i32 [E], x is [E, capacity, K]: only each expert's first rows are read and written, and
    per-tensor scales ([E, 1, 1]) are each expert's own.
    """
    *lead, columns = x.shape
    groups = -(-columns // group_size) if granularity == "group" else 1
    if granularity in ("token", "group"):
        shape = (*lead, groups)
    else:
        shape = (1,) if num_tokens is None else (lead[0], 1, 1)
    output = _ffi.empty(x, tuple(x.shape), to) if output is None else output
    scale = _ffi.empty(x, shape, "f32") if scale is None else scale
    arg = _ffi.arg
    call = (arg(x), arg(num_tokens), to, granularity, group_size, int8_rounding, arg(static_scale), arg(output),
            arg(scale))
    lib.quantize(*call, _workspace(x, 0 if _ffi.device_name(x) == "cpu" else lib.quantize_workspace_bytes(*call)))
    return output, scale


def activate(x: Array, activation: Union[str, dict] = "swiglu", *, output: Optional[Array] = None,
             row_expert: Optional[Array] = None, alpha: Optional[Array] = None, beta: Optional[Array] = None,
             limit: Optional[Array] = None) -> Array:
    """The function between the two products on rows [R, N]; gated ones halve N. Computed in fp32."""
    spec = {"kind": activation} if isinstance(activation, str) else dict(activation)
    gated = spec["kind"].startswith(("swiglu", "geglu"))
    columns = x.shape[1] // (2 if gated else 1)
    output = _ffi.empty(x, (x.shape[0], columns), _ffi.dtype_name(x)) if output is None else output
    arg = _ffi.arg
    lib.activate(spec, arg(x), arg(row_expert), arg(alpha), arg(beta), arg(limit), arg(output))
    return output


def sum_slots(x: Array, topk_weights: Optional[Array] = None, *, topk_ids: Optional[Array] = None,
              slot_row: Optional[Array] = None, scale: float = 1.0, add: bool = False,
              output: Optional[Array] = None) -> Array:
    """Slot outputs [T, k, H] -> [T, H]: fp32 sum in slot order, one rounding."""
    if output is None:
        tokens = (slot_row if slot_row is not None else x).shape[0]
        output = _ffi.empty(x, (tokens, x.shape[-1]), _ffi.dtype_name(x))
    arg = _ffi.arg
    lib.sum_slots(arg(x), arg(slot_row), arg(topk_weights), arg(topk_ids), float(scale), add, arg(output))
    return output


def _size(array: Array) -> int:
    size = 1
    for extent in array.shape:
        size *= extent
    return size
