"""Carrying out a rewrite: factors, shifts and orders of channels moved across links, exactly.

What flows through the link becomes x' = ((x - shift) / scale)[order]. Producer and consumers are changed so that the
consumers' outputs stay: W' = (W * scale)[:, order], bias' = bias + W shift. All in the dtype of the tensors given: fp32
in use, fp64 in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.transforms.links import Link


@dataclass(frozen=True)
class Move:
    """What to do at one link; all per producer channel [P]. The order is applied last: new channel j is old order[j]."""

    link: Link
    scale: Tensor | None = None
    shift: Tensor | None = None
    order: Tensor | None = None


def shift_obstacle(link: Link, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a shift cannot pass a link exactly, in a sentence; None where it can."""
    if not link.straight:
        return f"what '{link.producer}' gives goes through an activation or a product, which do not let a constant pass"
    source = link.norm.bias if link.norm else f"{link.producer}.bias"
    if source is None or source not in tensors:
        name = link.norm.weight if link.norm else f"{link.producer}.weight"
        return f"the producer '{name}' has no bias from which the shift could be taken"
    missing = next((name for name in link.consumers if f"{name}.bias" not in tensors), None)
    return f"'{missing}' has no bias that could take the shift's image" if missing else None


def execute(moves: Iterable[Move], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite the tensors that moves touch, one move after the other.

    Args:
        tensors: those of the layer by name; none is changed in place.

    Returns:
        The changed tensors alone, in the dtype they had.

    Raises:
        OptionError: a tensor is missing, a move does not fit its link, or a factor is not positive and finite.
    """
    changed: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in changed and name not in tensors:
            raise OptionError(f"tensor '{name}' is needed by the transform but was not given")
        return changed[name] if name in changed else tensors[name]

    def rows_of(link: Link, name: str) -> Tensor | slice:
        return slice(None) if link.rows is None else torch.tensor(link.rows, device=get(name).device)

    for move in moves:
        link = move.link
        _check(move, tensors)
        if move.shift is not None:
            source = (link.norm.bias if link.norm else None) or f"{link.producer}.bias"
            changed[source] = _on_rows(get(source), rows_of(link, source), lambda b, z: b - z, move.shift)
            for name in link.consumers:
                w, z = get(f"{name}.weight"), link.spread(move.shift)
                changed[f"{name}.bias"] = get(f"{name}.bias") + (w.double() @ z.to(w.device).double()).to(w.dtype)
        if move.scale is not None:
            if link.norm:
                w, offset = get(link.norm.weight), link.norm.offset
                changed[link.norm.weight] = (offset + w) / move.scale.to(w) - offset
                if link.norm.bias:
                    b = get(link.norm.bias)
                    changed[link.norm.bias] = b / move.scale.to(b)
            else:
                for name in (f"{link.producer}.weight", f"{link.producer}.bias"):
                    if name.endswith("weight") or name in tensors:
                        changed[name] = _on_rows(get(name), rows_of(link, name), lambda w, s: w / s, move.scale)
            for name in link.consumers:
                w = get(f"{name}.weight")
                changed[f"{name}.weight"] = w * link.spread(move.scale).to(w)
        if move.order is not None:
            for module in (link.producer, *link.partners):
                for name in (f"{module}.weight", f"{module}.bias"):
                    if name.endswith("weight") or name in tensors:
                        w, rows = get(name), rows_of(link, name)
                        index = torch.arange(len(w), device=w.device)[rows]
                        changed[name] = w.index_copy(0, index, w[index[move.order.to(w.device)]])
            for name in link.consumers:
                w = get(f"{name}.weight")
                changed[f"{name}.weight"] = w[:, spread_order(link, move.order).to(w.device)].contiguous()
    return changed


def _on_rows(w: Tensor, rows: Tensor | slice, act: Callable[[Tensor, Tensor], Tensor], what: Tensor) -> Tensor:
    """`act(w[rows], what)` with one number of `what` a row; the other rows stay."""
    factor = what.to(w)
    out = w.clone()
    out[rows] = act(w[rows], factor[:, None] if w.ndim == 2 else factor)
    return out


def spread_order(link: Link, order: Tensor) -> Tensor:
    """An order of producer channels [P] as one of consumer channels [K]; channels stay within their head."""
    if link.repeat == 1:
        return order
    d = link.head_dim
    heads = torch.arange(len(order), device=order.device) // d
    inside = (order - heads * d).reshape(-1, 1, d).expand(-1, link.repeat, -1)  # [kv heads, repeat, d]
    first = torch.arange(inside.shape[0] * link.repeat, device=order.device).reshape(-1, link.repeat, 1) * d
    return (first + inside).reshape(-1)


def _check(move: Move, tensors: Mapping[str, Tensor]) -> None:
    link = move.link
    for what, value in (("scale", move.scale), ("shift", move.shift)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise OptionError(f"the {what} of '{link.consumers[0]}' is not finite")
    if move.scale is not None:
        if link.rigid:
            raise OptionError(f"no factor can pass exactly: {link.rigid}")
        if bool((move.scale <= 0).any()):
            raise OptionError(f"the factors of '{link.consumers[0]}' must be positive")
    if move.shift is not None and (reason := shift_obstacle(link, tensors)):
        raise OptionError(f"no shift can pass exactly: {reason}")
    if move.order is not None:
        order = move.order
        if link.norm:
            raise OptionError(f"the channels after '{link.norm.weight}' lie in the order of the residual stream")
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise OptionError(f"the order of the inputs of '{link.consumers[0]}' is not a permutation of all channels")
        if link.head_dim and not torch.equal(order // link.head_dim, torch.arange(len(order)).to(order) // link.head_dim):
            raise OptionError(f"the order of the inputs of '{link.consumers[0]}' moves channels from one head to another")


def moved_hessian(h: Tensor, move: Move, mean: Tensor | None = None) -> Tensor:
    """H = 2/T X Xᵀ of a consumer's inputs after a move, so that no second pass over the text is needed.

    Args:
        h: [K, K], or its diagonal [K].
        mean: mean of the inputs before the move [K]; needed with a shift.

    Raises:
        OptionError: a shift without `mean`.
    """
    link, full = move.link, h.ndim == 2
    out = h.double()
    if move.shift is not None:
        if mean is None:
            raise OptionError(f"the shifted statistics of '{link.consumers[0]}' need the mean of its inputs")
        z, mu = link.spread(move.shift).to(out), mean.to(out)
        if full:
            out = out - 2 * (torch.outer(z, mu) + torch.outer(mu, z) - torch.outer(z, z))
        else:
            out = out - 2 * (2 * z * mu - z * z)
    if move.scale is not None:
        s = link.spread(move.scale).to(out)
        out = out / (torch.outer(s, s) if full else s * s)
    if move.order is not None:
        order = spread_order(link, move.order).to(out.device)
        out = out[order][:, order] if full else out[order]
    return out.to(h.dtype)
