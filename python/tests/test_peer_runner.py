# SPDX-License-Identifier: Apache-2.0
"""run_peer_tests on a made-up checkout: what passes, fails and does not apply is told apart."""

import pathlib
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

_TESTS = '''
import pytest
import torch
import flashinfer.fused_moe as fused_moe
from flashinfer import fp4_quantize
from flashinfer.fused_moe.core import ActivationType
from flashinfer.utils import get_compute_capability

def run(**options):
    x = torch.randn(3, 32, device="cuda")
    w1, w2 = torch.randn(4, 32, 32).cuda(), torch.randn(4, 32, 16, device=torch.device("cuda"))
    ids = torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32, device="cuda")
    p = torch.rand(3, 2, device="cuda")
    y = fused_moe.cutlass_fused_moe(x, ids, p, w1, w2, torch.float32, [], **options)[0]
    up, gate = torch.einsum("th,enh->ten", x, w1).split(16, 2)
    all_ = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w2)
    return y, sum(p[:, j, None] * all_[torch.arange(3), ids[:, j].long()] for j in range(2))

def test_right():
    torch.testing.assert_close(*run(), rtol=1e-4, atol=1e-4)

def test_wrong():
    y, truth = run()
    torch.testing.assert_close(y, truth + 1)

def test_refused():
    run(min_latency_mode=True)

def test_missing():
    fp4_quantize(torch.zeros(1))

@pytest.mark.skipif(get_compute_capability(None)[0] < 10, reason="another generation")
def test_skipped():
    raise AssertionError

def test_situ():
    run(activation_type=ActivationType.Identity + 1)
'''


def test_outcomes(tmp_path):
    folder = tmp_path / "tests" / "moe"
    folder.mkdir(parents=True)
    (folder / "test_trtllm_cutlass_fused_moe.py").write_text(_TESTS)
    if torch.cuda.is_available():
        pytest.skip("what the made-up tests skip depends on the device")
    done = subprocess.run([sys.executable, "-m", "moesaic.compat.run_peer_tests", "flashinfer", str(tmp_path), "--",
                           "-k", "not nothing"], capture_output=True, text=True)
    assert "\nflashinfer on the CPU" in done.stdout, done.stderr
    tail = done.stdout[done.stdout.index("\nflashinfer on "):]
    assert done.returncode == 1, done.stderr
    assert "passed: 1\n      1  test_right" in tail and "failed: 1\n      1  test_wrong" in tail
    assert "not applicable: 4" in tail and "another generation" in tail and "needs flashinfer.fp4_quantize" in tail
    assert re.search("refused by name: min_latency_mode", tail) and re.search("refused by name: activation_type", tail)


def test_a_path_without_tests_is_said(tmp_path):
    done = subprocess.run([sys.executable, "-m", "moesaic.compat.run_peer_tests", "vllm", str(pathlib.Path(tmp_path))],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "test_batched_moe.py" in done.stderr
