# SPDX-License-Identifier: Apache-2.0
"""Which OpenMP runtime an imported package has brought along."""

import os
import re

_RUNTIME = re.compile(r"lib(gomp|omp|iomp5)[-.\w]*\.so[.\d]*$")


def runtime_of(module) -> str:
    """The path of its shared object as this process has it loaded, "" where there is none, or the module has no file.

    Wheels carry their own copy, in the package's folder or in a folder NAME.libs beside it; another package's copy has threads of
    its own. Without such a copy: the one that everybody shares, if there is exactly one.
    """
    file = getattr(module, "__file__", None)
    if not file:
        return ""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    except OSError:
        return ""
    loaded = sorted(path for path in paths if _RUNTIME.search(os.path.basename(path)))
    package = os.path.dirname(os.path.realpath(file))
    own = [path for path in loaded if os.path.realpath(path).startswith((package + os.sep, package + ".libs" + os.sep))]
    shared = [path for path in loaded if ".libs" + os.sep not in path and "site-packages" not in path]
    return own[0] if own else shared[0] if len(shared) == 1 else ""
