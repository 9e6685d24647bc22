"""Block descent: scale, zero point, member and codes of one block at a time become better ones given all other blocks.

With E = Q - W and R = E H, the loss as a function of block b alone is the one of a small layer whose second moment is H_bb
and whose weights are t = q_b - R_b H_bb^-1: what GPTQ does for a layer (fit under 1/U_ii², sweep) does here for a block,
with all that the rest of the row already got wrong in the target. A row takes the result where its loss falls, by

    Δ = d H_bb dᵀ + 2 R_b dᵀ,   d = q'_b - q_b

so no pass makes a row worse. This is decoupleQ's alternation (arXiv 2404.12759) by blocks instead of by kinds of unknowns,
and the one step here that chooses members of families (M-ANT) again after the first fit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from numfit.formats.codec import decode
from numfit.formats.fit import normalized_importance
from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.solvers.linalg import alive, cholesky_inverse_upper
from numfit.solvers.order import make_plan, small_units
from numfit.solvers.rounding import Rounder
from numfit.solvers.state import Problem, State, keep_better
from numfit.solvers.sweep import sweep


def blocks(problem: Problem, state: State) -> State:
    """`alternations` passes over the blocks of all rows, fewer where nothing gets better."""
    for _ in range(problem.options.alternations):
        new = _one_pass(problem, state)
        if not float(new.losses.sum()) < float(state.losses.sum()):
            break
        state = new
    return state


def _one_pass(problem: Problem, state: State) -> State:
    fmt, w, h, k = problem.fmt, problem.w, problem.h, problem.w.shape[1]
    g = fmt.geometry(k)
    rounder = Rounder(fmt, state.params, k)
    codes, q = state.codes.clone(), decode(fmt, state.codes, state.params)
    e = q - w
    units = -(-g.block // g.unit)
    for b in range(g.blocks):
        s = slice(b * g.block, min((b + 1) * g.block, k))
        hb = h[s, s].contiguous()
        if not bool(alive(hb).any()):
            continue
        gradient = e @ h[:, s]
        local, params = _alone(fmt, rounder, b, s.stop - s.start, units)
        plan = make_plan(local, hb.diagonal(), "static", False, problem.options.panel)
        u = cholesky_inverse_upper(hb[plan.order][:, plan.order], problem.options.damp).u
        inverse = torch.empty_like(u)  # U with its columns as stored
        inverse[:, plan.order] = u
        target = q[:, s] - (gradient @ inverse.T) @ inverse
        target = torch.where(alive(hb), target, w[:, s])  # the loss does not see the others
        importance = torch.empty_like(u[0])
        importance[plan.order] = u.diagonal().reciprocal().square()
        own = Rounder(local, params, s.stop - s.start)
        own.fit_block(0, target, normalized_importance(importance * alive(hb)))
        swept = sweep(local, target, u, plan, own.result())
        values = decode(local, swept.codes, swept.params)
        d = values - q[:, s]
        change = ((d @ hb) * d).sum(1, dtype=torch.float64) + 2 * (d * gradient).sum(1, dtype=torch.float64)
        better = change < 0
        _take(rounder, better, swept.params, b, units)
        codes[:, s] = torch.where(better[:, None], swept.codes, codes[:, s])
        q[:, s] = torch.where(better[:, None], values, q[:, s])
        torch.sub(q[:, s], w[:, s], out=e[:, s])
    return keep_better(fmt, problem.state(codes, rounder.result()), state)


def _alone(fmt: Format, rounder: Rounder, b: int, n: int, units: int) -> tuple[Format, Params]:
    """A block of n columns as a matrix of its own."""
    unit = min(int(fmt.unit), n) if small_units(fmt) else fmt.unit
    local = replace(fmt, block=n, unit=unit)
    member = rounder.member
    if member is not None and fmt.unit != "tensor":
        member = member[:, b * units : b * units + local.geometry(n).units].contiguous()
    zero = None if rounder.zero is None else rounder.zero[:, b : b + 1].contiguous()
    return local, replace(rounder.params, scale=rounder.stored[:, b : b + 1].contiguous(), member=member, zero=zero)


def _take(rounder: Rounder, better: Tensor, params: Params, b: int, units: int) -> None:
    """Write the parameters of a block into the rows that got better."""
    rounder.stored[better, b] = params.scale[better, 0]
    rounder.scale[better, b] = params.effective_scale()[better, 0]
    if params.zero is not None and rounder.zero is not None:
        rounder.zero[better, b] = params.zero[better, 0]
    if params.member is not None and rounder.member is not None and rounder.fmt.unit != "tensor":
        at = slice(b * units, b * units + params.member.shape[1])
        rounder.member[:, at] = torch.where(better[:, None], params.member, rounder.member[:, at])
