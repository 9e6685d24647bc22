"""Modules whose weights stay packed.

A module is not replaced but converted in place: its class becomes a subclass of itself, its parameter a
`PackedParameter` with the planes in buffers named as in the file (`weight_codes`, `weight_scale`, …). So bias, hooks,
attributes and the forward of odd subclasses (Gemma's scaled embedding) survive, and no architecture needs a file of its
own:

- `QuantLinear` and `QuantEmbedding` replace the computation itself by that of `kernels`;
- `QuantExperts` is any other module that owns packed parameters, foremost fused experts [E, N, K]: its own forward runs
  on `LazyWeight`s, and the eager loop over experts decodes the ones that are hit, one after the other.

Planes keep their stored type through `.to(dtype)`, `.half()` and the like; what follows is the type they decode to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numfit.errors import CheckpointError
from numfit.formats import QuantizedTensor
from numfit.kernels import embedding, linear
from numfit.runtime.packed import LazyWeight, PackedParameter

ANCHOR = "dtype_and_device"  # see `drop_anchor`


class QuantModule(nn.Module):
    """A module with packed parameters: `_packed` maps each one's name to it."""

    _packed: dict[str, PackedParameter]
    _packed_buffers: frozenset[str]  # those of them that were buffers
    _unpacked_class: type[nn.Module]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _without_anchor(self):
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _without_anchor(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        mine = [packed for packed in self._packed.values() if packed.home is self]
        planes = {name: self._buffers.pop(name) for packed in mine for name in packed.plane_names()}
        super()._apply(fn, recurse)
        for name, plane in planes.items():
            assert plane is not None
            moved = fn(plane)
            self._buffers[name] = moved if moved.dtype == plane.dtype else plane.to(moved.device)
        for packed in mine:
            packed.dtype = fn(torch.empty(0, dtype=packed.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        lines = [super().extra_repr()]
        for name, packed in self._packed.items():
            formats = sorted({piece.format.name if piece.format else "dense" for piece in packed.pieces})
            lines.append(f"{name}={'+'.join(formats)}")
        return ", ".join(line for line in lines if line)


@contextmanager
def _without_anchor(module: nn.Module) -> Iterator[None]:
    anchor = module._parameters.pop(ANCHOR, None)
    try:
        yield
    finally:
        if anchor is not None:
            module._parameters[ANCHOR] = anchor


def _lazy(name: str) -> property:
    return property(lambda self: LazyWeight(self._packed[name]), doc=f"`{name}`, decoded when computed with")


class QuantLinear(QuantModule, nn.Linear):
    """`nn.Linear` on a packed weight [N, K]."""

    weight = _lazy("weight")  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed["weight"]
        if packed.transposed:
            return F.linear(input, packed.decode(input.dtype), self.bias)
        parts = [packed.piece(index) for index in range(len(packed.pieces))]
        if len(parts) == 1 and isinstance(parts[0], QuantizedTensor):
            return linear(input, parts[0], self.bias)
        outs = [linear(input, p) if isinstance(p, QuantizedTensor) else F.linear(input, p.to(input.dtype)) for p in parts]
        out = torch.cat(outs, -1)
        return out if self.bias is None else out + self.bias


class QuantEmbedding(QuantModule, nn.Embedding):
    """`nn.Embedding` on a packed table [N, K]; decodes the rows that occur."""

    weight = _lazy("weight")  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed["weight"]
        part = packed.piece(0)
        if len(packed.pieces) == 1 and not packed.transposed and isinstance(part, QuantizedTensor):
            return embedding(input, part, packed.dtype)
        return F.embedding(input, packed.decode())


class QuantExperts(QuantModule):
    """Any other module with packed parameters; see the module's docstring."""


@cache
def _packed_class(base: type[nn.Module], names: frozenset[str]) -> type[QuantModule]:
    """The subclass of `base` in which `names` are packed. Calls to super() in `base` end up in our forward."""
    if names == {"weight"} and base is nn.Linear:
        return QuantLinear
    if names == {"weight"} and base is nn.Embedding:
        return QuantEmbedding
    mixin: type[QuantModule] = QuantExperts
    if "weight" in names and issubclass(base, nn.Linear):
        mixin = QuantLinear
    elif "weight" in names and issubclass(base, nn.Embedding):
        mixin = QuantEmbedding
    members: dict[str, Any] = {name: _lazy(name) for name in names}
    return type(f"Quant{base.__name__}", (base, mixin), {"__module__": __name__, "__doc__": mixin.__doc__, **members})


def attach(module: nn.Module, name: str, packed: PackedParameter) -> None:
    """Turn the parameter or persistent buffer `name` of `module` into `packed`, converting the class in place.

    If `module` is the packed parameter's home, its planes become buffers on the meta device, to be filled later. They
    are non-persistent until then, so that no other loader feels called upon to find or initialise them.

    Raises:
        CheckpointError: an embedding that renormalises its table while looking up.
    """
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise CheckpointError(
            f"{packed.pieces[0].source} is an embedding with max_norm, which rewrites its table while it is used and "
            "so cannot be packed; quantize again with --embedding keep"
        )
    base = module._unpacked_class if isinstance(module, QuantModule) else type(module)
    parameters = {**(module._packed if isinstance(module, QuantModule) else {}), name: packed}
    were_buffers = getattr(module, "_packed_buffers", frozenset()) | ({name} & module._buffers.keys())
    delattr(module, name)
    module.__class__ = _packed_class(base, frozenset(parameters))  # type: ignore[arg-type]  # mypy: a class has no hash
    module.__dict__.update(_packed=parameters, _packed_buffers=were_buffers, _unpacked_class=base)
    if packed.home is module:
        for piece in packed.pieces:
            for buffer, (dtype, shape) in piece.buffers(packed.dtype).items():
                module.register_buffer(buffer, torch.empty(shape, dtype=dtype, device="meta"), persistent=False)


def drop_anchor(model: nn.Module) -> None:
    """Give a model without any parameter left an empty one: transformers asks the first for its dtype and device.

    That happens where norms have no weights (OLMo). The anchor is not part of the state dict.
    """
    packed = packed_modules(model)
    if packed and not any(p.is_floating_point() for p in model.parameters()):
        first = next(iter(packed[0][1]._packed.values()))
        anchor = nn.Parameter(torch.empty(0, dtype=first.dtype, device=first.device), requires_grad=False)
        first.home.register_parameter(ANCHOR, anchor)


def packed_modules(model: nn.Module) -> list[tuple[str, QuantModule]]:
    """Name and module of everything packed, each once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantModule)]


def decode_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Undo the packing: plain modules with decoded weights, in place. Takes the memory that quantizing had saved.

    Tied modules share one decoded parameter. `dtype` None keeps each parameter's own.
    """
    done: dict[int, nn.Parameter] = {}
    for _, module in packed_modules(model):
        module._parameters.pop(ANCHOR, None)
        for packed in module._packed.values():
            if id(packed) not in done:
                done[id(packed)] = nn.Parameter(packed.decode(dtype).contiguous(), requires_grad=False)
    for _, module in packed_modules(model):
        packed_parameters, were_buffers = module._packed, module._packed_buffers
        module.__class__ = module._unpacked_class  # type: ignore[assignment]
        del module._packed, module._packed_buffers, module._unpacked_class
        for name, packed in packed_parameters.items():
            if packed.home is module:
                for piece in packed.pieces:
                    for buffer in piece.buffers(packed.dtype):
                        delattr(module, buffer)
            if name in were_buffers:
                module.register_buffer(name, done[id(packed)].data)
            else:
                module.register_parameter(name, done[id(packed)])
    for part in model.modules():
        for attribute, ties in part.__dict__.pop("_hidden_ties", {}).items():
            setattr(part, attribute, ties)
    return model
