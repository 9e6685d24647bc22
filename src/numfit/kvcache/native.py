"""The packed part of attention by the compiled kernel (kernels/cpu/attend.h), for a few queries on a CPU.

It takes streams of 2, 3, 4 or 8 bits with fp16 scales: uniform codes, rotated tables, and numfit types of up to 4 bits with a
member per 64 values or more, along tokens or channels. `attend` is None for whatever else, and PyTorch's path does that.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.errors import NumfitError
from numfit.formats.nearest import tables
from numfit.kvcache import codebook
from numfit.kvcache.coders import LloydMax, Uniform
from numfit.kvcache.store import Snapshot, block_tokens
from numfit.kvcache.stream import Stream
from numfit.kvcache.typed import Typed
from numfit.native import ERROR_BYTES, declare, library, set_threads

QUERIES = 16  # of a head of keys; more are faster as a matrix product of decoded blocks
_LEVELS = 16


class _Stream(ctypes.Structure):
    """`nf_stream`"""

    _fields_ = (
        ("bits", c_int32), ("channel", c_int32), ("row", c_int64), ("group", c_int64), ("unit", c_int64), ("members", c_int32),
        ("member_bits", c_int32), ("zero", c_int32), ("reserved", c_int32), ("levels", c_void_p), ("codes", c_void_p),
        ("scale", c_void_p), ("low", c_void_p), ("member", c_void_p),
    )  # fmt: skip


declare(
    "nf_attend", c_int, POINTER(_Stream), POINTER(_Stream), *[c_int64] * 6, *[c_void_p] * 3, c_int64, *[c_void_p] * 3, c_char_p
)


class Kind(NamedTuple):
    """How the kernel reads a stream's rows."""

    bits: int
    row: int
    group: int
    unit: int
    member_bits: int
    zero: int
    levels: Tensor | None  # fp32 [members, 16]


