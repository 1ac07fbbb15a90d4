#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What is promised beside the tables of docs/performance_cuda.md, each by one command; needs a GPU.

    bench/promises.py activation [--shape ...] [--scheme bf16,fp8_block]    any activation, and biases: 1.03 of SwiGLU without
    bench/promises.py batched      prepare + experts + finalize, capacity 1024, over the sorted layer: 1.1
    bench/promises.py experts      the batched experts stage alone over the sorted one (two products, activation): 1.05
    bench/promises.py channel      fp8 per channel and token over fp8 per tensor with a static scale: 1.05
    bench/promises.py siblings     f16 over bf16, int8_w8a16 over int4_w4a16, as ratios to the floor: 1.02
    bench/promises.py neighbours   intermediate 192, and widths of 2880, over what lies between the neighbours' times: 1.02
    bench/promises.py zipf         ratio to the floor under Zipf(1.0) over that under uniform load: 1.15
    bench/promises.py logits       routing from logits: at most 2 us more, T <= 128
    bench/promises.py sm80 --peak build/mma_peak   the SM80 kernels, forced: 0.80 of the peak of mma.sync at T = 8192,
                                   and 1 / 0.85 of the SM90 kernels' time at decode; f32: 0.60 of the peak
    bench/promises.py all
        common: [--moesaic build/cuda/moesaic] [--seconds 0.05] [--tokens 1,128] [--json rows.json]

