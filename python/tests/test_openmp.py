# SPDX-License-Identifier: Apache-2.0
"""share_threads: the CPU's work on torch's OpenMP threads, to the same bits, and back."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

import moesaic
from moesaic._ffi import lib

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 256, 128, 2


@pytest.fixture
def layer():
    rng = np.random.default_rng()
    made = moesaic.Layer(experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, top_k=TOP_K, max_tokens=64, scheme="f32")
    made.load(dict(weight=rng.standard_normal((EXPERTS, 2 * INTERMEDIATE, HIDDEN), np.float32)),
              dict(weight=rng.standard_normal((EXPERTS, HIDDEN, INTERMEDIATE), np.float32)))
    yield made
    moesaic.share_threads(None)


def call(layer, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((33, HIDDEN), np.float32)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(33)]).astype(np.int32)
    return layer(x, ids, rng.random((33, TOP_K), np.float32))


def test_torchs_threads_give_the_same_bits(layer):
    torch.ones(100_000).sum()
    alone = call(layer, 1)
    if not moesaic.share_threads(torch):
        pytest.skip("this torch has no OpenMP runtime")
    for _ in range(5):
        torch.ones(100_000).sum()
        assert call(layer, 1).tobytes() == alone.tobytes()
    assert moesaic.share_threads(None)
    assert call(layer, 1).tobytes() == alone.tobytes()


def test_several_callers_at_once(layer):
    alone = [call(layer, seed).tobytes() for seed in range(4)]
    if not moesaic.share_threads(torch):
        pytest.skip("this torch has no OpenMP runtime")
    wrong = []

    def work(seed):
        for _ in range(20):
            torch.ones(10_000).sum()
            if call(layer, seed).tobytes() != alone[seed]:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_packages_without_a_runtime_and_pinned_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(moesaic._openmp, "runtime_of", lambda module: "")
    assert not moesaic.share_threads(json)
    monkeypatch.undo()
    monkeypatch.setenv("MOESAIC_PIN", "1")
    assert not moesaic.share_threads(torch)


def test_modules_without_a_file_have_none_and_names_are_no_modules():
    torch.ones(100_000).sum()
    assert not moesaic.share_threads(sys)
    with pytest.raises(TypeError, match="^module: expected an imported package .*got str"):
        moesaic.share_threads("torch")


@pytest.mark.parametrize("path,says", [("/no/such/libgomp.so.1", "is not loaded"), ("libc.so.6", "has no GOMP_parallel")])
def test_what_is_no_runtime_is_named(path, says):
    with pytest.raises(ValueError, match=says):
        lib.use_openmp(path)


def test_importing_the_integration_shares_them():
    pytest.importorskip("transformers")
    script = ("import moesaic; asked = []; moesaic.share_threads = lambda module: asked.append(module.__name__);"
              "import moesaic.integrations.transformers; print(asked)")
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip().endswith("['torch']")
