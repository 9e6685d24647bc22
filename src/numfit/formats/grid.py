"""A grid: the finite set of levels that the codes of a numeric type stand for.

Everything a scalar type is lives in one tuple, `levels[code]`, of exact numbers. Sign conventions, special values and
unused codes are just entries of it, so the verbs (fit, encode, decode, pack) never ask what kind of type they hold.
The price is that a type of more than 8 bits is not expressible here (256 levels is the practical end of a table).

Code conventions (ams-pot-formats.md section 5): floats, powers of two and M-ANT are sign-magnitude, integers are two's
complement in narrow range, tables ascend with the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist


@dataclass(frozen=True)
class Grid:
    """Levels in code order.

    Attributes:
        name: what reports call it.
        levels: `2**bits` numbers, `levels[code]`. Inf and NaN mark codes that stand for no number.
        never: codes that decode but that no encoder may emit (the most negative integer, say). Codes that repeat
            the level of a lower code, and codes without a finite level, are never emitted either.
    """

    name: str
    levels: tuple[float, ...]
    never: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        # one NaN object, so that grids with unused codes compare equal and hash alike
        object.__setattr__(self, "levels", tuple(math.nan if v != v else v for v in self.levels))

    @property
    def max_level(self) -> float:
        """Largest magnitude an encoder can emit."""
        return max(abs(level) for level, _ in ranked(self))

    @property
    def symmetric(self) -> bool:
        """Whether the emitted levels mirror around zero."""
        values = [level for level, _ in ranked(self)]
        return values == [-value for value in reversed(values)]

    @property
    def step(self) -> float | None:
        """The distance of neighbours where it is the same everywhere (integers), else None."""
        values = [level for level, _ in ranked(self)]
        gaps = {b - a for a, b in pairwise(values)}
        return gaps.pop() if len(gaps) == 1 else None


@lru_cache(maxsize=1024)
def ranked(grid: Grid) -> tuple[tuple[float, int], ...]:
    """The emitted `(level, code)` pairs in ascending order of level; of equal levels the lowest code stays."""
    seen: dict[float, int] = {}
    for code, level in enumerate(grid.levels):
        if math.isfinite(level) and code not in grid.never:
            seen.setdefault(level + 0.0, code)  # + 0.0 makes -0.0 and 0.0 one key
    return tuple(sorted(seen.items()))


def sign_magnitude(name: str, magnitudes: Iterable[float], *, special: float | None = None) -> Grid:
    """A grid whose top code bit is the sign. `special` replaces the redundant code of minus zero (or minus the least)."""
    half = [float(m) for m in magnitudes]
    levels = half + [-m for m in half]
    if special is not None:
        levels[len(half)] = float(special)
    return Grid(name, tuple(levels))


def table(name: str, levels: Sequence[float]) -> Grid:
    """A grid of tabulated levels, in code order."""
    return Grid(name, tuple(float(v) for v in levels))


def integer(bits: int, *, unit: float = 1.0) -> Grid:
    """Signed integers times `unit`, two's complement; the code of -2**(bits-1) is never emitted (narrow range)."""
    half = 1 << (bits - 1)
    levels = [unit * i for i in range(half)] + [unit * (i - 2 * half) for i in range(half, 2 * half)]
    return Grid(f"int{bits}", tuple(levels), frozenset({half}))


def unsigned(bits: int) -> Grid:
    """Integers 0 … 2**bits - 1, for types with a stored zero point."""
    return Grid(f"uint{bits}", tuple(float(i) for i in range(1 << bits)))


def minifloat_magnitudes(e: int, m: int) -> list[float]:
    """Magnitudes of an eXmY float in code order, with subnormals and no Inf or NaN (ams-pot-formats.md 1.1).

    The bias is 2**(E-1) - 1, but 1 for E = 1, where subnormals and normals then form one uniform grid.
    """
    bias = max(1, (1 << (e - 1)) - 1)
    out = []
    for code in range(1 << (e + m)):
        exponent, mantissa = code >> m, code & ((1 << m) - 1)
        if exponent == 0:
            out.append(math.ldexp(mantissa, 1 - bias - m))
        else:
            out.append(math.ldexp((1 << m) + mantissa, exponent - bias - m))
    return out


