"""Sparse corrections: which few weights of each row to put right, so that the loss falls most.

With a diagonal metric the best choice is the largest h·E², and its correction E itself. With a full H a correction also makes
good for its neighbours: weights are chosen one by one by what they alone would gain, (E·H)²/H_kk, and the values are then
solved for together (orthogonal matching pursuit). H is damped as for GPTQ: along what the text hardly shows, values without
bounds would look free. SqueezeLLM and SpQR keep such weights apart; here every row has the same
number of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.corrections.metric import Metric, check, times
from numfit.errors import OptionError
from numfit.formats.terms import largest

DAMPING = 0.01


def outliers(error: Tensor, count: int, metric: Metric = None, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """`count` corrections of each row.

    Args:
        error: W − Ŵ [N, K].
        metric: see metric.py.
        damping: added to the diagonal of a metric [K, K], times its mean.

    Returns:
        columns int64 [N, count], ascending, and values fp32 [N, count] to add there: `sparse_index` and `sparse_value`.

    Raises:
        OptionError: shapes that do not fit, NaN or Inf, more corrections than weights.
    """
    check(error, metric)
    if not 1 <= count <= error.shape[1]:
        raise OptionError(f"rows of {error.shape[1]} weights can have 1 to {error.shape[1]} corrections, not {count}")
    diagonal = metric.diagonal() if metric is not None and metric.dim() == 2 else metric
    index = largest(error, count, diagonal)
    value = error.gather(1, index)
    if metric is None or metric.dim() == 1:
        return index, value.float()
    h = metric.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    e = error.double()
    target = times(e, h)  # [N, K]
    plain = _solved(index, target, h)
    pursued = _pursue(target, h, count)
    chased = _solved(pursued, target, h)
    gains = [(v * target.gather(1, i)).sum(1) for i, v in ((index, plain), (pursued, chased))]  # of the loss, at the optimum
    better = (gains[1] > gains[0])[:, None]
    return torch.where(better, pursued, index), torch.where(better, chased, plain).float()


def _pursue(target: Tensor, h: Tensor, count: int) -> Tensor:
    """Columns chosen one by one: int64 [N, count], ascending."""
    rest, diagonal = target.clone(), h.diagonal().clamp_min(float(h.diagonal().max()) * 1e-12 + 1e-300)
    chosen = torch.empty((len(target), count), dtype=torch.int64, device=target.device)
    taken = torch.zeros_like(target, dtype=torch.bool)
    for step in range(count):
        best = (rest.square() / diagonal).masked_fill_(taken, -1.0).argmax(1, keepdim=True)
        taken.scatter_(1, best, True)
        chosen[:, step] = best[:, 0]
        rest -= rest.gather(1, best) / diagonal[best] * h[best[:, 0]]
    return chosen.sort(1).values


def _solved(index: Tensor, target: Tensor, h: Tensor) -> Tensor:
    """Values of the given columns that lower the loss most: H_ss·s = (E·H)_s for each row, fp64 [N, count]."""
    out = []
    for part, goal in zip(index.split(256), target.split(256), strict=True):
        inner = h[part[:, :, None], part[:, None, :]]  # [r, count, count]
        ridge = 1e-9 * inner.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        inner = inner + ridge[:, None, None] * torch.eye(part.shape[1], dtype=h.dtype, device=h.device)
        out.append(torch.linalg.solve(inner, goal.gather(1, part).unsqueeze(-1)).squeeze(-1))
    return torch.cat(out) if out else target.new_empty(index.shape)
