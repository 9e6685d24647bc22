"""GPTQ (arXiv 2210.17323) over any format, with the terms of GPTAQ and ResComp (arXiv 2604.07955) as options.

Unlike the published code, inputs that are never on keep their weights, rounded to nearest: the objective does not see them,
a text other than the calibration's may. Parameters that need a finished row (a row's one scale, parents, a member or a
palette of the tensor) are fitted beforehand; those of blocks when the sweep reaches them, where the order allows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats.fit import fit, normalized_importance
from numfit.formats.params import Params
from numfit.solvers.linalg import alive
from numfit.solvers.order import Plan
from numfit.solvers.state import Problem, State, keep_better
from numfit.solvers.sweep import Terms, sweep


def gptq(problem: Problem, start: State) -> State:
    """Fit parameters, sweep, and keep rows that are better than those of `start`."""
    params = start.params if problem.importance is None else fit(problem.fmt, problem.w, sweep_importance(problem))
    return keep_better(problem.fmt, sweep_state(problem, params, refit=True), start)


def sweep_importance(problem: Problem) -> Tensor:
    """1 / U_ii² of each input, fp32 [K]: what an error costs once the columns that follow have made up for it.

    The loss of a sweep is Σ e² = Σ (w_i - q_i)² / U_ii², so this and not diag H is what parameters should be fitted under: on
    linears of SmolLM2-135M the loss is 0 to 7 % less than after a fit under diag H (uint2-g64, int3-g64, mant4-g64, fp4.25),
    which in turn is better for rounding to nearest.
    """
    plan, factor = problem.sweep_plan()
    out = torch.empty_like(factor.u[0])
    out[plan.order.to(out.device)] = factor.u.diagonal().reciprocal().square()
    return torch.where(alive(problem.h), out, torch.zeros_like(out))


def sweep_state(problem: Problem, params: Params, *, refit: bool) -> State:
    """Sweep once.

    Args:
        refit: let the plan fit blocks on its way; else parameters stay as they are (but for members of small units).
    """
    plan, factor = problem.sweep_plan()
    if not refit:
        plan = plan._replace(panels=tuple(tuple(s._replace(blocks=()) for s in panel) for panel in plan.panels))
    importance = None if problem.importance is None else normalized_importance(sweep_importance(problem))
    swept = sweep(problem.fmt, problem.w, factor.u, plan, params, importance=importance, terms=_terms(problem, plan, factor.u))
    return problem.state(swept.codes, swept.params)


def _terms(problem: Problem, plan: Plan, u: Tensor) -> Terms:
    """GPTAQ's P = α triu₁(D Uᵀ) U and ResComp's R = α triu₁((H + D) Uᵀ) U, in the order of the sweep."""
    o = problem.options
    if o.gptaq == 0 and o.rescomp == 0:
        return Terms()
    order = plan.order.to(u.device)
    d = torch.zeros_like(problem.h) if problem.cross is None else problem.cross
    d = d[order][:, order].float()
    p = r = None
    if o.gptaq > 0:
        p = o.gptaq * (torch.triu(d @ u.T, 1) @ u)
    if o.rescomp > 0:
        r = o.rescomp * (torch.triu((problem.h[order][:, order] + d) @ u.T, 1) @ u)
    return Terms(p, r)
