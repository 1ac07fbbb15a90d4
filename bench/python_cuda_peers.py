# SPDX-License-Identifier: Apache-2.0
"""On a GPU, in one process: ours beside PyTorch's grouped products, and beside the Triton kernels of a vLLM or SGLang of yours.

    python bench/python_cuda_peers.py [--shapes qwen3-30b-a3b] [--schemes bf16 fp8_block int4_w4a16] [--tokens 1 16 128 1024 8192]
        [--vllm FOLDER] [--sglang FOLDER] [--tiles tiles.json] [--parts] [--rounds 15] [--json rows.json]

Whole layers: a moesaic.Layer; a layer of torch._grouped_mm (bf16); SGLang's products, activation and sum, with our lists of
rows and our quantizer, as its own are compiled. Products: what the drop-in modules are called with, that is unpacked weights and the
lists of align: the peer's two products; ours through grouped_gemm; and moesaic.experts, which has the activation (and in fp8 its
quantizer) besides. The target is ours at most 1.05 of the peer's.

FOLDER holds the package `vllm` or `sglang`. Of each only the file with the Triton kernels is imported; what it imports
besides is replaced by stand-ins that do nothing, so a bare source tree does as well as an installed one. A peer takes the tiles of
its own configuration files or its default; --tiles adds others: a JSON list of {"peer", "scheme", "shape", "tokens", "config"}, the
fastest of which counts. (For SGLang a config may have "up_tma" and "down_tma": weights of both, and rows of the
second product, through TMA.)

Calls are captured in graphs, each call with its own routing and, where the weights would fit into the cache, with its own
weights; replays of all graphs of a row take turns, and medians are compared. --parts: instead, where a layer's time goes, by CUPTI.
"""
import argparse
import json
import os
import shutil
import statistics
import sys

import torch

import moesaic
from triton_peers import BLOCK, Sglang, Tiles, Vllm

SHAPES = {  # experts, hidden, intermediate, top k
    "mixtral-8x7b": (8, 4096, 14336, 2), "qwen3-30b-a3b": (128, 2048, 768, 8), "deepseek-v3-tp8": (256, 7168, 256, 8),
    "deepseek-v3-ep8": (32, 7168, 2048, 8), "gpt-oss-120b-like": (128, 2880, 2880, 4), "qwen3-next-512": (512, 2048, 512, 10)}
TARGET = 1.05
DEVICE = "cuda:0"


