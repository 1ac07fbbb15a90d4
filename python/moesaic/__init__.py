# SPDX-License-Identifier: Apache-2.0
"""Moesaic: the Mixture-of-Experts feed-forward layer at inference, for arrays of any DLPack framework.

Levels: Layer; prepare / experts / finalize; grouped_gemm with align, route, quantize, activate, sum_slots.
Errors are ValueError (wrong or unsupported arguments, with what to use instead), OSError, RuntimeError.
"""

import os as _os
from types import ModuleType as _ModuleType
from typing import Optional as _Optional

from . import _openmp
from ._arrays import typed
from ._ffi import integer as _integer
from ._ffi import lib as _lib
from .checkpoint import checkpoint_layers, load_checkpoint
from .gemm import activate, align, grouped_gemm, quantize, route, sum_slots
from .layer import Layer
from .stages import experts, finalize, prepare

__version__ = str(_lib.version())


def devices() -> list:
    """What this process can run on: dicts of device, name, kernels, note."""
    return [{str(k): str(v) for k, v in d.items()} for d in _lib.devices()]


def info() -> dict:
    """Version, devices, for each scheme the formats that each device runs, and under "cuda" why there is no CUDA
    device ("" when there is one)."""
    shape = dict(experts=8, hidden=512, intermediate=512, top_k=2, max_tokens=1)
    why = ""
    if not any(d["device"].startswith("cuda") for d in devices()):
        try:
            why = supports(shape, "standard", "cuda:0")
        except ValueError as error:
            why = str(error)
    runs: dict = {}
    for device in (d["device"] for d in devices()):
        for scheme in schemes():
            dtype = scheme if scheme in ("f32", "f16") else "bf16"
            config = dict(shape, quant=dict(scheme=scheme), input_dtype=dtype, output_dtype=dtype)
            runs.setdefault(scheme, {})[device] = [f for f in ("standard", "sorted", "batched")
                                                   if not supports(config, f, device)]
    return dict(version=__version__, devices=devices(), cuda=why, runs=runs)


def schemes() -> list:
    """The names of the quantization schemes."""
    return [str(name) for name in _lib.schemes()]


def supports(config: dict, format: str = "standard", device: str = "cpu") -> str:
    """"" when `device` runs `config` (see Layer.config) in `format`, else the reason with a way out."""
    if not isinstance(config, dict):
        raise TypeError(f"config: expected a dict (Layer.config), got {type(config).__name__}")
    return str(_lib.support_reason(config, str(format), str(device)))


def set_num_threads(threads: int) -> None:
    """Threads of the CPU backend (default: MOESAIC_THREADS, else the cores of this process)."""
    _lib.set_num_threads(_integer(threads, "threads"))


def share_threads(module: _Optional[_ModuleType]) -> bool:
    """Runs the CPU backend's work on the OpenMP threads of an imported package, e.g. share_threads(torch); None: on its own again.

    For programs that call both in turns: OpenMP's threads go on spinning behind each of their regions, on the cores that a second
    pool would need. False, and nothing changes, where the package has loaded no OpenMP runtime (Linux only), and where MOESAIC_PIN
    asks for threads that stay on their cores. Results are the same bits. moesaic.integrations.transformers does it when imported.
    """
    if not isinstance(module, (_ModuleType, type(None))):
        raise TypeError(f"module: expected an imported package (or None), got {type(module).__name__}")
    path = "" if module is None else _openmp.runtime_of(module)
    if module is not None and (not path or _os.environ.get("MOESAIC_PIN")):
        return False
    _lib.use_openmp(path)
    return True


def set_kernels(device_type: str, level: str) -> None:
    """Overrides the kernels for tests and timings: ("cpu", "avx2"), ("cuda", "sm80"); "" undoes it."""
    _lib.set_kernels(str(device_type), str(level))


__all__ = ["Layer", "activate", "align", "checkpoint_layers", "devices", "experts", "finalize", "grouped_gemm", "info",
           "load_checkpoint", "prepare", "quantize", "route", "schemes", "set_kernels", "set_num_threads",
           "share_threads", "sum_slots", "supports", "typed"]
