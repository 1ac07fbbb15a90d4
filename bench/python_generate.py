# SPDX-License-Identifier: Apache-2.0
"""A whole Qwen3-MoE model with random weights, generating greedily on the CPU: ours against transformers' eager experts.

    python bench/python_generate.py [--dtype float32 bfloat16] [--layers 4] [--tokens 32] [--prompt 64]

The layers have the width of Qwen3-30B-A3B. Compares tokens in float32 up to the first one whose two best logits lie nearer
to each other than the margin, as a different order of summation may swap those; and prints the time of a token and the
share of it spent in the experts, for both in turns.
"""

import argparse
import copy
import statistics
import time

import torch
import transformers

import moesaic.integrations.transformers  # noqa: F401

MARGIN = 1e-3  # of the logits' spread


def models(dtype, layers):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
    theirs = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=dtype).eval()
    ours = copy.deepcopy(theirs)
    ours.set_experts_implementation("moesaic")
    return theirs, ours


def clock(model):
    """Seconds spent in the model's experts since the last read."""
    spent, begun = [0.0], [0.0]
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
            module.register_forward_hook(
                lambda *_: spent.__setitem__(0, spent[0] + time.perf_counter() - begun[0]))

    def read():
        value, spent[0] = spent[0], 0.0
        return value

    return read


def generate(model, ids, tokens):
    start = time.perf_counter()
    out = model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, use_cache=True,
                         pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    return time.perf_counter() - start, out.sequences[0, ids.shape[1]:].tolist(), torch.stack(out.logits)[:, 0].float()


def check(theirs, ours, logits):
    """Equal tokens until the best two of theirs are too near to each other to tell."""
    for i, (a, b) in enumerate(zip(theirs, ours)):
        best = logits[i].topk(2).values
        if (best[0] - best[1]) < MARGIN * logits[i].std():
            return f"equal for {i} tokens; the next one's two best logits are within the margin"
        assert a == b, f"token {i}: {a} and {b}, with a margin of {best[0] - best[1]}"
    return f"all {len(theirs)} tokens equal"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.dtype:
        pair = models(getattr(torch, name), options.layers)
        clocks = [clock(model) for model in pair]
        ids = torch.randint(3, 4096, (1, options.prompt))
        with torch.no_grad():
            warm = [generate(model, ids, 2) for model in pair]  # ours packs here
            del warm
            for read in clocks:
                read()
            seconds, shares, outputs = ([], []), ([], []), [None, None]
            for _ in range(options.rounds):
                for i, model in enumerate(pair):
                    taken, *outputs[i] = generate(model, ids, options.tokens)
                    seconds[i].append(taken)
                    shares[i].append(clocks[i]() / taken)
        verdict = check(outputs[0][0], outputs[1][0], outputs[0][1]) if name == "float32" else "tokens not compared"
        for i, what in enumerate(("eager", "moesaic")):
            each = statistics.median(seconds[i]) / options.tokens * 1e3
            print(f"{name}, {what}: {each:.1f} ms a token (prompt of {options.prompt} included), "
                  f"{statistics.median(shares[i]):.2f} of it in the experts")
        print(f"{name}: {verdict}", flush=True)


if __name__ == "__main__":
    main()
