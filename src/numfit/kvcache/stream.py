"""A stream: how keys, or values, of shape [B, H, T, D] become rows, and what is done to them before a coder sees them.

    x → coordinates in a basis → minus a mean of channels → channels in another order → pairs as length and angle → rows →
    outliers out → coder

Axis "token": a row is the head of one token (D values), and any token can be encoded alone. Axis "channel": a row is one
channel over `window` tokens, as keys with fixed large channels want (KIVI), and `window` tokens are encoded together.
The mean and the order are constants of a layer, found from its first `CALIBRATION` tokens after the sinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.kvcache.coders import Coder, Planes, PlaneSpec
from numfit.kvcache.rotation import KINDS, basis, rotate

CALIBRATION = 128  # tokens
REACH = 65504.0  # scales are fp16
Constants = dict[str, Tensor]


@dataclass(frozen=True)
class Stream:
    """A codec of keys or values.

    Attributes:
        name: the short name.
        coder: rows ↔ bytes.
        axis: "token" or "channel".
        window: tokens of a row along time; 1 for the token axis.
        rotation: None, "haar" or "hadamard": the basis that rows are stored in.
        seed: of the basis.
        centred: subtract each channel's mean. Exact for keys, since softmax does not see q·μ; it is added back all the same.
        permuted: put channels of like magnitude beside each other, so that they share groups (2403.20137).
        polar: channels i and i + D/2, which RoPE turns together, become their length and angle (PolarQuant, Wu et al. 2025).
        outliers: share of each row stored exactly, with its places (KVQuant's sparse part).
    """

    name: str
    coder: Coder
    axis: str = "token"
    window: int = 1
    rotation: str | None = None
    seed: int = 0
    centred: bool = False
    permuted: bool = False
    polar: bool = False
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if self.axis not in ("token", "channel") or self.window < 1 or (self.axis == "token" and self.window != 1):
            raise OptionError(f"{self.name}: rows run along a token (window 1) or a channel, not axis={self.axis!r}")
        if self.rotation is not None and self.rotation not in KINDS:
            raise OptionError(f"{self.name}: unknown rotation '{self.rotation}'; choose from: {', '.join(KINDS)}")
        if not 0 <= self.outliers < 0.5:
            raise OptionError(f"{self.name}: the share of outliers is from 0 to below 0.5, not {self.outliers}")

    @property
    def unit(self) -> int:
        """Tokens that are encoded together."""
        return self.window

    @property
    def calibration(self) -> int:
        """Tokens that must be there before the first is encoded."""
        return CALIBRATION if self.centred or self.permuted else 0

    def row(self, dim: int) -> int:
        """Values of a row, for heads of `dim`."""
        return dim if self.axis == "token" else self.window

    def kept(self, dim: int) -> int:
        """Outliers of a row."""
        return max(1, round(self.outliers * self.row(dim))) if self.outliers else 0

    def planes(self, dim: int) -> dict[str, PlaneSpec]:
        """Planes of a row."""
        out = dict(self.coder.planes(self.row(dim)))
        if self.outliers:
            place = torch.uint8 if self.row(dim) <= 256 else torch.int16
            out |= {"place": PlaneSpec(place, self.kept(dim)), "exact": PlaneSpec(torch.float16, self.kept(dim))}
        return out

    def bits_per_value(self, dim: int) -> float:
        """Stored bits over values, everything but the layer's constants counted."""
        return 8 * sum(p.nbytes for p in self.planes(dim).values()) / self.row(dim)

    def basis(self, dim: int, device: torch.device) -> Tensor | None:
        """fp64 [dim, dim], or None where rows are stored as they are."""
        return None if self.rotation is None else basis(self.rotation, dim, self.seed, device)


def _in_basis(stream: Stream, x: Tensor) -> Tensor:
    matrix = stream.basis(x.shape[-1], x.device)
    return x.float() if matrix is None else rotate(x, matrix)


def constants(stream: Stream, first: Tensor) -> Constants:
    """What a layer keeps besides rows, from its tokens first [B, H, CALIBRATION, D]; empty where the stream needs nothing."""
    if not stream.calibration:
        return {}
    x = _in_basis(stream, first)
    out: Constants = {}
    if stream.centred:
        mean = x.double().mean(2).half()  # [B, H, D]
        out["mean"] = mean
        x = x - mean.float().unsqueeze(2)
    if stream.permuted:
        spread = x.amax(2) - x.amin(2) if stream.centred else x.abs().amax(2)
        out["order"] = spread.argsort(stable=True, dim=-1).to(torch.int16)
    return out


def encode(stream: Stream, x: Tensor, const: Constants, where: str = "") -> Planes:
    """Rows of tokens.

    Args:
        x: [B, H, T, D], T a multiple of the unit.
        const: from `constants`.
        where: names keys or values, the layer and the first position, for messages.

    Returns:
        plane → [B, H, T, w], or [B, H, T / window, D, w] along channels.

    Raises:
        FormatError: NaN, Inf, or numbers beyond fp16; the message says where.
    """
    _check(x, where)
    x = _in_basis(stream, x)
    if "mean" in const:
        x = x - const["mean"].float().unsqueeze(2)
    if "order" in const:
        x = x.gather(-1, const["order"].long().unsqueeze(2).expand_as(x))
    if stream.polar:
        x = _to_polar(x)
        _check(x, where)  # a length may be √2 times as large
    if stream.axis == "channel":
        x = x.unflatten(2, (-1, stream.window)).transpose(-1, -2)  # [B, H, T / window, D, window]
    rows = x.contiguous()
    if not stream.outliers:
        return stream.coder.encode(rows)
    middle = rows.median(-1, keepdim=True).values
    place = (rows - middle).abs().topk(stream.kept(x.shape[-1] if stream.axis == "token" else x.shape[-2]), -1).indices
    exact = rows.gather(-1, place).half()
    planes = stream.coder.encode(rows.scatter(-1, place, middle.expand_as(exact)))
    return {**planes, "place": place.to(torch.uint8 if rows.shape[-1] <= 256 else torch.int16), "exact": exact}


def decode(stream: Stream, planes: Planes, dim: int, const: Constants) -> Tensor:
    """Tokens in the stream's own basis (`Stream.basis`), fp32 [B, H, T, D]; the inverse of `encode` but for that."""
    rows = stream.coder.decode({k: v for k, v in planes.items() if k not in ("place", "exact")}, stream.row(dim))
    if stream.outliers:
        rows = rows.scatter(-1, planes["place"].long(), planes["exact"].float())
    x = rows.transpose(-1, -2).flatten(2, 3) if stream.axis == "channel" else rows
    if stream.polar:
        length, angle = x.chunk(2, -1)
        x = torch.cat([length * angle.cos(), length * angle.sin()], -1)
    if "order" in const:
        x = torch.zeros_like(x).scatter(-1, const["order"].long().unsqueeze(2).expand_as(x), x)
    if "mean" in const:
        x = x + const["mean"].float().unsqueeze(2)
    return x


def _to_polar(x: Tensor) -> Tensor:
    """[..., D] → lengths of the pairs (i, i + D/2), then their angles in [0, 2π)."""
    a, b = x.double().chunk(2, -1)
    return torch.cat([torch.hypot(a, b), torch.atan2(b, a) % (2 * math.pi)], -1).float()


def _check(x: Tensor, where: str) -> None:
    """Refuse what no scale can hold."""
    low, high = torch.aminmax(x) if x.numel() else (torch.zeros(()), torch.zeros(()))
    if bool(torch.isfinite(low) & torch.isfinite(high)) and max(-float(low), float(high)) <= REACH:
        return  # (NaN anywhere makes both ends NaN)
    bad = ~(x.abs() <= REACH)
    _, head, token, channel = (int(i) for i in bad.nonzero()[0])
    value = float(x[bad][0])
    raise FormatError(
        f"{where or 'the cache'}: {int(bad.sum())} numbers are NaN, infinite or beyond ±{REACH:.0f}, the first ({value:g}) in "
        f"head {head}, {token} tokens on, channel {channel}; no cache type can hold them: the model overflowed before "
        "(try --dtype float32 or bfloat16), or run without --kv"
    )
