"""Verbs of trellis codes: encode, decode, pack, unpack, and what they cost in rows at the edges of a matrix.

Symbols are handled like the codes of other formats, one a byte, [N, K]; but they can only be found tile by tile, and a symbol
alone means nothing. On a CPU the compiled library encodes (kernels/cpu/trellis.h); trellis_viterbi.py gives the same symbols
everywhere. `decode_scalar` is the definition, bit by bit, on which all tests hang.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from numfit.errors import CheckpointError, FormatError
from numfit.formats.packing import pack_bits, packed_bytes, unpack_bits
from numfit.formats.trellis import LEVEL, TILE_COLS, TILE_ROWS, Trellis
from numfit.formats.trellis_viterbi import UNIT, circle_states, costs_table, encode_circles, tiles_of, untile
from numfit.native import ERROR_BYTES, declare, library, refusal

HEADROOM = 1.04  # scale for encoding over the deviation of a row: 0.02 dB better than 1 at two bits, 0.1 dB at four
_FP16_MAX = 65504.0
_CHUNK = 1 << 20  # weights decoded at a time


class _Code(ctypes.Structure):
    """`nf_trellis`"""

    _fields_ = (("k", c_int32), ("bits", c_int32), ("table", c_void_p), ("levels", c_void_p))


_call = (c_void_p, c_int64, c_int64)  # pointer, rows, columns
declare("nf_trellis_encode", c_int, POINTER(_Code), *_call, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_char_p)
declare("nf_trellis_decode", c_int, POINTER(_Code), *_call, c_void_p, c_char_p)


class Region(NamedTuple):
    """Tiles of one size in a matrix."""

    rows: slice
    cols: slice
    height: int
    width: int


def regions(rows: int, row: int) -> Iterator[Region]:
    """A matrix as runs of equal tiles: whole ones, the strip at the right, the row of tiles below, the corner."""
    whole_rows, whole_cols = rows - rows % TILE_ROWS, row - row % TILE_COLS
    for r in (slice(0, whole_rows), slice(whole_rows, rows)):
        for c in (slice(0, whole_cols), slice(whole_cols, row)):
            if r.stop > r.start and c.stop > c.start:
                yield Region(r, c, min(TILE_ROWS, r.stop - r.start), min(TILE_COLS, c.stop - c.start))


def start_scale(t: Trellis, w: Tensor) -> Tensor:
    """Scale of each row [N, K] → fp32 [N] with which to encode it."""
    rms = w.float().pow(2).mean(1).sqrt()
    return rms * (HEADROOM / (t.deviation * LEVEL))


def encode(t: Trellis, w: Tensor, scale: Tensor) -> Tensor:
    """Symbols of rows under given scales: w fp32 [N, K], scale fp32 [N] → uint8 [N, K]."""
    return encode_values(t, w, scale)[0]


def encode_values(t: Trellis, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As `encode`, and the levels that the symbols decode to: (uint8 [N, K], int8 [N, K])."""
    return encoder(t, scale)(w.float())


