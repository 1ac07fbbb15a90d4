# SPDX-License-Identifier: Apache-2.0
"""Wrong calls with torch's tensors: traces, gradients, tensors without memory. Each is refused by name."""

import pytest

import moesaic

torch = pytest.importorskip("torch")

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from moesaic import torch_op  # noqa: E402
from moesaic.compat import flashinfer, sglang  # noqa: E402
from moesaic.compat.vllm import v0_22  # noqa: E402

E, H, I, K, T = 4, 32, 16, 2, 3  # noqa: E741
X, IDS, P = torch.randn(T, H), torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32), torch.rand(T, K)
W1, W2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)


def _new(**options):
    return moesaic.Layer(**{**dict(experts=E, hidden=H, intermediate=I, top_k=K, max_tokens=8, scheme="f32"), **options})


LAYER = _new().load(dict(weight=W1), dict(weight=W2))
NUMBER = torch_op.register(LAYER)


# --- traces -------------------------------------------------------------------------------------------------

def _jit(function):
    return torch.jit.trace(function, (X,), check_trace=False)


def _fx(mode, pre_dispatch):
    return lambda function: make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(X)


def _export(function):
    module = torch.nn.Module()
    module.forward = function
    return torch.export.export(module, (X,), strict=False).module()


_TRACERS = {"jit": _jit, "real": _fx("real", False), "pre_dispatch": _fx("real", True), "fake": _fx("fake", False),
            "export": _export}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", _TRACERS)
def test_a_layer_is_not_traced_and_the_operator_is(tracer):
    with pytest.raises(ValueError, match=r"^hidden_states: a Layer cannot be traced; call moesaic\.torch_op\.forward\("):
        _TRACERS[tracer](lambda x: LAYER(x, IDS, P))
    traced = _TRACERS[tracer](lambda x: torch_op.forward(x, IDS, P, NUMBER))
    for x in (X, X * 2):
        assert torch.equal(traced(x), LAYER(x, IDS, P))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", ["jit", "real"])
def test_other_calls_are_not_traced(tracer):
    for name, call in (("logits", lambda x: moesaic.route(x, 2)[1]), ("input", lambda x: moesaic.activate(x)),
                       ("topk_ids", lambda x: moesaic.align(IDS, E, 4)[0] * x[0, 0]),
                       ("topk_ids", lambda x: sglang.fused_experts(x, W1, W2, (P, IDS)))):
        with pytest.raises(ValueError, match=f"^{name}: only a whole layer can be traced"):
            _TRACERS[tracer](call)


def test_modes_that_only_watch_do_not_matter():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        y = LAYER(X, IDS, P)
    assert torch.equal(y, LAYER(X, IDS, P))


# --- gradients ----------------------------------------------------------------------------------------------

def _vllm(x, p):
    kernel = v0_22.FusedMoEKernel(v0_22.BatchedPrepareAndFinalize(T, E, 1, 0), v0_22.BatchedTritonExperts(
        None, v0_22.FUSED_MOE_UNQUANTIZED_CONFIG, T, 1))
    return kernel.apply(x, W1, W2, p, IDS, v0_22.MoEActivation.SILU, E, None, False)


# Calls of hidden states and weights, and the names of the two in what they raise.
_CALLS = {
    "layer": (lambda x, p: LAYER(x, IDS, p), "hidden_states", "topk_weights"),
    "operator": (lambda x, p: torch_op.forward(x, IDS, p, NUMBER), "hidden_states", "topk_weights"),
    "sum_slots": (lambda x, p: moesaic.sum_slots(x[:, None].expand(T, K, H).contiguous(), p), "input", "topk_weights"),
    "sglang": (lambda x, p: sglang.fused_experts(x, W1, W2, (p, IDS)), "a", "row_weights"),
    "flashinfer": (lambda x, p: flashinfer.cutlass_fused_moe(x, IDS, p, W1, W2, torch.float32, [])[0], "rows", "topk_weights"),
    "vllm": (_vllm, "hidden_states", "topk_weights"),
}


