"""Coders: how one row of numbers becomes bytes and comes back. A row is a token's head, or a channel's run of tokens.

A coder is a frozen value with three verbs: `planes(n)` names the byte strings of a row of n values, `encode(x [..., n])` makes
them, `decode(planes, n)` reads them. Every row stands alone: a scale never outlives its row, so appending changes nothing
that was stored. Scales and offsets are fp16 and rounded before the codes are chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.formats.packing import pack_bits, packed_bytes, unpack_bits
from numfit.kvcache import codebook
from numfit.kvcache.digits import digit_bytes, pack_digits, pack_words, unpack_digits, unpack_words

Planes = dict[str, Tensor]


class PlaneSpec(NamedTuple):
    """Element type and elements of one plane of a row."""

    dtype: torch.dtype
    width: int

    @property
    def nbytes(self) -> int:
        return self.width * self.dtype.itemsize


class Coder(Protocol):
    """What the streams of a cache ask of a coder."""

    def planes(self, n: int) -> dict[str, PlaneSpec]: ...

    def encode(self, x: Tensor) -> Planes: ...

    def decode(self, planes: Planes, n: int) -> Tensor: ...


def row_bytes(coder: Coder, n: int) -> int:
    """Bytes of a row of n values, everything counted."""
    return sum(plane.nbytes for plane in coder.planes(n).values())


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., n] → [..., groups, group]. A group larger than the row is the row; a short last one repeats its last value."""
    group = min(group, x.shape[-1])
    short = -x.shape[-1] % group
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    return x.unflatten(-1, (-1, group))


def _spread(values: Tensor, group: int, n: int) -> Tensor:
    """[..., groups] → [..., n]."""
    return values.float().repeat_interleave(group, -1)[..., :n]


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced levels per group (KIVI; ggml's q8_0 and q4_1; COMET's KV4).

    symmetric: scale = max|x| / (2^(b−1) − 1), codes −2^(b−1) … 2^(b−1) − 1; else scale = (max − min) / (2^b − 1) and a minimum;
    bins: scale = (max − min) / 2^b, and levels are the middles of 2^b bins from the minimum on (PolarQuant, Wu et al. 2025).
    """

    bits: int
    group: int
    symmetric: bool = False
    bins: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or (self.symmetric and self.bits < 2) or self.group < 1:
            raise OptionError(f"uniform codes have 1 to 8 bits (2 if symmetric) and groups of at least 1, not {self}")

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        groups = -(-n // self.group)
        out = {"codes": PlaneSpec(torch.uint8, packed_bytes(n, self.bits)), "scale": PlaneSpec(torch.float16, groups)}
        return out if self.symmetric else {**out, "low": PlaneSpec(torch.float16, groups)}

    def encode(self, x: Tensor) -> Planes:
        n, grouped = x.shape[-1], _grouped(x, self.group)
        if self.symmetric:
            half = 1 << (self.bits - 1)
            scale = (grouped.abs().amax(-1) / (half - 1)).half()
            codes = _steps(grouped, scale).clamp(-half, half - 1) + half
            planes = {"scale": scale}
        else:
            least, most = torch.aminmax(grouped, dim=-1)
            scale = ((most - least) / ((1 << self.bits) - (not self.bins))).half()
            low = (least + scale.float() / 2 if self.bins else least).half()  # the lowest level
            codes = _steps(grouped - low.float().unsqueeze(-1), scale).clamp(0, (1 << self.bits) - 1)
            planes = {"scale": scale, "low": low}
        return {"codes": pack_bits(codes.flatten(-2)[..., :n].to(torch.uint8), self.bits), **planes}

    def decode(self, planes: Planes, n: int) -> Tensor:
        codes = unpack_bits(planes["codes"], self.bits, n).float()
        if self.symmetric:
            return (codes - (1 << (self.bits - 1))) * _spread(planes["scale"], self.group, n)
        return codes * _spread(planes["scale"], self.group, n) + _spread(planes["low"], self.group, n)


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale to the nearest integer, 0 where the scale is 0 (a constant group, or one below fp16)."""
    wide = scale.float().unsqueeze(-1)
    return torch.where(wide > 0, x / wide, 0.0).round()


def _rms(x: Tensor) -> Tensor:
    """Root mean square of rows [..., n]: fp32 [..., 1], summed in fp64."""
    return x.double().square().mean(-1, keepdim=True).sqrt().float()


def _unit(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x / scale, 0.0)


