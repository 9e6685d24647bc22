"""The places in a decoder layer where one linear map follows another, channel by channel, so that something may pass.

    name        producer                      consumers                         between them
    attention   norm before attention         q, k, v (or one fused)            nothing
    ffn         norm before the network       gates, ups, routers               nothing
    value       v                             o                                 weighted mean over positions
    down[.E]    up (of expert E)              down                              times act(gate)

A factor s per channel passes every link: producer / s, columns of the consumers * s. A shift z passes where nothing
but a weighted mean lies between and there are biases to hold it. An order of the channels passes "value" (within a
head) and "down". Which link allows what is decided here once, and said in a sentence where it does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from numfit.errors import CheckpointError, OptionError
from numfit.structure import Decoder, Layer, Norm, value_rows

PLACES = ("value", "down", "attention", "ffn")  # inner ones first: then norms see the final rows


class InputStats(Protocol):
    """What is known of the inputs of one linear: one number per input channel, over all calibration tokens.

    Where present, `mean_abs`, `minimum` and `maximum` are used too.
    """

    @property
    def absmax(self) -> Tensor: ...  # [K]

    @property
    def mean(self) -> Tensor: ...  # [K]

    @property
    def mean_square(self) -> Tensor: ...  # [K]


@dataclass(frozen=True)
class Link:
    """One place. The producer is `norm`, or the rows `rows` of the linear `producer`."""

    name: str
    norm: Norm | None
    producer: str | None
    rows: tuple[int, ...] | None  # None: all of them, in order
    partners: tuple[str, ...]  # linears whose rows must follow an order of the producer's (the gate)
    consumers: tuple[str, ...]  # linears fed by it
    targets: tuple[str, ...]  # those of them that are quantized (not routers)
    head_dim: int  # 0, or the channels of a head
    repeat: int  # consumers see each head of the producer so many times in a row
    expert: bool  # may be without statistics
    rigid: str | None  # why no factor may pass
    straight: bool  # a constant passes unchanged

    def spread(self, x: Tensor) -> Tensor:
        """Producer channels [P] -> consumer channels [K]."""
        if self.repeat == 1:
            return x
        return x.reshape(-1, 1, self.head_dim).expand(-1, self.repeat, -1).reshape(-1)

    def gather(self, x: Tensor, how: str) -> Tensor:
        """Consumer channels [K] -> producer channels [P], by "max", "min" or "mean" over those that are tied."""
        if self.repeat == 1:
            return x
        tied = x.reshape(-1, self.repeat, self.head_dim)
        return (tied.amax(1) if how == "max" else tied.amin(1) if how == "min" else tied.mean(1)).reshape(-1)


def require_known(decoder: Decoder, layer: Layer) -> None:
    """Refuse a layer that is not understood to the last tensor.

    Raises:
        OptionError: naming the model type or the tensor.
    """
    if not decoder.verified:
        raise OptionError(
            f"models of type '{decoder.model_type}' have not been checked to survive a transform unchanged; quantize "
            "without transforms, or add the type to numfit.structure.decoder.VERIFIED after a test like those in "
            "tests/test_transforms.py"
        )
    if layer.unexplained or layer.packed_experts:
        name = (layer.unexplained + layer.packed_experts)[0]
        raise OptionError(f"what tensor '{name}' does is not known here, so a transform might change the model; it is refused")


def places(decoder: Decoder, layer: Layer) -> dict[str, Link | str]:
    """All links of a layer by name, or a sentence why there is none at that place.

    Raises:
        OptionError: the layer is not understood (`require_known`).
    """
    require_known(decoder, layer)
    found: dict[str, Link | str] = {}
    try:
        producer, rows = value_rows(decoder, layer)
        if layer.o is None:
            found["value"] = f"the attention of '{layer.prefix}*' has no output linear"
        else:
            value = _link("value", None, (layer.o,), producer=producer, rows=tuple(rows) if rows is not None else None)
            found["value"] = replace(value, head_dim=decoder.head_dim, repeat=decoder.queries_per_kv, straight=True)
    except CheckpointError as error:
        found["value"] = str(error)
    for network in layer.feed_forwards:
        name = "down" if network.expert is None and "down" not in found else f"down.{network.expert}"
        rigid = None if network.gate else (
            f"the activation between '{network.up}' and '{network.down}' is not linear in its input, and there is no gate"
        )  # fmt: skip
        link = _link(name, None, (network.down,), producer=network.up)
        partners = (network.gate,) if network.gate else ()
        found[name] = replace(link, partners=partners, expert=network.expert is not None, rigid=rigid)
    if not layer.feed_forwards:
        found["down"] = f"'{layer.prefix}*' has no feed-forward network with linears up and down of its own"
    for name, norm, consumers in (
        ("attention", layer.input_norm, layer.attention_inputs),
        ("ffn", layer.ffn_norm, layer.ffn_inputs),
    ):
        found[name] = (
            _link(name, norm, consumers, targets=tuple(c for c in consumers if c not in layer.routers), straight=True)
            if norm and consumers
            else f"no norm of '{layer.prefix}*' feeds its {'attention' if name == 'attention' else 'feed-forward network'}"
        )
    attention, ffn = found["attention"], found["ffn"]
    if isinstance(attention, Link) and isinstance(ffn, Link) and layer.input_norm == layer.ffn_norm:
        consumers = attention.consumers + ffn.consumers
        found["attention"] = replace(attention, consumers=consumers, targets=attention.targets + ffn.targets)
        found["ffn"] = f"in '{layer.prefix}*' one norm feeds attention and feed-forward network: use 'attention'"
    return found


def _link(
    name: str,
    norm: Norm | None,
    consumers: tuple[str, ...],
    *,
    targets: tuple[str, ...] | None = None,
    producer: str | None = None,
    rows: tuple[int, ...] | None = None,
    straight: bool = False,
) -> Link:
    return Link(
        name=name,
        norm=norm,
        producer=producer,
        rows=rows,
        partners=(),
        consumers=consumers,
        targets=consumers if targets is None else targets,
        head_dim=0,
        repeat=1,
        expert=False,
        rigid=None,
        straight=straight,
    )


def choose(decoder: Decoder, layer: Layer, where: Collection[str] | None, *, order: bool = False) -> list[Link]:
    """The links at the places named (each stands for all experts), in the order of `PLACES`.

    Args:
        where: names out of `PLACES`; None for every place that allows it.
        order: links that let an order of channels pass instead of a factor.

    Raises:
        OptionError: a name that is no place, a place that does not allow it (with the reason), or no place at all.
    """
    unknown = sorted(set(where or ()) - set(PLACES))
    if unknown:
        raise OptionError(f"'{unknown[0]}' is no place for a transform; they are: {', '.join(PLACES)}")
    reasons: dict[str, str] = {}
    chosen: list[Link] = []
    for name, link in places(decoder, layer).items():
        reason = link if isinstance(link, str) else None
        if isinstance(link, Link):
            reason = (
                (f"the channels after '{link.norm.weight}' lie in the order of the residual stream" if link.norm else None)
                if order
                else link.rigid
            )
            if reason is None and (where is None or name.split(".")[0] in where):
                chosen.append(link)
        if reason:
            reasons.setdefault(name.split(".")[0], reason)
    for name in where or ():
        if name in reasons:
            raise OptionError(f"the transform cannot be exact at '{name}': {reasons[name]}")
    if not chosen:
        raise OptionError(f"the transform can be exact nowhere in '{layer.prefix}*': {'; '.join(reasons.values())}")
    return sorted(chosen, key=lambda link: PLACES.index(link.name.split(".")[0]))  # stable


def obstacles(decoder: Decoder, layer: Layer) -> dict[str, str]:
    """Place -> why no factor can pass there; for messages about what `where=None` leaves out."""
    found = ((name, link if isinstance(link, str) else link.rigid) for name, link in places(decoder, layer).items())
    return {name: reason for name, reason in found if reason}


def statistic(link: Link, stats: Mapping[str, InputStats], what: str) -> Tensor | None:
    """One statistic of what flows through a link, per consumer channel [K] in fp32 or wider.

    Consumers share their input, but experts see only the tokens sent to them: a router's statistics go before, and
    several experts are joined (largest absmax and maximum, least minimum, plain mean of means). `mean_abs` falls back
    to the root of `mean_square`.

    Returns:
        None where nothing is known and the link is an expert's (it saw no token).

    Raises:
        OptionError: nothing is known of the inputs of these linears, or they are not finite.
    """
    routers = [name for name in link.consumers if name not in link.targets and name in stats]
    names = routers or [name for name in link.targets if name in stats]
    if not names:
        if link.expert:
            return None
        raise OptionError(f"there are no statistics of the inputs of '{link.targets[0]}'; calibrate it first")
    rows = []
    for name in names:
        value = getattr(stats[name], what, None)
        if value is None and what == "mean_abs":
            value = stats[name].mean_square.sqrt()
        if value is None:
            raise OptionError(f"the statistics of '{name}' lack '{what}', which this transform needs")
        if not bool(torch.isfinite(value).all()):
            raise OptionError(f"the inputs of '{name}' have a {what} that is not finite")
        rows.append(value)
    joined = torch.stack([row.to(rows[0]) for row in rows])
    return joined.amax(0) if what in ("absmax", "maximum") else joined.amin(0) if what == "minimum" else joined.mean(0)
