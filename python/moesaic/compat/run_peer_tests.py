# SPDX-License-Identifier: Apache-2.0
"""Runs the original project's own unit tests against the drop-in modules.

    python -m moesaic.compat.run_peer_tests sglang|vllm|flashinfer PATH [--limit SECONDS] [-- pytest arguments]

PATH is a checkout or an unpacked source package; nothing of it needs to be installed. Prints every test's
outcome once: passed, failed, or not applicable with the reason (a name that is not offered, a refusal, a
skip of the test's own, something torch lacks on this device). Without a GPU, "cuda" in the tests means the CPU.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import unittest

import pytest
import torch

from ._common import NotOffered
from ._peers import on_cpu
from ._peers.projects import PROJECTS
from ._peers.stand_ins import Finder, Missing


class _Plugin:
    """Turns what cannot apply into skips with reasons, and counts."""

    def __init__(self, limit, beyond):
        self.limit, self.beyond = limit, beyond
        self.outcomes = collections.defaultdict(collections.Counter)
        self.failures = []

    @pytest.fixture
    def workspace_init(self):
        yield  # vLLM's workspace manager: nothing here has one

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        def late(*_):
            pytest.skip(f"longer than {self.limit} s on this machine")
        if getattr(item, "originalname", "") in self.beyond:
            pytest.skip(self.beyond[item.originalname])
        Missing.running = True
        previous = signal.signal(signal.SIGALRM, late)
        signal.alarm(self.limit)
        try:
            if on_cpu.HAS_GPU:
                return (yield)
            with on_cpu.OnCpu():
                return (yield)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
            Missing.running = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        reason = _reason(call.excinfo)
        if report.outcome == "failed" and reason:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, reason)
        if report.when == "call" or report.outcome != "passed":
            self._count(item, report)
        return report

    def pytest_collectreport(self, report):
        if report.outcome == "failed":
            self.outcomes["failed"]["collection"] += 1
            self.failures.append((report.nodeid, str(report.longrepr)[-400:]))

    def _count(self, item, report):
        if report.outcome == "skipped":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcomes["not applicable"][text.removeprefix("Skipped: ")] += 1
        else:
            self.outcomes[report.outcome][getattr(item, "originalname", item.name)] += 1
            if report.outcome == "failed":
                self.failures.append((item.nodeid, str(report.longrepr)[-400:]))


def _reason(excinfo):
    """Why a failure says nothing about our modules, or None."""
    if excinfo is None:
        return None
    error, text = excinfo.value, str(excinfo.value)
    if isinstance(error, NotOffered) or text.startswith("cuda: no kernel for scheme"):
        return f"refused by name: {text}"
    inside = any("moesaic" in str(entry.path) and "_peers" not in str(entry.path) and
                 "run_peer_tests" not in str(entry.path) for entry in excinfo.traceback)
    if not inside and isinstance(error, (NotImplementedError, RuntimeError)) and "not implemented for" in text:
        return f"torch lacks it on this device: {text.splitlines()[0]}"
    if not inside and "Missing" in text:
        return f"uses a name that is not offered: {text.splitlines()[0]}"
    return None


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m moesaic.compat.run_peer_tests", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", choices=sorted(PROJECTS))
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=120, help="seconds a test may take (default 120)")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    finder = Finder(options.project, options.path)
    finder.install()
    project = PROJECTS[options.project](options.path)
    finder.serve(project)
    found = [options.path / t for t in project.tests if (options.path / t).exists()]
    if not found:
        print(f"{options.path}: has none of {', '.join(project.tests)}", file=sys.stderr)
        return 2
    if not on_cpu.HAS_GPU:
        on_cpu.pretend()
    sys.path.insert(0, str(options.path))
    folder = tempfile.TemporaryDirectory()
    # A test inside the package would bring the package along: it is run from a copy.
    tests = [shutil.copy(t, folder.name) if options.project in t.relative_to(options.path).parts else str(t)
             for t in found]
    # A sub-test swallows its skip and goes on with the next: here the first one that does not apply, or fails, decides.
    unittest.TestCase.subTest = lambda *_, **__: contextlib.nullcontext()
    plugin = _Plugin(options.limit, project.beyond)
    pytest.main([*tests, "-q", "--noconftest", "-c", os.devnull, "--rootdir", str(options.path), "-p",
                 "no:cacheprovider", "--import-mode=importlib", "--tb=short", "-W", "ignore", *arguments[split + 1:]],
                plugins=[plugin])
    device = torch.cuda.get_device_name() if on_cpu.HAS_GPU else "the CPU"
    print(f"\n{options.project} on {device}")
    for outcome in ("passed", "failed", "not applicable"):
        counts = plugin.outcomes[outcome]
        print(f"{outcome}: {sum(counts.values())}")
        for name, count in counts.most_common():
            print(f"  {count:5d}  {name}")
    for name, text in plugin.failures[:20]:
        print(f"\nFAILED {name}\n{text}")
    return 1 if plugin.outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
