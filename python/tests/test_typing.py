# SPDX-License-Identifier: Apache-2.0
"""The annotations: py.typed is there, every public function has them, and mypy accepts the examples."""

import importlib.util
import inspect
import pathlib
import subprocess
import sys

import pytest

import moesaic

_ROOT = pathlib.Path(__file__).parents[2]


def test_every_public_function_is_annotated():
    assert (pathlib.Path(moesaic.__file__).parent / "py.typed").exists()
    functions = [getattr(moesaic, name) for name in moesaic.__all__]
    functions = [f for f in functions if inspect.isfunction(f)] + [
        f for name, f in vars(moesaic.Layer).items() if inspect.isfunction(f) and (
            not name.startswith("_") or name == "__init__")]
    assert len(functions) > 15
    for function in functions:
        signature = inspect.signature(function)
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not bare and signature.return_annotation is not signature.empty, f"{function.__qualname__}: {bare}"
        assert function.__doc__ or function.__name__ in ("__init__",), function.__qualname__


def test_mypy_accepts_the_examples(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    examples = sorted((_ROOT / "examples" / "python").glob("*.py"))
    for example in examples:  # one by one: scripts share names
        done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports", "--check-untyped-defs",
                               "--follow-imports=silent", f"--cache-dir={tmp_path}", str(example)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
