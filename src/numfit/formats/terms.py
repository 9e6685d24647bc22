"""Side terms found from the weight alone (and the importance of its input channels, where given).

`split` is to a format with side terms what fit and encode are to one without. corrections/ does the same with second moments of
the inputs; both put what they find into `pack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats.codec import decode, encode
from numfit.formats.fit import fit
from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.formats.rotation import rotate, rotate_importance
from numfit.formats.side import add_terms, to_planes
from numfit.threads import cpu_threads

OVERSAMPLE = 10
POWER_STEPS = 3
_EXACT = 512  # up to this size, or where much of the spectrum is wanted, the decomposition is a full one


def split(
    fmt: Format, w: Tensor, importance: Tensor | None = None, scale_rule: str = "mse"
) -> tuple[Tensor, Params, dict[str, Tensor]]:
    """Codes, parameters and side terms of a weight [R, K] in its own (not rotated) coordinates.

    The weight is rotated; each row's largest weights (by magnitude times the root of importance) are set aside; the rest is
    fitted and encoded; the low-rank term takes the leading part of the error, the sparse one what is then left of its weights.

    Returns:
        (codes uint8 [R, K], parameters, terms as `pack` takes them).
    """
    side, base = fmt.side, fmt.base
    w = w.float()
    h = importance
    if side.rotation is not None:
        w = rotate(w, side.rotation)
        h = None if h is None else rotate_importance(h, side.rotation)
    terms: dict[str, Tensor] = {}
    inner = w
    if side.sparse:
        terms["sparse_index"] = largest(w, side.outliers(w.shape[1]), h)
        inner = w.scatter(1, terms["sparse_index"], 0.0)
    params = fit(base, inner, h, scale_rule)
    codes = encode(base, inner, params)
    if not side.stored:
        return codes, params, terms
    decoded = decode(base, codes, params)
    if side.rank:
        error = inner - decoded
        if side.sparse:
            error.scatter_(1, terms["sparse_index"], 0.0)
        terms["lowrank_b"], terms["lowrank_a"] = low_rank(error, side.rank, h)
        halves = to_planes(type(side)(rank=side.rank), tuple(w.shape), terms)
        decoded = add_terms(type(side)(rank=side.rank), decoded, halves)
    if side.sparse:
        terms["sparse_value"] = (w - decoded).gather(1, terms["sparse_index"])
    return codes, params, terms


def largest(w: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Columns of the `count` largest |w|·√importance of each row: int64 [R, count], ascending."""
    score = w.abs() if importance is None else w.abs() * importance.to(w).clamp_min(0).sqrt()
    order = score.argsort(dim=1, descending=True, stable=True)  # of equal ones the first, on every machine
    return order[:, :count].sort(1).values


def low_rank(error: Tensor, rank: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """B [R, rank] and A [rank, K] of the least Σ importance_k·(error − B·A)², fp32.

    Scaled by the root of importance and cut after `rank` singular values (L²QER; QERA's approximate form). Where the matrix is
    large against the rank, by subspace iteration from a fixed start. One thread: the result shall not depend on their number.
    """
    scale = None
    if importance is not None:
        scale = importance.to(error).clamp_min(0).sqrt()
        scale = scale.clamp_min(float(scale.max()) * 1e-4) if float(scale.max()) > 0 else torch.ones_like(scale)
    with cpu_threads(1):
        u, s, vh = leading(error if scale is None else error * scale, rank)
    root = s.sqrt()
    b, a = u * root, root[:, None] * vh
    return pad(b, rank, 1), pad(a if scale is None else a / scale, rank, 0)


def pad(t: Tensor, size: int, axis: int) -> Tensor:
    """Zeros after the end, where a matrix has fewer singular values than the term has room for."""
    missing = size - t.shape[axis]
    if missing <= 0:
        return t
    return torch.cat((t, t.new_zeros([missing if d == axis else n for d, n in enumerate(t.shape)])), axis)


def leading(m: Tensor, rank: int, exact: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading min(rank, R, K) singular triples of m [R, K]: u [R, r], s [r], vh [r, K].

    Args:
        exact: a full decomposition; False: randomized subspace iteration (Halko, Martinsson, Tropp 2011); None: what suits.
    """
    small = min(m.shape)
    rank = min(rank, small)
    if exact is None:
        exact = small <= _EXACT or 4 * (rank + OVERSAMPLE) >= small
    if exact or rank + OVERSAMPLE >= small:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    start = torch.randn((m.shape[1], rank + OVERSAMPLE), generator=torch.Generator().manual_seed(0), dtype=m.dtype).to(m.device)
    q = torch.linalg.qr(m @ start)[0]
    for _ in range(POWER_STEPS):
        q = torch.linalg.qr(m.T @ q)[0]
        q = torch.linalg.qr(m @ q)[0]
    u, s, vh = torch.linalg.svd(q.T @ m, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank]
