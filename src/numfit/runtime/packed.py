"""A parameter that stays packed: which planes it is made of, and how rows of it are decoded.

One parameter of a model may be made of several tensors of the file (transformers fuses experts, and gate with up), or
be a part or a permutation of the rows of one (a fused qkv that is split). So a `PackedParameter` is a list of `Piece`s,
each a run of rows; where a kept tensor was fused with quantized ones, its piece is dense. The planes themselves are
buffers of one module (its home), so that device moves and state dicts see them; on a CPU, pieces that have a kernel are
brought into its layout instead (`to_kernels`) and their planes given up, to be made again when somebody asks for them.

`LazyWeight` is what other people's code gets when it asks a module for such a parameter: a tensor with the right shape,
dtype and device that decodes itself when it is computed with. It makes every architecture work unchanged, at the price
that code which takes a whole fused parameter decodes a whole fused parameter. It cannot be written to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from numfit.errors import FormatError, OptionError
from numfit.formats import Format, QuantizedTensor
from numfit.kernels import PackedLinear
from numfit.native import library


@dataclass(frozen=True)
class Piece:
    """A run of rows that comes from one tensor of the file.

    Attributes:
        source: the tensor's name in the file.
        format: how it is packed; None for a dense piece.
        shape: of the buffers' weight, [..., K]; the file's own shape where the piece is `whole`, else [rows, K].
        prefix: the home's buffers are called `<prefix>_<plane>`, a dense piece's buffer just `<prefix>`.
        whole: whether this is all of the source, in order.
    """

    source: str
    format: Format | None
    shape: tuple[int, ...]
    prefix: str
    whole: bool

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def buffers(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Buffer name → element type and shape."""
        if self.format is None:
            return {self.prefix: (dtype, self.shape)}
        planes = self.format.planes(self.shape)
        return {f"{self.prefix}_{name}": (plane.dtype, plane.shape) for name, plane in planes.items()}


