"""The scale search: squared error of every member under every candidate scale, in one fused pass.

This is the hot loop of data-free quantization: weights × members × candidates evaluations, each a chain of compares.
The chain is a `where` ladder that torch.compile fuses into one loop (fused.py); the same function run eagerly is its
reference. Both find the same minimum up to ties of fp32 sums.

Candidates run from large to small scales. Once a scale clips, the error of the block's largest weight alone,
h·(|w| - s·max_level)², bounds the block's error from below, and grows as s shrinks; a block whose best error is already
under that bound is finished. The pruned search therefore finds the same minimum as the full one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from numfit.formats.fused import try_fused
from numfit.formats.nearest import CHAIN_MAX, Ladder

COMPILE_FROM = 1 << 27  # steps (weights × members × candidates × ranks) of a tensor from which compiling pays for itself
BATCH = 4  # candidates evaluated between two rounds of pruning
_EAGER_CELLS = 1 << 21  # intermediates of the eager form, in elements


def _round_to_ladder(u: Tensor, levels: Tensor, edges: Tensor, shape: tuple[int, ...] = (-1, 1, 1)) -> Tensor:
    """Nearest levels of u [B, M, C, n] by a ladder of comparisons; levels [M, ranks] are viewed as `shape`."""
    q = levels[:, 0].view(shape)
    for k in range(edges.shape[1]):
        q = torch.where(u > edges[:, k].view(shape), levels[:, k + 1].view(shape), q)
    return q


def _block_errors(x: Tensor, h: Tensor | None, scale: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """x, h [B, n]; scale [B, M, C] → squared errors [B, M, C]."""
    u = x[:, None, None, :] * (1.0 / scale)[..., None]
    d = _round_to_ladder(u, levels, edges) - u
    e = d * d if h is None else d * d * h[:, None, None, :]
    return e.sum(-1) * scale * scale


def _uniform_errors(x: Tensor, h: Tensor | None, scale: Tensor, step: float, top: float) -> Tensor:
    """As `_block_errors` for one uniform grid with levels 0, step … top (x ≥ 0)."""
    u = x[:, None, None, :] * (1.0 / scale)[..., None]
    d = (torch.ceil(u / step - 0.5) * step).clamp(0.0, top) - u
    e = d * d if h is None else d * d * h[:, None, None, :]
    return e.sum(-1) * scale * scale


def _searched_errors(x: Tensor, h: Tensor | None, scale: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """As `_block_errors` for one grid of many levels: binary search instead of a ladder."""
    u = x[:, None, None, :] * (1.0 / scale)[..., None]
    d = levels[0][torch.bucketize(u.contiguous(), edges[0])] - u
    e = d * d if h is None else d * d * h[:, None, None, :]
    return e.sum(-1) * scale * scale


def _member_totals(x: Tensor, h: Tensor | None, inverse: Tensor, levels: Tensor, edges: Tensor) -> list[Tensor]:
    """Squared error of each unit under each member, in scaled units; x, h [k, B, …, units].

    Members are unrolled, not a tensor axis: taking the better of two is then one more elementwise step of the same fused
    loop, where a reduction over an axis would write every member's errors to memory first.
    """
    totals = []
    for m in range(levels.shape[0]):
        total = None
        for slot in range(x.shape[0]):
            u = x[slot] * inverse
            d = _round_to_ladder(u, levels[m : m + 1], edges[m : m + 1], (1,) * u.dim()) - u
            e = d * d if h is None else d * d * h[slot]
            total = e if total is None else total + e
        assert total is not None
        totals.append(total)
    return totals


def _unit_errors(x: Tensor, h: Tensor | None, scale: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """Units smaller than the block: each unit takes its better member under the block's one scale.

    x, h [k, B, units], slot by slot so that the long axis stays innermost; scale [B, C] → errors [B, C].
    """
    inverse = (1.0 / scale)[..., None]  # [B, C, 1]
    totals = _member_totals(x[:, :, None], None if h is None else h[:, :, None], inverse, levels, edges)
    best = totals[0]
    for total in totals[1:]:
        best = torch.minimum(best, total)
    return best.sum(-1) * scale * scale


def _unit_choice(x: Tensor, h: Tensor | None, scale: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """Best member of each unit under a given scale [B, 1] → uint8 [B, units], ties to the lower."""
    best, *others = _member_totals(x, h, 1.0 / scale, levels, edges)
    choice = torch.zeros_like(best, dtype=torch.uint8)
    for m, total in enumerate(others, 1):
        choice = torch.where(total < best, torch.full_like(choice, m), choice)
        best = torch.minimum(best, total)
    return choice


def _affine_errors(x: Tensor, h: Tensor | None, pairs: Tensor, top: float) -> Tensor:
    """Asymmetric integers; x, h [B, n]; pairs [B, 2, C] of scale and zero → errors [B, C]."""
    scale, zero = pairs[:, 0], pairs[:, 1]
    u = x[:, None, :] * (1.0 / scale)[..., None]
    z = zero[..., None]
    d = (u.round() + z).clamp(0.0, top) - z - u
    e = d * d if h is None else d * d * h[:, None, :]
    return e.sum(-1) * scale * scale


def _run(function: Callable[..., Tensor], cells: int, compiled: bool, *args: object) -> Tensor:
    """Run fused if asked and possible, else eagerly in chunks of blocks that bound the intermediates."""
    if compiled and (result := try_fused(function, *args)) is not None:
        return result
    rows = max(1, _EAGER_CELLS // max(1, cells))
    x, h, scale, *rest = args
    assert isinstance(x, Tensor) and isinstance(scale, Tensor)
    axis = x.dim() - 2  # blocks are axis 0 of [B, n] and axis 1 of [k, B, units]
    parts = [
        function(
            x.narrow(axis, i, min(rows, x.shape[axis] - i)),
            None if h is None else h.narrow(axis, i, min(rows, x.shape[axis] - i)),  # type: ignore[attr-defined]
            scale[i : i + rows],
            *rest,
        )
        for i in range(0, x.shape[axis], rows)
    ]
    return torch.cat(parts) if parts else scale.new_empty(scale.shape)


def errors(x: Tensor, h: Tensor | None, scale: Tensor, ladder: Ladder, *, compiled: bool) -> Tensor:
    """Squared errors of whole blocks, unit ≥ block.

    Args:
        x: weights [B, n] fp32; |weights| where `ladder.mirrored`.
        h: importance [B, n] or None.
        scale: effective candidate scales [B, M, C].
        compiled: fuse with torch.compile.

    Returns:
        fp32 [B, M, C].
    """
    cells = x.shape[-1] * scale.shape[1] * scale.shape[2]
    if ladder.step is not None:
        return _run(_uniform_errors, cells, compiled, x, h, scale, ladder.step, ladder.levels[0, -1].item())
    if ladder.levels.shape[1] > CHAIN_MAX:
        return _run(_searched_errors, cells, False, x, h, scale, ladder.levels, ladder.thresholds)
    return _run(_block_errors, cells, compiled, x, h, scale, ladder.levels, ladder.thresholds)


def unit_errors(x: Tensor, h: Tensor | None, scale: Tensor, ladder: Ladder, *, compiled: bool) -> Tensor:
    """Squared errors of blocks whose units choose their member; see `_unit_errors`. Returns fp32 [B, C]."""
    cells = x.shape[-1] * ladder.levels.shape[0] * scale.shape[1]
    return _run(_unit_errors, cells, compiled, x, h, scale, ladder.levels, ladder.thresholds)


def unit_choice(x: Tensor, h: Tensor | None, scale: Tensor, ladder: Ladder, *, compiled: bool) -> Tensor:
    """Best member of each unit; see `_unit_choice`. Returns uint8 [B, units]."""
    cells = x.shape[-1] * ladder.levels.shape[0]
    return _run(_unit_choice, cells, compiled, x, h, scale, ladder.levels, ladder.thresholds)


def affine_errors(x: Tensor, h: Tensor | None, pairs: Tensor, top: float, *, compiled: bool) -> Tensor:
    """Squared errors of asymmetric integers; see `_affine_errors`. Returns fp32 [B, C]."""
    return _run(_affine_errors, x.shape[-1] * pairs.shape[2], compiled, x, h, pairs, top)
