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
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numfit.errors import CheckpointError, OptionError
from numfit.kernels import ACTIVATIONS, embedding, linear
from numfit.runtime.packed import LazyWeight, PackedParameter

ANCHOR = "dtype_and_device"  # see `drop_anchor`
activations_when_loaded: ContextVar[str] = ContextVar("activations_when_loaded", default="int8")


class QuantModule(nn.Module):
    """A module with packed parameters: `_packed` maps each one's name to it."""

    _packed: dict[str, PackedParameter]
    _packed_buffers: frozenset[str]  # those of them that were buffers
    _unpacked_class: type[nn.Module]

    def _mine(self) -> list[PackedParameter]:
        return [packed for packed in self._packed.values() if packed.home is self]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _without_anchor(self):
            super()._save_to_state_dict(destination, prefix, keep_vars)
        for packed in self._mine():  # in the order of the buffers, as if they were there
            for index in packed.kernels:
                destination.update({prefix + name: plane for name, plane in packed.planes(index).items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for packed in self._mine():
            packed.to_planes()
        with _without_anchor(self):
            super()._load_from_state_dict(*args, **kwargs)
        _settle(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        mine = self._mine()
        if any(packed.kernels for packed in mine) and fn(torch.empty(0, dtype=torch.uint8)).device.type != "cpu":
            for packed in mine:
                packed.to_planes()
        planes = {name: self._buffers.pop(name) for packed in mine for name in packed.plane_names()}
        super()._apply(fn, recurse)
        for name, plane in planes.items():
            moved = None if plane is None else fn(plane)
            kept = moved is None or plane is None or moved.dtype == plane.dtype
            self._buffers[name] = moved if kept else plane.to(moved.device)  # type: ignore[union-attr]
        for packed in mine:
            packed.dtype = fn(torch.empty(0, dtype=packed.dtype)).dtype
        _settle(self)
        return self

    def extra_repr(self) -> str:
        lines = [super().extra_repr()]
        for name, packed in self._packed.items():
            formats = sorted({piece.format.name if piece.format else "dense" for piece in packed.pieces})
            lines.append(f"{name}={'+'.join(formats)}")
        return ", ".join(line for line in lines if line)


def _settle(module: QuantModule) -> None:
    """Let the kernels have what is on the CPU, where `use_kernels` has asked for it."""
    for packed in module._mine():
        serves = isinstance(module, QuantLinear | QuantEmbedding) and not packed.transposed
        if packed.activations is not None and serves and packed.device.type == "cpu":
            packed.to_kernels()


def check_activations(activations: str) -> None:
    """Refuse a word that `use_kernels` does not know.

    Raises:
        OptionError: it is such a word.
    """
    if activations not in (*ACTIVATIONS, "reference"):
        raise OptionError(f"activations are one of {', '.join(ACTIVATIONS)}, reference; not '{activations}'")


@contextmanager
def loading_with(activations: str) -> Iterator[None]:
    """Models loaded inside get these activations, through whichever door they come."""
    token = activations_when_loaded.set(activations)
    try:
        yield
    finally:
        activations_when_loaded.reset(token)


def use_kernels(model: nn.Module, activations: str) -> None:
    """Choose what runs packed linear layers and embeddings on a CPU, from now on and after moves between devices.

    Args:
        activations: "int8" or "exact" brings their weights into the layout of the native kernels; "reference" keeps, or
            makes again, the planes of the file and computes in PyTorch.

    Raises:
        OptionError: another word.
    """
    check_activations(activations)
    for _, module in packed_modules(model):
        for packed in module._mine():
            packed.activations = None if activations == "reference" else activations
            if packed.activations is None:
                packed.to_planes()
        _settle(module)


@contextmanager
def exact_activations(model: nn.Module) -> Iterator[None]:
    """While inside, kernels compute with exact activations."""
    all_packed = [packed for _, module in packed_modules(model) for packed in module._mine()]
    before = [packed.activations for packed in all_packed]
    for packed in all_packed:
        packed.activations = packed.activations and "exact"
    try:
        yield
    finally:
        for packed, activations in zip(all_packed, before, strict=True):
            packed.activations = activations


def kernels_in_use(model: nn.Module) -> dict[str, int]:
    """What computes the packed weights of a model, in words → how many tensors of the file it serves."""
    out: dict[str, int] = {}
    for _, module in packed_modules(model):
        for packed in module._mine():
            for index, piece in enumerate(packed.pieces):
                if piece.format is not None:
                    kernel = packed.kernels.get(index)
                    what = kernel.kernel if kernel else f"PyTorch ({_why(packed, index)})"
                    out[what] = out.get(what, 0) + 1
    return out


def activations_in_use(model: nn.Module) -> str:
    """What the kernels that a model uses do with activations, "int8" or "exact"; "reference" where it uses none."""
    parameters = [packed for _, module in packed_modules(model) for packed in module._mine()]
    return next((packed.activations for packed in parameters if packed.kernels and packed.activations), "reference")


def _why(packed: PackedParameter, index: int) -> str:
    if packed.activations is None:
        return "as asked for"
    if index in packed.refused:
        return packed.refused[index]
    return f"weights on {packed.device}" if packed.device.type != "cpu" else "experts and transposed weights have no kernel"


def packed_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and matrices of kernels; what is shared counts once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    kernels = [k for _, m in packed_modules(model) for packed in m._mine() for k in packed.kernels.values()]
    return sum(tensors.values()) + sum(k.nbytes for k in kernels)


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
        wants_grad = torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad))
        if packed.transposed or (packed.kernels and wants_grad):  # kernels have no backward pass
            return F.linear(input, packed.decode(input.dtype), self.bias)
        parts = [packed.piece(index) for index in range(len(packed.pieces))]
        mode = packed.activations or "exact"
        if len(parts) == 1 and not isinstance(parts[0], Tensor):
            return linear(input, parts[0], self.bias, mode)
        outs = [F.linear(input, p.to(input.dtype)) if isinstance(p, Tensor) else linear(input, p, None, mode) for p in parts]
        out = torch.cat(outs, -1)
        return out if self.bias is None else out + self.bias


class QuantEmbedding(QuantModule, nn.Embedding):
    """`nn.Embedding` on a packed table [N, K]; decodes the rows that occur."""

    weight = _lazy("weight")  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed["weight"]
        part = packed.piece(0)
        if len(packed.pieces) == 1 and not packed.transposed and not isinstance(part, Tensor):
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
                packed.kernels.clear()
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
