"""The learned levels of least loss for codes as they are.

A row is linear in its levels: ŵ = Zᵀ l, where z_cj is the scale of weight j if its code is c and else 0. So its loss is least
at l + δ, (Z H Zᵀ) δ = Z H (w - ŵ)ᵀ: one system of 2**bits a row. This is the centroid step of k-means under all of H, where
the fit knows its diagonal alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from numfit.formats.codec import decode
from numfit.formats.learned import per_column, to_fp16
from numfit.formats.params import row_chunks
from numfit.solvers.linalg import solve_rows
from numfit.solvers.state import Problem, State, keep_better

_CELLS = 1 << 22  # entries of Z at a time


def refit_levels(problem: Problem, state: State) -> State:
    """Better levels, row by row where they are better; codes are renumbered so that levels ascend again."""
    params, w, h = state.params, problem.w, problem.h
    assert params.levels is not None
    (n, k), count = w.shape, params.levels.shape[1]
    mean = float(h.diagonal().double().mean()) or 1.0
    error = w - decode(problem.fmt, state.codes, params)
    effective, block = params.effective_scale(), problem.fmt.geometry(k).block
    levels = params.levels.clone()
    for s in row_chunks(n, k * count, _CELLS):
        scale = per_column(effective[s], block, k)
        z = torch.zeros((len(scale), count, k), device=w.device)
        z.scatter_(1, state.codes[s].long()[:, None], scale[:, None])
        zh = (z.view(-1, k) @ h).view(z.shape)
        a, b = zh @ z.mT, zh @ error[s, :, None]  # [R, L, L], [R, L, 1]
        b = b[..., 0].double() / mean
        levels[s] += solve_rows(a.double() / mean, b, torch.zeros_like(b)).float()
    levels, order = torch.sort(to_fp16(levels), dim=1, stable=True)
    codes = order.argsort(1).gather(1, state.codes.long()).to(torch.uint8)
    return keep_better(problem.fmt, problem.state(codes, replace(params, levels=levels)), state)