# --- what is computed
class Weights:
    """Unpacked, as checkpoints hold them: fc1 and fc2 are (weight [E, N, K], scale or None)."""
    def __init__(self, case):
        self.fc1 = self.make(case, 2 * case.intermediate, case.hidden)
        self.fc2 = self.make(case, case.hidden, case.intermediate)

    @staticmethod
    def make(case, n, k):
        shape, device = (case.experts, n, k), DEVICE
        if case.scheme == "int4_w4a16":
            weight = torch.randint(0, 256, (case.experts, n, k // 2), dtype=torch.uint8, device=device)
            return weight, (0.5 + torch.rand(case.experts, n, k // BLOCK, device=device)) * k**-0.5 / 4.6
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn if case.scheme == "fp8_block" else torch.bfloat16, device=device)
        for e in range(case.experts):  # one at a time, so that what is drawn stays small
            drawn = torch.randn(n, k, dtype=torch.bfloat16, device=device)
            weight[e] = (drawn if case.scheme == "fp8_block" else drawn * k**-0.5).to(weight.dtype)
        if case.scheme != "fp8_block":
            return weight, None
        grid = case.experts, -(-n // BLOCK), -(-k // BLOCK)
        return weight, (0.5 + torch.rand(grid, device=device)) * k**-0.5

    def named(self):
        return tuple(dict(weight=w) if s is None else dict(weight=w, scale=s) for w, s in (self.fc1, self.fc2))


class Case:
    def __init__(self, shape, scheme, tokens):
        self.shape, self.scheme, self.tokens = shape, scheme, tokens
        self.experts, self.hidden, self.intermediate, self.top_k = SHAPES[shape]
        self.slots = tokens * self.top_k

    def quant(self):
        return dict(scheme=self.scheme, **(dict(group_size=BLOCK) if self.scheme == "int4_w4a16" else {}))

    def config(self, input_dtype="bf16"):
        return dict(experts=self.experts, hidden=self.hidden, intermediate=self.intermediate, top_k=self.top_k, max_tokens=self.tokens,
                    quant=self.quant(), activation=dict(kind="swiglu"), routing=dict(method="renormalize"), input_dtype=input_dtype,
                    output_dtype="bf16")

    def quantized(self, rows):
        return moesaic.quantize(rows, granularity="group", group_size=BLOCK) if self.scheme == "fp8_block" else (rows, None)

    def routing(self):
        p, ids = torch.softmax(torch.randn(self.tokens, self.experts, device=DEVICE), -1).topk(self.top_k)
        return ids.to(torch.int32), (p / p.sum(-1, keepdim=True)).contiguous()


def our_products(case, weights, block, a, act, h, c, lists, p):
    """The order of the rows in between is the peer's: by slot, or as the lists have them where `h` is as long as these."""
    between = "slot" if h.shape[0] == case.slots else "sorted"
    for rows, b, out, second in ((a, weights.named()[0], h, False), (act, weights.named()[1], c, True)):
        moesaic.grouped_gemm(rows[0], b, out, quant=case.quant(), a_scale=rows[1], slots=lists[0], block_experts=lists[1], num_padded=lists[2],
                             block_rows=block, top_k=1 if second else case.top_k, row_weights=p.view(-1) if second else None,
                             a_order=between if second else "slot", c_order="slot" if second else between)


def our_experts(case, weights, block, a, c, lists, p):
    fc1, fc2 = weights.named()
    moesaic.experts(case.config("fp8_e4m3" if case.scheme == "fp8_block" else "bf16"), a[0], c, weights=dict(fc1=fc1, fc2=fc2), slots=lists[0],
                    block_experts=lists[1], num_padded=lists[2], block_rows=block, row_scale=a[1], row_weights=p.view(-1))


def torch_layer(case, weights, x, ids, p):
    flat, order = torch.sort(ids.view(-1), stable=True)
    ends = torch.searchsorted(flat, torch.arange(case.experts, dtype=flat.dtype, device=DEVICE), right=True).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // case.top_k], weights.fc1[0].transpose(1, 2), ends).chunk(2, -1)
    rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, weights.fc2[0].transpose(1, 2), ends)
    by_slot = torch.empty_like(rows)
    by_slot[order] = rows
    return torch.bmm(p.to(torch.bfloat16).unsqueeze(1), by_slot.view(case.tokens, case.top_k, -1)).squeeze(1)


# --- time
def calls_of(tokens):
    return 8 if tokens <= 256 else 4 if tokens <= 2048 else 2


def graph_of(calls):
    for call in calls:
        call()  # compiles and loads kernels outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def times_of(graphs, rounds, calls):
    """{name: ms per call, the median of `rounds`}; all take turns, forth and back."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    out = {name: [] for name in graphs}
    for i in range(rounds + 2):
        for name in list(graphs)[:: 1 if i % 2 else -1]:
            events[0].record()
            graphs[name].replay()
            events[1].record()
            events[1].synchronize()
            if i >= 2:
                out[name].append(events[0].elapsed_time(events[1]) / calls)
    return {name: statistics.median(times) for name, times in out.items()}


def fastest(candidates, make, rounds, calls):
    """(graph, config) of the fastest of a peer's tile configurations; those that do not compile are left out, with a word."""
    best = None
    for config in candidates:
        try:
            graph = graph_of(make(config))
        except Exception as error:  # too much shared memory, say
            print(f"  left out: {config}: {type(error).__name__} {str(error)[:120]}", file=sys.stderr)
            continue
        ms = times_of({"it": graph}, 5, calls)["it"] if len(candidates) > 1 else 0
        if best is None or ms < best[0]:
            best = ms, graph, config
    return best and best[1:]


def difference(mine, theirs):
    return ((mine.float() - theirs.float()).norm() / theirs.float().norm()).item()


def candidates_of(peer, tiles, case):
    return [peer.own(case), *tiles.of(peer.name, case)]


class Bench:
    def __init__(self, options, peers):
        self.options, self.peers, self.tiles, self.rows = options, peers, Tiles(options.tiles), []

    def run(self, shape, scheme):
        first = Case(shape, scheme, 1)
        weights = [Weights(first)]
        bytes_ = sum(t.numel() * t.element_size() for pair in (weights[0].fc1, weights[0].fc2) for t in pair if t is not None)
        while bytes_ * len(weights) < 8 * torch.cuda.get_device_properties(0).L2_cache_size and len(weights) < 8:
            weights.append(Weights(first))
        for tokens in self.options.tokens:
            case = Case(shape, scheme, tokens)
            calls = calls_of(tokens)
            sets = [(weights[i % len(weights)], *case.routing()) for i in range(calls)]
            self.layers(case, sets)
            self.products(case, sets)
            torch.cuda.empty_cache()

    def layers(self, case, sets):
        x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, device=DEVICE)
        layers = {}
        for weights in {id(w): w for w, _, _ in sets}.values():
            config = {k: v for k, v in case.config().items() if k != "quant"}
            quant = case.quant()
            layer = moesaic.Layer(**config, scheme=quant.pop("scheme"), quant=quant, device=DEVICE)
            layers[id(weights)] = layer.load(*weights.named())
        outputs = {}

        def ours(weights, ids, p):
            outputs["moesaic"] = layers[id(weights)](x, ids, p)

        def theirs(weights, ids, p):
            outputs["torch"] = torch_layer(case, weights, x, ids, p)
        calls = {"moesaic": [lambda s=s: ours(*s) for s in sets]}
        if case.scheme == "bf16":
            calls["torch"] = [lambda s=s: theirs(*s) for s in sets]
        graphs = {name: graph_of(list_) for name, list_ in calls.items()}
        for peer in self.peers:
            if peer.layer is None:
                continue

            def make(config, peer=peer):
                def call(weights, ids, p):
                    outputs[peer.name] = peer.layer(case, config, x, weights, ids, p)
                return [lambda s=s: call(*s) for s in sets]
            found = fastest(candidates_of(peer, self.tiles, case), make, self.options.rounds, len(sets))
            if found:
                graphs[peer.name] = found[0]
        for graph in graphs.values():
            graph.replay()
        self.report("layer", case, graphs, outputs, len(sets))

    def products(self, case, sets):
        x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, device=DEVICE)
        act = case.quantized(torch.randn(case.slots, case.intermediate, dtype=torch.bfloat16, device=DEVICE))
        a = case.quantized(x)
        for peer in self.peers:
            lists, outputs = {}, {}  # of each tile height

            def lists_of(ids, rows):
                key = id(ids), rows
                if key not in lists:
                    lists[key] = moesaic.align(ids, case.experts, rows)
                return lists[key]

            def buffers(config):
                down = config.get("down_tma", False)
                rows = lists_of(sets[0][1], config["BLOCK_SIZE_M"])[0].numel() if down else case.slots
                second = act
                if down:  # rows of the second product by position: as many as the lists are long
                    second = tuple(None if t is None else t[torch.arange(rows, device=DEVICE) % case.slots] for t in act)
                return (torch.empty(rows, 2 * case.intermediate, dtype=torch.bfloat16, device=DEVICE), second,
                        torch.empty(case.slots, case.hidden, dtype=torch.bfloat16, device=DEVICE))

            def make(config):
                h, second, c = buffers(config)

                def call(weights, ids, p):
                    l = lists_of(ids, config["BLOCK_SIZE_M"])
                    extra = dict(ids=ids) if peer.name == "sglang" else {}
                    peer.product(case, config, a, weights.fc1, h, l, p, False, **extra)
                    peer.product(case, config, second, weights.fc2, c, l, p, True, **extra)
                    outputs[str(config)] = c
                return [lambda s=s: call(*s) for s in sets]
            found = fastest(candidates_of(peer, self.tiles, case), make, self.options.rounds, len(sets))
            if not found:
                continue
            graph, config = found
            block = config["BLOCK_SIZE_M"]
            h, second, c = buffers(config)
            c2 = torch.empty_like(c)
            mine = [lambda s=s: our_products(case, s[0], block, a, second, h, c, lists_of(s[1], block), s[2]) for s in sets]
            stages = [lambda s=s: our_experts(case, s[0], block, a, c2, lists_of(s[1], block), s[2]) for s in sets]
            graphs = {"moesaic": graph_of(mine), "experts": graph_of(stages), peer.name: graph}
            for g in graphs.values():
                g.replay()
            same = {"moesaic": c, peer.name: outputs[str(config)]}
            self.report(f"products ({peer.name})", case, graphs, same, len(sets), config)

    def report(self, what, case, graphs, outputs, calls, config=None):
        torch.cuda.synchronize()
        times = times_of(graphs, self.options.rounds, calls)
        worst = max((difference(outputs[n], outputs["moesaic"]) for n in outputs if n in times and n != "moesaic"), default=0.0)
        assert worst < 0.05, f"{what} {case.shape} {case.scheme} T={case.tokens}: results differ by {worst:.3f}"
        row = dict(what=what, shape=case.shape, scheme=case.scheme, tokens=case.tokens, device=torch.cuda.get_device_name(), ms=times,
                   difference=worst, config=config)
        self.rows.append(row)
        print(f"| {what} | {case.scheme} | {case.shape} | {case.tokens} | " + ", ".join(f"{n} {1e3 * t:.1f}" for n, t in times.items())
              + " | " + ", ".join(ratios_of(row)) + " |", flush=True)


def ratios_of(row):
    """"name 0.97" for each comparison of a row: our time over theirs, or for products also that of `experts`."""
    ms = row["ms"]
    peers = [n for n in ms if n not in ("moesaic", "experts")]
    return [f"{ours}/{n} {ms[ours] / ms[n]:.2f}" for n in peers for ours in ("moesaic", "experts") if ours in ms]


def verdict(rows):
    """What the promise about products says of these rows: the greatest ratio of each comparison."""
    greatest = {}
    for row in rows:
        if row["what"].startswith("products"):
            for text in ratios_of(row):
                name, value = text.rsplit(" ", 1)
                greatest[name] = max(greatest.get(name, 0.0), float(value))
    return greatest


# --- where a layer's time goes
STAGES = (("gemm_sm90", "products"), ("gemm_kernel", "products"), ("dequant", "products"), ("gemm", "products"), ("align", "align"), ("count", "align"),
          ("tiles", "align"), ("quantize", "quantize"), ("activate", "activate"), ("combine", "combine"), ("sum", "combine"))


def stage_of(kernel):
    return next((stage for part, stage in STAGES if part in kernel), "other: " + kernel[:40])


def parts(case):
    """{stage: us} of one forward in the middle of several, summed over kernels."""
    from torch.profiler import ProfilerActivity, profile

    weights = Weights(case)
    quant = case.quant()
    layer = moesaic.Layer(**{k: v for k, v in case.config().items() if k != "quant"}, scheme=quant.pop("scheme"), quant=quant, device=DEVICE)
    layer.load(*weights.named())
    x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, device=DEVICE)
    ids, p = case.routing()
    y = torch.empty_like(x)
    for _ in range(3):
        layer(x, ids, p, output=y)
    torch.cuda.synchronize()
    calls = 10
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            layer(x, ids, p, output=y)
        torch.cuda.synchronize()
    out = {}
    for event in record.key_averages():
        if event.self_device_time_total > 0:
            stage = stage_of(event.key)
            out[stage] = out.get(stage, 0.0) + event.self_device_time_total / calls
    return out


