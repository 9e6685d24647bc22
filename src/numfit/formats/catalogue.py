"""The catalogue: every numeric type numfit knows by name, one registration each.

A registration says what the levels are and where the type usually keeps its scales and members. Everything else (fitting,
packing, checkpoints, evaluation, reports) follows from the value. `register` is public: a new type in a user's own file
needs nothing more (README, "Add your own type").

Legal notice: types that give a redundant code a special value (`bitmod3`, `bitmod4`, `razer4`, and our own composition
`mantsv4`) touch ideas for which their authors state that a patent application exists (mant-family.md, section 0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from numfit.errors import FormatError
from numfit.formats.format import Format
from numfit.formats.grid import (
    APOT4,
    FLINT4,
    IQ4_NL,
    Grid,
    integer,
    lloyd_max,
    mant_magnitudes,
    minifloat,
    normal_float,
    power_of_two,
    shared_mantissa,
    sign_magnitude,
    table,
    to_common_range,
    unsigned,
)
from numfit.formats.grid import NF4 as NF4_LEVELS
from numfit.formats.scale import STORES, Scale
from numfit.formats.trellis import names as trellis_names
from numfit.formats.trellis import trellis


@dataclass(frozen=True)
class Base:
    """A named type before blocks and scale storage are chosen.

    Attributes:
        name: the base name.
        about: one line for tables and docs.
        block: default block; part of the full name unless `closed`.
        store: default scale storage.
        closed: the bare name is complete (an outside standard, or an alias that fixes the block).
        parts: remaining arguments of `Format`.
        scale: remaining arguments of `Scale`, used while the storage is the default one.
    """

    name: str
    about: str
    block: int | str
    store: str = "fp16"
    closed: bool = False
    parts: dict[str, Any] = field(default_factory=dict)
    scale: dict[str, Any] = field(default_factory=dict)


_BASES: dict[str, Base] = {}
_PATTERNS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Base | None]]] = []


def register(
    name: str,
    grids: Sequence[Grid] | Grid,
    about: str = "",
    *,
    block: int | str = 128,
    store: str = "fp16",
    closed: bool = False,
    scale: dict[str, Any] | None = None,
    **parts: Any,
) -> None:
    """Make a numeric type known by name.

    Args:
        name: lower-case letters, digits, dots and dashes; must not look like another name's suffix.
        grids: the family, all of `2**bits` levels; one grid for a plain type.
        about: one line for `numfit formats`.
        block, store: defaults of `-g…` and `@…`.
        parts: `unit`, `palette`, `zero`, `rounding`, `member_home` of `Format`.

    Raises:
        FormatError: the name is taken or malformed, or the parts cannot form a format.
    """
    if not re.fullmatch(r"[a-z][a-z0-9.-]*", name) or re.search(r"-(g\d+|row|tensor)$", name):
        raise FormatError(f"'{name}' cannot name a type: use lower-case letters, digits, dots and dashes, and no block suffix")
    if find(name):
        raise FormatError(f"the type '{name}' is registered already")
    base = _base(name, grids, about, block=block, store=store, closed=closed, scale=scale, **parts)
    if store not in STORES:
        raise FormatError(f"scales are stored as one of {', '.join(STORES)}, not '{store}'")
    Format(name, block=block, scale=Scale(store, STORES[store].parent), **base.parts)  # refuses impossible parts now
    _BASES[name] = base


def _base(name: str, grids: Sequence[Grid] | Grid, about: str = "", *, block: int | str = 128, store: str = "fp16",
          closed: bool = False, scale: dict[str, Any] | None = None, **parts: Any) -> Base:  # fmt: skip
    members = (grids,) if isinstance(grids, Grid) else tuple(grids)
    parts = {"bits": (len(members[0].levels) - 1).bit_length(), "members": members, **parts}
    return Base(name, about, block, store, closed, parts, scale or {})


def find(name: str) -> Base | None:
    """The base of that exact name, or None."""
    if name in _BASES:
        return _BASES[name]
    for pattern, build in _PATTERNS:
        match = pattern.fullmatch(name)
        if match and (base := build(match)):
            return base
    return None


def bases() -> dict[str, Base]:
    """All registered scalar bases by name, in order of registration (patterns such as `ams-eXmYkN` stand for more)."""
    return dict(_BASES)


# -- integers ---------------------------------------------------------------------------------------------------------

for _b in range(2, 9):
    register(f"int{_b}", integer(_b), "symmetric integers, narrow range")
for _b in range(2, 9):
    register(f"uint{_b}", unsigned(_b), "integers with a stored zero point", zero=True)

# -- minifloats: no Inf, no NaN, subnormals ---------------------------------------------------------------------------


def _minifloat(e: int, m: int, name: str | None = None) -> Base:
    return _base(name or f"e{e}m{m}", minifloat(e, m), f"float with {e} exponent and {m} mantissa bits")


for _e, _m in ((1, 1), (2, 0), (2, 1), (1, 2), (3, 0), (2, 2), (3, 1), (2, 3), (3, 2), (4, 3), (5, 2)):
    _BASES[f"e{_e}m{_m}"] = _minifloat(_e, _m)
for _alias, (_e, _m) in {"fp4": (2, 1), "fp5": (2, 2), "fp6": (2, 3), "fp8": (4, 3)}.items():
    _BASES[_alias] = _minifloat(_e, _m, _alias)
_PATTERNS.append((
    re.compile(r"e([1-5])m([0-6])"),
    lambda x: _minifloat(int(x[1]), int(x[2])) if 2 <= 1 + int(x[1]) + int(x[2]) <= 8 else None,
))  # fmt: skip

# -- tables -----------------------------------------------------------------------------------------------------------

register("nf3", table("nf3", normal_float(3)), "normal quantiles", block=64)
register("nf4", table("nf4", NF4_LEVELS), "normal quantiles (QLoRA)", block=64)
register("iq4nl", table("iq4nl", IQ4_NL), "the non-linear table of GGUF IQ4_NL", block=32)
for _b in range(2, 7):
    register(f"lm{_b}", table(f"lm{_b}", lloyd_max(_b)), "Lloyd-Max levels of N(0,1), for rotated rows (+rot)", block="row",
             scale={"search": "fine"})  # fmt: skip

# -- learned tables: one a row (SqueezeLLM, any4) ----------------------------------------------------------------------------

for _b in (2, 3, 4):
    register(f"km{_b}", table("start", normal_float(_b)), "levels of each row by weighted k-means (SqueezeLLM)", block="row",
             learned=True)  # fmt: skip
for _b in (3, 4):
    register(f"any{_b}", table("start", normal_float(_b)), "the same under a scale a group (any4)", learned=True)

# -- powers of two ----------------------------------------------------------------------------------------------------

for _b in (2, 3, 4):
    register(f"pot{_b}", power_of_two(_b), "powers of two, no zero", scale={"search": "pot"})
    register(f"pot{_b}-log", power_of_two(_b), "the same, rounded in the log domain (PoTPTQ)", rounding="log",
             scale={"search": "pot"})  # fmt: skip
register("apot4", sign_magnitude("apot4", APOT4), "sums of two powers of two")
register("flint4", sign_magnitude("flint4", FLINT4), "ANT's float-int")

# -- M-ANT ------------------------------------------------------------------------------------------------------------

MANT4 = (0, 5, 10, 17, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120)  # mant-family.md 1.1
MANT4S = (4, 7, 13, 18, 27, 44, 93)
MANT3 = (0, 1, 2, 4, 6, 8, 12)


def mant(a: int, bits: int = 4) -> Grid:
    """±(a·i + 2**i), times a power of two (see `to_common_range`)."""
    return to_common_range(f"mant{a}", mant_magnitudes(a, bits))


def _int_member(bits: int) -> Grid:
    """Symmetric integers on M-ANT's sign-magnitude codes; the code of minus zero is never emitted."""
    return to_common_range(f"int{bits}", range(1 << (bits - 1)))


