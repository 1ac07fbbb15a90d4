# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.22.0's MoEActivation and FusedMoEQuantConfig, with the builders for the schemes offered here."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, ClassVar, NamedTuple, Optional

import torch

from ... import gemm as _gemm
from .._common import NotOffered, quant_spec


# --- activations ------------------------------------------------------------------------------------

class MoEActivation(enum.Enum):
    """The activations of the original; those that end in _no_mul are ungated."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self):
        return not self.value.endswith("_no_mul")

    @property
    def custom_op_name(self):
        return {"relu2_no_mul": "relu2"}.get(self.value, self.value.removesuffix("_no_mul") + "_and_mul" * (
            self.value != "relu2"))

    def without_mul(self):
        return MoEActivation(self.value + "_no_mul") if self.value + "_no_mul" in _KINDS else self

    @classmethod
    def from_str(cls, s):
        s = "gelu_tanh" if s == "gelu_pytorch_tanh" else s
        if s not in [member.value for member in cls]:
            raise ValueError(f"activation: unknown '{s}'; known: {', '.join(member.value for member in cls)}")
        return cls(s)


# swigluoai reads gate and up interleaved, swiglustep as halves; both have their limits built in there.
_KINDS: dict = {"silu": {"kind": "swiglu"}, "gelu": {"kind": "geglu"}, "gelu_tanh": {"kind": "geglu_tanh"},
          "swigluoai": {"kind": "swiglu_oai", "layout": "interleaved", "alpha": 1.702, "beta": 1.0, "limit": 7.0},
          "swiglustep": {"kind": "swiglu_step", "limit": 7.0},
          "silu_no_mul": {"kind": "silu"}, "gelu_no_mul": {"kind": "gelu"}, "gelu_tanh_no_mul": {"kind": "gelu_tanh"},
          "relu2_no_mul": {"kind": "relu2"}}


def activation_spec(activation, quant_config=None) -> dict:
    """The library's activation of a MoEActivation (ours or vLLM's own) or its name."""
    name = getattr(activation, "value", activation)
    if name not in _KINDS:
        raise NotOffered(f"activation: '{name}' is not offered; known: {', '.join(_KINDS)}")
    spec = dict(_KINDS[name])
    if quant_config is not None and name == "silu" and quant_config.gemm1_clamp_limit is not None:
        spec = {"kind": "swiglu_clamp", "limit": float(quant_config.gemm1_clamp_limit)}
    return spec


def apply_moe_activation(activation, output, input):
    """output [R, N or N / 2] = activation(input [R, N])."""
    return _gemm.activate(input, activation_spec(activation), output=output)


# --- quantization ------------------------------------------------------------------------------------

class _Shape(NamedTuple):
    row: int
    col: int


class GroupShape(_Shape):
    """Rows and columns that share a scale; -1: all of them."""

    PER_TENSOR: ClassVar[GroupShape]
    PER_TOKEN: ClassVar[GroupShape]
    PER_CHANNEL: ClassVar[GroupShape]


GroupShape.PER_TENSOR = GroupShape(-1, -1)
GroupShape.PER_TOKEN = GroupShape(1, -1)
GroupShape.PER_CHANNEL = GroupShape(-1, 1)


@dataclasses.dataclass
class FusedMoEQuantDesc:
    """How one of the four operands is quantized."""

    dtype: Any = None
    shape: Optional[GroupShape] = None
    scale: Optional[torch.Tensor] = None
    alpha_or_gscale: Optional[torch.Tensor] = None
    zp: Optional[torch.Tensor] = None
    bias: Optional[torch.Tensor] = None


@dataclasses.dataclass
class FusedMoEQuantConfig:
    """Activations and weights of both products, with everything that belongs to them."""

    _a1: FusedMoEQuantDesc
    _a2: FusedMoEQuantDesc
    _w1: FusedMoEQuantDesc
    _w2: FusedMoEQuantDesc
    is_scale_swizzled: bool = True
    gemm1_alpha: Optional[float] = None
    gemm1_beta: Optional[float] = None
    gemm1_clamp_limit: Optional[float] = None
    mx_alignment: int = 0

    def __post_init__(self):
        if self.per_act_token_quant and self.block_shape is not None:
            raise ValueError("per_act_token_quant and block_shape: give at most one")

    quant_dtype = property(lambda self: self._a1.dtype)
    weight_quant_dtype = property(lambda self: self._w1.dtype)
    is_quantized = property(lambda self: self._a1.dtype is not None)
    is_per_act_token = property(lambda self: self._a1.shape == GroupShape.PER_TOKEN)
    per_act_token_quant = property(lambda self: self._a1.shape == GroupShape.PER_TOKEN)
    per_out_ch_quant = property(lambda self: self._w1.shape == GroupShape.PER_TOKEN)
    is_per_tensor = property(lambda self: self._a1.shape == GroupShape.PER_TENSOR)
    is_block_quantized = property(lambda self: self.block_shape is not None)
    a1_scale = property(lambda self: self._a1.scale)
    a2_scale = property(lambda self: self._a2.scale)
    a1_gscale = property(lambda self: self._a1.alpha_or_gscale)
    a2_gscale = property(lambda self: self._a2.alpha_or_gscale)
    w1_scale = property(lambda self: self._w1.scale)
    w2_scale = property(lambda self: self._w2.scale)
    w1_zp = property(lambda self: self._w1.zp)
    w2_zp = property(lambda self: self._w2.zp)
    w1_bias = property(lambda self: self._w1.bias)
    w2_bias = property(lambda self: self._w2.bias)
    g1_alphas = property(lambda self: self._w1.alpha_or_gscale)
    g2_alphas = property(lambda self: self._w2.alpha_or_gscale)
    use_fp8_w8a8 = property(lambda self: self.quant_dtype == torch.float8_e4m3fn)
    use_int8_w8a8 = property(lambda self: self.quant_dtype == torch.int8)
    use_fp8_w8a16 = property(lambda self: self.quant_dtype is None and self._w1.dtype == torch.float8_e4m3fn)
    use_int8_w8a16 = property(lambda self: self.quant_dtype is None and self._w1.dtype == torch.int8)
    use_int4_w4a16 = property(lambda self: self.quant_dtype is None and self._w1.dtype == "int4")
    use_mxfp4_w4a16 = property(lambda self: self.quant_dtype is None and self._w1.dtype == "mxfp4")

    @property
    def block_shape(self):
        shape = self._a1.shape
        return None if shape in (None, GroupShape.PER_TENSOR, GroupShape.PER_TOKEN) else [shape.row, shape.col]

    def config_name(self, dtype):
        """The part of a tuning file's name that the scheme gives; nothing here reads such files."""
        for name in ("fp8_w8a8", "fp8_w8a16", "int8_w8a16", "int4_w4a16"):
            if getattr(self, "use_" + name):
                return name
        return "float32" if dtype == torch.float32 and not self.use_mxfp4_w4a16 else None

    def scale_shape(self, max_tokens, hidden_dim):
        """Of activation scales: (1, 1), (tokens, 1) or (tokens, groups); None when not quantized."""
        if not self.is_quantized:
            return None
        if self.is_block_quantized:
            return (max_tokens, -(-hidden_dim // self.block_shape[1]))
        return (max_tokens, 1) if self.is_per_act_token else (1, 1)

    def batched_scale_shape(self, num_experts, max_tokens, hidden_dim):
        """The same with a leading expert dimension."""
        shape = self.scale_shape(max_tokens, hidden_dim)
        return None if shape is None else (num_experts, *shape)

    @staticmethod
    def make(quant_dtype=None, per_act_token_quant=False, per_out_ch_quant=False, block_shape=None, w1_scale=None,
             w2_scale=None, a1_scale=None, a2_scale=None, g1_alphas=None, g2_alphas=None, a1_gscale=None, a2_gscale=None,
             w1_bias=None, w2_bias=None, w1_zp=None, w2_zp=None, weight_dtype=None, is_scale_swizzled=True,
             gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None):
        """A configuration with the same scheme for both products. ValueError for what is not offered here."""
        weight_dtype = quant_dtype if weight_dtype is None else weight_dtype
        for name, value in (("quant_dtype", quant_dtype), ("weight_dtype", weight_dtype)):
            if isinstance(value, str) and (name, value) not in (("weight_dtype", "int4"), ("weight_dtype", "mxfp4")):
                raise NotOffered(f"{name}: '{value}' is not offered; use torch.float8_e4m3fn, torch.int8 or None, and "
                                 "for weights also 'int4' and 'mxfp4' with 16-bit activations")
        if block_shape is not None:
            if per_act_token_quant or per_out_ch_quant:
                raise ValueError("block_shape excludes per_act_token_quant and per_out_ch_quant")
            a_shape = w_shape = GroupShape(*block_shape)
        else:
            a_shape = None if quant_dtype is None else GroupShape.PER_TENSOR
            a_shape = GroupShape.PER_TOKEN if per_act_token_quant else a_shape
            w_shape = GroupShape.PER_TOKEN if per_out_ch_quant else None
        return FusedMoEQuantConfig(
            _a1=FusedMoEQuantDesc(quant_dtype, a_shape, a1_scale, a1_gscale),
            _a2=FusedMoEQuantDesc(quant_dtype, a_shape, a2_scale, a2_gscale),
            _w1=FusedMoEQuantDesc(weight_dtype, w_shape, w1_scale, g1_alphas, w1_zp, w1_bias),
            _w2=FusedMoEQuantDesc(weight_dtype, w_shape, w2_scale, g2_alphas, w2_zp, w2_bias),
            is_scale_swizzled=is_scale_swizzled, gemm1_alpha=gemm1_alpha, gemm1_beta=gemm1_beta,
            gemm1_clamp_limit=gemm1_clamp_limit)

    def _spec(self, weight, zero_points, static) -> dict:
        """What these flags are called here."""
        block = self.block_shape
        if self.use_mxfp4_w4a16:
            return dict(scheme="mxfp4_w4a16")
        if self.use_fp8_w8a16:
            shape, scale = self._w1.shape, self.w1_scale
            if shape is not None and shape.row > 1:
                return dict(scheme="fp8_w8a16", weight_scale="block", block_n=shape.row, block_k=shape.col)
            return dict(scheme="fp8_w8a16", weight_scale="tensor" if scale.numel() == weight.shape[0] else "channel")
        return quant_spec(weight.dtype, use_fp8_w8a8=self.use_fp8_w8a8, use_int8_w8a8=self.use_int8_w8a8,
                          use_int8_w8a16=self.use_int8_w8a16, use_int4_w4a16=self.use_int4_w4a16,
                          per_channel_quant=self.per_act_token_quant or self.per_out_ch_quant, block_shape=block,
                          zero_points=zero_points, static_scale=static)


def fp8_w8a8_moe_quant_config(w1_scale, w2_scale, a1_scale=None, a2_scale=None, w1_bias=None, w2_bias=None,
                              per_act_token_quant=False, per_out_ch_quant=False, block_shape=None, a1_gscale=None,
                              a2_gscale=None, g1_alphas=None, g2_alphas=None, gemm1_clamp_limit=None):
    """e4m3 weights and activations."""
    return FusedMoEQuantConfig.make(
        torch.float8_e4m3fn, per_act_token_quant, per_out_ch_quant, block_shape, w1_scale, w2_scale, a1_scale, a2_scale,
        g1_alphas, g2_alphas, a1_gscale, a2_gscale, w1_bias, w2_bias, gemm1_clamp_limit=gemm1_clamp_limit)


def int8_w8a8_moe_quant_config(w1_scale, w2_scale, a1_scale, a2_scale, w1_bias=None, w2_bias=None,
                               per_act_token_quant=False):
    """int8 weights and activations."""
    return FusedMoEQuantConfig.make(torch.int8, per_act_token_quant, w1_scale=w1_scale, w2_scale=w2_scale,
                                    a1_scale=a1_scale, a2_scale=a2_scale, w1_bias=w1_bias, w2_bias=w2_bias)


def _weight_only(dtype, w1, w2, shape=None, shape_on_activations=True, **options):
    """`w1`, `w2`: (scale, zero point, bias). The original repeats the weights' group on the activations."""
    group = None if shape is None else GroupShape(*shape)
    act = group if shape_on_activations else None
    one, two = (FusedMoEQuantDesc(dtype, group, scale, None, zp, bias) for scale, zp, bias in (w1, w2))
    return FusedMoEQuantConfig(FusedMoEQuantDesc(shape=act), FusedMoEQuantDesc(shape=act), one, two, **options)


def int4_w4a16_moe_quant_config(w1_scale, w2_scale, w1_zp, w2_zp, block_shape=None):
    """int4 groups, 16-bit activations; block_shape [0, group size]."""
    return _weight_only("int4", (w1_scale, w1_zp, None), (w2_scale, w2_zp, None), block_shape)


def int8_w8a16_moe_quant_config(w1_scale, w2_scale, w1_zp, w2_zp, block_shape=None):
    """int8 per channel, or uint8 groups with block_shape [0, group size]; 16-bit activations."""
    return _weight_only(torch.int8, (w1_scale, w1_zp, None), (w2_scale, w2_zp, None), block_shape)


def fp8_w8a16_moe_quant_config(w1_scale, w2_scale, block_shape=None):
    """e4m3 weights, 16-bit activations."""
    return _weight_only(torch.float8_e4m3fn, (w1_scale, None, None), (w2_scale, None, None), block_shape,
                        shape_on_activations=False)


def mxfp4_w4a16_moe_quant_config(w1_scale, w2_scale, w1_bias=None, w2_bias=None, gemm1_alpha=None, gemm1_beta=None,
                                 gemm1_clamp_limit=None):
    """e2m1 weights with E8M0 scales, 16-bit activations."""
    return _weight_only("mxfp4", (w1_scale, None, w1_bias), (w2_scale, None, w2_bias), gemm1_alpha=gemm1_alpha,
                        gemm1_beta=gemm1_beta, gemm1_clamp_limit=gemm1_clamp_limit)


def biased_moe_quant_config(w1_bias, w2_bias):
    """Unquantized, with biases."""
    return _weight_only(None, (None, None, w1_bias), (None, None, w2_bias))


FUSED_MOE_UNQUANTIZED_CONFIG = FusedMoEQuantConfig.make()
