# SPDX-License-Identifier: Apache-2.0
"""moesaic.typed: dtypes that NumPy lacks as bits, without ml_dtypes."""

import sys

import numpy as np
import pytest

import moesaic

E, H, I, K, T = 4, 32, 16, 2, 3
_rng = np.random.default_rng(0)


def _f(*shape):
    return (_rng.standard_normal(shape) * 0.3).astype(np.float32)


W1, W2, X = _f(E, 2 * I, H), _f(E, H, I), _f(T, H)
IDS, P = np.array([[0, 1], [2, 3], [1, 3]], np.int32), np.ones((T, K), np.float32)


def _new(scheme):
    return moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme=scheme)


def _bf16(x):
    """bf16 bits, rounded to nearest even, of finite float32 numbers."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_typed_bits(monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "ml_dtypes"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # importing it fails
    t = moesaic.typed
    layer = _new("bf16")
    layer.load(dict(weight=t(_bf16(W1), "bf16")), dict(weight=t(_bf16(W2), "bfloat16")))
    y = layer(t(_bf16(X), "bf16"), IDS, P)
    assert isinstance(y, np.ndarray) and y.dtype == np.uint16
    exact = _new("f32")
    exact.load(dict(weight=_wide(_bf16(W1))), dict(weight=_wide(_bf16(W2))))
    truth = exact(_wide(_bf16(X)), IDS, P)
    assert np.linalg.norm(_wide(y) - truth) <= 1e-2 * np.linalg.norm(truth)
    given = np.zeros((T, H), np.uint16)
    layer(t(_bf16(X), "bf16"), IDS, P, output=t(given, "bf16"))
    np.testing.assert_array_equal(given, y)
    q, scale = moesaic.quantize(t(_bf16(X), "bf16"))
    assert q.dtype == np.uint8 and scale.dtype == np.float32
    again = moesaic.sum_slots(t(_bf16(_f(T, K, H)), "bf16"))
    assert again.dtype == np.uint16
    with pytest.raises(ValueError, match="^dtype: unknown 'bf17'"):
        t(X, "bf17")
    with pytest.raises(ValueError, match="^hidden_states: is to be read as bf16, but its elements have 32 bits"):
        layer(t(X, "bf16"), IDS, P)
    with pytest.raises(ValueError, match=r"^hidden_states: dtype uint16 .*moesaic\.typed"):
        layer(_bf16(X), IDS, P, output=t(given, "bf16"))
    read_only = given.copy()
    read_only.setflags(write=False)
    with pytest.raises(ValueError, match="^output: is read-only"):
        layer(t(_bf16(X), "bf16"), IDS, P, output=t(read_only, "bf16"))
