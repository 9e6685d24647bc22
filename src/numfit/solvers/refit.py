"""The parameters of least loss for codes as they are: decoupleQ's half step (arXiv 2404.12759) for every type.

A row's values are linear in its scales: ŵ = Σ_b s_b t_b with t_b = level - zero on block b and 0 elsewhere. With A_bc = t_b
H t_cᵀ and r_b = t_b H wᵀ its loss is sᵀ A s - 2 rᵀ s + const, so the best real scales solve A s = r. What is stored is
coarser: the solution is rounded to stored scales, and then each scale in turn is moved to the stored number nearest to the
best one given all others, which never raises the loss. Integer zero points are tried with every scale they could go with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.formats.codec import decode
from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.formats.scale import PARENT_MIN, to_stored
from numfit.solvers.levels import refit_levels
from numfit.solvers.linalg import solve_rows
from numfit.solvers.state import Problem, State, keep_better

_BYTES = 1 << 28  # of the normal equations of the rows worked on at a time
_CELLS = 1 << 20  # weights of these rows: their products stay in the cache
_ROUNDS = 2  # passes over the scales of a row
_ALL_ZEROS = 4  # bits of zero points up to which all are tried; above, those within 2


class Grams(NamedTuple):
    """Normal equations of R rows of G blocks, fp64, in units of the mean of diag H.

    aa [R, G, G]: t_b H t_cᵀ, ar [R, G]: t_b H wᵀ. With zero points t is the level alone, and the indicators 1_b of blocks
    take part: ab [R, G, G]: t_b H 1_cᵀ, bb [G, G]: 1_b H 1_cᵀ, br [R, G]: 1_b H wᵀ.
    """

    aa: Tensor
    ar: Tensor
    ab: Tensor | None = None
    bb: Tensor | None = None
    br: Tensor | None = None


def refit(problem: Problem, state: State) -> State:
    """Better parameters for the codes of `state`, row by row where they are better."""
    if problem.fmt.scaled:
        state = _refit_scales(problem, state)
    return refit_levels(problem, state) if problem.fmt.learned else state


def _refit_scales(problem: Problem, state: State) -> State:
    fmt, params = problem.fmt, state.params
    if fmt.block == "tensor":
        found = _refit_tensor(problem, state)
    else:
        scales, zeros, parents = [], [], []
        for rows, grams in normal_equations(problem, state):
            part = replace(
                params, scale=params.scale[rows], zero=None if params.zero is None else params.zero[rows],
                parent=params.parent if params.parent is None or len(params.parent) == 1 != len(params.scale)
                else params.parent[rows],
            )  # fmt: skip
            better = solve_scales(fmt, grams, part)
            scales.append(better.scale)
            zeros.append(better.zero)
            parents.append(better.parent)
        if not scales:
            return state
        found = replace(params, scale=torch.cat(scales))
        if params.zero is not None:
            found = replace(found, zero=torch.cat([z for z in zeros if z is not None]))
        if fmt.scale.parent == "row":
            found = replace(found, parent=torch.cat([p for p in parents if p is not None]))
    return keep_better(fmt, problem.state(state.codes, found), state)


def normal_equations(problem: Problem, state: State) -> Iterator[tuple[slice, Grams]]:
    """Normal equations of runs of rows, so many at a time that they stay small."""
    fmt, (n, k) = problem.fmt, problem.w.shape
    g = fmt.geometry(k)
    pad = g.blocks * g.block - k
    mean = float(problem.h.diagonal().double().mean()) or 1.0
    h = torch.nn.functional.pad(problem.h, (0, pad, 0, pad)) if pad else problem.h
    shape = (-1, g.blocks, g.block)
    unscaled = _unscaled(state.params)
    affine = fmt.zero
    sides = h.view(len(h), g.blocks, g.block).sum(2) if affine else None  # H 1_cᵀ: [K, G]
    bb = sides.view(g.blocks, g.block, g.blocks).sum(1).double() / mean if sides is not None else None
    step = max(1, min(_BYTES // (24 * g.blocks * g.blocks), _CELLS // len(h)))
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        t = decode(fmt, state.codes[rows], _rows(unscaled, rows, n))
        t = torch.nn.functional.pad(t, (0, pad)) if pad else t
        wh = torch.nn.functional.pad(problem.w[rows], (0, pad)) @ h
        aa = torch.empty((len(t), g.blocks, g.blocks), dtype=torch.float64, device=t.device)
        ab = torch.empty_like(aa) if sides is not None else None
        for b in range(g.blocks):
            s = slice(b * g.block, (b + 1) * g.block)
            product = (t[:, s] @ h[s, s.start :]).mul_(t[:, s.start :])  # blocks b … G - 1: A is symmetric
            aa[:, b, b:] = product.view(len(t), -1, g.block).sum(2)
            aa[:, b + 1 :, b] = aa[:, b, b + 1 :]
            if ab is not None and sides is not None:
                ab[:, b] = t[:, s] @ sides[s]
        aa /= mean
        ar = (wh * t).view(shape).sum(2).double() / mean
        br = wh.view(shape).sum(2).double() / mean if affine else None
        yield rows, Grams(aa, ar, None if ab is None else ab / mean, bb, br)


def _unscaled(params: Params) -> Params:
    """Parameters under which decoding gives levels alone."""
    zero = None if params.zero is None else torch.zeros_like(params.zero)
    return replace(params, scale=torch.ones_like(params.scale), parent=None, zero=zero)


def _rows(params: Params, rows: slice, n: int) -> Params:
    def cut(v: Tensor | None) -> Tensor | None:
        return v if v is None or len(v) != n else v[rows]

    scale = cut(params.scale)
    assert scale is not None
    return replace(params, scale=scale, parent=cut(params.parent), member=cut(params.member), zero=cut(params.zero))


def _refit_tensor(problem: Problem, state: State) -> Params:
    """One scale (and zero point) for the tensor: the sums of all rows' equations."""
    total: Grams | None = None
    for _, grams in normal_equations(problem, state):
        bb = None if grams.bb is None else grams.bb * len(grams.aa)
        aa, ar, ab, br = (None if v is None else v.sum(0, keepdim=True) for v in (grams.aa, grams.ar, grams.ab, grams.br))
        assert aa is not None and ar is not None
        add = Grams(aa, ar, ab, bb, br)
        total = add if total is None else Grams(*(None if a is None or b is None else a + b for a, b in zip(total, add)))  # type: ignore[arg-type]
    return state.params if total is None else solve_scales(problem.fmt, total, state.params)


