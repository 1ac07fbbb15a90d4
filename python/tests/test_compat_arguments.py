# SPDX-License-Identifier: Apache-2.0
"""Arguments of the drop-in modules at their limits: no tokens, absent parameters, given scales, wrong ones by name."""

import pytest

torch = pytest.importorskip("torch")

from moesaic.compat import flashinfer, sglang  # noqa: E402
from moesaic.compat import vllm as seed  # noqa: E402
from moesaic.compat.vllm import v0_22  # noqa: E402

FP8 = torch.float8_e4m3fn
E, H, I, K, T = 4, 64, 32, 2, 6  # noqa: E741


def _problem(dtype=torch.bfloat16, tokens=T):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])[:tokens].to(torch.int32)
    r = lambda *s: (torch.randn(*s) * 0.3).to(dtype)  # noqa: E731
    return r(tokens, H), ids, torch.rand(tokens, K), r(E, 2 * I, H), r(E, H, I)


def _kernel(config=v0_22.FUSED_MOE_UNQUANTIZED_CONFIG, rank=0):
    return v0_22.FusedMoEKernel(v0_22.BatchedPrepareAndFinalize(T, E, 1, rank), v0_22.BatchedTritonExperts(None, config, T, 1))


# --- no tokens ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["plain", "tensor", "channel", "block"])
def test_no_tokens_through_a_layer(mode):
    x, ids, weights, w1, w2 = _problem(tokens=0)
    flags, config, scales = {}, v0_22.FUSED_MOE_UNQUANTIZED_CONFIG, []
    if mode != "plain":
        w1, w2 = w1.to(FP8), w2.to(FP8)
        shapes = {"tensor": ((E,), (E,)), "channel": ((E, 2 * I), (E, H)), "block": ((E, 2, 2), (E, 2, 1))}[mode]
        s1, s2 = (torch.ones(shape) for shape in shapes)
        block = [32, 32] if mode == "block" else None
        flags = dict(use_fp8_w8a8=True, per_channel_quant=mode == "channel", block_shape=block, w1_scale=s1, w2_scale=s2)
        config = v0_22.fp8_w8a8_moe_quant_config(s1, s2, per_act_token_quant=mode == "channel", block_shape=block)
        scales = {"tensor": [torch.ones(E), torch.ones(1), torch.ones(E), torch.ones(1)], "block": [s1, s2], "channel": None}[mode]
    assert sglang.fused_experts(x, w1, w2, (weights, ids, None), **flags).shape == (0, H)
    options = type("Options", (), dict(no_combine=True))
    assert sglang.fused_moe(x, w1, w2, (weights, ids, None), options, **flags).shape == (0, K, H)
    assert _kernel(config).apply(x, w1, w2, weights, ids, v0_22.MoEActivation.SILU, E, None, False).shape == (0, H)
    if scales is not None:
        block = dict(use_deepseek_fp8_block_scale=True) if mode == "block" else {}
        assert flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, torch.bfloat16, scales, **block)[0].shape == (0, H)


def test_no_tokens_through_the_pieces():
    x, ids, weights, _, _ = _problem(tokens=0)
    one = torch.ones(1)
    for q, s in (sglang.per_token_group_quant_fp8(x, 32), sglang.per_token_group_quant_int8(x, 32),
                 sglang.per_token_group_quant_fp8(x, 32, column_major_scales=True, scale_tma_aligned=True)):
        assert q.shape == (0, H) and s.shape == (0, 2)
    assert sglang.per_token_group_quant_fp8(x.view(0, 2, I), 16)[1].shape == (0, 2, 2)
    assert sglang.per_token_quant_int8(x)[1].shape == (0, 1)
    assert sglang.scaled_fp8_quant(x, use_per_token_if_dynamic=True)[1].shape == (0, 1)
    assert sglang.scaled_fp8_quant(x, one)[0].shape == sglang.scaled_fp8_quant(x)[0].shape == (0, H)
    assert sglang.static_quant_fp8(x, one, repeat_scale=True)[1].shape == (0, 1)
    assert sglang.silu_and_mul(x).shape == sglang.gelu_and_mul(x).shape == (0, I)
    assert int(sglang.moe_align_block_size(ids, 16, E)[2]) == 0
    sglang.moe_sum_reduce(torch.zeros(0, K, H), torch.zeros(0, H))
    flashinfer.fused_topk_deepseek(torch.zeros(0, 16), torch.zeros(16), 4, 2, 3, 2.5, torch.zeros(0, 3),
                                   torch.zeros(0, 3, dtype=torch.int32))
    assert v0_22.TopKWeightAndReduceNaiveBatched(0).apply(None, torch.zeros(E, 3, H), weights, ids, False).shape == (0, H)
    config = v0_22.fp8_w8a8_moe_quant_config(None, None)
    assert v0_22.NaiveBatchedExperts(None, config, 4, 1).dequant(torch.zeros(0, H).to(FP8), one).shape == (0, H)


# --- FlashInfer's activation parameters -----------------------------------------------------------------

@pytest.mark.parametrize("given,step", [
    (dict(alpha=1.3), False), (dict(alpha=1.3, beta=0.5), False), (dict(beta=0.5), False), (dict(), False),
    (dict(limit=2.0), False), (dict(alpha=1.3, limit=2.0), False), (dict(alpha=1.3, beta=0.5, limit=2.0), False), (dict(), True),
    (dict(limit=2.0), True)])
