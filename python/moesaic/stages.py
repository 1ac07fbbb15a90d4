# SPDX-License-Identifier: Apache-2.0
"""Level 2: prepare, experts, finalize, usable apart so that a foreign all-to-all can sit between them.

`layer` is a Layer, or a configuration dictionary (Layer.config) for weights that stay the caller's.
"""

from __future__ import annotations

from typing import Optional, Union

from ._arrays import Array
from ._ffi import lib
from .layer import Layer, run_with_scratch


_functions = {name: getattr(lib, name) for name in ("prepare", "experts", "finalize")}  # asking takes as long as a small call


def _call(name, layer, like, call, outputs):
    if isinstance(layer, Layer):
        run_with_scratch(_functions[name], like, call, outputs, layer._handle)
    elif isinstance(layer, dict):
        run_with_scratch(_functions[name], like, dict(call, config=layer), outputs, None)
    else:
        raise TypeError(f"layer: expected a Layer or a configuration dict (Layer.config), got {type(layer).__name__}")


def prepare(layer: Union[Layer, dict], hidden_states: Array, topk_ids: Array, rows: Array, num_tokens: Array, *,
            topk_weights: Optional[Array] = None, hidden_scale: Optional[Array] = None,
            row_scale: Optional[Array] = None, expert_map: Optional[Array] = None, slot_row: Optional[Array] = None,
            status: Optional[Array] = None) -> tuple[Array, Array]:
    """Tokens [T, H] -> rows [E_local, capacity, H], num_tokens [E_local] (both are filled)."""
    _call("prepare", layer, hidden_states,
          dict(hidden_states=hidden_states, hidden_scale=hidden_scale, topk_ids=topk_ids,
               topk_weights=topk_weights, expert_map=expert_map, rows=rows, row_scale=row_scale,
               num_tokens=num_tokens, slot_row=slot_row, status=status),
          ("rows", "row_scale", "num_tokens", "slot_row", "status"))
    return rows, num_tokens


def experts(layer: Union[Layer, dict], rows: Array, output: Array, *, weights: Optional[dict] = None,
            num_tokens: Optional[Array] = None, slots: Optional[Array] = None, block_experts: Optional[Array] = None,
            num_padded: Optional[Array] = None, block_rows: int = 0, row_scale: Optional[Array] = None,
            row_weights: Optional[Array] = None, expected_tokens: int = 0) -> Array:
    """Both products and the activation. Batched with num_tokens [E]; sorted with slots and its lists.

    `weights`: dict(fc1=..., fc2=...) when `layer` is a configuration dictionary.
    """
    batched = num_tokens is not None
    if batched == (slots is not None):
        raise ValueError("slots, num_tokens: give the lists of align (sorted), or num_tokens (batched), and not both")
    call = dict(format="batched" if batched else "sorted", rows=rows, row_scale=row_scale,
                num_tokens=num_tokens, slots=slots, block_experts=block_experts,
                num_padded=num_padded, row_weights=row_weights, output=output,
                expected_tokens=expected_tokens)
    if block_rows:
        call["block_rows"] = block_rows
    if isinstance(layer, dict) and not isinstance(weights, dict):
        raise TypeError("weights: expected dict(fc1=..., fc2=...) with a configuration instead of a Layer, got "
                        f"{type(weights).__name__}")
    if isinstance(layer, Layer) and weights is not None:
        raise ValueError("weights: a Layer has its own; pass Layer.config with them, or leave them out")
    if weights is not None:
        call["weights"] = weights
    _call("experts", layer, rows, call, ("output",))
    return output


def finalize(layer: Union[Layer, dict], expert_output: Array, topk_weights: Array, output: Array, *,
             topk_ids: Optional[Array] = None, slot_row: Optional[Array] = None, expert_map: Optional[Array] = None,
             add: bool = False) -> Array:
    """Expert outputs [E_local, capacity, H] -> tokens [T, H]; `expert_output` is never modified."""
    _call("finalize", layer, expert_output,
          dict(expert_output=expert_output, topk_ids=topk_ids, topk_weights=topk_weights,
               expert_map=expert_map, slot_row=slot_row, output=output, add=add), ("output",))
    return output
