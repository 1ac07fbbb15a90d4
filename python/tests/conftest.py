# SPDX-License-Identifier: Apache-2.0
"""The tests of the drop-in modules run twice: as they are, and with torch refusing to compute inside moesaic.

MOESAIC_TEST_DEVICE=cuda runs them on device tensors.
"""

import os

import pytest


def _is_compat(path):
    return path.name.startswith("test_compat")


def pytest_generate_tests(metafunc):
    if _is_compat(metafunc.definition.path):
        metafunc.fixturenames.append("torch_arithmetic")
        metafunc.parametrize("torch_arithmetic", ["torch_free", "torch_refuses"], indirect=True)


@pytest.fixture
def torch_arithmetic(request):
    if request.param == "torch_free":
        yield
        return
    from torch_refuses import TorchRefuses

    with TorchRefuses():
        yield


@pytest.fixture(autouse=True)
def device_tensors(request, monkeypatch):
    device = os.environ.get("MOESAIC_TEST_DEVICE")
    if not device or not _is_compat(request.node.path):
        yield
        return
    import torch

    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda: generator(device=device))
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)
