# SPDX-License-Identifier: Apache-2.0
"""compat.vllm.v0_22 and the quantizer of batched rows, against their contracts in float64."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from moesaic.compat import vllm as seed  # noqa: E402
from moesaic.compat.vllm import v0_22 as vllm  # noqa: E402

T, E, H, I, K = 11, 6, 64, 96, 3
G = 32  # the smallest group that every device takes
FP8 = torch.float8_e4m3fn


def _problem(seed_number, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed_number)
    r = lambda *s: (torch.randn(*s, generator=g) * 0.3).to(dtype)  # noqa: E731
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).to(torch.int32)
    return r(T, H), r(E, 2 * I, H), r(E, H, I), ids, torch.rand(T, K, generator=g)


def _layer64(x, w1, w2, ids, weights, act=None, b1=None, b2=None):
    act = act or (lambda h: torch.nn.functional.silu(h[:I]) * h[I:])
    y = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for e, w in zip(ids[t].tolist(), weights[t].tolist()):
            if 0 <= e < E:
                h = w1[e].double() @ x[t].double() + (0 if b1 is None else b1[e].double())
                y[t] += w * (w2[e].double() @ act(h) + (0 if b2 is None else b2[e].double()))
    return y


def _close(a, b, tolerance):
    error = (a.double() - b).norm() / b.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def _absmax(w, dims, top):
    scale = w.float().abs().amax(dim=dims, keepdim=True) / top
    q = w.float() / scale
    return (q.to(FP8) if top == 448 else q.round().to(torch.int8)), scale


def _blocks(w, top, n=G, k=G):
    parts = w.float().view(E, w.shape[1] // n, n, w.shape[2] // k, k)
    q, s = _absmax(parts, (2, 4), top)
    return q.view(w.shape), s.view(E, w.shape[1] // n, -1), (q.float() * s).view(w.shape)


def _int4(w, g=G):
    parts = w.float().view(E, w.shape[1], -1, g)
    s = parts.abs().amax(3, keepdim=True) / 7
    q = (parts / s).round().clamp(-8, 7) + 8
    flat = q.view(w.shape).to(torch.uint8)
    return flat[..., 0::2] | flat[..., 1::2] << 4, s.squeeze(3), ((q - 8) * s).view(w.shape)


def _configuration(mode, w1, w2):
    """(quant_config, w1, w2 as stored, w1, w2 as numbers)"""
    if mode == "bf16":
        return vllm.FUSED_MOE_UNQUANTIZED_CONFIG, w1, w2, w1, w2
    if mode in ("fp8_tensor", "fp8_token", "fp8_token_tensor_weights", "fp8_static"):
        dims = 2 if mode == "fp8_token" else (1, 2)
        (q1, s1), (q2, s2) = _absmax(w1, dims, 448), _absmax(w2, dims, 448)
        scales = dict(a1_scale=torch.tensor(0.01), a2_scale=torch.tensor(0.02)) if mode == "fp8_static" else {}
        config = vllm.fp8_w8a8_moe_quant_config(s1, s2, per_act_token_quant="token" in mode,
                                                per_out_ch_quant=mode == "fp8_token", **scales)
        return config, q1, q2, q1.float() * s1, q2.float() * s2
    if mode in ("fp8_block", "int8_block"):
        top, dtype = (448, FP8) if mode == "fp8_block" else (127, torch.int8)
        (q1, s1, d1), (q2, s2, d2) = _blocks(w1, top), _blocks(w2, top)
        return (vllm.FusedMoEQuantConfig.make(dtype, block_shape=[G, G], w1_scale=s1, w2_scale=s2), q1, q2, d1, d2)
    if mode == "fp8_w8a16":
        (q1, s1), (q2, s2) = _absmax(w1, 2, 448), _absmax(w2, 2, 448)
        return vllm.fp8_w8a16_moe_quant_config(s1, s2), q1, q2, q1.float() * s1, q2.float() * s2
    if mode in ("int8_token", "int8_w8a16"):
        (q1, s1), (q2, s2) = _absmax(w1, 2, 127), _absmax(w2, 2, 127)
        if mode == "int8_token":
            config = vllm.int8_w8a8_moe_quant_config(s1, s2, None, None, per_act_token_quant=True)
        else:
            config = vllm.int8_w8a16_moe_quant_config(s1, s2, None, None)
        return config, q1, q2, q1.float() * s1, q2.float() * s2
    (q1, s1, d1), (q2, s2, d2) = _int4(w1), _int4(w2)
    return vllm.int4_w4a16_moe_quant_config(s1, s2, None, None, [0, G]), q1, q2, d1, d2


def _kernel(config, experts=None, **options):
    experts = experts or vllm.BatchedTritonExperts
    return vllm.FusedMoEKernel(vllm.BatchedPrepareAndFinalize(T, E, 1, 0), experts(None, config, T, 1), **options)


def _apply(kernel, x, w1, w2, weights, ids, activation=vllm.MoEActivation.SILU, on_input=False):
    return kernel.apply(x, w1, w2, weights, ids, activation=activation, global_num_experts=E, expert_map=None,
                        apply_router_weight_on_input=on_input)


@pytest.mark.parametrize("experts", [vllm.BatchedTritonExperts, vllm.NaiveBatchedExperts])
@pytest.mark.parametrize("mode", ["bf16", "fp8_tensor", "fp8_static", "fp8_token", "fp8_token_tensor_weights",
                                  "fp8_block", "fp8_w8a16", "int8_token", "int8_block", "int8_w8a16", "int4"])
def test_every_scheme_through_the_composition(mode, experts):
    x, w1, w2, ids, weights = _problem(1)
    config, q1, q2, d1, d2 = _configuration(mode, w1, w2)
    before = x.clone()
    y = _apply(_kernel(config, experts), x, q1, q2, weights, ids)
    assert torch.equal(x, before)
    tolerance = {"bf16": 1e-2, "fp8_w8a16": 1e-2, "int8_w8a16": 1e-2, "int4": 1e-2, "int8_token": 2e-2,
                 "int8_block": 2e-2}.get(mode, 0.06)
    _close(y, _layer64(x, d1, d2, ids, weights), tolerance)


def test_biases_activations_and_inplace():
    x, w1, w2, ids, weights = _problem(2)
    b1, b2 = torch.randn(E, 2 * I).bfloat16(), torch.randn(E, H).bfloat16()
    y = _apply(_kernel(vllm.biased_moe_quant_config(b1, b2)), x, w1, w2, weights, ids)
    _close(y, _layer64(x, w1, w2, ids, weights, b1=b1, b2=b2), 1e-2)

    def oai(h):  # gate and up interleaved, limit 7, alpha 1.702
        g, u = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
        return (u + 1) * g * torch.sigmoid(1.702 * g)

    w1 = w1 * 20  # so that the limits matter
    y = _apply(_kernel(vllm.FUSED_MOE_UNQUANTIZED_CONFIG), x, w1, w2, weights, ids, vllm.MoEActivation.SWIGLUOAI)
    _close(y, _layer64(x, w1, w2, ids, weights, oai), 1e-2)

    def clamped(h):
        return torch.nn.functional.silu(h[:I].clamp(max=1.5)) * h[I:].clamp(-1.5, 1.5)

    config = vllm.FusedMoEQuantConfig.make(gemm1_clamp_limit=1.5)
    given = x.clone()
    y = _apply(_kernel(config, inplace=True), given, w1, w2, weights, ids)
    assert y.data_ptr() == given.data_ptr()
    _close(y, _layer64(x, w1, w2, ids, weights, clamped), 1e-2)

    ungated = w1[:, :I].contiguous()
    y = _apply(_kernel(vllm.FUSED_MOE_UNQUANTIZED_CONFIG), x, ungated, w2, weights, ids, "relu2_no_mul")
    _close(y, _layer64(x, ungated, w2, ids, weights, lambda h: torch.relu(h) ** 2), 1e-2)


def test_two_ranks_and_an_expert_map_sum_to_the_whole():
    x, w1, w2, ids, weights = _problem(3, torch.float32)
    whole = _layer64(x, w1, w2, ids, weights)
    odd_even = torch.tensor([0, -1, 1, -1, 2, -1], dtype=torch.int32)  # this rank holds the even experts
    parts = []
    for rank in range(2):
        kernel = vllm.FusedMoEKernel(vllm.BatchedPrepareAndFinalize(T, 3, 2, rank),
                                     vllm.BatchedTritonExperts(None, vllm.FUSED_MOE_UNQUANTIZED_CONFIG, T, 2))
        parts.append(_apply(kernel, x, w1[3 * rank:3 * rank + 3], w2[3 * rank:3 * rank + 3], weights, ids))
    _close(sum(parts), whole, 1e-5)
    parts = []
    for first, expert_map in ((0, odd_even), (1, torch.roll(odd_even, 1))):
        kernel = vllm.FusedMoEKernel(vllm.BatchedPrepareAndFinalize(T, 3, 2, 0),
                                     vllm.BatchedTritonExperts(None, vllm.FUSED_MOE_UNQUANTIZED_CONFIG, T, 2))
        parts.append(kernel.apply(x, w1[first::2].contiguous(), w2[first::2].contiguous(), weights, ids, "silu", E,
                                  expert_map, False))
    _close(sum(parts), whole, 1e-5)


def test_the_signatures_are_the_releases():
    names = lambda f: list(inspect.signature(f).parameters)  # noqa: E731
    assert names(vllm.BatchedPrepareAndFinalize.prepare) == [
        "self", "a1", "topk_weights", "topk_ids", "num_experts", "expert_map", "apply_router_weight_on_input",
        "quant_config", "defer_input_quant"]
    assert names(vllm.BatchedTritonExperts.__init__) == ["self", "moe_config", "quant_config", "max_num_tokens",
                                                         "num_dispatchers"]
    assert names(vllm.BatchedTritonExperts.apply)[1:8] == ["output", "hidden_states", "w1", "w2", "topk_weights",
                                                           "topk_ids", "activation"]
    assert names(vllm.invoke_moe_batched_triton_kernel) == names(seed.invoke_moe_batched_triton_kernel)
    experts = vllm.BatchedTritonExperts(None, vllm.FUSED_MOE_UNQUANTIZED_CONFIG, 4, 2)
    assert experts.workspace_shapes(9, 96, 64, 2, 6, 3, None, vllm.MoEActivation.SILU) == (
        (3, 8, 96), (3, 8, 48), (3, 8, 64))
    assert experts.workspace_shapes(9, 96, 64, 2, 6, 3, None, "relu2_no_mul")[1] == (3, 8, 96)
    with pytest.raises(ValueError, match="nvfp4"):
        vllm.FusedMoEQuantConfig.make("nvfp4")
    with pytest.raises(NotImplementedError, match="defer_input_quant"):
        vllm.BatchedPrepareAndFinalize(4, 3, 1, 0).prepare(*[None] * 7, defer_input_quant=True)


@pytest.mark.parametrize("per_token,block", [(False, None), (True, None), (False, [16, 16])])
@pytest.mark.parametrize("static", [None, "one", "per expert"])
def test_batched_quantization_is_each_experts_own(per_token, block, static):
    a = torch.randn(E, T, H) * torch.rand(E, 1, 1) * 3
    counts = torch.tensor([3, 0, T, 1, 5, 2], dtype=torch.int32)
    a[0, 3] = float("nan")  # behind the live rows: must not matter
    given = {None: None, "one": torch.tensor(0.01), "per expert": torch.rand(E, 1, 1) * 0.01 + 0.004}[static]
    if static and (per_token or block):
        with pytest.raises(ValueError, match="A_scale"):
            seed.batched_moe_kernel_quantize_input(a, given, T, E, H, counts, FP8, per_token, block)
        return
    q, s = seed.batched_moe_kernel_quantize_input(a, given, T, E, H, counts, FP8, per_token, block)
    assert q.shape == a.shape and s.shape == (E, T if per_token or block else 1, H // 16 if block else 1)
    for e, n in enumerate(counts.tolist()):
        if n == 0:
            continue
        live = a[e, :n]
        if static:
            expected = given.expand(E, 1, 1)[e].float() if static != "one" else given.view(1, 1)
        elif block:
            expected = live.view(n, -1, 16).abs().amax(2) / 448
        else:
            expected = live.abs().amax(1, keepdim=True) / 448 if per_token else live.abs().amax().view(1, 1) / 448
        assert torch.allclose(s[e, :expected.shape[0]], expected)
        wide = s[e, :n if s.shape[1] > 1 else 1].repeat_interleave(H // s.shape[2], 1)
        error = (q[e, :n].float() * wide - live.clamp(-448 * wide, 448 * wide)).abs()
        assert (error <= live.abs() * 0.0626 + wide * 2 ** -9).all()


def test_rows_beyond_the_capacity_are_counted():
    x, w1, w2, ids, weights = _problem(5)
    ids[:] = torch.tensor([0, 1, 2], dtype=torch.int32)
    both = vllm.BatchedPrepareAndFinalize(4, E, 1, 0)
    rows, _, meta, _, _ = both.prepare(x, weights, ids, E, None, False, vllm.FUSED_MOE_UNQUANTIZED_CONFIG)
    assert rows.shape == (E, 4, H) and int(both.dropped) == 3 * (T - 4)
    assert meta.expert_num_tokens.tolist() == [4, 4, 4, 0, 0, 0]
