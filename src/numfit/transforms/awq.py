"""Activation-aware scaling (AWQ; Lin et al., 2306.00978): protect the columns that see large activations.

    s = (mean|x|)^rho / sqrt(max s * min s),  rho in {0, 1/20, …, 19/20}

rho is the one with the least error of the outputs after quantizing the scaled weights to nearest: tr(E H Eᵀ) with
E = Q(W s) / s - W summed over all linears that share the input. rho = 0 (nothing done) is among the candidates, so the
objective never gets worse. Gives up AWQ's clipping search: fitting scales already does that, weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Layer
from numfit.transforms.links import InputStats, Link, choose, statistic
from numfit.transforms.moves import Move, execute

Quantize = Callable[[Tensor, Tensor], Tensor]  # (w [N, K], importance [K]) -> ŵ [N, K]


@dataclass(frozen=True)
class AwqOptions:
    quantize: Quantize  # nearest rounding to the format in mind; importance is the mean square of the scaled inputs
    hessians: Mapping[str, Tensor] | None = None  # linear -> H [K, K] or its diagonal; None: the mean squares
    grid: int = 20
    divide_by_weights: bool = False  # s = mean|x|^rho / mean|w|^(1 - rho), |w| relative to the row's largest
    where: Collection[str] | None = None  # of links.PLACES; None: wherever it is exact


@dataclass(frozen=True)
class Search:
    """What a search found at one link."""

    move: Move
    rho: float
    losses: tuple[float, ...]  # of each candidate; the first is that of doing nothing


def search(
    layer: Layer, decoder: Decoder, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: AwqOptions
) -> list[Search]:
    """Choose rho for each link. Links whose best is to do nothing are listed too, with factors of 1.

    Raises:
        OptionError: an empty grid, an impossible place, missing statistics, a Hessian of the wrong shape.
    """
    if options.grid < 2:
        raise OptionError(f"AWQ's grid of {options.grid} leaves nothing to choose from; use 2 or more")
    found = []
    for link in choose(decoder, layer, options.where):
        mean_abs = statistic(link, stats, "mean_abs")
        if mean_abs is not None:
            found.append(_search_link(link, mean_abs, tensors, stats, options))
    return found


def _search_link(
    link: Link, mean_abs: Tensor, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: AwqOptions
) -> Search:
    x = link.gather(mean_abs.double(), "mean").clamp(min=1e-8)
    w_mean = link.gather(_relative_weight(link, tensors).to(x), "mean").clamp(min=1e-8)
    common = statistic(link, stats, "mean_square")
    assert common is not None  # mean_abs was there
    best = torch.ones_like(x)
    losses: list[float] = []
    for step in range(options.grid):
        rho = step / options.grid
        s = x**rho
        if options.divide_by_weights and step > 0:
            s = s / w_mean ** (1 - rho)
        s = s.clamp(min=1e-4)
        s = (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)
        loss = sum(
            _loss(tensors[f"{name}.weight"], link.spread(s), _hessian(name, common, options), options.quantize)
            for name in link.targets
        )
        if not losses or loss < min(losses):
            best = s
        losses.append(float(loss))
    rho = losses.index(min(losses)) / options.grid
    return Search(Move(link, scale=best), rho, tuple(losses))


def _hessian(name: str, common: Tensor, options: AwqOptions) -> Tensor:
    h = (options.hessians or {}).get(name, common)
    if h.shape[0] != common.shape[0] or h.shape[-1] != common.shape[0]:
        raise OptionError(f"the Hessian of '{name}' has shape {tuple(h.shape)}, but it has {common.shape[0]} inputs")
    return h


def _loss(w: Tensor, s: Tensor, h: Tensor, quantize: Quantize) -> float:
    s, h = s.to(w), h.to(w)
    diagonal = h.diagonal() if h.ndim == 2 else h
    error = quantize(w * s, diagonal / (s * s)) / s - w  # [N, K]
    return output_error(error, h)


def output_error(error: Tensor, h: Tensor) -> float:
    """tr(E H Eᵀ) for H [K, K], or with a diagonal H [K]."""
    weighted = error @ h if h.ndim == 2 else error * h
    return float((weighted * error).sum(dtype=torch.float64))


def _relative_weight(link: Link, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean over rows of |w| relative to the largest of its row: [K]."""
    rows = torch.cat([tensors[f"{name}.weight"] for name in link.targets]).abs()
    return (rows / rows.amax(1, keepdim=True).clamp(min=1e-12)).mean(0)


def apply(
    layer: Layer, decoder: Decoder, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: AwqOptions
) -> dict[str, Tensor]:
    """The changed tensors of a layer; see `search`. Links are searched on the tensors as given, then all are moved."""
    return execute((found.move for found in search(layer, decoder, tensors, stats, options) if found.rho > 0), tensors)
