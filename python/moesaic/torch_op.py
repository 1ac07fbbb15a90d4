# SPDX-License-Identifier: Apache-2.0
"""Layer.forward as a torch operator: visible to torch.compile, with a fake implementation for tracing."""

from __future__ import annotations

import itertools
import weakref

import torch

from ._modes import no_gradient
from .layer import Layer

_layers: "weakref.WeakValueDictionary[int, Layer]" = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def register(layer: Layer) -> int:
    """A number that stands for `layer` inside a traced graph, for as long as the layer lives.

    Its remainder says the output's dtype. From a function's second layer on torch.compile hands the fake implementation a
    symbol for the number: a dictionary cannot be asked for that, and asking for its value would compile the function
    anew for every layer, up to torch's limit; its remainder is the same for all the layers of a model.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"layer: expected a Layer, got {type(layer).__name__}")
    number = next(_numbers) * len(_DTYPES) + list(_DTYPES).index(layer.config["output_dtype"])
    _layers[number] = layer
    return number


def _layer(number: int) -> Layer:
    layer = _layers.get(number)
    if layer is None:
        raise RuntimeError(f"layer: no layer has the number {number}; keep the layer alive that register() was given")
    return layer


@torch.library.custom_op("moesaic::forward", mutates_args=())
def forward(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
            layer: int) -> torch.Tensor:
    return _layer(layer).forward(hidden_states, topk_ids, topk_weights)


@forward.register_fake
def _(hidden_states, topk_ids, topk_weights, layer):
    dtype = next(dtype for remainder, dtype in enumerate(_DTYPES.values()) if layer % len(_DTYPES) == remainder)
    return hidden_states.new_empty(hidden_states.shape, dtype=dtype)


def _refuse(ctx, inputs, output):
    """What torch calls during a forward whose backward it would have to know."""
    names = ("hidden_states", "topk_ids", "topk_weights")
    raise no_gradient(next((name for name, value in zip(names, inputs) if value.requires_grad), names[0]))


def _backward(ctx, gradient):
    raise no_gradient("hidden_states")  # the forward was refused before


forward.register_autograd(_backward, setup_context=_refuse)
