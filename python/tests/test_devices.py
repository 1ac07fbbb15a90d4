# SPDX-License-Identifier: Apache-2.0
"""What lies on the wrong device is refused by its name before anything reads it; streams of the frameworks, on any machine.

The "CUDA" arrays here are host memory that says it lies on cuda:0: a check that fails shows as a missing exception,
where real device memory would end the process.
"""

import contextlib
import ctypes
import sys
import types

import numpy as np
import pytest

import moesaic
from moesaic import _arrays, _ffi
from moesaic.layer import run_with_scratch

E, H, I, K, T = 8, 64, 32, 2, 3  # noqa: E741
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _OnCuda:
    """A NumPy array that says it lies on cuda:0."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__()
        # DLManagedTensor begins with its DLTensor: data, then the device's type.
        ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = 2
        return capsule


def _random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) * 0.1


def _new(**options):
    return moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=16, scheme="f32", **options)


_W1, _W2, _X = _random(E, 2 * I, H), _random(E, H, I), _random(T, H)
_IDS, _P = np.array([[0, 1], [2, 3], [1, 5]], np.int32), np.full((T, K), 0.5, np.float32)


@pytest.fixture
def layer():
    return _new().load(dict(weight=_W1), dict(weight=_W2))


LOADS = {
    "fc1.weight": lambda there: _new().load(dict(weight=there(_W1)), dict(weight=_W2)),
    "fc2.weight": lambda there: _new().load(dict(weight=_W1), dict(weight=there(_W2))),
    "fc1.bias": lambda there: _new().load(dict(weight=_W1, bias=there(_random(E, 2 * I))), dict(weight=_W2)),
    "fc2.bias": lambda there: _new().load_expert(0, dict(weight=_W1[:1]),
                                                 dict(weight=_W2[:1], bias=there(_random(1, H)))),
    "activation.alpha": lambda there: _new(activation="swiglu_oai").load(
        dict(weight=_W1), dict(weight=_W2), alpha=there(np.ones(E, np.float32)), limit=np.ones(E, np.float32)),
    "router.weight": lambda there: _new().set_router(there(_random(E, H))),
    "router.bias": lambda there: _new().set_router(_random(E, H), bias=there(_random(E))),
    "shared.fc1.weight": lambda there: _new(shared_experts=1, shared_intermediate=I).load_shared(
        dict(weight=there(_W1[:1])), dict(weight=_W2[:1])),
    "shared.gate": lambda there: _new(shared_experts=1, shared_intermediate=I).load_shared(
        dict(weight=_W1[:1]), dict(weight=_W2[:1]), gate=there(_random(H))),
}


@pytest.mark.parametrize("argument", LOADS)
def test_weights_of_another_device_are_refused(argument):
    LOADS[argument](lambda array: array)  # what is refused is the device, nothing else
    with pytest.raises(ValueError, match=rf"{argument}: expected on cpu, got .* on cuda:0"):
        LOADS[argument](_OnCuda)


def test_unpacking_to_another_device_is_refused(layer):
    one, two = np.empty_like(_W1[:1]), np.empty_like(_W2[:1])
    layer.unpack_expert(0, one, two)
    for name, pair in (("fc1", (_OnCuda(one), two)), ("fc2", (one, _OnCuda(two)))):
        with pytest.raises(ValueError, match=f"{name}: expected on cpu"):
            layer.unpack_expert(0, *pair)


def _scratch(count):
    raw = np.zeros(count + 256, np.uint8)
    return raw[-raw.ctypes.data % 256:][:count]


def test_a_workspace_of_another_device_or_with_gaps_is_refused(layer):
    bytes_ = layer.workspace_bytes(T)
    expected = layer(_X, _IDS, _P)
    np.testing.assert_array_equal(layer(_X, _IDS, _P, workspace=_scratch(bytes_)), expected)
    with pytest.raises(ValueError, match="workspace: expected on cpu, got .* on cuda:0"):
        layer(_X, _IDS, _P, workspace=_OnCuda(_scratch(bytes_)))
    with pytest.raises(ValueError, match="workspace: must be contiguous"):
        layer(_X, _IDS, _P, workspace=_scratch(2 * bytes_)[::2])


@pytest.mark.parametrize("argument", ["hidden_states", "topk_ids", "topk_weights", "output"])
def test_arguments_of_another_device_are_refused(layer, argument):
    call = dict(hidden_states=_X, topk_ids=_IDS, topk_weights=_P, output=np.empty_like(_X))
    layer(**call)
    call[argument] = _OnCuda(call[argument])
    with pytest.raises(ValueError, match=f"{argument}: expected on cpu"):
        layer(**call)


def test_scratch_beside_rows_on_another_device_is_not_what_is_wrong(layer):
    """On a device, scratch is made where the rows lie: when that is elsewhere, the rows are to be named."""
    scratch = _OnCuda(_scratch(layer.workspace_bytes(T)))
    with pytest.raises(ValueError, match="hidden_states: expected on cpu"):
        layer(_OnCuda(_X), _IDS, _P, output=_OnCuda(np.empty_like(_X)), workspace=scratch)


def test_results_of_a_framework_without_an_allocator_are_refused():
    with pytest.raises(ValueError, match="_OnCuda on cuda:0: .* torch or CuPy"):
        moesaic.quantize(_OnCuda(_X))
    with pytest.raises(ValueError, match="_OnCuda on cuda:0"):
        _new().load(dict(weight=_W1), dict(weight=_W2))(_OnCuda(_X), _IDS, _P)


@pytest.fixture(params=[TypeError, ValueError])
def cupy(monkeypatch, request):
    """As much of CuPy as making an array takes, in host memory: it knows NumPy's own dtypes. Others NumPy does not
    understand (TypeError), or, once ml_dtypes has told it, CuPy does not support (ValueError)."""
    class FakeCupy(np.ndarray):
        device = contextlib.nullcontext()

    def empty(shape, dtype):
        if dtype in ("float8_e4m3fn", "bfloat16"):
            raise request.param(f"data type '{dtype}' not understood")
        return np.empty(shape, dtype).view(FakeCupy)

    FakeCupy.__module__ = "cupy._core.core"
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(empty=empty))
    monkeypatch.setattr(_arrays, "_makers", {})
    return lambda array: array.view(FakeCupy)


def test_cupy_gets_bits_where_it_has_no_dtype(cupy):
    made = _arrays.empty(cupy(_X), (4, 5), "f32")
    assert _arrays.framework(type(made)) == "cupy" and made.shape == (4, 5) and made.dtype == np.float32
    with pytest.raises(TypeError, match=r"CuPy makes no fp8_e4m3; go in as moesaic.typed\(array, 'f32'\)"):
        _arrays.empty(cupy(_X), (2,), "fp8_e4m3")
    bits = _arrays.empty(moesaic.typed(cupy(_X), "f32"), (2, 3), "fp8_e4m3")
    assert bits.name == "fp8_e4m3" and bits.array.dtype == np.uint8 and _arrays.framework(type(bits.array)) == "cupy"


# --- streams ------------------------------------------------------------------------------------------

class _Stream:
    def __init__(self, handle):
        self.cuda_stream, self.waited = handle, 0

    def synchronize(self):
        self.waited += 1


@pytest.fixture
def side_stream(monkeypatch):
    """What torch would say with a side stream current on cuda:1, and a tensor there."""
    torch = pytest.importorskip("torch")
    stream = _Stream(0x5EED)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {1: stream}[device.index])
    monkeypatch.setattr(_arrays, "_streams", {})

    class There(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 1))
        is_cuda = property(lambda self: True)

    return stream, torch.zeros(3).as_subclass(There)


def test_a_call_runs_on_the_current_stream(side_stream):
    import tvm_ffi

    _, tensor = side_stream
    current, seen = lambda: tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 1)), []
    run_with_scratch(lambda *_: seen.append(current()), tensor, {})
    run_with_scratch(lambda *_: seen.append(current()), moesaic.typed(tensor, "f32"), {})
    assert seen == [0x5EED, 0x5EED] and current() == 0
    with pytest.raises(KeyError):
        run_with_scratch(lambda *_: {}["raised inside"], tensor, {})
    assert current() == 0, "an error leaves no stream behind"


def test_tensors_of_torch_are_arguments_themselves():
    """apache-tvm-ffi asks torch for the stream of those, not of what is inside a dictionary."""
    torch = pytest.importorskip("torch")
    x, seen = torch.zeros(3), []
    run_with_scratch(lambda *given: seen.append(given), x, dict(a=x, b=dict(weight=x, bias=None), top_k=2))
    scratch, *pairs = seen[0]
    assert scratch is True and pairs[::2] == ["a", "b.weight", "top_k"]
    assert pairs[1] is x and pairs[3] is x and pairs[5] == 2


def test_scratch_that_cannot_be_borrowed_is_made():
    """True: may be borrowed from the allocator that torch brings along. What a call answers it lacks is made, once."""
    torch = pytest.importorskip("torch")
    for x, first in ((torch.zeros(3), True), (_X, None)):
        seen = []

        def call(*given):
            seen.append(given)
            return 96 if len(seen) == 1 else 0

        run_with_scratch(call, x, dict(a=x, top_k=2))
        (asked, *before), (scratch, *after) = seen
        assert asked is first and tuple(scratch.shape) == (96,) and before[::2] == after[::2] == ["a", "top_k"]
        assert isinstance(scratch, torch.Tensor) == (first is True)


def test_weights_still_being_written_are_waited_for(side_stream):
    stream, tensor = side_stream
    _ffi.settle(dict(fc1=dict(weight=tensor, bias=tensor), fc2=dict(weight=_W2), limit=None))
    assert stream.waited == 1


def test_frameworks_are_known_by_their_base_classes():
    class Mine(np.ndarray):
        pass

    assert _arrays.framework(Mine) == _arrays.framework(np.ndarray) == "numpy" and _arrays.framework(list) == ""
    torch = pytest.importorskip("torch")

    class Ours(torch.nn.Parameter):
        pass

    assert _arrays.framework(Ours) == "torch"


def test_a_users_subclass_is_a_tensor():
    torch = pytest.importorskip("torch")

    class Ours(torch.Tensor):
        pass

    x = torch.from_numpy(_X)
    layer = _new().load(dict(weight=torch.from_numpy(_W1).as_subclass(Ours)), dict(weight=_W2))
    y = layer(x.as_subclass(Ours), torch.from_numpy(_IDS), torch.from_numpy(_P))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(torch.Tensor(y).numpy(), layer(_X, _IDS, _P))
