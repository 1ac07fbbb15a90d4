# SPDX-License-Identifier: Apache-2.0
"""The drop-in modules against their contracts, in float64 torch written here."""

import pytest

torch = pytest.importorskip("torch")

from moesaic.compat import flashinfer, sglang, vllm  # noqa: E402

T, E, H, I, K = 9, 5, 64, 96, 2
G = 32  # the smallest group that every device takes
F = torch.nn.functional


def _problem(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: (torch.randn(*s, generator=g) * 0.3).to(dtype)  # noqa: E731
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).to(torch.int32)
    return r(T, H), r(E, 2 * I, H), r(E, H, I), ids, torch.rand(T, K, generator=g)


def _layer64(x, w1, w2, ids, weights, gate_first=True, b1=None, b2=None, act=F.silu):
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for e, w in zip(ids[t].tolist(), weights[t].tolist()):
            if not 0 <= e < w1.shape[0]:
                continue
            h = w1[e].double() @ x[t].double() + (0 if b1 is None else b1[e].double())
            a, b = h.chunk(2)
            gate, up = (a, b) if gate_first else (b, a)
            y[t] += w * (w2[e].double() @ (act(gate) * up) + (0 if b2 is None else b2[e].double()))
    return y


def _close(a, b, tolerance):
    error = (a.double() - b).norm() / b.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


# --- SGLang ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_sglang_fused_experts(dtype, tolerance):
    x, w1, w2, ids, weights = _problem(dtype)
    y = sglang.fused_experts(x, w1, w2, (weights, ids, None))
    _close(y, _layer64(x, w1, w2, ids, weights), tolerance)


def _fp8(w, dims):
    scale = w.abs().amax(dim=dims, keepdim=True) / 448
    return (w / scale).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("scheme", ["tensor", "channel", "block", "int8", "int8_w8a16", "int4"])
