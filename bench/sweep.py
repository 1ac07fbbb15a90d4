#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much the default choice of kernels loses: against the best tactic, and against larger batches.

    bench/sweep.py tactics [--shape ...] [--scheme bf16,fp8_block,int4_w4a16] [--tokens 1,16,128,1024,8192]
    bench/sweep.py tokens  [--shape ...] [--scheme ...] [--per-octave 6]
        common: [--moesaic 'build/cuda/moesaic'] [--seconds 0.02] [--json rows.json] [--rows earlier.json ...]

tactics: the layer with the policy's kernels over the layer with the best ones, for shapes that no table was made for
and for the named ones; at most 1.10. Each product's best is found with the other one's at the policy's; both gains
are then taken together, which is more than a pair may reach.
tokens: the time at T over the time at the next larger T of 1, 4, 16, 128, 1024, 8192; at most 1.10: a batch
that is smaller must not take longer.
Both run one process of `moesaic bench` per scheme and shape. --rows: only judge what an earlier run has written.
"""
import argparse
import shlex
import sys

from bench_rows import NAMED, bench, device_of, load, save

UNKNOWN = ["60,2048,1408,4", "160,5120,1536,6", "16,5120,8192,1"]
TABLE = [1, 4, 16, 128, 1024, 8192]
LIMIT = 1.10


def dense(per_octave, last=TABLE[-1]):
    """Every T up to 8, then `per_octave` between a number and its double; the tables' are among them."""
    tokens, t = set(TABLE) | set(range(1, 9)), 8.0
    while t < last:
        tokens.add(round(t))
        t *= 2 ** (1 / per_octave)
    return sorted(t for t in tokens if t <= last)


def groups(rows):
    """{(scheme, shape): its rows}, in their order."""
    out = {}
    for row in rows:
        out.setdefault((row["variant"], row["shape"]), []).append(row)
    return out


def tactic_losses(rows):
    """{T: (loss, best of GEMM1 or -1, best of GEMM2 or -1)} of one shape's rows, where -1 means that none beats the policy's."""
    out = {}
    for tokens in sorted({r["tokens"] for r in rows}):
        here = [r for r in rows if r["tokens"] == tokens]
        own = [r["ms_median"] for r in here if r["tactic1"] == r["tactic2"] == -1]
        default = min(own)  # of its two rows: what one of them lost to the machine is no loss of the policy
        gain, best = 0.0, []
        for mine, other in (("tactic1", "tactic2"), ("tactic2", "tactic1")):
            forced = [r for r in here if r[mine] != -1 and r[other] == -1]
            first = min(forced, key=lambda r: r["ms_median"], default=None)
            won = max(default - first["ms_median"], 0) if first else 0
            gain += won
            best.append(first[mine] if won > 0 else -1)
        out[tokens] = (default / (default - gain), *best)
    return out


def token_ratios(rows):
    """{T: time at T over the time at the next larger T of the tables} of one shape's rows; the tables' own T are not in it."""
    time = {r["tokens"]: r["ms_median"] for r in rows}
    known = [t for t in TABLE if t in time]
    out = {}
    for tokens in sorted(time):
        larger = [t for t in known if t > tokens]
        if tokens not in known and larger:
            out[tokens] = time[tokens] / time[larger[0]]
    return out


def report_tactics(rows):
    """A line per scheme and shape; the greatest loss."""
    worst = 0.0
    for (scheme, shape), mine in groups(rows).items():
        losses = tactic_losses(mine)
        worst = max(worst, *(x[0] for x in losses.values()))
        cells = " ".join(f"{t}:{loss:.2f}" + (f"({a},{b})" if loss > LIMIT else "") for t, (loss, a, b) in losses.items())
        print(f"{scheme:11} {shape:18} {cells}", flush=True)
    return worst


def report_tokens(rows):
    """The same, of the time over that of the next larger T."""
    worst = 0.0
    for (scheme, shape), mine in groups(rows).items():
        ratios = token_ratios(mine)
        top = max(ratios, key=ratios.get)
        worst = max(worst, ratios[top])
        over = " ".join(f"{t}:{r:.2f}" for t, r in ratios.items() if r > LIMIT)
        print(f"{scheme:11} {shape:18} greatest {ratios[top]:.2f} at T={top}{'; over: ' + over if over else ''}", flush=True)
    return worst


JUDGES = dict(tactics=(report_tactics, "the policy's kernels over the best (in brackets: GEMM1's, GEMM2's)"),
              tokens=(report_tokens, "time over that of the next larger T"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tactics", "tokens"])
    parser.add_argument("--moesaic", default="build/cuda/moesaic")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shape", nargs="+", default=None)
    parser.add_argument("--scheme", default="bf16,fp8_block,int4_w4a16")
    parser.add_argument("--tokens", default=None)
    parser.add_argument("--per-octave", type=int, default=6)
    parser.add_argument("--seconds", default="0.02")
    parser.add_argument("--json")
    parser.add_argument("--rows", nargs="+")
    args = parser.parse_args()
    judge, what = JUDGES[args.what]
    if args.rows:
        rows = load(args.rows)
        worst = judge(rows)
    else:
        shapes = args.shape or (UNKNOWN + NAMED if args.what == "tactics" else NAMED)
        tokens = args.tokens or ",".join(map(str, [1, 16, 128, 1024, 8192] if args.what == "tactics" else dense(args.per_octave)))
        each = ["--tactic1", "each", "--tactic2", "each"] if args.what == "tactics" else []
        rows, worst = [], 0.0
        for scheme in args.scheme.split(","):
            for shape in shapes:
                mine = bench(shlex.split(args.moesaic), "--backend", args.backend, "--shape", shape, "--scheme", scheme, "--tokens", tokens,
                             "--seconds", args.seconds, *each)
                worst = max(worst, judge(mine))
                rows += mine
                save(args.json, rows)
    print(f"{device_of(rows)}: {what}: at most {worst:.2f}, {'within' if worst <= LIMIT else 'OVER'} {LIMIT:.2f}")
    sys.exit(0 if worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
