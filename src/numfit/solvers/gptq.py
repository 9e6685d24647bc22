"""GPTQ (arXiv 2210.17323) over any format, with the terms of GPTAQ and ResComp (arXiv 2604.07955) as options.

Unlike the published code, inputs that are never on keep their weights, rounded to nearest: the objective does not see them,
a text other than the calibration's may. Parameters that need a finished row (a row's one scale, parents, a member or a
palette of the tensor) are fitted beforehand; those of blocks when the sweep reaches them, where the order allows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats.fit import normalized_importance
from numfit.formats.params import Params
from numfit.solvers.order import Plan
from numfit.solvers.state import Problem, State, keep_better
from numfit.solvers.sweep import Terms, sweep


def gptq(problem: Problem, start: State) -> State:
    """Sweep with the parameters of `start`, and keep rows that are better than those of `start`.

    Parameters are fitted under diag H, not under 1 / U_ii², of which the loss of a sweep is made: that lowers the loss of a
    linear by some per cent and makes the model worse (by KL), since U hangs on the weakest directions of H, which a text of
    finite length hardly shows.
    """
    return keep_better(problem.fmt, sweep_state(problem, start.params, refit=True), start)


def sweep_state(problem: Problem, params: Params, *, refit: bool) -> State:
    """Sweep once.

    Args:
        refit: let the plan fit blocks on its way; else parameters stay as they are (but for members of small units).
    """
    plan, factor = problem.sweep_plan()
    if not refit:
        plan = plan._replace(panels=tuple(tuple(s._replace(blocks=()) for s in panel) for panel in plan.panels))
    importance = None if problem.importance is None else normalized_importance(problem.importance)
    swept = sweep(
        problem.fmt, problem.w, factor.u, plan, params, importance=importance, scale_rule=problem.options.scale_rule,
        terms=_terms(problem, plan, factor.u),
    )  # fmt: skip
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
