"""Solvers: one linear's weights and input statistics → codes and parameters, over any format."""

from numfit.solvers.options import SolverOptions
from numfit.solvers.solve import solve
from numfit.solvers.state import Solution

__all__ = ["Solution", "SolverOptions", "solve"]
