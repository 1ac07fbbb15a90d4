# SPDX-License-Identifier: Apache-2.0
"""What the scripts beside it share: rows of `moesaic bench --json`, and tables of ratios."""
import json
import os
import statistics
import subprocess
import sys
import tempfile

NAMED = ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "deepseek-v3-ep8", "gpt-oss-120b-like", "qwen3-next-512"]


def bench(command, *flags, env=None):
    """Rows of one run of `command` bench with these flags; its words go to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.json")
        text = [str(f) for f in flags]
        done = subprocess.run([*command, "bench", *text, "--json", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, **(env or {})}, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join([*command, 'bench', *text])}: exit code {done.returncode}\n{done.stdout[-2000:]}")
        with open(path) as file:
            result = json.load(file)
    for row in result["rows"]:
        row["device"] = result["machine"]["device"]
    return result["rows"]


def device_of(rows):
    """The device's name, and how many rows were INVALID: what every table says first."""
    names = sorted({row["device"] for row in rows})
    bad = sum(not row["valid"] for row in rows)
    return ", ".join(names) + (f"; {bad} of {len(rows)} rows INVALID" if bad else "")


def middle(rows, **wanted):
    """Median of the medians (ms) of the rows that match; None where there are none."""
    times = [r["ms_median"] for r in rows if all(r[key] == value for key, value in wanted.items())]
    return statistics.median(times) if times else None


def save(path, rows):
    if path:
        with (sys.stdout if path == "-" else open(path, "w")) as file:
            json.dump(dict(rows=rows), file, indent=0)


def load(paths):
    rows = []
    for path in paths:
        with open(path) as file:
            rows += json.load(file)["rows"]
    return rows
