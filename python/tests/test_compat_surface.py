# SPDX-License-Identifier: Apache-2.0
"""The rest of the drop-in modules' surface: modes refused by name one by one, quantizers, helpers, public methods."""

import inspect

import pytest

torch = pytest.importorskip("torch")

from moesaic.compat import flashinfer, sglang  # noqa: E402
from moesaic.compat import vllm as seed  # noqa: E402
from moesaic.compat.vllm import v0_22  # noqa: E402

FP8 = torch.float8_e4m3fn
F = torch.nn.functional
E, H, I, K, T = 4, 64, 32, 2, 6


def _problem(dtype=torch.bfloat16):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).to(torch.int32)
    r = lambda *s: (torch.randn(*s) * 0.3).to(dtype)  # noqa: E731
    return r(T, H), ids, torch.rand(T, K), r(E, 2 * I, H), r(E, H, I)


def _layer64(x, ids, weights, w1, w2, gate_first=True, read=torch.Tensor.double):
    """The layer in float64. `read`: what the products see of a row."""
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64)
    for t, (es, ws) in enumerate(zip(ids.tolist(), weights.tolist())):
        for e, w in zip(es, ws):
            a, b = (w1[e].double() @ read(x[t])).chunk(2)
            gate, up = (a, b) if gate_first else (b, a)
            y[t] += w * (w2[e].double() @ read(F.silu(gate) * up))
    return y


def _as_fp8(row):
    """A row of one group as fp8 products read it."""
    scale = row.abs().max().float() / 448
    return (row.float() * (1 / scale)).to(FP8).double() * scale


def _close(a, b, tolerance):
    assert (a.double() - b).norm() <= tolerance * b.norm()


# --- FlashInfer -----------------------------------------------------------------------------------------

_SIGNATURE = dict(
    fc1_expert_biases=None, fc2_expert_biases=None, input_sf=None, swiglu_alpha=None, swiglu_beta=None, swiglu_limit=None,
    tp_size=1, tp_rank=0, ep_size=1, ep_rank=0, cluster_size=1, cluster_rank=0, output=None, enable_alltoall=False,
    use_deepseek_fp8_block_scale=False, use_w4_group_scaling=False, use_mxfp8_act_scaling=False, min_latency_mode=False,
    use_packed_weights=False, tune_max_num_tokens=8192, enable_pdl=None, activation_type=flashinfer.ActivationType.Swiglu,
    swizzled_input_sf=True, use_fused_finalize=True, profile_ids=None, workspace_buffer=None)


def test_flashinfer_signature():
    parameters = inspect.signature(flashinfer.cutlass_fused_moe).parameters
    given = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert given == _SIGNATURE and list(given) == list(_SIGNATURE)
    assert [n for n in parameters if n not in given][:7] == [
        "input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights",
        "output_dtype", "quant_scales"]


