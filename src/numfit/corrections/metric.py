"""How errors of a weight are weighed: by what is known of the inputs that will meet it.

A metric is None (all input channels alike), a vector [K] (mean squares of the channels, or any importance), or the second
moment H [K, K] = E[x·xᵀ], up to a factor. The loss of an error E [N, K] is tr(E·H·Eᵀ), proportional to the mean square of E·x.
"""

from __future__ import annotations

from torch import Tensor

from numfit.errors import OptionError

Metric = Tensor | None


def check(error: Tensor, metric: Metric) -> None:
    """Refuse a metric that does not fit the error, and numbers that are none.

    Raises:
        OptionError: it does not.
    """
    if error.dim() != 2 or not error.is_floating_point():
        raise OptionError(f"corrections need an error [N, K] of floats, not {error.dtype} {tuple(error.shape)}")
    k = error.shape[1]
    if metric is not None and tuple(metric.shape) not in ((k,), (k, k)):
        raise OptionError(
            f"the inputs of a weight {tuple(error.shape)} are described by a vector [{k}] or a matrix [{k}, {k}], "
            f"not by one of shape {tuple(metric.shape)}"
        )
    for what, values in (("the error", error), ("what is known of the inputs", metric)):
        if values is not None and values.numel() and not bool(values.isfinite().all()):
            raise OptionError(f"{what} holds NaN or Inf; calibrate on another text, or leave this correction away")


def times(error: Tensor, metric: Metric) -> Tensor:
    """E·H [N, K], in the type of `error`."""
    if metric is None:
        return error
    metric = metric.to(error)
    return error * metric if metric.dim() == 1 else error @ metric


def loss(error: Tensor, metric: Metric = None) -> float:
    """tr(E·H·Eᵀ), computed in fp64."""
    check(error, metric)
    error = error.double()
    return float((times(error, metric) * error).sum())
