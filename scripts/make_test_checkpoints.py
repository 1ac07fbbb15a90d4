#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes one small checkpoint per model family with the transformers library, in the layout it
publishes and in the fused one it works with, and beside each what that library's own MoE layer
computes, so that tests can compare with an implementation nobody here wrote.

    make_test_checkpoints.py OUT_DIR [FAMILY ...]

OUT_DIR/FAMILY[-fused]/   config.json, model*.safetensors, and reference.safetensors:
    hidden_states   bf16 [T, H]   the input of layer 1's MoE block
    topk_ids        i32  [T, k]   the router's choice, and
    topk_weights    f32  [T, k]   its weights, in float32
    output          f32  [T, H]   the block's output in float32 on the same bf16 weights
    routed          f32  [T, H]   the same without shared experts
    fc1, fc2        bf16 [E, 2I, H], [E, H, I]   the experts' weights as the layer holds them
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LAYER = 1
TOKENS = 33
COMMON = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
LATENT = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
FAMILIES = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=40),
    "qwen2_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40,
                      shared_expert_intermediate_size=72, decoder_sparse_step=1),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=32,
                      norm_topk_prob=True),
    "deepseek_v2": dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40,
                        n_shared_experts=2, n_group=4, topk_group=2, topk_method="group_limited_greedy",
                        first_k_dense_replace=1, routed_scaling_factor=2.5, **LATENT),
    "deepseek_v3": dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40,
                        n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1, **LATENT),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3, intermediate_size=40),
    "phimoe": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=40),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=3, moe_intermediate_size=40, moe_num_shared_experts=2,
                         moe_layer_start_index=1),
    "glm4_moe": dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=40,
                     n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=32,
                     routed_scaling_factor=1.5),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=3, intermediate_size=40, head_dim=32),
    "llama4_text": dict(num_local_experts=8, num_experts_per_tok=1, intermediate_size=40,
                        intermediate_size_mlp=96, head_dim=32, interleave_moe_layer_step=1),
}
TRANSPOSED = ("gpt_oss", "llama4_text")  # experts stored [E, H, 2I] and [E, I, H]


def randomize(block, generator):
    """Weights of about unit gain, and biases that matter."""
    for name, p in list(block.named_parameters()) + list(block.named_buffers()):
        scale = 0.3 if "bias" in name else p.shape[-1] ** -0.5
        p.data.copy_((torch.randn(p.shape, generator=generator) * scale).to(p.dtype))


def route(block, x):
    router = block.gate if hasattr(block, "gate") else block.router
    if type(router).__name__ == "Llama4Router":
        scores, logits = router(x)
        ids = logits.argmax(dim=-1, keepdim=True)
        return ids, scores.gather(1, ids)
    _, weights, ids = router(x)
    return ids, weights


def run(block, x):
    out = block(x.unsqueeze(0))
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(x.shape)


def reference(family, model, generator):
    layer = model.model.layers[LAYER]
    block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    experts = block.experts
    fc1, fc2 = experts.gate_up_proj.data, experts.down_proj.data
    if family in TRANSPOSED:
        fc1, fc2 = fc1.transpose(1, 2), fc2.transpose(1, 2)
    tensors = {"fc1": fc1.contiguous().clone(), "fc2": fc2.contiguous().clone()}
    x = torch.randn(TOKENS, COMMON["hidden_size"], generator=generator).to(torch.bfloat16)
    tensors["hidden_states"] = x
    block = block.float().eval()
    with torch.no_grad():
        ids, weights = route(block, x.float())
        tensors["topk_ids"], tensors["topk_weights"] = ids.to(torch.int32), weights.float()
        tensors["output"] = run(block, x.float())
        for name in ("shared_expert", "shared_experts"):
            if getattr(block, name, None) is not None:
                getattr(block, name).down_proj.weight.zero_()
        tensors["routed"] = run(block, x.float())
    return {k: v.contiguous() for k, v in tensors.items()}


def main():
    out = sys.argv[1]
    for family in sys.argv[2:] or FAMILIES:
        generator = torch.Generator().manual_seed(sum(family.encode()))
        config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layer = model.model.layers[LAYER]
        randomize(layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp, generator)
        # The published layout in several shards, the fused one in one file: both are read.
        folders = [(os.path.join(out, family), dict(max_shard_size="64KB"))]
        if family not in TRANSPOSED:
            folders.append((os.path.join(out, family + "-fused"), dict(save_original_format=False)))
        for folder, how in folders:
            model.save_pretrained(folder, **how)
        tensors = reference(family, model, generator)
        for folder, _ in folders:
            save_file(tensors, os.path.join(folder, "reference.safetensors"))
        print(family)


if __name__ == "__main__":
    main()