def minifloat(e: int, m: int) -> Grid:
    """An eXmY float. e4m3 and e5m2 follow OCP FP8: their Inf and NaN codes stand for no number."""
    half = minifloat_magnitudes(e, m)
    if (e, m) == (4, 3):
        half[-1] = math.nan
    if (e, m) == (5, 2):
        half[-4:] = [math.inf, math.nan, math.nan, math.nan]
    return sign_magnitude(f"e{e}m{m}", half)


def shared_mantissa(e: int, m: int) -> tuple[Grid, Grid]:
    """The two sub-grids of eXmY by their last mantissa bit; the codes are the prefixes (ams-pot-formats.md 1.1, 1.5)."""
    half = minifloat_magnitudes(e, m)
    return (
        sign_magnitude(f"e{e}m{m}.lsb0", half[0::2]),
        sign_magnitude(f"e{e}m{m}.lsb1", half[1::2]),
    )


def power_of_two(bits: int) -> Grid:
    """±2**0 … ±2**(2**(bits-1) - 1), no zero (ams-pot-formats.md 2.1)."""
    return sign_magnitude(f"pot{bits}", [2.0**i for i in range(1 << (bits - 1))])


def mant_magnitudes(a: int, bits: int = 4) -> list[int]:
    """M-ANT magnitudes a·i + 2**i, i = 0 … 2**(bits-1) - 1 (mant-family.md 1.1)."""
    return [a * i + (1 << i) for i in range(1 << (bits - 1))]


def to_common_range(name: str, magnitudes: Sequence[float], *, special: float | None = None) -> Grid:
    """A sign-magnitude grid times the power of two that brings its largest level into [4, 8).

    Members of one family then have scales within a factor of two of each other, so that a short scale type (e3m3,
    u8) spends its range on the weights and not on the type. A power of two changes no rounding.
    """
    shift = 3 - math.frexp(max(magnitudes))[1]
    half = [math.ldexp(v, shift) for v in magnitudes]
    return sign_magnitude(name, half, special=None if special is None else math.ldexp(special, shift))


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Lloyd-Max centroids of N(0,1), positive halves (Max 1960, Lloyd 1982); tests/test_grids.py derives them again.
LLOYD_MAX = {
    2: (0.452780037, 1.510417609),
    3: (0.245094179, 0.756005254, 1.343909216, 2.151945729),
    4: (0.128395025, 0.388048100, 0.656759176, 0.942340399, 1.256231205, 1.618046402, 2.069016970, 2.732589624),
    5: (
        0.065889660, 0.198051830, 0.331378306, 0.466699523, 0.604933624, 0.747135704, 0.894565117, 1.048783320,
        1.211804381, 1.386340340, 1.576228079, 1.787233218, 2.028728399, 2.317739404, 2.691119577, 3.260732493,
    ),
    6: (
        0.033409506, 0.100278289, 0.167296903, 0.234566985, 0.302192846, 0.370282645, 0.438949672, 0.508313781,
        0.578503031, 0.649655581, 0.721921941, 0.795467656, 0.870476587, 0.947154945, 1.025736349, 1.106488240,
        1.189720142, 1.275794486, 1.365141020, 1.458276375, 1.555831225, 1.658588900, 1.767541883, 1.883977241,
        2.009611043, 2.146810217, 2.298981210, 2.471304798, 2.672273835, 2.917406791, 3.240437055, 3.744101271,
    ),
}  # fmt: skip
FLINT4 = (0, 1, 2, 3, 4, 6, 8, 16)
APOT4 = (0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625)


def normal_float(bits: int) -> list[float]:
    """NF-b levels: quantiles of N(0,1), zero included, largest magnitude 1 (ams-pot-formats.md 3.5)."""
    inverse = NormalDist().inv_cdf
    edge = 1 - (1 / 32 + 1 / 30) / 2
    n = 1 << (bits - 1)
    negative = [-inverse(edge + (0.5 - edge) * i / (n - 1)) for i in range(n)]
    positive = [inverse(0.5 + (edge - 0.5) * i / n) for i in range(1, n + 1)]
    top = max(positive[-1], -negative[0])
    return [v / top + 0.0 for v in negative + positive]


def lloyd_max(bits: int) -> list[float]:
    """Levels of least squared error for N(0,1), ascending."""
    half = LLOYD_MAX[bits]
    return [-v for v in reversed(half)] + list(half)
