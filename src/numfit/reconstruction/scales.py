"""Trainable scales that are always what the file can hold.

Each block's scale is `multiplier · start`, rounded to its stored form at every step; gradients pass straight through the
rounding to the multiplier. So what learned rounding measures is what will be saved, for fp16 scales and for 6-bit scales
under a row's parent alike. Scales of a whole power of two (e8m0) move only when the multiplier comes near √2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.formats.scale import PARENT_MIN, to_stored


class Scales:
    """Multipliers of one tensor's scales, and of its row parents if asked, moved by Adam.

    Args:
        fmt, params: the start; kept as the reference of the multipliers.
        span: least and largest multiplier of the start scale.
        parents: whether fp16 row parents move too (the stored parts follow them).
    """

    def __init__(self, fmt: Format, params: Params, span: tuple[float, float], parents: bool = False) -> None:
        self.fmt, self.start, self.span = fmt, params, span
        self.effective0 = params.effective_scale()
        self.multiplier = torch.ones_like(self.effective0)
        self.parents = parents and fmt.scale.parent == "row"
        self.of_parent = torch.ones_like(params.parent) if self.parents and params.parent is not None else None
        self.adam = Adam(self.multiplier)
        self.adam_parent = None if self.of_parent is None else Adam(self.of_parent)
        self.params = params
        self.effective = self.effective0

    def step(self, gradient: Tensor, lr: float) -> None:
        """Move along −gradient, that of the loss by the effective scales [R, blocks] (or [1, 1]); lr in parts of the scale."""
        if not self.fmt.scaled:
            return  # its levels hold the scale of a row
        relative = gradient * self.effective0
        if self.of_parent is not None and self.adam_parent is not None:
            self.of_parent -= self.adam_parent.step(relative.sum(1, keepdim=True), lr)
            self.of_parent.clamp_(*self.span)
        self.multiplier -= self.adam.step(relative, lr)
        parent = torch.ones_like(self.multiplier) if self.of_parent is None else self.of_parent
        self.multiplier = self.multiplier.clamp(self.span[0] / parent, self.span[1] / parent)  # the span is of the product
        self.round()

    def round(self) -> None:
        """Put the multipliers into stored form; blocks that did not move keep the start's words."""
        start = self.start
        wanted = self.effective0 * self.multiplier
        if start.parent is None:
            parent, stored = None, to_stored(self.fmt.scale, wanted, None, self.fmt.spare)
        else:
            parent = start.parent
            if self.of_parent is not None:
                parent = (parent * self.of_parent).clamp(PARENT_MIN, 65504.0).half().float()
                wanted = wanted * self.of_parent
            stored = to_stored(self.fmt.scale, wanted, parent, self.fmt.spare)
        if self.of_parent is None:
            stored = torch.where(self.multiplier == 1, start.scale, stored)
        self.params = replace(start, scale=stored, parent=parent)
        self.effective = self.params.effective_scale()


class Adam:
    """Adam (1412.6980) for one tensor without weight decay; `step` returns what to subtract."""

    def __init__(self, like: Tensor, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.betas, self.count = betas, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, gradient: Tensor, lr: float) -> Tensor:
        self.count += 1
        first, second = self.betas
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (self.square / (1 - second**self.count)).sqrt_()
        # a gradient that was zero so far moves nothing
        return torch.where(root > 0, self.mean / root, torch.zeros_like(root)) * (lr / (1 - first**self.count))
