# SPDX-License-Identifier: Apache-2.0
"""CUDA through Python: outputs on the device, the framework's stream, graphs, torch.compile, transformers."""

import numpy as np
import pytest

import moesaic

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if not any(d["device"] == "cuda:0" for d in moesaic.devices()):
    pytest.skip(f"this build has no CUDA backend for this device: {moesaic.devices()}", allow_module_level=True)

from moesaic import torch_op  # noqa: E402

E, H, I, K, T = 8, 256, 128, 2, 33
DEVICE = "cuda:0"


def problem(dtype, seed=0, tokens=T):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: (torch.randn(*s, generator=g) * 0.3).to(dtype).to(DEVICE)  # noqa: E731
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(tokens)]).to(torch.int32)
    return r(tokens, H), r(E, 2 * I, H), r(E, H, I), ids.to(DEVICE), torch.rand(tokens, K, generator=g).to(DEVICE)


def make_layer(w1, w2, **options):
    options = {"scheme": {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[w1.dtype], **options}
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=128, device=DEVICE, **options)
    return layer.load(dict(weight=w1), dict(weight=w2))


def truth_of(x, w1, w2, ids, weights):
    x, w1, w2, weights = (t.double() for t in (x, w1, w2, weights))
    gate, up = torch.einsum("th,enh->ten", x, w1).split(I, 2)
    every = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, w2)
    return sum(weights[:, j, None] * every[torch.arange(len(x), device=x.device), ids[:, j].long()] for j in range(K))


def assert_close(y, truth, tolerance):
    error = (y.double() - truth).norm() / truth.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_layer_on_the_device(dtype, tolerance):
    x, w1, w2, ids, weights = problem(dtype)
    y = make_layer(w1, w2)(x, ids, weights)
    assert y.device == torch.device(DEVICE) and y.dtype == dtype
    assert_close(y, truth_of(x, w1, w2, ids, weights), tolerance)


def test_weights_stay_in_place():
    x, w1, w2, ids, weights = problem(torch.bfloat16)
    expected = make_layer(w1, w2)(x, ids, weights)
    layer = make_layer(w1, w2, weight_storage="in_place")
    assert layer.weight_bytes == 0 and torch.equal(layer(x, ids, weights), expected)
    shapes = w1.shape, w2.shape
    del w1, w2  # the layer holds them: these are others
    others = [torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE) for shape in shapes]
    assert torch.equal(layer(x, ids, weights), expected)
    with pytest.raises(ValueError, match="fc1.weight: expected on cuda:0"):
        make_layer(*(other.cpu() for other in others), weight_storage="in_place")


def test_the_frameworks_stream_is_used():
    x, w1, w2, ids, weights = problem(torch.bfloat16)
    layer = make_layer(w1, w2)
    expected = layer(x, ids, weights)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: on another stream the zeros would be read
        late.copy_(x)
        y = layer(late, ids, weights)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_stages_give_the_layers_bits():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 2)
    layer = make_layer(w1, w2)
    rows = torch.empty(E, T, H, dtype=torch.bfloat16, device=DEVICE)
    counts = torch.empty(E, dtype=torch.int32, device=DEVICE)
    moesaic.prepare(layer, x, ids, rows, counts)
    out = torch.full_like(rows, float("nan"))
    moesaic.experts(layer, rows, out, num_tokens=counts)
    y = moesaic.finalize(layer, out, weights, torch.empty_like(x), topk_ids=ids)
    assert_close(y, truth_of(x, w1, w2, ids, weights), 1e-2)
    again = moesaic.experts(layer.config, rows, torch.full_like(rows, float("nan")), num_tokens=counts,
                            weights=dict(fc1=dict(weight=w1), fc2=dict(weight=w2)))
    live = torch.arange(T, device=DEVICE)[None] < counts[:, None]
    assert torch.equal(again[live], out[live])


