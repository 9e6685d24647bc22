"""Corrections: what is added to a quantized layer to give back a part of what rounding took.

Pure functions of the error E = W − Ŵ [N, K] and of what is known about the inputs x: their second moment H [K, K], its
diagonal, their mean. What they return is stored as side terms of a format (low-rank, sparse) or in a bias; the bits are
counted where it is stored. Where the format rotates its inputs, E and H are those of the rotated ones.
"""

from numfit.corrections.bias import bias_shift, fold_shift, mean_shift
from numfit.corrections.lowrank import alternate, low_rank, lqer_metric, shared_low_rank
from numfit.corrections.metric import loss
from numfit.corrections.outliers import outliers

__all__ = [
    "alternate",
    "bias_shift",
    "fold_shift",
    "loss",
    "low_rank",
    "lqer_metric",
    "mean_shift",
    "outliers",
    "shared_low_rank",
]
