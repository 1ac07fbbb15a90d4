# SPDX-License-Identifier: Apache-2.0
"""The first example of docs/python.md runs and prints what it says."""

import pathlib
import re


def test_example(capsys):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "python.md").read_text()
    exec(compile(re.search(r"```python\n(.*?)```", text, re.S).group(1), "docs/python.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "(3, 64)"
