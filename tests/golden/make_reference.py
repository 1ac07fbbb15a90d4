#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the golden files beside it: answers that PyTorch, transformers and NumPy give, so that the
C++ oracle is checked by something written independently.

    python tests/golden/make_reference.py      (torch, transformers >= 5, numpy, ml_dtypes, safetensors)

layer_<family>.safetensors  one MoE block of transformers with random weights, and its output, computed
                            in float64 and stored in f32
pieces.safetensors          activations, quantizers, dequantization and routing
"""
import pathlib

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 9, 24, 16, 8, 3


def randomize(module, generator):
    """Normal weights that bf16 holds exactly, so that 16-bit files say all of them."""
    with torch.no_grad():
        tensors = list(module.parameters()) + list(module.buffers())
        for t in tensors:
            size = 0.3 if t.dim() == 1 else 1.2 / t.shape[-1] ** 0.5
            t.copy_(torch.randn(t.shape, generator=generator).mul(size).bfloat16().to(t.dtype))


def run(module, x):
    """float64 where the module lets it (some routers insist on float32 for their logits)."""
    with torch.no_grad():
        out = module.double().eval()(x.double()[None])
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(x.shape).float()


def layer(family, config, block, tensors, **entries):
    generator = torch.Generator().manual_seed(20 + len(family))
    config._experts_implementation = "eager"
    module = block(config)
    randomize(module, generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    out = {name: t.detach().bfloat16().contiguous() for name, t in tensors(module).items()}
    out["x"] = x
    out["output"] = run(module, x)
    save_file(out, HERE / f"layer_{family}.safetensors", {k: str(v) for k, v in entries.items()})


def mlp(m):
    return {"shared_fc1": torch.cat([m.gate_proj.weight, m.up_proj.weight])[None], "shared_fc2": m.down_proj.weight[None]}


def experts(m, router, **more):
    return {"fc1": m.gate_up_proj, "fc2": m.down_proj, "router": router, **more}


def layers():
    from transformers.models.deepseek_v3 import configuration_deepseek_v3 as cd, modeling_deepseek_v3 as md
    from transformers.models.ernie4_5_moe import configuration_ernie4_5_moe as ce, modeling_ernie4_5_moe as me
    from transformers.models.gpt_oss import configuration_gpt_oss as cg, modeling_gpt_oss as mg
    from transformers.models.llama4 import configuration_llama4 as cl, modeling_llama4 as ml
    from transformers.models.mixtral import configuration_mixtral as cm, modeling_mixtral as mm
    from transformers.models.phimoe import configuration_phimoe as cp, modeling_phimoe as mp
    from transformers.models.qwen2_moe import configuration_qwen2_moe as c2, modeling_qwen2_moe as m2
    from transformers.models.qwen3_moe import configuration_qwen3_moe as c3, modeling_qwen3_moe as m3

    small = dict(hidden_size=HIDDEN, num_experts_per_tok=TOP_K)
    layer("mixtral", cm.MixtralConfig(**small, intermediate_size=WIDTH, num_local_experts=EXPERTS),
          mm.MixtralSparseMoeBlock, lambda m: experts(m.experts, m.gate.weight),
          routing="renormalize", top_k=TOP_K)
    layer("qwen3_moe", c3.Qwen3MoeConfig(**small, moe_intermediate_size=WIDTH, num_experts=EXPERTS, norm_topk_prob=True),
          m3.Qwen3MoeSparseMoeBlock, lambda m: experts(m.experts, m.gate.weight),
          routing="renormalize", top_k=TOP_K)
    layer("qwen2_moe", c2.Qwen2MoeConfig(**small, moe_intermediate_size=WIDTH, num_experts=EXPERTS, norm_topk_prob=False,
                                         shared_expert_intermediate_size=20),
          m2.Qwen2MoeSparseMoeBlock,
          lambda m: experts(m.experts, m.gate.weight, shared_gate=m.shared_expert_gate.weight[0], **mlp(m.shared_expert)),
          routing="softmax_topk", top_k=TOP_K, shared_intermediate=20)
    layer("gpt_oss", cg.GptOssConfig(**small, intermediate_size=WIDTH, num_local_experts=EXPERTS, swiglu_limit=1.5),
          mg.GptOssMLP,  # stored as the model stores them: [E, H, 2I] interleaved, [E, I, H]
          lambda m: experts(m.experts, m.router.weight, fc1_bias=m.experts.gate_up_proj_bias,
                            fc2_bias=m.experts.down_proj_bias, router_bias=m.router.bias),
          routing="renormalize", top_k=TOP_K, activation="swiglu_oai", layout="interleaved", transposed=1, limit=1.5)
    layer("deepseek_v3", cd.DeepseekV3Config(**small, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, n_group=4,
                                             topk_group=2, n_shared_experts=1, norm_topk_prob=True,
                                             routed_scaling_factor=2.5),
          md.DeepseekV3MoE,
          lambda m: experts(m.experts, m.gate.weight, selection_bias=m.gate.e_score_correction_bias, **mlp(m.shared_experts)),
          routing="deepseek_v3", top_k=TOP_K, groups=4, topk_groups=2, scale=2.5, shared_intermediate=WIDTH)
    layer("ernie4_5", ce.Ernie4_5_MoeConfig(**small | {"moe_k": TOP_K}, moe_intermediate_size=WIDTH, moe_num_experts=EXPERTS,
                                            moe_num_shared_experts=2),
          me.Ernie4_5_MoeSparseMoeBlock,
          lambda m: experts(m.experts, m.gate.weight, selection_bias=m.gate.moe_statics.e_score_correction_bias[0],
                            **mlp(m.shared_experts)),
          routing="softmax_bias", top_k=TOP_K, shared_intermediate=2 * WIDTH)
    layer("phimoe", cp.PhimoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS,
                                    num_experts_per_tok=2, router_jitter_noise=0.4),
          mp.PhimoeSparseMoeBlock, lambda m: experts(m.experts, m.router.weight),
          routing="sparsemixer", top_k=2, jitter=0.4)
    layer("llama4", cl.Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=4,
                                        num_experts_per_tok=1),
          ml.Llama4TextMoe, lambda m: experts(m.experts, m.router.weight, **mlp(m.shared_expert)),
          routing="llama4", top_k=1, transposed=1, weight_on="input", shared_intermediate=WIDTH)


# --- pieces -------------------------------------------------------------------------------------------

def activations(out, rng):
    g = torch.tensor(rng.normal(size=257) * 3, dtype=torch.float64).float().double()
    u = torch.tensor(rng.normal(size=257) * 3, dtype=torch.float64).float().double()
    alpha, beta, limit = 1.702, 0.75, 2.5
    f = torch.nn.functional
    clamp = lambda t: t.clamp(-limit, limit)
    gate = g.clamp(max=limit)
    answers = {
        "silu": f.silu(g), "gelu": f.gelu(g), "gelu_tanh": f.gelu(g, approximate="tanh"), "relu": f.relu(g),
        "relu2": f.relu(g) ** 2, "identity": g, "swiglu": f.silu(g) * u, "geglu": f.gelu(g) * u,
        "geglu_tanh": f.gelu(g, approximate="tanh") * u,
        "swiglu_oai": gate * torch.sigmoid(alpha * gate) * (clamp(u) + beta),
        "swiglu_clamp": f.silu(gate) * clamp(u), "swiglu_step": f.silu(g).clamp(max=limit) * clamp(u),
    }
    out["act.g"], out["act.u"] = g.float(), u.float()
    for name, value in answers.items():
        out[f"act.{name}"] = value.float()


def quantizers(out, rng):
    """In fp32, as the library promises: scale = max(absmax, 1e-10) / limit, q = round(x * (1 / scale))."""
    x = torch.tensor(rng.normal(size=(7, 40)) * np.exp(rng.normal(size=(7, 1)))).bfloat16()
    x[3] = 0
    x[4, 5] = 300.0
    out["quant.x"] = x
    x = x.float().numpy()
    groups = x.reshape(7, 5, 8)

    def scaled(values, limit):
        scale = np.maximum(np.abs(values).max(-1, keepdims=True), np.float32(1e-10)) / np.float32(limit)
        return scale, values * (np.float32(1) / scale)

    for name, values in (("token", x), ("group8", groups)):
        scale, v = scaled(values, 448)
        q = np.clip(v, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        out[f"quant.fp8.{name}"] = torch.tensor(q.view(np.uint8).reshape(7, 40))
        out[f"quant.fp8.{name}.scale"] = torch.tensor(scale.reshape(7, -1))
        scale, v = scaled(values, 127)
        q = np.sign(v) * np.floor(np.abs(v) + np.float32(0.5))
        out[f"quant.i8.{name}"] = torch.tensor(q.astype(np.int8).reshape(7, 40))
        out[f"quant.i8.{name}.scale"] = torch.tensor(scale.reshape(7, -1))


def dequantization(out, rng):
    """E 2, N 6, K 40; groups of 16 with a short last one, blocks of 4 x 16."""
    e, n, k, g = 2, 6, 40, 16
    cells = (k + g - 1) // g
    spread = lambda t: np.repeat(t, g, axis=-1)[..., :k]
    group_scale = np.exp(rng.normal(size=(e, n, cells))).astype(np.float32)
    out["dequant.group_scale"] = torch.tensor(group_scale)
    q4, z4 = rng.integers(0, 16, (e, n, k)), rng.integers(0, 16, (e, n, cells))
    out["dequant.u4"] = torch.tensor((q4[..., ::2] | q4[..., 1::2] << 4).astype(np.uint8))
    out["dequant.u4.zero"] = torch.tensor((z4[:, ::2] | z4[:, 1::2] << 4).astype(np.uint8))
    out["dequant.u4.zp"] = torch.tensor(((q4 - spread(z4)) * spread(group_scale)).astype(np.float32))
    out["dequant.u4.nozp"] = torch.tensor(((q4 - 8) * spread(group_scale)).astype(np.float32))
    q8, z8 = rng.integers(0, 256, (e, n, k)), rng.integers(0, 256, (e, n, cells))
    out["dequant.u8"], out["dequant.u8.zero"] = torch.tensor(q8.astype(np.uint8)), torch.tensor(z8.astype(np.uint8))
    out["dequant.u8.zp"] = torch.tensor(((q8 - spread(z8)) * spread(group_scale)).astype(np.float32))
    fp8 = (rng.normal(size=(e, n, k)) * 60).astype(ml_dtypes.float8_e4m3fn)
    block_scale = np.exp(rng.normal(size=(e, 2, cells))).astype(np.float32)
    out["dequant.fp8"] = torch.tensor(fp8.view(np.uint8)).view(torch.float8_e4m3fn)
    out["dequant.fp8.block_scale"] = torch.tensor(block_scale)
    out["dequant.fp8.block"] = torch.tensor(fp8.astype(np.float32) * spread(np.repeat(block_scale, 4, axis=1)[:, :n]))
    fp4 = rng.normal(size=(e, n, 64)).astype(ml_dtypes.float4_e2m1fn)
    e8m0 = rng.integers(118, 134, (e, n, 2)).astype(np.uint8)
    nibbles = fp4.view(np.uint8) & 15
    out["dequant.mxfp4"] = torch.tensor((nibbles[..., ::2] | nibbles[..., 1::2] << 4).astype(np.uint8))
    out["dequant.mxfp4.scale"] = torch.tensor(e8m0)
    powers = e8m0.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    out["dequant.mxfp4.values"] = torch.tensor(fp4.astype(np.float32) * np.repeat(powers, 32, axis=-1))
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    out["dequant.e4m3_table"] = torch.tensor(every)


def routing(out, rng):
    """The methods that no block above exercises, from their one-line definitions (contracts, section 4)."""
    z = torch.tensor(rng.normal(size=(12, 16)) * 2).float()
    z[0, 3] = z[0, 9]  # a tie: the lower id first
    bias = torch.tensor(rng.normal(size=16) * 0.1).float()
    out["route.logits"], out["route.bias"] = z, bias
    z, bias = z.double(), bias.double()
    softmax, sigmoid = z.softmax(-1), z.sigmoid()
    spread = z.clone()
    spread = torch.sqrt(torch.nn.functional.softplus(spread))

    def top(scores):  # a stable sort keeps the lower id first
        return torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :4]

    def put(name, scores, weights, divide, scale=1.0):
        ids = top(scores)
        w = weights.gather(1, ids)
        w = (w / w.sum(-1, keepdim=True) if divide else w) * scale
        out[f"route.{name}.ids"], out[f"route.{name}.weights"] = ids.int(), w.float()

    put("softmax_topk", softmax, softmax, False)
    put("renormalize", z, z.exp(), True)
    put("topk", z, z, False)
    put("sigmoid", sigmoid, sigmoid, False)
    put("sigmoid_renorm", sigmoid, sigmoid, True)
    put("minimax2", sigmoid + bias, sigmoid, True, 1.5)
    put("sqrtsoftplus", spread + bias, spread, True, 1.5)
    put("softmax_bias", softmax + bias, softmax, True)
    groups = softmax.view(12, 4, 4).max(-1).values
    kept = torch.argsort(groups, dim=-1, descending=True, stable=True)[:, :2]
    mask = torch.zeros(12, 4).scatter_(1, kept, 1).repeat_interleave(4, 1).bool()
    put("deepseek_v2", softmax.masked_fill(~mask, -1), softmax, False, 1.5)


def main():
    layers()
    rng = np.random.default_rng(7)
    out = {}
    for part in (activations, quantizers, dequantization, routing):
        part(out, rng)
    save_file({name: t.contiguous() for name, t in out.items()}, HERE / "pieces.safetensors")


if __name__ == "__main__":
    main()
