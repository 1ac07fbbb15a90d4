# SPDX-License-Identifier: Apache-2.0
"""Level 3: align, the grouped GEMM and the pieces around it. Outputs may be given or are made."""

from __future__ import annotations

from typing import Optional, Union

from ._arrays import Array, as_array, dtype_name, dtype_text, empty, give_back
from ._ffi import integer, lib, number
from .layer import _spec, run_with_scratch


# Looked up once: asking the library takes as long as a small call.
_functions = {name: getattr(lib, name) for name in ("align", "grouped_gemm", "route", "quantize", "activate", "sum_slots")}


def _call(name, like, call, outputs):
    run_with_scratch(_functions[name], like, call, outputs)


def align(topk_ids: Array, experts: int, block_rows: int, *, local_first: int = 0, local_count: int = 0,
          expert_map: Optional[Array] = None, slots: Optional[Array] = None, block_experts: Optional[Array] = None,
          num_padded: Optional[Array] = None, slot_row: Optional[Array] = None,
          tokens_per_expert: Optional[Array] = None) -> tuple[Array, Array, Array]:
    """moe_align_block_size, stable: (slots, block_experts, num_padded).

    topk_ids [T, k] i32 or i64. slots [capacity] i32: slot ids grouped by expert, each run padded to
    block_rows with T * k. block_experts i32: local expert of each block, -1: not here.
    """
    rows = integer(block_rows, "block_rows")
    capacity = lib.align_capacity(_size(as_array(topk_ids, "topk_ids", 2)), integer(experts, "experts"), rows)
    make = lambda n: empty(topk_ids, (n,), "i32")  # noqa: E731
    slots = make(capacity) if slots is None else slots
    block_experts = make(-(-capacity // rows)) if block_experts is None else block_experts
    num_padded = make(1) if num_padded is None else num_padded
    _call("align", topk_ids, dict(
        topk_ids=topk_ids, experts=experts, local_first=local_first, local_count=local_count, expert_map=expert_map,
        block_rows=block_rows, slots=slots, block_experts=block_experts, num_padded=num_padded, slot_row=slot_row,
        tokens_per_expert=tokens_per_expert), ("slots", "block_experts", "num_padded", "slot_row", "tokens_per_expert"))
    return tuple(give_back(topk_ids, made) for made in (slots, block_experts, num_padded))


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
    if (slots is None) == (num_tokens is None):
        raise ValueError("slots, num_tokens: give the lists of align (sorted), or num_tokens (batched), and not both")
    call = dict(quant=_spec(quant, "quant", "scheme", "bf16"), b=b, a=a, a_scale=a_scale, slots=slots, block_experts=block_experts,
                num_padded=num_padded, num_tokens=num_tokens, top_k=top_k, a_order=a_order,
                c_order=c_order, row_weights=row_weights, c=c)
    if block_rows:
        call["block_rows"] = block_rows
    _call("grouped_gemm", as_array(a, "a"), call, ("c",))
    return c


def route(logits: Optional[Array] = None, top_k: Optional[int] = None, *, method: str = "renormalize",
          hidden_states: Optional[Array] = None, weight: Optional[Array] = None, bias: Optional[Array] = None,
          selection_bias: Optional[Array] = None, topk_ids: Optional[Array] = None,
          topk_weights: Optional[Array] = None, **spec: Union[str, int, float]) -> tuple[Array, Array]:
    """Expert ids i32 [T, k] and weights f32 [T, k] from logits [T, E], or from hidden_states and `weight`."""
    like, name = (logits, "logits") if logits is not None else (hidden_states, "hidden_states")
    if like is None:
        raise ValueError("logits: are required, or hidden_states and weight; pass one of the two")
    tokens = as_array(like, name, 2).shape[0]
    if topk_ids is None or topk_weights is None:
        top_k = integer(top_k, "top_k")
        if top_k < 1:
            raise ValueError(f"top_k: expected 1 or more, got {top_k}")
    topk_ids = empty(like, (tokens, top_k), "i32") if topk_ids is None else topk_ids
    topk_weights = empty(like, (tokens, top_k), "f32") if topk_weights is None else topk_weights
    _call("route", like, dict(spec=dict(spec, method=method), logits=logits, hidden_states=hidden_states, weight=weight,
                              bias=bias, selection_bias=selection_bias, topk_ids=topk_ids, topk_weights=topk_weights),
          ("topk_ids", "topk_weights"))
    return give_back(like, topk_ids), give_back(like, topk_weights)


def quantize(input: Array, to: str = "fp8_e4m3", granularity: str = "token", *, group_size: int = 128,
             int8_rounding: str = "nearest", static_scale: Optional[Array] = None, num_tokens: Optional[Array] = None,
             output: Optional[Array] = None, scale: Optional[Array] = None) -> tuple[Array, Array]:
    """Rows [R, K] -> (quantized [R, K], scale f32). granularity: tensor_static, tensor_dynamic, token, group.

    With num_tokens i32 [E], `input` is [E, capacity, K]: only each expert's first rows are read and written, and
    per-tensor scales ([E, 1, 1]) are each expert's own.
    """
    *lead, columns = as_array(input, "input", 2 if num_tokens is None else 3).shape
    if granularity == "group" and integer(group_size, "group_size") < 1:
        raise ValueError(f"group_size: expected 1 or more, got {group_size}")
    groups = -(-columns // group_size) if granularity == "group" else 1
    to = dtype_text(to)
    if to not in ("fp8_e4m3", "i8"):
        raise ValueError(f"to: expected 'fp8_e4m3' or 'i8', got '{to}'")
    if granularity in ("token", "group"):
        shape = (*lead, groups)
    else:
        shape = (1,) if num_tokens is None else (lead[0], 1, 1)
    output = empty(input, tuple(input.shape), to) if output is None else output
    scale = empty(input, shape, "f32") if scale is None else scale
    _call("quantize", input, dict(input=input, num_tokens=num_tokens, to=to, granularity=granularity, group_size=group_size,
                              int8_rounding=int8_rounding, static_scale=static_scale, output=output, scale=scale),
          ("output", "scale"))
    return give_back(input, output), give_back(input, scale)


def activate(input: Array, activation: Union[str, dict] = "swiglu", *, output: Optional[Array] = None,
             row_expert: Optional[Array] = None, alpha: Optional[Array] = None, beta: Optional[Array] = None,
             limit: Optional[Array] = None) -> Array:
    """The function between the two products on rows [R, N]; gated ones halve N. Computed in fp32."""
    spec = _spec(activation, "activation", "kind", "swiglu")
    if not isinstance(spec["kind"], str):
        raise TypeError(f"activation: expected a name as 'kind', got {type(spec['kind']).__name__}")
    columns = as_array(input, "input", 2).shape[1] // (2 if spec["kind"].startswith(("swiglu", "geglu")) else 1)
    output = empty(input, (input.shape[0], columns), dtype_name(input, "input")) if output is None else output
    _call("activate", input, dict(spec=spec, input=input, row_expert=row_expert, alpha=alpha, beta=beta, limit=limit,
                              output=output), ("output",))
    return give_back(input, output)


def sum_slots(input: Array, topk_weights: Optional[Array] = None, *, topk_ids: Optional[Array] = None,
              slot_row: Optional[Array] = None, scale: float = 1.0, add: bool = False,
              output: Optional[Array] = None) -> Array:
    """Slot outputs [T, k, H] -> [T, H]: fp32 sum in slot order, one rounding."""
    if output is None:
        if add:
            raise ValueError("output: is required with add=True; pass what is to be added to")
        tokens = as_array(input, "input", 3).shape[0] if slot_row is None else as_array(slot_row, "slot_row", 2).shape[0]
        output = empty(input, (tokens, as_array(input, "input").shape[-1]), dtype_name(input, "input"))
    _call("sum_slots", input, dict(input=as_array(input, "input"), slot_row=slot_row, topk_weights=topk_weights, topk_ids=topk_ids,
                               scale=number(scale, "scale"), add=add, output=output), ("output",))
    return give_back(input, output)


def _size(array: Array) -> int:
    size = 1
    for extent in array.shape:
        size *= int(extent)  # a traced function's are tensors
    return size
