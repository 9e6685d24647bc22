"""Every numeric type of numfit as a coder of cache rows, and M-ANT's choice of a type by a group's variance.

A row is fitted, encoded and packed exactly as a row of a weight matrix. Types whose parameters span a tensor cannot be
streamed: NVFP4's scale of the tensor becomes an fp16 of each row, and types that choose a member or a palette for the whole
tensor are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.formats import Format, Params, QuantizedTensor, encode, fit, pack
from numfit.formats import format as named_format
from numfit.formats.catalogue import mant
from numfit.formats.grid import to_common_range
from numfit.formats.scale import Scale, to_stored
from numfit.kvcache.coders import Planes, PlaneSpec

INT = None  # the member of plain integers
# M-ANT's table of the authors' code: bounds of the unbiased variance of x / max|x|, and the coefficient between them.
PAPER3 = ((0.05, 0.25), (0, 25, INT))
PAPER8 = ((0.0417, 0.0797, 0.122, 0.1368, 0.1446, 0.1528, 0.1611), (0, 20, 40, 60, 80, 100, 120, INT))
# Ours: bounds of least squared error on a mix of normal, Laplace, Student-t3, uniform, outlier and mixed-variance groups of 64.
TABLE16 = (
    (0.0251, 0.0328, 0.0416, 0.0511, 0.0614, 0.0716, 0.0822, 0.0942, 0.1071, 0.1219, 0.1393, 0.1622, 0.2025, 0.3176, 0.3557),
    (5, 5, 10, 10, 17, 17, 20, 20, 30, 30, 40, 50, 60, 120, INT, INT),
)
TABLES = {"paper3": PAPER3, "paper8": PAPER8, "table16": TABLE16}
CANDIDATES8 = (0, 10, 20, 30, 50, 80, 120, INT)
CANDIDATES16 = (0, 5, 10, 17, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, INT)


@dataclass(frozen=True)
class Typed:
    """A numfit format, row by row. `rule`: how scales are found, see `numfit.formats.fit`."""

    format: Format
    rule: str = "mse"

    def __post_init__(self) -> None:
        if self.format.trellis is not None:
            raise OptionError(
                f"{self.format.name} is a trellis code, whose search takes too long for a cache and which packs tiles of "
                "several rows; use a type such as mant4-g64 or nf4-g64"
            )
        if self.format.learned:
            raise OptionError(
                f"{self.format.name} learns a table of levels for each row, which in a cache every token would carry; "
                "use a type with fixed levels, such as mant4-g64 or nf4-g64"
            )
        span = self.format.parent_span
        if self.format.scale.parent == "tensor":
            object.__setattr__(self, "format", replace(self.format, scale=replace(self.format.scale, parent="row")))
            span = self.format.parent_span
        if span == "tensor":
            raise OptionError(
                f"{self.format.name} chooses something for a whole tensor, which a cache that grows does not have; use a type "
                "with scales and members per block, such as mant4-g64 or nf4-g64"
            )

    def at(self, n: int) -> Format:
        """The format for rows of n values: a block larger than the row is the row."""
        block, unit = self.format.block, self.format.unit
        if not isinstance(block, int) or block <= n:
            return self.format
        return replace(self.format, block=n, unit=min(unit, n) if isinstance(unit, int) else unit)

    def planes(self, n: int) -> dict[str, PlaneSpec]:
        specs = self.at(n).planes((1, n))
        return {name: PlaneSpec(spec.dtype, spec.shape[-1]) for name, spec in specs.items()}

    def params(self, flat: Tensor) -> Params:
        """Parameters of rows [R, n] fp32."""
        return fit(self.at(flat.shape[1]), flat, None, self.rule)

    def encode(self, x: Tensor) -> Planes:
        fmt, flat = self.at(x.shape[-1]), x.reshape(-1, x.shape[-1])
        params = self.params(flat)
        packed = pack(fmt, tuple(x.shape), encode(fmt, flat, params), params)
        return {name: p.unsqueeze(-1) if name == "parent" else p for name, p in packed.planes.items()}

    def decode(self, planes: Planes, n: int) -> Tensor:
        planes = {name: p.squeeze(-1) if name == "parent" else p for name, p in planes.items()}
        return QuantizedTensor(self.at(n), (*planes["codes"].shape[:-1], n), planes).dequantize()


@dataclass(frozen=True)
class Varied(Typed):
    """M-ANT with the type of each group read from a table of variances instead of found by search (HPCA 2025, real-time KV).

    The statistic is the unbiased variance of x / max|x| over the group; in hardware it is kept incrementally.
    """

    bounds: tuple[float, ...] = ()
    chosen: tuple[int, ...] = ()  # member of each interval

    def params(self, flat: Tensor) -> Params:
        rows, n = flat.shape
        block = self.at(n).geometry(n).block
        short = -n % block
        x = torch.nn.functional.pad(flat, (0, short)).view(rows, -1, block)
        count = torch.full((x.shape[1],), float(block), dtype=torch.float64, device=flat.device)
        count[-1] -= short
        top = x.abs().amax(-1)
        unit = torch.where(top[..., None] > 0, x / top[..., None], 0.0).double()
        variance = (unit.square().sum(-1) - unit.sum(-1).square() / count) / (count - 1).clamp_min(1)
        interval = torch.bucketize(variance.float(), torch.tensor(self.bounds, device=flat.device))
        member = torch.tensor(self.chosen, dtype=torch.uint8, device=flat.device)[interval]
        tops = torch.tensor([grid.max_level for grid in self.format.members], device=flat.device)
        scale = to_stored(self.format.scale, top / tops[member.int()], None, self.format.spare)
        return Params(scale, None, member, None)


@lru_cache(maxsize=32)
def mant_format(name: str, coefficients: tuple[int | None, ...], group: int) -> Format:
    """M-ANT groups with a choice of ±(a·i + 2**i) and integers."""
    grids = tuple(to_common_range("int4", range(8)) if a is None else mant(a) for a in coefficients)
    return Format(f"{name}-g{group}", bits=4, members=grids, block=group, scale=Scale("fp16"))


def mant_coder(choice: str, group: int = 64) -> Typed:
    """M-ANT by a table ("paper3", "paper8", "table16") or by search ("search8", "search16", absmax scales as in the paper).

    Raises:
        OptionError: an unknown choice.
    """
    if choice in TABLES:
        bounds, types = TABLES[choice]
        members = tuple(dict.fromkeys(types))
        fmt = mant_format(f"mant4-{choice}", members, group)
        return Varied(fmt, "absmax", bounds, tuple(members.index(t) for t in types))
    if choice in ("search8", "search16"):
        fmt = mant_format(f"mant4-{choice}", CANDIDATES8 if choice == "search8" else CANDIDATES16, group)
        return Typed(fmt, "absmax")
    raise OptionError(f"unknown M-ANT choice '{choice}'; choose from: {', '.join(TABLES)}, search8, search16")


def typed(name: str, rule: str = "mse") -> Typed:
    """The coder of a format's short name."""
    return Typed(named_format(name), rule)


__all__ = ["TABLES", "Typed", "Varied", "mant_coder", "mant_format", "typed"]
