"""The order in which a sweep visits columns, and where it stops to fit parameters or to update what follows.

A format stores its columns where they are, so every order is undone when the sweep is over. Columns of a unit that chooses a
member (AMS) stay neighbours: only whole units move.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.formats.format import Format


class Segment(NamedTuple):
    """A run of positions swept without a pause, after fitting `blocks`."""

    start: int
    stop: int
    blocks: tuple[int, ...]


class Plan(NamedTuple):
    """Attributes:
    order: column at each position, int64 [K].
    block, unit: index of the block and the unit of the column at each position, int64 [K].
    small: whether units choose their member on the way.
    panels: each a list of neighbouring segments; what follows a panel is updated once, at its end.
    """

    order: Tensor
    block: Tensor
    unit: Tensor
    small: bool
    panels: tuple[tuple[Segment, ...], ...]


def small_units(fmt: Format) -> bool:
    """Whether units smaller than a block choose a member."""
    return isinstance(fmt.unit, int) and fmt.member_count > 1


def columns(fmt: Format, k: int) -> tuple[Tensor, Tensor]:
    """Block and unit of each column: int64 [K] both. Units restart at every block."""
    g = fmt.geometry(k)
    column = torch.arange(k)
    block = column // g.block
    return block, block * -(-g.block // g.unit) + column % g.block // g.unit


def make_plan(fmt: Format, diagonal: Tensor, order: str, refit: bool, panel: int) -> Plan:
    """Plan a sweep.

    Args:
        diagonal: of H [K].
        order: one of `options.ORDERS`.
        refit: stop to fit the parameters of blocks (never for `static`, nor where a block is not smaller than a row).
        panel: most columns of a panel (a unit that is larger makes a panel of its own).
    """
    k = len(diagonal)
    block, unit = columns(fmt, k)
    small = small_units(fmt)
    atom = unit if small else torch.arange(k)
    atoms = int(atom[-1]) + 1
    weight = torch.zeros(atoms, dtype=torch.float64)
    weight.scatter_reduce_(0, atom, diagonal.double().cpu(), "amax", include_self=False)
    rank = torch.arange(atoms)  # atoms in order of their visit
    if order in ("static", "act"):
        rank = torch.sort(weight, descending=True, stable=True).indices
    elif order == "group":
        rank = torch.sort(weight, descending=True, stable=True).indices
        home = torch.zeros(atoms, dtype=torch.int64).scatter_(0, atom, block)  # block of each atom
        largest = torch.zeros(int(block[-1]) + 1, dtype=torch.float64)
        largest.scatter_reduce_(0, home, weight, "amax", include_self=False)
        place = torch.empty_like(largest, dtype=torch.int64)
        place[torch.sort(largest, descending=True, stable=True).indices] = torch.arange(len(largest))
        rank = rank[torch.sort(place[home[rank]], stable=True).indices]
    visit = torch.empty_like(rank)
    visit[rank] = torch.arange(atoms)
    permutation = torch.sort(visit[atom], stable=True).indices
    refit = refit and order != "static" and isinstance(fmt.block, int)
    by_block = refit and order != "act"
    panels = _panels(atom[permutation].tolist(), block[permutation].tolist(), by_block, panel)
    seen: set[int] = set()
    out = []
    for segments in panels:
        fitted = []
        for start, stop in segments:
            new = sorted(set(block[permutation[start:stop]].tolist()) - seen) if refit else []
            seen.update(new)
            fitted.append(Segment(start, stop, tuple(new)))
        out.append(tuple(fitted))
    return Plan(permutation, block[permutation], unit[permutation], small, tuple(out))


def _panels(atom: list[int], block: list[int], by_block: bool, most: int) -> list[list[tuple[int, int]]]:
    """Panels of at most `most` positions as lists of (start, stop); with `by_block`, a segment never holds two blocks."""
    k = len(atom)
    ends = [i + 1 for i in range(k) if i + 1 == k or atom[i + 1] != atom[i]]  # where one may stop
    panels: list[list[tuple[int, int]]] = []
    start = 0
    while start < k:
        fits = [e for e in ends if start < e <= start + most] or [next(e for e in ends if e > start)]
        stop = fits[-1]
        if by_block and stop < k and block[stop] == block[stop - 1]:  # rather end where a block ends
            stop = next((e for e in reversed(fits) if block[e] != block[e - 1]), stop)
        cuts = [start, *(e for e in range(start + 1, stop) if by_block and block[e] != block[e - 1]), stop]
        panels.append(list(pairwise(cuts)))
        start = stop
    return panels
