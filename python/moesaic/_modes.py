# SPDX-License-Identifier: Apache-2.0
"""What torch does around a call that works outside of torch: it traces, or wants a gradient. The call would take part in
neither and say nothing (a trace with memory that nobody fills, parameters that never learn), so it is refused."""

from __future__ import annotations

from typing import Sequence

from ._arrays import Array, framework

_checks: dict = {}  # by type of array: asking a type for its framework costs as much as the check


def check(like: Array, names: Sequence, values: Sequence, traced: str) -> None:
    """ValueError while torch traces (`traced` says what cannot be, and a way out), or where one of `values`, called `names`,
    requires a gradient. Nothing is asked where `like`, which is one of them, is not torch's."""
    found = _checks.get(type(like))
    if found is None:
        found = _checks[type(like)] = _torch_check() if framework(type(like)) == "torch" else _nothing
    found(like, names, values, traced)


def no_gradient(name: str) -> Exception:
    """What is raised for `name`, which requires a gradient."""
    return ValueError(f"{name}: requires a gradient, and moesaic computes none; call under torch.no_grad(), or pass "
                      f"{name}.detach()")


def _nothing(like, names, values, traced):
    pass


def _torch_check():
    import torch
    from torch.utils import _python_dispatch

    is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # the same in half the time
    gradients = torch.is_grad_enabled
    # Many modes only watch. Which one it is takes longer to ask than whether there is one.
    inside = getattr(_python_dispatch, "is_in_torch_dispatch_mode", lambda: True)

    def mode_traces():
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return fake is not None or get_proxy_mode() is not None

    def look(like, names, values, traced):
        if is_tracing() or inside() and mode_traces():
            name = next((name for name, value in zip(names, values) if value is like), "input")
            raise ValueError(f"{name}: {traced}")
        if gradients():
            for value in values:
                if value is not None and getattr(value, "requires_grad", False):
                    raise no_gradient(next(name for name, other in zip(names, values) if other is value))

    return look