What is compared runs in turn, A B B A, in one process where `moesaic bench` can, and the medians are taken. `mma_peak` is
bench/mma_peak.cu: nvcc -O3 -arch=sm_80 bench/mma_peak.cu -o build/mma_peak.
"""
import argparse
import shlex
import subprocess
import sys

from bench_rows import NAMED, bench, device_of, middle, save

GATED = ["geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamp", "swiglu_step"]
DECODE = [1, 4, 16]
NEIGHBOURS = [("128,2048,128,8", "128,2048,192,8", "128,2048,256,8"), ("128,2816,2816,4", "128,2880,2880,4", "128,3072,3072,4")]


class Run:
    def __init__(self, args):
        self.args, self.rows, self.kept = args, [], True

    def bench(self, *flags, mark=None, env=None, shapes=None, scheme=None, fixed=None):
        """Rows of these flags; --shape and --scheme replace what is named here, but not what is `fixed`."""
        shapes = self.args.shape if self.args.shape and fixed != "shapes" else shapes
        scheme = self.args.scheme if self.args.scheme and fixed != "scheme" else scheme
        if self.args.tokens:  # fewer than the promise names
            at = flags.index("--tokens") + 1
            flags = *flags[:at], ",".join(t for t in flags[at].split(",") if t in self.args.tokens.split(",")), *flags[at + 1:]
        rows = bench(shlex.split(self.args.moesaic), "--backend", self.args.backend, "--seconds", self.args.seconds, "--shape", *shapes, "--scheme", scheme,
                     *flags, env=env)
        for row in rows:
            row["mark"] = mark
        self.rows += rows
        save(self.args.json, self.rows)  # a run that is cut off has left what it had
        return rows

    def line(self, label, cells, limit, form=".2f"):
        """One line of the table: {T: value}; whatever is over the limit is marked."""
        self.kept &= all(value <= limit for value in cells.values())
        print(f"{label:44} " + " ".join(f"{t}:{value:{form}}{'!' if value > limit else ''}" for t, value in cells.items())
              + f"  (at most {limit:g})", flush=True)


def labels(rows):
    return list(dict.fromkeys((r["variant"], r["shape"]) for r in rows))


def counts(rows):
    return sorted({r["tokens"] for r in rows})


def ratios(rows, scheme, shape, over, under):
    """{T: time of the rows like `over` / time of those like `under`}, both dictionaries of what a row holds."""
    out = {}
    for t in counts(rows):
        a, b = (middle(rows, variant=scheme, shape=shape, tokens=t, **like) for like in (over, under))
        if a is not None and b is not None:
            out[t] = a / b
    return out


def activation(run):
    common = ["--tokens", "1,128,1024,8192"]
    given = dict(shapes=["qwen3-30b-a3b", "mixtral-8x7b"], scheme="bf16,fp8_block")
    rows = run.bench(*common, "--activation", ",".join(["swiglu", *GATED, "swiglu"]), **given)
    rows += run.bench(*common, "--bias", "--activation", "swiglu", **given)
    rows += run.bench(*common, "--activation", "swiglu", **given)
    plain = dict(activation="swiglu", bias=False)
    for scheme, shape in labels(rows):
        for name in GATED:
            run.line(f"{scheme} {shape} {name}", ratios(rows, scheme, shape, dict(activation=name, bias=False), plain), 1.03, ".3f")
        run.line(f"{scheme} {shape} swiglu with biases", ratios(rows, scheme, shape, dict(bias=True), plain), 1.03, ".3f")


def batched(run):
    rows = run.bench("--tokens", "1,16,128,1024", "--format", "sorted,batched,batched,sorted", "--capacity", 1024,
                     shapes=["qwen3-30b-a3b", "mixtral-8x7b"], scheme="bf16,fp8_block,int4_w4a16")
    for scheme, shape in labels(rows):
        run.line(f"{scheme} {shape} batched / sorted", ratios(rows, scheme, shape, dict(format="batched"), dict(format="sorted")), 1.1)


def experts(run):
    rows = run.bench("--tokens", "1,16,128,1024", "--format", "sorted,batched,batched,sorted", "--capacity", 1024, "--experts-only",
                     shapes=["qwen3-30b-a3b", "mixtral-8x7b"], scheme="bf16,fp8_block,int4_w4a16")
    for scheme, shape in labels(rows):
        run.line(f"{scheme} {shape} experts, batched / sorted",
                 ratios(rows, scheme, shape, dict(format="batched"), dict(format="sorted")), 1.05)


def over(rows, mine, other, shape, key="ms_median"):
    """{T: scheme `mine` over scheme `other`, as medians of what `key` names}."""
    rows = [{**row, "ms_median": row[key]} for row in rows]
    pairs = {t: [middle(rows, variant=v, shape=shape, tokens=t) for v in (mine, other)] for t in counts(rows)}
    return {t: a / b for t, (a, b) in pairs.items()}


def channel(run):
    mine, other = "fp8_channel", "fp8_tensor+static"
    rows = run.bench("--tokens", "1,16,128,1024,8192", shapes=NAMED, scheme=f"{other},{mine},{mine},{other}", fixed="scheme")
    for shape in dict.fromkeys(r["shape"] for r in rows):
        run.line(f"{shape} {mine} / {other}", over(rows, mine, other, shape), 1.05)


def siblings(run):
    for mine, other in (("f16", "bf16"), ("int8_w8a16", "int4_w4a16")):
        rows = run.bench("--tokens", "1,4,16,128,1024,8192", shapes=NAMED, scheme=f"{other},{mine},{mine},{other}", fixed="scheme")
        for shape in dict.fromkeys(r["shape"] for r in rows):
            run.line(f"{shape} {mine} / {other}", over(rows, mine, other, shape, "ratio_to_floor"), 1.02)


def between(rows, scheme, shapes):
    """{T: the middle shape's time over that between its neighbours', by the weights that each reads}."""
    out = {}
    for t in counts(rows):
        (a, time_a), (b, time_b), (c, time_c) = ((middle([{**r, "ms_median": r["weight_bytes"]} for r in rows], variant=scheme, shape=s, tokens=t),
                                                  middle(rows, variant=scheme, shape=s, tokens=t)) for s in shapes)
        out[t] = time_b / (time_a + (time_c - time_a) * (b - a) / (c - a))
    return out


def neighbours(run):
    for left, mine, right in NEIGHBOURS:
        if mine not in (run.args.shape or [mine]):
            continue
        rows = run.bench("--tokens", "1,16,128,1024,8192", shapes=[left, mine, right, right, mine, left],
                         scheme="bf16,fp8_block,int4_w4a16", fixed="shapes")
        for scheme in dict.fromkeys(r["variant"] for r in rows):
            run.line(f"{scheme} {mine} / between {left}, {right}", between(rows, scheme, (left, mine, right)), 1.02)


def zipf(run):
    rows = run.bench("--tokens", "16,128,1024,8192", "--load", "uniform,zipf,zipf,uniform",
                     shapes=["qwen3-30b-a3b", "mixtral-8x7b"], scheme="bf16,fp8_block,int4_w4a16")
    for row in rows:  # each load with its own active experts
        row["ms"], row["ms_median"] = row["ms_median"], row["ratio_to_floor"]
    for scheme, shape in labels(rows):
        run.line(f"{scheme} {shape} zipf / uniform", ratios(rows, scheme, shape, dict(load="zipf"), dict(load="uniform")), 1.15)


def logits(run):
    rows = []
    for route in ("ids", "logits", "logits", "ids"):
        rows += run.bench("--tokens", "1,4,16,128", "--route", route, shapes=["qwen3-30b-a3b", "deepseek-v3-tp8", "qwen3-next-512"],
                          scheme="bf16,int4_w4a16")
    for scheme, shape in labels(rows):
        more = {t: 1e3 * (middle(rows, variant=scheme, shape=shape, tokens=t, source="logits")
                          - middle(rows, variant=scheme, shape=shape, tokens=t, source="ids")) for t in counts(rows)}
        run.line(f"{scheme} {shape} from logits, us more", more, 2, ".1f")


def peaks(command):
    """{"bf16": TFLOPS, ...} as mma_peak prints them."""
    out = subprocess.run(shlex.split(command), check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: float(rate) for name, rate in (line.split()[:2] for line in out.splitlines() if line.strip())}


def sm80(run):
    if not run.args.peak:
        raise SystemExit("sm80: --peak names the program made of bench/mma_peak.cu")
    peak = peaks(run.args.peak)
    print("mma.sync, registers only, TFLOPS: " + ", ".join(f"{name} {rate:.0f}" for name, rate in peak.items()))
    env = dict(MOESAIC_CUDA_ARCH="sm80")
    shapes = ["qwen3-30b-a3b", "mixtral-8x7b"]
    rows = []
    for mark, mine in (("sm90", None), ("sm80", env), ("sm80", env), ("sm90", None)):
        rows += run.bench("--tokens", ",".join(map(str, [*DECODE, 8192])), mark=mark, env=mine, shapes=shapes, scheme="bf16,fp8_block,int4_w4a16")
    rows += run.bench("--tokens", "8192", mark="sm80", env=env, shapes=shapes, scheme="f32")
    for scheme, shape in labels(rows):
        rate = {r["tokens"]: r["gflops"] * 1e-3 for r in rows if (r["variant"], r["shape"], r["mark"]) == (scheme, shape, "sm80")}
        if scheme == "f32":  # three products of tf32 each
            run.line(f"f32 {shape}: peak / reached", {8192: peak["tf32"] / (3 * rate[8192])}, 1 / 0.6)
            continue
        if scheme == "bf16":
            run.line(f"bf16 {shape} sm80: peak / reached", {8192: peak["bf16"] / rate[8192]}, 1 / 0.8)
        else:
            run.line(f"{scheme} {shape} sm80: time / bf16's", {8192: middle(rows, variant=scheme, shape=shape, tokens=8192, mark="sm80")
                                                               / middle(rows, variant="bf16", shape=shape, tokens=8192, mark="sm80")}, 1.15)
        both = ratios(rows, scheme, shape, dict(mark="sm80"), dict(mark="sm90"))
        run.line(f"{scheme} {shape} sm80 / sm90", {t: r for t, r in both.items() if t in DECODE}, 1 / 0.85)


PROMISES = dict(activation=activation, batched=batched, experts=experts, channel=channel, siblings=siblings, neighbours=neighbours, zipf=zipf, logits=logits, sm80=sm80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*PROMISES, "all"])
    parser.add_argument("--moesaic", default="build/cuda/moesaic")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shape", nargs="+", help="other shapes than a promise names")
    parser.add_argument("--scheme", help="other schemes than a promise names")
    parser.add_argument("--tokens", help="only these of the token counts that a promise names")
    parser.add_argument("--peak")
    parser.add_argument("--seconds", default="0.05")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.tokens and {"sm80", "all"} & set(args.what):
        parser.error("--tokens: not of sm80, which compares its token counts")
    run = Run(args)
    for name in PROMISES if "all" in args.what else args.what:
        PROMISES[name](run)
    print(f"{device_of(run.rows)}: " + ("every promise is kept" if run.kept else "a promise is not kept where a ! stands"))
    sys.exit(0 if run.kept else 1)


if __name__ == "__main__":
    main()
