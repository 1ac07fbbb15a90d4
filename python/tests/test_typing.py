# SPDX-License-Identifier: Apache-2.0
"""The annotations: py.typed is there, every public function has them, and mypy accepts the examples."""

import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import moesaic
from moesaic import _ffi

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


def _mypy(tmp_path, *arguments, **options):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    done = subprocess.run([sys.executable, "-m", "mypy", "--ignore-missing-imports",
                           "--follow-imports=skip", "--disable-error-code=var-annotated", f"--cache-dir={tmp_path}", *arguments],
                          capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_accepts_the_package(tmp_path):
    _mypy(tmp_path, "moesaic", cwd=_ROOT / "python")


def test_mypy_accepts_the_examples(tmp_path):
    for example in sorted((_ROOT / "examples" / "python").glob("*.py")):  # one by one: scripts share names
        _mypy(tmp_path, str(example))


def test_python_calls_what_the_shared_object_exports():
    """`lib` is untyped: every name that Python takes from it is exported, and every export is called."""
    exported = set()
    for line in (_ROOT / "python" / "binding" / "module.cpp").read_text().splitlines():
        if match := re.match(r"(?:TVM_FFI_DLL_EXPORT_TYPED_FUNC|MOESAIC_EXPORT_PACKED)\((\w+),", line):
            exported.add(match[1])
    package = _ROOT / "python" / "moesaic"
    text = "".join(p.read_text() for p in package.glob("*.py"))
    called = set(re.findall(r"\b_?lib\.(\w+)", text))
    called |= set(re.findall(r"""_call\("(\w+)",""", text))  # levels 2 and 3 go through one function
    assert called == exported == set(_ffi.FUNCTIONS)
    for name in exported:
        assert getattr(_ffi.lib, name) is not None
