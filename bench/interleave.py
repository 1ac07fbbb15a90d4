#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two commands in turn, A B B A A B ..., and the ratio of their times pair by pair: what a machine whose speed drifts
allows. (A B A B favours one side: the second process of a pair finds the pages that the first gave back.)

    bench/interleave.py 'moesaic bench --scheme bf16 --tokens 1,8 --json -' 'OTHER COMMAND' [--rounds 5]
        [--pattern 'T=(?P<tokens>\\d+).*?med +(?P<ms>[\\d.]+)']

A command prints the JSON of `moesaic bench` (of one shape and scheme), or lines of which --pattern takes the number of
tokens and the milliseconds. Prints per number of tokens: the medians of A and B over the rounds, and the median, least
and greatest of B / A; and how far A stands from its roof, where A is `moesaic bench`.
"""
import argparse
import json
import re
import shlex
import statistics
import subprocess


def figures(command, pattern):
    """{tokens: (ms, fraction of the roof or None)} of one run."""
    out = subprocess.run(shlex.split(command), check=True, stdout=subprocess.PIPE, text=True).stdout
    at = out.find("{")
    if at >= 0 and '"ms_median"' in out:
        rows = json.JSONDecoder().raw_decode(out[at:])[0]["rows"]
        return {r["tokens"]: (r["ms_median"], r["fraction_of_roof"]) for r in rows}
    found = [m.groupdict() for m in re.finditer(pattern, out)]
    if not found:
        raise SystemExit(f"neither the JSON of `moesaic bench` nor {pattern!r} in what was printed by: {command}\n{out}")
    return {int(f["tokens"]): (float(f["ms"]), None) for f in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pattern", default=r"T=(?P<tokens>\d+).*?med +(?P<ms>[\d.]+)")
    args = parser.parse_args()
    rounds = []
    for i in range(args.rounds):
        pair = [figures(command, args.pattern) for command in ((args.b, args.a) if i % 2 else (args.a, args.b))]
        rounds.append(pair[::-1] if i % 2 else pair)

    print("| T | A ms | of roof | B ms | B / A | least - greatest |\n|---|---|---|---|---|---|")
    for tokens in sorted(set(rounds[0][0]) & set(rounds[0][1])):
        a = [x[tokens][0] for x, _ in rounds]
        b = [x[tokens][0] for _, x in rounds]
        ratios = [y / x for x, y in zip(a, b)]
        roofs = [x[tokens][1] for x, _ in rounds if x[tokens][1] is not None]
        roof = f"{statistics.median(roofs):.2f}" if roofs else ""
        print(f"| {tokens} | {statistics.median(a):.4g} | {roof} | {statistics.median(b):.4g} | "
              f"{statistics.median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
