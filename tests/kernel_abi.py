"""The C interface of the kernels as a C program would use it, for tests of memory and of bad input.

Everything that a kernel may read or write can be placed so that it ends (or begins) at a page nobody may touch, and
outputs stand between guard words.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch

from numfit.formats import QuantizedTensor
from numfit.native import ERROR_BYTES, Matrix, library

KINDS = {"fp16": 1, "bf16": 2, "e8m0": 3, "e4m3": 4, "u8": 5, "e3m3": 6}
POISON = np.uint32(0xFFDEADED)  # a NaN that no kernel computes
_LIBC = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE


class Fenced:
    """An array whose last byte (or first, with `front`) borders on a page that nobody may touch.

    An access beyond it ends the process: a test that passes has not made one.
    """

    def __init__(self, values: np.ndarray, front: bool = False) -> None:
        values = np.ascontiguousarray(values)
        inner = -(-max(values.nbytes, 1) // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, inner + 2 * _PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for fence in (base, base + _PAGE + inner):
            if _LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(_PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = _PAGE if front else _PAGE + inner - values.nbytes
        self.address = base + offset
        self.array = np.frombuffer(self._map, values.dtype, values.size, offset).reshape(values.shape)
        self.array[...] = values


def _words(store: str, stored: np.ndarray) -> np.ndarray:
    """Scale words of fp32 values that the store holds exactly."""
    if store == "fp16":
        return stored.astype(np.float16).view(np.uint16)
    if store == "bf16":
        return (stored.view(np.uint32) >> 16).astype(np.uint16)
    if store == "e8m0":
        return (np.frexp(stored)[1] + 126).astype(np.uint8)
    if store == "u8":
        return stored.astype(np.uint8)
    words = np.arange(64 if store == "e3m3" else 127)
    bias = 3 if store == "e3m3" else 7
    exponent, mantissa = words >> 3, words & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - bias - 3), mantissa * 2.0 ** (-bias - 2))
    return np.searchsorted(values, stored.astype(np.float64)).astype(np.uint8)


class Planes:
    """A quantized tensor [N, K] as nf_matrix wants it; `fence` puts every plane at the end (or start) of its memory."""

    def __init__(self, q: QuantizedTensor, fence: str | None = None) -> None:
        fmt = q.format
        rows, k = q.shape
        _, params = q.params()
        g = fmt.geometry(k)
        grids = fmt.members if params.palette is None else tuple(fmt.members[i] for i in params.palette.tolist())
        member = None if params.member is None else params.member.numpy()
        if member is not None and member.size == 1 and fmt.unit == "tensor":
            grids, member = (grids[int(member[0, 0])],), None
        per_row = isinstance(fmt.block, str)
        scale = params.effective_scale().numpy() if per_row else params.scale.numpy()
        parts: dict[str, np.ndarray | None] = {
            "codes": q.planes["codes"].numpy().reshape(rows, -1),
            "scale": np.ascontiguousarray(np.broadcast_to(scale, (rows, 1))) if per_row else _words(fmt.scale.store, scale),
            "parent": None,
            "member": member,
            "zero": None,
            "levels": np.array([grid.levels for grid in grids], dtype=np.float32),
        }
        if not per_row and params.parent is not None:
            parts["parent"] = np.ascontiguousarray(np.broadcast_to(params.parent.numpy(), (rows, 1)))
        if params.zero is not None:
            parts["zero"] = np.ascontiguousarray(np.broadcast_to(params.zero.numpy().astype(np.uint8), (rows, g.blocks)))
        self.parts: dict[str, Any] = {}
        self.matrix = Matrix(rows, k, fmt.bits, len(grids), g.block, g.unit, 0 if per_row else KINDS[fmt.scale.store])
        for name, value in parts.items():
            if value is None:
                continue
            kept: Any = np.ascontiguousarray(value)
            address = kept.ctypes.data
            if fence and kept.size:
                kept = Fenced(kept, fence == "front")
                address = kept.address
            self.parts[name] = kept
            setattr(self.matrix, name, address)


class Refused(Exception):
    """The library returned an error; the text is its sentence."""


class Linear:
    """A repacked matrix, through the C interface alone."""

    def __init__(self, planes: Planes) -> None:
        lib = library()
        assert lib is not None
        self.lib = lib
        self.rows, self.cols = int(planes.matrix.rows), int(planes.matrix.cols)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self.handle = self.lib.nf_repack(ctypes.byref(planes.matrix), error)
        if not self.handle:
            raise Refused(error.value.decode())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.nf_free(self.handle)
            self.handle = None

    @property
    def rounding(self) -> float:
        return float(self.lib.nf_linear_rounding(self.handle))

    def call(self, x: int, m: int, ldx: int, y: int, ldy: int, bias: int | None, mode: int, bf16: bool = False) -> None:
        """nf_apply at raw addresses."""
        error = ctypes.create_string_buffer(ERROR_BYTES)
        apply = self.lib.nf_apply_bf16 if bf16 else self.lib.nf_apply
        if apply(self.handle, x, m, ldx, y, ldy, bias, mode, error) != 0:
            raise Refused(error.value.decode())

    def apply(self, x: np.ndarray, bias: np.ndarray | None = None, exact: bool = False) -> np.ndarray:
        """x fp32 (or bf16 patterns as uint16) [M, K] → the same type [M, N]; the output is poisoned before the call."""
        x = np.ascontiguousarray(x)
        bf16 = x.dtype == np.uint16
        y = np.full((len(x), self.rows), 0xFFDE if bf16 else POISON, dtype=np.uint16 if bf16 else np.uint32)
        if not bf16:
            y = y.view(np.float32)
        b = None if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
        self.call(
            x.ctypes.data, len(x), self.cols, y.ctypes.data, self.rows, None if b is None else b.ctypes.data, int(exact), bf16
        )
        return y

    def gather(self, rows: np.ndarray) -> np.ndarray:
        index = np.ascontiguousarray(rows, dtype=np.int64)
        out = np.full((len(index), self.cols), POISON, dtype=np.uint32).view(np.float32)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self.lib.nf_gather(self.handle, index.ctypes.data, len(index), out.ctypes.data, error) != 0:
            raise Refused(error.value.decode())
        return out


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Patterns (uint16) of fp32 values rounded to bf16."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
