# SPDX-License-Identifier: Apache-2.0
"""Writes quantize.json: rows quantized by NumPy and ml_dtypes. quantize_test.cpp compares bit for
bit. Needs numpy and ml_dtypes:

    python tests/golden/make_quantize.py
"""

import json
import pathlib

import ml_dtypes
import numpy as np

ROWS, WIDTH, GROUP = 5, 40, 16  # the last group is short
F = np.float32


def scale_of(x, largest):
    return np.maximum(np.abs(x).max(), F(1e-10)) / F(largest)


def to_fp8(x, scale):
    return np.clip(x * (F(1) / scale), F(-448), F(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def to_int8(x, scale):
    q = (x * (F(1) / scale)).astype(np.float64)
    return (np.sign(q) * np.floor(np.abs(q) + 0.5)).clip(-128, 127).astype(np.int8)


def to_int8_truncated(x, scale):
    return np.trunc(x / scale).clip(-128, 127).astype(np.int8)


def quantize(x, granularity, largest, convert, static=None):
    q, scales = np.zeros(x.shape, np.int16), []
    groups = {"token": WIDTH, "group": GROUP}
    if granularity in groups:
        width = groups[granularity]
        for r in range(ROWS):
            scales.append([])
            for first in range(0, WIDTH, width):
                part = x[r, first : first + width]
                scales[-1].append(scale_of(part, largest))
                q[r, first : first + width] = convert(part, scales[-1][-1])
        return q, np.array(scales)
    scale = F(static) if granularity == "tensor_static" else scale_of(x, largest)
    return convert(x, scale).astype(np.int16), np.array([scale])


def main():
    rng = np.random.default_rng(20)
    x = rng.standard_normal((ROWS, WIDTH)).astype(ml_dtypes.bfloat16).astype(F)
    x[1] *= F(1000)
    x[2] *= F(2.0**-60)  # 1 / scale of such a row is only finite because absmax has a floor
    x[3] = 0
    x[4, :8] = [127, 2.5, -2.5, 0.5, -0.5, 1.5, 63.5, -126.5]  # ties of int8: scale 1
    x[4, 8:] = rng.integers(-126, 127, WIDTH - 8) + F(0.5)
    x[4, 20:] = 0
    cases = []
    for to, largest, convert in (
        ("fp8_e4m3", 448, to_fp8),
        ("i8", 127, to_int8),
        ("i8_truncate", 127, to_int8_truncated),
    ):
        for granularity in ("token", "group", "tensor_dynamic", "tensor_static"):
            q, scale = quantize(x, granularity, largest, convert, static=0.25)
            cases.append(
                {
                    "to": to,
                    "granularity": granularity,
                    "q": q.tolist(),
                    "scale_bits": scale.astype(F).view(np.uint32).reshape(-1).tolist(),
                }
            )
    out = pathlib.Path(__file__).with_name("quantize.json")
    data = {"group": GROUP, "static_scale": 0.25, "input": x.astype(float).tolist(), "cases": cases}
    out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{out.name}: {len(cases)} cases, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
