# SPDX-License-Identifier: Apache-2.0
"""moesaic::forward under torch.compile: the same bits, traced once for all the layers of a model."""

import pytest

import moesaic

torch = pytest.importorskip("torch")

from moesaic import torch_op  # noqa: E402

E, H, I, K, T = 4, 32, 16, 2, 3  # noqa: E741


def _layer(dtype):
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme="f32", output_dtype=dtype)
    return layer.load(dict(weight=torch.randn(E, 2 * I, H)), dict(weight=torch.randn(E, H, I)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_function_over_many_layers(backend):
    torch._dynamo.reset()
    x, ids, weights = torch.randn(T, H), torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32), torch.rand(T, K)
    graphs, compiler = [], torch._dynamo.lookup_backend(backend)

    def count(graph, inputs):
        graphs.append(graph)
        return compiler(graph, inputs)

    compiled = torch.compile(lambda *a: torch_op.forward(*a) * 2, backend=count, fullgraph=True)
    layers = [_layer("f32") for _ in range(12)]  # more than torch recompiles a function for
    for layer in layers:
        y = compiled(x, ids, weights, torch_op.register(layer))
        assert torch.equal(y, layer(x, ids, weights) * 2)
    assert len(graphs) <= 2, "one for the first layer, one for all the others"
    other = _layer("bf16")
    y = compiled(x, ids, weights, torch_op.register(other))
    assert y.dtype == torch.bfloat16 and torch.equal(y, other(x, ids, weights) * 2)
