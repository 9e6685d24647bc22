"""Cyclic coordinate descent on codes: every code in turn becomes the best one given all others, which never raises the loss.

With E = Q - W, the loss of a row as a function of q_j alone is least at q_j - (E H)_j / H_jj; the nearest level of that is
the best code. Columns are worked on in panels: (E H) of a panel's columns is computed afresh from all of E when the panel is
reached, so its error does not grow, and kept up to date inside the panel. Units that choose a member (AMS) try every member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.formats.codec import decode
from numfit.formats.format import Format
from numfit.solvers.compiled import compiled_run, usable
from numfit.solvers.order import columns, small_units
from numfit.solvers.rounding import Rounder
from numfit.solvers.state import Problem, State, keep_better

MARGIN = 1e-6  # relative gain below which a code stays: the noise of fp32


class Run(NamedTuple):
    """Neighbouring columns while they are worked on."""

    first: int
    h: Tensor  # [B, B]
    gradient: Tensor  # (E H) of these columns [N, B], changed in place
    w: Tensor  # [N, B]
    q: Tensor  # [N, B], changed in place
    codes: Tensor  # uint8 [N, B], changed in place
    block: Tensor  # [B] int64, and the unit of each column
    unit: Tensor


RunDescent = Callable[[Run, Rounder, bool], None]


def descent(problem: Problem, state: State, run: RunDescent | None = None) -> State:
    """Passes over all columns, fewer where nothing changes any more."""
    fmt, w, h = problem.fmt, problem.w, problem.h
    run = run or (compiled_run if usable(w.device) else eager_run)
    block, unit = columns(fmt, w.shape[1])
    rounder = Rounder(fmt, state.params, w.shape[1])
    codes = state.codes.clone()
    q = decode(fmt, codes, state.params)
    e = q - w
    for _ in range(problem.options.sweeps):
        before, members = codes.clone(), None if rounder.member is None else rounder.member.clone()
        for a, b in runs(fmt, w.shape[1], problem.options.panel):
            s = slice(a, b)
            part = Run(a, h[s, s], e @ h[:, s], w[:, s], q[:, s], codes[:, s], block[s], unit[s])
            run(part, rounder, small_units(fmt))
            torch.sub(q[:, s], w[:, s], out=e[:, s])
        same = members is None or rounder.member is None or torch.equal(members, rounder.member)
        if same and torch.equal(before, codes):
            break
    return keep_better(fmt, problem.state(codes, rounder.result()), state)


def runs(fmt: Format, k: int, most: int) -> list[tuple[int, int]]:
    """Runs of at most `most` columns that cut no small unit (a unit that is larger is a run of its own)."""
    atom = (columns(fmt, k)[1] if small_units(fmt) else torch.arange(k)).tolist()
    ends = [i + 1 for i in range(k) if i + 1 == k or atom[i + 1] != atom[i]]
    out, start = [], 0
    while start < k:
        stop = max((e for e in ends if start < e <= start + most), default=0) or next(e for e in ends if e > start)
        out.append((start, stop))
        start = stop
    return out


def eager_run(run: Run, rounder: Rounder, choose: bool) -> None:
    """Descend on the columns of a run: the reference."""
    block, unit = run.block.tolist(), run.unit.tolist()
    j = 0
    while j < len(block):
        end = next((i for i in range(j, len(block)) if unit[i] != unit[j]), len(block)) if choose else j + 1
        if choose:
            _unit(run, j, end, block[j], unit[j], rounder)
        elif float(run.h[j, j]) > 0:
            code, q, _ = _coordinate(run, j, run.gradient[:, j], block[j], rounder.members(unit[j]), rounder, stay=True)
            step = q - run.q[:, j]
            run.codes[:, j], run.q[:, j] = code, q
            run.gradient[:, j + 1 :] += step[:, None] * run.h[j, j + 1 :]
        j = end


def _coordinate(
    run: Run, j: int, gradient: Tensor, block: int, member: Tensor | int, rounder: Rounder, *, stay: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Best (code, value, change of the loss) of column j; `stay`: the old code remains where nothing is gained."""
    q, hjj = run.q[:, j], run.h[j, j]
    code, new = rounder.column(q - gradient / hjj, block, member)
    if stay:
        gain = _gain(new - q, gradient, hjj)
        keep = ~(gain < (-MARGIN * hjj) * q * q)
        code, new = torch.where(keep, run.codes[:, j], code), torch.where(keep, q, new)
    return code, new, _gain(new - q, gradient, hjj)


def _gain(step: Tensor, gradient: Tensor, hjj: Tensor) -> Tensor:
    """Change of the loss by a step of one value."""
    return step * (2 * gradient + step * hjj)


def _unit(run: Run, start: int, stop: int, block: int, unit: int, rounder: Rounder) -> None:
    """Descend on the columns of a unit under every member and keep the best; the present member where none is better."""
    assert rounder.member is not None
    present = rounder.at(rounder.member, unit).long()
    live = [j for j in range(start, stop) if float(run.h[j, j]) > 0]
    if not live:
        return
    results = []
    for m in (None, *range(len(rounder.levels))):  # None: the present member, whose codes may stay
        local = run.gradient[:, start:stop].clone()
        codes, values = run.codes[:, start:stop].clone(), run.q[:, start:stop].clone()
        total = torch.zeros(len(local), device=local.device)
        for j in range(start, stop):
            i = j - start
            if j not in live:
                if m is not None:  # the loss does not see this input: the nearest level
                    codes[:, i], values[:, i] = rounder.column(run.w[:, j], block, m)
                continue
            member = present if m is None else m
            code, q, gain = _coordinate(run, j, local[:, i], block, member, rounder, stay=m is None)
            total = total + gain
            local[:, i + 1 :] += (q - run.q[:, j])[:, None] * run.h[j, j + 1 : stop]
            codes[:, i], values[:, i] = code, q
        results.append((total, codes, values))
    total, codes, values = results[0]
    member = present
    scale = torch.zeros_like(total)
    for j in range(start, stop):
        scale = scale + run.h[j, j] * (run.q[:, j] * run.q[:, j])
    for m, (other, other_codes, other_values) in enumerate(results[1:]):
        better = (other < total - MARGIN * scale) & (present != m)
        total = torch.where(better, other, total)
        member = torch.where(better, m, member)
        codes = torch.where(better[:, None], other_codes, codes)
        values = torch.where(better[:, None], other_values, values)
    step = values - run.q[:, start:stop]
    run.codes[:, start:stop], run.q[:, start:stop] = codes, values
    for j in range(start, stop):
        run.gradient[:, stop:] += step[:, j - start, None] * run.h[j, stop:]
    rounder.member[:, unit] = member.to(torch.uint8)