@dataclass(frozen=True)
class LloydMax:
    """One table for all coordinates of a rotated vector, and the vector's length (TurboQuant, 2025).

    Attributes:
        levels: of the table; 3, 5, 10 and other numbers that are no power of two share words (digits.py).
        norm: what the stored number is, so that x̂ = number · table[code]. "plain": the rms of x; "renorm": x̂ gets the length of
            x; "unbiased": ⟨x̂, x⟩ = |x|², which makes inner products with x̂ unbiased over rotations.
    """

    levels: int
    norm: str = "renorm"

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256 or self.norm not in ("plain", "renorm", "unbiased"):
            raise OptionError(f"a table has 2 to 256 levels, and norm is plain, renorm or unbiased, not {self}")

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        return {"codes": PlaneSpec(torch.uint8, digit_bytes(n, self.levels)), "scale": PlaneSpec(torch.float16, 1)}

    def encode(self, x: Tensor) -> Planes:
        n = x.shape[-1]
        table = codebook.sphere(self.levels, n).to(x.device)
        rms = _rms(x)
        u = _unit(x, rms)
        codes = torch.bucketize(u, (table[1:] + table[:-1]) / 2, out_int32=True)
        scale = rms
        if self.norm != "plain":
            y = table[codes].double()
            along = (u.double() * y if self.norm == "unbiased" else y.square()).mean(-1, keepdim=True)
            along = along if self.norm == "unbiased" else along.sqrt()
            scale = torch.where(along > 0, rms / along, rms).float()
        return {"codes": pack_digits(codes, self.levels), "scale": scale.half()}

    def decode(self, planes: Planes, n: int) -> Tensor:
        table = codebook.sphere(self.levels, n).to(planes["codes"].device)
        return table[unpack_digits(planes["codes"], self.levels, n).int()] * planes["scale"].float()