def encoder(t: Trellis, scale: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`encode_values` for rows of given scales, prepared once for many runs of columns, all but the last multiples of four."""
    inverse = UNIT / (scale.float() * (LEVEL * t.deviation))
    inverse = torch.where((scale > 0) & torch.isfinite(inverse), inverse, 0.0).contiguous()
    table = costs_table(t.table, t.deviation)
    lib = library() if scale.device.type == "cpu" else None
    if lib is None:
        return partial(_encode_eager, t, table.to(scale.device), inverse)
    levels, error = t.table, ctypes.create_string_buffer(ERROR_BYTES)
    code = _Code(t.bits, t.state_bits, table.data_ptr(), levels.data_ptr())
    lib.nf_set_threads(torch.get_num_threads())

    def encode_native(w: Tensor, keep: object = (table, levels)) -> tuple[Tensor, Tensor]:
        n, k = w.shape
        w = w if w.stride(1) == 1 and w.stride(0) >= k else w.contiguous()
        symbols, values = w.new_empty((n, k), dtype=torch.uint8), w.new_empty((n, k), dtype=torch.int8)
        where = (w.data_ptr(), n, k, max(w.stride(0), k), inverse.data_ptr(), symbols.data_ptr(), values.data_ptr(), k)
        if failed := lib.nf_trellis_encode(byref(code), *where, error):
            raise refusal(failed, error)
        return symbols, values

    return encode_native


def _encode_eager(t: Trellis, table: Tensor, inverse: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    symbols = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    v = (w * inverse[:, None]).clamp(-32767, 32767).round().to(torch.int16)
    for r in regions(*w.shape):
        tiles = tiles_of(v[r.rows, r.cols], r.height, r.width)
        found = encode_circles(table, t.bits, tiles.reshape(-1, r.height * r.width))
        symbols[r.rows, r.cols] = untile(found.view(tiles.shape), r.height, r.width)
    return symbols, decode_levels_eager(t, symbols)


def decode_levels(t: Trellis, symbols: Tensor) -> Tensor:
    """Levels of symbols [N, K]: int8 [N, K]."""
    n, k = symbols.shape
    out = torch.empty((n, k), dtype=torch.int8, device=symbols.device)
    if symbols.device.type == "cpu" and (lib := library()) is not None:
        symbols, levels = symbols.contiguous(), t.table
        code = _Code(t.bits, t.state_bits, None, levels.data_ptr())
        error = ctypes.create_string_buffer(ERROR_BYTES)
        lib.nf_set_threads(torch.get_num_threads())
        if failed := lib.nf_trellis_decode(byref(code), symbols.data_ptr(), n, k, out.data_ptr(), error):
            raise refusal(failed, error)
        return out
    return decode_levels_eager(t, symbols)


def decode_levels_eager(t: Trellis, symbols: Tensor) -> Tensor:
    """`decode_levels` in PyTorch alone."""
    out = torch.empty(symbols.shape, dtype=torch.int8, device=symbols.device)
    table = t.table.to(symbols.device)
    for r in regions(*symbols.shape):
        tiles = tiles_of(symbols[r.rows, r.cols], r.height, r.width)
        values = table[circle_states(tiles, t.bits, t.state_bits)]
        out[r.rows, r.cols] = untile(values, r.height, r.width)
    return out


def decode(t: Trellis, symbols: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of symbols [N, K] and scales [N]: one product in fp32, rounded once to `dtype`."""
    out = torch.empty(symbols.shape, dtype=dtype, device=symbols.device)
    step = TILE_ROWS * max(1, _CHUNK // (TILE_ROWS * max(1, symbols.shape[1])))
    for start in range(0, len(symbols), step):
        s = slice(start, start + step)
        out[s] = scale[s].float()[:, None] * (decode_levels(t, symbols[s]).float() * LEVEL)
    return out


def decode_rows(t: Trellis, stream: Tensor, scale: Tensor, shape: tuple[int, int], rows: Tensor) -> Tensor:
    """Some rows of a matrix [N, K], by decoding the tiles that they lie in: numbers int64 [r], scale [N] → fp32 [r, K]."""
    k = shape[1]
    tiles, place = torch.unique(rows // TILE_ROWS, return_inverse=True)
    part, heights = streams_of_tiles(t, stream, shape, tiles)
    symbols = unpack(t, part, int(heights.sum()), k)
    starts = heights.cumsum(0) - heights
    found = starts.to(rows.device)[place] + rows % TILE_ROWS
    return scale[rows].float()[:, None] * (decode_levels(t, symbols)[found].float() * LEVEL)


def streams_of_tiles(t: Trellis, stream: Tensor, shape: tuple[int, int], tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of some rows of tiles, ascending, and the heights of these tiles: a short one can only be the last."""
    n, k = shape
    size = t.stream_bytes(TILE_ROWS, k)
    whole = tiles[tiles < n // TILE_ROWS]
    parts = [stream[: n // TILE_ROWS * size].view(-1, size)[whole].flatten()]
    heights = torch.full((len(tiles),), TILE_ROWS, device="cpu")
    if len(whole) < len(tiles):
        parts.append(stream[n // TILE_ROWS * size :])
        heights[-1] = n % TILE_ROWS
    return torch.cat(parts), heights


def refit(t: Trellis, w: Tensor, levels: Tensor, h: Tensor | None, start: Tensor) -> Tensor:
    """Best scale of each row for fixed symbols, s = (w H q) / (q H q), as stored: fp16 [N].

    Args:
        w: [N, K], what the row should be.
        levels: int8 [N, K].
        h: [K, K], or None for the identity.
        start: fp32 [N], kept where the formula says nothing (rows of zeros) or something that is not positive.

    Raises:
        FormatError: a scale that fp16 cannot hold.
    """
    q = levels.float() * LEVEL
    hq = q if h is None else q @ h
    over, under = (w.float() * hq).sum(1), (q * hq).sum(1)
    best = over / under
    scale = torch.where(torch.isfinite(best) & (best > 0), best, start.float())
    if bool((scale > _FP16_MAX).any()):
        raise FormatError(
            f"a row of the weight needs the scale {float(scale.max()):.4g}, but fp16 ends at {_FP16_MAX:.0f}; repair the "
            "source, or skip this tensor"
        )
    return scale.to(torch.float16)


def pack(t: Trellis, symbols: Tensor) -> Tensor:
    """Symbols [N, K] as the file has them: uint8 [stream_bytes]."""
    n, k = symbols.shape
    rows: dict[int, list[Tensor]] = {}
    for r in regions(n, k):
        stream = pack_bits(tiles_of(symbols[r.rows, r.cols], r.height, r.width), t.bits)  # [a, b, bytes]
        rows.setdefault(r.rows.start, []).append(stream.flatten(1))
    return torch.cat([torch.cat(parts, 1).flatten() for parts in rows.values()])


def unpack(t: Trellis, stream: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack`: uint8 [N, K].

    Raises:
        CheckpointError: the stream is of another length.
    """
    if stream.numel() != t.stream_bytes(n, k):
        raise CheckpointError(f"{t.name} stores [{n}, {k}] in {t.stream_bytes(n, k)} bytes, not {stream.numel()}")
    out = torch.empty((n, k), dtype=torch.uint8, device=stream.device)
    start = 0
    found = list(regions(n, k))
    for top in sorted({r.rows.start for r in found}):
        beside = [r for r in found if r.rows.start == top]
        a = (beside[0].rows.stop - top) // beside[0].height
        sizes = [packed_bytes(r.height * r.width, t.bits) * ((r.cols.stop - r.cols.start) // r.width) for r in beside]
        part = stream[start : start + a * sum(sizes)].view(a, sum(sizes))
        start += part.numel()
        for r, bytes_ in zip(beside, part.split(sizes, 1), strict=True):
            count = r.height * r.width
            tiles = unpack_bits(bytes_.reshape(-1, packed_bytes(count, t.bits)), t.bits, count)
            out[r.rows, r.cols] = untile(tiles.view(a, -1, count), r.height, r.width)
    return out


def decode_scalar(t: Trellis, stream: bytes, n: int, k: int) -> list[list[int]]:
    """Levels of a stream, weight by weight and bit by bit: the definition. For tests."""
    out = [[0] * k for _ in range(n)]
    start = 0
    for top in range(0, n, TILE_ROWS):
        height = min(TILE_ROWS, n - top)
        for left in range(0, k, TILE_COLS):
            width = min(TILE_COLS, k - left)
            length = height * width * t.bits
            for row in range(height):
                for col in range(width):
                    state = 0
                    for i in range(t.state_bits):
                        bit = ((row * width + col) * t.bits + i) % length
                        state |= (stream[start + bit // 8] >> bit % 8 & 1) << i
                    index = state
                    if t.masks:
                        index = 0
                        for mask in t.masks:
                            index = 2 * index + (state & mask).bit_count() % 2
                    out[top + row][left + col] = t.levels[index]
            start += (length + 7) // 8
    return out