@pytest.mark.parametrize("name,value", [
    ("min_latency_mode", True), ("enable_alltoall", True), ("use_mxfp8_act_scaling", True), ("use_packed_weights", True),
    ("cluster_size", 2), ("use_deepseek_fp8_block_scale", True), ("use_wfp4afp8_humming", True), ("situ_beta", torch.ones(E)),
    ("situ_linear_beta", torch.ones(E)), ("fc1_lora_ranks", torch.ones(1)), ("fc2_lora_weight_ptrs", torch.ones(1)),
    ("activation_type", 10), ("output_dtype", torch.float64), ("input", torch.zeros(T, H, dtype=torch.float64)),
    ("fc1_expert_weights", torch.zeros(E, 2 * I, H, dtype=torch.int8)),
    ("fc1_expert_weights", torch.zeros(E, 2 * I, H // 8, dtype=torch.int64)),
    ("quant_scales", [torch.ones(1)] * 6), ("quant_scales", [torch.ones(1)] * 5), ("quant_scales", [torch.ones(1)])])
def test_flashinfer_refuses_each_mode_by_name(name, value):
    x, ids, weights, w1, w2 = _problem()
    call = dict(input=x, token_selected_experts=ids, token_final_scales=weights, fc1_expert_weights=w1,
                fc2_expert_weights=w2, output_dtype=torch.bfloat16, quant_scales=[], output=torch.full_like(x, 7))
    call[name] = value
    with pytest.raises(ValueError, match=name):
        flashinfer.cutlass_fused_moe(**call)
    assert (call["output"] == 7).all(), "refused before anything was written"


def test_flashinfer_unknown_arguments_are_type_errors():
    with pytest.raises(TypeError, match="use_magic"):
        flashinfer.cutlass_fused_moe(*_problem()[:3], *_problem()[3:], torch.bfloat16, [], use_magic=True)


@pytest.mark.parametrize("hint", [dict(tune_max_num_tokens=1), dict(enable_pdl=True), dict(swizzled_input_sf=False),
                                  dict(use_fused_finalize=False), dict(profile_ids=[3, 99]), dict(cluster_rank=0),
                                  dict(workspace_buffer=torch.empty(8, dtype=torch.uint8)), dict(tp_size=4)])
def test_flashinfer_hints_never_change_bits(hint):
    call = (*_problem(), torch.bfloat16, [])
    plain = flashinfer.cutlass_fused_moe(*call)[0]
    with flashinfer.autotune(True, tuning_buckets=(1, 2)):
        assert torch.equal(flashinfer.cutlass_fused_moe(*call, **hint)[0], plain)


def test_flashinfer_sm80_form():
    x, ids, weights, w1, w2 = _problem()
    output = torch.empty_like(x)
    y = flashinfer.cutlass_fused_moe_sm80(output, x, ids, weights, w1, w2, torch.bfloat16, [])
    assert y[0] is output
    _close(output, _layer64(x, ids, weights, w1, w2, gate_first=False), 1e-2)
    with pytest.raises(ValueError, match="min_latency_mode"):
        flashinfer.cutlass_fused_moe_sm80(output, x, ids, weights, w1, w2, torch.bfloat16, [], min_latency_mode=True)


def test_flashinfer_deepseek_blocks():
    x, ids, weights, w1, w2 = _problem()
    q1, q2 = w1.to(FP8), w2.to(FP8)
    s1, s2 = torch.rand(E, 1, 1) + 0.5, torch.rand(E, 1, 1) + 0.5
    y = flashinfer.cutlass_fused_moe(x, ids, weights, q1, q2, torch.bfloat16, [s1, s2], use_deepseek_fp8_block_scale=True)[0]
    # Values beside the middle of two e4m3 numbers may fall the other way in float64: 0.007 in most cases, 0.042 at most in
    # 600. (Against rows that are not quantized the limit was passed in 18 of them.)
    _close(y, _layer64(x, ids, weights, q1.float() * s1, q2.float() * s2, gate_first=False, read=_as_fp8), 0.06)


def test_flashinfer_int4_groups():
    x, ids, weights, _, _ = _problem()
    group = 32
    q1, q2 = (torch.randint(0, 256, s, dtype=torch.uint8) for s in ((E, 2 * I, H // 2), (E, H, I // 2)))
    s1, s2 = torch.rand(E, 2 * I, H // group) * 0.02, torch.rand(E, H, I // group) * 0.02

    def numbers(q, s):
        pair = torch.stack([q & 15, q >> 4], -1).reshape(*q.shape[:-1], -1)
        return (pair.float() - 8) * s.repeat_interleave(group, 2)

    y = flashinfer.cutlass_fused_moe(x, ids, weights, q1, q2, torch.bfloat16, [s1, s2])[0]
    _close(y, _layer64(x, ids, weights, numbers(q1, s1), numbers(q2, s2), gate_first=False), 1e-2)


# --- SGLang ---------------------------------------------------------------------------------------------

def test_sglang_names():
    names = lambda f: list(inspect.signature(f).parameters)  # noqa: E731
    assert names(sglang.invoke_fused_moe_kernel) == [
        "A", "B", "bias", "C", "A_scale", "B_scale", "B_zp", "topk_weights", "topk_ids", "sorted_token_ids", "expert_ids",
        "num_tokens_post_padded", "mul_routed_weight", "top_k", "config", "compute_type", "use_fp8_w8a8", "use_int8_w8a8",
        "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant", "block_shape", "no_combine", "a_use_tma", "b_use_tma",
        "c_sorted", "filter_expert"]
    assert names(sglang.per_token_group_quant_fp8) == [
        "x", "group_size", "eps", "column_major_scales", "scale_tma_aligned", "scale_ue8m0", "fuse_silu_and_mul",
        "masked_m", "enable_v2"]


@pytest.mark.parametrize("c_sorted", [False, True])
@pytest.mark.parametrize("filter_expert", [False, True])
def test_sglang_filtered_blocks(filter_expert, c_sorted):
    """An id of -1: zeros at the block's own rows, whatever filter_expert and c_sorted say, and nothing elsewhere."""
    x, ids, weights, w1, _ = _problem(torch.float32)
    block = 4
    slots, experts, count = sglang.moe_align_block_size(ids, block, E)
    gone = int(ids[0, 0])
    experts = torch.where(experts == gone, torch.full_like(experts, -1), experts)
    c = torch.full((slots.numel() if c_sorted else T * K, 2 * I), float("nan"))
    sglang.invoke_fused_moe_kernel(
        x, w1, None, c, None, None, None, weights, ids, slots, experts, count, False, K, {"BLOCK_SIZE_M": block},
        torch.float32, False, False, False, False, False, c_sorted=c_sorted, filter_expert=filter_expert)
    for position, slot in enumerate(slots[:int(count)].tolist()):
        if slot < T * K:
            e = int(ids.reshape(-1)[slot])
            row = c[position if c_sorted else slot]
            if e == gone:
                assert (row == 0).all()
            else:
                _close(row, w1[e].double() @ x[slot // K].double(), 1e-5)


def _ties():
    """Rows whose quotients lie on, or one last place beside, the middle of two e4m3 numbers; the last is the largest."""
    values = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (values[1:] + values[:-1]) / 2
    largest = torch.rand(40, 1) * 2 + 1
    x = middles * (largest / 448)
    infinity = torch.full_like(x, float("inf"))
    return torch.cat([x, -torch.nextafter(x, infinity), torch.nextafter(x, -infinity), largest], 1)


@pytest.mark.parametrize("form", ["token", "group", "tensor", "static"])
def test_the_rule_is_x_times_the_reciprocal(form):
    """contracts: q = x * (1 / s), s = absmax / 448: held bit for bit, on rows where x / s gives other numbers. What is
    expected is computed on the host: torch divides by a number on a GPU by multiplying with its reciprocal."""
    x = _ties()
    host = x.cpu()
    s = host.abs().amax(1, keepdim=True) / 448
    if form == "token":
        q, scale = sglang.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    elif form == "group":
        q, scale = sglang.per_token_group_quant_fp8(x, x.shape[1])
    else:  # one scale a call
        made = [sglang.scaled_fp8_quant(row[None], given[None] if form == "static" else None)
                for row, given in zip(x, s[:, 0].to(x.device))]
        q, scale = torch.cat([m[0] for m in made]), torch.cat([m[1].reshape(1, 1) for m in made])
    expected, other = ((v.clamp(-448, 448)).to(FP8).view(torch.uint8) for v in (host * (1 / s), host / s))
    assert torch.equal(scale.cpu(), s) and torch.equal(q.view(torch.uint8).cpu(), expected)
    assert not torch.equal(expected, other), "the data tells the two rules apart"


def test_int8_rounds_half_away_from_zero_or_truncates():
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, -2.5, 100.49]])
    q, s = sglang.per_token_quant_int8(x)
    assert s.item() == 1 and q.tolist() == [[127, 1, -1, 2, -3, 100]]
    assert sglang.per_token_group_quant_int8(x, 6)[0].tolist() == q.tolist()
    assert sglang.per_token_group_quant_int8(x, 6, int8_rounding="truncate")[0].tolist() == [[127, 0, 0, 1, -2, 100]]
    assert sglang.per_token_quant_int8(x, torch.bfloat16)[1].dtype == torch.bfloat16


def test_sglang_scales_as_columns():
    x = torch.randn(7, 64)
    q, s = sglang.per_token_group_quant_fp8(x, 16)
    for aligned, stride in ((False, 7), (True, 8)):
        q2, s2 = sglang.per_token_group_quant_fp8(x, 16, column_major_scales=True, scale_tma_aligned=aligned)
        assert torch.equal(s2, s) and s2.stride() == (1, stride) and torch.equal(q2.view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("name,value", [("eps", 1e-5), ("scale_ue8m0", True), ("fuse_silu_and_mul", True),
                                        ("masked_m", torch.ones(1))])
def test_sglang_refuses_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        sglang.per_token_group_quant_fp8(torch.randn(4, 32), 16, **{name: value})


def test_sglang_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="dtype"):
        sglang.per_token_group_quant_int8(torch.randn(4, 32), 16, dtype=FP8)
    with pytest.raises(ValueError, match="cal_sum"):
        sglang.per_token_quant_int8(torch.randn(4, 32), cal_sum=True)
    x, ids, weights, w1, w2 = _problem()
    for flags, name in ((dict(use_fp8_w8a8=True, use_int8_w8a8=True), "use_fp8_w8a8 and use_int8_w8a8"),
                        (dict(use_int4_w4a16=True), "block_shape"), (dict(use_int8_w8a8=True), "per_channel_quant"),
                        (dict(use_fp8_w8a8=True, block_shape=[1]), "block_shape"),
                        (dict(use_int8_w8a16=True, block_shape=[16, 16]), "block_shape")):
        with pytest.raises(ValueError, match=name):
            sglang.fused_experts(x, w1, w2, (weights, ids, None), **flags)
    option = type("Options", (), dict(apply_router_weight_on_input=True))
    with pytest.raises(ValueError, match="apply_router_weight_on_input"):
        sglang.fused_experts(x, w1, w2, (weights, ids, None), option)


def test_sglang_other_pieces():
    x, ids, weights, w1, w2 = _problem()
    call = (x, w1, w2, (weights, ids, None))
    y = sglang.fused_moe(*call)
    assert torch.equal(y, sglang.fused_experts(*call))
    options = type("Options", (), dict(no_combine=True))
    slots = sglang.fused_experts(*call, options)
    assert slots.shape == (T, K, H)
    _close(slots.double().sum(1), _layer64(x, ids, weights, w1, w2), 1e-2)
    options = type("Options", (), dict(inplace=True, routed_scaling_factor=2.0))
    given = x.clone()
    assert sglang.fused_experts(given, w1, w2, (weights, ids, None), options).data_ptr() == given.data_ptr()
    _close(given, 2 * _layer64(x, ids, weights, w1, w2), 1e-2)
    h = torch.randn(3, 5, 32)
    out = torch.empty(3, 5, 16)
    assert sglang.silu_and_mul(h, out) is out and torch.allclose(out, F.silu(h[..., :16]) * h[..., 16:], atol=1e-6)
    tanh = F.gelu(h[..., :16], approximate="tanh") * h[..., 16:]
    assert torch.allclose(sglang.gelu_tanh_and_mul(h), tanh, atol=1e-6)
    q, s = sglang.scaled_fp8_quant(h[0], num_token_padding=8)
    assert q.shape == (8, 32) and (q[5:].float() == 0).all() and s.numel() == 1


@pytest.mark.parametrize("module", ["sglang", "vllm", "flashinfer"])
def test_nothing_is_cached_by_address(module):
    """Weights changed in place are used by the next call."""
    x, ids, weights, w1, w2 = _problem()
    gate_first = module != "flashinfer"

    def run():
        if module == "sglang":
            return sglang.fused_experts(x, w1, w2, (weights, ids, None))
        if module == "flashinfer":
            return flashinfer.cutlass_fused_moe(x, ids, weights, w1, w2, torch.bfloat16, [])[0]
        kernel = v0_22.FusedMoEKernel(v0_22.BatchedPrepareAndFinalize(T, E, 1, 0), v0_22.BatchedTritonExperts(
            None, v0_22.FUSED_MOE_UNQUANTIZED_CONFIG, T, 1))
        return kernel.apply(x, w1, w2, weights, ids, v0_22.MoEActivation.SILU, E, None, False)

    for _ in range(3):
        _close(run(), _layer64(x, ids, weights, w1, w2, gate_first), 1e-2)
        w1.copy_(torch.randn_like(w1) * 0.3)
        w2.copy_(torch.randn_like(w2) * 0.3)


# --- vLLM -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["scalar", "row", "block"])
def test_vllm_dequant(form):
    n, k = 37, 50  # no multiple of the block
    t = torch.randn(n, k).to(FP8)
    block = [16, 8] if form == "block" else None
    scale = {"scalar": torch.rand(1) + 0.1, "row": torch.rand(n, 1) + 0.1, "block": torch.rand(3, 7) + 0.1}[form]
    wide = scale if form != "block" else scale.repeat_interleave(16, 0)[:n].repeat_interleave(8, 1)[:, :k]
    old = seed.NaiveBatchedExperts(4, 1, use_fp8_w8a8=True, block_shape=block, per_act_token_quant=form == "row")
    config = v0_22.fp8_w8a8_moe_quant_config(None, None, block_shape=block, per_act_token_quant=form == "row")
    new = v0_22.NaiveBatchedExperts(None, config, 4, 1)
    for experts in (old, new):
        assert torch.equal(experts.dequant(t, scale), t.float() * wide)


def test_vllm_batched_product():
    rows, w = torch.randn(E, 5, H).bfloat16(), torch.randn(E, I, H).bfloat16()
    counts = torch.tensor([5, 0, 2, 1], dtype=torch.int64)
    c = torch.full((E, 5, I), float("nan"), dtype=torch.bfloat16)
    seed.invoke_moe_batched_triton_kernel(rows, w, c, counts, None, None, None, None, False, False, False, {}, False)
    for e, n in enumerate(counts.tolist()):
        if n:
            _close(c[e, :n], rows[e, :n].double() @ w[e].double().T, 1e-2)
        assert c[e, n:].isnan().all(), "rows behind the live ones are not written"


def test_vllm_scale_shapes():
    scale = torch.rand(3, 4)
    assert seed.normalize_scales_shape(None) is None and seed.normalize_scales_shape(scale[0, :1]).shape == (1, 1)
    assert torch.equal(seed.normalize_scales_shape(scale.view(3, 1, 4)), scale)
    assert seed.normalize_batched_scales_shape(torch.tensor(2.0), E).shape == (E, 1, 1)
    assert seed.normalize_batched_scales_shape(torch.rand(E * 5, 3), E).shape == (E, 5, 3)


def test_vllm_seed_surface():
    experts = seed.BatchedTritonExperts(4, 2, use_fp8_w8a8=True)
    assert experts.activation_formats == (seed.FusedMoEActivationFormat.BatchedExperts,) * 2
    assert experts.workspace_shapes(torch.empty(1, 1), None, 1, 8, 6, 2, 3, 3)[:3] == ((3, 8, 8), (3, 8, 4), (3, 8, 6))
    assert experts.quant_dtype == FP8 and experts.block_shape is None and not experts.per_act_token_quant
    assert seed.FusedMoEQuantConfig.make(use_fp8_w8a8=True).is_per_tensor
    assert seed.FusedMoEQuantConfig.make().scale_shape(4, 8) is None
    both = seed.BatchedPrepareAndFinalize(4, 2, 3, 0)
    assert both.activation_format == seed.FusedMoEActivationFormat.BatchedExperts
    with pytest.raises(ValueError, match="use_fp8_w8a8, use_int8_w8a8"):
        seed.FusedMoEQuantConfig.make(use_fp8_w8a8=True, use_int8_w8a8=True)
    with pytest.raises(ValueError, match="max_num_tokens"):
        seed.BatchedTritonExperts(0, 1)


def test_vllm_activations():
    activation = v0_22.MoEActivation
    assert activation.SILU.is_gated and not activation.RELU2_NO_MUL.is_gated
    assert activation.SILU.custom_op_name == "silu_and_mul" and activation.RELU2_NO_MUL.custom_op_name == "relu2"
    assert activation.GELU.without_mul() == activation.GELU_NO_MUL
    assert activation.from_str("gelu_pytorch_tanh") == activation.GELU_TANH
    with pytest.raises(ValueError, match="swish"):
        activation.from_str("swish")
    h, out = torch.randn(3, 32), torch.empty(3, 16)
    v0_22.apply_moe_activation(activation.GELU, out, h)
    assert torch.allclose(out, F.gelu(h[:, :16]) * h[:, 16:], atol=1e-6)
    experts = v0_22.BatchedTritonExperts(None, v0_22.FUSED_MOE_UNQUANTIZED_CONFIG, 4, 1)
    experts.activation(activation.SILU, out, h)
    assert torch.allclose(out, F.silu(h[:, :16]) * h[:, 16:], atol=1e-6)


def test_vllm_sums_and_metadata():
    rows = torch.randn(E, 3, H)
    ids = torch.tensor([[0, 1], [1, 3], [3, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    impl = v0_22.TopKWeightAndReduceNaiveBatched(0)
    place, seen = {}, [0] * E
    for t in range(3):
        for j, e in enumerate(ids[t].tolist()):
            place[t, j] = seen[e]
            seen[e] += 1
    expected = torch.stack([sum(weights[t, j] * rows[ids[t, j], place[t, j]] for j in range(2)) for t in range(3)])
    assert torch.allclose(impl.apply(None, rows, weights, ids, False), expected, atol=1e-5)
    assert impl == v0_22.TopKWeightAndReduceNaiveBatched(0) and impl != v0_22.TopKWeightAndReduceNaiveBatched(1)
    with pytest.raises(RuntimeError, match="finalize"):
        v0_22.TopKWeightAndReduceDelegate().apply(None, rows, weights, ids, False)
    meta = v0_22.ExpertTokensMetadata.make_from_list([3, 0], rows.device)
    assert meta.expert_num_tokens.tolist() == [3, 0] and meta.expert_num_tokens_cpu.device.type == "cpu"


def test_vllm_what_callers_ask():
    both = v0_22.BatchedPrepareAndFinalize(4, 2, 1, 0)
    assert not both.output_is_reduced() and not both.supports_async() and both.on_commit() is None
    experts = v0_22.BatchedTritonExperts(None, v0_22.FUSED_MOE_UNQUANTIZED_CONFIG, 4, 1)
    assert not (experts.is_monolithic() or experts.supports_lora() or experts.supports_expert_map()
                or experts.supports_packed_ue8m0_act_scales())
    assert experts.process_weights_after_loading(None) is None
    kernel = v0_22.FusedMoEKernel(both, experts)
    assert not (kernel.supports_expert_map() or kernel.supports_lora() or kernel.output_is_reduced())
    config = v0_22.fp8_w8a8_moe_quant_config(None, None)
    assert config.config_name(torch.bfloat16) == "fp8_w8a8"
    assert v0_22.FUSED_MOE_UNQUANTIZED_CONFIG.config_name(torch.float32) == "float32"
    with pytest.raises(ValueError, match="shared_experts"):
        kernel.apply(*[None] * 9, shared_experts=object())
    with pytest.raises(ValueError, match="per_act_token_quant"):
        v0_22.fp8_w8a8_moe_quant_config(None, None, per_act_token_quant=True, block_shape=[16, 16])


def test_vllm_mxfp4():
    values = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6])
    q1, q2 = (torch.randint(0, 256, s, dtype=torch.uint8) for s in ((E, 2 * I, H // 2), (E, H, I // 2)))
    s1, s2 = (torch.randint(118, 123, (E, q.shape[1], q.shape[2] // 16), dtype=torch.uint8) for q in (q1, q2))

    def numbers(q, s):
        pair = torch.stack([q & 15, q >> 4], -1).reshape(*q.shape[:-1], -1).long()
        return values[pair] * torch.exp2(s.float() - 127).repeat_interleave(32, 2)

    x, ids, weights, _, _ = _problem()
    kernel = v0_22.FusedMoEKernel(v0_22.BatchedPrepareAndFinalize(T, E, 1, 0), v0_22.BatchedTritonExperts(
        None, v0_22.mxfp4_w4a16_moe_quant_config(s1, s2), T, 1))
    y = kernel.apply(x, q1, q2, weights, ids, v0_22.MoEActivation.SILU, E, None, False)
    _close(y, _layer64(x, ids, weights, numbers(q1, s1), numbers(q2, s2)), 1e-2)