def report_parts(options):
    for scheme in options.schemes:
        for shape in options.shapes:
            for tokens in options.tokens:
                times = parts(Case(shape, scheme, tokens))
                whole = sum(times.values())
                outside = whole - times.get("products", 0.0)
                print(f"| {scheme} | {shape} | {tokens} | {whole:.1f} us | outside the products {100 * outside / whole:.1f}% | "
                      + ", ".join(f"{n} {t:.1f}" for n, t in times.items()) + " |", flush=True)
                torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b"], choices=SHAPES)
    parser.add_argument("--schemes", nargs="+", default=["bf16", "fp8_block", "int4_w4a16"], choices=["bf16", "fp8_block", "int4_w4a16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--vllm")
    parser.add_argument("--sglang")
    parser.add_argument("--tiles")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; these are figures of a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    if options.parts:
        return report_parts(options)
    if (options.vllm or options.sglang) and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")):
        raise SystemExit("Triton compiles its launchers with a C compiler, and none is on the PATH (or in CC)")
    peers = [kind(folder) for kind, folder in ((Vllm, options.vllm), (Sglang, options.sglang)) if folder]
    bench = Bench(options, peers)
    print("| what | scheme | shape | T | us | ours / theirs |\n|---|---|---|---|---|---|")
    for scheme in options.schemes:
        for shape in options.shapes:
            bench.run(shape, scheme)
            torch.cuda.empty_cache()
    for name, ratio in verdict(bench.rows).items():
        print(f"products on unpacked weights: {name} at most {ratio:.2f}: {'within' if ratio <= TARGET else 'OVER'} {TARGET}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(rows=bench.rows), file, indent=0)


if __name__ == "__main__":
    main()
