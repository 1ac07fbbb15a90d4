# SPDX-License-Identifier: Apache-2.0
"""An experts implementation for transformers >= 5.

    import moesaic.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moesaic")

Weights are packed once per module, and again when a parameter's storage, version or values change; in between
the parameters hold no storage of their own (see _released.py), so that expert weights are held once.
fp8 models (FineGrainedFP8Config) come through transformers' registry of their own. What the module's
gate computes is not guessed from its name: the module's own `_apply_gate` is evaluated on a
few values and must agree with one of the activations below, or the class is refused by name.
"""

from __future__ import annotations

import weakref

import torch
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .. import share_threads, torch_op
from ..layer import Layer
from ._released import Packing, Released, state_of

_MAX_TOKENS = 1 << 20
_SCHEMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_NARROW = (torch.float16, torch.bfloat16)
_packed: "weakref.WeakKeyDictionary[torch.nn.Module, _Packed]" = weakref.WeakKeyDictionary()


def _attribute(module, *names, default=None):
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return default


def _gated_candidates(module):
    """Every gate the library has, with the parameters this module carries, as (spec, function)."""
    limit = _attribute(module, "limit", "swiglu_limit", default=7.0)
    alpha = _attribute(module, "alpha", "swiglu_alpha", default=1.702)
    F = torch.nn.functional
    clamp = lambda u: u.clamp(-limit, limit)  # noqa: E731
    yield {"kind": "swiglu"}, lambda g, u: F.silu(g) * u
    yield {"kind": "geglu"}, lambda g, u: F.gelu(g) * u
    yield {"kind": "geglu_tanh"}, lambda g, u: F.gelu(g, approximate="tanh") * u
    yield ({"kind": "swiglu_oai", "alpha": alpha, "beta": 1.0, "limit": limit},
           lambda g, u: g.clamp(max=limit) * torch.sigmoid(alpha * g.clamp(max=limit)) * (clamp(u) + 1))
    yield ({"kind": "swiglu_clamp", "limit": limit}, lambda g, u: F.silu(g.clamp(max=limit)) * clamp(u))
    yield ({"kind": "swiglu_step", "limit": limit}, lambda g, u: F.silu(g).clamp(max=limit) * clamp(u))


def _ungated_candidates():
    F = torch.nn.functional
    yield {"kind": "silu"}, F.silu
    yield {"kind": "gelu"}, F.gelu
    yield {"kind": "gelu_tanh"}, lambda x: F.gelu(x, approximate="tanh")
    yield {"kind": "relu"}, F.relu
    yield {"kind": "relu2"}, lambda x: F.relu(x) ** 2
    yield {"kind": "identity"}, lambda x: x


def activation_of(module) -> dict:
    """The activation that reproduces the module's own gate; ValueError with the class name if none does."""
    # Values on both sides of any limit in use, every gate value against every up value.
    points = torch.tensor([-40.0, -9.0, -3.0, -0.7, 0.0, 0.4, 1.9, 5.0, 8.0, 33.0], dtype=torch.float32)
    gate, up = (grid.reshape(-1) for grid in torch.meshgrid(points, points * 0.9 + 0.05, indexing="ij"))
    device = next(module.parameters()).device
    with torch.no_grad():
        if module.has_gate:
            layout = "halves" if module.is_concatenated else "interleaved"
            joined = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], -1).reshape(-1)
            theirs = module._apply_gate(joined[None].to(device))[0].float().cpu()
            for spec, function in _gated_candidates(module):
                if torch.allclose(theirs, function(gate, up), rtol=1e-5, atol=1e-5):
                    return dict(spec, layout=layout)
        else:
            theirs = module.act_fn(gate[None].to(device))[0].float().cpu()
            for spec, function in _ungated_candidates():
                if torch.allclose(theirs, function(gate), rtol=1e-5, atol=1e-5):
                    return dict(spec)
    raise ValueError(
        f"{type(module).__name__}: its gate is none of the activations moesaic has; use "
        f"experts_implementation='grouped_mm' for this model")


