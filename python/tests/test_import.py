# SPDX-License-Identifier: Apache-2.0
"""`import moesaic` without its shared object, or with another version's, says what to do."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import moesaic


def _import(library, script="import moesaic"):
    environment = dict(os.environ, MOESAIC_LIBRARY=str(library))
    environment["PYTHONPATH"] = str(pathlib.Path(moesaic.__file__).parents[1])
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kind", ["missing", "no library", "another library"])
def test_a_library_that_cannot_be_used(kind, tmp_path):
    path = tmp_path / "libmoesaic_ffi.so"
    if kind == "no library":
        path.write_text("nothing")
    elif kind == "another library":
        shutil.copy(next(pathlib.Path(os.__file__).parent.glob("lib-dynload/*.so")), path)
    done = _import(path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: moesaic: {path} is missing or not this version's; `pip install .`, or point "
                           "MOESAIC_LIBRARY at it"), done.stderr


def test_a_library_that_lacks_a_function():
    from moesaic import _ffi

    script = ("import tvm_ffi\nload = tvm_ffi.load_module\n"
              "class Old:\n"
              "    def __init__(self, *a, **k): self.module = load(*a, **k)\n"
              "    def __getattr__(self, name):\n"
              "        if name == 'layer_unpack_expert': raise AttributeError('Module has no function layer_unpack_expert')\n"
              "        return getattr(self.module, name)\n"
              "tvm_ffi.load_module = Old\nimport moesaic")
    done = _import(_ffi._PATH, script)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: moesaic: ") and "layer_unpack_expert" in done.stderr