def _mantsv(a: int, sign: int) -> Grid:
    """M-ANT whose code of the least negative level becomes ± the midpoint of the two largest levels."""
    half = mant_magnitudes(a)
    return to_common_range(f"mant{a}{'+' if sign > 0 else '-'}sv", half, special=sign * (half[-1] + half[-2]) / 2)


register("mant4", [*map(mant, MANT4), _int_member(4)], "M-ANT: 15 coefficients and INT4", block=64)
# The shortlist was found by greedy choice among all a in 0 … 127 and INT4 on a mix of five synthetic distributions;
# on held-out draws it costs 0 to 2 % of squared error against the full sixteen (mant-family.md section 3).
register("mant4s", [*map(mant, MANT4S), _int_member(4)], "M-ANT, shortlist of 8 members", block=64)
register("mantsv4", [_mantsv(a, s) for a in MANT4 for s in (1, -1)] + [_int_member(4)],
         "M-ANT with a special value, our composition (patent notice)", block=64)  # fmt: skip
register("mant3", [*(mant(a, 3) for a in MANT3), _int_member(3)], "M-ANT at 3 bits: 7 coefficients and INT3", block=64)

# -- AMS: neighbours share the last mantissa bit ----------------------------------------------------------------------


def _ams(e: int, m: int, k: int, name: str | None = None) -> Base:
    return _base(name or f"ams-e{e}m{m}k{k}", shared_mantissa(e, m), f"e{e}m{m}, {k} neighbours share the last bit",
                 block="row", closed=name is not None, unit=k)  # fmt: skip


