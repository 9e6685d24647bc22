"""D²Quant's dual scales: a scale of each column (input channel) beside those of the blocks, for free where it can be folded.

    Ŵ_ij = c_j · Q_ij

In a gated feed-forward block the inputs of `down_proj` are act(gate)·up, so multiplying row j of `up_proj` by c_j and storing
W_down / c changes nothing and costs nothing. It has to be done before `up_proj` is quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.corrections.metric import check
from numfit.errors import OptionError
from numfit.formats import Format, decode, encode, fit


def column_scale(w: Tensor, fmt: Format, importance: Tensor | None = None, rounds: int = 15) -> Tensor:
    """Scales of the columns: alternately W / c is quantized and each c_j solved for, c_j = ⟨W_j, Q_j⟩ / ⟨Q_j, Q_j⟩.

    Two starts are tried, all ones and the columns' mean magnitudes; the round of least error Σ h_j·(W − c·Q)² stays, so the
    result is never worse than no scales.

    Args:
        w: [N, K], of `down_proj`.
        fmt: without side terms: those of a rotation would not leave columns alone.
        importance: mean squares of the inputs [K], or None.

    Returns:
        c [K], fp32, positive, of geometric mean 1. Multiply the rows of `up_proj` by it, and store w / c.

    Raises:
        OptionError: shapes that do not fit, no round, a format with side terms.
    """
    check(w, importance)
    if rounds < 1:
        raise OptionError(f"at least one round is needed, not {rounds}")
    if fmt.side:
        raise OptionError(f"column scales are for formats without side terms; use {fmt.base.name} instead of {fmt.name}")
    w = w.float()
    h = torch.ones(w.shape[1], device=w.device) if importance is None else importance.float()
    magnitude = w.abs().mean(0)
    best, best_error = torch.ones_like(h), torch.inf
    for start in (torch.ones_like(h), _normal(magnitude)):
        c = start
        for _ in range(rounds):
            q = _quantized(fmt, w / c, h * c.square())
            error = float((h * (w - c * q).square().sum(0)).double().sum())
            if error < best_error:
                best, best_error = c, error
            square = q.square().sum(0)
            solved = (w * q).sum(0) / square
            c = _normal(torch.where((square > 0) & (solved > 0), solved, c))
    return best


def _quantized(fmt: Format, w: Tensor, importance: Tensor) -> Tensor:
    params = fit(fmt, w, importance)
    return decode(fmt, encode(fmt, w, params), params)


def _normal(c: Tensor) -> Tensor:
    """Scales of geometric mean 1, none of them more than 2**10 away from it; columns of zeros get 1."""
    alive = c > 0
    if not bool(alive.any()):
        return torch.ones_like(c)
    log = torch.where(alive, c, torch.ones_like(c)).log2()
    mean = log[alive].mean()
    return torch.where(alive, (log - mean).clamp(-10, 10), torch.zeros_like(log)).exp2()
