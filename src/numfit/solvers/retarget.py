"""The exact answer to inputs that are off already: W* = W + β W D (H + λI)^-1 (QEP, arXiv 2504.09629).

For β = 1 and λ → 0, ‖Q X - W X̃‖² = ‖(Q - W*) X‖² + const, with D ∝ (X̃ - X) Xᵀ: every solver that takes W* instead of W
matches the full-precision output although its inputs come from quantized layers. With few tokens it overfits badly: β is to be
chosen on held-out text, and is known there in closed form.
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
    return (w.double() + beta * correction(w, h, cross, damp)).float()


def held_out_share(
    w: Tensor, learned: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], most: float, damp: float = DAMP
) -> float:
    """The β, from 0 to `most`, with which W + β C, C = W D (H + λI)^-1, misses the full-precision output least on other tokens.

    There ‖(W + βC) X − W X̃‖² = β² tr(C H Cᵀ) − 2 β tr(C (W D)ᵀ) + const.

    Args:
        w: [N, K]; learned: (H, D) that C is made of; held: (H, D) of the held-out tokens, each in its own mean over tokens.
    """
    moved = correction(w, *learned, damp)
    h, cross = (t.double() for t in held)
    gain, cost = float((moved * (w.double() @ cross)).sum()), float((moved * (moved @ h)).sum())
    return min(max(gain / cost, 0.0), most) if cost > 0 else 0.0


def correction(w: Tensor, h: Tensor, cross: Tensor, damp: float = DAMP) -> Tensor:
    """C = W D (H + λI)^-1 in fp64; arguments and errors as those of `retarget`."""
    on = alive(h)
    a = h.to(torch.float64, copy=True)
    mean = float(a.diagonal()[on].mean()) if bool(on.any()) else 1.0
    a.diagonal().add_(damp * mean).masked_fill_(~on, mean)
    lower, info = torch.linalg.cholesky_ex(a)
    if int(info) != 0:
        raise OptionError(f"the second moment of the inputs is singular even with a damping of {damp:g}: use a larger one")
    return torch.cholesky_solve((w.double() @ cross.double()).T, lower).T
