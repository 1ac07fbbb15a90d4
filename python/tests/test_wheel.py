# SPDX-License-Identifier: Apache-2.0
"""The wheel: built from this tree, installed beside NumPy and apache-tvm-ffi alone, and what docs/python.md says of it."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_BUILD = os.environ.get("MOESAIC_WHEEL_BUILD")  # kept between runs; ctest names it


def _run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    missing = [tool for tool in ("cmake", "ninja", "ccache") if shutil.which(tool) is None]
    missing += [module for module in ("scikit_build_core", "pip") if importlib.util.find_spec(module) is None]
    if missing or not _BUILD:
        pytest.skip(f"needs {', '.join(missing) or 'MOESAIC_WHEEL_BUILD (ctest sets it)'}")
    out = tmp_path_factory.mktemp("wheel")
    # The same compiler name and depth of folders as the build folder: ccache then knows every object.
    environment = dict(os.environ, CCACHE_BASEDIR=str(_ROOT), CCACHE_NOHASHDIR="1")
    for name in ("MOESAIC_LIBRARY", "PYTHONPATH"):
        environment.pop(name, None)
    _run(sys.executable, "-m", "pip", "wheel", _ROOT, "--no-deps", "--no-build-isolation", "-q", "-w", out,
         "--disable-pip-version-check", "-C", f"build-dir={_BUILD}", "-C",
         f"cmake.define.CMAKE_CXX_COMPILER={os.environ.get('MOESAIC_WHEEL_CXX', 'c++')}", env=environment, cwd=_ROOT)
    (built,) = out.glob("*.whl")
    return built


def test_what_is_in_it(wheel):
    assert re.fullmatch(r"moesaic-[\d.]+-py3-none-(manylinux\w+|linux_\w+)\.whl", wheel.name), wheel.name
    assert wheel.stat().st_size < 4 << 20, "docs/python.md says how large it is"
    names = zipfile.ZipFile(wheel).namelist()
    tree = {str(p.relative_to(_ROOT / "python")) for p in (_ROOT / "python" / "moesaic").rglob("*")
            if p.suffix in (".py", ".pyi", ".typed") or p.name == "py.typed"}
    assert {n for n in names if n.startswith("moesaic/") and not n.endswith(".so")} == tree
    assert [n for n in names if n.endswith(".so")] == ["moesaic/libmoesaic_ffi.so"]


def test_symbol_versions(wheel, tmp_path):
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    library = zipfile.ZipFile(wheel).extract("moesaic/libmoesaic_ffi.so", tmp_path)
    symbols = _run("objdump", "-T", library)
    newest = max(tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", symbols))
    said = re.search(r"manylinux_(\d+)_(\d+)", (_ROOT / "docs" / "python.md").read_text())
    assert newest <= tuple(map(int, said.groups())), f"needs glibc {newest}"
    assert "GLIBCXX_" not in symbols, "libstdc++ is linked statically"
    shown = [line.split()[-1] for line in symbols.splitlines() if re.match(r"[0-9a-f]{8,}", line) and "*UND*" not in line]
    assert shown and not [name for name in shown if not name.startswith("__tvm_ffi_")], "what it shows, others could replace"
    needed = re.findall(r"NEEDED\s+(\S+)", _run("objdump", "-p", library))
    assert not [n for n in needed if "cuda" in n or "torch" in n or "stdc++" in n], needed


def test_it_runs_with_numpy_alone(wheel, tmp_path):
    """A fresh environment with NumPy and apache-tvm-ffi: the example runs and torch is never imported."""
    site = tmp_path / "site"
    site.mkdir()
    # Borrowed, not downloaded: `make test` needs no network.
    for module in ("numpy", "tvm_ffi", "typing_extensions"):
        spec = importlib.util.find_spec(module)
        origin = pathlib.Path(spec.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (site / source.name).symlink_to(source)
        for beside in source.parent.glob(f"{module}.libs"):
            (site / beside.name).symlink_to(beside)
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", site,
         "--disable-pip-version-check", wheel)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOESAIC_", "PYTHON"))}
    check = ("import runpy, sys; runpy.run_path(sys.argv[1]); import moesaic; "
             "assert 'torch' not in sys.modules and 'jax' not in sys.modules; print(moesaic.__file__)")
    said = _run(tmp_path / "venv" / "bin" / "python", "-c", check, _ROOT / "examples" / "python" / "numpy_layer.py",
                env=dict(environment, PYTHONPATH=str(site)), cwd=tmp_path)
    assert "y (5, 64) float32" in said and str(site) in said
