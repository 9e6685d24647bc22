"""A function-preserving rewrite of a layer, by the name that a recipe gives it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from numfit.calibration import Statistics
from numfit.formats import Format, quantize_tensor
from numfit.pipeline.planning import rule_for
from numfit.structure import Decoder
from numfit.transforms import awq, fold, osplus, permute, smooth
from numfit.transforms.links import choose


def rewrite_layer(
    name: str, decoder: Decoder, k: int, tensors: Mapping[str, Tensor], stats: Mapping[str, Statistics],
    quantized: Mapping[str, Format], rule: str = "mse",
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of layer k that a rewrite changes, as it leaves them.

    Args:
        name: smooth, awq, osplus, permute or fold (column scales of down projections, by D²Quant).
        tensors: of the layer, by name; fp32. stats: of the linears, by module name.
        quantized: the modules that will be, and to which format; nothing is moved into others alone.
        rule: how scales are found, in what is searched by quantizing; the first of the formats stands for all there.

    Raises:
        OptionError: the layer's structure is not known well enough for an exact rewrite.
    """
    layer, fmt = decoder.layers[k], next(iter(quantized.values()))
    links = choose(decoder, layer, ("down",) if name == "fold" else None, order=name == "permute")
    where = {link.name.split(".")[0] for link in links if any(target in quantized for target in link.targets)}

    def quantize(w: Tensor, importance: Tensor) -> Tensor:
        return quantize_tensor(w.float(), fmt, importance=importance.float(), scale_rule=rule_for(fmt, rule)).dequantize()

    if not where:
        return {}
    if name == "awq":
        options = awq.AwqOptions(quantize, {module: s.h for module, s in stats.items()}, where=where)
        return awq.apply(layer, decoder, tensors, stats, options)
    if name == "fold":
        downs = [network.down for network in layer.feed_forwards if network.down in stats]
        columns = {down: fold.column_scale(tensors[f"{down}.weight"], quantize, stats[down].h) for down in downs}
        return fold.apply(layer, decoder, tensors, stats, fold.FoldOptions(columns))
    if name == "osplus":
        return osplus.apply(layer, decoder, tensors, stats, osplus.OsPlusOptions(quantize, activation_bits=None, where=where))
    if name == "smooth":
        return smooth.apply(layer, decoder, tensors, stats, smooth.SmoothOptions(where=where))
    return permute.apply(layer, decoder, tensors, stats, permute.PermuteOptions(where=where))
