# SPDX-License-Identifier: Apache-2.0
"""Level 1: the layer. y[t] = sum_j w[t,j] * FC2_e(act(FC1_e(x[t]))), e = id[t,j]."""

from __future__ import annotations

from typing import Optional, Union

from . import _arrays, _ffi, _modes
from ._arrays import Array, dtype_text
from ._ffi import arg, integer, lib


_forward = lib.layer_forward  # looked up once: it is the call that decode makes


_FORWARD = ("hidden_states", "hidden_scale", "topk_weights", "router_logits", "output")  # what could have a gradient
_OP = "moesaic.torch_op.forward(hidden_states, topk_ids, topk_weights, moesaic.torch_op.register(layer))"
_LAYER_TRACED = f"a Layer cannot be traced; call {_OP}"
_CALL_TRACED = f"only a whole layer can be traced, as {_OP}"


def run_with_scratch(call, like: Array, values: dict, outputs: tuple = (), *leading) -> None:
    """The one form of the calls of levels 2 and 3, which write to `outputs` of `values`. On the CPU the library has scratch
    of its own; on a device it borrows from torch's stream-ordered allocator, if `like` is torch's. Where it cannot, a call
    only says how much it needs, and that is made in the framework of `like`."""
    pairs = _ffi.pairs(values, outputs)
    _modes.check(like, pairs[::2], pairs[1::2], _CALL_TRACED)
    try:
        if type(like) in _ffi.tells_its_stream:
            _run(call, like, leading, True, pairs)
        else:
            with _ffi.on_stream_of(like):
                _run(call, like, leading, None, pairs)
    except Exception as error:
        raise _ffi.first_trouble(error, values) from None


def _run(call, like, leading, scratch, rest):
    needed = call(*leading, scratch, *rest)
    if needed:
        call(*leading, arg(_arrays.empty(like, (needed,), "u8")), *rest)


def _with_weights(call, values: dict, arguments) -> None:
    """call(*arguments()), which reads the arrays of `values`, once what they hold is there."""
    try:
        _ffi.settle(values)
        call(*arguments())
    except Exception as error:
        raise _ffi.first_trouble(error, values) from None


def _spec(value: Union[str, dict], name: str, key: str, example: str) -> dict:
    """A name, or a dictionary of options with the name under `key`."""
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a name or a dict with '{key}', got {type(value).__name__}")
    if value.get(key) is None:
        raise ValueError(f"{name}: expected a '{key}' in the dict, got {sorted(map(str, value))}; e.g. {key}='{example}'")
    return dict(value)


