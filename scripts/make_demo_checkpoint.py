#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoint of `make demo`: a tiny Qwen3-MoE with random weights, through the transformers
library and in the layout it publishes.

    make_demo_checkpoint.py [OUT_DIR]      default: examples/data/qwen3-moe-tiny
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig


def main():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(root, "examples", "data", "qwen3-moe-tiny")
    config = Qwen3MoeConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=48, norm_topk_prob=True,
        decoder_sparse_step=1, intermediate_size=256, vocab_size=256, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if ".mlp." in name:  # unit gain, so that the layer's output is worth looking at
            p.data.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
