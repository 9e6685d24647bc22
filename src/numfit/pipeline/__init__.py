"""The one walk over a model: plan what becomes of every tensor, then do it."""

from numfit.pipeline.planning import Plan, PlannedTensor
from numfit.pipeline.prepare import plan
from numfit.pipeline.walk import quantize

__all__ = ["Plan", "PlannedTensor", "plan", "quantize"]
