#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A virtual environment for the tests and scripts that use PyTorch (CPU) and transformers:
#   scripts/setup_venv.sh .venv
# and, where a CUDA compiler came without it, cuobjdump for sass_test.
# Does nothing when it is there. Fails, and says why, when pip cannot have them.
set -euo pipefail
venv=${1:-.venv}
install() { "$venv/bin/pip" install -q --disable-pip-version-check "$@"; }
ready() { "$venv/bin/python" -c 'import torch, transformers, safetensors, numpy, ml_dtypes, pytest, tvm_ffi' 2>/dev/null; }
lacks_cuobjdump() {
  local PATH=$PATH:/usr/local/cuda/bin
  command -v nvcc >/dev/null && ! command -v cuobjdump >/dev/null &&
    ! ls "$venv"/lib/python3*/site-packages/nvidia/cu*/bin/cuobjdump >/dev/null 2>&1
}
{ ready && ! lacks_cuobjdump; } && exit 0
python3 -m venv "$venv"
if lacks_cuobjdump; then install nvidia-cuda-cuobjdump || echo "no cuobjdump: sass_test cannot read machine code" >&2; fi
ready && exit 0
# torch first and pinned: transformers alone would bring the newest build with its CUDA packages.
install torch==2.13.0 numpy
install transformers safetensors ml_dtypes pytest apache-tvm-ffi scikit-build-core
ready
