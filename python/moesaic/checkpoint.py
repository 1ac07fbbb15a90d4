# SPDX-License-Identifier: Apache-2.0
"""Layers out of checkpoint files."""

from __future__ import annotations

import os
from typing import Any, Optional, Union

from ._arrays import dtype_text
from ._ffi import integer, lib
from .layer import Layer


def _python(value: Any) -> Any:
    """What the bindings return, as dicts, lists, strings and numbers."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "items"):
        return {str(k): _python(v) for k, v in value.items()}
    return [_python(v) for v in value]


def _path(path: Union[str, os.PathLike]) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a str or os.PathLike, got {type(path).__name__}") from None


def checkpoint_layers(path: Union[str, os.PathLike]) -> list[dict]:
    """The Mixture-of-Experts layers of a checkpoint (a directory, a .safetensors file or an index.json): dicts
    of index, name, storage, experts, hidden, intermediate, top_k, shared_experts, scheme, bytes."""
    return _python(lib.checkpoint_layers(_path(path)))


def load_checkpoint(path: Union[str, os.PathLike], layer: int, *, device: str = "cpu", max_tokens: int = 4096,
                    scheme: Optional[str] = None, dtype: Optional[str] = None, shared_experts: bool = False,
                    local_first: int = 0, local_count: int = 0) -> Layer:
    """Layer number `layer` of a checkpoint, packed for `device`, with its router where the file has one.

    scheme: read or convert the weights as another scheme (docs/checkpoints.md says which pairs). dtype: of
    input and output. Nothing larger than one expert is held twice. OSError for files, ValueError for what
    cannot be read, by name.
    """
    options: dict = {name: integer(value, name) for name, value in dict(
        max_tokens=max_tokens, local_first=local_first, local_count=local_count).items()}
    options["shared_experts"] = shared_experts
    options.update({k: v for k, v in (("scheme", scheme), ("dtype", dtype and dtype_text(dtype))) if v is not None})
    device = str(device)
    handle = lib.layer_from_checkpoint(_path(path), integer(layer, "layer"), options, device)
    made = Layer.__new__(Layer)
    made._attach(handle, _python(lib.layer_config(handle)), device)
    return made