class Layer:
    """One Mixture-of-Experts feed-forward layer with its weights packed for one device.

    Parameters name what moesaic::LayerConfig holds:

    experts, hidden, intermediate, top_k, max_tokens : int
    scheme : str, e.g. "bf16", "fp8_block", "int4_w4a16" (see moesaic.schemes())
    quant : dict, further quantization options: weight_scale, act_scale, block_n, block_k, group_size,
        zero_points, int8_rounding
    activation : str or dict(kind, order, layout, alpha, beta, limit)
    routing : str or dict(method, renormalize, scale, groups, topk_groups, ...)
    input_dtype, output_dtype : str, "bf16", "f16", "f32", "fp8_e4m3", "i8"
    local_first, local_count : the experts held here (default: all)
    weight_on : "output" or "input" (Llama-4)
    weight_storage : "copied", or "in_place": on CUDA, `load` keeps the arrays given instead of copies
    shared_experts, shared_intermediate, workspace_cap : int
    device : "cpu" or "cuda:N"

    Raises ValueError when the configuration is wrong or outside the support matrix; the message names
    the argument and what to use instead.
    """

    def __init__(self, *, experts: int, hidden: int, intermediate: int, top_k: int, max_tokens: int,
                 scheme: str = "bf16", quant: Optional[dict] = None, activation: Union[str, dict] = "swiglu",
                 routing: Union[str, dict] = "renormalize", input_dtype: Optional[str] = None,
                 output_dtype: Optional[str] = None, local_first: int = 0, local_count: int = 0,
                 weight_on: str = "output", shared_experts: int = 0, shared_intermediate: int = 0,
                 workspace_cap: int = 0, weight_storage: str = "copied", device: str = "cpu") -> None:
        sizes = {name: integer(value, name) for name, value in dict(
            experts=experts, hidden=hidden, intermediate=intermediate, top_k=top_k, max_tokens=max_tokens, local_first=local_first,
            local_count=local_count, shared_experts=shared_experts, shared_intermediate=shared_intermediate,
            workspace_cap=workspace_cap).items()}
        if not isinstance(scheme, str):
            raise TypeError(f"scheme: expected a name (moesaic.schemes() lists them), got {type(scheme).__name__}")
        if not isinstance(quant, (dict, type(None))):
            raise TypeError(f"quant: expected a dict of options, got {type(quant).__name__}")
        if quant and quant.get("scheme", scheme) != scheme:
            raise ValueError(f"quant: expected no other scheme than scheme='{scheme}', got '{quant['scheme']}'; name it once, as "
                             "scheme=")
        if input_dtype is None:
            input_dtype = scheme if scheme in ("f32", "f16") else "bf16"
        if output_dtype is None:
            output_dtype = input_dtype if input_dtype in ("f32", "f16", "bf16") else "bf16"
        for name, value in dict(weight_on=weight_on, weight_storage=weight_storage).items():
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a name, got {type(value).__name__}")
        self.config: dict = dict(
            sizes, quant=dict(quant or {}, scheme=scheme),
            activation=_spec(activation, "activation", "kind", "swiglu"),
            routing=_spec(routing, "routing", "method", "renormalize"),
            weight_on=weight_on, input_dtype=dtype_text(input_dtype), output_dtype=dtype_text(output_dtype),
            weight_storage=weight_storage)
        device = str(device)  # a torch.device, too
        self._attach(lib.layer_new(self.config, device), self.config, device)

    def _attach(self, handle, config: dict, device: str) -> None:
        self._handle, self.config, self.device = handle, config, device
        self._output_dtype = config["output_dtype"]
        self._kept: list = []  # what lies in place

    def load(self, fc1: dict, fc2: dict, *, alpha: Optional[Array] = None, beta: Optional[Array] = None,
             limit: Optional[Array] = None) -> "Layer":
        """Packs the weights of every local expert; the arrays may go away afterwards.

        With weight_storage "in_place" they are the layer's from the call on: dense arrays on its device, not to be
        written by anybody else, of which `unpack_expert` has the values (4-bit weights may be rearranged where they lie).
        The layer holds a reference to them.

        fc1, fc2 : dict(weight=[E, N, K], scale=, zero_point=, bias=[E, N], input_scale=, prequant=, alpha=)
        alpha, beta, limit : f32 [E], per-expert parameters of the activation
        """
        weights = dict(fc1=fc1, fc2=fc2, alpha=alpha, beta=beta, limit=limit)
        _with_weights(lib.layer_load, weights, lambda: (self._handle, _ffi.options(weights)))
        self._keep(fc1, fc2)
        return self

    def load_expert(self, expert: int, fc1: dict, fc2: dict, *, alpha: Optional[Array] = None,
                    beta: Optional[Array] = None, limit: Optional[Array] = None) -> None:
        """The same for one local expert; every array has a leading extent of 1."""
        weights = dict(fc1=fc1, fc2=fc2, alpha=alpha, beta=beta, limit=limit)
        _with_weights(lib.layer_load_expert, weights, lambda: (self._handle, integer(expert, "expert"), _ffi.options(weights)))

    def load_shared(self, fc1: dict, fc2: dict, gate: Optional[Array] = None) -> None:
        """Shared experts (leading extent 1); `gate` [H]: multiplied by sigmoid(x . gate)."""
        weights = dict(fc1=fc1, fc2=fc2)
        _with_weights(lib.layer_load_shared, dict(weights, gate=gate),
                      lambda: (self._handle, _ffi.options(weights), arg(gate, "gate")))
        self._keep(fc1, fc2)

    def _keep(self, *products: dict) -> None:
        if self.config["weight_storage"] == "in_place":
            self._kept += [product.get(name) for product in products for name in ("weight", "scale", "zero_point")]

    def set_router(self, weight: Optional[Array] = None, bias: Optional[Array] = None,
                   selection_bias: Optional[Array] = None) -> None:
        """Router weights [E, H] and biases [E]; forward may then be called without logits."""
        router = dict(weight=weight, bias=bias, selection_bias=selection_bias)
        _with_weights(lib.layer_set_router, router, lambda: (self._handle, *(arg(router[name], name) for name in router)))

    def unpack_expert(self, expert: int, fc1: Array, fc2: Array) -> None:
        """Writes one expert's weights back, bit for bit: fc1 [1, N, K] and fc2 [1, H, I] are filled. Not for
        weights of four bits, nor where a device keeps an order of its own (ValueError)."""
        into = dict(fc1=fc1, fc2=fc2)
        _with_weights(lib.layer_unpack_expert, into, lambda: (
            self._handle, integer(expert, "expert"), *(arg(_ffi.out(into[name], name), name) for name in into)))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={self.config[name]}" for name in ("experts", "hidden", "intermediate", "top_k"))
        return f"moesaic.Layer({self.config['quant']['scheme']}, {sizes}, device='{self.device}')"

    def __reduce__(self):
        raise TypeError("Layer: packed weights are not copied or pickled; share the layer (forward changes nothing in "
                        "it), or make Layer(...) again and load it")

    @property
    def ready(self) -> bool:
        """Whether every local expert has its weights."""
        return lib.layer_ready(self._handle)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights, on the layer's device."""
        return lib.layer_weight_bytes(self._handle)

    def workspace_bytes(self, tokens: int) -> int:
        """Scratch that forward needs for `tokens` tokens: a pure function of the configuration."""
        return lib.layer_workspace_bytes(self._handle, integer(tokens, "tokens"))

    def forward(self, hidden_states: Array, topk_ids: Optional[Array] = None, topk_weights: Optional[Array] = None, *,
                router_logits: Optional[Array] = None, hidden_scale: Optional[Array] = None,
                output: Optional[Array] = None, add: bool = False, tokens_per_expert: Optional[Array] = None,
                workspace: Optional[Array] = None) -> Array:
        """hidden_states [T, H] -> output [T, H] in the caller's framework.

        Routing: topk_ids [T, k] (i32 or i64) and topk_weights [T, k] (f32); or router_logits [T, E]; or
        neither, with set_router. `add=True` adds to `output` instead of overwriting it. torch's traces and gradients are refused
        (moesaic.torch_op.forward can be traced).
        """
        _modes.check(hidden_states, _FORWARD, (hidden_states, hidden_scale, topk_weights, router_logits, output), _LAYER_TRACED)
        try:
            if output is None:
                if add:
                    raise ValueError("output: is required with add=True; pass what is to be added to")
                output = _arrays.empty_like(hidden_states, self._output_dtype)
            else:
                _ffi.out(output, "output")
            self._run(hidden_states, workspace, (hidden_states, hidden_scale, topk_ids, topk_weights, router_logits, output,
                                                 add, tokens_per_expert))
        except Exception as error:
            _arrays.as_array(hidden_states, "hidden_states")
            if not isinstance(add, (bool, int)):
                raise TypeError(f"add: expected True or False, got {add!r}") from None
            raise _ffi.first_trouble(error, dict(
                hidden_states=hidden_states, hidden_scale=hidden_scale, topk_ids=topk_ids, topk_weights=topk_weights,
                router_logits=router_logits, output=output, tokens_per_expert=tokens_per_expert))
        return _arrays.give_back(hidden_states, output)

    __call__ = forward

    def _run(self, like, workspace, given):
        if type(like) in _ffi.tells_its_stream:
            try:  # torch's tensors go over as they are, and mostly nothing else comes along: asking each costs a third of the call
                needed = _forward(self._handle, True if workspace is None else workspace, *given)
                if needed:
                    _forward(self._handle, _arrays.empty(like, (needed,), "u8"), *given)
                return
            except (TypeError, BufferError):
                pass
        x, scale, ids, weights, logits, output, add, counts = given
        call = (self._handle, True if workspace is None else arg(workspace, "workspace"), arg(x, "hidden_states"),
                arg(scale, "hidden_scale"), arg(ids, "topk_ids"), arg(weights, "topk_weights"), arg(logits, "router_logits"),
                arg(output, "output"), add, arg(counts, "tokens_per_expert"))
        if self.device == "cpu":
            _forward(*call)
            return
        handle, scratch, *rest = call
        if type(like) in _ffi.tells_its_stream:
            _run(_forward, like, (handle,), scratch, rest)
        else:
            with _ffi.on_stream_of(like):
                _run(_forward, like, (handle,), None if workspace is None else scratch, rest)
