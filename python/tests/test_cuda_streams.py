# SPDX-License-Identifier: Apache-2.0
"""Every door of the package on a stream that is not the default one, in a CUDA graph, and on the wrong device.

A late value decides: zeros lie in an input, the stream sleeps, then the input's values are copied in. Whoever reads on
another stream reads the zeros.
"""

import gc

import pytest

torch = pytest.importorskip("torch")
from test_cuda import DEVICE, E, H, I, K, T, assert_close, make_layer, problem, truth_of  # noqa: E402  (skips, too)

import moesaic  # noqa: E402
from moesaic.compat import flashinfer, sglang  # noqa: E402


def _doors(x, w1, w2, ids, weights, layer):
    """name -> (call that returns tensors, the input that comes late)"""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    rows_of_slots = torch.randn(T, K, H, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    counts = torch.empty(E, dtype=torch.int32, device=DEVICE)
    slots = moesaic.align(ids, E, 16)[0].clone()
    rows, out = torch.zeros(E, T, H, dtype=x.dtype, device=DEVICE), torch.zeros(E, T, H, dtype=x.dtype, device=DEVICE)
    product = torch.empty(T * K, 2 * I, dtype=x.dtype, device=DEVICE)

    def stages():
        moesaic.prepare(layer, x, ids, rows, counts)
        moesaic.experts(layer, rows, out, num_tokens=counts)
        return moesaic.finalize(layer, out, weights, torch.empty_like(x), topk_ids=ids)

    def sorted_gemm():
        lists = dict(zip(("slots", "block_experts", "num_padded"), moesaic.align(ids, E, 16)))
        return moesaic.grouped_gemm(x, dict(weight=w1), product, block_rows=16, top_k=K, **lists)

    return {
        "forward": (lambda: layer(x, ids, weights), x),
        "forward with logits": (lambda: layer(x, router_logits=logits), logits),
        "stages": (stages, x),
        "align": (lambda: moesaic.align(ids, E, 16, slots=slots.fill_(-1))[::2], ids),
        "grouped_gemm": (sorted_gemm, x),
        "route": (lambda: moesaic.route(logits, K), logits),
        "quantize token": (lambda: moesaic.quantize(x), x),
        "quantize tensor": (lambda: moesaic.quantize(x, granularity="tensor_dynamic"), x),
        "activate": (lambda: moesaic.activate(x), x),
        "sum_slots": (lambda: moesaic.sum_slots(rows_of_slots), rows_of_slots),
        "sglang": (lambda: sglang.fused_experts(x, w1, w2, (weights, ids)), x),
        "flashinfer": (lambda: flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, x.dtype, [])[0], x),
    }


DOORS = ["forward", "forward with logits", "stages", "align", "grouped_gemm", "route", "quantize token",
         "quantize tensor", "activate", "sum_slots", "sglang", "flashinfer"]


def _tuple(result):
    return tuple(t.clone() for t in (result if isinstance(result, tuple) else (result,)))


def _equal(mine, theirs):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(mine, theirs))


@pytest.fixture
def doors():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 11)
    made = _doors(x, w1, w2, ids, weights, make_layer(w1, w2))
    assert list(made) == DOORS
    return made


@pytest.mark.parametrize("name", DOORS)
def test_a_call_runs_on_the_current_stream(doors, name):
    call, late = doors[name]
    expected, values = _tuple(call()), late.clone()
    late.zero_()
    early = _tuple(call())
    torch.cuda.synchronize()
    assert not _equal(early, expected), "the late input decides nothing: the test would prove nothing"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(values)
        result = _tuple(call())
    stream.synchronize()
    assert _equal(result, expected)


@pytest.mark.parametrize("name", DOORS)
def test_a_call_is_captured_and_replays_with_new_values(doors, name):
    call, late = doors[name]
    expected, values = _tuple(call()), late.clone()
    late.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
        kept = kept if isinstance(kept, tuple) else (kept,)
    late.copy_(values)
    gc.collect()  # scratch that the capture made belongs to the graph, not to Python
    junk = [torch.full((1 << 20,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(8)]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert _equal(tuple(t.contiguous() for t in kept), expected), len(junk)


def test_weights_that_are_still_being_written_are_waited_for():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 12)
    expected = make_layer(w1, w2)(x, ids, weights)
    late = [torch.zeros_like(w) for w in (w1, w2)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for empty, w in zip(late, (w1, w2)):
            empty.copy_(w)
        layer = make_layer(*late)
        y = layer(x, ids, weights)
        back = [torch.empty_like(w1[:1]), torch.empty_like(w2[:1])]
        torch.cuda._sleep(100_000_000)
        back[0].zero_()  # must not come after what unpack_expert writes
        layer.unpack_expert(3, *back)
    stream.synchronize()
    assert torch.equal(y, expected) and torch.equal(back[0], w1[3:4]) and torch.equal(back[1], w2[3:4])


def test_too_small_a_workspace_leaves_a_capture_usable():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 13)
    layer = make_layer(w1, w2)
    expected, small = layer(x, ids, weights), torch.empty(16, dtype=torch.uint8, device=DEVICE)
    assert layer.workspace_bytes(T) > 16
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="workspace"):
            layer(x, ids, weights, workspace=small)
        y = layer(x, ids, weights)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_scratch_is_borrowed_and_given_back():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 21)
    layer, y = make_layer(w1, w2), torch.empty_like(x)
    needed = layer.workspace_bytes(T)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x, ids, weights, output=y)
    assert torch.cuda.memory_allocated() == before
    assert needed <= torch.cuda.max_memory_allocated() - before <= needed + 512


