# SPDX-License-Identifier: Apache-2.0
"""Stands in for the original project's package, so that its tests import without it being installed.

A name is looked up in what we offer, then in the few pure Python files of the checkout that the tests'
references need, and is otherwise a Missing: harmless while a test file is imported, and a skip with its
own name as the reason once a running test calls it. The alternative, swapping modules inside an installed
original, needs its whole dependency tree and a GPU to import at all.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import pathlib
import sys
import types

import pytest


class Missing:
    """A name of the original that is not offered here."""

    running = False  # whether a test runs now; set by the plugin

    def __init__(self, name, *_):
        self._name = name

    def __call__(self, *args, **kwargs):
        if Missing.running:
            pytest.skip(f"needs {self._name}")
        return Missing(f"{self._name}()")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __getitem__(self, item):
        return Missing(f"{self._name}[]")

    def __enter__(self):
        return self()

    def __exit__(self, *exc):
        return False

    def __mro_entries__(self, bases):
        return (object,)

    def __or__(self, other):
        return self

    __ror__ = __or__

    def __bool__(self):
        return False

    def __iter__(self):
        return iter(())

    def __repr__(self):
        return self._name


class Record:
    """Accepts any arguments and keeps the named ones: configuration objects nothing here reads."""

    def __init__(self, *args, **kwargs):
        self.__dict__.update(kwargs)


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        for source in self._sources:
            if name in source:
                return source[name]
        return Missing(f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves every module below the package `root`, and those a project calls absent when nobody else has them."""

    def __init__(self, root, checkout):
        self._root, self._checkout = root, checkout
        self._absent, self._offered, self._pure = set(), {}, set()

    def serve(self, project):
        self._absent, self._offered, self._pure = project.absent, project.offered, project.pure
        for name in [n for n in sys.modules if n.split(".")[0] == self._root]:
            del sys.modules[name]  # made while the project's own enumerations were read

    def install(self):
        sys.meta_path.insert(0, self)
        sys.meta_path.append(_Last(self))

    def spec(self, fullname):
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def find_spec(self, fullname, path=None, target=None):
        return self.spec(fullname) if fullname.split(".")[0] == self._root else None

    def find_absent(self, fullname):
        return self.spec(fullname) if fullname.split(".")[0] in self._absent else None

    def create_module(self, spec):
        module = _Module(spec.name)
        offered = self._offered.get(spec.name, {})
        module._sources = [offered if isinstance(offered, dict) else vars(offered)]
        module.__path__ = []
        return module

    def exec_module(self, module):
        if module.__name__ in self._pure:
            module._sources.append(source_of(self._checkout, module.__name__))


def source_of(checkout, name):
    """The names of a module, run from the checkout's own file; empty when it has none."""
    for top in ("", "python"):
        path = pathlib.Path(checkout) / top / (name.replace(".", "/") + ".py")
        if path.exists():
            module = types.ModuleType(name)
            module.__package__ = name.rpartition(".")[0]
            exec(compile(path.read_text(), str(path), "exec"), vars(module))
            return vars(module)
    return {}


class _Last(importlib.abc.MetaPathFinder):
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, fullname, path=None, target=None):
        return self._finder.find_absent(fullname)
