"""Perplexity, bits per byte and KL against a reference, measured on what was re-read from the files."""

from numfit.evaluation.measure import evaluate, evaluate_many
from numfit.evaluation.reference import Reference

__all__ = ["Reference", "evaluate", "evaluate_many"]
