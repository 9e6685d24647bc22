"""Factors of second moments: the one inverse that compensation needs, with damping where it does not exist."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from numfit.errors import OptionError

LADDER = (1.0, 10.0, 100.0, 1e3, 1e4)  # multiples of the damping that are tried


class Factor(NamedTuple):
    """Upper-triangular U with UᵀU = (H + λI)^-1."""

    u: Tensor  # fp32 [K, K]
    damp: float  # λ over the mean of diag H
    notes: tuple[str, ...]


def check_moment(h: Tensor, k: int) -> None:
    """Refuse what is not the second moment of K inputs.

    Raises:
        OptionError: another shape, NaN or Inf, or a negative diagonal.
    """
    if tuple(h.shape) != (k, k):
        raise OptionError(f"the second moment of {k} inputs is {k} × {k}, not {' × '.join(map(str, h.shape))}")
    if not bool(torch.isfinite(h).all()):
        raise OptionError(
            "the second moment of the inputs holds NaN or Inf, so some activations were not finite; "
            "calibrate in fp32, or round this tensor with 'nearest'"
        )
    if bool((h.diagonal() < 0).any()):
        raise OptionError("the second moment of the inputs has a negative diagonal, so it is no second moment")


def alive(h: Tensor) -> Tensor:
    """Inputs that were ever non-zero: bool [K]."""
    return h.diagonal() > 0


def solve_rows(a: Tensor, b: Tensor, fallback: Tensor) -> Tensor:
    """x of a x = b for each row: a [R, G, G], b [R, G], fp64; the fallback where a is singular."""
    diagonal = a.diagonal(dim1=1, dim2=2)
    ridge = 1e-9 * diagonal.mean(1, keepdim=True) + 1e-300
    lower, info = torch.linalg.cholesky_ex(a + torch.diag_embed(ridge.expand_as(diagonal)))
    x = torch.cholesky_solve(b[..., None], lower)[..., 0]
    good = (info == 0) & torch.isfinite(x).all(1)
    return torch.where(good[:, None], x, fallback)


def cholesky_inverse_upper(h: Tensor, damp: float) -> Factor:
    """U of H + λI, λ = damp · mean(diag H).

    Inputs that are never on (a zero on the diagonal) stand alone: they get the mean diagonal, so that nothing is passed on from
    them or to them. Where fp32 fails, fp64 is tried, then ten times the damping, and so on.

    With J the reversal of the inputs and J H J = L Lᵀ, U = J L^-1 J: one factorization and one triangular inverse.

    Raises:
        OptionError: no damping of the ladder makes H positive definite.
    """
    k = len(h)
    diagonal = h.diagonal().double()
    on = diagonal > 0
    mean = float(diagonal[on].mean()) if bool(on.any()) else 1.0
    if mean < 1e-30:  # units in which the squares of fp32 do not vanish
        return cholesky_inverse_upper(h.double() / mean if bool(on.any()) else h.double(), damp)
    eye = torch.eye(k, dtype=torch.float32, device=h.device)
    rungs = [damp * factor for factor in LADDER] if damp > 0 else [0.0, *(1e-4 * factor for factor in LADDER)]
    for rung in rungs:
        for dtype in (torch.float32, torch.float64):
            a = (h / mean).to(dtype)  # a new tensor
            a.diagonal().add_(rung).masked_fill_(~on, 1.0)
            lower, info = torch.linalg.cholesky_ex(a.flip(0, 1))
            if int(info) != 0:
                continue
            inverse = torch.linalg.solve_triangular(lower, eye.to(dtype), upper=False)
            u = (inverse.flip(0, 1) / mean**0.5).float().contiguous()
            if bool(torch.isfinite(u).all()) and bool((u.diagonal() > 0).all()):
                notes = () if rung == rungs[0] else (f"singular second moment: damping raised from {damp:g} to {rung:g}",)
                return Factor(u, rung, notes)
    raise OptionError(
        f"the second moment of the inputs is not positive semidefinite: even a damping of {rungs[-1]:g} times its mean "
        "diagonal does not make it invertible; calibrate again, or round this tensor with 'nearest'"
    )


def row_losses(e: Tensor, h: Tensor) -> Tensor:
    """Diagonal of E H Eᵀ: fp64 [N], for errors e [N, K] fp32 and H [K, K] fp32."""
    step = max(1, (1 << 22) // max(1, e.shape[1]))
    parts = [((e[i : i + step] @ h) * e[i : i + step]).sum(1, dtype=torch.float64) for i in range(0, len(e), step)]
    return torch.cat(parts) if parts else e.new_empty(0, dtype=torch.float64)