def test_sglang_quantized(scheme):
    x, w1, w2, ids, weights = _problem(torch.bfloat16)
    flags, tolerance = {}, 0.06
    if scheme in ("tensor", "channel"):
        dims = (1, 2) if scheme == "tensor" else 2
        (q1, s1), (q2, s2) = _fp8(w1.float(), dims), _fp8(w2.float(), dims)
        flags = dict(use_fp8_w8a8=True, per_channel_quant=scheme == "channel",
                     w1_scale=s1.reshape(E) if scheme == "tensor" else s1, w2_scale=s2.reshape(E) if scheme == "tensor" else s2)
        d1, d2 = q1.float() * s1, q2.float() * s2
    elif scheme == "block":
        def block(w, n, k):
            parts = w.float().view(E, w.shape[1] // n, n, w.shape[2] // k, k)
            s = parts.abs().amax(dim=(2, 4), keepdim=True) / 448
            return (parts / s).to(torch.float8_e4m3fn).view(w.shape), s.view(E, w.shape[1] // n, -1), \
                ((parts / s).to(torch.float8_e4m3fn).float() * s).view(w.shape)
        (q1, s1, d1), (q2, s2, d2) = block(w1, G, G), block(w2, G, G)
        flags = dict(use_fp8_w8a8=True, block_shape=[G, G], w1_scale=s1, w2_scale=s2)
    elif scheme in ("int8", "int8_w8a16"):
        s1, s2 = w1.float().abs().amax(2, keepdim=True) / 127, w2.float().abs().amax(2, keepdim=True) / 127
        q1, q2 = (w1.float() / s1).round().to(torch.int8), (w2.float() / s2).round().to(torch.int8)
        flags = dict(use_int8_w8a8=scheme == "int8", use_int8_w8a16=scheme != "int8", per_channel_quant=True,
                     w1_scale=s1.squeeze(2), w2_scale=s2.squeeze(2))
        d1, d2 = q1.float() * s1, q2.float() * s2
    else:
        def pack(w, g):
            parts = w.float().view(E, w.shape[1], -1, g)
            s = parts.abs().amax(3, keepdim=True) / 7
            q = (parts / s).round().clamp(-8, 7) + 8
            flat = q.view(w.shape).to(torch.uint8)
            return flat[..., 0::2] | flat[..., 1::2] << 4, s.squeeze(3), ((q - 8) * s).view(w.shape)
        (q1, s1, d1), (q2, s2, d2) = pack(w1, G), pack(w2, G)
        flags = dict(use_int4_w4a16=True, block_shape=[0, G], w1_scale=s1, w2_scale=s2)
        tolerance = 2e-2
    y = sglang.fused_experts(x, q1, q2, (weights, ids, None), **flags)
    _close(y, _layer64(x, d1, d2, ids, weights), tolerance)


def test_sglang_kernel_details():
    x, w1, _, ids, weights = _problem()
    bias = torch.randn(E, 2 * I)
    padded = torch.cat([w1, torch.full((E, 2 * I, 128), float("nan"))], 2)  # a K tail that is not part of K
    slots, experts, count = sglang.moe_align_block_size(ids, 4, E)
    c = torch.full((T, K, 2 * I), float("nan"))
    sglang.invoke_fused_moe_kernel(x, padded, bias, c, None, None, None, weights, ids, slots, experts, count, True, K,
                                   {"BLOCK_SIZE_M": 4, "BLOCK_SIZE_N": 64}, torch.float32, False, False, False, False, False)
    for t in range(T):
        for j in range(K):
            e = ids[t, j]
            _close(c[t, j], weights[t, j].double() * (w1[e].double() @ x[t].double() + bias[e].double()), 1e-5)
    # c_sorted: row = position in the list
    d = torch.full((slots.numel(), 2 * I), float("nan"))
    sglang.invoke_fused_moe_kernel(x, w1, bias, d, None, None, None, weights, ids, slots, experts, count, True, K,
                                   {"BLOCK_SIZE_M": 4}, torch.float32, False, False, False, False, False, c_sorted=True)
    for position, slot in enumerate(slots[: int(count)].tolist()):
        if slot < T * K:
            assert torch.equal(d[position], c[slot // K, slot % K])


def test_sglang_pieces():
    x = torch.randn(7, 64)
    q, s = sglang.per_token_quant_int8(x)
    assert torch.allclose(s, x.abs().amax(1, keepdim=True) / 127)
    assert ((q.float() * s - x).abs() <= s * 0.5001).all()
    q, s = sglang.per_token_group_quant_fp8(x, 16)
    assert q.dtype == torch.float8_e4m3fn and s.shape == (7, 4)
    assert torch.allclose(s, x.view(7, 4, 16).abs().amax(2) / 448)
    q, s = sglang.static_quant_fp8(x.half(), torch.tensor(0.01, dtype=torch.float16), repeat_scale=True)
    expected = x.half().float() / torch.tensor(0.01, dtype=torch.float16).float()
    assert s.shape == (7, 1) and torch.allclose(q.float(), expected.clamp(-448, 448), rtol=0.07, atol=0.01)
    h = torch.randn(3, 5, 32)
    assert torch.allclose(sglang.gelu_and_mul(h), F.gelu(h[..., :16]) * h[..., 16:], atol=1e-6)
    y = torch.empty(3, 32)
    sglang.moe_sum_reduce(h, y, 2.5)
    assert torch.allclose(y, h.sum(1) * 2.5, atol=1e-5)


# --- vLLM --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["bf16", "fp8_tensor", "fp8_token", "fp8_block", "int8_token"])
def test_vllm_batched(mode):
    x, w1, w2, ids, weights = _problem(torch.bfloat16, 3)
    flags, s1, s2, d1, d2 = {}, None, None, w1, w2
    if mode.startswith("fp8_t"):
        dims = (1, 2) if mode == "fp8_tensor" else 2
        (w1, s1), (w2, s2) = _fp8(w1.float(), dims), _fp8(w2.float(), dims)
        d1, d2 = w1.float() * s1, w2.float() * s2
        flags = dict(use_fp8_w8a8=True, per_act_token_quant=mode == "fp8_token")
        if mode == "fp8_tensor":
            s1, s2 = s1.reshape(E), s2.reshape(E)
    elif mode == "fp8_block":
        def block(w):
            parts = w.float().view(E, -1, G, w.shape[2] // G, G)
            s = parts.abs().amax(dim=(2, 4), keepdim=True) / 448
            q = (parts / s).to(torch.float8_e4m3fn)
            return q.view(w.shape), s.view(E, -1, w.shape[2] // G), (q.float() * s).view(w.shape)
        (w1, s1, d1), (w2, s2, d2) = block(w1), block(w2)
        flags = dict(use_fp8_w8a8=True, block_shape=[G, G])
    elif mode == "int8_token":
        s1, s2 = w1.float().abs().amax(2, keepdim=True) / 127, w2.float().abs().amax(2, keepdim=True) / 127
        w1, w2 = (w1.float() / s1).round().to(torch.int8), (w2.float() / s2).round().to(torch.int8)
        d1, d2 = w1.float() * s1, w2.float() * s2
        flags = dict(use_int8_w8a8=True, per_act_token_quant=True)
    both = vllm.BatchedPrepareAndFinalize(T, E, 1, 0)
    experts = vllm.BatchedTritonExperts(T, 1, **flags)
    before = x.clone()
    rows, scale, counts, _, _ = both.prepare(x, None, None, weights, ids, E, None, False, experts.quant_config)
    assert torch.equal(x, before) and counts.numel() == E
    output = torch.full((E, T, H), float("nan"), dtype=torch.bfloat16)
    experts.apply(output, rows, w1, w2, ids, "silu", E, None, s1, s2, None, None, scale, None, None, None, counts)
    y = torch.empty(T, H, dtype=torch.bfloat16)
    both.finalize(y, output, weights, ids, False)
    _close(y, _layer64(x, d1, d2, ids, weights), 1e-2 if mode == "bf16" else 0.06)


def test_vllm_public_surface():
    experts = vllm.NaiveBatchedExperts(4, 2, use_fp8_w8a8=True)
    assert experts.workspace_shapes(torch.empty(1, 1), None, 1, 8, 6, 2, 3, 3)[:2] == ((3, 8, 6), (8, 8))
    assert not experts.supports_chunking() and not experts.supports_expert_map()
    both = vllm.BatchedPrepareAndFinalize(4, 2, 3, 0)
    assert both.max_num_tokens_per_rank() == 4 and both.num_dispatchers() == 3 and both.topk_indices_dtype() is None
    config = vllm.FusedMoEQuantConfig.make(use_fp8_w8a8=True, block_shape=[128, 128])
    assert config.batched_scale_shape(3, 5, 256) == (3, 5, 2)


# --- FlashInfer --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_flashinfer_up_first_and_biases(dtype, tolerance):
    x, w1, w2, ids, weights = _problem(dtype, 5)
    b1, b2 = torch.randn(E, 2 * I).to(dtype), torch.randn(E, H).to(dtype)
    y = flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, dtype, [], fc1_expert_biases=b1, fc2_expert_biases=b2)[0]
    _close(y, _layer64(x, w1, w2, ids, weights, gate_first=False, b1=b1, b2=b2), tolerance)


def test_flashinfer_expert_parallel_sums_to_the_whole():
    x, w1, w2, ids, weights = _problem(torch.bfloat16, 6)
    w1, w2 = torch.cat([w1, w1[:1]]), torch.cat([w2, w2[:1]])  # six experts: two ranks of three
    ids[0, 0] = 77  # no such expert: contributes nothing
    whole = _layer64(x, w1, w2, ids, weights, gate_first=False)
    parts = [flashinfer.cutlass_fused_moe(x, ids, weights, w1[3 * r:3 * r + 3].contiguous(), w2[3 * r:3 * r + 3].contiguous(),
                                          torch.bfloat16, [], ep_size=2, ep_rank=r)[0].double() for r in range(2)]
    _close(sum(parts), whole, 1e-2)


def test_flashinfer_fp8_per_tensor():
    x, w1, w2, ids, weights = _problem(torch.bfloat16, 7)
    (q1, s1), (q2, s2) = _fp8(w1.float(), (1, 2)), _fp8(w2.float(), (1, 2))
    in_scale = x.float().abs().max() / 448
    act_scale = torch.tensor(0.02)
    xq = (x.float() / in_scale).to(torch.float8_e4m3fn)
    scales = [s1.reshape(E) * in_scale, 1 / act_scale, s2.reshape(E) * act_scale, in_scale]
    y = flashinfer.cutlass_fused_moe(xq, ids, weights, q1, q2, torch.bfloat16, scales)[0]
    _close(y, _layer64(xq.float() * in_scale, q1.float() * s1, q2.float() * s2, ids, weights, gate_first=False), 0.06)


def test_flashinfer_fused_topk_deepseek():
    scores, bias = torch.randn(T, 16), torch.randn(16)
    values, ids = torch.empty(T, 3), torch.empty(T, 3, dtype=torch.int32)
    flashinfer.fused_topk_deepseek(scores, bias, 4, 2, 3, 2.5, values, ids)
    p = torch.sigmoid(scores.double())
    choice = (p + bias.double()).view(T, 4, 4)
    kept = torch.zeros(T, 4, 1, dtype=torch.bool, device=scores.device).scatter(
        1, choice.topk(2, 2)[0].sum(2).topk(2, 1)[1][..., None], True)
    best = choice.masked_fill(~kept, float("-inf")).view(T, 16).topk(3, 1)[1]
    assert torch.equal(ids.long().sort(1)[0], best.sort(1)[0])
    chosen = p.gather(1, ids.long())
    assert torch.allclose(values.double(), chosen / chosen.sum(1, keepdim=True) * 2.5, atol=1e-5)


def test_flashinfer_refuses_by_name():
    x, w1, w2, ids, weights = _problem(torch.bfloat16)
    with pytest.raises(ValueError, match="min_latency_mode"):
        flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, torch.bfloat16, [], min_latency_mode=True)
    empty = flashinfer.cutlass_fused_moe(x[:0], ids[:0], weights[:0], w1, w2, torch.bfloat16, [])[0]
    assert empty.shape == (0, H)


def test_flashinfer_four_bit_weights_go_through_the_originals_helpers():
    if torch.get_default_device().type != "cpu":
        pytest.skip("int4_w4a8_fp8 has no kernel on CUDA")
    x, _, _, ids, weights = _problem(torch.bfloat16, 9)
    g = torch.Generator().manual_seed(9)
    n1, n2, group = 2 * I, H, G
    q1, q2 = (torch.randint(0, 256, s, generator=g, dtype=torch.uint8) for s in ((E, n1, H // 2), (E, n2, I // 2)))

    def signed(q):  # two's-complement nibbles, low first
        low, high = (q & 15).to(torch.int8), (q >> 4).to(torch.int8)
        pair = torch.stack([low, high], -1)
        return torch.where(pair > 7, pair - 16, pair).reshape(*q.shape[:-1], -1).float()

    s1 = (torch.rand(E, n1, H // group, generator=g) * 0.02).bfloat16()
    s2 = (torch.rand(E, n2, I // group, generator=g) * 0.02).bfloat16()
    prequant1, prequant2 = torch.full((H,), 5.0).bfloat16(), torch.full((I,), 4.0).bfloat16()
    nothing = torch.empty(0)
    scales = [flashinfer.interleave_moe_scales_for_sm90_mixed_gemm(s, group) for s in (s1, s2)]
    scales += [prequant1, prequant2, nothing, nothing, torch.full((E,), 0.2), torch.full((E,), 0.25)]
    y = flashinfer.cutlass_fused_moe(
        x, ids, weights, *(flashinfer.interleave_moe_weights_for_sm90_mixed_gemm(q, "int4") for q in (q1, q2)),
        torch.bfloat16, scales, use_w4_group_scaling=True, use_packed_weights=True)[0]
    d1 = signed(q1) * s1.float().repeat_interleave(group, 2)
    d2 = signed(q2) * s2.float().repeat_interleave(group, 2)
    _close(y, _layer64(x, d1, d2, ids, weights, gate_first=False), 0.06)
    with pytest.raises(ValueError, match="quant_type"):
        flashinfer.interleave_moe_weights_for_sm90_mixed_gemm(q1, "fp8")


def test_flashinfer_mxfp4():
    x, _, _, ids, weights = _problem(torch.bfloat16, 10)
    g = torch.Generator().manual_seed(10)
    inner = 64  # groups of 32
    values = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6])
    q1, q2 = (torch.randint(0, 256, s, generator=g, dtype=torch.uint8) for s in ((E, 2 * inner, H // 2), (E, H, inner // 2)))
    s1, s2 = (torch.randint(118, 123, (E, q.shape[1], q.shape[2] // 16), generator=g, dtype=torch.uint8) for q in (q1, q2))

    def numbers(q, s):
        pair = torch.stack([q & 15, q >> 4], -1).reshape(*q.shape[:-1], -1).long()
        return values[pair] * torch.exp2(s.float() - 127).repeat_interleave(32, 2)

    y = flashinfer.cutlass_fused_moe(x, ids, weights, flashinfer.interleave_moe_weights_for_sm90_mixed_gemm(q1), q2,
                                     torch.bfloat16, [s1, s2], use_w4_group_scaling=True)[0]
    _close(y, _layer64(x, numbers(q1, s1), numbers(q2, s2), ids, weights, gate_first=False), 1e-2)
