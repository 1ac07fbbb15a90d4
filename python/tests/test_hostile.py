# SPDX-License-Identifier: Apache-2.0
"""Wrong calls: each is refused with an exception that names the argument, and nothing is written. Odd but right ones run."""

import copy
import pickle
import sys
import threading
import time

import numpy as np
import pytest

import moesaic

E, H, I, K, T = 4, 32, 16, 2, 3
_rng = np.random.default_rng(0)


def _f(*shape):
    return (_rng.standard_normal(shape) * 0.3).astype(np.float32)


W1, W2, X = _f(E, 2 * I, H), _f(E, H, I), _f(T, H)
IDS, P = np.array([[0, 1], [2, 3], [1, 3]], np.int32), np.ones((T, K), np.float32)
ROWS, COUNTS = _f(E, 4, H), np.array([4, 0, 2, 1], np.int32)


def _new(**options):
    return moesaic.Layer(**{**dict(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme="f32"), **options})


def _loaded(**options):
    return _new(**options).load(dict(weight=W1), dict(weight=W2))


LAYER = _loaded()


def _forward(**changed):
    call = {**dict(hidden_states=X, topk_ids=IDS, topk_weights=P), **changed}
    return LAYER.forward(**call)


def _read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


# --- forward ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,value,error", [
    ("hidden_states", X.astype(np.float64), ValueError), ("hidden_states", X.astype(np.float16), ValueError),
    ("hidden_states", X > 0, ValueError), ("hidden_states", X.astype(np.complex64), ValueError),
    ("hidden_states", X.astype(object), ValueError), ("hidden_states", X.astype(np.uint16), ValueError),
    ("hidden_states", X.astype(">f4"), ValueError), ("hidden_states", X.astype(np.longdouble), ValueError),
    ("hidden_states", X[0], ValueError), ("hidden_states", X[None], ValueError), ("hidden_states", X[None, None, None], ValueError),
    ("hidden_states", X[:, :8], ValueError), ("hidden_states", np.asfortranarray(X), ValueError),
    ("hidden_states", X.tolist(), TypeError), ("hidden_states", None, TypeError), ("hidden_states", "x", TypeError),
    ("hidden_states", 3.0, TypeError), ("hidden_states", np.zeros((9, H), np.float32), ValueError),
    ("topk_ids", IDS.astype(np.float32), ValueError), ("topk_ids", IDS.astype(np.int16), ValueError),
    ("topk_ids", IDS.astype(np.uint64), ValueError), ("topk_ids", IDS[:, :1], ValueError), ("topk_ids", IDS[:2], ValueError),
    ("topk_ids", IDS.tolist(), TypeError), ("topk_ids", np.ones((T, 4), np.int32)[:, ::2], ValueError), ("topk_ids", None, ValueError),
    ("topk_weights", P.astype(np.float64), ValueError), ("topk_weights", None, ValueError),
    ("topk_weights", np.ones((T, 4), np.float32)[:, ::2], ValueError), ("topk_weights", P.tolist(), TypeError),
    ("router_logits", _f(T, E), ValueError), ("hidden_scale", np.ones(1, np.float32), ValueError),
    ("output", np.empty((2, H), np.float32), ValueError), ("output", np.empty((T, H), np.float16), ValueError),
    ("output", "no", TypeError), ("output", _read_only(X), ValueError), ("add", True, ValueError),
    ("tokens_per_expert", np.zeros(E, np.int64), ValueError), ("tokens_per_expert", np.zeros(3, np.int32), ValueError),
    ("workspace", np.zeros(4, np.uint8), ValueError), ("workspace", np.zeros(1 << 16, np.uint8)[1:], ValueError),
    ("workspace", [1], TypeError)])
def test_forward_names_what_is_wrong(name, value, error):
    said = {"add": "output"}.get(name, name)
    if value is None and name == "topk_ids":
        said = "topk_weights"  # given without ids
    with pytest.raises(error, match=f"^{said}: .{{12,}}"):
        _forward(**{name: value})


