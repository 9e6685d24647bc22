"""The second step of PoTPTQ (arXiv 2507.11959), in closed form instead of by gradient descent.

With exponents as they are, the output is linear in the scales' relative changes γ of a row: (B H Bᵀ + ρ m I) γ = B H (w -
ŵ)ᵀ, where B holds the row's dequantized blocks and m the mean of diag B H Bᵀ. Then s ← s (1 + γ), weights are rounded to
nearest again, and a row is kept if its loss fell.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from numfit.formats.codec import encode
from numfit.formats.params import Params
from numfit.formats.scale import to_stored
from numfit.solvers.refit import normal_equations
from numfit.solvers.state import Problem, State, keep_better

RHO = 1e-3


def pot(problem: Problem, state: State) -> State:
    """`alternations` rounds, fewer where nothing gets better."""
    fmt = problem.fmt
    for _ in range(problem.options.alternations):
        params = _scaled(problem, state)
        new = keep_better(fmt, problem.state(encode(fmt, problem.w, params), params), state)
        if float(new.losses.sum()) >= float(state.losses.sum()):
            break
        state = new
    return state


def _scaled(problem: Problem, state: State) -> Params:
    """s (1 + γ), stored."""
    fmt, params = problem.fmt, state.params
    effective = params.effective_scale().double()
    wanted: list[Tensor] = []
    total_a = total_b = torch.zeros((1, 1), dtype=torch.float64, device=effective.device)
    for rows, grams in normal_equations(problem, state):
        s = effective if fmt.block == "tensor" else effective[rows]  # [R, G]
        a = grams.aa * s[:, :, None] * s[:, None, :]
        b = s * grams.ar - a.sum(2)
        if fmt.block == "tensor":
            total_a, total_b = total_a + a.sum(0), total_b + b.sum(0)
            continue
        wanted.append(s * (1 + _relative(a, b)))
    if fmt.block == "tensor":
        wanted = [effective * (1 + _relative(total_a[None], total_b))]
    stored = to_stored(fmt.scale, torch.cat(wanted).float(), params.parent, fmt.spare)
    return replace(params, scale=stored)


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """γ [R, G]; zero where the equations have no solution."""
    diagonal = a.diagonal(dim1=1, dim2=2)
    ridge = (RHO * diagonal.mean(1, keepdim=True) + 1e-300).expand_as(diagonal)
    lower, info = torch.linalg.cholesky_ex(a + torch.diag_embed(ridge))
    x = torch.cholesky_solve(b[..., None], lower)[..., 0]
    good = (info == 0)[:, None] & torch.isfinite(x)
    return torch.where(good, x, torch.zeros_like(x))
