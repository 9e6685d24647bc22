"""Low-rank corrections: W ≈ Ŵ + B·A with a thin B [N, r] and a flat A [r, K].

The best B·A under the metric H minimises tr((E − BA)·H·(E − BA)ᵀ). With M·Mᵀ = H it comes from the singular vectors of E·M, and
one needs only the left ones: if U holds the leading r of them, then B·A = U·Uᵀ·E. So nothing is inverted, and a singular H does
no harm. U are the leading eigenvectors of E·H·Eᵀ. Which H gives which published method:

    None            the plain SVD (ZeroQuant-V2's LoRC)
    vector [K]      E[x²]: QERA's approximate form; `lqer_metric`: L²QER
    matrix [K, K]   E[x·xᵀ]: EoRA and QERA's exact form, the optimum

`shared_low_rank` gives several linears of the same input (q, k, v; gate, up) one common A, as GlowQ does: A·x is then computed
once. A low-rank term costs 16·r·(N + K) bits. At 2 bits the error has no leading directions to speak of: expect little there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from numfit.corrections.metric import Metric, check, loss, times
from numfit.errors import OptionError
from numfit.formats.terms import OVERSAMPLE, pad

POWER_STEPS = 2
_EXACT = 1024  # larger matrices than that are decomposed by subspace iteration where the rank is small against them

Payload = TypeVar("Payload")


def lqer_metric(mean_magnitude: Tensor) -> Tensor:
    """L²QER's weight of the input channels from their mean (or largest) magnitudes a [K]: (a / √(min a · max a))²."""
    a = mean_magnitude.double().clamp_min(1e-4)
    return (a.square() / (a.min() * a.max())).float()


def low_rank(error: Tensor, rank: int, metric: Metric = None, randomized: bool | None = None) -> tuple[Tensor, Tensor]:
    """The best correction of a rank.

    Args:
        error: W − Ŵ [N, K].
        rank: of the correction; beyond min(N, K) the rest is zeros.
        metric: see metric.py.
        randomized: subspace iteration from a fixed start (Halko, Martinsson, Tropp 2011) instead of a full decomposition;
            None: where that pays.

    Returns:
        B [N, rank] and A [rank, K], fp32; each column of B is as long as its row of A, which suits fp16.

    Raises:
        OptionError: shapes that do not fit, NaN or Inf, a rank below one.
    """
    check(error, metric)
    if rank < 1:
        raise OptionError(f"a low-rank correction has a rank of at least 1, not {rank}")
    n, k = error.shape
    kept = min(rank, n, k)
    if randomized is None:
        randomized = min(n, k) > _EXACT and 4 * (kept + OVERSAMPLE) < min(n, k)
    u = _left_iterated(error.float(), kept, metric) if randomized else _left(error.double(), kept, metric)
    a = u.T @ error.to(u)
    length = a.norm(dim=1).sqrt()
    b = u * length
    a = torch.where(length[:, None] > 0, a / length[:, None], torch.zeros_like(a))
    return pad(b.float(), rank, 1), pad(a.float(), rank, 0)


def _left(error: Tensor, rank: int, metric: Metric) -> Tensor:
    """Leading eigenvectors of E·H·Eᵀ: fp64 [N, rank]. Tall errors are first brought to a square by a thin QR."""
    n, k = error.shape
    basis, core = torch.linalg.qr(error) if n > k else (None, error)
    gram = times(core, metric) @ core.T
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)  # ascending
    u = vectors[:, -rank:].flip(1) if rank else vectors[:, :0]
    return u if basis is None else basis @ u


def _left_iterated(error: Tensor, rank: int, metric: Metric) -> Tensor:
    """The same by subspace iteration: fp32 [N, rank]."""
    n, k = error.shape
    width = min(rank + OVERSAMPLE, n, k)
    start = torch.randn((n, width), generator=torch.Generator().manual_seed(0)).to(error)
    q = torch.linalg.qr(start)[0]
    for _ in range(POWER_STEPS + 1):
        q = torch.linalg.qr(error @ times(q.T @ error, metric).T)[0]
    flat = q.T @ error  # [width, K]
    gram = (times(flat, metric) @ flat.T).double()
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return q @ vectors[:, -rank:].flip(1).float()


def shared_low_rank(
    errors: Sequence[Tensor], rank: int, metric: Metric = None, randomized: bool | None = None
) -> tuple[list[Tensor], Tensor]:
    """One right factor for linears that read the same input (GlowQ): the best correction of their errors one above the other.

    Args:
        errors: W − Ŵ of each, [N_i, K].

    Returns:
        ([B_i [N_i, rank]], A [rank, K]).

    Raises:
        OptionError: no errors, or of different K; see `low_rank`.
    """
    if not errors or len({e.shape[-1] for e in errors}) != 1:
        raise OptionError(f"a shared factor is for weights of the same inputs, not for {[tuple(e.shape) for e in errors]}")
    b, a = low_rank(torch.cat([e.to(errors[0]) for e in errors]), rank, metric, randomized)
    return list(b.split([len(e) for e in errors])), a


def alternate(
    w: Tensor,
    rank: int,
    quantize: Callable[[Tensor], tuple[Tensor, Payload]],
    metric: Metric = None,
    rounds: int = 3,
) -> tuple[Payload, Tensor, Tensor]:
    """Quantize W − B·A, correct what is lost, and again (as LoftQ does); the best round stays, so no round does harm.

    Args:
        w: [N, K].
        quantize: weight [N, K] → (decoded weight, whatever the caller wants back of the best round).
        rounds: quantizations; 1: quantize, then correct.

    Returns:
        (what `quantize` gave, B, A).
    """
    if rounds < 1:
        raise OptionError(f"at least one round is needed, not {rounds}")
    low = torch.zeros_like(w)
    best: tuple[float, Payload, Tensor, Tensor] | None = None
    for _ in range(rounds):
        decoded, payload = quantize(w - low)
        b, a = (t.half().float() for t in low_rank(w - decoded, rank, metric))  # as it will be stored
        low = b @ a
        score = loss(w - decoded - low, metric)
        if best is None or score < best[0]:
            best = score, payload, b, a
    assert best is not None
    return best[1:]
