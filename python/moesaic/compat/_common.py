# SPDX-License-Identifier: Apache-2.0
"""What the drop-in modules share: flags to schemes, names to activations."""

from __future__ import annotations

class NotOffered(ValueError):
    """A mode of an original that this library does not run; the message says what to use instead."""


_DENSE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def dtype_text(dtype) -> str:
    """"float32" from torch.float32, numpy.float32, triton's fp32 or a string."""
    text = str(dtype).split(".")[-1]
    return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(text, text)


def quant_spec(weight_dtype, *, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
               use_int4_w4a16=False, per_channel_quant=False, block_shape=None, zero_points=False,
               static_scale=False) -> dict:
    """The QuantSpec that the originals' flags mean. ValueError for combinations that mean nothing."""
    flags = [n for n, on in (("use_fp8_w8a8", use_fp8_w8a8), ("use_int8_w8a8", use_int8_w8a8),
                             ("use_int8_w8a16", use_int8_w8a16), ("use_int4_w4a16", use_int4_w4a16)) if on]
    if len(flags) > 1:
        raise ValueError(f"{' and '.join(flags)}: give at most one")
    if block_shape is not None and len(block_shape) != 2:
        raise ValueError(f"block_shape: expected [block_n, block_k], got {block_shape}")
    if use_fp8_w8a8 or use_int8_w8a8:
        kind = "fp8" if use_fp8_w8a8 else "int8"
        if block_shape is not None:
            return dict(scheme=f"{kind}_block", block_n=block_shape[0], block_k=block_shape[1])
        if per_channel_quant:
            return dict(scheme=f"{kind}_channel")
        if use_int8_w8a8:
            raise ValueError("use_int8_w8a8 without block_shape requires per_channel_quant=True: int8 weights have "
                             "a scale per output channel")
        return dict(scheme="fp8_tensor", act_scale="tensor_static" if static_scale else "tensor_dynamic")
    if use_int8_w8a16 or use_int4_w4a16:
        grouped = block_shape is not None and block_shape[1] > 0
        if block_shape is not None and block_shape[0] != 0:
            raise ValueError(f"block_shape: weight-only schemes take [0, group_size], got {block_shape}")
        if use_int4_w4a16:
            if not grouped:
                raise ValueError("use_int4_w4a16 without a group size is meaningless: pass block_shape=[0, group_size]")
            return dict(scheme="int4_w4a16", group_size=block_shape[1], zero_points=zero_points)
        if grouped:
            return dict(scheme="int8_w8a16", weight_scale="group", group_size=block_shape[1],
                        zero_points=zero_points)
        return dict(scheme="int8_w8a16")
    try:
        return dict(scheme=_DENSE[dtype_text(weight_dtype)])
    except KeyError:
        raise ValueError(f"B: {weight_dtype} weights need one of the use_* flags") from None


def activation_spec(name: str, gated: bool = True) -> dict:
    """The originals' activation names: "silu" of a gated layer is swiglu here."""
    gated_names = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "swigluoai": "swiglu_oai"}
    plain_names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
                   "silu_no_mul": "silu", "gelu_no_mul": "gelu", "relu2_no_mul": "relu2"}
    names = gated_names if gated and not name.endswith("_no_mul") else plain_names
    if name not in names:
        raise ValueError(f"activation: unknown '{name}'; known: {', '.join(names)}")
    return {"kind": names[name]}