def solve_scales(fmt: Format, grams: Grams, params: Params) -> Params:
    """Stored scales, zero points and parents of least loss found for R rows; never worse than `params`."""
    zero = None if params.zero is None else params.zero.double()
    wanted, wanted_zero = _closed_form(grams, params.effective_scale().double(), zero, float((1 << fmt.bits) - 1))
    best, value = _descend(fmt, grams, params, wanted, wanted_zero, params.parent)
    if fmt.scale.parent == "row":  # the largest scale that is wanted now may be another one
        parent = (wanted.amax(1, keepdim=True).float() / fmt.scale.cap).clamp(PARENT_MIN, 65504.0).half().float()
        other, other_value = _descend(fmt, grams, params, wanted, wanted_zero, parent)
        better = (other_value < value)[:, None]
        assert best.parent is not None and other.parent is not None
        best = replace(
            best, scale=torch.where(better, other.scale, best.scale), parent=torch.where(better, other.parent, best.parent),
            zero=None if best.zero is None or other.zero is None else torch.where(better, other.zero, best.zero),
        )  # fmt: skip
    return best


def _closed_form(grams: Grams, current: Tensor, zero: Tensor | None, top: float) -> tuple[Tensor, Tensor | None]:
    """Best real scales, and zero points rounded from the best real ones: fp64 [R, G]. Rows that have none keep theirs."""
    if zero is None:
        return solve_rows(grams.aa, grams.ar, current), None
    assert grams.ab is not None and grams.bb is not None and grams.br is not None
    r, g, _ = grams.aa.shape
    bb = grams.bb.expand(r, g, g)
    both = torch.cat([torch.cat([grams.aa, grams.ab], 2), torch.cat([grams.ab.transpose(1, 2), bb], 2)], 1)
    found = solve_rows(both, torch.cat([grams.ar, grams.br], 1), torch.cat([current, -current * zero], 1))
    scale, offset = found[:, :g], found[:, g:]
    wanted = torch.where(scale > 0, (-offset / scale).round().clamp(0, top), zero)
    return solve_rows(*_with_zero(grams, wanted), current), wanted


