"""Outlier Suppression+ (Wei et al., 2304.09145): centre each channel of the activations, then bring down the large ones.

    z = (max x + min x) / 2,   s = max(1, max|x - z| / t),   x' = (x - z) / s

The shift needs a bias before (a LayerNorm's, or v's) and biases behind to hold W z. Architectures without them (Llama:
RMSNorm, no biases) can only be scaled; `shift=None` shifts where it is exact, `shift=True` refuses where it is not.

The one threshold t is searched by an error that needs statistics alone (the paper runs samples through the module):
weights quantized by the given function against the mean squares of x', plus activations rounded to a static grid of
`activation_bits` with uniform noise: step² / 12 * sum ŵ². It is meant for formats of activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Layer
from numfit.transforms.awq import Quantize, output_error
from numfit.transforms.links import InputStats, Link, choose, statistic
from numfit.transforms.moves import Move, execute, shift_obstacle


@dataclass(frozen=True)
class OsPlusOptions:
    quantize: Quantize | None = None  # of the weights; None: they stay exact
    activation_bits: int | None = 8  # None: activations stay exact
    shift: bool | None = None  # None: where it is exact
    grid: int = 20  # thresholds, geometric from the largest peak down to the smallest
    where: Collection[str] | None = None  # of links.PLACES; None: wherever it is exact


def plan(
    layer: Layer, decoder: Decoder, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: OsPlusOptions
) -> list[Move]:
    """Shift and factors of each link; for shifts the statistics must have `minimum` and `maximum`.

    Raises:
        OptionError: an impossible place or shift, missing statistics, options out of range.
    """
    if options.grid < 1 or (options.activation_bits is not None and options.activation_bits < 2):
        raise OptionError("Outlier Suppression+ needs a grid of 1 or more and activations of 2 bits or more")
    moves = []
    for link in choose(decoder, layer, options.where):
        reason = shift_obstacle(link, tensors)
        if options.shift and reason:
            raise OptionError(f"no shift can pass exactly at '{link.name}' of '{layer.prefix}*': {reason}")
        absmax, mean = statistic(link, stats, "absmax"), statistic(link, stats, "mean")
        mean_square = statistic(link, stats, "mean_square")
        if absmax is None or mean is None or mean_square is None:
            continue
        shift = None
        peak, power = link.gather(absmax.double(), "max"), mean_square.double()
        if options.shift is not False and not reason:
            low, high = statistic(link, stats, "minimum"), statistic(link, stats, "maximum")
            assert low is not None and high is not None  # absmax was there
            low, high = link.gather(low.double(), "min"), link.gather(high.double(), "max")
            shift, peak = (low + high) / 2, (high - low) / 2
            z = link.spread(shift)
            power = (power - 2 * z * mean.double() + z * z).clamp(min=0)
        scale = _best_scale(link, tensors, peak, power, options)
        moves.append(Move(link, scale=scale, shift=shift))
    return moves


def _best_scale(link: Link, tensors: Mapping[str, Tensor], peak: Tensor, power: Tensor, options: OsPlusOptions) -> Tensor:
    """peak: largest |x| [P]; power: mean square of x [K]. Returns the factors [P]."""
    top = float(peak.max())
    positive = peak[peak > 0]
    best = torch.ones_like(peak)
    if not len(positive):
        return best
    low = max(float(positive.min()), 1e-6 * top)
    least = float("inf")
    for threshold in torch.logspace(0, 1, options.grid, base=low / top, dtype=torch.float64) * top:
        s = (peak / threshold.to(peak)).clamp(min=1)
        wide, loss = link.spread(s), 0.0
        for name in link.targets:
            w = tensors[f"{name}.weight"]
            scaled, h = w * wide.to(w), (power / wide**2).to(w)
            rounded = scaled if options.quantize is None else options.quantize(scaled, h)
            loss += output_error(rounded - scaled, h)
            if options.activation_bits is not None:
                step = float((peak / s).max()) / (2 ** (options.activation_bits - 1) - 1)
                loss += step**2 / 12 * float(rounded.square().sum(dtype=torch.float64))
        if loss < least:
            least, best = loss, s
    return best


def apply(
    layer: Layer,
    decoder: Decoder,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    options: OsPlusOptions = OsPlusOptions(),
) -> dict[str, Tensor]:
    """The changed tensors of a layer; see `plan`."""
    return execute(plan(layer, decoder, tensors, stats, options), tensors)
