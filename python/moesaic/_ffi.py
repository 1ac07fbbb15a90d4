# SPDX-License-Identifier: Apache-2.0
"""The shared object and how arrays of any framework reach it."""

from __future__ import annotations

import os
import pathlib

import tvm_ffi

# MOESAIC_LIBRARY: a build folder's shared object instead of the installed one (the tests use it).
_PATH = os.environ.get("MOESAIC_LIBRARY") or pathlib.Path(__file__).with_name("libmoesaic_ffi.so")
lib = tvm_ffi.load_module(str(_PATH), keep_module_alive=True)

# What NumPy's own dtypes (and ml_dtypes') are called here. DLPack from NumPy knows none of the
# sub-32-bit floats, so those go over as raw bits beside their name.
_BITS = {"bfloat16": ("uint16", "bf16"), "float8_e4m3fn": ("uint8", "fp8_e4m3")}


def arg(array, dtype: str | None = None):
    """`array` (any DLPack exporter, or None) as the bindings take it.

    `dtype` names the element type when the array's own cannot: uint16 bits that are bf16, say.
    """
    if array is None:
        return None
    module = type(array).__module__
    if module.startswith("torch"):  # passed as it is: no copy, no Python object per call
        return [tvm_ffi.from_dlpack(array), dtype] if dtype else array
    if module.startswith("numpy"):
        name = array.dtype.name
        if dtype is None and name in _BITS:
            bits, dtype = _BITS[name]
            array = array.view(bits)
    view = tvm_ffi.from_dlpack(array)
    return [view, dtype] if dtype else view


def options(values: dict) -> dict:
    """A dictionary for the bindings: None dropped, arrays converted, nested dictionaries followed."""
    out = {}
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            out[key] = options(value)
        elif isinstance(value, (bool, int, float, str)):
            out[key] = value
        else:
            out[key] = arg(value)
    return out


# --- arrays in the caller's framework ---------------------------------------------------------------
_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn",
          "i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}
_SHORT = {long: short for short, long in _NAMES.items()}


def dtype_name(array) -> str:
    """The library's name ("bf16") of an array's dtype."""
    text = str(array.dtype).split(".")[-1]
    try:
        return _SHORT[text]
    except KeyError:
        raise TypeError(f"dtype {array.dtype} is not supported; known: {', '.join(_SHORT)}") from None


def device_name(array) -> str:
    """"cpu" or "cuda:N"."""
    if type(array).__module__.startswith("numpy"):
        return "cpu"
    kind, index = array.__dlpack_device__()
    if kind == 1:
        return "cpu"
    if kind == 2:
        return f"cuda:{index}"
    raise ValueError(f"an array on {getattr(array, 'device', kind)} cannot be used; move it to the CPU or a CUDA device")


def empty(like, shape, dtype: str):
    """An uninitialized array of `shape` and `dtype` ("bf16") in the framework and on the device of `like`."""
    module = type(like).__module__
    if module.startswith("torch"):
        import torch

        return torch.empty(shape, dtype=getattr(torch, _NAMES[dtype]), device=like.device)
    if module.startswith("cupy"):
        import cupy

        return cupy.empty(shape, dtype=_NAMES[dtype])
    import numpy

    if dtype in ("bf16", "fp8_e4m3"):
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError(f"NumPy has no {dtype}; install ml_dtypes, or pass output= as "
                            f"{'uint16' if dtype == 'bf16' else 'uint8'}") from None
        return numpy.empty(shape, dtype=getattr(ml_dtypes, _NAMES[dtype]))
    return numpy.empty(shape, dtype=_NAMES[dtype])


def give_back(like, array):
    """`array` in the framework of `like`: JAX arrays are immutable, so results are filled in NumPy first."""
    if type(like).__module__.startswith("jax") and type(array).__module__.startswith("numpy"):
        import jax.numpy

        return jax.numpy.asarray(array)
    return array