def test_pieces_on_the_device():
    x, w1, w2, ids, weights = problem(torch.float32, 3)
    q, s = moesaic.quantize(x, granularity="token")
    assert q.device == x.device and torch.allclose(s, x.abs().amax(1, keepdim=True) / 448)
    top, p = moesaic.route(torch.randn(T, E, device=DEVICE), K)
    assert top.device == x.device and torch.allclose(p.sum(1), torch.ones(T, device=DEVICE))
    counts = torch.tensor([3, 0, 5, T, 1, 2, 0, 7], dtype=torch.int32, device=DEVICE)
    batch = torch.randn(E, T, H, device=DEVICE)
    q, s = moesaic.quantize(batch, granularity="tensor_dynamic", num_tokens=counts,
                            scale=torch.zeros(E, 1, 1, device=DEVICE))
    for e, n in enumerate(counts.tolist()):
        assert n == 0 or torch.allclose(s[e, 0, 0], batch[e, :n].abs().max() / 448)


def test_cuda_graph_replays_with_new_inputs():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 4)
    layer, other = make_layer(w1, w2), problem(torch.bfloat16, 5)
    eager = layer(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = layer(x, ids, weights)
        chosen = moesaic.route(torch.ones(T, E, device=DEVICE), K)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, eager) and (chosen == torch.arange(K, device=DEVICE, dtype=torch.int32)).all()
    for mine, new in zip((x, ids, weights), (other[0], other[3], other[4])):
        mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, layer(other[0], other[3], other[4]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    x, w1, w2, ids, weights = problem(torch.bfloat16, 6)
    layer = make_layer(w1, w2)
    number = torch_op.register(layer)
    compiled = torch.compile(lambda *a: torch_op.forward(*a, number) * 2, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, ids, weights), layer(x, ids, weights) * 2)


def test_the_way_back():
    _, w1, w2, _, _ = problem(torch.bfloat16, 7)
    layer, one, two = make_layer(w1, w2), torch.empty_like(w1), torch.empty_like(w2)
    for e in range(E):
        layer.unpack_expert(e, one[e:e + 1], two[e:e + 1])
    assert torch.equal(one, w1) and torch.equal(two, w2)


def test_wrong_devices_are_named():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 8)
    layer = make_layer(w1, w2)
    with pytest.raises(ValueError, match="hidden_states"):
        layer(x.cpu(), ids.cpu(), weights.cpu())
    with pytest.raises(ValueError, match="topk_ids"):
        layer(x, ids.cpu(), weights)


def test_cupy_in_cupy_out():
    cupy = pytest.importorskip("cupy")
    x, w1, w2, ids, weights = problem(torch.float32, 9)
    layer = make_layer(w1, w2)
    y = layer(*(cupy.from_dlpack(t) for t in (x, ids, weights)))
    assert isinstance(y, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(y), layer(x, ids, weights).cpu().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_generates(dtype):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    import moesaic.integrations.transformers  # noqa: F401

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(vocab_size=97, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, moe_intermediate_size=64, num_experts=8,
                                         num_experts_per_tok=2, head_dim=32)
    eager = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(DEVICE, dtype).eval()
    ours = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").to(DEVICE, dtype)
    ours.eval().load_state_dict(eager.state_dict())
    ids = torch.randint(3, 97, (2, 9), device=DEVICE)
    with torch.no_grad():
        a, b = eager(ids).logits.float(), ours(ids).logits.float()
    assert (a - b).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * a.norm()
    assert ours.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 14)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name


@pytest.mark.parametrize("block,scheme", [((128, 128), "dynamic"), (None, "dynamic"), (None, "static")])
def test_fp8_experts_of_transformers(block, scheme):
    pytest.importorskip("transformers", minversion="5.0")
    from test_transformers_memory import check_fp8_experts

    check_fp8_experts(block, scheme, DEVICE, dict(hidden_size=256, moe_intermediate_size=128, intermediate_size=256,
                                                  num_experts=6, num_experts_per_tok=2))
