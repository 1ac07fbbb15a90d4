# SPDX-License-Identifier: Apache-2.0
"""Level 2: prepare, experts, finalize, usable apart so that a foreign all-to-all can sit between them.

`layer` is a Layer, or a configuration dictionary (Layer.config) for weights that stay the caller's.
"""

from __future__ import annotations

from typing import Optional, Union

from . import _ffi
from ._ffi import Array, lib
from .layer import Layer, _workspace


def _target(layer):
    return layer._handle if isinstance(layer, Layer) else layer


def _config(layer):
    return layer.config if isinstance(layer, Layer) else layer


def _call(function, layer, like, tokens, capacity, call, *extra, format="batched"):
    call = _ffi.options(call)
    device = _ffi.device_name(like)
    if device != "cpu":
        call["workspace"] = _workspace(
            like, lib.stage_workspace_bytes(_config(layer), format, tokens, capacity, device))
    function(_target(layer), *extra, call)


def prepare(layer: Union[Layer, dict], hidden_states: Array, topk_ids: Array, rows: Array, num_tokens: Array, *,
            topk_weights: Optional[Array] = None, hidden_scale: Optional[Array] = None,
            row_scale: Optional[Array] = None, expert_map: Optional[Array] = None, slot_row: Optional[Array] = None,
            status: Optional[Array] = None) -> tuple[Array, Array]:
    """Tokens [T, H] -> rows [E_local, capacity, H], num_tokens [E_local] (both are filled)."""
    _call(lib.prepare, layer, hidden_states, topk_ids.shape[0], rows.shape[1],
          dict(hidden_states=hidden_states, hidden_scale=hidden_scale, topk_ids=topk_ids,
               topk_weights=topk_weights, expert_map=expert_map, rows=rows, row_scale=row_scale,
               num_tokens=num_tokens, slot_row=slot_row, status=status))
    return rows, num_tokens


def experts(layer: Union[Layer, dict], rows: Array, output: Array, *, weights: Optional[dict] = None,
            num_tokens: Optional[Array] = None, slots: Optional[Array] = None, block_experts: Optional[Array] = None,
            num_padded: Optional[Array] = None, block_rows: int = 0, row_scale: Optional[Array] = None,
            row_weights: Optional[Array] = None, expected_tokens: int = 0) -> Array:
    """Both products and the activation. Batched with num_tokens [E]; sorted with slots and its lists.

    `weights`: dict(fc1=..., fc2=...) when `layer` is a configuration dictionary.
    """
    batched = num_tokens is not None
    call = dict(format="batched" if batched else "sorted", rows=rows, row_scale=row_scale,
                num_tokens=num_tokens, slots=slots, block_experts=block_experts,
                num_padded=num_padded, row_weights=row_weights, output=output,
                expected_tokens=expected_tokens)
    if block_rows:
        call["block_rows"] = block_rows
    tokens, capacity = (0, rows.shape[1]) if batched else (rows.shape[0], slots.shape[0])
    _call(lib.experts, layer, rows, tokens, capacity, call, _ffi.options(weights) if weights else None,
          format=call["format"])
    return output


def finalize(layer: Union[Layer, dict], expert_output: Array, topk_weights: Array, output: Array, *,
             topk_ids: Optional[Array] = None, slot_row: Optional[Array] = None, expert_map: Optional[Array] = None,
             add: bool = False) -> Array:
    """Expert outputs [E_local, capacity, H] -> tokens [T, H]; `expert_output` is never modified."""
    _call(lib.finalize, layer, expert_output, output.shape[0], expert_output.shape[1],
          dict(expert_output=expert_output, topk_ids=topk_ids, topk_weights=topk_weights,
               expert_map=expert_map, slot_row=slot_row, output=output, add=add))
    return output
