# SPDX-License-Identifier: Apache-2.0
"""The shared object and how arrays of any framework reach it."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Optional

import tvm_ffi

# MOESAIC_LIBRARY: a build folder's shared object instead of the installed one (the tests use it).
_PATH = os.environ.get("MOESAIC_LIBRARY") or pathlib.Path(__file__).with_name("libmoesaic_ffi.so")
tvm_ffi.register_error("OSError", OSError)  # the registry knows ValueError and RuntimeError already
lib: Any = tvm_ffi.load_module(str(_PATH), keep_module_alive=True)

Array = Any  # whatever speaks DLPack: numpy.ndarray, torch.Tensor, jax.Array, cupy.ndarray

# What NumPy's own dtypes (and ml_dtypes') are called here. DLPack from NumPy knows none of the
# sub-32-bit floats, so those go over as raw bits beside their name.
_BITS = {"bfloat16": ("uint16", "bf16"), "float8_e4m3fn": ("uint8", "fp8_e4m3")}
_bits_of: dict = {}  # the same by dtype object: a dtype's name is made anew each time it is asked for
_from_dlpack = tvm_ffi.from_dlpack


def _numpy(array, dtype):
    if dtype is None:
        try:
            bits = _bits_of[array.dtype]
        except KeyError:
            bits = _bits_of[array.dtype] = _BITS.get(array.dtype.name)
        if bits is not None:
            return [_from_dlpack(array.view(bits[0])), bits[1]]
        return _from_dlpack(array)
    return [_from_dlpack(array), dtype]


def _other(array, dtype):
    view = _from_dlpack(array)
    return view if dtype is None else [view, dtype]


def _torch(array, dtype):
    # Passed as it is: no copy, no Python object per call.
    return array if dtype is None else [_from_dlpack(array), dtype]


# How an array of a type goes over. Asking a type for its module costs as much as the rest of a call.
_ways: dict = {type(None): lambda array, dtype: None}


def _way(kind):
    module = kind.__module__
    way = _ways[kind] = _torch if module.startswith("torch") else _numpy if module.startswith("numpy") else _other
    return way


def arg(array: Array, dtype: Optional[str] = None):
    """`array` (any DLPack exporter, or None) as the bindings take it.

    `dtype` names the element type when the array's own cannot: uint16 bits that are bf16, say.
    """
    kind = type(array)
    return (_ways.get(kind) or _way(kind))(array, dtype)


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


def call_options(values: dict):
    """The same, converted once for a call and the question what scratch it needs."""
    return tvm_ffi.convert(options(values))


# --- arrays in the caller's framework ---------------------------------------------------------------
_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn",
          "i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}
_SHORT = {long: short for short, long in _NAMES.items()}


def dtype_name(array: Array) -> str:
    """The library's name ("bf16") of an array's dtype."""
    text = str(array.dtype).split(".")[-1]
    try:
        return _SHORT[text]
    except KeyError:
        raise TypeError(f"dtype {array.dtype} is not supported; known: {', '.join(_SHORT)}") from None


def device_name(array: Array) -> str:
    """"cpu" or "cuda:N"."""
    if type(array).__module__.startswith("numpy"):
        return "cpu"
    kind, index = array.__dlpack_device__()
    if kind == 1:
        return "cpu"
    if kind == 2:
        return f"cuda:{index}"
    raise ValueError(f"an array on {getattr(array, 'device', kind)} cannot be used; move it to the CPU or a CUDA device")


def _empty_torch(like):
    import torch

    dtypes = {short: getattr(torch, long) for short, long in _NAMES.items()}
    empty = torch.empty
    return lambda like, shape, dtype: empty(shape, dtype=dtypes[dtype], device=like.device)


def _empty_cupy(like):
    import cupy

    return lambda like, shape, dtype: cupy.empty(shape, dtype=_NAMES[dtype])


def _empty_numpy(like):
    import numpy

    dtypes = {short: numpy.dtype(long) for short, long in _NAMES.items() if short not in ("bf16", "fp8_e4m3")}

    def make(like, shape, dtype):
        if dtype not in dtypes:
            try:
                import ml_dtypes
            except ImportError:
                raise TypeError(f"NumPy has no {dtype}; install ml_dtypes, or pass output= as "
                                f"{'uint16' if dtype == 'bf16' else 'uint8'}") from None
            dtypes[dtype] = numpy.dtype(getattr(ml_dtypes, _NAMES[dtype]))
        return numpy.empty(shape, dtypes[dtype])

    return make


_makers: dict = {}


def empty(like: Array, shape: tuple, dtype: str) -> Array:
    """An uninitialized array of `shape` and `dtype` ("bf16") in the framework and on the device of `like`."""
    kind = type(like)
    maker = _makers.get(kind)
    if maker is None:
        module = kind.__module__.split(".")[0]
        maker = _makers[kind] = {"torch": _empty_torch, "cupy": _empty_cupy}.get(module, _empty_numpy)(like)
    return maker(like, shape, dtype)


def give_back(like: Array, array: Array) -> Array:
    """`array` in the framework of `like`: JAX arrays are immutable, so results are filled in NumPy first."""
    if type(like) is type(array):
        return array
    if type(like).__module__.startswith("jax") and type(array).__module__.startswith("numpy"):
        import jax.numpy

        return jax.numpy.asarray(array)
    return array
