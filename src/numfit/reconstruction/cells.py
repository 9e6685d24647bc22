"""Cells: the two neighbouring levels between which learned rounding decides, for every weight of a tensor.

A code stands for a level of the member's grid, and the levels of a grid are ranked. In units of the local gap a weight lies
at `rank + position`. The cell of the start code is position ∈ [−½, ½]; a weight outside it (its code was moved by error
compensation, or it is clipped) is put on the cell's edge, so that the start is reproduced exactly whatever solver made it.
A perturbation V ∈ [−½, ½] of the position can then reach one other level only: the neighbour on the weight's side. So each
weight keeps two levels and the signed distance to the threshold between them, and the grid is never looked at again: the
same two numbers serve uniform and tabulated grids, families, shared bits (AMS) and zero points (AdaRound, 2004.10568;
SignRound, 2309.05516, both for uniform grids).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import FormatError
from numfit.formats.codec import level_tables, member_per_weight
from numfit.formats.format import Format
from numfit.formats.grid import ranked
from numfit.formats.learned import per_column, row_tables
from numfit.formats.nearest import tables
from numfit.formats.params import Params, family, row_chunks

EDGE = 1e-3  # a start code's weight is at least this far (in gaps) inside its cell
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Cells:
    """Two levels per weight, and where between them the weight lies; all [N, K].

    Attributes:
        low, high: levels minus zero point, fp32: ŵ = scale · (low or high). Equal where the grid has one level.
        low_code, high_code: their codes, uint8.
        offset: distance above the threshold between them in gaps, fp32 in [−½, ½] and never 0: positive where the
            start code is the high one. V moves a weight across when `offset + V` changes sign.
    """

    low: Tensor
    high: Tensor
    low_code: Tensor
    high_code: Tensor
    offset: Tensor


def scaled(x: Tensor, values: Tensor, run: int) -> Tensor:
    """x [r, K] times one value per run of neighbours [r, runs] (or [1, 1] for all)."""
    runs = values.shape[-1]
    if runs > 1 and runs * run == x.shape[1]:
        return (x.view(len(x), runs, run) * values.unsqueeze(-1)).view(x.shape)
    return x * per_column(values, run, x.shape[1])


def run_sums(x: Tensor, run: int, runs: int) -> Tensor:
    """Sums over runs of `run` neighbours; the last may be short: [r, K] → [r, runs]."""
    if runs == 1:
        return x.sum(1, keepdim=True)
    missing = runs * run - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.view(len(x), runs, run).sum(-1)


def rows_of(values: Tensor, s: slice) -> Tensor:
    """Rows of a parameter, or all of one that the tensor shares."""
    return values if len(values) == 1 else values[s]


def rank_tables(fmt: Format, params: Params, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(levels [M, ranks], codes [M, ranks], rank of each code [M, 2**bits] or −1, number of ranks [M])."""
    if params.levels is not None:
        codes = row_tables(params.levels).codes
        return params.levels, codes, codes.long(), torch.full((len(codes),), codes.shape[1], device=device)
    grids = family(fmt, params)
    t = tables(grids, fmt.rounding, device)
    levels = t.levels.gather(1, t.codes.long())
    rank = torch.full((len(grids), 1 << fmt.bits), -1, dtype=torch.int64)
    for m, grid in enumerate(grids):
        by_level = {level: r for r, (level, _) in enumerate(ranked(grid))}
        for code, level in enumerate(grid.levels):
            if code not in grid.never:
                rank[m, code] = by_level.get(level + 0.0, -1)
    count = torch.tensor([len(ranked(g)) for g in grids], device=device)
    return levels, t.codes, rank.to(device), count


def cells(fmt: Format, codes: Tensor, params: Params, w: Tensor, trust: float = 1.0, name: str = "weight") -> Cells:
    """The cells of a start solution.

    Args:
        fmt: the base format.
        codes: uint8 [N, K], the start.
        params: its parameters; the scales are positive.
        w: what the codes stand for [N, K], fp32, in the coordinates of the codes.
        trust: how far towards the weight the position goes, in (0, 1]. 1 puts a weight that error compensation moved to the
            edge of its cell, so that the first steps may move it back; with less it must be pulled there.
        name: for error messages.

    Raises:
        FormatError: a code that no encoder emits.
    """
    n, k = codes.shape
    g = fmt.geometry(k)
    levels, by_rank, rank_of, count = rank_tables(fmt, params, codes.device)
    members = level_tables(fmt, params, codes.device)[1]
    ranks = levels.shape[1]
    out = Cells(torch.empty_like(w), torch.empty_like(w), torch.empty_like(codes), torch.empty_like(codes), torch.empty_like(w))
    effective = params.effective_scale()
    for s in row_chunks(n, k, _CHUNK):
        code = codes[s].long()
        member: Tensor | int = 0
        if members is not None:
            member = member_per_weight(fmt, rows_of(members, s).long(), k)
        rank = rank_of.flatten()[code + member * rank_of.shape[1]]  # [r, K]
        if bool((rank < 0).any()):
            bad = int(code[rank < 0][0])
            raise FormatError(f"'{name}' holds the code {bad}, which no encoder of {fmt.name} emits; solve it again")
        last = count[member] - 1 if isinstance(member, Tensor) else int(count[0]) - 1
        u = scaled(w[s], 1 / rows_of(effective, s), g.block)
        zero = 0.0
        if params.zero is not None:
            zero = per_column(rows_of(params.zero, s), g.block, k)  # type: ignore[assignment]
            u = u + zero
        row = member * ranks

        def level(r: Tensor) -> Tensor:
            return levels.flatten()[row + r]  # noqa: B023

        here = level(rank)
        up = (u > here) & (rank < last) | (rank == 0)
        other = torch.where(up, rank + 1, rank - 1).clamp_min(0)
        other = torch.minimum(other, torch.as_tensor(last))
        there = level(other)
        # how far the weight lies from its code towards the other level, in gaps; beyond the cell or behind counts as its edge
        toward = ((u - here) / (there - here)).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0).mul(trust).clamp_max(0.5 - EDGE)
        here, there = here - zero, there - zero
        mine, theirs = codes[s], by_rank.flatten()[row + other]
        out.low[s], out.high[s] = torch.where(up, here, there), torch.where(up, there, here)
        out.low_code[s], out.high_code[s] = torch.where(up, mine, theirs), torch.where(up, theirs, mine)
        out.offset[s] = torch.where(up, toward - 0.5, 0.5 - toward)
    return out
