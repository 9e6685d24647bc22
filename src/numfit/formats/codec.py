"""Encode and decode: elementwise once the parameters are fixed.

    encode: u = w / s + zero (fp32), code = code of the nearest level of the unit's member
    decode: ŵ = s · (level − zero) (fp32), with s = fp32(scale · parent)

The order of operations and their fp32 rounding belong to every format and are pinned by golden vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from numfit.formats.format import Format
from numfit.formats.fused import try_fused
from numfit.formats.learned import encode as encode_learned
from numfit.formats.nearest import CHAIN_MAX, rank, tables
from numfit.formats.onepass import encode as encode_in_one_pass
from numfit.formats.onepass import usable
from numfit.formats.params import Params, family, row_chunks
from numfit.formats.trellis_codec import decode as decode_trellis
from numfit.formats.trellis_codec import encode as encode_trellis

_CHUNK = 1 << 18  # weights at a time: the intermediates stay in cache
_NATIVE_CHUNK = 1 << 23  # the same where there are none, but for a copy in fp32
FUSE_FROM = 1 << 27  # comparisons from which compiling them pays for itself


def _spread(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, values: Tensor, run: int) -> Tensor:
    """operation(x, v) with one value per run of `run` neighbours: x [r, K], values [r, runs] (or [1, 1] for all)."""
    runs = values.shape[-1]
    if runs == 1:
        return operation(x, values)
    if runs * run == x.shape[-1]:  # broadcasting spares writing the values out
        return operation(x.reshape(len(x), runs, run), values.unsqueeze(-1)).view(x.shape)
    return operation(x, values.repeat_interleave(run, 1)[:, : x.shape[1]])


def _unit_of_column(fmt: Format, row: int, device: torch.device) -> Tensor:
    """Index of each column's unit: int64 [row]. Units restart at every block."""
    g = fmt.geometry(row)
    column = torch.arange(row, device=device)
    return column // g.block * -(-g.block // g.unit) + column % g.block // g.unit


def member_per_weight(fmt: Format, member: Tensor, row: int) -> Tensor:
    """Member index of each weight: [R, units] → [R, K], or [R, 1] where there is one."""
    g = fmt.geometry(row)
    if member.shape[-1] == 1:
        return member
    if g.block % g.unit == 0 or g.blocks == 1:
        return member.repeat_interleave(g.unit, 1)[:, :row]
    return member[:, _unit_of_column(fmt, row, member.device)]


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table.flatten()[index]; `index_select` is four times faster than indexing on a CPU."""
    return torch.index_select(table.view(-1), 0, index.int().reshape(-1)).view(index.shape)


def _slice(values: Tensor, s: slice) -> Tensor:
    return values if len(values) == 1 else values[s]


def _rank_chain(u: Tensor, edges: Tensor) -> Tensor:
    """As `nearest.rank`, written for fusion: a sum of comparisons in fp32."""
    out = torch.zeros_like(u)
    for k in range(edges.shape[1]):
        out = out + torch.where(u > edges[:, k : k + 1], 1.0, 0.0)
    return out.to(torch.uint8)


def _rank_chosen(u: Tensor, member: Tensor, edges: Tensor) -> Tensor:
    """Ranks where each weight names its member [r, K]: every member's chain, then a choice."""
    out = torch.zeros_like(u, dtype=torch.uint8)
    for m in range(edges.shape[0]):
        out = torch.where(member == m, _rank_chain(u, edges[m : m + 1]), out)
    return out


