"""Encode and decode: elementwise once the parameters are fixed.

    encode: u = w / s + zero (fp32), code = code of the nearest level of the unit's member
    decode: ŵ = s · (level − zero) (fp32), with s = fp32(scale · parent)

The order of operations and their fp32 rounding belong to every format and are pinned by golden vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numfit.formats.fit import Params, family, row_chunks
from numfit.formats.format import Format
from numfit.formats.fused import try_fused
from numfit.formats.nearest import CHAIN_MAX, rank, tables

_CHUNK = 1 << 18  # weights at a time: the intermediates stay in cache
FUSE_FROM = 1 << 27  # comparisons from which compiling them pays for itself


def _per_weight(values: Tensor, row: int, block: int, blocks: int) -> Tensor:
    """One value per run of neighbours → one per weight: [r, blocks] → [r, row] (or a broadcast of [1, 1])."""
    if values.shape[-1] == 1:
        return values
    if blocks * block == row:
        return values.unsqueeze(-1).expand(*values.shape, block).reshape(values.shape[0], row)
    return values.repeat_interleave(block, 1)[:, :row]


def _unit_of_column(fmt: Format, row: int, device: torch.device) -> Tensor:
    """Index of each column's unit: int64 [row]. Units restart at every block."""
    g = fmt.geometry(row)
    column = torch.arange(row, device=device)
    return column // g.block * -(-g.block // g.unit) + column % g.block // g.unit


def _member_per_weight(fmt: Format, member: Tensor, row: int) -> Tensor:
    g = fmt.geometry(row)
    if member.shape[-1] == 1:
        return member
    if g.block % g.unit == 0:
        return _per_weight(member, row, g.unit, g.units)
    return member[:, _unit_of_column(fmt, row, member.device)]


def _slice(values: Tensor, s: slice) -> Tensor:
    return values if len(values) == 1 else values[s]


def _rank_chain(u: Tensor, edges: Tensor) -> Tensor:
    """As `nearest.rank`, written for fusion: a sum of comparisons in fp32."""
    out = torch.zeros_like(u)
    for k in range(edges.shape[1]):
        out = out + torch.where(u > edges[:, k : k + 1], 1.0, 0.0)
    return out.to(torch.uint8)


def _rank_units(u: Tensor, edges: Tensor, fuse: bool) -> Tensor:
    fused = try_fused(_rank_chain, u, edges) if fuse else None
    return rank(u, edges) if fused is None else fused


def encode(fmt: Format, w: Tensor, params: Params) -> Tensor:
    """Nearest codes.

    Args:
        w: weights [R, K], finite.
        params: from `fit`, or any other values that the format can hold.

    Returns:
        uint8 [R, K].
    """
    rows, k = w.shape
    g = fmt.geometry(k)
    t = tables(family(fmt, params), fmt.rounding, w.device)
    effective = params.effective_scale()
    out = torch.empty((rows, k), dtype=torch.uint8, device=w.device)
    flat_codes = t.codes.flatten()
    # comparisons are exact, so fused and eager codes are equal; GPU kernels are launched fast enough unfused
    fuse = w.numel() * t.codes.shape[1] >= FUSE_FROM and w.device.type == "cpu"
    for s in row_chunks(rows, k, _CHUNK):
        u = w[s].float() / _per_weight(_slice(effective, s), k, g.block, g.blocks)
        if params.zero is not None:
            u = u + _per_weight(_slice(params.zero, s), k, g.block, g.blocks)
        if params.member is None or params.member.numel() == 1:
            m = 0 if params.member is None else int(params.member)
            out[s] = t.codes[m][rank(u, t.thresholds[m : m + 1]).int()]
            continue
        member = _member_per_weight(fmt, _slice(params.member, s), k)  # [r, K]
        if len(t.codes) <= 4 or t.thresholds.shape[1] > CHAIN_MAX:
            r = rank(u, t.thresholds[:1])
            for m in range(1, len(t.codes)):
                r = torch.where(member == m, rank(u, t.thresholds[m : m + 1]), r)
        else:
            r = torch.zeros_like(out[s])
            edges = t.thresholds[_slice(params.member, s).flatten().int()]  # [units, ranks - 1]
            if g.units * g.unit == k:
                r = _rank_units(u.view(-1, g.unit), edges, fuse).view(-1, k)
            else:
                column = _unit_of_column(fmt, k, w.device)
                wide = edges.view(len(u), g.units, -1)
                for i in range(wide.shape[-1]):
                    r += u > wide[:, :, i][:, column]
        out[s] = flat_codes[(member.int() * t.codes.shape[1] + r)]
    return out


def decode(fmt: Format, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes: uint8 [R, K] → `dtype` [R, K], computed in fp32."""
    rows, k = codes.shape
    g = fmt.geometry(k)
    levels = tables(family(fmt, params), fmt.rounding, codes.device).levels
    effective = params.effective_scale()
    out = torch.empty((rows, k), dtype=dtype, device=codes.device)
    for s in row_chunks(rows, k, _CHUNK):
        index = codes[s].int()
        if params.member is not None:
            index = index + (_member_per_weight(fmt, _slice(params.member, s), k).int() << fmt.bits)
        value = levels.view(-1)[index]
        if params.zero is not None:
            value = value - _per_weight(_slice(params.zero, s), k, g.block, g.blocks)
        out[s] = value * _per_weight(_slice(effective, s), k, g.block, g.blocks)
    return out