class PackedParameter:
    """The pieces of one parameter and the module that holds their planes.

    Attributes:
        shape: as the model's code sees it.
        transposed: the pieces hold it with the last two axes exchanged.
        dtype: what it decodes to when nobody says otherwise; follows the home's `.to(dtype)`.
        home: the module whose buffers hold the planes; tied modules share one PackedParameter.
        activations: what the kernels do with activations, "int8" or "exact"; None where pieces shall stay planes.
        kernels: index of each piece that is in the layout of the CPU kernels → the matrix.
        refused: index of each piece that has no kernel → why.
    """

    def __init__(
        self, home: nn.Module, shape: tuple[int, ...], pieces: tuple[Piece, ...], dtype: torch.dtype, transposed: bool
    ) -> None:
        self.home, self.shape, self.pieces, self.dtype, self.transposed = home, shape, pieces, dtype, transposed
        self.activations: str | None = None
        self.kernels: dict[int, PackedLinear] = {}
        self.refused: dict[int, str] = {}

    def to_kernels(self) -> None:
        """Bring every piece that has a kernel into its layout, one after the other, giving up its planes. CPU only."""
        self.refused = {}
        for index, piece in enumerate(self.pieces):
            if piece.format is None or index in self.kernels:
                continue
            if library() is None:
                self.refused[index] = "the CPU kernels are not installed"
                continue
            weight = self.piece(index)
            assert isinstance(weight, QuantizedTensor)
            try:
                self.kernels[index] = PackedLinear.pack(weight)
            except FormatError as error:
                self.refused[index] = str(error)
                continue
            for name in piece.buffers(self.dtype):
                self.home._buffers[name] = None

    def planes(self, index: int) -> dict[str, Tensor]:
        """The buffers of a piece that is in a kernel's layout, made again: name → tensor."""
        piece = self.pieces[index]
        values = self.kernels[index].unpack().planes
        names = piece.buffers(self.dtype)
        return {name: value.reshape(names[name][1]) for name, value in zip(names, values.values(), strict=True)}

    def to_planes(self) -> None:
        """Undo `to_kernels`."""
        for index in list(self.kernels):
            self.home._buffers.update(self.planes(index))
            del self.kernels[index]

    @property
    def device(self) -> torch.device:
        if self.kernels:
            return torch.device("cpu")
        name = next(iter(self.pieces[0].buffers(self.dtype)))
        return self.home.get_buffer(name).device

    def plane_names(self) -> list[str]:
        """Names of the home's buffers that must keep their element type."""
        return [name for piece in self.pieces if piece.format is not None for name in piece.buffers(self.dtype)]

    def piece(self, index: int) -> QuantizedTensor | PackedLinear | Tensor:
        """One piece as a matrix [rows, K]: in the layout of a kernel, packed as in the file, or dense."""
        if index in self.kernels:
            return self.kernels[index]
        piece = self.pieces[index]
        buffers = self.home._buffers
        flat = (piece.rows, piece.shape[-1])
        if piece.format is None:
            return _present(buffers[piece.prefix]).reshape(flat)
        specs = piece.format.planes(flat)
        planes = {n: _present(buffers[f"{piece.prefix}_{n}"]).reshape(spec.shape) for n, spec in specs.items()}
        return QuantizedTensor(piece.format, flat, planes)

    def decode_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the pieces laid end to end, as [stop - start, K]."""
        parts, offset = [], 0
        for index, piece in enumerate(self.pieces):
            low, high = max(start - offset, 0), min(stop - offset, piece.rows)
            if low < high:
                part = self.piece(index)
                if isinstance(part, PackedLinear):
                    parts.append(part.rows(slice(low, high)).to(dtype))
                elif isinstance(part, QuantizedTensor):
                    whole = high - low == piece.rows
                    parts.append(part.dequantize(dtype) if whole else part.rows(slice(low, high), dtype))
                else:
                    parts.append(part[low:high].to(dtype))
            offset += piece.rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, in the shape that the model's code expects."""
        *lead, n, k = self.shape
        out = self.decode_rows(0, sum(piece.rows for piece in self.pieces), dtype or self.dtype)
        return out.reshape(*lead, k, n).transpose(-1, -2) if self.transposed else out.reshape(self.shape)

    def decode_at(self, index: int) -> Tensor:
        """`decode()[index]`, decoding no more than that (one expert of [E, N, K], or one row of [N, K])."""
        count = self.shape[0]
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range for {count} rows or experts")
        if self.transposed and len(self.shape) == 2:
            return self.decode()[index]
        index %= count
        span = sum(piece.rows for piece in self.pieces) // count
        rows = self.decode_rows(index * span, (index + 1) * span, self.dtype)
        if self.transposed:
            return rows.transpose(-1, -2)
        return rows.reshape(self.shape[1:])


def _present(buffer: Tensor | None) -> Tensor:
    assert buffer is not None, "a plane's buffer is missing"
    return buffer


class LazyWeight(Tensor):
    """A packed parameter in the guise of a tensor; see the module's docstring."""

    packed: PackedParameter
    _is_hf_initialized = True  # transformers' initialisers pass over tensors that say so

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: PackedParameter) -> LazyWeight:
        out = Tensor._make_wrapper_subclass(cls, packed.shape, dtype=packed.dtype, device=packed.device)
        out.packed = packed
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        formats = {piece.format.name if piece.format else str(self.dtype) for piece in self.packed.pieces}
        return f"LazyWeight(shape={tuple(self.shape)}, format={'+'.join(sorted(formats))}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func._schema.is_mutable and isinstance(args[0], LazyWeight):
            raise OptionError(
                f"'{args[0].packed.pieces[0].source}' is packed and cannot be written to, as this model or program "
                "tries; decode the weights first, with numfit.runtime.decode_model(model) or --decode-once"
            )
        if func is torch.ops.aten.select.int and args[1] == 0:
            return args[0].packed.decode_at(args[2])
        args, kwargs = tree_map_only(LazyWeight, lambda lazy: lazy.packed.decode(), (args, kwargs or {}))
        return func(*args, **kwargs)
