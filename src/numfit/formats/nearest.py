"""Nearest levels: the tables every verb rounds with.

Rounding compares against thresholds, never against levels: a value's rank is the number of thresholds below it, and
the rank names the code. A threshold is the fp32 midpoint of two neighbours (their geometric mean for log rounding), so
a tie goes to the lower level; where the rule wants a tie to go up, the threshold is nudged down by one ulp. One
comparison then serves all rules (ams-pot-formats.md section 6).
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from numfit.formats.grid import Grid, ranked

CHAIN_MAX = 64  # ranks above this are found by binary search instead of a chain of comparisons


class Tables(NamedTuple):
    """Tables of a family, one row per member; shorter members are padded with unreachable ranks."""

    levels: Tensor  # [M, 2**bits] fp32, by code
    thresholds: Tensor  # [M, ranks - 1] fp32, ascending, +inf where padded
    codes: Tensor  # [M, ranks] uint8, code of each rank


class Ladder(NamedTuple):
    """What the scale search needs: levels by rank, on |u| where every member mirrors around zero."""

    mirrored: bool
    levels: Tensor  # [M, ranks] fp32
    thresholds: Tensor  # [M, ranks - 1] fp32
    step: float | None  # single uniform grid: rounding is arithmetic, no chain needed


def thresholds(grid: Grid, rounding: str) -> list[float]:
    """The fp32 thresholds between neighbouring emitted levels; see the module docstring."""
    out = []
    pairs = ranked(grid)
    for (low, _), (high, code) in pairwise(pairs):
        if rounding == "log" and low * high > 0:
            edge = np.float32(math.copysign(math.sqrt(low * high), low))
        else:
            edge = np.float32((low + high) / 2)
        up = code % 2 == 0 if rounding == "even" else rounding == "log" and edge == 0  # PoTPTQ: zero counts as positive
        out.append(float(np.nextafter(edge, np.float32(-np.inf)) if up else edge))
    return out


def _padded(rows: list[list[float]], fill: float | None) -> list[list[float]]:
    width = max(map(len, rows))
    return [row + [row[-1] if fill is None else fill] * (width - len(row)) for row in rows]


@lru_cache(maxsize=256)
def tables(members: tuple[Grid, ...], rounding: str, device: torch.device) -> Tables:
    """Encode and decode tables of a family on `device`."""
    codes = [[float(code) for _, code in ranked(g)] for g in members]
    return Tables(
        torch.tensor([g.levels for g in members], dtype=torch.float32, device=device),
        torch.tensor(_padded([thresholds(g, rounding) for g in members], math.inf), dtype=torch.float32, device=device),
        torch.tensor(_padded(codes, None), dtype=torch.float32, device=device).to(torch.uint8),
    )


@lru_cache(maxsize=256)
def ladder(members: tuple[Grid, ...], rounding: str, device: torch.device) -> Ladder:
    """Search tables of a family on `device`."""
    mirrored = all(g.symmetric for g in members)
    levels, edges = [], []
    for grid in members:
        values = [level for level, _ in ranked(grid)]
        cuts = thresholds(grid, rounding)
        skip = len(values) // 2 if mirrored else 0  # the non-negative half keeps zero, where there is one
        levels.append(values[skip:])
        edges.append(cuts[skip:])
    step = members[0].step if len(members) == 1 and mirrored and 0.0 in levels[0] else None
    return Ladder(
        mirrored,
        torch.tensor(_padded(levels, None), dtype=torch.float32, device=device),
        torch.tensor(_padded(edges, math.inf), dtype=torch.float32, device=device).reshape(len(members), -1),
        step,
    )


def rank(u: Tensor, edges: Tensor) -> Tensor:
    """Number of thresholds below each value.

    Args:
        u: fp32 [n, w].
        edges: fp32 [n, ranks - 1], or [1, ranks - 1] for all.

    Returns:
        uint8 [n, w].
    """
    if (edges.shape[0] == 1 and u.numel() >= 4096) or edges.shape[1] > CHAIN_MAX:
        if edges.shape[0] > 1:  # a long chain for several members: one binary search per row
            return torch.searchsorted(edges.contiguous(), u.contiguous(), right=False).to(torch.uint8)
        return torch.bucketize(u.contiguous(), edges[0], right=False).to(torch.uint8)
    out = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)
    for k in range(edges.shape[1]):
        out += u > edges[:, k : k + 1]
    return out
