"""Rounding single columns under fixed parameters, and fitting single blocks: what a sweep does to a format.

The operations of a column are those of formats/codec.py, in the same order and precision, so that a column rounded alone
gets the code that encoding the whole matrix would give it.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from numfit.formats.fitter import Fitter
from numfit.formats.format import Format
from numfit.formats.learned import nearest_scales, row_tables
from numfit.formats.nearest import tables
from numfit.formats.params import CHUNK, Params, family, row_chunks
from numfit.solvers.order import small_units


class Rounder:
    """Parameters of a matrix [N, K] that can be looked up, and changed, by block and unit.

    Attributes:
        thresholds: fp32 [M, ranks - 1], padded with +inf; codes uint8 [M, ranks]; levels fp32 [M, ranks], by rank.
        scale: effective, fp32 [N, blocks], or [1, 1] for all.
        stored: the stored part of it; zero the same shape or None.
        member: uint8 [N, units], or [1, 1] for all, or None for families of one.
        own: where levels are learned, every row is the member of its own number: int64 [N]; else None.
    """

    def __init__(self, fmt: Format, params: Params, k: int) -> None:
        self.fmt, self.params, self.geometry = fmt, params, fmt.geometry(k)
        device, levels = params.scale.device, params.levels
        t = tables(family(fmt, params), fmt.rounding, device) if levels is None else row_tables(levels)
        self.own = None if levels is None else torch.arange(len(t.levels), device=device)
        self.thresholds, self.codes = t.thresholds.contiguous(), t.codes.contiguous()
        self.levels = t.levels.gather(1, self.codes.long()).contiguous()
        self.scale = params.effective_scale().clone()
        self.stored = params.scale.clone()
        self.zero = None if params.zero is None else params.zero.clone()
        self.member = None if params.member is None else params.member.clone()

    def result(self) -> Params:
        """The parameters as they are now."""
        return replace(self.params, scale=self.stored, zero=self.zero, member=self.member)

    def part(self, rows: slice) -> Rounder:
        """The same of some rows of a matrix with learned levels, as a family with a member for each of them."""
        out = copy.copy(self)
        out.thresholds, out.codes = self.thresholds[rows], self.codes[rows]
        out.levels, out.scale = self.levels[rows], self.scale[rows]
        member = torch.arange(len(out.levels), dtype=torch.uint8, device=out.scale.device)
        out.own, out.member = None, member[:, None].repeat(1, self.geometry.units)
        return out

    def at(self, values: Tensor, index: int) -> Tensor:
        """Values of one block or unit: [N], or [1] for all."""
        return values[:, 0] if values.shape[1] == 1 else values[:, index]

    def column(self, w: Tensor, block: int, member: Tensor | int) -> tuple[Tensor, Tensor]:
        """Round a column.

        Args:
            w: fp32 [N].
            block: of the column; member: of each row [N], or one for all.

        Returns:
            (codes uint8 [N], values fp32 [N]).
        """
        scale = self.at(self.scale, block)
        u = w / scale
        if self.zero is not None:
            u = u + self.at(self.zero, block)
        if isinstance(member, int) or member.numel() == 1:
            m = int(member)
            rank = torch.bucketize(u, self.thresholds[m])
            code, level = self.codes[m][rank], self.levels[m][rank]
        else:
            index = member.long()
            rank = (u[:, None] > self.thresholds[index]).sum(1)
            code, level = self.codes[index, rank], self.levels[index, rank]
        if self.zero is not None:
            level = level - self.at(self.zero, block)
        return code, level * scale

    def members(self, unit: int) -> Tensor | int:
        """Members of one unit of all rows."""
        if self.own is not None:
            return self.own
        return 0 if self.member is None else self.at(self.member, unit)

    def range(self, block: int, member: Tensor | int) -> tuple[Tensor, Tensor]:
        """Least and largest value of each row in a block: [N] or [1] each."""
        index = member if isinstance(member, int) else member.long()
        low, high = self.levels[index, 0], self.levels[index, -1]  # padded with the largest
        if self.zero is not None:
            low, high = low - self.at(self.zero, block), high - self.at(self.zero, block)
        scale = self.at(self.scale, block)
        return (low * scale).view(-1), (high * scale).view(-1)

    def fit_block(self, block: int, w: Tensor, importance: Tensor | None, rule: str = "mse") -> None:
        """Fit the parameters of a block of all rows to w [N, n], its columns in their stored order, under parents, palettes and
        a tensor's one member as they are; importance [n] in units of its mean over the row;
        rule: how scales are found (formats/fit.py)."""
        fmt = self.fmt
        assert isinstance(fmt.block, int) and self.scale.shape[1] > block
        if self.params.levels is not None:
            parent, now = self.params.parent, self.stored[:, block : block + 1]
            stored = nearest_scales(fmt, w, importance, self.params.levels, now, parent)
            self.stored[:, block] = stored[:, 0]
            self.scale[:, block] = (stored if parent is None else stored * parent)[:, 0]
            return
        members = family(fmt, self.params)
        if fmt.unit == "tensor" and self.member is not None:
            members = (members[int(self.member)],)
        unit: int | str = min(int(fmt.unit), w.shape[1]) if small_units(fmt) else "block"
        home = fmt.member_home if len(members) > 1 else "plane"
        local = replace(fmt, members=members, palette=0, block=w.shape[1], unit=unit, member_home=home)
        fitter = Fitter(local, importance, rule, w.device, w.numel())
        g, parent = self.geometry, self.params.parent
        first = block * -(-g.block // g.unit)  # unit
        for s in row_chunks(w.shape[0], w.shape[1], CHUNK if fitter.native is None else w.numel()):
            above = parent if parent is None or len(parent) == 1 else parent[s]
            scale, member, zero = fitter.blocks(w[s], above, free=False)
            self.stored[s, block] = scale[:, 0]
            self.scale[s, block] = scale[:, 0] if above is None else scale[:, 0] * above[:, 0]
            if zero is not None and self.zero is not None:
                self.zero[s, block] = zero[:, 0]
            if member is not None and self.member is not None:
                self.member[s, first : first + member.shape[1]] = member
