#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A virtual environment for the tests and scripts that use PyTorch (CPU) and transformers:
#   scripts/setup_venv.sh .venv
# Does nothing when it is there. Fails, and says why, when pip cannot have them.
set -euo pipefail
venv=${1:-.venv}
ready() { "$venv/bin/python" -c 'import torch, transformers, safetensors, numpy, ml_dtypes, pytest, tvm_ffi' 2>/dev/null; }
ready && exit 0
python3 -m venv "$venv"
# torch first and pinned: transformers alone would bring the newest build with its CUDA packages.
"$venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$venv/bin/pip" install -q --disable-pip-version-check transformers safetensors ml_dtypes pytest \
  apache-tvm-ffi scikit-build-core
ready
