"""One pass over the columns of a matrix: round a column, make those that follow pay for its error.

    e = (w_i - q_i) / U_ii,   w_j -= e U_ij   (j > i),   UᵀU = (H + λI)^-1

the exact optimal-brain-surgeon update (GPTQ, arXiv 2210.17323). Columns are swept in panels: inside a panel every update is
made at once, what follows a panel is updated by one matrix product at its end. Two optional terms take part in the update:
GPTAQ's w_i P_ij and ResComp's (w⁰_i - w_i) R_ij, with w_i cut to what the type can represent.

`eager_panel` is the plain loop, and the reference; compiled.py does the same to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.solvers.compiled import compiled_panel, usable
from numfit.solvers.order import Plan, Segment
from numfit.solvers.rounding import Rounder


class Swept(NamedTuple):
    """Codes uint8 [N, K], parameters, and Σ e² of each row, fp64 [N]: the loss under H + λI where parameters were fixed."""

    codes: Tensor
    params: Params
    losses: Tensor


class Terms(NamedTuple):
    """What else a column passes on: strictly upper P and R [K, K] in the order of the sweep, or None."""

    p: Tensor | None = None
    r: Tensor | None = None


class Panel(NamedTuple):
    """A run of columns while it is swept, in the order of the sweep."""

    w: Tensor  # [N, B] fp32, changed in place
    original: Tensor | None  # the same before any update; only where ResComp's term needs it
    u: Tensor  # [B, B]
    terms: Terms  # [B, B] each
    block: Tensor  # [B] int64, and the unit of each column
    unit: Tensor
    codes: Tensor  # uint8 [N, B]: of each column, once it is swept
    error: Tensor  # [N, B]: e of each column, once it is swept
    before: Tensor | None  # [N, B]: w_i of each column when it was reached, where a term needs it


PanelSweep = Callable[[Panel, int, int, Rounder, bool], None]


def sweep(
    fmt: Format,
    w: Tensor,
    u: Tensor,
    plan: Plan,
    params: Params,
    *,
    importance: Tensor | None = None,
    scale_rule: str = "mse",
    choose: bool = True,
    terms: Terms = Terms(),  # noqa: B008
    panel_sweep: PanelSweep | None = None,
) -> Swept:
    """Sweep all columns, in compiled code where weights are on a CPU and there is a library.

    Args:
        w: [N, K] fp32, columns as stored.
        u: [K, K], in the order of the plan.
        params: where the plan fits blocks on its way, these are changed; otherwise they stay as they are.
        importance: [K] in units of its mean, for fitting blocks; scale_rule: how their scales are found.
        choose: small units choose their member when they are reached: that whose own sweep over the unit has the least Σ e².
        panel_sweep: what does a run of positions of a panel; `eager_panel` is the reference.
    """
    run = panel_sweep or (compiled_panel if usable(w.device) else eager_panel)
    n, k = w.shape
    order = plan.order.to(w.device)
    rounder = Rounder(fmt, params, k)
    swept = torch.empty((n, k), dtype=torch.uint8, device=w.device)
    losses = torch.zeros(n, dtype=torch.float64, device=w.device)
    rest = w.index_select(1, order)
    choose = choose and plan.small
    extra = terms.p is not None or terms.r is not None
    for segments in plan.panels:
        a, b = segments[0].start, segments[-1].stop
        s = slice(a, b)
        inner = Terms(*(None if t is None else t[s, s] for t in terms))
        panel = Panel(
            rest[:, s], None if terms.r is None else w.index_select(1, order[s]), u[s, s], inner, plan.block[s], plan.unit[s],
            swept[:, s], torch.empty_like(rest[:, s], memory_format=torch.contiguous_format),
            torch.empty_like(rest[:, s], memory_format=torch.contiguous_format) if extra else None,
        )  # fmt: skip
        for segment in segments:
            _fit_blocks(rounder, rest, plan, segment, importance, scale_rule)
            run(panel, segment.start - a, segment.stop - a, rounder, choose)
        losses += torch.linalg.vecdot(panel.error, panel.error)
        if b == k:
            break
        rest[:, b:].addmm_(panel.error, u[s, b:], alpha=-1)
        if terms.p is not None and panel.before is not None:
            rest[:, b:].addmm_(panel.before, terms.p[s, b:])
        if terms.r is not None and panel.before is not None and panel.original is not None:
            rest[:, b:].addmm_(panel.original - panel.before, terms.r[s, b:])
    codes = swept.gather(1, order.argsort().expand(n, k))  # on bytes four times as fast as index_select
    return Swept(codes, rounder.result(), losses)


def _fit_blocks(
    rounder: Rounder, rest: Tensor, plan: Plan, segment: Segment, importance: Tensor | None, rule: str
) -> None:
    for block in segment.blocks:
        where = (plan.block == block).nonzero()[:, 0]
        where = where[plan.order[where].argsort()]  # as stored
        column = plan.order[where].to(rest.device)
        weights = None if importance is None else importance[column]
        rounder.fit_block(block, rest[:, where.to(rest.device)], weights, rule)


def eager_panel(panel: Panel, start: int, stop: int, rounder: Rounder, choose: bool) -> None:
    """Sweep positions [start, stop) of a panel and update the rest of it: the reference."""
    w, u = panel.w, panel.u
    block, unit = panel.block.tolist(), panel.unit.tolist()
    for i in range(start, stop):
        if choose and (i == start or unit[i] != unit[i - 1]):
            end = next((j for j in range(i, stop) if unit[j] != unit[i]), stop)
            _choose_member(panel, i, end, rounder)
        x = w[:, i].clone()
        code, q = rounder.column(x, block[i], rounder.members(unit[i]))
        panel.codes[:, i] = code
        e = (x - q) / u[i, i]
        panel.error[:, i] = e
        w[:, i + 1 :] -= e[:, None] * u[i, i + 1 :]
        if panel.before is not None:
            low, high = rounder.range(block[i], rounder.members(unit[i]))
            x = torch.minimum(torch.maximum(x, low), high)
            panel.before[:, i] = x
            if panel.terms.p is not None:
                w[:, i + 1 :] += x[:, None] * panel.terms.p[i, i + 1 :]
            if panel.terms.r is not None and panel.original is not None:
                w[:, i + 1 :] += (panel.original[:, i] - x)[:, None] * panel.terms.r[i, i + 1 :]


def _choose_member(panel: Panel, start: int, stop: int, rounder: Rounder) -> None:
    """Give a small unit the member whose sweep over its columns has the least Σ e²; ties: the lower index."""
    assert rounder.member is not None
    unit, block = int(panel.unit[start]), int(panel.block[start])
    best = chosen = None
    for m in range(len(rounder.levels)):
        x = panel.w[:, start:stop].clone()
        cost = torch.zeros(len(x), device=x.device)
        for i in range(stop - start):
            e = (x[:, i] - rounder.column(x[:, i], block, m)[1]) / panel.u[start + i, start + i]
            cost = cost + e * e
            x[:, i + 1 :] -= e[:, None] * panel.u[start + i, start + i + 1 : stop]
        if best is None or chosen is None:
            best, chosen = cost, torch.zeros(len(x), dtype=torch.uint8, device=x.device)
        else:
            better = cost < best
            best, chosen = torch.where(better, cost, best), chosen.masked_fill(better, m)
    assert chosen is not None
    rounder.member[:, unit] = chosen
