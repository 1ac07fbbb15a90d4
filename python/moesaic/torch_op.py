# SPDX-License-Identifier: Apache-2.0
"""Layer.forward as a torch operator: visible to torch.compile, with a fake implementation for tracing."""

from __future__ import annotations

import itertools
import weakref

import torch

from .layer import Layer

_layers: "weakref.WeakValueDictionary[int, Layer]" = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(layer: Layer) -> int:
    """A number that stands for `layer` inside a traced graph, for as long as the layer lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op("moesaic::forward", mutates_args=())
def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
            layer: int) -> torch.Tensor:
    return _layers[layer].forward(hidden_states, topk_ids, topk_weights)


@forward.register_fake
def _(hidden_states, topk_ids, topk_weights, layer):
    return torch.empty_like(hidden_states)
