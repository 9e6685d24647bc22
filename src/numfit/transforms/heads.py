"""Rotate the channels of each head between v and o: v rows by R, o columns by R; queries of a group share R.

Attention mixes positions, not channels, so what R does to the values arrives at o unchanged, and o undoes it: exact and
free at run time (QuaRot, Ashkboos et al., 2404.00456). It spreads outliers of the values and of o's columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Layer
from numfit.transforms.links import InputStats, Link, places
from numfit.transforms.orthogonal import Rotation


@dataclass(frozen=True)
class HeadOptions:
    seed: int = 0


def _value_link(layer: Layer, decoder: Decoder) -> Link:
    link = places(decoder, layer)["value"]
    if isinstance(link, str):
        raise OptionError(f"the heads cannot be rotated: {link}")
    return link


def apply(
    layer: Layer,
    decoder: Decoder,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    options: HeadOptions = HeadOptions(),
) -> dict[str, Tensor]:
    """The changed tensors of a layer: v's rows and bias, o's columns. `stats` is not used.

    Raises:
        OptionError: the layer is not understood, or has no value or output linear.
    """
    link = _value_link(layer, decoder)
    changed: dict[str, Tensor] = {}
    rotation = _rotation(decoder, layer, options)
    for name in (f"{link.producer}.weight", f"{link.producer}.bias"):
        if name in tensors:
            w = tensors[name]
            rows = torch.arange(len(w)) if link.rows is None else torch.tensor(link.rows)
            rows = rows.to(w.device)
            heads = w[rows].reshape(decoder.kv_heads, decoder.head_dim, -1)  # [kv heads, d, K or 1]
            turned = rotation.rotate(heads.transpose(1, 2)).transpose(1, 2).reshape(w[rows].shape)
            changed[name] = w.index_copy(0, rows, turned)
    name = f"{link.consumers[0]}.weight"
    changed[name] = rotate_inputs(tensors[name], layer, decoder, options)
    return changed


def rotate_inputs(x: Tensor, layer: Layer, decoder: Decoder, options: HeadOptions = HeadOptions()) -> Tensor:
    """What the rotation does to vectors of o's inputs [..., heads * head_dim]; for H: over rows, then over columns."""
    rotation = _rotation(decoder, layer, options)
    return rotation.rotate(x.reshape(*x.shape[:-1], decoder.heads, decoder.head_dim)).reshape(x.shape)


def _rotation(decoder: Decoder, layer: Layer, options: HeadOptions) -> Rotation:
    return Rotation(decoder.head_dim, options.seed * 65537 + layer.index)
