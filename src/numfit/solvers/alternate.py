"""decoupleQ (arXiv 2404.12759): codes for fixed parameters and parameters for fixed codes, in turn, each row only if better."""

from __future__ import annotations

from numfit.solvers.gptq import sweep_state
from numfit.solvers.refit import refit
from numfit.solvers.state import Problem, State, keep_better


def alternate(problem: Problem, state: State) -> State:
    """Rounds of refitting and sweeping again, and a last refit."""
    for _ in range(problem.options.alternations):
        state = refit(problem, state)
        state = keep_better(problem.fmt, sweep_state(problem, state.params, refit=False), state)
    return refit(problem, state)