def test_torch_tensors_that_cannot_go_over_are_named():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    for bad in (torch.empty(T, H, device="meta"), x.to_sparse(), x.double(), torch.randn(T, H, dtype=torch.complex64),
                x.to(torch.float8_e5m2)):
        with pytest.raises(ValueError, match="^hidden_states: .*; (pass|convert)"):
            _forward(hidden_states=bad)
    with pytest.raises(ValueError, match="^topk_ids: "):
        _forward(hidden_states=x, topk_ids=torch.from_numpy(IDS).to_sparse())
    with pytest.raises(ValueError, match="^static_scale: "):
        moesaic.quantize(x, granularity="tensor_static", static_scale=torch.empty(1, device="meta"))


def test_odd_but_right_arrays():
    expected = _forward()
    wide = np.zeros((2 * T, 2 * H), np.float32)
    wide[::2, H:] = X
    for x in (_read_only(X), wide[::2, H:], np.ma.masked_array(X), np.ascontiguousarray(X[::-1])[::-1]):
        np.testing.assert_array_equal(_forward(hidden_states=x), expected)
    np.testing.assert_array_equal(_forward(topk_ids=_read_only(IDS), topk_weights=_read_only(P)), expected)
    read_only = _new().load(dict(weight=_read_only(W1)), dict(weight=np.asfortranarray(W2)))
    np.testing.assert_array_equal(read_only(X, IDS, P), expected)
    assert _forward(hidden_states=X[:0], topk_ids=IDS[:0], topk_weights=P[:0]).shape == (0, H)
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.from_numpy(X), requires_grad=False)
    y = _forward(hidden_states=parameter, topk_ids=torch.from_numpy(IDS), topk_weights=P)
    np.testing.assert_array_equal(y.numpy(), expected)


def test_an_output_may_be_the_input_or_apart_from_it():
    expected = _forward()
    same = X.copy()
    assert _forward(hidden_states=same, output=same) is same
    np.testing.assert_array_equal(same, expected)
    both = np.zeros((T, 2 * H), np.float32)
    both[:, :H] = X
    _forward(hidden_states=both[:, :H], output=both[:, H:])  # side by side
    np.testing.assert_array_equal(both[:, H:], expected)
    stack = np.zeros((2 * T, H), np.float32)
    stack[:T] = X
    _forward(hidden_states=stack[:T], output=stack[T:])
    np.testing.assert_array_equal(stack[T:], expected)
    for output in (stack[1:T + 1], both.reshape(-1)[8:8 + T * H].reshape(T, H)):
        base = stack[:T] if output.base is stack else both[:, :H]
        before = output.copy()
        with pytest.raises(ValueError, match="^output: overlaps hidden_states"):
            _forward(hidden_states=base, output=output)
        np.testing.assert_array_equal(output, before)


# --- making and loading a layer ----------------------------------------------------------------------------

@pytest.mark.parametrize("name,value,error", [
    ("experts", 0, ValueError), ("experts", -1, ValueError), ("experts", "4", TypeError), ("experts", 4.0, TypeError),
    ("experts", 1 << 62, ValueError), ("experts", 1 << 70, TypeError), ("experts", None, TypeError), ("hidden", 1 << 40, ValueError),
    ("max_tokens", None, TypeError), ("local_count", None, TypeError), ("workspace_cap", None, TypeError), ("weight_on", None, TypeError),
    ("quant", dict(scheme="bf16"), ValueError), ("activation", {}, ValueError), ("activation", dict(alpha=1.0), ValueError),
    ("routing", {}, ValueError), ("routing", dict(groups=3), ValueError),
    ("intermediate", 0, ValueError), ("top_k", 5, ValueError), ("top_k", 0, ValueError), ("max_tokens", -1, ValueError),
    ("scheme", None, TypeError), ("scheme", 3, TypeError), ("scheme", "fp7", ValueError), ("quant", [1], TypeError),
    ("quant", dict(banana=1), ValueError), ("quant", dict(group_size="16"), TypeError), ("quant", dict(zero_points="yes"), TypeError),
    ("activation", "swish", ValueError), ("activation", None, TypeError), ("activation", dict(kind="swiglu", alpha="x"), TypeError),
    ("routing", "foo", ValueError), ("routing", 3, TypeError), ("routing", dict(method="renormalize", groups=1 << 40), ValueError),
    ("device", "mps", ValueError), ("device", None, ValueError), ("input_dtype", "f8", ValueError), ("workspace_cap", -1, ValueError),
    ("workspace_cap", 10, ValueError), ("weight_on", "both", ValueError),
    ("weight_storage", "both", ValueError), ("weight_storage", "in_place", ValueError)])
