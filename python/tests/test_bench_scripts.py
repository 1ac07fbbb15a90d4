# SPDX-License-Identifier: Apache-2.0
"""The parts of the scripts under bench/ that need no GPU: what they conclude from rows, and what they compute."""

import argparse
import importlib
import json
import pathlib
import sys

import pytest

BENCH = pathlib.Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def _row(tokens, ms, tactics=(-1, -1), **more):
    return dict(dict(variant="bf16", shape="s", tokens=tokens, ms_median=ms, tactic1=tactics[0], tactic2=tactics[1], valid=True,
                     device="d"), **more)


def test_sweep_takes_both_products_gains_together(script):
    sweep = script("sweep")
    rows = [_row(4, 1.0), _row(4, 0.9, (2, -1)), _row(4, 1.3, (3, -1)), _row(4, 0.8, (-1, 1)), _row(4, 1.1),
            _row(8, 2.0), _row(8, 2.5, (0, -1)), _row(8, 2.0, (-1, 0)), _row(8, 2.2)]
    losses = sweep.tactic_losses(rows)
    assert losses[4] == (pytest.approx(1 / 0.7), 2, 1)
    assert losses[8] == (1.0, -1, -1)
    assert sweep.report_tactics(rows) == pytest.approx(1 / 0.7)
    assert sweep.report_tactics([_row(1, 1.0)]) == 1.0


def test_sweep_holds_a_batch_against_the_next_larger_one(script, capsys):
    sweep = script("sweep")
    rows = [_row(1, 1.0), _row(2, 2.6), _row(4, 2.0), _row(100, 3.0), _row(128, 4.0), _row(200, 9.0)]
    assert sweep.token_ratios(rows) == {2: 1.3, 100: 0.75}  # 200: nothing larger was measured
    assert sweep.report_tokens(rows) == pytest.approx(1.3)
    assert "over: 2:1.30" in capsys.readouterr().out
    tokens = sweep.dense(4)
    assert set(sweep.TABLE) | set(range(1, 9)) <= set(tokens) and tokens == sorted(set(tokens)) and tokens[-1] == 8192
    assert max(b / a for a, b in zip(tokens[8:], tokens[9:])) < 2**0.25 * 1.1


def test_promises_compare_medians_and_mark_what_is_over(script, capsys):
    promises = script("promises")
    rows = [_row(1, 2.0, format="sorted"), _row(1, 4.0, format="sorted"), _row(1, 3.3, format="batched"), _row(8, 1.0, format="sorted")]
    assert promises.ratios(rows, "bf16", "s", dict(format="batched"), dict(format="sorted")) == {1: pytest.approx(1.1)}
    run = promises.Run(None)
    run.line("kept", {1: 1.0, 8: 1.1}, 1.1)
    assert run.kept
    run.line("broken", {1: 1.0, 8: 1.11}, 1.1)
    out = capsys.readouterr().out
    assert not run.kept and "8:1.11!" in out and "8:1.10!" not in out


def _answering(promises, monkeypatch, answer, **args):
    """A Run whose benches are answered by `answer`(shape, scheme, tokens, format) in ms, and what was asked."""
    asked = []

    def bench(command, *flags, env=None):
        flags = [str(f) for f in flags]
        lists = {name: next(iter(flags[flags.index(name) + 1:]), "").split(",") for name in ("--scheme", "--tokens")}
        shapes = flags[flags.index("--shape") + 1:flags.index("--scheme")]
        formats = flags[flags.index("--format") + 1].split(",") if "--format" in flags else ["standard"]
        asked.append(flags)
        return [_row(int(t), answer(shape, scheme, int(t), form), variant=scheme, shape=shape, format=form,
                     ratio_to_floor=answer(shape, scheme, int(t), form), weight_bytes=1e6 * float(shape.split(",")[2]) if "," in shape else 0)
                for scheme in lists["--scheme"] for shape in shapes for form in formats for t in lists["--tokens"]]
    monkeypatch.setattr(promises, "bench", bench)
    options = dict(moesaic="m", backend="cuda", seconds="1", shape=None, scheme=None, tokens=None, json=None)
    return promises.Run(argparse.Namespace(**{**options, **args})), asked


