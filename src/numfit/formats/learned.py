"""Learned levels: every row has a table of its own, found by one-dimensional k-means and stored in fp16.

    ŵ = s · levels[row][code]        (s = 1, and not stored, where the block is the row)

Without scales this is SqueezeLLM's dense part (arXiv 2306.07629), with the diagonal of H as weights; with a scale a group it is
any4 (arXiv 2507.04610), but for symmetric groups. Weights are those of the squared error: importance · s².

In one dimension the cells of an optimal table are runs of the sorted row, so that prefix sums give a cell's error in a few
operations (Wu 1991). The table starts from the optimum among cells whose borders are 64 chosen places of the row, found by
dynamic programming, and Lloyd's iterations take it from there: rows of up to 64 weights are solved exactly. On normal, Laplace
and t5 rows of 576 weights, the error of 16 levels is then 1.005 to 1.008 times the least on average, that of 8 levels 1.001;
Lloyd alone ends at 1.06 to 1.26 times from quantiles, and higher from NF4 (tests/test_learned.py holds the exact oracle).

It needs a whole row and weights a level as heavily as a fp16 number: 16·2**bits bits a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.formats.format import Format
from numfit.formats.nearest import Tables, rank
from numfit.formats.onepass import encode as encode_in_one_pass
from numfit.formats.onepass import usable
from numfit.formats.params import Params, row_chunks
from numfit.formats.scale import FP16_MAX, PARENT_MIN, to_stored

BORDERS = 64  # places of a row between which the start's cells lie
ROUNDS = 50  # of Lloyd, fewer where nothing moves
SCALE_ROUNDS = 3  # of nearest codes and the best scale for them
NATIVE_ROWS = 256  # a compiled pass takes the rows as members of a family, of which it can number so many
_CELLS = 1 << 18  # entries of the start's tables at a time: they stay in cache


class _Sorted(NamedTuple):
    """Rows in ascending order, fp64 [R, K], and the sums of weight and of weight · value before each place [R, K + 1]."""

    x: Tensor
    mass: Tensor
    moment: Tensor


def learn(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """Tables of nearly least Σ weight · (x - level)².

    Args:
        x: [R, K], finite; weight: of each square [R, K] or [1, K], positive.
        count: levels of a row.

    Returns:
        fp32 [R, count]: fp16 numbers, ascending. Equal ones where a row has fewer values than levels.
    """
    step = max(1, _CELLS // (BORDERS + 1) ** 2)
    parts = [_learn(x[s], weight if len(weight) == 1 else weight[s], count) for s in row_chunks(len(x), 1, step)]
    return torch.cat(parts) if parts else x.new_empty((0, count), dtype=torch.float32)


def _learn(x: Tensor, weight: Tensor, count: int) -> Tensor:
    values, order = torch.sort(x.double().contiguous(), dim=1, stable=True)
    w = weight.double().expand_as(values).gather(1, order)
    before = lambda t: torch.nn.functional.pad(t.cumsum(1), (1, 0))  # noqa: E731
    rows = _Sorted(values, before(w), before(w * values))
    levels = _start(rows, w, count)
    for _ in range(ROUNDS):
        new = _centroids(rows, _cells(rows, levels), levels)
        if torch.equal(new, levels):
            break
        levels = new
    return to_fp16(levels)


def to_fp16(levels: Tensor) -> Tensor:
    """Levels as they are stored: fp32, no minus zero."""
    return levels.clamp(-FP16_MAX, FP16_MAX).half().float() + 0.0


def _cells(rows: _Sorted, levels: Tensor) -> Tensor:
    """Borders of the values nearest to each level, ties to the lower one: int64 [R, count + 1]."""
    edges = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    inner = torch.searchsorted(rows.x, edges, right=True)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=rows.x.shape[1])


def _centroids(rows: _Sorted, borders: Tensor, levels: Tensor) -> Tensor:
    """Weighted means of the cells; the level where a cell is empty."""
    mass, moment = (t.gather(1, borders).diff(dim=1) for t in (rows.mass, rows.moment))
    return torch.where(mass > 0, moment / mass, levels)


def _start(rows: _Sorted, weight: Tensor, count: int) -> Tensor:
    """Centroids of the best cells whose borders are among those of `_places`: fp64 [R, count].

    A cell saves moment² / mass of the squared error around the row's mean; the savings of the best j cells up to place e are
    the largest, over the place b where the last begins, of those of j - 1 cells up to b and of the cell b … e.
    """
    places = _places(rows.x, weight)
    mass, moment = (t.gather(1, places) for t in (rows.mass, rows.moment))
    moment = moment - mass * (rows.moment[:, -1:] / rows.mass[:, -1:])  # of centred values: then fp32 will do
    size = mass.abs().amax(1, keepdim=True)
    m, s = (mass[:, :, None] - mass[:, None, :]).float(), (moment[:, :, None] - moment[:, None, :]).float()  # [R, e, b]
    saved = torch.where(m > size[..., None] * 1e-12, s * s / m, 0.0)
    saved.masked_fill_(torch.ones_like(saved[0], dtype=torch.bool).triu(1), -torch.inf)
    best, begins = saved[:, :, 0], []
    for _ in range(count - 1):
        best, begin = (saved + best[:, None, :]).max(2)
        begins.append(begin)
    last = torch.full((len(best), 1), best.shape[1] - 1, device=best.device)
    chosen = [last]
    for begin in reversed(begins):
        chosen.append(begin.gather(1, chosen[-1]))
    chosen.append(torch.zeros_like(last))
    borders = places.gather(1, torch.cat(chosen[::-1], 1))
    empty = rows.x.gather(1, borders[:, :-1].clamp_max(rows.x.shape[1] - 1))
    return _centroids(rows, borders, empty).sort(1).values


def _places(x: Tensor, weight: Tensor) -> Tensor:
    """Places of a row's possible borders, ascending: int64 [R, at most BORDERS + 1]; all where there are so few.

    Their density is about the square root of that of the weights, which is dense where the cells of good tables are small.
    """
    n, k = x.shape
    if k <= BORDERS:
        return torch.arange(k + 1, device=x.device).expand(n, -1).contiguous()
    gap = x.diff(dim=1, prepend=x[:, :1])
    share = (weight * gap).sqrt().cumsum(1)
    wanted = share[:, -1:] * (torch.arange(1, BORDERS, dtype=x.dtype, device=x.device) / BORDERS)
    inner = torch.searchsorted(share, wanted.contiguous())
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=k)


# -- the verbs --------------------------------------------------------------------------------------------------------


def plain(fmt: Format) -> Format:
    """The same with the start table for all rows: what scales are fitted to before levels are learned."""
    return replace(fmt, learned=False)


def learn_levels(fmt: Format, w: Tensor, importance: Tensor | None, params: Params) -> Params:
    """Parameters with levels for the scales that they hold.

    Args:
        w: [R, K]; importance: in units of its mean [K], or None.
    """
    k, block = w.shape[1], fmt.geometry(w.shape[1]).block
    h = torch.ones((1, k), device=w.device) if importance is None else importance[None]
    effective, parts = params.effective_scale(), []
    for s in row_chunks(*w.shape):
        scale = per_column(effective[s], block, k)
        parts.append(learn(w[s].float() / scale, h * scale.double().square() if fmt.scaled else h, 1 << fmt.bits))
    levels = torch.cat(parts) if parts else torch.empty((0, 1 << fmt.bits), device=w.device)
    return replace(params, levels=levels)


def nearest_scales(
    fmt: Format, w: Tensor, importance: Tensor | None, levels: Tensor, stored: Tensor, parent: Tensor | None
) -> Tensor:
    """Better scales of one block of every row for levels as they are: nearest codes and the best scale for them, in turn.

    Args:
        w: the block's weights [R, n] fp32; importance: [n] or None.
        stored: the stored part of the present scales [R, 1]; parent: [R, 1], or [1, 1], or None.

    Returns:
        stored parts [R, 1], row by row no worse than the present ones.
    """
    h = torch.ones_like(w[0]) if importance is None else importance
    edges, best = row_tables(levels).thresholds, stored
    least = None
    for _ in range(SCALE_ROUNDS + 1):
        scale = stored if parent is None else stored * parent
        level = levels.gather(1, rank(w / scale, edges).long())
        loss = (h * (w - level * scale).square()).sum(1, keepdim=True)
        best = stored if least is None else torch.where(loss < least, stored, best)
        least = loss if least is None else torch.minimum(loss, least)
        square = (h * level.square()).sum(1, keepdim=True)
        wanted = torch.where(square > 0, (h * w * level).sum(1, keepdim=True) / square, scale)
        stored = to_stored(fmt.scale, wanted.clamp_min(PARENT_MIN), parent, 0)
    return best


def per_column(values: Tensor, block: int, k: int) -> Tensor:
    """One value a block [R, blocks] → [R, K]."""
    return values.expand(-1, k) if values.shape[1] == 1 else values.repeat_interleave(block, 1)[:, :k]


def row_tables(levels: Tensor) -> Tables:
    """Levels [R, 2**bits] as the tables of a family that has a member for each row."""
    edges = ((levels[:, 1:].double() + levels[:, :-1].double()) / 2).float()
    codes = torch.arange(levels.shape[1], dtype=torch.uint8, device=levels.device)
    return Tables(levels, edges, codes.expand_as(levels))


def encode(w: Tensor, levels: Tensor, scale: Tensor, block: int) -> Tensor:
    """Nearest codes of w [R, K] under levels [R, 2**bits] and effective scales [R, blocks]: uint8 [R, K]."""
    t = row_tables(levels)
    if not usable(w.device):
        return rank(w.float() / per_column(scale, block, w.shape[1]), t.thresholds)
    out = w.new_empty(w.shape, dtype=torch.uint8)
    for s in row_chunks(len(w), 1, NATIVE_ROWS):
        part = Tables(*(v[s] for v in t))
        member = torch.arange(len(part.levels), dtype=torch.uint8, device=w.device)[:, None].expand(-1, scale.shape[1])
        out[s] = encode_in_one_pass(part, w[s].float(), block, block, scale[s], None, member)
    return out
