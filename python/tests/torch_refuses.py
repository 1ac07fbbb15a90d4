# SPDX-License-Identifier: Apache-2.0
"""A mode in which torch computes nothing for moesaic: what it may do there is to make, view and copy tensors.

Every operator that torch dispatches while the innermost frame outside torch is one of moesaic's is held against
a list of what is allowed. A list of what is forbidden (matmul, bmm, linear, silu, ...) lost: it has to know every name
under which torch multiplies, and operators reached through methods, `@` or a compiled function go around patched names.
References that a test computes in torch are not moesaic's frames, so they need no exception.
"""

import pathlib
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic

_OURS = pathlib.Path(moesaic.__file__).parent
_TORCH = str(pathlib.Path(torch.__file__).parent)
_HERE = __file__

# Making, viewing and copying.
_MOVES = {"empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "full", "full_like", "new_empty", "fill_",
          "zero_", "detach", "alias", "view", "view_dtype", "_unsafe_view", "_reshape_alias", "reshape", "expand", "permute",
          "transpose", "t", "select", "slice", "squeeze", "unsqueeze", "as_strided", "split", "clone", "copy_", "_to_copy",
          "constant_pad_nd", "lift_fresh", "_local_scalar_dense", "cat"}
# What integers (expert ids, bytes of weights before they are used) may go through.
_INTEGERS = {"sub", "add", "ge", "lt", "bitwise_and", "logical_and", "where", "bitwise_xor"}
# Scales given in another system's terms: at most one number per expert, an argument and not a value of the layer.
_PER_EXPERT = {"div", "reciprocal", "mul"}
_MOST_EXPERTS = 512


def _innermost():
    """The file of the innermost frame that is neither torch's nor this one's."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != _HERE and not name.startswith((_TORCH, "<")):
            return pathlib.Path(name)
        frame = frame.f_back
    return pathlib.Path()


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class TorchRefuses(TorchDispatchMode):
    """Raises AssertionError with the operator's name."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _OURS in _innermost().parents:
            name = function.overloadpacket.__name__
            tensors = list(_tensors((*args, *kwargs.values())))
            integers = not any(t.is_floating_point() for t in tensors)
            small = all(t.numel() <= _MOST_EXPERTS and t.dim() <= 1 for t in tensors)
            if not (name in _MOVES or (name in _INTEGERS and integers) or (name in _PER_EXPERT and small)):
                raise AssertionError(f"torch computed {function} for moesaic")
        return function(*args, **kwargs)