def test_promises_of_schemes_hold_one_against_the_other(script, monkeypatch, capsys):
    promises = script("promises")
    run, asked = _answering(promises, monkeypatch, lambda shape, scheme, t, form: {"fp8_channel": 1.06 if t == 128 else 1.04}.get(scheme, 1.0),
                            scheme="bf16", shape=["qwen3-30b-a3b"], tokens="1,128")
    promises.channel(run)  # its schemes are the promise's, whatever --scheme says
    out = capsys.readouterr().out
    assert not run.kept and "1:1.04 128:1.06!" in out and len(out.splitlines()) == 1 and "fp8_tensor+static,fp8_channel,fp8_channel,fp8_tensor+static" in asked[0]
    run, asked = _answering(promises, monkeypatch, lambda shape, scheme, t, form: 1.01 if scheme in ("f16", "int8_w8a16") else 1.0)
    promises.siblings(run)
    assert run.kept and len(asked) == 2 and len(capsys.readouterr().out.splitlines()) == 12


def test_promises_of_formats_and_widths(script, monkeypatch, capsys):
    promises = script("promises")
    run, asked = _answering(promises, monkeypatch, lambda shape, scheme, t, form: 1.06 if (form, t) == ("batched", 1) else 1.0, scheme="bf16")
    promises.experts(run)
    out = capsys.readouterr().out
    assert not run.kept and "1:1.06! 16:1.00" in out and "--experts-only" in asked[0]
    # A time that grows with the weights is as it should be; one that is the larger neighbour's is not.
    width = lambda shape: float(shape.split(",")[2])
    run, asked = _answering(promises, monkeypatch, lambda shape, scheme, t, form: 10 + width(shape), scheme="bf16", shape=["128,2048,192,8"])
    promises.neighbours(run)
    assert run.kept and len(asked) == 1 and "128,2048,192,8 / between" in capsys.readouterr().out
    run, asked = _answering(promises, monkeypatch, lambda shape, scheme, t, form: 256.0 if width(shape) == 192 else width(shape), scheme="bf16")
    promises.neighbours(run)
    assert not run.kept and f"1:{256 / 192:.2f}!" in capsys.readouterr().out and len(asked) == 2


def test_an_invalid_row_is_told(script):
    rows = script("bench_rows")
    assert rows.device_of([_row(1, 1.0), _row(1, 1.0, valid=False)]) == "d; 1 of 2 rows INVALID"
    assert rows.middle([_row(1, 1.0), _row(1, 3.0), _row(2, 9.0)], tokens=1) == 2.0
    assert rows.middle([_row(1, 1.0)], tokens=2) is None


def test_compare_marks_invalid_rows_before_it_looks_at_ratios(script, tmp_path, monkeypatch, capsys):
    compare = script("compare")
    peer = {"scheme": "bf16", "shape": "s", "peer": "P", "ratio": 1.2, "target": 1.0}
    marks = {1: (True, 1.0, "+"), 2: (True, 1.1, "="), 4: (True, 1.3, "-"), 8: (False, 1.0, "!")}
    rows = [_row(t, 1.0, valid=v, ratio_to_floor=r, format="standard", load="uniform") for t, (v, r, _) in marks.items()]
    assert [compare.verdict(row, peer) for row in rows] == [m for _, _, m in marks.values()]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "peers.json").write_text(json.dumps([dict(peer, tokens=t) for t in marks]))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "rows.json"), "--peers", str(tmp_path / "peers.json")])
    compare.main()
    out = capsys.readouterr().out
    assert "1 1.00! (P 1.20 -> 1.00)" in out
    assert "1 at the target, 1 between peer and target, 1 behind the peer, 1 invalid" in out


# --- bench/python_cuda_peers.py
torch = pytest.importorskip("torch")


