# SPDX-License-Identifier: Apache-2.0
"""MOESAIC_TEST_DEVICE=cuda runs the tests of the drop-in modules on device tensors."""

import os

import pytest


@pytest.fixture(autouse=True)
def device_tensors(request, monkeypatch):
    device = os.environ.get("MOESAIC_TEST_DEVICE")
    if not device or not request.node.path.name.startswith("test_compat"):
        yield
        return
    import torch

    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda: generator(device=device))
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)
