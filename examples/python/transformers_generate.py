# SPDX-License-Identifier: Apache-2.0
"""Text generation through transformers with this library's experts: one import and one argument.

    python transformers_generate.py [MODEL]    a directory or a hub name; without one, a tiny random Qwen3-MoE
"""

import sys

import torch
import transformers

import moesaic.integrations.transformers  # noqa: F401  registers experts_implementation="moesaic"

if len(sys.argv) > 1:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="moesaic")
    ids = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("The mixture of", return_tensors="pt").input_ids
else:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, moe_intermediate_size=48, num_experts=8,
                                         num_experts_per_tok=2, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moesaic")
    ids = torch.tensor([[3, 14, 15, 92]])
out = model.eval().generate(ids, max_new_tokens=8, do_sample=False)
print("tokens:", out[0].tolist())