def _parameters(module) -> tuple:
    """(fc1, fc2) parameters as the module has them."""
    return (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj


def _views(module):
    """The function from those two to [E, N, K] views."""
    if module.is_transposed:
        return lambda up, down: (up.transpose(1, 2), down.transpose(1, 2))
    return lambda up, down: (up, down)


def _fp8(module, fc1, fc2) -> dict:
    """Scales of transformers' fp8 experts, and the scheme they make. ValueError by class name otherwise."""
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    if fc1["weight"].dtype != torch.float8_e4m3fn:
        raise ValueError(f"{type(module).__name__}: expert weights of {fc1['weight'].dtype} (two e2m1 values a byte, "
                         f"fp8 activations) are not run by moesaic; use experts_implementation='grouped_mm'")
    names = (prefix, "down_proj")
    scales = [getattr(module, f"{name}_scale_inv").detach().float() for name in names]
    for fc, name, scale in zip((fc1, fc2), names, scales):
        fc["scale"] = scale
        if module.activation_scheme == "static":
            fc["input_scale"] = getattr(module, f"{name}_activation_scale").detach().float()
    if module.block_size is not None:
        if module.activation_scheme == "static":
            raise ValueError(f"{type(module).__name__}: block scales with static activation scales are not run by "
                             f"moesaic; use experts_implementation='grouped_mm'")
        return dict(scheme="fp8_block", quant=dict(block_n=module.block_size[0], block_k=module.block_size[1]))
    for fc, scale in zip((fc1, fc2), scales):
        flat = scale.reshape(scale.shape[0], -1)  # one per expert, or one for gate and one for up
        if module.activation_scheme == "static":
            fc["scale"] = flat[:, 0] if flat.shape[1] == 1 else flat
        else:
            fc["scale"] = flat.repeat_interleave(fc["weight"].shape[1] // flat.shape[1], 1)
    if module.activation_scheme == "static":
        return dict(scheme="fp8_tensor", quant=dict(act_scale="tensor_static"))
    return dict(scheme="fp8_channel", quant={})


class _Packed:
    """What belongs to one module: its layer and how current it is."""

    def __init__(self, module, top_k, dtype):
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError(f"{type(module).__name__}: normalizes each expert's output, which moesaic does not "
                             f"do; use experts_implementation='grouped_mm' for this model")
        weights, views = _parameters(module), _views(module)
        one, two = views(*(w.detach() for w in weights))
        fc1, fc2 = {"weight": one}, {"weight": two}
        if module.has_bias:
            fc1["bias"] = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias).detach()
            fc2["bias"] = module.down_proj_bias.detach()
        if hasattr(module, "activation_scheme"):
            options, self.dtype = _fp8(module, fc1, fc2), dtype if dtype in _NARROW else torch.bfloat16
        elif one.dtype in _SCHEMES:
            options, self.dtype = dict(scheme=_SCHEMES[one.dtype]), one.dtype
        else:
            raise ValueError(f"{type(module).__name__}: expert weights are {one.dtype}; moesaic takes float32, "
                             f"float16 or bfloat16 here")
        experts, hidden, intermediate = two.shape
        self.device = one.device
        name = "cpu" if self.device.type == "cpu" else f"cuda:{self.device.index or 0}"
        layer = Layer(experts=experts, hidden=hidden, intermediate=intermediate, top_k=min(top_k, experts),
                      max_tokens=_MAX_TOKENS, activation=activation_of(module), input_dtype=_SCHEMES[self.dtype],
                      device=name, **options)
        layer.load(fc1, fc2)
        self.key = (top_k, dtype)
        self.number = torch_op.register(layer)
        self.packing = Packing(layer, weights, views)
        self._others = state_of(self._rest(module))

    def _rest(self, module):
        weights = _parameters(module)
        return [p for p in module.parameters() if all(p is not w for w in weights)]

    def current(self, module, top_k, dtype):
        return (self.key == (top_k, dtype) and self.packing.holds(_parameters(module)) and self.packing.current()
                and self._others == state_of(self._rest(module)))


@torch.compiler.disable
def _layer_of(module, top_k: int, dtype) -> _Packed:
    held = _packed.get(module)
    if held is None or not held.current(module, top_k, dtype):
        if held is not None:
            held.packing.restore()
        held = None
        _packed.pop(module, None)  # the old copy goes before the new one is made
        if any(type(w) is Released for w in _parameters(module)):
            for weight in _parameters(module):
                weight.detach()  # another module's packed copy holds them: they come back
        held = _packed[module] = _Packed(module, top_k, dtype)
    if not held.packing.released:
        held.packing.release()
    return held


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """The contract of transformers' ExpertsInterface. Ids outside [0, experts) (the sentinel of remote
    experts) contribute nothing."""
    if self.training and torch.is_grad_enabled():
        raise RuntimeError(f"{type(self).__name__}: moesaic computes no gradients; call model.eval(), or train "
                           f"with experts_implementation='grouped_mm'")
    # The dtype of the rows matters where weights do not say it.
    dtype = hidden_states.dtype if hasattr(self, "activation_scheme") else None
    held = _layer_of(self, top_k_index.shape[-1], dtype)
    with torch.no_grad():
        output = torch_op.forward(hidden_states.to(held.dtype).contiguous(), top_k_index.contiguous(),
                                  top_k_weights.float().contiguous(), held.number)
    return output.to(hidden_states.dtype)


share_threads(torch)  # the model's other operators run on torch's threads, in turns with ours
ALL_EXPERTS_FUNCTIONS.register("moesaic", experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register("moesaic", experts_forward)