def test_layer_names_what_is_wrong(name, value, error):
    said = {"input_dtype": "dtype"}.get(name, name)
    with pytest.raises(error, match=rf"^(config\.)?{said}.*: .{{12,}}"):
        _new(**{name: value})


@pytest.mark.parametrize("said,fc1,fc2,error", [
    ("fc1.weight", dict(weight=W2), dict(weight=W1), ValueError), ("fc1.weight", dict(weight=W1.astype(float)), dict(weight=W2), ValueError),
    ("fc1", W1, W2, TypeError), ("fc1.weight", None, None, ValueError), ("fc2.weight", dict(weight=W1), dict(weight=None), ValueError),
    ("weights.fc1", dict(weights=W1), dict(weight=W2), ValueError), ("fc1.weight", dict(weight=W1.tolist()), dict(weight=W2), TypeError),
    ("fc1.scale", dict(weight=W1, scale=_f(E)), dict(weight=W2), ValueError),
    ("fc2.bias", dict(weight=W1), dict(weight=W2, bias=_f(E, 3)), ValueError)])
def test_load_names_what_is_wrong(said, fc1, fc2, error):
    with pytest.raises(error, match=f"^{said}: "):
        _new().load(fc1, fc2)


def test_other_calls_of_a_layer():
    one, two = dict(weight=W1[:1]), dict(weight=W2[:1])
    for expert, error in ((E, ValueError), (-1, ValueError), ("0", TypeError), (0.5, TypeError)):
        with pytest.raises(error, match="expert: expected"):
            _new().load_expert(expert, one, two)
        with pytest.raises(error, match="expert: expected"):
            LAYER.unpack_expert(expert, W1[:1].copy(), W2[:1].copy())
    with pytest.raises(ValueError, match="^fc2: is read-only"):
        LAYER.unpack_expert(0, W1[:1].copy(), _read_only(W2[:1]))
    with pytest.raises(ValueError, match=r"^router\.weight: "):
        LAYER.set_router(_f(E, H + 1))
    with pytest.raises(ValueError, match="^load_shared: "):
        LAYER.load_shared(one, two)
    for tokens, error in ((-1, ValueError), (1 << 40, ValueError), ("3", TypeError)):
        with pytest.raises(error, match="^tokens: expected"):
            LAYER.workspace_bytes(tokens)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="^Layer: .*share the layer"):
            copied(LAYER)
    assert "f32, experts=4" in repr(LAYER)


def test_torch_names_are_understood():
    torch = pytest.importorskip("torch")
    layer = _loaded(device=torch.device("cpu"), input_dtype=torch.float32, output_dtype=np.dtype(np.float32))
    np.testing.assert_array_equal(layer(X, IDS, P), _forward())
    assert _new(experts=np.int64(4)).config["experts"] == 4


# --- levels 2 and 3 ---------------------------------------------------------------------------------------

def _lists():
    slots, blocks, count = moesaic.align(IDS, E, 4)
    return dict(slots=slots, block_experts=blocks, num_padded=count, block_rows=4, top_k=K)


