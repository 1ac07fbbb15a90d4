# SPDX-License-Identifier: Apache-2.0
"""The three levels from NumPy and torch, against a few lines of NumPy in float64."""

import threading

import numpy as np
import pytest

import moesaic

E, H, I, K = 6, 32, 24, 2


def _silu(x):
    return x / (1 + np.exp(-x))


def _reference(x, w1, w2, ids, weights):
    y = np.zeros((x.shape[0], H))
    for t in range(x.shape[0]):
        for e, w in zip(ids[t], weights[t]):
            if 0 <= e < E:
                h = w1[e].astype(np.float64) @ x[t]
                y[t] += w * (w2[e].astype(np.float64) @ (_silu(h[:I]) * h[I:]))
    return y


def _problem(seed, tokens=5):
    rng = np.random.default_rng(seed)
    f = lambda *shape: (rng.standard_normal(shape) * 0.5).astype(np.float32)  # noqa: E731
    ids = np.array([rng.permutation(E)[:K] for _ in range(tokens)], np.int32).reshape(tokens, K)
    return f(tokens, H), f(E, 2 * I, H), f(E, H, I), ids, rng.random((tokens, K)).astype(np.float32)


def _layer(w1, w2, **options):
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=64, scheme="f32", **options)
    return layer.load(dict(weight=w1), dict(weight=w2))


@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
def test_numpy_layer(tokens):
    x, w1, w2, ids, weights = _problem(tokens, tokens)
    y = _layer(w1, w2).forward(x, ids, weights)
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    np.testing.assert_allclose(y, _reference(x, w1, w2, ids, weights), rtol=1e-4, atol=1e-4)


def test_residual_and_counts():
    x, w1, w2, ids, weights = _problem(1)
    layer, y = _layer(w1, w2), np.full_like(x, 3)
    counts = np.full(E, -7, np.int32)
    layer.forward(x, ids, weights, output=y, add=True, tokens_per_expert=counts)
    np.testing.assert_allclose(y, 3 + _reference(x, w1, w2, ids, weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=E))


def test_stages_give_the_layers_bits():
    x, w1, w2, ids, weights = _problem(2)
    layer = _layer(w1, w2)
    whole = layer.forward(x, ids, weights)
    capacity = 8
    rows, counts = np.empty((E, capacity, H), np.float32), np.empty(E, np.int32)
    moesaic.prepare(layer, x, ids, rows, counts)
    expert_output = np.full((E, capacity, H), np.nan, np.float32)
    moesaic.experts(layer, rows, expert_output, num_tokens=counts)
    y = moesaic.finalize(layer, expert_output, weights, np.empty_like(x), topk_ids=ids)
    np.testing.assert_array_equal(y, whole)
    # With the caller's own weights, read in place.
    config = layer.config
    again = moesaic.experts(config, rows, np.full_like(expert_output, np.nan), num_tokens=counts,
                            weights=dict(fc1=dict(weight=w1), fc2=dict(weight=w2)))
    np.testing.assert_array_equal(again, expert_output)


def test_grouped_gemm_and_pieces():
    x, w1, _, ids, weights = _problem(3)
    slots, block_experts, num_padded = moesaic.align(ids, E, 4)
    c = np.full((5 * K, 2 * I), np.nan, np.float32)
    moesaic.grouped_gemm(x, dict(weight=w1), c, quant="f32", slots=slots, block_experts=block_experts,
                         num_padded=num_padded, block_rows=4, top_k=K, row_weights=weights.ravel())
    expected = np.stack([weights[t, j] * (w1[ids[t, j]] @ x[t]) for t in range(5) for j in range(K)])
    np.testing.assert_allclose(c, expected, rtol=1e-4, atol=1e-4)
    q, s = moesaic.quantize(x, to="i8", granularity="token")
    np.testing.assert_allclose(q * s, x, atol=np.abs(x).max() / 127)
    h = moesaic.activate(c, "swiglu")
    np.testing.assert_allclose(h, _silu(c[:, :I]) * c[:, I:], rtol=1e-5, atol=1e-6)
    y = moesaic.sum_slots(c.reshape(5, K, -1), weights)
    np.testing.assert_allclose(y, (c.reshape(5, K, -1) * weights[..., None]).sum(1), rtol=1e-5, atol=1e-5)
    logits = np.random.default_rng(0).standard_normal((4, E)).astype(np.float32)
    top, p = moesaic.route(logits, K)
    np.testing.assert_array_equal(top, np.argsort(-logits, axis=1)[:, :K])
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)


def test_bf16_without_and_with_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, w1, w2, ids, weights = _problem(4)
    b = lambda a: a.astype(ml_dtypes.bfloat16)  # noqa: E731
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme="bf16")
    layer.load(dict(weight=b(w1)), dict(weight=b(w2)))
    y = layer.forward(b(x), ids, weights)
    assert y.dtype == ml_dtypes.bfloat16
    truth = _reference(b(x).astype(np.float64), b(w1), b(w2), ids, weights)
    assert np.linalg.norm(y.astype(np.float64) - truth) <= 1e-2 * np.linalg.norm(truth)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    x, w1, w2, ids, weights = _problem(5)
    t = torch.from_numpy
    y = _layer(t(w1), t(w2)).forward(t(x), t(ids).long(), t(weights))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), _layer(w1, w2).forward(x, ids, weights))


def test_new_outputs_are_dense_and_of_the_layers_dtype():
    torch = pytest.importorskip("torch")
    x, w1, w2, ids, weights = map(torch.from_numpy, _problem(8))
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=64, scheme="bf16", output_dtype="f32")
    layer.load(dict(weight=w1.bfloat16()), dict(weight=w2.bfloat16()))
    wide = torch.zeros(2 * x.shape[0], 2 * H, dtype=torch.bfloat16)
    wide[::2, :H] = x
    strided = layer(wide[::2, :H], ids, weights)
    assert strided.dtype == torch.float32 and strided.is_contiguous()
    assert torch.equal(strided, layer(x.bfloat16(), ids, weights))


def test_errors_name_the_argument():
    x, w1, w2, ids, weights = _problem(6)
    layer = _layer(w1, w2)
    with pytest.raises(ValueError, match="topk_weights"):
        layer.forward(x, ids, weights[:, :1])
    with pytest.raises(ValueError, match="hidden_states"):
        layer.forward(x.astype(np.float16), ids, weights)
    with pytest.raises(ValueError, match="unknown option 'tokns'"):
        moesaic.supports(dict(layer.config, tokns=1))
    with pytest.raises(ValueError, match="scheme: unknown name 'fp7'"):
        moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme="fp7")
    fresh = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme="f32")
    with pytest.raises(RuntimeError, match="local expert 0"):
        fresh.forward(x, ids, weights)


def test_threads_share_a_layer():
    x, w1, w2, ids, weights = _problem(7, 33)
    layer = _layer(w1, w2)
    expected, got = layer.forward(x, ids, weights), [None] * 6
    def work(i):
        got[i] = layer.forward(x, ids, weights)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for y in got:
        np.testing.assert_array_equal(y, expected)


def test_info():
    assert any(d["device"] == "cpu" for d in moesaic.devices())
    assert "fp8_block" in moesaic.schemes() and len(moesaic.schemes()) == 14
