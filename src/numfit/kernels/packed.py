"""`PackedLinear`: a quantized matrix in the layout of the native CPU kernels.

The layout (cpu/layout.h) is made once, when a model is loaded, and is lossless: rows decode to the very numbers that the format
defines, and `unpack` gives the file's planes back. So nobody has to keep both.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.formats import Format, QuantizedTensor
from numfit.formats.packing import pack_bits, unpack_bits
from numfit.formats.params import family
from numfit.formats.scale import STORES, from_word, to_word, word_dtype
from numfit.kernels import trellis
from numfit.kernels.side import SideTerms
from numfit.native import ERROR_BYTES, Matrix, library, refusal

ACTIVATIONS = ("int8", "exact")  # positions are the modes of nf_apply
CHUNK = 1 << 24  # weights unpacked, or bf16 results made, at a time: bounds what is held beside them
_SCALE_KINDS = {"fp16": 1, "bf16": 2, "e8m0": 3, "e4m3": 4, "u8": 5, "e3m3": 6}  # enum nf_scale; 0: one fp32 a row


class PackedLinear:
    """A matrix [N, K] that the kernels own. Made by `pack`; freed with the object.

    Attributes:
        format: of the weights.
        shape: (N, K).
        handle: address of the `nf_linear`.
        key: what the torch operators call it. Compiled and exported graphs hold it and may outlive the matrix, also in another
            process: a number that is drawn once in a lifetime is missed then, where an address would be followed.
        kernel: what decodes it, in words.
        rounding: largest difference between an int8 level and the format's, over the largest level; 0 where levels are exact.
        side: side terms of the format, or None; `handle` is the base's matrix then.
    """

    def __init__(
        self, fmt: Format, shape: tuple[int, int], handle: int, kept: dict[str, Tensor], side: SideTerms | None = None
    ) -> None:
        lib = library()
        assert lib is not None
        self.format, self.shape, self.handle, self._kept, self._lib = fmt, shape, handle, kept, lib
        self.side = side
        self.kernel: str = lib.nf_linear_kernel(handle).decode() + (f", {side.kernel}" if side else "")
        self.rounding = float(lib.nf_linear_rounding(handle))
        self.key = secrets.randbits(62)
        _living[self.key] = self

    @staticmethod
    def pack(weight: QuantizedTensor) -> PackedLinear:
        """Bring a matrix on the CPU into the kernels' layout.

        Raises:
            FormatError: there is no kernel for it (the message says why), or its planes hold impossible values.
            CheckpointError: its planes do not fit its shape.
            OptionError: it is on another device, is no matrix, or the library is not installed.
        """
        lib = library()
        if lib is None:
            raise OptionError("the CPU kernels are not installed; the reference path (QuantizedTensor) needs none")
        if len(weight.shape) != 2:
            raise OptionError(f"kernels take matrices [N, K], not a weight of shape {tuple(weight.shape)}")
        if weight.planes["codes"].device.type != "cpu":
            raise OptionError(f"the CPU kernels cannot use a weight on '{weight.planes['codes'].device}'; move it to the CPU")
        if weight.format.learned:
            raise FormatError(
                f"{weight.format.name} has no CPU kernel: its levels differ from row to row, and kernels decode all rows by "
                "one table; PyTorch decodes it instead, which takes a multiple of the time"
            )
        weight = QuantizedTensor.from_planes(weight.format, weight.shape, weight.planes)
        side = SideTerms(weight) if weight.format.side else None
        n, k = weight.shape
        if weight.format.trellis is not None:
            scale = weight.planes["scale"]
            handle = trellis.repack(weight.format.trellis, (n, k), weight.planes["codes"], scale.view(-1))
            return PackedLinear(weight.format, (n, k), handle, {"scale": scale}, side)
        matrix, alive, kept = _matrix(weight.base())
        error = ctypes.create_string_buffer(ERROR_BYTES)
        lib.nf_set_threads(torch.get_num_threads())
        handle = lib.nf_repack(ctypes.byref(matrix), error)
        del alive
        if not handle:
            raise FormatError(f"{weight.format.name} has no CPU kernel for {tuple(weight.shape)}: {error.value.decode()}")
        return PackedLinear(weight.format, (n, k), handle, kept, side)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.nf_free(self.handle)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[QuantizedTensor]]:
        return PackedLinear.pack, (self.unpack(),)  # copies and pickles go through the planes

    def __repr__(self) -> str:
        return f"PackedLinear({self.format.name}, shape={self.shape}, {self.kernel})"

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in memory."""
        beside = sum(plane.nbytes for plane in self._kept.values()) + (self.side.nbytes if self.side else 0)
        return int(self._lib.nf_linear_bytes(self.handle)) + beside

    @property
    def huge_pages(self) -> bool:
        """Whether the system was asked for huge pages for it, and agreed."""
        return bool(self._lib.nf_huge_pages(self.handle))

    def apply(self, x: Tensor, bias: Tensor | None = None, activations: str = "int8") -> Tensor:
        """x · Ŵᵀ + bias.

        Args:
            x: [..., K] on the CPU, any float type.
            bias: [N].
            activations: "int8" quantizes x on the fly, a scale per token and group of at most 64 columns; "exact" does not.
                Inputs are rotated before, where the format says so. A token with NaN or Inf gets NaN results.

        Returns:
            [..., N] in the type of `x`; sums are fp32.

        Raises:
            OptionError: another device, another K, a bias of another size, an unknown mode, a gradient asked for.
        """
        n, k = self.shape
        if x.shape[-1:] != (k,) or not x.is_floating_point():
            raise OptionError(f"this matrix takes float activations [..., {k}], not {x.dtype} {tuple(x.shape)}")
        for what, tensor in (("activations", x), ("a bias", bias)):
            if tensor is not None and tensor.device.type != "cpu":
                raise OptionError(
                    f"the CPU kernels cannot use {what} on '{tensor.device}'; move model and inputs to one device"
                )
        if bias is not None and tuple(bias.shape) != (n,):
            raise OptionError(f"a bias of this matrix has shape ({n},), not {tuple(bias.shape)}")
        if activations not in ACTIVATIONS:
            raise OptionError(f"activations are one of {', '.join(ACTIVATIONS)}, not '{activations}'")
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise OptionError("the CPU kernels have no backward pass; call them under torch.no_grad(), or decode the weights")
        return torch.ops.numfit.linear(x, self.key, n, bias, activations == "exact")

    def rows(self, index: Tensor | slice) -> Tensor:
        """Decoded rows, bit for bit what `QuantizedTensor.dequantize` gives: fp32 [n, K].

        Raises:
            OptionError: a row that does not exist; numbers that are no integers, or on another device.
        """
        if isinstance(index, slice):
            index = torch.arange(self.shape[0], device="cpu")[index]
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise OptionError(f"rows are chosen by integers, not by {index.dtype}")
        if index.device.type != "cpu":
            raise OptionError(
                f"the CPU kernels cannot use row numbers on '{index.device}'; move model and inputs to one device"
            )
        return torch.ops.numfit.rows(index.reshape(-1).long(), self.key, self.shape[1])

    def unpack(self) -> QuantizedTensor:
        """The planes as the file had them."""
        fmt, (n, k) = self.format.base, self.shape
        if fmt.trellis is not None:
            planes = {"codes": trellis.unpack(fmt.trellis, self.shape, self.handle), **self._kept}
            return QuantizedTensor.from_planes(self.format, self.shape, planes | (self.side.planes() if self.side else {}))
        g = fmt.geometry(k)
        specs = fmt.planes((n, k))
        codes = _empty(specs["codes"].shape, torch.uint8)
        own_member = "member" in specs and "member" not in self._kept
        spare = fmt.spare if "scale" not in self._kept else 0
        member = _empty((n, g.units), torch.uint8) if own_member or spare else None
        zero = _empty((n, g.blocks), torch.uint8) if "zero" in specs and "zero" not in self._kept else None
        scale = None
        if "scale" not in self._kept:
            scale = _empty((n, g.blocks), torch.int16 if STORES[fmt.scale.store].bits == 16 else torch.uint8)
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._lib.nf_set_threads(torch.get_num_threads())
        for index in torch.arange(n, device="cpu").split(max(1, CHUNK // k)):
            loose = _empty((len(index), k), torch.uint8)
            parts = [None if part is None else part[index[0] :].data_ptr() for part in (scale, member, zero)]
            if failed := self._lib.nf_unpack(self.handle, index.data_ptr(), len(index), loose.data_ptr(), *parts, error):
                raise refusal(failed, error, OptionError)
            codes[index] = pack_bits(loose, fmt.bits)
        planes = dict(self._kept)
        planes["codes"] = codes
        if scale is not None:
            word = scale.view(word_dtype(fmt.scale, 0))
            if spare:
                word = to_word(fmt.scale, from_word(fmt.scale, word, 0)[0], member, spare)
            planes["scale"] = pack_bits(word, 6) if _six_bits(fmt) else word
        if own_member:
            assert member is not None
            planes["member"] = pack_bits(member, fmt.member_bits)
        if zero is not None:
            planes["zero"] = pack_bits(zero, fmt.bits)
        found = {name: planes[name].reshape(specs[name].shape) for name in specs}
        return QuantizedTensor.from_planes(self.format, self.shape, found | (self.side.planes() if self.side else {}))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for the library to write to, whatever torch's default type and device are."""
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _six_bits(fmt: Format) -> bool:
    return STORES[fmt.scale.store].bits == 6 and not fmt.spare


def _matrix(weight: QuantizedTensor) -> tuple[Matrix, list[Tensor], dict[str, Tensor]]:
    """A weight as nf_matrix, the tensors it points to, and the planes that the kernels do not hold."""
    fmt, (n, k) = weight.format, weight.shape
    g, planes = fmt.geometry(k), weight.planes
    params = weight.parameters()
    grids = family(fmt, params)
    kept = {name: plane for name, plane in planes.items() if name in ("parent", "palette")}
    member, zero = params.member, params.zero
    if member is not None and fmt.unit == "tensor":
        grids, member, kept["member"] = (grids[int(member)],), None, planes["member"]
    if zero is not None and fmt.block == "tensor":
        kept["zero"] = planes["zero"]
    if g.blocks == 1:  # a scale a row, or one for all
        kind, kept["scale"], parent = 0, planes["scale"], None
        scale = params.effective_scale().float().expand(n, 1)
    else:
        kind, parent = _SCALE_KINDS[fmt.scale.store], params.parent
        word = planes["scale"]
        if _six_bits(fmt):
            scale = unpack_bits(word, 6, g.blocks)
        else:
            scale = to_word(fmt.scale, params.scale, None, 0) if fmt.spare else word  # without the member's bits
    levels = torch.tensor([grid.levels for grid in grids], dtype=torch.float32, device="cpu")
    parts: dict[str, Tensor | None] = {
        "codes": planes["codes"],
        "scale": scale,
        "parent": None if parent is None else parent.float().expand(n, 1),
        "member": None if member is None or len(grids) == 1 else member.to(torch.uint8),
        "zero": None if zero is None else zero.to(torch.uint8).expand(n, g.blocks),
        "levels": levels,
    }
    alive = {name: part.contiguous() for name, part in parts.items() if part is not None}
    matrix = Matrix(n, k, fmt.bits, len(grids), g.block, g.unit, kind, 0)
    for name, part in alive.items():
        setattr(matrix, name, part.data_ptr())
    return matrix, list(alive.values()), kept


def kernel_of(fmt: Format, columns: int) -> tuple[str, float]:
    """Which kernel serves rows of so many columns on this machine, and how exactly: (`kernel`, `rounding`) of PackedLinear.

    Raises:
        FormatError, OptionError: none does; the message says why.
    """
    specs = fmt.planes((1, columns))
    planes = {name: torch.zeros(spec.shape, dtype=spec.dtype, device="cpu") for name, spec in specs.items()}
    packed = PackedLinear.pack(QuantizedTensor(fmt, (1, columns), planes))
    return packed.kernel, packed.rounding


# -- torch operators: torch.compile and torch.export see calls with known shapes; the key is a constant ------------------------

_living: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_operators = torch.library.Library("numfit", "DEF")
_operators.define("linear(Tensor x, int key, int rows, Tensor? bias, bool exact) -> Tensor")
_operators.define("rows(Tensor index, int key, int columns) -> Tensor")


def _find(key: int, rows: int | None, columns: int) -> PackedLinear:
    packed = _living.get(key)
    if packed is None or packed.shape != (packed.shape[0] if rows is None else rows, columns):
        raise OptionError(
            "this graph was compiled or exported for a packed matrix that is no longer here: its model was freed or moved, or "
            "lives in another process; compile or export the model again"
        )
    packed._lib.nf_set_threads(torch.get_num_threads())
    return packed


def _linear(x: Tensor, key: int, rows: int, bias: Tensor | None, exact: bool) -> Tensor:
    packed = _find(key, rows, x.shape[-1])
    if packed.side is not None:
        return _linear_with_side(packed, packed.side, x, bias, exact)
    half = x.dtype == torch.bfloat16
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16 if half else torch.float32).contiguous()
    bias = None if bias is None else bias.float().expand(rows).contiguous()
    out = _empty((len(flat), rows), flat.dtype)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    apply = packed._lib.nf_apply_bf16 if half else packed._lib.nf_apply
    step = max(16, CHUNK // rows) if half else max(1, len(flat))  # for bf16 the library keeps fp32 copies
    for start in range(0, len(flat), step):
        part, into = flat[start : start + step], out[start : start + step]
        where = (part.data_ptr(), len(part), part.shape[1], into.data_ptr(), rows, _address(bias))
        if failed := apply(packed.handle, *where, exact, error):
            raise refusal(failed, error, OptionError)
    return out.view(*x.shape[:-1], rows).to(x.dtype)


def _linear_with_side(packed: PackedLinear, side: SideTerms, x: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    rows, columns = packed.shape
    flat = x.reshape(-1, columns).to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32).contiguous()
    bias = None if bias is None else bias.float().expand(rows).contiguous()
    out = _empty((len(flat), rows), x.dtype)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    step = max(16, CHUNK // max(rows, columns))
    runs = [(flat, out)] if len(flat) <= step else zip(flat.split(step), out.split(step), strict=True)
    for part, into in runs:
        turned = side.inputs(part)
        y = into if into.dtype == torch.float32 else _empty(into.shape, torch.float32)
        where = (turned.data_ptr(), len(turned), columns, y.data_ptr(), rows, _address(bias))
        if failed := packed._lib.nf_apply(packed.handle, *where, exact, error):
            raise refusal(failed, error, OptionError)
        side.add(turned, y)
        if y is not into:
            into.copy_(y)
    return out.view(*x.shape[:-1], rows)


def _rows(index: Tensor, key: int, columns: int) -> Tensor:
    packed = _find(key, None, columns)
    index = index.to(torch.int64).contiguous()
    out = _empty((len(index), columns), torch.float32)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if failed := packed._lib.nf_gather(packed.handle, index.data_ptr(), len(index), out.data_ptr(), error):
        raise refusal(failed, error, OptionError)
    return out if packed.side is None else packed.side.rows(index, out)


_operators.impl("linear", _linear, "CPU")
_operators.impl("rows", _rows, "CPU")


@torch.library.register_fake("numfit::linear", lib=_operators)
def _linear_shape(x: Tensor, key: int, rows: int, bias: Tensor | None, exact: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("numfit::rows", lib=_operators)
def _rows_shape(index: Tensor, key: int, columns: int) -> Tensor:
    return index.new_empty((index.shape[0], columns), dtype=torch.float32)