_C = np.empty((T * K, 2 * I), np.float32)
_WRONG = {
    "hidden_states": [(TypeError, lambda: moesaic.prepare(LAYER, X.tolist(), IDS, ROWS, COUNTS))],
    "rows": [(ValueError, lambda: moesaic.prepare(LAYER, X, IDS, None, COUNTS)),
             (ValueError, lambda: moesaic.prepare(LAYER, X, IDS, ROWS[0], COUNTS)),
             (ValueError, lambda: moesaic.prepare(LAYER, X, IDS, _read_only(ROWS), COUNTS))],
    "num_tokens": [(ValueError, lambda: moesaic.prepare(LAYER, X, IDS, ROWS.copy(), COUNTS.astype(np.int64)))],
    "layer": [(TypeError, lambda: moesaic.prepare(None, X, IDS, ROWS, COUNTS)),
              (TypeError, lambda: moesaic.finalize("L", ROWS, P, X.copy(), topk_ids=IDS)),
              (TypeError, lambda: moesaic.load_checkpoint("nowhere", "0"))],
    "experts": [(ValueError, lambda: moesaic.prepare({}, X, IDS, ROWS, COUNTS)), (ValueError, lambda: moesaic.align(IDS, 0, 4)),
                (TypeError, lambda: moesaic.align(IDS, "4", 4))],
    "slots, num_tokens": [(ValueError, lambda: moesaic.experts(LAYER, ROWS, ROWS.copy())),
                          (ValueError, lambda: moesaic.experts(LAYER, ROWS, ROWS.copy(), num_tokens=COUNTS, slots=COUNTS)),
                          (ValueError, lambda: moesaic.grouped_gemm(X, dict(weight=W1), _C, quant="f32"))],
    "weights": [(TypeError, lambda: moesaic.experts(LAYER.config, ROWS, ROWS.copy(), num_tokens=COUNTS)),
                (TypeError, lambda: moesaic.experts(LAYER.config, ROWS, ROWS.copy(), num_tokens=COUNTS, weights=[W1, W2])),
                (ValueError, lambda: moesaic.experts(LAYER, ROWS, ROWS.copy(), num_tokens=COUNTS, weights={}))],
    "output": [(ValueError, lambda: moesaic.experts(LAYER, ROWS, _f(E, 4, H + 1), num_tokens=COUNTS)),
               (ValueError, lambda: moesaic.quantize(X, output=_read_only(X.astype(np.int8)), to="i8")),
               (ValueError, lambda: moesaic.sum_slots(_f(T, K, H), add=True))],
    "block_rows": [(ValueError, lambda: moesaic.align(IDS, E, 0)), (ValueError, lambda: moesaic.align(IDS, E, -4)),
                   (TypeError, lambda: moesaic.align(IDS, E, "4")),
                   (TypeError, lambda: moesaic.experts(LAYER, X, _f(6, H), slots=COUNTS, block_rows="4"))],
    "topk_ids": [(ValueError, lambda: moesaic.align(X, E, 4)), (TypeError, lambda: moesaic.align([[0]], E, 4)),
                 (ValueError, lambda: moesaic.align(IDS[0], E, 4)), (ValueError, lambda: moesaic.finalize(LAYER, ROWS, P, X.copy()))],
    "topk_weights": [(ValueError, lambda: moesaic.finalize(LAYER, ROWS, P[:1], X.copy(), topk_ids=IDS))],
    "logits": [(ValueError, lambda: moesaic.route()), (ValueError, lambda: moesaic.route(X[0], 2)),
               (ValueError, lambda: moesaic.route(X.astype(float), 2)), (TypeError, lambda: moesaic.route([[1.0]], 1))],
    "top_k": [(TypeError, lambda: moesaic.route(X)), (ValueError, lambda: moesaic.route(X, 0)), (ValueError, lambda: moesaic.route(X, 99)),
              (TypeError, lambda: moesaic.route(X, 2.0))],
    "routing": [(ValueError, lambda: moesaic.route(X, 2, method="x"))],
    "route.spec": [(ValueError, lambda: moesaic.route(X, 2, banana=1))],
    "spec.groups": [(ValueError, lambda: moesaic.route(X, 2, method="deepseek_v3", groups=1 << 40))],
    "input": [(ValueError, lambda: moesaic.quantize(X.astype(float))), (ValueError, lambda: moesaic.quantize(X[0])),
              (TypeError, lambda: moesaic.quantize([[1.0]])), (ValueError, lambda: moesaic.quantize(X, num_tokens=COUNTS)),
              (ValueError, lambda: moesaic.activate(_f(3, 5))), (ValueError, lambda: moesaic.activate(IDS)),
              (TypeError, lambda: moesaic.activate([1])), (ValueError, lambda: moesaic.sum_slots(X)), (TypeError, lambda: moesaic.sum_slots(1))],
    "to": [(ValueError, lambda: moesaic.quantize(X, to="int3"))],
    "granularity": [(ValueError, lambda: moesaic.quantize(X, granularity="row"))],
    "group_size": [(ValueError, lambda: moesaic.quantize(X, granularity="group", group_size=0)),
                   (TypeError, lambda: moesaic.quantize(X, granularity="group", group_size="8"))],
    "static_scale": [(ValueError, lambda: moesaic.quantize(X, granularity="tensor_static"))],
    "int8_rounding": [(ValueError, lambda: moesaic.quantize(X, to="i8", int8_rounding="up"))],
    "activation": [(ValueError, lambda: moesaic.activate(X, "swish")), (ValueError, lambda: moesaic.activate(X, dict(alpha=1.0))),
                   (TypeError, lambda: moesaic.activate(X, 3))],
    "scale": [(TypeError, lambda: moesaic.sum_slots(_f(T, K, H), scale="x"))],
    "scheme": [(ValueError, lambda: moesaic.grouped_gemm(X, dict(weight=W1), _C, quant="zz", **_lists()))],
    "quant": [(ValueError, lambda: moesaic.grouped_gemm(X, dict(weight=W1), _C, quant=dict(group_size=8), **_lists()))],
    "max_tokens": [(TypeError, lambda: moesaic.load_checkpoint("nowhere", 0, max_tokens=None))],
    "add": [(TypeError, lambda: _forward(add="yes", output=X.copy())),
            (TypeError, lambda: moesaic.sum_slots(_f(T, K, H), add="yes", output=X.copy()))],
    "b": [(TypeError, lambda: moesaic.grouped_gemm(X, W1, _C, quant="f32", **_lists()))],
    "b.weight": [(ValueError, lambda: moesaic.grouped_gemm(X, None, _C, quant="f32", **_lists()))],
    "c": [(ValueError, lambda: moesaic.grouped_gemm(X, dict(weight=W1), _read_only(_C), quant="f32", **_lists()))],
    "a_order": [(ValueError, lambda: moesaic.grouped_gemm(X, dict(weight=W1), _C, quant="f32", a_order="x", **_lists()))],
    "path": [(TypeError, lambda: moesaic.load_checkpoint(None, 0)), (TypeError, lambda: moesaic.checkpoint_layers(3))],
    "config": [(TypeError, lambda: moesaic.supports([1]))],
    "format": [(ValueError, lambda: moesaic.supports(LAYER.config, "foo"))],
    "device": [(ValueError, lambda: moesaic.supports(LAYER.config, "standard", "tpu")), (ValueError, lambda: moesaic.set_kernels("gpu", "x"))],
    "threads": [(ValueError, lambda: moesaic.set_num_threads(n)) for n in (0, -1, 1 << 32, 1 << 40)] + [
        (TypeError, lambda: moesaic.set_num_threads("2"))],
}


