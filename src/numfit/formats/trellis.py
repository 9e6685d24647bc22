"""Trellis codes: `trellis2`, `trellis3`, `trellis4` (and `-t8`): k bits a weight and one fp16 scale a row, nothing else.

    ŵ = scale[row] · level[state] / 32,  state = the L bits of a circular stream from the weight's own symbol on

A bit-shift trellis (QTIP, arXiv 2406.11235): each weight has a symbol of k bits, and what it decodes to depends on the symbols
of its neighbours too, so that an encoder that searches whole sequences (trellis_viterbi.py) comes within a decibel of what the
theory of rate and distortion allows for Gaussian numbers. Rows of real weights are Gaussian after a rotation of their inputs,
which this code needs: it has no groups, no members, no zero points to adapt with.

A tile is 64 rows × 4 columns, a circular stream of its own ("tail-biting": no start state is stored). Weight
p = 4 · row + column has bits [k·p, k·p + k) of it, least significant first, and is decoded by bits [k·p, k·p + L): its own
symbol is the newest and lies lowest, time runs from the last weight to the first. Tiles that stick out of a matrix are
short: c columns instead of four make p = c · row + column; their stream is circular in itself and ends on a whole byte.
Nothing is stored for absent weights. Leading axes of a tensor are rows; stacked matrices must fill their tiles.

What a state decodes to, an int8 level:
    table8  L = 8: level[state], a trained table of 256
    gf2     L = 12: level[index], bit i of the index (most significant first) the parity of state & mask[i]: a linear hash over
            GF(2), so that the code is a convolutional one; 64 … 256 levels, trained
Levels are antisymmetric: under the complement of the index (gf2), or in the oldest bit of the state, which is a sign (table8).
That halves the tables that kernels look up; nothing but their speed depends on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from numfit.errors import FormatError
from numfit.formats.trellis_tables import TABLES

TILE_ROWS, TILE_COLS = 64, 4
LEVEL = 2.0**-5  # what a level counts for, so that scales are about the deviation of a row: int8 levels reach 127 / 32 ≈ 4
MAX_STATE_BITS = 12


@dataclass(frozen=True)
class Trellis:
    """A trellis code. Equal parts make equal codes, whatever the name says.

    Attributes:
        name: the short name.
        bits: k, of a symbol.
        state_bits: L, of a state.
        masks: of each bit of the index, most significant first; none: the index is the state.
        levels: int8, by index.
        deviation: standard deviation, in levels, of the source that the levels were trained for: where encoders start.
    """

    name: str = field(compare=False)
    bits: int
    state_bits: int
    masks: tuple[int, ...]
    levels: tuple[int, ...]
    deviation: float

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise FormatError(f"{self.name}: {problem}")

    @property
    def code(self) -> str:
        """How states become levels: "table" or "gf2"."""
        return "gf2" if self.masks else "table"

    @cached_property
    def table(self) -> Tensor:
        """Level of every state: int8 [2**L]."""
        levels = torch.tensor(self.levels, dtype=torch.int8, device="cpu")
        if not self.masks:
            return levels
        return levels[hash_states(self.masks, self.state_bits)]

    @property
    def max_level(self) -> float:
        """Largest magnitude of a decoded weight at scale 1."""
        return max(abs(v) for v in self.levels) * LEVEL

    def stream_bytes(self, rows: int, row: int) -> int:
        """Bytes of the symbols of a matrix [rows, row]."""
        return sum(rows_here * size for rows_here, size in _streams(self.bits, rows, row))

    def to_json(self) -> dict[str, Any]:
        """A self-contained description."""
        return {
            "name": self.name,
            "bits": self.bits,
            "state_bits": self.state_bits,
            "masks": list(self.masks),
            "levels": list(self.levels),
            "deviation": self.deviation,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Trellis:
        """Rebuild a code from `to_json`.

        Raises:
            FormatError: a part is missing or impossible.
        """
        try:
            return Trellis(
                name=str(data["name"]),
                bits=int(data["bits"]),
                state_bits=int(data["state_bits"]),
                masks=tuple(int(v) for v in data["masks"]),
                levels=tuple(int(v) for v in data["levels"]),
                deviation=float(data["deviation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the description of a trellis is damaged: {error!r}") from None


def hash_states(masks: tuple[int, ...], state_bits: int) -> Tensor:
    """Index of every state under a linear hash: int64 [2**L]."""
    states = torch.arange(1 << state_bits, device="cpu")
    index = torch.zeros_like(states)
    for mask in masks:
        parity = states & mask
        for shift in (8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        index = index << 1 | (parity & 1)
    return index


def _streams(bits: int, rows: int, row: int) -> list[tuple[int, int]]:
    """(how many rows of tiles, bytes of one) for the whole tiles and for the short ones below them."""
    strips, tail = divmod(row, TILE_COLS)

    def size(height: int) -> int:
        return strips * ((height * TILE_COLS * bits + 7) // 8) + (height * tail * bits + 7) // 8

    whole, short = divmod(rows, TILE_ROWS)
    return [(whole, size(TILE_ROWS)), (1 if short else 0, size(short))]


@lru_cache(maxsize=32)
def trellis(name: str) -> Trellis:
    """The trellis of a short name.

    Raises:
        FormatError: there is none.
    """
    if name not in TABLES:
        raise FormatError(f"unknown trellis '{name}'; there are {', '.join(TABLES)}")
    return Trellis(name, **TABLES[name])


def names() -> tuple[str, ...]:
    """All short names."""
    return tuple(TABLES)


def _problem(t: Trellis) -> str | None:
    """Why the parts cannot form a code, or None."""
    if not 2 <= t.bits <= 4:
        return f"symbols have 2 to 4 bits, not {t.bits}"
    if not max(2 * t.bits, t.bits + 4) <= t.state_bits <= MAX_STATE_BITS:
        return f"states have {max(2 * t.bits, t.bits + 4)} to {MAX_STATE_BITS} bits, not {t.state_bits}"
    if len(t.masks) > 8 or not all(0 < m < 1 << t.state_bits for m in t.masks):
        return f"a hash has at most 8 masks, each of some of the {t.state_bits} bits of a state"
    wanted = 1 << (len(t.masks) or t.state_bits)
    if len(t.levels) != wanted:
        return f"there must be {wanted} levels, not {len(t.levels)}"
    if not all(-127 <= v <= 127 for v in t.levels) or not any(t.levels):
        return "levels lie between -127 and 127 and are not all zero"
    if not t.masks and t.state_bits != 8:
        return f"a table has states of 8 bits, not {t.state_bits}"
    if not (math.isfinite(t.deviation) and t.deviation > 0):
        return f"the deviation is a positive number, not {t.deviation!r}"
    return None
