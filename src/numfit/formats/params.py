"""What a format stores besides codes, and the runs of rows in which tensors are worked on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from numfit.formats.format import Format
from numfit.formats.grid import Grid

CHUNK = 1 << 20  # weights worked on at a time


@dataclass(frozen=True)
class Params:
    """What a format stores besides codes, in fp32 and integers; R rows of K weights.

    Attributes:
        scale: stored part [R, blocks], or [1, 1] for one scale per tensor.
        parent: [R, 1] or [1, 1], or None.
        member: uint8 [R, units], or [1, 1] for one member per tensor; None for families of one.
        zero: [R, blocks] or [1, 1] integers as fp32, or None.
        palette: int64 [k] candidates kept, or None.
        levels: of each row [R, 2**bits], fp16 numbers in ascending order; None where the format knows them.
    """

    scale: Tensor
    parent: Tensor | None = None
    member: Tensor | None = None
    zero: Tensor | None = None
    palette: Tensor | None = None
    levels: Tensor | None = None

    def effective_scale(self) -> Tensor:
        """scale · parent, rounded once to fp32: the first operation of decoding."""
        return self.scale if self.parent is None else self.scale * self.parent

    def to(self, device: torch.device) -> Params:
        """The same on another device."""
        held = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **held)


def family(fmt: Format, params: Params) -> tuple[Grid, ...]:
    """The members that `params.member` indexes."""
    if params.palette is None:
        return fmt.members
    return tuple(fmt.members[i] for i in params.palette.tolist())


def row_chunks(rows: int, row: int, budget: int = CHUNK) -> Iterator[slice]:
    """Slices of rows of about `budget` weights."""
    step = max(1, budget // max(row, 1))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))