@pytest.mark.parametrize("name,number", [(n, i) for n, calls in _WRONG.items() for i in range(len(calls))])
def test_functions_name_what_is_wrong(name, number):
    error, call = _WRONG[name][number]
    with pytest.raises(error, match=rf"^(sorted\.|config\.)?{name}: .{{8,}}"):
        call()


def test_values_never_touch_memory_outside():
    huge = dict(num_tokens=np.full(E, 1 << 30, np.int32))
    poisoned = np.full((E, 4, H), np.nan, np.float32)
    moesaic.experts(LAYER, ROWS, poisoned, **huge)
    assert np.isfinite(poisoned).all(), "counts end at the capacity"
    moesaic.experts(LAYER, ROWS, poisoned, num_tokens=np.full(E, -5, np.int32))
    lists = _lists()
    lists.update(slots=np.full_like(lists["slots"], 1 << 30), block_experts=np.full_like(lists["block_experts"], 1 << 30),
                 num_padded=np.array([1 << 30], np.int32))
    moesaic.grouped_gemm(X, dict(weight=W1), _C, quant="f32", **lists)
    slots, blocks, count = moesaic.align(np.array([[1 << 30, -5]], np.int32), E, 4)
    assert count[0] == 0
    y = _forward(topk_ids=np.array([[1 << 30, -1], [-(1 << 31), 4], [5, 99]], np.int32))
    assert (y == 0).all()