@lru_cache(maxsize=64)
def kind(stream: Stream, dim: int) -> Kind | None:
    """What the kernel needs to know of a stream; None where it cannot read it."""
    row, coder = stream.row(dim), stream.coder
    if stream.outliers or stream.polar or row not in (32, 64, 128, 256) or dim % 16 or dim > 256:
        return None
    if isinstance(coder, Uniform):
        group = min(coder.group, row)
        if coder.bits not in (2, 3, 4, 8) or group & (group - 1) or group < 16:
            return None
        zero = 1 << (coder.bits - 1) if coder.symmetric else 0
        levels = torch.arange(_LEVELS, device="cpu") % (1 << coder.bits) - zero if coder.bits < 8 else None
        return Kind(coder.bits, row, group, 0, 0, zero, None if levels is None else levels.float().view(1, -1))
    if isinstance(coder, LloydMax) and coder.levels in (4, 8, 16):
        levels = codebook.sphere(coder.levels, row).repeat(_LEVELS // coder.levels).view(1, -1)
        return Kind((coder.levels - 1).bit_length(), row, row, 0, 0, 0, levels)
    if isinstance(coder, Typed):
        fmt = coder.at(row)
        g = fmt.geometry(row)
        shared = fmt.member_count == 1
        fits = fmt.bits in (2, 3, 4) and fmt.scale.store == "fp16" and not (fmt.zero or fmt.spare or fmt.palette)
        blocks = g.block >= 16 and not g.block & (g.block - 1) and row % g.block == 0
        if not fits or not blocks or not (shared or (g.unit >= 64 and g.unit == g.block)):
            return None
        table = tables(fmt.members, fmt.rounding, torch.device("cpu")).levels.float().view(len(fmt.members), -1)
        bits = fmt.member_bits
        if not torch.isfinite(table).all():
            return None
        levels = table.repeat(1, _LEVELS // table.shape[1]).contiguous()
        return Kind(fmt.bits, row, g.block, 0 if shared else g.unit, bits, 0, levels)
    return None


def _pointers(tokens: Snapshot, name: str, blocks: int) -> ctypes.Array | None:
    """The addresses of a plane of the first blocks."""
    if name not in tokens.blocks[0]:
        return None
    return (c_void_p * blocks)(*(block[name].data_ptr() for block in tokens.blocks[:blocks]))


def _describe(tokens: Snapshot, how: Kind, blocks: int) -> tuple[_Stream, list[object]]:
    """The stream for the kernel, and what must live as long."""
    arrays = [_pointers(tokens, name, blocks) for name in ("codes", "scale", "low", "member")]
    out = _Stream(
        how.bits, tokens.stream.axis == "channel", how.row, how.group, how.unit, 1 if how.levels is None else len(how.levels),
        how.member_bits, how.zero, 0, None if how.levels is None else how.levels.data_ptr(),
        *(None if a is None else ctypes.cast(a, c_void_p) for a in arrays),
    )  # fmt: skip
    return out, [*arrays, how.levels]


def attend(query: Tensor, keys: Snapshot, values: Snapshot, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Attention over the tokens that are packed in keys and values both.

    Args:
        query: fp32 [B, H, Q, D], scaled, in the basis of the keys; later than all packed tokens.
        mask: as in `numfit.kvcache.attention.attend`, or None.

    Returns:
        (largest score [B, H, Q, 1], sum of weights [B, H, Q, 1], weighted values in their basis [B, H, Q, Dv]), or None
        where the kernel cannot do it.
    """
    batch, heads, count, dim = query.shape
    tokens = min(keys.count, values.count)
    if count > QUERIES or tokens == 0 or query.device.type != "cpu" or keys.sink != values.sink:
        return None
    if query.dtype != torch.float32 or any(t.blocks[0]["codes"].shape[:2] != (batch, heads) for t in (keys, values)):
        return None
    of_keys, of_values = (kind(t.stream, t.dim) for t in (keys, values))
    block = block_tokens(keys.stream)
    if of_keys is None or of_values is None or block != block_tokens(values.stream) or "mean" in values.const:
        return None
    if tokens % keys.stream.unit or tokens % values.stream.unit or tokens % 16:
        return None
    lib = library()
    if lib is None:
        return None
    added = None
    if mask is not None:
        part = mask[..., keys.sink : keys.sink + tokens]
        if part.shape[1] > 1 or (part.shape[2] > 1 and not bool((part == part[:, :, :1]).all())):
            return None
        part = part[:, 0, 0].expand(batch, tokens)
        if part.dtype == torch.bool:
            added = torch.zeros_like(part, dtype=torch.float32).masked_fill_(~part, -torch.inf).contiguous()
        else:
            added = part.float().contiguous()
    query = query.contiguous()
    bias = None
    if "mean" in keys.const:  # q · (k + μ) = q · k + q · μ
        bias = (query * keys.const["mean"].float().unsqueeze(2)).sum(-1).contiguous()
    if "order" in keys.const:  # the queries follow their keys
        query = query.gather(-1, keys.const["order"].long().unsqueeze(2).expand_as(query)).contiguous()
    blocks = -(-tokens // block)
    key_stream, held = _describe(keys, of_keys, blocks)
    value_stream, also_held = _describe(values, of_values, blocks)
    most = query.new_empty((batch, heads, count, 1))
    total = torch.empty_like(most)
    out = query.new_empty((batch, heads, count, values.dim))
    set_threads(torch.get_num_threads())
    error = ctypes.create_string_buffer(ERROR_BYTES)
    address = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    failed = lib.nf_attend(
        byref(key_stream), byref(value_stream), batch * heads, count, dim, values.dim, tokens, block, query.data_ptr(),
        address(bias), address(added), heads, most.data_ptr(), total.data_ptr(), out.data_ptr(), error,
    )  # fmt: skip
    del held, also_held
    if failed:
        raise NumfitError(error.value.decode())
    if "order" in values.const:
        out = torch.zeros_like(out).scatter(-1, values.const["order"].long().unsqueeze(2).expand_as(out), out)
    most = torch.where(total > 0, most, -torch.inf)
    return most, total, out