def _reference(case, weights, x, ids, p):
    def widened(pair, e):
        weight, scale = pair
        if case.scheme == "int4_w4a16":
            nibbles = torch.stack((weight[e] & 15, weight[e] >> 4), -1).flatten(1).float() - 8
            return nibbles * scale[e].repeat_interleave(128, 1)
        if case.scheme == "fp8_block":
            return weight[e].float() * scale[e].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight[e].float()

    products, out = torch.zeros(case.slots, 2 * case.intermediate), torch.zeros(case.tokens, case.hidden)
    for t in range(case.tokens):
        for j in range(case.top_k):
            h = widened(weights.fc1, ids[t, j]) @ x[t].float()
            products[t * case.top_k + j] = h
            gate, up = h.chunk(2)
            out[t] += p[t, j] * (widened(weights.fc2, ids[t, j]) @ (torch.nn.functional.silu(gate) * up))
    return products, out


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block", "int4_w4a16"])
def test_what_the_peers_are_held_against_is_the_layer(script, monkeypatch, scheme):
    peers = script("python_cuda_peers")
    monkeypatch.setattr(peers, "DEVICE", "cpu")
    monkeypatch.setitem(peers.SHAPES, "tiny", (5, 256, 128, 2))
    case = peers.Case("tiny", scheme, 7)
    torch.manual_seed(7)
    weights = peers.Weights(case)
    ids, p = case.routing()
    x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16)
    products, out = _reference(case, weights, x, ids, p)
    lists = peers.moesaic.align(ids, case.experts, 16)
    h = torch.full((case.slots, 2 * case.intermediate), float("nan"), dtype=torch.bfloat16)
    c = torch.full((case.slots, case.hidden), float("nan"), dtype=torch.bfloat16)
    a = case.quantized(x)
    act = case.quantized(torch.randn(case.slots, case.intermediate, dtype=torch.bfloat16))
    peers.our_products(case, weights, 16, a, act, h, c, lists, p)
    assert peers.difference(h, products) < 0.05 and torch.isfinite(c).all()
    # The same with rows in between as the lists have them.
    slots = lists[0].long()
    live = slots < case.slots
    h2 = torch.zeros(slots.numel(), h.shape[1], dtype=torch.bfloat16)
    act2 = tuple(None if t is None else t[torch.where(live, slots, 0)] for t in act)
    c2 = torch.full_like(c, float("nan"))
    peers.our_products(case, weights, 16, a, act2, h2, c2, lists, p)
    assert torch.equal(h2[live], h[slots[live]]) and torch.equal(c2, c)
    peers.our_experts(case, weights, 16, a, c, lists, p)
    assert peers.difference(c.view(case.tokens, case.top_k, -1).float().sum(1), out) < 0.08
    if scheme == "bf16" and hasattr(torch, "_grouped_mm"):
        assert peers.difference(peers.torch_layer(case, weights, x, ids, p), out) < 0.05


def test_a_peers_file_is_imported_without_what_it_imports(script, tmp_path, monkeypatch):
    peers = script("triton_peers")
    folder = tmp_path / "peerpackage" / "deep"
    folder.mkdir(parents=True)
    (folder / "kernels.py").write_text(
        "import peerpackage.server as server\nfrom peerpackage.ops import launch, LIMIT\nfrom peerpackage.types import Kind\n"
        "@launch(1)\ndef kernel(kind: Kind | None = Kind.SILU):\n    pass\nlimit = LIMIT\nquiet = server.enabled() or 'off'\n")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    module = peers.StandIns(str(tmp_path), "peerpackage", "deep.kernels", {"peerpackage.ops": dict(LIMIT=3)}).load()
    assert module.limit == 3 and module.quiet == "off"
    with pytest.raises(SystemExit, match="absent"):
        peers.StandIns(str(tmp_path), "absent", "deep.kernels", {}).load()
    for name in [n for n in sys.modules if n.split(".")[0] in ("peerpackage", "absent")]:
        del sys.modules[name]


def test_the_verdict_is_the_greatest_ratio(script):
    peers = script("python_cuda_peers")
    rows = [dict(what="products (vllm)", ms=dict(moesaic=1.0, experts=1.2, vllm=1.0)),
            dict(what="products (vllm)", ms=dict(moesaic=1.0, experts=0.9, vllm=2.0)), dict(what="layer", ms=dict(moesaic=9.0, torch=1.0))]
    assert peers.verdict(rows) == {"moesaic/vllm": 1.0, "experts/vllm": 1.2}
    assert peers.stage_of("void moesaic::combine_rows<...>") == "combine" and peers.stage_of("x").startswith("other")
