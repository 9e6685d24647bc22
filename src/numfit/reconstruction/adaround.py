"""AdaRound: soft rounding between two neighbouring levels (2004.10568), hardened step by step (TesseraQ, 2410.19103).

ŵ = scale · (low + (high − low)·h(v)) with the stretched sigmoid h(v) = clip(1.2·σ(v) − 0.1, 0, 1), moved by Adam. Instead of
a regulariser that pushes all h to 0 or 1 together, a growing share of the weights (those that are most decided) is rounded
for good as the schedule goes on, and the rest make up for it: quickly at first, ever more slowly towards nine tenths of the
schedule, where the last are rounded; the end tunes scales alone. On correlated inputs this finds what signed steps do not:
soft weights settle along the strong directions first and are rounded along the weak ones. Costs some passes and three more
numbers a weight than SignRound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.reconstruction.cells import Cells, scaled

ZETA, GAMMA = 1.1, -0.1
HARD_AT = 0.9  # share of the schedule after which every weight is rounded
ROUNDS = 50
_SAMPLE = 1 << 16  # weights from which a quantile is read


class SoftRounding:
    """Logits v of one tensor, and which of them are decided for good."""

    def __init__(self, cells: Cells, lr: float) -> None:
        self.cells, self.lr = cells, lr
        h = (cells.offset + 0.5).clamp(0.01, 0.99)
        self.v = torch.logit((h - GAMMA) / (ZETA - GAMMA))
        self.mean, self.square = torch.zeros_like(self.v), torch.zeros_like(self.v)
        self.free = torch.ones_like(self.v)  # 0 where decided for good, else 1
        self.count, self.round = 0, 0

    def _h(self, s: slice) -> Tensor:
        return (torch.sigmoid(self.v[s]) * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)

    def values(self, s: slice) -> Tensor:
        """Soft levels minus zero of rows `s`, those of decided weights exact: [r, K]."""
        h = torch.lerp(self.v[s].sign().clamp_min_(0.0), self._h(s), self.free[s])
        return torch.lerp(self.cells.low[s], self.cells.high[s], h)

    def step(self, s: slice, gradient: Tensor, scale: Tensor, run: int, progress: float) -> None:
        """Move rows `s`: gradient of the loss by ŵ [r, K] (overwritten), their effective scales, progress in [0, 1)."""
        if s.start == 0:
            self.count += 1
            self._harden(progress)
        sigmoid = torch.sigmoid(self.v[s])
        gradient.mul_(self.cells.high[s] - self.cells.low[s]).mul_(sigmoid).mul_(1 - sigmoid)
        g = scaled(gradient, scale, run)
        mean = self.mean[s].lerp_(g, 0.1)
        square = self.square[s].mul_(0.95).addcmul_(g, g, value=0.05)
        root = (square * (1 / (1 - 0.95**self.count))).sqrt_().add_(1e-30)
        move = (mean / root).mul_(self.free[s])
        self.v[s].sub_(move, alpha=self.lr * (1 - progress) / (1 - 0.9**self.count))

    def _harden(self, progress: float) -> None:
        """At each of ROUNDS steps of the schedule, decide the most decided weights: a share of 1 − (1 − t)²."""
        due = min(ROUNDS, int(progress / HARD_AT * ROUNDS))
        if due <= self.round:
            return
        self.round = due
        certainty = self.v.abs()
        if due == ROUNDS:
            self.free.fill_(0.0)
            return
        flat = certainty.flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)]
        self.free = (certainty < torch.quantile(sample, (1 - due / ROUNDS) ** 2)).float()

    def hard(self) -> Tensor:
        """Codes as they stand, uint8 [N, K]."""
        return torch.where(self.v > 0, self.cells.high_code, self.cells.low_code)
