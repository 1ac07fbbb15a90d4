# SPDX-License-Identifier: Apache-2.0
"""A layer from NumPy alone: f32, then the same weights as int8, and how far apart the two are."""

from typing import Any

import numpy as np

import moesaic

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 8, 64, 96, 2, 5
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2)


fc1, fc2 = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN), normal(EXPERTS, HIDDEN, INTERMEDIATE)  # [E, 2I, H], [E, H, I]
x, logits = normal(TOKENS, HIDDEN), normal(TOKENS, EXPERTS)

shape: dict[str, Any] = dict(experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, top_k=TOP_K, max_tokens=64)
exact = moesaic.Layer(scheme="f32", **shape).load(dict(weight=fc1), dict(weight=fc2))
ids, weights = moesaic.route(logits, TOP_K)  # i32 [T, k], f32 [T, k]
y = exact(x, ids, weights)



def channels(weight):
    """Weight-only int8: one scale per output channel."""
    scale = np.abs(weight).max(axis=2, keepdims=True) / 127
    return dict(weight=np.round(weight / scale).astype(np.int8), scale=scale.squeeze(2))


# Weight-only schemes take 16-bit rows.
small = moesaic.Layer(scheme="int8_w8a16", input_dtype="f16", **shape).load(channels(fc1), channels(fc2))
z = small(x.astype(np.float16), ids, weights).astype(np.float32)
print(f"y {y.shape} {y.dtype}; int8 weights take {small.weight_bytes / exact.weight_bytes:.2f} of the bytes, "
      f"error {np.linalg.norm(z - y) / np.linalg.norm(y):.4f}")
