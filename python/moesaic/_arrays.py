# SPDX-License-Identifier: Apache-2.0
"""Arrays of the frameworks: what they are called, how results are made in them, what to say of one that cannot go over."""

from __future__ import annotations

from typing import Any

Array = Any  # whatever speaks DLPack: numpy.ndarray, torch.Tensor, jax.Array, cupy.ndarray; or a Typed

_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn", "e8m0": "float8_e8m0fnu",
          "i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}
_SHORT = {long: short for short, long in _NAMES.items()}
_RAW = {"bf16": "uint16", "fp8_e4m3": "uint8", "e8m0": "uint8"}  # what NumPy holds their bits in


class Typed:
    """An array whose elements are the bits of another dtype. See `typed`."""

    __slots__ = ("array", "name")

    def __init__(self, array: Array, name: str) -> None:
        self.array, self.name = array, name

    @property
    def shape(self) -> tuple:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return _NAMES[self.name]


def typed(array: Array, dtype: str) -> Typed:
    """`array` with its elements' bits read as `dtype`: NumPy's uint16 as "bf16", uint8 as "fp8_e4m3" or "e8m0".

    Taken wherever an array is. What a call makes for it in a dtype that NumPy lacks comes back as bits, too.
    For those who do not have ml_dtypes; its arrays need none of this.
    """
    short = dtype_text(dtype)
    if short not in _NAMES:
        raise ValueError(f"dtype: unknown '{dtype}'; known: {', '.join(_NAMES)}")
    return Typed(array, short)


def dtype_text(dtype: Any) -> str:
    """"bf16" from "bf16", "bfloat16", torch.bfloat16 or a NumPy dtype; other text as it is."""
    text = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).split(".")[-1]
    return _SHORT.get(text, text)


def dtype_name(array: Array, name: str) -> str:
    """The library's name ("bf16") of the dtype of `array`, which is called `name`."""
    text = str(as_array(array, name).dtype).split(".")[-1]
    try:
        return _SHORT[text]
    except KeyError:
        raise ValueError(f"{name}: dtype {array.dtype} is not supported; convert it to one of {', '.join(_SHORT)}") from None


def as_array(array: Array, name: str, rank: int = 0) -> Array:
    """`array`, when it is one and has `rank` dimensions (0: any)."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise trouble(name, array)
    if rank and len(array.shape) != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(array.shape)}; pass a view with {rank}")
    return array


def device_name(array: Array) -> str:
    """"cpu" or "cuda:N"."""
    if type(array) is Typed:
        array = array.array
    if framework(type(array)) == "numpy" or not hasattr(array, "__dlpack_device__"):
        return "cpu"
    kind, index = array.__dlpack_device__()
    if kind in (1, 3):  # host memory, pinned or not
        return "cpu"
    if kind == 2:
        return f"cuda:{index}"
    raise ValueError(f"an array on {getattr(array, 'device', kind)} cannot be used; move it to the CPU or a CUDA device")


def trouble(name: str, array: Any, cause: Any = "") -> Exception:
    """The error for an array that cannot go over: its name, what is wrong, a way out."""
    if not hasattr(array, "__dlpack__") or not hasattr(array, "shape"):
        return TypeError(f"{name}: expected an array (NumPy, torch, JAX, CuPy, whatever has __dlpack__), got "
                         f"{type(array).__name__}; numpy.asarray makes one")
    dtype, why = getattr(array, "dtype", ""), str(cause).splitlines()[0] if str(cause) else ""
    if getattr(dtype, "isnative", True) is False:
        return ValueError(f"{name}: dtype {dtype} has the other byte order; convert it with "
                          "astype(array.dtype.newbyteorder('='))")
    if framework(type(array)) == "numpy":
        return ValueError(f"{name}: dtype {dtype} is not supported ({why}); convert it to one of {', '.join(_SHORT)}")
    return ValueError(f"{name}: this array cannot be used ({why}); pass a dense one on the CPU or a CUDA device, in one "
                      f"of {', '.join(_SHORT)}")


# --- frameworks and the streams they work on -------------------------------------------------------------

def framework(kind: type) -> str:
    """"torch", "cupy", "jax", "numpy": whose arrays `kind` are; a user's subclass is its framework's. Else ""."""
    for base in kind.__mro__:
        root = base.__module__.split(".")[0]
        if root in ("torch", "cupy", "numpy") or root.startswith("jax"):
            return "jax" if root.startswith("jax") else root
    return ""


def _torch_stream():
    import torch

    def find(array):
        if not array.is_cuda:
            return None
        stream = torch.cuda.current_stream(array.device)
        return array.device.index, stream.cuda_stream, stream.synchronize

    return find


def _cupy_stream():
    import cupy

    def find(array):
        stream = cupy.cuda.get_current_stream(array.device.id)
        return array.device.id, stream.ptr, stream.synchronize

    return find


_streams: dict = {}


def stream_of(array: Array):
    """(device index, handle, synchronize) of the CUDA stream that the framework of `array` works on now. None for what
    lies on the CPU, and for frameworks without one: they order what they hand over with the default stream."""
    if type(array) is Typed:
        array = array.array
    kind = type(array)
    find = _streams.get(kind)
    if find is None:
        made = {"torch": _torch_stream, "cupy": _cupy_stream}.get(framework(kind))
        find = _streams[kind] = made() if made else lambda array: None
    return find(array)


class _Writable:
    """An array's memory, said to be writable."""

    def __init__(self, array):
        interface = array.__array_interface__
        self.__array_interface__ = dict(interface, data=(interface["data"][0], False))
        self._array = array