def test_flashinfer_absent_parameters_do_nothing(given, step):
    """The original's kernel: alpha 1, beta 0 and no limit for those that are absent; SwigluStep's limit is 7."""
    x, ids, weights, w1, w2 = _problem(torch.float32)
    x, w1 = x * 4, w1 * 8  # gate and up far beyond 7
    alpha, beta, limit = given.get("alpha", 1.0), given.get("beta", 0.0), given.get("limit", 7.0 if step else float("inf"))
    truth = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for e, w in zip(ids[t].tolist(), weights[t].tolist()):
            up, gate = (w1[e].double() @ x[t].double()).chunk(2)
            up = up.clamp(-limit, limit)
            if step:
                h = torch.nn.functional.silu(gate).clamp(max=limit) * up
            else:
                gate = gate.clamp(max=limit)
                h = gate * torch.sigmoid(alpha * gate) * (up + beta)
            truth[t] += w * (w2[e].double() @ h)
    parameters = {f"swiglu_{name}": torch.full((E,), value) for name, value in given.items()}
    types = flashinfer.ActivationType
    for kind in ([types.SwigluStep] if step else [types.SwigluBias] + [types.Swiglu] * bool(given)):
        y = flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, torch.float32, None, activation_type=kind, **parameters)[0]
        assert (y.double() - truth).norm() <= 1e-5 * truth.norm(), kind


# --- SGLang's given scales ------------------------------------------------------------------------------

def test_sglang_per_channel_takes_a_given_scale():
    """A scalar for all rows, as the original's quantizer takes it; without one, each token's own."""
    x, ids, weights, _, _ = _problem()
    q, s = torch.randn(E, 2 * I, H).to(FP8), torch.rand(E, 2 * I) + 0.5
    lists = sglang.moe_align_block_size(ids, 16, E)

    def product(scale):
        c = torch.zeros(T, K, 2 * I, dtype=torch.float32)
        sglang.invoke_fused_moe_kernel(x, q, None, c, scale, s, None, weights, ids, *lists, False, K, {"BLOCK_SIZE_M": 16},
                                       torch.float32, True, False, False, False, True)
        return c

    for scale in (torch.tensor([0.01]), torch.tensor(0.0004)):  # the second clips
        rows = (x.float() * (1 / scale)).clamp(-448, 448).to(FP8).double() * scale.double()
        truth = torch.stack([torch.stack([(q[e].double() * s[e, :, None].double()) @ rows[t] for e in ids[t].tolist()])
                             for t in range(T)])
        assert (product(scale).double() - truth).norm() <= 1e-4 * truth.norm()
    assert not torch.equal(product(None), product(torch.tensor([0.01])))
    with pytest.raises(ValueError, match=r"^A_scale: expected one scalar .*\(6, 1\)"):
        product(torch.ones(T, 1))


# --- wrong ones by name ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name,given", [
    ("output", dict(output=torch.empty(T, H + 1, dtype=torch.bfloat16))), ("output", dict(output=torch.empty(T, H))),
    ("output", dict(output=torch.empty(1, T, H, dtype=torch.bfloat16))),
    ("ep_rank", dict(ep_size=3, ep_rank=5)), ("ep_rank", dict(ep_rank=-1)), ("ep_size", dict(ep_size=0)),
    ("tp_size", dict(tp_size=-1)), ("tp_rank", dict(tp_size=2, tp_rank=2)), ("tp_rank", dict(tp_rank=-1))])
def test_flashinfer_names_what_is_wrong(name, given):
    x, ids, weights, w1, w2 = _problem()
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, torch.bfloat16, [], **given)


def test_vllm_names_what_is_wrong():
    x, ids, weights, w1, w2 = _problem()
    for experts in (E - 1, 0, -2):
        with pytest.raises(ValueError, match=f"^global_num_experts: expected {E} or more"):
            _kernel().apply(x, w1, w2, weights, ids, v0_22.MoEActivation.SILU, experts, None, False)
    with pytest.raises(ValueError, match="^num_experts: expected 16 or more for rank 3"):
        _kernel(rank=3).apply(x, w1, w2, weights, ids, v0_22.MoEActivation.SILU, E, None, False)
    y = _kernel().apply(x, w1, w2, weights, ids, v0_22.MoEActivation.SILU, -1, None, False)
    assert torch.equal(y, _kernel().apply(x, w1, w2, weights, ids, v0_22.MoEActivation.SILU, E, None, False))
    right = dict(max_num_tokens=4, num_local_experts=E, num_dispatchers=1, rank=0)
    for name, value in (("max_num_tokens", -1), ("num_local_experts", 0), ("num_dispatchers", 0), ("rank", -1)):
        for form in (seed, v0_22):
            with pytest.raises(ValueError, match=f"^{name}: expected "):
                form.BatchedPrepareAndFinalize(**{**right, name: value})


@pytest.mark.parametrize("value", [None, 3, (torch.ones(T, K),)])
def test_sglang_names_a_missing_routing(value):
    x, _, _, w1, w2 = _problem()
    with pytest.raises(TypeError, match=r"^topk_output: expected \(topk_weights, topk_ids, \.\.\.\)"):
        sglang.fused_experts(x, w1, w2, value)