@dataclass(frozen=True)
class WordBook:
    """Four coordinates of a rotated vector share one of 256 words: a byte for four values, 2 bits a value."""

    width = 4

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        return {"codes": PlaneSpec(torch.uint8, -(-n // self.width)), "scale": PlaneSpec(torch.float16, 1)}

    def encode(self, x: Tensor) -> Planes:
        scale = _rms(x)
        u = torch.nn.functional.pad(_unit(x, scale), (0, -x.shape[-1] % self.width))
        words = codebook.vectors(256, self.width).to(x.device)
        codes = codebook.nearest_word(u.reshape(-1, self.width), words).to(torch.uint8)
        return {"codes": codes.view(*x.shape[:-1], -1), "scale": scale.half()}

    def decode(self, planes: Planes, n: int) -> Tensor:
        words = codebook.vectors(256, self.width).to(planes["codes"].device)
        return words[planes["codes"].int()].flatten(-2)[..., :n] * planes["scale"].float()


@dataclass(frozen=True)
class Octahedral:
    """Triplets of a rotated vector as a direction on the octahedron and a length (OCTOPUS, 2026): 3b + 1 bits per three values.

    Two direction codes of b + 1 bits and a length code of b − 1. At equal true rate it is *worse* than LloydMax with a table of
    5 or 10 levels (docs/kvcache.md); it is here for the comparison. joint: try the nine neighbouring directions.
    """

    bits: int
    joint: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 6:
            raise OptionError(f"octahedral codes have 2 to 6 bits, not {self.bits}")

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        words = packed_bytes(-(-n // 3), 3 * self.bits + 1)
        return {"codes": PlaneSpec(torch.uint8, words), "scale": PlaneSpec(torch.float16, 1)}

    def encode(self, x: Tensor) -> Planes:
        scale = _rms(x)
        t = torch.nn.functional.pad(_unit(x, scale), (0, -x.shape[-1] % 3)).unflatten(-1, (-1, 3))  # [..., triplets, 3]
        plane = codebook.octahedral(1 << (self.bits + 1)).to(x.device)
        lengths = codebook.radius(1 << (self.bits - 1), x.shape[-1]).to(x.device)
        p = t / t.abs().sum(-1, keepdim=True).clamp_min(1e-30)
        a, b, z = p.unbind(-1)
        folded = z < 0
        xi = torch.where(folded, _sign(a) * (1 - b.abs()), a)
        eta = torch.where(folded, _sign(b) * (1 - a.abs()), b)
        edges = (plane[1:] + plane[:-1]) / 2
        ix, iy = torch.bucketize(xi, edges), torch.bucketize(eta, edges)
        best = (t * _direction(plane[ix], plane[iy])).sum(-1)
        if self.joint:
            ox, oy, top = ix, iy, len(plane) - 1
            for dx in (-1, 0, 1):
                for dy in (-1, 0, 1):
                    jx, jy = (ox + dx).clamp(0, top), (oy + dy).clamp(0, top)
                    s = (t * _direction(plane[jx], plane[jy])).sum(-1)
                    better = s > best
                    best, ix, iy = torch.where(better, s, best), torch.where(better, jx, ix), torch.where(better, jy, iy)
        else:
            best = t.square().sum(-1).sqrt()
        ir = torch.bucketize(best, (lengths[1:] + lengths[:-1]) / 2)
        wide = self.bits + 1
        return {"codes": pack_words(ix | iy << wide | ir << 2 * wide, 3 * self.bits + 1), "scale": scale.half()}

    def decode(self, planes: Planes, n: int) -> Tensor:
        device = planes["codes"].device
        plane = codebook.octahedral(1 << (self.bits + 1)).to(device)
        lengths = codebook.radius(1 << (self.bits - 1), n).to(device)
        words = unpack_words(planes["codes"], 3 * self.bits + 1, -(-n // 3))
        wide = self.bits + 1
        ix, iy, ir = words & ((1 << wide) - 1), words >> wide & ((1 << wide) - 1), words >> 2 * wide
        t = _direction(plane[ix], plane[iy]) * lengths[ir].unsqueeze(-1)
        return t.flatten(-2)[..., :n] * planes["scale"].float()


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)


def _direction(xi: Tensor, eta: Tensor) -> Tensor:
    """Unit vectors [..., 3] of points on the unfolded octahedron."""
    z = 1 - xi.abs() - eta.abs()
    x = torch.where(z < 0, _sign(xi) * (1 - eta.abs()), xi)
    y = torch.where(z < 0, _sign(eta) * (1 - xi.abs()), eta)
    v = torch.stack([x, y, z], -1)
    return v / v.square().sum(-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class Ternary:
    """−α, 0, α per group: threshold mean|x| / 2, α the mean magnitude beyond it (VidKV's rule, with the scale it forgets)."""

    group: int = 32

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        return {"codes": PlaneSpec(torch.uint8, digit_bytes(n, 3)), "scale": PlaneSpec(torch.float16, -(-n // self.group))}

    def encode(self, x: Tensor) -> Planes:
        n, grouped = x.shape[-1], _grouped(x, self.group)
        size = grouped.abs()
        beyond = size > size.mean(-1, keepdim=True) / 2
        scale = (size * beyond).sum(-1) / beyond.sum(-1).clamp_min(1)
        codes = torch.where(beyond, grouped.sign(), 0.0) + 1
        return {"codes": pack_digits(codes.flatten(-2)[..., :n], 3), "scale": scale.half()}

    def decode(self, planes: Planes, n: int) -> Tensor:
        return (unpack_digits(planes["codes"], 3, n).float() - 1) * _spread(planes["scale"], self.group, n)


@dataclass(frozen=True)
class Sign:
    """±α per group, α the mean magnitude: least squared error at one bit (VidKV's easy channels, with the −α it forgets)."""

    group: int = 32

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        groups = -(-n // self.group)
        return {"codes": PlaneSpec(torch.uint8, packed_bytes(n, 1)), "scale": PlaneSpec(torch.float16, groups)}

    def encode(self, x: Tensor) -> Planes:
        scale = _grouped(x, self.group).abs().mean(-1).half()
        return {"codes": pack_bits((x >= 0).to(torch.uint8), 1), "scale": scale}

    def decode(self, planes: Planes, n: int) -> Tensor:
        return (unpack_bits(planes["codes"], 1, n).float() * 2 - 1) * _spread(planes["scale"], self.group, n)


@dataclass(frozen=True)
class Residual:
    """LloydMax, and the signs of the residual in a random projection (QJL; TurboQuant_prod). For comparison only.

    Inner products become unbiased, but their variance grows by what the lost bit would have saved, and a softmax amplifies
    variance: at 3 bits the attention output is five times further off (docs/kvcache.md). `LloydMax(norm="unbiased")` is
    unbiased for nothing.
    """

    levels: int
    seed: int = 0

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        inner = LloydMax(self.levels, "plain").planes(n)
        return {**inner, "signs": PlaneSpec(torch.uint8, packed_bytes(n, 1)), "rest": PlaneSpec(torch.float16, 1)}

    def _projection(self, n: int, device: torch.device) -> Tensor:
        return torch.randn((n, n), generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64).to(device)

    def encode(self, x: Tensor) -> Planes:
        inner = LloydMax(self.levels, "plain")
        planes = inner.encode(x)
        rest = x - inner.decode(planes, x.shape[-1])
        signs = (rest.double() @ self._projection(x.shape[-1], x.device).T) >= 0
        return {**planes, "signs": pack_bits(signs.to(torch.uint8), 1), "rest": _rms(rest).half()}

    def decode(self, planes: Planes, n: int) -> Tensor:
        signs = unpack_bits(planes["signs"], 1, n).float() * 2 - 1
        back = signs @ self._projection(n, signs.device).float()
        # |rest| = rest_rms · √n
        return LloydMax(self.levels, "plain").decode(planes, n) + math.sqrt(math.pi / 2 / n) * planes["rest"].float() * back