def writable_alias(array):
    """A NumPy view of a read-only array that does not say so."""
    import numpy

    return numpy.asarray(_Writable(array))


# --- results in the caller's framework ------------------------------------------------------------------

def _empty_torch(like):
    import torch

    dtypes = {short: getattr(torch, long) for short, long in _NAMES.items() if hasattr(torch, long)}
    empty = torch.empty
    return lambda like, shape, dtype: empty(shape, dtype=dtypes[dtype], device=like.device)


def _empty_cupy(like):
    import cupy

    def make(like, shape, dtype):
        with like.device:  # the current device may be another
            try:
                return cupy.empty(shape, dtype=_NAMES[dtype])
            except (TypeError, ValueError):  # without ml_dtypes it knows no such name, with it no such dtype
                raise TypeError(f"output: CuPy makes no {dtype}; go in as moesaic.typed(array, '{dtype_text(like.dtype)}')"
                                ", and results come back as bits") from None

    return make


def _empty_typed(like):
    inside = like.array

    def make(like, shape, dtype):
        origin = framework(type(inside))
        if dtype in _RAW and origin == "numpy":
            import numpy

            return Typed(numpy.empty(shape, _RAW[dtype]), dtype)
        if dtype in _RAW and origin == "cupy":
            import cupy

            with inside.device:
                return Typed(cupy.empty(shape, _RAW[dtype]), dtype)
        return empty(inside, shape, dtype)

    return make


def _empty_numpy(like):
    import numpy

    dtypes = {short: numpy.dtype(long) for short, long in _NAMES.items() if short not in _RAW}

    def make(like, shape, dtype):
        if framework(type(like)) != "numpy" and device_name(like) != "cpu":
            raise ValueError(f"{type(like).__name__} on {device_name(like)}: results and scratch cannot be made in its "
                             "framework; hand it over as a torch or CuPy array (their from_dlpack copies nothing)")
        if dtype not in dtypes:
            try:
                import ml_dtypes
            except ImportError:
                raise TypeError(f"output: NumPy has no {dtype}; install ml_dtypes, or pass output="
                                f"moesaic.typed(numpy.empty(..., '{_RAW[dtype]}'), '{dtype}')") from None
            dtypes[dtype] = numpy.dtype(getattr(ml_dtypes, _NAMES[dtype]))
        return numpy.empty(shape, dtypes[dtype])

    return make


_makers: dict = {}


def empty(like: Array, shape: tuple, dtype: str) -> Array:
    """An uninitialized array of `shape` and `dtype` ("bf16") in the framework and on the device of `like`."""
    return (_makers.get(type(like)) or _maker(like))(like, shape, dtype)


def _maker(like):
    kind = type(like)
    if kind is Typed:
        return _empty_typed(like)  # its array's framework is not its type's
    made = _makers[kind] = {"torch": _empty_torch, "cupy": _empty_cupy}.get(framework(kind), _empty_numpy)(like)
    return made


_likers: dict = {}


def _torch_like(like):
    import torch

    dtypes = {short: getattr(torch, long) for short, long in _NAMES.items() if hasattr(torch, long)}
    empty_like = torch.empty_like  # half the time of torch.empty, which looks a shape, a dtype and a device up

    def make(like, dtype):
        wanted = dtypes[dtype]
        return empty_like(like) if like.dtype is wanted else empty_like(like, dtype=wanted)

    return make


def empty_like(like: Array, dtype: str) -> Array:
    """`empty` in the shape of `like`: what a forward makes when it is given no output."""
    maker = _likers.get(type(like))
    if maker is None:
        if framework(type(like)) != "torch":
            return empty(like, like.shape, dtype)
        maker = _likers[type(like)] = _torch_like(like)
    return maker(like, dtype)


def give_back(like: Array, array: Array) -> Array:
    """`array` in the framework of `like`: JAX arrays are immutable, so results are filled in NumPy first."""
    if type(array) is Typed:
        return array.array
    if type(like) is type(array):
        return array
    if framework(type(like)) == "jax" and framework(type(array)) == "numpy":
        import jax

        return jax.device_put(array, next(iter(like.devices())))  # jax.numpy.asarray would choose the default device
    return array
