# SPDX-License-Identifier: Apache-2.0
"""The snippets of docs/python.md and of the migration pages run, and the pages' figures are those of docs/performance_cuda.md."""

import pathlib
import re
import subprocess
import sys

import pytest

_DOCS = pathlib.Path(__file__).parents[2] / "docs"
_PAGES = {"from_sglang.md": "SGLang", "from_vllm.md": "vLLM", "from_flashinfer.md": "FlashInfer"}


def _snippets(page):
    return re.findall(r"```python\n(.*?)```", (_DOCS / page).read_text(), re.S)


def test_example(capsys):
    exec(compile(_snippets("python.md")[0], "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "(3, 64)"


def _without_imports(text):
    text = re.sub(r"^from \S+ import \(.*?\)$", "", text, flags=re.S | re.M)
    return [line for line in text.splitlines() if line and not re.match(r"(from \S+ )?import ", line)]


@pytest.mark.parametrize("page", _PAGES)
def test_migration_is_one_import(page):
    """"Before" and "After" differ in imports alone; "After" runs, and so does the step further, which compares results."""
    torch = pytest.importorskip("torch")
    before, after, further = _snippets(page)
    assert _without_imports(before) == _without_imports(after)
    names = set(re.findall(r"\b[A-Za-z_]\w+\b", " ".join(re.findall(r"import [^\n]+", before))))
    assert names - {"import", "torch"} <= set(re.findall(r"\b\w+\b", after)), "what was imported still is"
    scope = {}
    exec(compile(after, page, "exec"), scope)
    assert scope["y"].shape == scope["x"].shape and torch.isfinite(scope["y"].float()).all()
    exec(compile(further, page, "exec"), scope)
    assert scope["z"].shape == scope["y"].shape


@pytest.mark.parametrize("page,other", _PAGES.items())
def test_figures_are_those_of_performance(page, other):
    text, performance = (_DOCS / page).read_text(), (_DOCS / "performance_cuda.md").read_text()
    rows = re.findall(r"^\| (\S+) (bf16|fp8_block|fp8_tensor|int4_w4a16)[^|]*\|(.*)\|$", text, re.M)
    assert len(rows) >= 5 and f"| moesaic / {other}, ms |" in text
    for shape, scheme, cells in rows:
        table = performance[performance.index(f"| {scheme}{'+static' * (scheme == 'fp8_tensor')} | T=1 | T=4 |"):]
        row = re.search(rf"^\| {shape} \|(.*)\|$", table, re.M)[1]
        theirs = [re.match(r"\s*([\d.]+)", cell)[1] for cell in row.split("|")]
        assert [cell.split("/")[0].strip() for cell in cells.split("|")] == [theirs[i] for i in (0, 2, 3, 4, 5)], (page, shape)


def test_the_glance_is_of_the_tables():
    """The table at a glance is what `bench/compare.py --glance` makes of the full ones."""
    made = subprocess.run([sys.executable, _DOCS.parent / "bench/compare.py", "--glance", _DOCS / "performance_cuda.md"],
                          capture_output=True, text=True, check=True).stdout
    assert made.count("\n") == 6 and made in (_DOCS / "performance.md").read_text()


def test_the_readme_has_the_medians_of_the_glance():
    glance = (_DOCS / "performance.md").read_text()
    readme = (_DOCS.parent / "README.md").read_text()
    for scheme in ("bf16", "fp8_block", "fp8_tensor", "int4_w4a16"):
        full = re.search(rf"^\| {scheme} \|(.*)\|$", glance, re.M)[1]
        short = re.search(rf"^\| {scheme}(?: \([^|]*\))? \|(.*)\|$", readme, re.M)[1]
        assert [cell.split()[0] for cell in full.split("|")] == [cell.strip() for cell in short.split("|")], scheme
