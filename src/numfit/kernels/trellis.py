"""Matrices of trellis codes in the layout of the CPU kernels (cpu/trellis.h), and the way back; `PackedLinear` applies them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.formats.trellis import LEVEL, Trellis
from numfit.native import ERROR_BYTES, declare, library, refusal


class _Matrix(ctypes.Structure):
    """`nf_trellis_matrix`"""

    _fields_ = (
        ("rows", c_int64), ("cols", c_int64), ("k", c_int32), ("bits", c_int32), ("hashed", c_int32), ("reserved", c_int32),
        ("masks", c_void_p), ("levels", c_void_p), ("codes", c_void_p), ("scale", c_void_p), ("level", c_float),
    )  # fmt: skip


declare("nf_trellis_repack", c_void_p, POINTER(_Matrix), c_char_p)
declare("nf_trellis_unpack", c_int, c_void_p, c_void_p, c_char_p)


def repack(trellis: Trellis, shape: tuple[int, int], stream: Tensor, scale: Tensor) -> int:
    """Handle of an `nf_linear` that the caller frees.

    Args:
        trellis: the code.
        shape: (N, K).
        stream: uint8 [stream_bytes] on the CPU.
        scale: [N], any float type.

    Raises:
        FormatError: what the library refused. OptionError: it is not installed.
    """
    lib = library()
    if lib is None:
        raise OptionError("the CPU kernels are not installed; the reference path (QuantizedTensor) needs none")
    n, k = shape
    if stream.numel() != trellis.stream_bytes(n, k) or scale.numel() != n:
        raise FormatError(f"{trellis.name} of shape {shape} does not fit {stream.numel()} bytes and {scale.numel()} scales")
    masks = torch.tensor(trellis.masks or (0,), dtype=torch.int16, device="cpu")
    levels = torch.tensor(trellis.levels, dtype=torch.int8, device="cpu")
    stream, scale = stream.contiguous(), scale.float().contiguous()
    matrix = _Matrix(
        n, k, trellis.bits, trellis.state_bits, len(trellis.masks), 0, masks.data_ptr(), levels.data_ptr(), stream.data_ptr(),
        scale.data_ptr(), LEVEL,
    )  # fmt: skip
    error = ctypes.create_string_buffer(ERROR_BYTES)
    lib.nf_set_threads(torch.get_num_threads())
    handle = lib.nf_trellis_repack(byref(matrix), error)
    if not handle:
        raise FormatError(f"{trellis.name} has no CPU kernel for {shape}: {error.value.decode()}")
    return int(handle)


def unpack(trellis: Trellis, shape: tuple[int, int], handle: int) -> Tensor:
    """The stream as the file had it: uint8 [stream_bytes]."""
    lib = library()
    assert lib is not None
    stream = torch.empty(trellis.stream_bytes(*shape), dtype=torch.uint8, device="cpu")
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if failed := lib.nf_trellis_unpack(handle, stream.data_ptr(), error):
        raise refusal(failed, error, OptionError)
    return stream
