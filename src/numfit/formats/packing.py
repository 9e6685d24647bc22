"""Dense little-endian bit streams: how every plane of small integers lies on disk.

Value i of width b occupies bits [i·b, i·b + b) of its row's stream, least significant bit first; a row ends on a whole
byte and nothing else is padded (ams-pot-formats.md 8.1). For b = 4 this is "low nibble first". Kernels repack at load; this
layout only has to be simple, dense and the same everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values packed at a time: bounds the 8-byte intermediates


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` values."""
    return (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack along the last axis.

    Args:
        values: integers in [0, 2**bits), shape [..., n].
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(n·bits / 8)].
    """
    *lead, n = values.shape
    out_bytes = packed_bytes(n, bits)
    flat = values.reshape(-1, n)
    if bits == 8:
        return flat.to(torch.uint8).reshape(*lead, n).contiguous()
    group = 8 // math.gcd(8, bits)  # values that fill whole bytes together
    span = group * bits // 8
    out = torch.empty((flat.shape[0], out_bytes), dtype=torch.uint8, device=values.device)
    shifts = torch.arange(group, device=values.device) * bits
    byte_shifts = torch.arange(span, device=values.device) * 8
    rows = max(1, _CHUNK // max(n, 1))
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows].to(torch.int64)
        part = torch.nn.functional.pad(part, (0, -n % group))
        words = (part.view(part.shape[0], -1, group) << shifts).sum(-1)
        stream = ((words.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8)
        out[start : start + rows] = stream.view(part.shape[0], -1)[:, :out_bytes]
    return out.reshape(*lead, out_bytes)


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [..., bytes] → uint8 [..., count]."""
    *lead, n_bytes = stream.shape
    if n_bytes != packed_bytes(count, bits):
        raise ValueError(f"{count} values of {bits} bits need {packed_bytes(count, bits)} bytes a row, not {n_bytes}")
    if bits == 8:
        return stream
    flat = stream.reshape(-1, n_bytes)
    out = torch.empty((flat.shape[0], count), dtype=torch.uint8, device=stream.device)
    rows = max(1, _CHUNK // max(count, 1))
    if 8 % bits == 0:  # every value lies within one byte: no wide integers needed
        per_byte = 8 // bits
        for slot in range(per_byte):
            field = (flat >> (slot * bits)) & ((1 << bits) - 1)
            target = out[:, slot::per_byte]
            target.copy_(field[:, : target.shape[1]])
        return out.reshape(*lead, count)
    group = 8 // math.gcd(8, bits)
    span = group * bits // 8
    shifts = torch.arange(group, device=stream.device) * bits
    byte_shifts = torch.arange(span, device=stream.device) * 8
    for start in range(0, flat.shape[0], rows):
        wide = torch.int32 if span < 4 else torch.int64
        part = torch.nn.functional.pad(flat[start : start + rows].to(wide), (0, -n_bytes % span))
        words = (part.view(part.shape[0], -1, span) << byte_shifts.to(wide)).sum(-1, dtype=wide)
        values = ((words.unsqueeze(-1) >> shifts.to(wide)) & ((1 << bits) - 1)).to(torch.uint8)
        out[start : start + rows] = values.view(part.shape[0], -1)[:, :count]
    return out.reshape(*lead, count)