@pytest.mark.parametrize("call", _CALLS)
def test_gradients_are_refused_where_they_would_be_lost(call):
    function, x_name, p_name = _CALLS[call]
    expected, x, p = function(X, P), X.clone().requires_grad_(), P.clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{x_name}: requires a gradient, .*torch\.no_grad\(\)"):
        function(x, P)
    with pytest.raises(ValueError, match=rf"^{p_name}: requires a gradient"):
        function(X, p)
    with torch.no_grad():
        y = function(x, p)
    assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(function(x, p), expected)
    assert torch.equal(function(x.detach(), p.detach()), expected)


def test_other_arguments_with_gradients():
    logits, parameter = torch.randn(T, E).requires_grad_(), torch.nn.Parameter(W1)
    with pytest.raises(ValueError, match="^logits: requires a gradient"):
        moesaic.route(logits, K)
    with pytest.raises(ValueError, match="^router_logits: requires a gradient"):
        LAYER(X, router_logits=logits)
    slots, blocks, count = moesaic.align(IDS, E, 4)
    product = dict(slots=slots, block_experts=blocks, num_padded=count, block_rows=4, top_k=K, quant="f32")
    with pytest.raises(ValueError, match=r"^b\.weight: requires a gradient"):
        moesaic.grouped_gemm(X, dict(weight=parameter), torch.empty(T * K, 2 * I), **product)
    # Packing copies values, parameters' as any other's.
    layer = _new().load(dict(weight=parameter), dict(weight=torch.nn.Parameter(W2)))
    layer.set_router(torch.nn.Parameter(torch.randn(E, H)))
    assert torch.equal(layer(X, IDS, P), LAYER(X, IDS, P))


def test_a_compiled_function_refuses_gradients_too():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch_op.forward(x, IDS, P, NUMBER) * 2, backend="aot_eager")
    with pytest.raises(Exception, match="hidden_states: requires a gradient"):
        compiled(X.clone().requires_grad_())


# --- tensors without memory -----------------------------------------------------------------------------------

_WITHOUT = {"meta": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse()}


@pytest.mark.parametrize("kind", _WITHOUT)
def test_weights_without_memory_are_named(kind):
    bad, one, two = _WITHOUT[kind], dict(weight=W1), dict(weight=W2)
    row = lambda w: dict(weight=w["weight"][:1])  # noqa: E731
    calls = {
        "fc1.weight": lambda: _new().load(dict(weight=bad(W1)), two),
        "fc2.weight": lambda: _new().load_expert(0, row(one), dict(weight=bad(W2[:1]))),
        "fc2.bias": lambda: _new().load(one, dict(two, bias=bad(torch.zeros(E, H)))),
        "fc1.weight ": lambda: _new(shared_experts=1, shared_intermediate=I).load_shared(dict(weight=bad(W1[:1])), row(two)),
        "gate": lambda: _new(shared_experts=1, shared_intermediate=I).load_shared(row(one), row(two), bad(torch.zeros(H))),
        "weight": lambda: _new().set_router(bad(torch.zeros(E, H))),
        "fc1": lambda: LAYER.unpack_expert(0, bad(W1[:1]), W2[:1].clone()),
        "weights.fc2.weight": lambda: moesaic.experts(
            LAYER.config, torch.zeros(E, 4, H), torch.zeros(E, 4, H), num_tokens=torch.zeros(E, dtype=torch.int32),
            weights=dict(fc1=one, fc2=dict(weight=bad(W2)))),
        "hidden_states": lambda: LAYER(bad(X), IDS, P)}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name.strip()}: ") as raised:
            call()
        assert len(str(raised.value).splitlines()) == 1


def test_what_is_no_layer_is_not_registered():
    with pytest.raises(TypeError, match="^layer: expected a Layer, got int"):
        torch_op.register(5)
