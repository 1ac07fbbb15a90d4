# SPDX-License-Identifier: Apache-2.0
"""Parameters whose storage is released while a packed copy of them serves the forward.

A released parameter keeps its shape, dtype and device. Whatever touches its values (state_dict, an
in-place update, .to, copy, pickle) first brings them back, bit for bit, out of the packed copy. The
alternatives lost: a storage resized to nothing crashes when it is read, a meta parameter is silently not
updated, and running on unpacked weights costs 5 to 30 times the time on the CPU.

Not seen is what changes values through `.data` where torch counts no version and nothing was brought back: of a
parameter that keeps its storage (both copies stay; biases and scales), and through a `.data` tensor taken before a
forward, which then is nobody's.
"""

from __future__ import annotations

import copy

import torch

_METADATA = {"size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_contiguous",
             "is_floating_point", "is_complex", "__len__", "__hash__", "storage_offset"}
_PROPERTIES = {"shape", "dtype", "requires_grad", "grad", "is_leaf", "ndim", "layout", "grad_fn", "itemsize", "names",
               "is_sparse", "is_quantized", "_version", "output_nr", "retains_grad"}


class Released(torch.nn.Parameter):
    """A parameter without storage. `_packing` brings it back."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
            if name in ("device", "is_meta", "is_cuda", "is_cpu"):
                device = args[0].__dict__["_device"]
                return {"device": device, "is_meta": False, "is_cuda": device.type == "cuda",
                        "is_cpu": device.type == "cpu"}[name]
            metadata = name in _PROPERTIES
        else:
            metadata = name in _METADATA
        if not metadata:
            for value in torch.utils._pytree.tree_leaves((args, kwargs)):
                if type(value) is Released:
                    value.__dict__["_packing"].restore()
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo):
        self.__dict__["_packing"].restore()
        return copy.deepcopy(self, memo)  # no longer of this class

    def __reduce_ex__(self, protocol):
        self.__dict__["_packing"].restore()
        return self.__reduce_ex__(protocol)


def state_of(parameters) -> tuple:
    """What must stay the same for a packed copy to be current."""
    return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)


class Packing:
    """One module's layer and the two weights that it holds instead of the parameters.

    views(fc1, fc2): the [E, N, K] views of the two parameters that were packed.
    """

    def __init__(self, layer, weights, views):
        self.layer = layer
        self._weights, self._views = weights, views
        self._restored = None
        self.can_release = self._try()

    def _try(self):
        one, two = self._views(*(w.detach() for w in self._weights))
        try:
            self.layer.unpack_expert(0, torch.empty_like(one[:1]), torch.empty_like(two[:1]))
            return True
        except ValueError:
            return False  # the device keeps an order of its own: both copies stay

    @property
    def released(self):
        return all(type(w) is Released for w in self._weights)

    def holds(self, weights) -> bool:
        return all(mine is w for mine, w in zip(self._weights, weights))

    def current(self) -> bool:
        """Whether the packed copy is what the parameters say."""
        return self.released or (self._restored is not None and self._restored == state_of(self._weights)
                                 and (not self.can_release or self._same_bits()))

    def _same_bits(self) -> bool:
        """Of parameters that came back against the packed copy, an expert at a time: `.data` changes values without a version.
        It takes as long as bringing them back did, and a forward behind a forward does not come here."""
        views = self._views(*(w.detach() for w in self._weights))
        mine = [torch.empty_like(v[:1]) for v in views]
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[views[0].element_size()]  # NaN is equal to itself
        for e in range(views[0].shape[0]):
            self.layer.unpack_expert(e, *mine)
            if not all(torch.equal(m.view(bits), v[e:e + 1].view(bits)) for m, v in zip(mine, views)):
                return False
        return True

    def release(self):
        if not self.can_release:
            self._restored = state_of(self._weights)
            return
        for weight in self._weights:
            with torch.no_grad():
                bare = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
                empty = torch.Tensor._make_subclass(Released, bare, weight.requires_grad)
            empty.__dict__["_packing"], empty.__dict__["_device"] = self, weight.device
            torch.utils.swap_tensors(weight, empty)

    def restore(self):
        """Brings the values back into the parameters; the packed copy stays current until they change."""
        if not self.released:
            return
        full = []
        for weight in self._weights:
            with torch._C.DisableTorchFunctionSubclass():
                data = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype,
                                           device=weight.__dict__["_device"])
                full.append(torch.nn.Parameter(data, requires_grad=weight.requires_grad))
        one, two = self._views(*(p.detach() for p in full))
        for e in range(one.shape[0]):
            self.layer.unpack_expert(e, one[e:e + 1], two[e:e + 1])
        for weight, values in zip(self._weights, full):
            torch.utils.swap_tensors(weight, values)
        self._restored = state_of(self._weights)
