#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Our whole layer beside others': rows of `moesaic bench --json` against a file of their figures.

    bench/compare.py rows.json ... --peers peers.json [--misses]
    bench/compare.py --glance docs/performance_cuda.md    # the median of each table over its shapes

The peers' file is a JSON list of {"scheme", "shape", "tokens", "peer", "ratio", "target"}: the best peer's whole layer
and the target, both as ratios to the floor that such a row has. Prints a Markdown table per scheme: a cell is our
time in ms, our ratio to the floor measured in the same process, and "best peer -> target". `+`: no slower than
the peer and the target; `=`: no slower than the peer; `-`: slower than the peer; `!`: the run was INVALID.
"""
import argparse
import json
import pathlib
import re
import statistics
import sys

# Our names of what the peers' file calls differently.
ALIASES = {"int4_w4a16": "int4_g128", "fp8_tensor+static": "fp8_tensor"}
SLACK = 0.005  # ratios are printed with two digits


def fail(text):
    print(f"compare.py: {text}", file=sys.stderr)
    raise SystemExit(2)


def read(path):
    try:
        return pathlib.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'is no text'}")


def read_json(path, what, pick):
    """pick(the file's JSON); `what` says what it should have been."""
    try:
        return pick(json.loads(read(path)))
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path}: expected {what}")


def our_rows(paths):
    for path in paths:
        yield from read_json(path, "what `moesaic bench --json` writes", lambda all_rows: [
            row for row in all_rows["rows"]
            if row["format"] == "standard" and row["load"] == "uniform" and row.get("source", "ids") == "ids"])


def verdict(row, peer):
    if not row["valid"]:
        return "!"
    if peer is None:
        return " "
    ours = row["ratio_to_floor"]
    if ours > peer["ratio"] + SLACK:
        return "-"
    return "+" if ours <= peer["target"] + SLACK else "="


def glance(page):
    """Per scheme and T, best peer / ours out of a page's tables: the median over the shapes (and the least and the largest)."""
    tables, tokens, scheme = {}, [], None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 1 and re.fullmatch(r"T=\d+", cells[1]):
            scheme, tokens = cells[0].split("+")[0], cells[1:]
        for t, cell in zip(tokens, cells[1:]):
            ratios = re.fullmatch(r"\S+ ([\d.]+)[-+=!] \(\S+ ([\d.]+) -> [\d.]+\)", cell)
            if ratios:
                tables.setdefault(scheme, {}).setdefault(t, []).append(float(ratios[2]) / float(ratios[1]))
    if not tables:
        return None
    columns = list(next(iter(tables.values())))
    lines = ["| best peer / ours | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for scheme, gains in tables.items():
        cells = (f"{statistics.median(g):.2f} ({min(g):.2f} to {max(g):.2f})" for g in (gains[t] for t in columns))
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--peers")
    parser.add_argument("--glance", metavar="PAGE", type=pathlib.Path, help="the table at a glance, from the tables of this page")
    parser.add_argument("--misses", action="store_true", help="only a line for each row behind its peer or target")
    args = parser.parse_args()
    if args.glance:
        table = glance(read(args.glance))
        return print(table or fail(f"{args.glance}: holds no table of T=1, T=4 ... against a peer; name a page such as docs/performance_cuda.md"))
    if not args.rows or not args.peers:
        parser.error("rows and --peers, or --glance")
    peers = read_json(args.peers, "a JSON list of {\"scheme\", \"shape\", \"tokens\", \"peer\", \"ratio\", \"target\"}", lambda list_of: {
        (p["scheme"], p["shape"], p["tokens"]): {"peer": str(p["peer"]), "ratio": float(p["ratio"]), "target": float(p["target"])}
        for p in list_of})

    tables = {}  # scheme -> shape -> tokens -> cell
    for row in our_rows(args.rows):
        scheme = row["variant"]
        peer = peers.get((ALIASES.get(scheme, scheme), row["shape"], row["tokens"]))
        mark = verdict(row, peer)
        text = f"{row['ms_median']:.4g} {row['ratio_to_floor']:.2f}{mark}"
        if peer is not None:
            text += f" ({peer['peer']} {peer['ratio']:.2f} -> {peer['target']:.2f})"
        tables.setdefault(scheme, {}).setdefault(row["shape"], {})[row["tokens"]] = (mark, text)

    count = {}
    for scheme, shapes in tables.items():
        tokens = sorted({t for cells in shapes.values() for t in cells})
        if not args.misses:
            print(f"\n| {scheme} | " + " | ".join(f"T={t}" for t in tokens) + " |")
            print("|---|" + "---|" * len(tokens))
        for shape, cells in shapes.items():
            for t in tokens:
                mark, text = cells.get(t, (" ", ""))
                count[mark] = count.get(mark, 0) + 1
                if args.misses and mark in "-=!":
                    print(f"{scheme:18} {shape:18} T={t:<5} {text}")
            if not args.misses:
                print(f"| {shape} | " + " | ".join(cells.get(t, (" ", ""))[1] for t in tokens) + " |")
    print(f"\n{count.get('+', 0)} at the target, {count.get('=', 0)} between peer and target, "
          f"{count.get('-', 0)} behind the peer, {count.get('!', 0)} invalid")


if __name__ == "__main__":
    main()
