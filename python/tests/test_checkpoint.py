# SPDX-License-Identifier: Apache-2.0
"""load_checkpoint: the layer of the example checkpoint, against its own numbers."""

import pathlib

import numpy as np
import pytest

import moesaic

_PATH = pathlib.Path(__file__).parents[2] / "examples" / "data" / "qwen3-moe-tiny"


def test_layers_are_listed():
    (first, *_) = moesaic.checkpoint_layers(_PATH)
    assert first["index"] == 0 and first["experts"] == 16 and first["top_k"] == 4 and first["scheme"] == "bf16"


def test_a_loaded_layer_is_the_files():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer = moesaic.load_checkpoint(_PATH, 0, max_tokens=16)
    assert layer.ready and layer.config["hidden"] == 128 and layer.config["activation"]["kind"] == "swiglu"
    e, h, i = (layer.config[k] for k in ("experts", "hidden", "intermediate"))
    fc1, fc2 = np.empty((e, 2 * i, h), ml_dtypes.bfloat16), np.empty((e, h, i), ml_dtypes.bfloat16)
    for k in range(e):
        layer.unpack_expert(k, fc1[k:k + 1], fc2[k:k + 1])
    x = np.random.default_rng(0).standard_normal((5, h)).astype(ml_dtypes.bfloat16)
    y = layer(x)  # routed by the file's own router
    # The configuration it came with makes the same layer again, from the weights alone.
    twin = moesaic.Layer(**{k: v for k, v in layer.config.items() if k != "quant"}, scheme=layer.config["quant"]["scheme"])
    twin.load(dict(weight=fc1), dict(weight=fc2))
    ids = np.array([[0, 1, 2, 3]] * 5, np.int32)
    weights = np.full((5, 4), 0.25, np.float32)
    np.testing.assert_array_equal(twin(x, ids, weights).view(np.uint16), layer(x, ids, weights).view(np.uint16))
    assert np.isfinite(y.astype(np.float32)).all()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        moesaic.load_checkpoint(tmp_path / "nowhere", 0)
    with pytest.raises(ValueError, match="99"):
        moesaic.load_checkpoint(_PATH, 99)
    with pytest.raises(ValueError, match="fp7"):
        moesaic.load_checkpoint(_PATH, 0, scheme="fp7")


def test_info():
    info = moesaic.info()
    has_cuda = any(d["device"].startswith("cuda") for d in info["devices"])
    assert (info["cuda"] == "") if has_cuda else info["cuda"].startswith("device: ")
    assert info["version"] == moesaic.__version__ and info["runs"]["int4_w4a16"]["cpu"] == ["standard", "sorted", "batched"]
