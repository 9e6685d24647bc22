"""Codes that stay: only scales and what else is trainable move (the block step of decoupleQ, 2404.12759)."""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats.codec import level_tables, member_per_weight
from numfit.formats.format import Format
from numfit.formats.learned import per_column
from numfit.formats.params import Params, row_chunks
from numfit.reconstruction.cells import rows_of

_CHUNK = 1 << 18


class FixedRounding:
    """The levels that the codes stand for, minus zero points: fp32 [N, K]."""

    def __init__(self, fmt: Format, codes: Tensor, params: Params) -> None:
        self.codes = codes
        n, k = codes.shape
        levels, members = level_tables(fmt, params, codes.device)
        self.level = torch.empty((n, k), dtype=torch.float32, device=codes.device)
        for s in row_chunks(n, k, _CHUNK):
            index = codes[s].long()
            if members is not None:
                index = index + (member_per_weight(fmt, rows_of(members, s).long(), k) << fmt.bits)
            self.level[s] = levels.flatten()[index]
            if params.zero is not None:
                self.level[s] -= per_column(rows_of(params.zero, s), fmt.geometry(k).block, k)

    def values(self, s: slice) -> Tensor:
        return self.level[s]

    def step(self, s: slice, gradient: Tensor, scale: Tensor, run: int, progress: float) -> None:
        """Nothing to move."""

    def hard(self) -> Tensor:
        return self.codes
