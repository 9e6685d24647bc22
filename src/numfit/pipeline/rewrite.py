"""A function-preserving rewrite of a layer, by the name that a recipe gives it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from numfit.calibration import Statistics
from numfit.formats import Format, quantize_tensor
from numfit.structure import Decoder
from numfit.transforms import awq, fold, osplus, permute, smooth


def rewrite_layer(
    name: str, decoder: Decoder, k: int, tensors: Mapping[str, Tensor], stats: Mapping[str, Statistics], fmt: Format
) -> dict[str, Tensor]:
    """The tensors of layer k that a rewrite changes, as it leaves them.

    Args:
        name: smooth, awq, osplus, permute or fold (column scales of down projections, by D²Quant).
        tensors: of the layer, by name; fp32. stats: of the linears, by module name.
        fmt: of the linears, for what is searched by quantizing.

    Raises:
        OptionError: the layer's structure is not known well enough for an exact rewrite.
    """
    layer = decoder.layers[k]

    def quantize(w: Tensor, importance: Tensor) -> Tensor:
        return quantize_tensor(w.float(), fmt, importance=importance.float()).dequantize()

    if name == "awq":
        options = awq.AwqOptions(quantize, {module: s.h for module, s in stats.items()})
        return awq.apply(layer, decoder, tensors, stats, options)
    if name == "fold":
        downs = [network.down for network in layer.feed_forwards if network.down in stats]
        columns = {down: fold.column_scale(tensors[f"{down}.weight"], quantize, stats[down].h) for down in downs}
        return fold.apply(layer, decoder, tensors, stats, fold.FoldOptions(columns))
    if name == "osplus":
        return osplus.apply(layer, decoder, tensors, stats, osplus.OsPlusOptions(quantize, activation_bits=None))
    if name == "smooth":
        return smooth.apply(layer, decoder, tensors, stats, smooth.SmoothOptions())
    return permute.apply(layer, decoder, tensors, stats, permute.PermuteOptions())
