# SPDX-License-Identifier: Apache-2.0
"""README.md's Python lines run, and print what they say."""

import contextlib
import io
import pathlib
import re


def test_readme_python_lines_run():
    readme = pathlib.Path(__file__).parents[2].joinpath("README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S).group(1)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == "(3, 64)\n"
