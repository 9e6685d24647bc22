"""Fit: choose scales, members and zero points of a weight, without looking at other weights.

One procedure for every scalar type (ams-pot-formats.md 7.1, 1.4, 2.1; mant-family.md 1.3): each block tries a row of
candidate scales for each member, every candidate already rounded to what the file can hold, and keeps the pair of least
squared error, weighted by the importance of the input channels where that is given. Units smaller than a block (AMS)
choose their member under the block's common scale; a member per tensor (ANT) is chosen on the sum of its blocks' best errors.

Work goes in chunks of rows whose size depends on the shape alone, so results do not depend on threads or memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from numfit.errors import FormatError
from numfit.formats.fitter import Fitter, shrink_factors
from numfit.formats.format import Format
from numfit.formats.learned import learn_levels, plain
from numfit.formats.params import CHUNK, Params, row_chunks
from numfit.formats.scale import FP16_MAX, Scale
from numfit.formats.trellis import Trellis
from numfit.formats.trellis_codec import start_scale

SCALE_RULES = ("mse", "absmax", "floor", "ceil")
_NATIVE_CHUNK = 1 << 23  # weights fitted at a time by the compiled pass; CHUNK eagerly
_PALETTE_BLOCKS = 1 << 15  # blocks that a palette is chosen on


def fit(fmt: Format, w: Tensor, importance: Tensor | None = None, scale_rule: str = "mse") -> Params:
    """Choose the parameters of least (weighted) squared error.

    Args:
        w: weights [R, K], any float type.
        importance: weight of each input channel's squared error [K], not negative, or None for equal weights.
        scale_rule: "mse" searches; "absmax" maps the largest magnitude to the largest level ("floor" on e8m0 scales);
            "floor" and "ceil" name the two OCP rules and apply to e8m0 scales alone.

    Raises:
        FormatError: an unknown rule, or one that does not apply to this format.
    """
    if scale_rule not in SCALE_RULES or (scale_rule in ("floor", "ceil") and fmt.scale.store != "e8m0"):
        allowed = "mse, absmax" + (", floor, ceil" if fmt.scale.store == "e8m0" else "")
        raise FormatError(f"the scale rule '{scale_rule}' does not apply to {fmt.name}; choose one of {allowed}")
    if fmt.trellis is not None:
        return _fit_trellis(fmt.trellis, w, scale_rule)
    h = None if importance is None else normalized_importance(importance.to(w.device))
    if fmt.learned:
        one = torch.ones((len(w), 1), dtype=torch.float32, device=w.device)
        start = fit(plain(fmt), w, importance, scale_rule) if fmt.scaled else Params(one)
        return learn_levels(fmt, w, h, start)
    palette = None
    if fmt.palette:
        palette = _palette(fmt, w, h)
        fmt = replace(fmt, members=tuple(fmt.members[i] for i in palette.tolist()), palette=0)
    rows, k = w.shape
    fitter = Fitter(fmt, h, scale_rule, w.device, w.numel())
    tensor_parent = _tensor_parent(fmt, w) if fmt.scale.parent == "tensor" else None
    if fmt.block == "tensor":
        params = _fit_one_scale(fmt, fitter, w)
    elif fmt.unit == "tensor" and fmt.member_count > 1:
        params = _fit_one_member(fitter, w, tensor_parent)
    else:
        chunk = CHUNK if fitter.native is None else _NATIVE_CHUNK
        parts = [fitter.chunk(w[s].float(), tensor_parent) for s in row_chunks(rows, k, chunk)]
        params = _join(fmt, k, parts, w.device)
        if tensor_parent is not None:
            params = replace(params, parent=tensor_parent)
    return params if palette is None else replace(params, palette=palette)


def _fit_trellis(trellis: Trellis, w: Tensor, scale_rule: str) -> Params:
    """The scale of each row from its deviation; importance says nothing to a code that treats all columns alike."""
    if scale_rule != "mse":
        raise FormatError(f"the scale rule '{scale_rule}' does not apply to {trellis.name}; choose mse")
    scale = start_scale(trellis, w).clamp_max(FP16_MAX).to(torch.float16).float()
    return Params(scale[:, None])


def normalized_importance(h: Tensor) -> Tensor:
    """Importance in units of its mean, so that its magnitude neither overflows nor underflows fp32 sums.

    Dead channels keep a millionth of the mean, so that a block of them still gets a sensible scale.
    """
    h = h.double()
    mean = h.mean()
    return torch.where(mean > 0, h / mean, torch.ones_like(h)).clamp_min(1e-6).float()


def _ends(w: Tensor) -> Tensor:
    """Least and largest weight, fp32 [1, 2]; zeros where there is none."""
    if w.numel() == 0:
        return torch.zeros((1, 2), dtype=torch.float32, device=w.device)
    return torch.stack(torch.aminmax(w)).float().view(1, 2)


def _tensor_parent(fmt: Format, w: Tensor) -> Tensor:
    """fp32 [1, 1]: the block that holds the largest weight gets a stored scale of `cap`."""
    low, high = _ends(w)[0]
    amax = high.clamp_min(0) - low.clamp_max(0) if fmt.zero else torch.maximum(high, -low)
    least = min(grid.max_level for grid in fmt.members)
    parent = amax / (least * fmt.scale.cap)
    return torch.where(parent > 0, parent.clamp_min(2.0**-126), torch.ones_like(parent)).view(1, 1)


def _join(fmt: Format, k: int, parts: list[Params], device: torch.device) -> Params:
    if not parts:
        g = fmt.geometry(k)
        empty = torch.empty((0, g.blocks), dtype=torch.float32, device=device)
        units = torch.empty((0, g.units), dtype=torch.uint8, device=device) if fmt.member_bits else None
        parent = torch.empty((0, 1), dtype=torch.float32, device=device) if fmt.scale.parent == "row" else None
        return Params(empty, parent, units, empty if fmt.zero else None)

    def cat(name: str) -> Tensor | None:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else torch.cat(values)

    scale = cat("scale")
    assert scale is not None
    return Params(scale, cat("parent"), cat("member"), cat("zero"))


def _fit_one_member(fitter: Fitter, w: Tensor, tensor_parent: Tensor | None) -> Params:
    """One member for the tensor (ANT): the least sum, over all blocks, of the member's best errors."""
    total = torch.zeros(fitter.fmt.member_count, dtype=torch.float64, device=w.device)
    kept = []
    for s in row_chunks(*w.shape):
        err, best = fitter.each_member(w[s].float(), tensor_parent)
        total += err.double().sum((0, 1))
        kept.append(best)  # [r, blocks, M]
    member = total.argmin()
    blocks = fitter.fmt.geometry(w.shape[1]).blocks
    empty = torch.empty((0, blocks), dtype=torch.float32, device=w.device)
    scale = torch.cat(kept)[..., member] if kept else empty
    return Params(scale.contiguous(), tensor_parent, member.view(1, 1).to(torch.uint8))


