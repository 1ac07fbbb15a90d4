# SPDX-License-Identifier: Apache-2.0
"""The shared object and how arguments reach it. (What depends on an array's framework is in _arrays.py.)"""

from __future__ import annotations

import contextlib
import operator
import os
import pathlib
from typing import Any, Optional

import tvm_ffi

from ._arrays import Array, Typed, framework, stream_of, trouble, writable_alias

# MOESAIC_LIBRARY: a build folder's shared object instead of the installed one (the tests use it).
_PATH = os.environ.get("MOESAIC_LIBRARY") or pathlib.Path(__file__).with_name("libmoesaic_ffi.so")
tvm_ffi.register_error("OSError", OSError)  # the registry knows ValueError and RuntimeError already

# What the package calls: a library without one of these is another version's.
FUNCTIONS = ("activate", "align", "align_capacity", "checkpoint_layers", "devices", "experts", "finalize", "grouped_gemm",
             "layer_config", "layer_forward", "layer_from_checkpoint", "layer_load", "layer_load_expert", "layer_load_shared",
             "layer_new", "layer_ready", "layer_set_router", "layer_unpack_expert", "layer_weight_bytes", "layer_workspace_bytes",
             "prepare", "quantize", "route", "schemes", "set_kernels", "set_num_threads", "sum_slots", "support_reason",
             "use_openmp", "version")


def _load(path: str) -> Any:
    try:
        library = tvm_ffi.load_module(path, keep_module_alive=True)
        for name in FUNCTIONS:
            getattr(library, name)
    except Exception as error:
        raise ImportError(f"moesaic: {path} is missing or not this version's; `pip install .`, or point MOESAIC_LIBRARY at it "
                          f"({(str(error).splitlines() or [''])[0]})") from None
    return library


lib: Any = _load(str(_PATH))

# What NumPy's own dtypes (and ml_dtypes') are called here. DLPack from NumPy knows none of the
# sub-32-bit floats, so those go over as raw bits beside their name.
_BITS = {"bfloat16": ("uint16", "bf16"), "float8_e4m3fn": ("uint8", "fp8_e4m3")}
_bits_of: dict = {}  # the same by dtype object: a dtype's name is made anew each time it is asked for
_from_dlpack = tvm_ffi.from_dlpack


def _numpy(array):
    try:
        bits = _bits_of[array.dtype]
        return _from_dlpack(array) if bits is None else [_from_dlpack(array.view(bits[0])), bits[1]]
    except (KeyError, BufferError):
        if array.dtype not in _bits_of:
            _bits_of[array.dtype] = _BITS.get(array.dtype.name)
        elif array.flags.writeable:
            raise
        else:
            # DLPack before 1.0 has no word for read-only. Nothing here writes to an input; outputs are asked before.
            array = writable_alias(array)
        return _numpy(array)


def _typed(array):
    plain = arg(array.array)
    return [plain[0] if isinstance(plain, list) else _from_dlpack(plain), array.name]


# How an array of a type goes over; torch's tensors as they are: no copy, no Python object per call. Asking
# a type for its module costs as much as the rest of a call.
_ways: dict = {type(None): lambda array: None, Typed: _typed}


tells_its_stream: set = set()  # types for which apache-tvm-ffi finds the current stream, as an argument itself


def _way(kind):
    origin = framework(kind)
    if origin == "torch":
        tells_its_stream.add(kind)
    way = _ways[kind] = {"torch": lambda array: array, "numpy": _numpy}.get(origin, _from_dlpack)
    return way


def arg(array, name: str = "array"):
    """`array` (any DLPack exporter, a Typed, or None) as the bindings take it. `name` is what an error calls it."""
    kind = type(array)
    try:
        return (_ways.get(kind) or _way(kind))(array)
    except Exception as error:
        raise trouble(name, array, error) from None


_default_stream = contextlib.nullcontext()


def on_stream_of(like: Array):
    """A context in which calls run on the current stream of the framework of `like`.

    apache-tvm-ffi asks for it only where a tensor of torch is an argument itself. What is inside a dictionary, and
    other frameworks' arrays, would run on the default stream: unordered with the caller's work on any other, and an
    error while a graph is captured.
    """
    stream = stream_of(like)
    return _default_stream if stream is None else tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", stream[0]), stream[1])


def settle(values: dict) -> None:
    """Waits for the frameworks' streams behind `values`: packing and unpacking run on none of theirs, and not often."""
    waited = set()
    for value in values.values():
        if isinstance(value, dict):
            settle(value)
        elif hasattr(value, "__dlpack__") or type(value) is Typed:
            stream = stream_of(value)
            if stream is not None and stream[:2] not in waited:
                waited.add(stream[:2])
                stream[2]()


def out(array, name: str):
    """`array`, which a call will write to: ValueError when it is read-only. (torch knows nothing that is.)"""
    if type(array) in tells_its_stream:
        return array
    flags = getattr(array.array if type(array) is Typed else array, "flags", None)
    if flags is not None and not getattr(flags, "writeable", True):
        raise ValueError(f"{name}: is read-only; pass a writable array")
    return array


def integer(value, name: str) -> int:
    """`value` as an int: TypeError by its name when it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def number(value, name: str) -> float:
    """`value` as a float: TypeError by its name when it is none."""
    try:
        return value + 0.0 if isinstance(value, (int, float)) else value.__float__()
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None


def _value(value, name: str):
    """A number, a name or an array for the bindings."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if not hasattr(value, "__dlpack__") and hasattr(value, "item"):
        return value.item()  # a NumPy scalar
    return arg(value, name)


def options(values: dict, prefix: str = "") -> dict:
    """A dictionary for the bindings: None dropped, arrays converted, nested dictionaries followed."""
    converted: dict = {}
    for key, value in values.items():
        if isinstance(value, dict):
            converted[key] = options(value, f"{prefix}{key}.")
        elif value is not None:
            converted[key] = _value(value, f"{prefix}{key}")
    return converted


def pairs(values: dict, outputs: tuple) -> list:
    """The same for a call: names and values in turn, nested dictionaries' as "b.weight". `outputs`: what it writes."""
    for name in outputs:
        out(values[name], name)
    into: list = []
    _flatten(values, "", into)
    return into


def _flatten(values, prefix, into):
    for key, value in values.items():
        if value is None:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _flatten(value, f"{name}.", into)
        else:
            into += (name, value if type(value) in tells_its_stream else _value(value, name))


def first_trouble(error: Exception, values: dict) -> Exception:
    """What to raise for a call with `values` that failed with `error`: which array cannot go over, if one cannot."""
    if isinstance(error, ValueError):
        return error  # ours: it has a name already
    return _bad_array(values, "") or error


def _bad_array(values, prefix):
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found = _bad_array(value, f"{name}.")
            if found is not None:
                return found
        elif framework(type(value)) == "torch" and hasattr(value, "layout"):
            try:
                _from_dlpack(value.detach())
            except Exception as cause:
                return trouble(name, value, cause)
    return None
