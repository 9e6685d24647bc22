"""Rotate the residual stream of a whole model offline, exactly (QuaRot's R1, Ashkboos et al., 2404.00456).

    embedding rows E R',  outputs of o and down R W,  inputs of q k v gate up router and head W diag(gain) R',  gains 1

An RMSNorm without gain commutes with any rotation; so gains are first folded into the linears that follow. A LayerNorm
also subtracts the mean: there R keeps the vector of ones (`Rotation.fixing_mean`), and the norm's bias b stays in the
norm as R (b / gain). What cannot be done exactly is refused: norms on what attention adds to the stream (Gemma), since
their gain stands on the wrong side of the rotation; tied embeddings, unless `untie` (the head then is a tensor of its
own: more bytes); anything in the model whose place is not known.

The plan knows names only. Tensors are then rewritten one at a time, in any order, each from those it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Norm
from numfit.transforms.links import require_known
from numfit.transforms.orthogonal import Rotation

Read = Callable[[str], Tensor]
BUFFERS = (".inv_freq",)


@dataclass(frozen=True)
class Step:
    """How one tensor of the rotated model is made."""

    kind: str  # "input" | "output" | "gain" | "norm bias"
    source: str  # the tensor it comes from (another one where the head was tied)
    norm: Norm | None = None  # "input", "gain", "norm bias"


@dataclass(frozen=True)
class ResidualRotation:
    """A plan: which tensors change, and how. `untied`: set tie_word_embeddings to false in the config."""

    seed: int
    fixing_mean: bool
    steps: Mapping[str, Step]
    untied: bool


def plan_residual(
    decoder: Decoder, names: Iterable[str], *, seed: int = 0, untie: bool = False, head: str | None = None
) -> ResidualRotation:
    """Plan the rotation of a model.

    Args:
        names: of all tensors of the checkpoint.
        untie: a head tied to the embedding becomes a tensor of its own; without it such a model is refused.
        head: the name of that tensor; None for the usual one.

    Raises:
        OptionError: with the reason why it cannot be exact.
    """
    names = set(names)
    for layer in decoder.layers:
        require_known(decoder, layer)
    steps: dict[str, Step] = {decoder.embedding: Step("input", decoder.embedding)}
    norms: list[Norm] = []

    def feed(norm: Norm, linears: Iterable[str]) -> None:
        norms.append(norm)
        steps[norm.weight] = Step("gain", norm.weight, norm)
        if norm.bias:
            steps[norm.bias] = Step("norm bias", norm.bias, norm)
        for linear in linears:
            steps[f"{linear}.weight"] = Step("input", f"{linear}.weight", norm)

    for layer in decoder.layers:
        if layer.post_norms:
            raise OptionError(
                f"the residual stream cannot be rotated: '{layer.post_norms[0].weight}' scales the channels of what is added "
                "to it, and that does not commute with a rotation"
            )
        if layer.input_norm is None or layer.ffn_norm is None or layer.o is None or not layer.feed_forwards:
            raise OptionError(
                f"the residual stream cannot be rotated: '{layer.prefix}*' lacks a norm, o or a feed-forward network of its own"
            )
        if layer.input_norm == layer.ffn_norm:
            feed(layer.input_norm, layer.attention_inputs + layer.ffn_inputs)
        else:
            feed(layer.input_norm, layer.attention_inputs)
            feed(layer.ffn_norm, layer.ffn_inputs)
        for module in (layer.o, *(network.down for network in layer.feed_forwards)):
            for name in (f"{module}.weight", f"{module}.bias"):
                if name.endswith("weight") or name in names:
                    steps[name] = Step("output", name)
    if decoder.final_norm is None:
        raise OptionError("the residual stream cannot be rotated: no norm was found before the output layer")
    if decoder.lm_head is None and not untie:
        raise OptionError(
            f"the residual stream cannot be rotated while the output layer is tied to '{decoder.embedding}': the last norm's "
            "gain goes into the output layer alone; allow it to become a tensor of its own (untie)"
        )
    lm_head = decoder.lm_head or head or ("embed_out.weight" if decoder.model_type == "gpt_neox" else "lm_head.weight")
    feed(decoder.final_norm, ())
    steps[lm_head] = Step("input", decoder.lm_head or decoder.embedding, decoder.final_norm)
    _no_strangers(decoder, names, steps)
    centred = {norm.centred for norm in norms}
    return ResidualRotation(seed, True in centred, steps, decoder.lm_head is None)


def _no_strangers(decoder: Decoder, names: set[str], steps: Mapping[str, Step]) -> None:
    prefixes = tuple(layer.prefix for layer in decoder.layers)
    for name in sorted(names - set(steps)):
        # a tied head may lie in the file as well; a bias of the head stays; layers were checked tensor by tensor
        known = name.startswith(prefixes) or name.endswith(BUFFERS) or name in ("lm_head.bias", "embed_out.bias")
        if not known and not (decoder.lm_head is None and name in ("lm_head.weight", "embed_out.weight")):
            raise OptionError(f"the residual stream cannot be rotated: what '{name}' has to do with it is not known here")
    missing = next((step.source for step in steps.values() if step.source not in names), None)
    if missing:
        raise OptionError(f"the residual stream cannot be rotated: tensor '{missing}' is missing")


def rotate_tensor(plan: ResidualRotation, name: str, read: Read) -> Tensor:
    """One tensor of the rotated model, in the dtype of its source if that is fp32 or fp64, else in fp32.

    Args:
        read: gives a tensor of the original model; asked for `name`'s source and for at most two tensors of a norm.

    Raises:
        OptionError: a gain of 0 under a bias (LayerNorm), which leaves the bias no place.
    """
    step = plan.steps[name]
    w = read(step.source)
    w = w if w.dtype in (torch.float32, torch.float64) else w.float()
    if step.kind == "gain":
        assert step.norm
        return torch.full_like(w, 1 - step.norm.offset)
    if step.kind == "input":
        if step.norm:
            w = w.double() * _gain(step.norm, read).to(w.device)
        return _rotation(plan, w.shape[1]).rotate(w).to(torch.promote_types(read(step.source).dtype, torch.float32))
    if step.kind == "output":
        return _rotation(plan, w.shape[0]).rotate(w.T).T.contiguous() if w.ndim == 2 else _rotation(plan, len(w)).rotate(w)
    assert step.norm
    gain = _gain(step.norm, read).to(w.device)
    if bool(((gain == 0) & (w != 0)).any()):
        raise OptionError(f"'{step.norm.weight}' is 0 in a channel where '{name}' is not, so the bias cannot be rotated")
    return _rotation(plan, len(w)).rotate(torch.where(w != 0, w.double() / gain, 0)).to(w.dtype)


def rotate_residual(plan: ResidualRotation, read: Read) -> Iterator[tuple[str, Tensor]]:
    """All changed tensors, one at a time. Tensors that the plan does not name stay as they are."""
    for name in plan.steps:
        yield name, rotate_tensor(plan, name, read)


def rotate_inputs(plan: ResidualRotation, x: Tensor) -> Tensor:
    """What the rotation does to the residual stream [..., hidden]."""
    return _rotation(plan, x.shape[-1]).rotate(x)


def _rotation(plan: ResidualRotation, n: int) -> Rotation:
    return Rotation(n, plan.seed, plan.fixing_mean)


def _gain(norm: Norm, read: Read) -> Tensor:
    return norm.offset + read(norm.weight).double()