_PATTERNS.append((
    re.compile(r"ams-e([1-5])m([1-6])k(\d{1,3})"),
    lambda x: _ams(int(x[1]), int(x[2]), int(x[3])) if int(x[1]) + int(x[2]) <= 7 and int(x[3]) >= 2 else None,
))  # fmt: skip
_BASES["fp4.25"] = _ams(2, 2, 4, "fp4.25")
_BASES["fp5.33"] = _ams(2, 3, 3, "fp5.33")
for _m, _k in ((1, 4), (2, 4), (3, 3)):
    _BASES[f"ams-e2m{_m}k{_k}"] = _ams(2, _m, _k)

# -- other adaptive types ---------------------------------------------------------------------------------------------

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_ANT = [_int_member(4), sign_magnitude("flint4", FLINT4), sign_magnitude("pot4z", (0, 1, 2, 4, 8, 16, 32, 64)), minifloat(2, 1)]
register("ant4", _ANT, "ANT: one of int, flint, pot, float per tensor", block="row", unit="tensor")


def _special(magnitudes: Sequence[float], value: float) -> Grid:
    return sign_magnitude(f"sv{value:+g}", magnitudes, special=value)


register("bitmod3", [_special((0, 1, 2, 4), v) for v in (3, -3, 6, -6)],
         "BitMoD: e2m0 with one special value (patent notice)", store="u8")  # fmt: skip
register("bitmod4", [_special(E2M1, v) for v in (5, -5, 8, -8)],
         "BitMoD: e2m1 with one special value (patent notice)", store="u8")  # fmt: skip
register("razer4", [_special(E2M1, v) for v in (5, 8, -5, -8)],
         "RaZeR on NVFP4 blocks, choice in spare scale bits (patent notice)", block=16, store="e3m3", closed=True,
         member_home="scale", scale={"parent": "tensor", "cap": 28.0, "search": "nv"})  # fmt: skip
register("if4", [minifloat(2, 1), sign_magnitude("int4x6/7", [i * 6 / 7 for i in range(8)])],
         "FP4 or INT4 per block, choice in the scale's sign", block=16, store="e4m3", closed=True,
         member_home="scale", rounding="even", scale={"search": "nv"})  # fmt: skip

# DynFP (mant-family.md 2.5) names four layouts and 24 values for the code of minus zero, not the values: these are ours.
_LAYOUTS = {
    "e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),
    "e2m1": E2M1,
    "e1m2": (0, 1, 2, 3, 4, 5, 6, 7),
    "e1m2gap": (0, 1, 2, 3, 8, 10, 12, 14),
}
_REMAP = (1 / 12, 1 / 4, 5 / 12, 7 / 12, 3 / 4, 5 / 6, 11 / 12, 13 / 12, 7 / 6, 5 / 4, 4 / 3, 3 / 2)
register("dynfp4", [sign_magnitude(f"{n}{s * t:+.3f}", half, special=s * t * half[-1])
                    for n, half in _LAYOUTS.items() for t in _REMAP for s in (1, -1)],
         "DynFP: a palette of 16 of 96 remapped floats per tensor", block=32, store="u8", palette=16)  # fmt: skip

# -- trellis codes: by name only, since `bases` lists scalar types -----------------------------------------------------


def _trellis(name: str) -> Base | None:
    if name not in trellis_names():
        return None
    code = trellis(name)
    about = f"trellis code of {code.bits} bits, {code.state_bits}-bit states, one scale a row; use with +rot"
    symbols = Grid("symbols", tuple(float(i) for i in range(1 << code.bits)))
    return _base(name, symbols, about, block="row", closed=True, trellis=code)


_PATTERNS.append((re.compile(r"trellis\d(-t8)?"), lambda x: _trellis(x[0])))

# -- outside standards: never renormalised, ties to even --------------------------------------------------------------


def _mx(name: str, grid: Grid) -> None:
    register(name, grid, "OCP MX: blocks of 32, power-of-two scale", block=32, store="e8m0", closed=True, rounding="even")


_mx("mxfp4", minifloat(2, 1))
_mx("mxfp6-e2m3", minifloat(2, 3))
_mx("mxfp6-e3m2", minifloat(3, 2))
_mx("mxfp8-e4m3", minifloat(4, 3))
_mx("mxfp8-e5m2", minifloat(5, 2))
_mx("mxint8", integer(8, unit=2.0**-6))
_mx("mxint4", integer(4, unit=2.0**-2))

_NV: dict[str, Any] = {"block": 16, "store": "e4m3", "closed": True, "rounding": "even"}
register("nvfp4", minifloat(2, 1), "NVFP4: blocks of 16, e4m3 scale under an fp32", **_NV)
register("nvint4", integer(4), "the same container with INT4", **_NV)
register("nvfp4-4over6", minifloat(2, 1), "NVFP4, each block maps its maximum to 6 or 4", **_NV,
         scale={"cap": 256.0, "tries": (1.0, 1.5)})  # fmt: skip