def test_no_memory_for_scratch_is_torchs_error():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 22, tokens=8192)
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8192, device=DEVICE)
    layer.load(dict(weight=w1), dict(weight=w2))
    y = torch.empty_like(x)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            layer(x, ids, weights, output=y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_close(layer(x, ids, weights, output=y), truth_of(x, w1, w2, ids, weights), 1e-2)


def test_workspace_on_the_host_is_refused():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 14)
    layer = make_layer(w1, w2)
    with pytest.raises(ValueError, match="workspace"):
        layer(x, ids, weights, workspace=torch.empty(layer.workspace_bytes(T), dtype=torch.uint8))


@pytest.mark.parametrize("argument", ["topk_ids", "topk_weights", "output", "hidden_states"])
def test_an_argument_on_the_host_is_named(argument):
    x, w1, w2, ids, weights = problem(torch.bfloat16, 15)
    call = dict(hidden_states=x, topk_ids=ids, topk_weights=weights, output=torch.empty_like(x))
    call[argument] = call[argument].cpu()
    with pytest.raises(ValueError, match=argument):
        make_layer(w1, w2)(**call)


def test_stages_on_the_wrong_device_are_named():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 16)
    layer = make_layer(w1, w2)
    rows, counts = torch.empty(E, T, H, dtype=x.dtype, device=DEVICE), torch.empty(E, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="topk_ids"):
        moesaic.prepare(layer, x, ids.cpu(), rows, counts)
    with pytest.raises(ValueError, match="num_tokens"):
        moesaic.experts(layer, rows, torch.empty_like(rows), num_tokens=counts.cpu())
    with pytest.raises(ValueError, match="weight"):
        moesaic.grouped_gemm(x, dict(weight=w1.cpu()), torch.empty(T * K, 2 * I, dtype=x.dtype, device=DEVICE), top_k=K,
                             block_rows=16, **dict(zip(("slots", "block_experts", "num_padded"), moesaic.align(ids, E, 16))))


def test_rows_of_a_wider_tensor():
    x, w1, w2, ids, weights = problem(torch.bfloat16, 17)
    layer = make_layer(w1, w2)
    wide = torch.full((T, H + 64), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[:, :H] = x
    assert torch.equal(layer(wide[:, :H], ids, weights), layer(x, ids, weights))
    with pytest.raises(ValueError, match="topk_ids"):
        layer(x, ids.t().contiguous().t(), weights)
    with pytest.raises(ValueError, match="hidden_states"):
        layer(x.t().contiguous().t(), ids, weights)


def test_a_users_subclass_is_a_tensor():
    class Mine(torch.Tensor):
        pass

    x, w1, w2, ids, weights = problem(torch.bfloat16, 18)
    layer = make_layer(w1, w2)
    y = layer(x.as_subclass(Mine), ids, weights)
    assert isinstance(y, torch.Tensor) and torch.equal(torch.Tensor(y), layer(x, ids, weights))


def test_a_layer_on_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, w1, w2, ids, weights = problem(torch.bfloat16, 19)
    there = [t.to("cuda:1") for t in (x, ids, weights)]
    layer = moesaic.Layer(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=128, device="cuda:1")
    with pytest.raises(ValueError, match="fc1.weight: expected on cpu or cuda:1"):
        layer.load(dict(weight=w1), dict(weight=w2))  # what lies on the first device is not fetched unasked
    layer.load(dict(weight=w1.to("cuda:1")), dict(weight=w2.cpu()))
    assert torch.cuda.current_device() == 0
    y = layer(*there)
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(y.to(DEVICE), make_layer(w1, w2)(x, ids, weights))
    with pytest.raises(ValueError, match="hidden_states"):
        layer(x, *there[1:])
    top, p = moesaic.route(torch.randn(T, E, device="cuda:1"), K)
    assert top.device == y.device
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        assert torch.equal(layer(*there), y)
    torch.cuda.synchronize("cuda:1")


def test_cupys_stream_is_used():
    cupy = pytest.importorskip("cupy")
    x, w1, w2, ids, weights = problem(torch.float32, 20)
    layer = make_layer(w1, w2)
    expected = layer(x, ids, weights)
    assert_close(expected, truth_of(x, w1, w2, ids, weights), 1e-4)
    mine = [cupy.from_dlpack(t) for t in (x, ids, weights)]
    late, sleep = cupy.zeros_like(mine[0]), cupy.RawKernel(
        "extern \"C\" __global__ void wait() { long long t = clock64(); while (clock64() - t < 100000000) {} }", "wait")
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        sleep((1,), (1,), ())
        late[...] = mine[0]
        y = layer(late, *mine[1:])
        q, s = moesaic.quantize(late, "i8")
        bits, _ = moesaic.quantize(moesaic.typed(late, "f32"))
    stream.synchronize()
    assert torch.equal(torch.from_dlpack(y), expected)
    for mine, theirs in zip((q, s), moesaic.quantize(x, "i8")):
        assert torch.equal(torch.from_dlpack(mine), theirs)
    assert torch.equal(torch.from_dlpack(bits), moesaic.quantize(x)[0].view(torch.uint8))
    with pytest.raises(TypeError, match="CuPy makes no fp8_e4m3"):
        moesaic.quantize(cupy.ones((2, 64), dtype="f4"))
