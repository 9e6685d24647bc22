"""The exact answer to inputs that are off already: W* = W + β W D (H + λI)^-1 (QEP, arXiv 2504.09629).

For β = 1 and λ → 0, ‖Q X - W X̃‖² = ‖(Q - W*) X‖² + const, with D ∝ (X̃ - X) Xᵀ: every solver that takes W* instead of W
matches the full-precision output although its inputs come from quantized layers. With few tokens it overfits badly: choose β
on held-out text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.solvers.linalg import alive

DAMP = 0.05  # λ over the mean of diag H


def retarget(w: Tensor, h: Tensor, cross: Tensor, beta: float, damp: float = DAMP) -> Tensor:
    """W* in fp32.

    Args:
        w: [N, K]; h: [K, K]; cross: D [K, K] in the units of h.
        beta: 0 (W itself) to 1.
        damp: λ in units of the mean of diag H.

    Raises:
        OptionError: H + λI is singular.
    """
    on = alive(h)
    a = h.to(torch.float64, copy=True)
    mean = float(a.diagonal()[on].mean()) if bool(on.any()) else 1.0
    a.diagonal().add_(damp * mean).masked_fill_(~on, mean)
    lower, info = torch.linalg.cholesky_ex(a)
    if int(info) != 0:
        raise OptionError(f"the second moment of the inputs is singular even with a damping of {damp:g}: use a larger one")
    moved = torch.cholesky_solve((w.double() @ cross.double()).T, lower).T
    return (w.double() + beta * moved).float()