def _with_zero(grams: Grams, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Equations of the scales alone, for zero points [R, G]."""
    assert grams.ab is not None and grams.bb is not None and grams.br is not None
    cross = grams.ab * zero[:, None, :]
    a = grams.aa - cross - cross.transpose(1, 2) + zero[:, :, None] * zero[:, None, :] * grams.bb
    return a, grams.ar - zero * grams.br


def _descend(
    fmt: Format, grams: Grams, params: Params, wanted: Tensor, wanted_zero: Tensor | None, parent: Tensor | None
) -> tuple[Params, Tensor]:
    """Start from the better of the wanted scales, rounded, and the current ones; then move scale by scale. Also the loss,
    fp64 [R], up to a constant of the row."""

    def effective(stored: Tensor) -> Tensor:
        return (stored if parent is None else stored * parent).double()

    zero = None if params.zero is None else params.zero.double()
    stored = to_stored(fmt.scale, wanted.float(), parent, fmt.spare)
    value = _value(grams, effective(stored), wanted_zero)
    own = params.scale
    if parent is not params.parent and parent is not None:
        own = to_stored(fmt.scale, params.effective_scale(), parent, fmt.spare)
    before = _value(grams, effective(own), zero)
    better = (value < before)[:, None]
    stored = torch.where(better, stored, own)
    if zero is not None and wanted_zero is not None:
        zero = torch.where(better, wanted_zero, zero)
    s = effective(stored)
    top = (1 << fmt.bits) - 1
    for _ in range(_ROUNDS):
        for b in range(s.shape[1]):
            candidates = _zeros(zero[:, b], top) if zero is not None else None
            quad, lin, now = _coordinate(grams, s, zero, b, candidates)  # [R, Z] each, now: index of the current zero point
            target = torch.where(quad > 0, lin / quad.clamp_min(1e-300), s[:, b : b + 1])
            new, loss = _nearest_stored(fmt, quad, lin, target, parent)
            least, index = loss.min(1, keepdim=True)
            quad_now, lin_now = quad.gather(1, now), lin.gather(1, now)
            old = quad_now * s[:, b : b + 1] ** 2 - 2 * lin_now * s[:, b : b + 1]
            take = (least < old)[:, 0]
            stored[:, b] = torch.where(take, new.gather(1, index)[:, 0], stored[:, b])
            if zero is not None and candidates is not None:
                zero[:, b] = torch.where(take, candidates.gather(1, index)[:, 0], zero[:, b])
            s = effective(stored)
    found = replace(params, scale=stored, parent=parent, zero=None if zero is None else zero.float())
    return found, _value(grams, s, zero)


def _zeros(zero: Tensor, top: int) -> Tensor:
    """Zero points that are tried: fp64 [R, Z], the current one among them."""
    if top < 1 << _ALL_ZEROS:
        return torch.arange(top + 1, dtype=torch.float64, device=zero.device).expand(len(zero), -1)
    return (zero[:, None] + torch.arange(-2, 3, dtype=torch.float64, device=zero.device)).clamp(0, top)


def _coordinate(
    grams: Grams, s: Tensor, zero: Tensor | None, b: int, candidates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(quad, lin, index of the current zero point) [R, Z] of the loss quad·s_b² - 2·lin·s_b given all other blocks."""
    others = s.clone()
    others[:, b] = 0
    lin = grams.ar[:, b] - (grams.aa[:, b] * others).sum(1)
    quad = grams.aa[:, b, b]
    if zero is None or candidates is None:
        return quad[:, None], lin[:, None], torch.zeros((len(s), 1), dtype=torch.int64, device=s.device)
    assert grams.ab is not None and grams.bb is not None and grams.br is not None
    moved = others * zero
    lin = lin + (grams.ab[:, b] * moved).sum(1)
    side = grams.br[:, b] - (grams.ab[:, :, b] * others).sum(1) + moved @ grams.bb[b]
    quad = quad[:, None] - 2 * candidates * grams.ab[:, b, b, None] + candidates**2 * grams.bb[b, b]
    now = (candidates == zero[:, b : b + 1]).double().argmax(1, keepdim=True)
    return quad, lin[:, None] - candidates * side[:, None], now


def _nearest_stored(fmt: Format, quad: Tensor, lin: Tensor, target: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stored numbers of least loss next to the targets, and their losses."""
    best = loss = None
    for factor in (1.0,) if fmt.scale.store != "e8m0" else (1.0, 0.5, 2.0):  # powers of two are rounded in the log domain
        stored = to_stored(fmt.scale, (target * factor).float(), parent, fmt.spare)
        s = (stored if parent is None else stored * parent).double()
        value = quad * s * s - 2 * lin * s
        if best is None or loss is None:
            best, loss = stored, value
        else:
            best, loss = torch.where(value < loss, stored, best), torch.minimum(value, loss)
    assert best is not None and loss is not None
    return best, loss


def _value(grams: Grams, s: Tensor, zero: Tensor | None) -> Tensor:
    a, b = (grams.aa, grams.ar) if zero is None else _with_zero(grams, zero)
    return ((a @ s[..., None])[..., 0] * s).sum(1) - 2 * (b * s).sum(1)
