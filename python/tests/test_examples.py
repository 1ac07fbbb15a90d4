# SPDX-License-Identifier: Apache-2.0
"""Each script of examples/python runs and says what it should."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

_EXAMPLES = pathlib.Path(__file__).parents[2] / "examples" / "python"
_SAYS = {"numpy_layer.py": r"y \(5, 64\) float32; int8 weights take 0\.2\d of the bytes, error 0\.0[01]\d\d",
         "torch_layer.py": r"y \(16, 128\) torch.bfloat16; the same bits through torch.compile: True; residual off by 0\.0\d",
         "transformers_generate.py": r"tokens: \[3, 14, 15, 92(, \d+){8}\]",
         "foreign_all_to_all.py": r"4 ranks, 2 experts each; the same bits as one layer: True"}


def test_every_example_is_run():
    assert sorted(p.name for p in _EXAMPLES.glob("*.py")) == sorted(_SAYS)


@pytest.mark.parametrize("name", sorted(_SAYS))
def test_example(name):
    needs = re.findall(r"^import (torch|transformers|numpy)", (_EXAMPLES / name).read_text(), re.M)
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    done = subprocess.run([sys.executable, str(_EXAMPLES / name)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert re.search(_SAYS[name], done.stdout), done.stdout
