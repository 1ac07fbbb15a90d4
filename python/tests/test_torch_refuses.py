# SPDX-License-Identifier: Apache-2.0
"""The mode that test_compat*.py run under a second time does catch torch computing inside moesaic."""

import pathlib

import pytest

torch = pytest.importorskip("torch")

from torch_refuses import TorchRefuses  # noqa: E402

import moesaic  # noqa: E402

_INSIDE = str(pathlib.Path(moesaic.__file__).parent / "compat" / "made_up.py")
# What replaces a product, an activation, a quantizer, a sum or routing, by each name one might use.
_COMPUTES = ["torch.matmul(a, a)", "a @ a", "a.__matmul__(a)", "a.__rmatmul__(a)", "torch.mm(a, a)", "a.mm(a)", "a.addmm(a, a)",
             "torch.bmm(b, b)", "torch.baddbmm(b, b, b)", "torch.einsum('ij,jk->ik', a, a)", "torch.mv(a, a[0])",
             "torch.dot(a[0], a[0])", "torch.tensordot(a, a)",
             "torch._grouped_mm(g, g[None], o)", "torch.nn.functional.linear(a, a)", "torch.nn.functional.linear(a, a, a[0])",
             "torch.nn.functional.silu(a)", "torch.nn.functional.gelu(a)", "torch.nn.functional.relu(a)", "torch.sigmoid(a)",
             "torch.nn.functional.glu(a)", "a * torch.sigmoid(a)", "torch.softmax(a, -1)", "a.topk(2)", "torch.sort(a)",
             "a.abs().amax(1)", "a.max()", "a.sum(0)", "a.mean()", "torch.cumsum(a, 0)", "a / a[:, :1]", "a * 2", "a + a", "a.round()",
             "a.clamp(-1, 1)", "torch.index_add(a, 0, i, a)", "a.index_select(0, i)", "a[i]", "torch.bincount(i)"]
_MOVES = ["torch.empty_like(a)", "a.view(-1)", "a.float().contiguous()", "a.t().contiguous()", "a.half()",
          "a[:2].reshape(1, -1)", "a[0, 0].expand(3, 1).contiguous()", "i.to(torch.int32) - 1", "1 / s", "s / s"]


def _function(text, path):
    made = {"torch": torch}
    exec(compile(f"def f(a, b, g, i, o, s): return {text}", path, "exec"), made)
    return made["f"]


def _values():
    a = torch.randn(4, 4)
    return dict(a=a, b=torch.randn(2, 4, 4), g=torch.randn(16, 16).bfloat16(), i=torch.arange(4),
                o=torch.tensor([16], dtype=torch.int32), s=torch.rand(4))


@pytest.mark.parametrize("text", _COMPUTES)
def test_computing_inside_is_caught(text):
    values = _values()
    with TorchRefuses():
        _function(text, __file__)(**values)  # a test's own reference may
        with pytest.raises(AssertionError, match="torch computed"):
            _function(text, _INSIDE)(**values)


@pytest.mark.parametrize("text", _MOVES)
def test_moving_inside_is_not(text):
    with TorchRefuses():
        _function(text, _INSIDE)(**_values())