def _fit_one_scale(fmt: Format, fitter: Fitter, w: Tensor) -> Params:
    """One scale for the tensor: every candidate is scored on all rows."""
    ends = _ends(w)
    if fmt.zero:
        return _fit_one_affine(fitter, w, ends)
    amax = ends.abs().amax(1)
    stored, scale = fitter.stored(fitter.wanted(amax, 0, fitter.candidates), None, False)  # [1, M, C]
    total = torch.zeros(scale.shape[1:], dtype=torch.float64, device=w.device)
    for s in row_chunks(*w.shape):
        total += fitter.row_errors(w[s].float(), scale[0]).double().sum(0)
    m, c = divmod(int(total.argmin()), total.shape[1])
    member = None
    if fitter.small_units:
        parts = [fitter.choose(w[s].float(), scale[:, m, c].view(1, 1)) for s in row_chunks(*w.shape)]
        units = fmt.geometry(w.shape[1]).units
        member = torch.cat(parts) if parts else torch.empty((0, units), dtype=torch.uint8, device=w.device)
    elif fmt.member_count > 1:
        member = torch.full((1, 1), m, dtype=torch.uint8, device=w.device)
    return Params(stored[:, m, c].view(1, 1), None, member)


def _fit_one_affine(fitter: Fitter, w: Tensor, ends: Tensor) -> Params:
    top = float((1 << fitter.fmt.bits) - 1)
    low, high = ends[:, 0].clamp_max(0), ends[:, 1].clamp_min(0)
    shrink = shrink_factors(fitter.rule, w.device)
    stored, scale = fitter.stored(((high - low) / top)[:, None] * shrink, None, False)
    zero = (-low[:, None] * shrink / scale).round().clamp(0, top)  # [1, C]
    total = torch.zeros(len(shrink), dtype=torch.float64, device=w.device)
    for s in row_chunks(*w.shape):
        total += fitter.row_errors(w[s].float(), scale, zero).double().sum((0, 1))
    best = total.argmin().view(1, 1)
    return Params(stored.gather(1, best), None, None, zero.gather(1, best))


def _palette(fmt: Format, w: Tensor, h: Tensor | None) -> Tensor:
    """Greedy palette (mant-family.md 2.5): add the candidate that lowers the summed error of absmax blocks most.

    Scored on about 2**15 blocks, taken from rows at even distances.
    """
    wide = replace(fmt, palette=0, scale=Scale(), member_home="plane")
    fitter = Fitter(wide, h, "absmax", w.device, 0)
    blocks = fmt.geometry(w.shape[1]).blocks
    rows = w[:: max(1, len(w) * blocks // _PALETTE_BLOCKS)]
    found = [fitter.each_member(rows[s].float(), None)[0].flatten(0, 1) for s in row_chunks(len(rows), w.shape[1], CHUNK // 8)]
    if not found:
        return torch.arange(fmt.palette, device=w.device)
    err = torch.cat(found).double()  # [blocks, candidates]
    chosen: list[int] = []
    current = torch.full((len(err), 1), torch.inf, dtype=torch.float64, device=w.device)
    for _ in range(fmt.palette):
        gain = torch.minimum(err, current).sum(0)
        if chosen:
            gain[chosen] = torch.inf
        chosen.append(int(gain.argmin()))
        current = torch.minimum(current, err[:, chosen[-1:]])
    return torch.tensor(sorted(chosen), device=w.device)