# --- threads and frameworks ---------------------------------------------------------------------------------

def test_threads_make_load_run_and_fail_at_once():
    expected, failures = _forward(), []

    def work(number):
        try:
            for _ in range(10):
                layer = _loaded()
                np.testing.assert_array_equal(layer(X, IDS, P), expected)
                with pytest.raises(ValueError, match="topk_ids"):
                    layer(X, IDS[:, :1], P)
                del layer
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_a_layer_dies_while_another_thread_holds_its_forward():
    torch = pytest.importorskip("torch")
    from moesaic import torch_op

    layer = _loaded()
    number = torch_op.register(layer)
    call = [torch.from_numpy(a) for a in (X, IDS, P)]
    np.testing.assert_array_equal(torch_op.forward(*call, number).numpy(), _forward())
    del layer
    with pytest.raises(RuntimeError, match=f"no layer has the number {number}"):
        torch_op.forward(*call, number)


def test_jax_in_jax_out():
    """Arrays of JAX's CPU, which is not where it puts them by itself on a machine with a GPU; results lie there, too."""
    jax = pytest.importorskip("jax")
    jnp, cpu = jax.numpy, jax.devices("cpu")[-1]
    put = lambda array, dtype=None: jax.device_put(np.asarray(array, dtype), cpu)  # noqa: E731

    def back(array, dtype):
        assert isinstance(array, jax.Array) and array.dtype == dtype and array.devices() == {cpu}
        return np.asarray(array)

    y = back(LAYER(put(X), put(IDS), put(P)), jnp.float32)
    np.testing.assert_array_equal(y, _forward())
    ids, weights = moesaic.route(put(_f(T, E)), K)
    back(ids, jnp.int32), back(weights, jnp.float32)
    q, scale = moesaic.quantize(put(X), to="i8")
    back(q, jnp.int8), back(scale, jnp.float32)
    bf16 = _new(scheme="bf16").load(dict(weight=put(W1, jnp.bfloat16)), dict(weight=put(W2, jnp.bfloat16)))
    y = back(bf16(put(X, jnp.bfloat16), put(IDS), put(P)), jnp.bfloat16)
    np.testing.assert_allclose(y.astype(np.float32), _forward(), rtol=0.1, atol=0.05)


def test_jax_on_a_device_is_refused_by_name():
    jax = pytest.importorskip("jax")
    try:
        there = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("needs JAX on a GPU")
    with pytest.raises(ValueError, match="ArrayImpl on cuda:0: .* torch or CuPy"):
        moesaic.route(jax.device_put(_f(T, E), there), K)


def test_the_gil_is_released():
    """Nobody is made to give the GIL up here (the switch interval is endless), so that another thread runs during a
    forward only if the forward lets go of it."""
    layer = moesaic.Layer(experts=4, hidden=512, intermediate=1024, top_k=2, max_tokens=512, scheme="f32")
    layer.load(dict(weight=_f(4, 2048, 512)), dict(weight=_f(4, 512, 1024)))
    call = _f(512, 512), np.tile(np.array([[0, 3]], np.int32), (512, 1)), np.ones((512, 2), np.float32)
    layer(*call)
    state, seen, interval = [], set(), sys.getswitchinterval()

    def work():
        state.append("in")
        layer(*call)
        state.append("out")

    thread = threading.Thread(target=work)
    sys.setswitchinterval(1e3)
    try:
        thread.start()
        while len(state) < 2:
            seen.add(tuple(state))
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert ("in",) in seen
