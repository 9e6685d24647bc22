"""Rounding to nearest: parameters of least (weighted) squared error, then the nearest code of each weight."""

from __future__ import annotations

from numfit.formats.codec import encode
from numfit.formats.fit import fit
from numfit.solvers.state import Problem, State


def nearest(problem: Problem) -> State:
    """Round a weight; the start of every chain, and the bar that every other solver must pass."""
    params = fit(problem.fmt, problem.w, problem.importance, problem.options.scale_rule)
    return problem.state(encode(problem.fmt, problem.w, params), params)
