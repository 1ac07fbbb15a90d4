# SPDX-License-Identifier: Apache-2.0
"""An experts implementation for transformers >= 5.

    import moesaic.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moesaic")

Weights are packed once per module, and again when a parameter's storage or version changes. What the
module's gate computes is not guessed from its name: the module's own `_apply_gate` is evaluated on a
few values and must agree with one of the activations below, or the class is refused by name.
"""

from __future__ import annotations

import weakref

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .. import torch_op
from ..layer import Layer

_MAX_TOKENS = 1 << 20
_SCHEMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_packed: "weakref.WeakKeyDictionary[torch.nn.Module, tuple]" = weakref.WeakKeyDictionary()


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


def _weights(module) -> tuple:
    """(fc1, fc2) as [E, N, K] views of the module's parameters."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    fc1, fc2 = {"weight": up.detach()}, {"weight": down.detach()}
    if module.has_bias:
        fc1["bias"] = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias).detach()
        fc2["bias"] = module.down_proj_bias.detach()
    return fc1, fc2


def _state(module) -> tuple:
    """What must stay the same for packed weights to be current."""
    return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in module.parameters())


def _layer_number(module, top_k: int) -> int:
    state = (top_k, _state(module))
    held = _packed.get(module)
    if held is not None and held[0] == state:
        return held[2]
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{type(module).__name__}: normalizes each expert's output, which moesaic does not "
                         f"do; use experts_implementation='grouped_mm' for this model")
    fc1, fc2 = _weights(module)
    dtype = fc1["weight"].dtype
    if dtype not in _SCHEMES:
        raise ValueError(f"{type(module).__name__}: expert weights are {dtype}; moesaic takes float32, "
                         f"float16 or bfloat16 here")
    experts, hidden, intermediate = fc2["weight"].shape
    device = fc1["weight"].device
    layer = Layer(experts=experts, hidden=hidden, intermediate=intermediate, top_k=min(top_k, experts),
                  max_tokens=_MAX_TOKENS, scheme=_SCHEMES[dtype], activation=activation_of(module),
                  device="cpu" if device.type == "cpu" else f"cuda:{device.index or 0}")
    _packed.pop(module, None)  # the old copy goes before the new one is made
    layer.load(fc1, fc2)
    number = torch_op.register(layer)
    _packed[module] = (state, layer, number)
    return number


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """The contract of transformers' ExpertsInterface. Ids outside [0, experts) (the sentinel of remote
    experts) contribute nothing."""
    if self.training and torch.is_grad_enabled():
        raise RuntimeError(f"{type(self).__name__}: moesaic computes no gradients; call model.eval(), or train "
                           f"with experts_implementation='grouped_mm'")
    number = _layer_number(self, top_k_index.shape[-1])
    dtype = _packed[self][1].config["input_dtype"]
    torch_dtype = {v: k for k, v in _SCHEMES.items()}[dtype]
    with torch.no_grad():
        output = torch_op.forward(hidden_states.to(torch_dtype).contiguous(), top_k_index.contiguous(),
                                  top_k_weights.float().contiguous(), number)
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("moesaic", experts_forward)
