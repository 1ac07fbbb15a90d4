# SPDX-License-Identifier: Apache-2.0
"""One Qwen3-MoE layer of real width on the CPU: ours against transformers' eager and grouped_mm.

    python bench/python_transformers.py [--dtype bfloat16 float32] [--tokens 1 16 128 512] [--rounds 7] [--overhead]

All three run in this process, in turns, so that a busy machine is busy for all of them; medians and minima, in ms.
(How far ours is from what the machine can do is `moesaic bench`'s question.)
--overhead: microseconds of a Layer.forward that has nothing to do (T = 0).
"""

import argparse
import copy
import platform
import statistics
import time

import numpy as np
import torch
import transformers

import moesaic
import moesaic.integrations.transformers  # noqa: F401

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 128, 2048, 768, 8


def machine():
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def modules(dtype):
    config = transformers.Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS,
                                         num_experts_per_tok=TOP_K)
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config).to(dtype).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-0.03, 0.03)
    ours = copy.deepcopy(theirs)
    ours.config = copy.deepcopy(config)
    ours.config._experts_implementation = "moesaic"
    return theirs, ours


def compare(dtype, tokens_list, rounds):
    theirs, ours = modules(dtype)

    def run(name, x, ids, weights):
        module = ours if name == "moesaic" else theirs
        if module is theirs:
            theirs.config._experts_implementation = name
        start = time.perf_counter()
        y = module(x, ids, weights)
        return (time.perf_counter() - start) * 1e3, y

    print(f"{str(dtype).split('.')[1]}, ms (medians of {rounds})\n"
          "| T | moesaic | eager | grouped_mm | better one / moesaic | least of each |\n"
          "|---|---|---|---|---|---|")
    with torch.no_grad():
        for tokens in tokens_list:
            x = torch.randn(tokens, HIDDEN).to(dtype)
            weights, ids = torch.softmax(torch.randn(tokens, EXPERTS), -1).topk(TOP_K)
            weights = weights.to(dtype)
            times = {name: [] for name in ("moesaic", "eager", "grouped_mm")}
            for name in times:  # warm up; and the answers agree
                _, y = run(name, x, ids, weights)
                truth = y.float() if name == "moesaic" else truth
                error = (y.float() - truth).norm() / truth.norm()
                assert error < 2e-2, f"{name}: {error}"
            for _ in range(rounds if tokens > 16 else 3 * rounds):
                for name in times:
                    times[name].append(run(name, x, ids, weights)[0])
            m, e, g = (statistics.median(t) for t in times.values())
            least = " / ".join(f"{min(t):.2f}" for t in times.values())
            print(f"| {tokens} | {m:.2f} | {e:.2f} | {g:.2f} | {min(e, g) / m:.2f} | {least} |", flush=True)


def overhead():
    """A call with T = 0 returns at once: what it takes is what Python and the binding take."""
    layer = moesaic.Layer(experts=2, hidden=8, intermediate=8, top_k=1, max_tokens=8, scheme="f32")
    layer.load(dict(weight=np.zeros((2, 16, 8), np.float32)), dict(weight=np.zeros((2, 8, 8), np.float32)))
    arrays = np.zeros((0, 8), np.float32), np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)
    for name, (x, ids, weights) in (("numpy", arrays), ("torch", tuple(map(torch.from_numpy, arrays)))):
        for what, output in (("new output", None), ("output given", x.copy() if name == "numpy" else x.clone())):
            best = []
            for _ in range(20):
                start = time.perf_counter()
                for _ in range(500):
                    layer.forward(x, ids, weights, output=output)
                best.append((time.perf_counter() - start) / 500 * 1e6)
            print(f"{name}, {what}: {min(best):.2f} us (median {statistics.median(best):.2f})")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--overhead", action="store_true")
    options = parser.parse_args()
    print(machine())
    if options.overhead:
        return overhead()
    for dtype in options.dtype:
        compare(getattr(torch, dtype), options.tokens, options.rounds)


if __name__ == "__main__":
    main()
