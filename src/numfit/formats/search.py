"""The scale search: squared error of every member under every candidate scale, in one fused pass.

This is the hot loop of data-free quantization: weights × members × candidates evaluations, each a chain of compares.
Written eagerly it is bound by memory passes (about 45 times slower, performance.md section 6); here the chain is a
`where` ladder that torch.compile fuses into one loop, and the same function run eagerly is its reference. Large problems
only are compiled, since a compilation costs seconds.

Candidates run from large to small scales. Once a scale clips, the error of the block's largest weight alone,
h·(|w| - s·max_level)², bounds the block's error from below, and grows as s shrinks; a block whose best error is already under that
bound is finished. The pruned search therefore finds the same minimum as the full one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from numfit.formats.nearest import CHAIN_MAX, Ladder

COMPILE_FROM = 1 << 27  # evaluations from which compiling pays for itself
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
    d = levels[0][torch.bucketize(u, edges[0])] - u
    e = d * d if h is None else d * d * h[:, None, None, :]
    return e.sum(-1) * scale * scale


def _unit_errors(x: Tensor, h: Tensor | None, scale: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """Units smaller than the block: each unit takes its better member under the block's one scale.

    x, h [k, B, units], slot by slot so that the long axis stays innermost; scale [B, C] → errors [B, C].
    """
    inverse = (1.0 / scale)[:, None, :, None]  # [B, 1, C, 1]
    total = None
    for slot in range(x.shape[0]):
        u = x[slot][:, None, None, :] * inverse
        d = _round_to_ladder(u, levels, edges) - u  # [B, M, C, units]
        e = d * d if h is None else d * d * h[slot][:, None, None, :]
        total = e if total is None else total + e
    assert total is not None
    return total.amin(1).sum(-1) * scale * scale


def _unit_choice(x: Tensor, h: Tensor | None, scale: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """Best member of each unit under a given scale [B, 1]; as `_unit_errors` → int64 [B, units], ties to the lower."""
    inverse = (1.0 / scale)[:, None, :]  # [B, 1, 1]
    total = None
    for slot in range(x.shape[0]):
        u = x[slot][:, None, :] * inverse
        d = _round_to_ladder(u, levels, edges, (-1, 1)) - u  # [B, M, units]
        e = d * d if h is None else d * d * h[slot][:, None, :]
        total = e if total is None else total + e
    assert total is not None
    return total.argmin(1)


def _affine_errors(x: Tensor, h: Tensor | None, pairs: Tensor, top: float) -> Tensor:
    """Asymmetric integers; x, h [B, n]; pairs [B, 2, C] of scale and zero → errors [B, C]."""
    scale, zero = pairs[:, 0], pairs[:, 1]
    u = x[:, None, :] * (1.0 / scale)[..., None]
    z = zero[..., None]
    d = (u.round() + z).clamp(0.0, top) - z - u
    e = d * d if h is None else d * d * h[:, None, :]
    return e.sum(-1) * scale * scale


@lru_cache(maxsize=8)
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)


_state = {"compile": True}


def _run(function: Callable[..., Tensor], cells: int, compiled: bool, *args: object) -> Tensor:
    """Run fused if asked and possible; say once where it is not."""
    if compiled and _state["compile"]:
        try:
            with torch._dynamo.config.patch(cache_size_limit=64):  # type: ignore[attr-defined]
                return _compiled(function)(*args)
        except Exception as error:  # torch raises many kinds here; all mean that no fused kernel can be built
            _state["compile"] = False
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(
                f"torch.compile cannot build the fused scale search ({reason[:200]}); results are the same, but fitting is "
                "several times slower. A working C++ compiler (g++) and the Python headers would mend it.",
                stacklevel=2,
            )
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
    """Best member of each unit; see `_unit_choice`. Returns int64 [B, units]."""
    cells = x.shape[-1] * ladder.levels.shape[0]
    return _run(_unit_choice, cells, compiled, x, h, scale, ladder.levels, ladder.thresholds)


def affine_errors(x: Tensor, h: Tensor | None, pairs: Tensor, top: float, *, compiled: bool) -> Tensor:
    """Squared errors of asymmetric integers; see `_affine_errors`. Returns fp32 [B, C]."""
    return _run(_affine_errors, x.shape[-1] * pairs.shape[2], compiled, x, h, pairs, top)
