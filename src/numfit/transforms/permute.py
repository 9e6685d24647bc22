"""An order of input channels in which groups are of one kind, without an index at run time.

Groups of weights share a scale; channels of very different importance in one group make it serve none of them. The
channels between up and down, and those of each head between v and o, may be reordered for nothing (gate and up rows or v
rows, and columns behind). Channels after a norm may not: they lie in the order of the residual stream.

Also the way to give GPTQ its order by importance ("act-order") with groups that lie together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from numfit.errors import OptionError
from numfit.structure import Decoder, Layer
from numfit.transforms.links import InputStats, Link, choose, statistic
from numfit.transforms.moves import Move, execute

KEYS = ("importance", "weight", "salience")


@dataclass(frozen=True)
class PermuteOptions:
    key: str = "importance"  # mean square of inputs | weight: mean square of columns | salience: their product
    keys: Mapping[str, Tensor] | None = None  # linear -> sort key [K], instead of `key`
    where: Collection[str] | None = None  # "value", "down"; None: both


def sort_channels(key: Tensor, head_dim: int = 0) -> Tensor:
    """Order of channels by falling key, ties in place: int64 [P]; within each head where `head_dim` is given."""
    if not head_dim:
        return key.argsort(descending=True, stable=True)
    heads = key.reshape(-1, head_dim)
    order = heads.argsort(dim=1, descending=True, stable=True)
    first = order.new_tensor(range(0, key.numel(), head_dim))
    return (order + first[:, None]).reshape(-1)


def plan(
    layer: Layer, decoder: Decoder, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: PermuteOptions
) -> list[Move]:
    """The order at each link.

    Raises:
        OptionError: an unknown key, an impossible place, missing statistics.
    """
    if options.key not in KEYS:
        raise OptionError(f"channels cannot be sorted by '{options.key}'; keys are: {', '.join(KEYS)}")
    moves = []
    for link in choose(decoder, layer, options.where, order=True):
        key = _key(link, tensors, stats, options)
        if key is not None:
            moves.append(Move(link, order=sort_channels(link.gather(key.double(), "mean"), link.head_dim)))
    return moves


def _key(link: Link, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats], options: PermuteOptions) -> Tensor | None:
    name = link.consumers[0]
    if options.keys is not None and name in options.keys:
        return options.keys[name]
    weight = tensors[f"{name}.weight"].double().square().mean(0)
    if options.key == "weight":
        return weight
    importance = statistic(link, stats, "mean_square")
    if importance is None:
        return None
    return importance if options.key == "importance" else importance.double() * weight.to(importance.device)


def apply(
    layer: Layer,
    decoder: Decoder,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    options: PermuteOptions = PermuteOptions(),
) -> dict[str, Tensor]:
    """The changed tensors of a layer; see `plan`."""
    return execute(plan(layer, decoder, tensors, stats, options), tensors)