def _fused_or(eager: Callable[..., Tensor], fuse: bool, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    fused = try_fused(function, *args) if fuse else None
    return eager(*args) if fused is None else fused


def _rank_searched(u: Tensor, member: Tensor, edges: Tensor) -> Tensor:
    """As `_rank_chosen` by binary search."""
    out = rank(u, edges[:1])
    for m in range(1, len(edges)):
        out = torch.where(member == m, rank(u, edges[m : m + 1]), out)
    return out


def encode(fmt: Format, w: Tensor, params: Params) -> Tensor:
    """Nearest codes.

    Args:
        w: weights [R, K], finite.
        params: from `fit`, or any other values that the format can hold.

    Returns:
        uint8 [R, K].
    """
    if fmt.trellis is not None:
        return encode_trellis(fmt.trellis, w.float(), params.effective_scale()[:, 0])
    rows, k = w.shape
    g = fmt.geometry(k)
    if params.levels is not None:
        return encode_learned(w, params.levels, params.effective_scale(), g.block)
    t = tables(family(fmt, params), fmt.rounding, w.device)
    effective = params.effective_scale()
    out = torch.empty((rows, k), dtype=torch.uint8, device=w.device)
    if usable(w.device):
        for s in row_chunks(rows, k, _NATIVE_CHUNK):
            zero, member = (None if p is None else _slice(p, s) for p in (params.zero, params.member))
            out[s] = encode_in_one_pass(t, w[s].float(), g.block, g.unit, _slice(effective, s), zero, member)
        return out
    # comparisons are exact, so fused and eager codes are equal; GPU kernels are launched fast enough unfused
    fuse = w.numel() * t.codes.shape[1] >= FUSE_FROM and t.codes.shape[1] <= CHAIN_MAX and w.device.type == "cpu"
    for s in row_chunks(rows, k, _CHUNK):
        u = _spread(torch.div, w[s].float(), _slice(effective, s), g.block)
        if params.zero is not None:
            u = _spread(torch.add, u, _slice(params.zero, s), g.block)
        if params.member is None or params.member.numel() == 1:
            m = 0 if params.member is None else int(params.member)
            r = _fused_or(rank, fuse, _rank_chain, u, t.thresholds[m : m + 1])
            out[s] = _look_up(t.codes[m], r)
            continue
        member = member_per_weight(fmt, _slice(params.member, s), k)  # [r, K]
        if len(t.codes) <= 4 or t.thresholds.shape[1] > CHAIN_MAX:
            r = _fused_or(_rank_searched, fuse, _rank_chosen, u, member, t.thresholds)
        else:
            edges = t.thresholds[_slice(params.member, s).flatten().int()]  # [units, ranks - 1]
            if g.units * g.unit == k:
                r = _fused_or(rank, fuse, _rank_chain, u.reshape(-1, g.unit), edges).view(-1, k)
            else:
                r = torch.zeros_like(out[s])
                column = _unit_of_column(fmt, k, w.device)
                wide = edges.view(len(u), g.units, -1)
                for i in range(wide.shape[-1]):
                    r += u > wide[:, :, i][:, column]
        out[s] = _look_up(t.codes, member.int() * t.codes.shape[1] + r)
    return out


def level_tables(fmt: Format, params: Params, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Levels by code, fp32 [M, 2**bits], and which of these tables a weight takes: [R, units], or of one unit for a whole row,
    or of one element for all, or None for the first. Learned levels are a family that has a member for each row."""
    if params.levels is not None:
        return params.levels, torch.arange(len(params.levels), device=device)[:, None]
    return tables(family(fmt, params), fmt.rounding, device).levels, params.member


def decode(fmt: Format, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes: uint8 [R, K] → `dtype` [R, K], computed in fp32."""
    if fmt.trellis is not None:
        return decode_trellis(fmt.trellis, codes, params.effective_scale()[:, 0], dtype)
    rows, k = codes.shape
    g = fmt.geometry(k)
    levels, members = level_tables(fmt, params, codes.device)
    effective = params.effective_scale()
    out = torch.empty((rows, k), dtype=dtype, device=codes.device)
    by_unit = g.block % g.unit == 0 or g.blocks == 1
    for s in row_chunks(rows, k, _CHUNK):
        index = codes[s].int()
        if members is not None:
            member = _slice(members, s).int() << fmt.bits
            index = _spread(torch.add, index, member, g.unit) if by_unit else index + member_per_weight(fmt, member, k)
        value = _look_up(levels, index)
        if params.zero is not None:
            value = _spread(torch.sub, value, _slice(params.zero, s), g.block)
        out[s] = _spread(torch.mul, value, _slice(effective, s), g.block)
    return out
