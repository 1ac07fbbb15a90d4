# SPDX-License-Identifier: Apache-2.0
"""Layer.unpack_expert gives back the bits that load was given."""

import numpy as np
import pytest

import moesaic

E, H, I = 3, 50, 37  # neither a multiple of a tile, nor even


@pytest.mark.parametrize("activation", ["swiglu", "relu", dict(kind="swiglu_oai", layout="interleaved"),
                                        dict(kind="swiglu", order="up_first")])
@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16", "fp8_channel", "fp8_block", "fp8_w8a16", "int8_channel",
                                    "int8_block"])
def test_the_way_back(scheme, activation):
    rng = np.random.default_rng(1)
    kind = activation if isinstance(activation, str) else activation["kind"]
    n = I if kind == "relu" else 2 * I
    if scheme in ("f32", "f16"):
        make = lambda *s: rng.standard_normal(s).astype({"f32": np.float32, "f16": np.float16}[scheme])  # noqa: E731
    else:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        dtype = {"bf": ml_dtypes.bfloat16, "fp": ml_dtypes.float8_e4m3fn, "in": np.int8}[scheme[:2]]
        make = lambda *s: (rng.standard_normal(s) * 20).astype(dtype)  # noqa: E731
    quant = dict(block_n=16, block_k=16) if "block" in scheme else {}
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=1, max_tokens=4, scheme=scheme, quant=quant,
                          activation=activation)
    w1, w2 = make(E, n, H), make(E, H, I)
    one, two = dict(weight=w1), dict(weight=w2)
    for fc, weight in ((one, w1), (two, w2)):
        if scheme[:2] in ("fp", "in"):
            grid = (E, -(-weight.shape[1] // 16), -(-weight.shape[2] // 16)) if quant else weight.shape[:2]
            fc["scale"] = rng.random(grid, dtype=np.float32)
    layer.load(one, two)
    # Into strided views, as transposed parameters are.
    back1 = np.zeros((E, H, n), w1.dtype).transpose(0, 2, 1)
    back2 = np.zeros_like(w2)
    for e in range(E):
        layer.unpack_expert(e, back1[e:e + 1], back2[e:e + 1])
    assert back1.tobytes() == w1.tobytes() and back2.tobytes() == w2.tobytes()


def test_what_has_no_way_back_is_refused():
    layer = moesaic.Layer(experts=E, hidden=64, intermediate=32, top_k=1, max_tokens=4, scheme="int4_w4a16",
                          quant=dict(group_size=16))
    w1, w2 = np.zeros((E, 64, 32), np.uint8), np.zeros((E, 64, 16), np.uint8)
    with pytest.raises(RuntimeError, match="no weights yet"):
        layer.unpack_expert(0, w1[:1], w2[:1])
    layer.load(dict(weight=w1, scale=np.ones((E, 64, 4), np.float32)), dict(weight=w2, scale=np.ones((E, 64, 2), np.float32)))
    with pytest.raises(ValueError, match="four bits"):
        layer.unpack_expert(0, w1[:1], w2[:1])
    with pytest.raises(ValueError, match="local_expert"):
        layer.unpack_expert(E, w1[:1], w2[:1])
