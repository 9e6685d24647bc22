"""Column scales for down projections that cost nothing (D²Quant's DSQ, 2602.02546): up rows * c, down columns / c.

A format with scales along rows cannot follow a column that is larger than its neighbours; a factor c per column can,
and between up and down it is free. c is found by alternation over any format: quantize W / c to Q, then
c_j = <W_j, Q_j> / <Q_j, Q_j>, the least-squares factor of each column.

Fold before up is quantized. The same fold carries any other positive column scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Layer
from numfit.transforms.awq import Quantize, output_error
from numfit.transforms.links import InputStats, choose
from numfit.transforms.moves import Move, execute


@dataclass(frozen=True)
class FoldOptions:
    columns: Mapping[str, Tensor]  # down linear -> c [K]; W / c is what will be quantized


def column_scale(w: Tensor, quantize: Quantize, h: Tensor, rounds: int = 15, start: str = "mean") -> Tensor:
    """Alternate between rounding W / c and refitting c; the best c by output error is kept, c = 1 among them.

    Args:
        w: [N, K].
        quantize: (w, importance) -> ŵ.
        h: H [K, K] or its diagonal [K]: the measure of error. With all ones it is the plain squared error.
        start: "mean" (c = mean |w| of the column, DSQ's) or "one".

    Returns:
        c [K], positive, geometric mean 1 over columns that are not zero.

    Raises:
        OptionError: an unknown start.
    """
    if start not in ("mean", "one"):
        raise OptionError(f"a column scale starts from 'mean' or 'one', not '{start}'")
    diagonal = h.diagonal() if h.ndim == 2 else h
    best = torch.ones(w.shape[1], dtype=torch.float64, device=w.device)
    least = output_error(quantize(w, diagonal.to(w)) - w, h.to(w))
    c = normalised(w.abs().double().mean(0)) if start == "mean" else best
    for _ in range(rounds):
        factor = c.to(w)
        q = quantize(w / factor, diagonal.to(w) * factor**2)
        loss = output_error(q * factor - w, h.to(w))
        if loss < least:
            least, best = loss, c
        refit = (w * q).sum(0, dtype=torch.float64).abs() / (q * q).sum(0, dtype=torch.float64)
        c = normalised(torch.where(torch.isfinite(refit), refit, c))
    return best


def normalised(c: Tensor) -> Tensor:
    """c with geometric mean 1; zeros (columns of zeros) become 1, and none is beyond 1e±4 of the mean."""
    positive = c[c > 0]
    if not len(positive):
        return torch.ones_like(c)
    c = c / positive.log().mean().exp()
    return torch.where(c > 0, c.clamp(1e-4, 1e4), torch.ones_like(c))


def apply(
    layer: Layer,
    decoder: Decoder,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    options: FoldOptions,
) -> dict[str, Tensor]:
    """Fold given column scales of down projections into the up projections. `stats` is not used.

    Raises:
        OptionError: a name that is no down projection of this layer, a network without gate, a bad factor.
    """
    links = {link.consumers[0]: link for link in choose(decoder, layer, ("down",))}
    unknown = next((name for name in options.columns if name not in links), None)
    if unknown:
        raise OptionError(f"'{unknown}' is no down projection of '{layer.prefix}*'; those are: {', '.join(links)}")
    # a factor that divides W is one that multiplies what flows in
    return execute((Move(links[name], scale=1 / c.double()) for name, c in options.columns.items()), tensors)
