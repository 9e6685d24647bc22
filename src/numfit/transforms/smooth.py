"""SmoothQuant: move outliers of activations into the weights (Xiao et al., 2211.10438).

    s = max|x|^alpha / max|w|^(1 - alpha) per channel;  x / s,  w * s

alpha = 1 makes all activations equally large, alpha = 0 all weight columns. It serves formats of activations; for
weights alone it has no reason to help.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Layer
from numfit.transforms.links import InputStats, Link, choose, statistic
from numfit.transforms.moves import Move, execute


@dataclass(frozen=True)
class SmoothOptions:
    alpha: float = 0.5
    smallest: float = 1e-5  # factors are never below this, nor above its inverse
    where: Collection[str] | None = None  # of links.PLACES; None: wherever it is exact


def plan(
    layer: Layer, decoder: Decoder, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: SmoothOptions
) -> list[Move]:
    """The factors of each link, from the tensors and `absmax`. Channels that are always 0 keep factor 1.

    Raises:
        OptionError: alpha outside 0 … 1, an impossible place, missing statistics.
    """
    if not 0 <= options.alpha <= 1:
        raise OptionError(f"SmoothQuant's alpha is {options.alpha}; it must lie between 0 and 1")
    if not 0 < options.smallest <= 1:
        raise OptionError(f"SmoothQuant's smallest factor is {options.smallest}; it must lie above 0 and not above 1")
    moves = []
    for link in choose(decoder, layer, options.where):
        absmax = statistic(link, stats, "absmax")
        if absmax is not None:
            x = link.gather(absmax.double(), "max")
            w = link.gather(column_absmax(link, tensors).double().to(x.device), "max")
            s = (x**options.alpha / w ** (1 - options.alpha)).clamp(options.smallest, 1 / options.smallest)
            moves.append(Move(link, scale=torch.where((x > 0) & (w > 0), s, torch.ones_like(s))))
    return moves


def column_absmax(link: Link, tensors: Mapping[str, Tensor]) -> Tensor:
    """Largest |w| of each input channel over the linears of a link that are quantized: [K]."""
    return torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in link.targets]).amax(0)


def apply(
    layer: Layer,
    decoder: Decoder,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    options: SmoothOptions = SmoothOptions(),
) -> dict[str, Tensor]:
    """The changed tensors of a layer; see `plan`."""
    return execute(plan(layer, decoder, tensors, stats, options), tensors)
