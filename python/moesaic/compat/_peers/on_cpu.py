# SPDX-License-Identifier: Apache-2.0
"""Runs tests that say device="cuda" on the CPU: the device is part of their text, not of what they check."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(value):
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class OnCpu(TorchFunctionMode):
    """Every "cuda" that reaches a torch function becomes "cpu"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {k: "cpu" if _is_cuda(v) else v for k, v in (kwargs or {}).items()}
        args = tuple("cpu" if _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


HAS_GPU = torch.cuda.is_available()


def pretend():
    """What tests ask torch.cuda before they run: a device of compute capability 9.0."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_device = lambda: 0
    for name in ("synchronize", "manual_seed", "manual_seed_all", "empty_cache", "set_device"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.set_default_device = lambda *_: None
