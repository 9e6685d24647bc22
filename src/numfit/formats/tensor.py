"""A quantized tensor: a format, a shape, and the planes exactly as a file holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.errors import CheckpointError, FormatError
from numfit.formats import trellis_codec
from numfit.formats.codec import decode, encode
from numfit.formats.fit import fit
from numfit.formats.format import Format
from numfit.formats.names import format as named_format
from numfit.formats.packing import pack_bits, unpack_bits
from numfit.formats.params import Params
from numfit.formats.rotation import rotate
from numfit.formats.scale import STORES, from_word, to_word
from numfit.formats.side import PLANES as SIDE_PLANES
from numfit.formats.side import restore, to_planes
from numfit.formats.terms import split
from numfit.formats.trellis import TILE_ROWS


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in its stored form.

    Attributes:
        format: how to read the planes.
        shape: of the weight, [..., K].
        planes: plane name → contiguous tensor, as `format.planes(shape)` describes them.
    """

    format: Format
    shape: tuple[int, ...]
    planes: dict[str, Tensor]

    @staticmethod
    def from_planes(fmt: Format, shape: tuple[int, ...], planes: dict[str, Tensor], name: str = "tensor") -> QuantizedTensor:
        """Check planes against the format and wrap them.

        Raises:
            CheckpointError: a plane is missing, unexpected, or of another type or shape; the message names it.
        """
        wanted = fmt.planes(tuple(shape))
        for plane in sorted(wanted.keys() | planes.keys()):
            if plane not in planes:
                raise CheckpointError(f"{name} has no '{plane}' plane, which {fmt.name} needs; the checkpoint is incomplete")
            if plane not in wanted:
                raise CheckpointError(f"{name} has a '{plane}' plane, which {fmt.name} does not know; is the format right?")
            have = planes[plane]
            if have.dtype != wanted[plane].dtype or tuple(have.shape) != wanted[plane].shape:
                raise CheckpointError(
                    f"plane '{plane}' of {name} is {have.dtype} {tuple(have.shape)}, but {fmt.name} of shape {tuple(shape)} "
                    f"stores {wanted[plane].dtype} {wanted[plane].shape} there"
                )
        return QuantizedTensor(fmt, tuple(shape), dict(planes))

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Plane name → tensor."""
        return dict(self.planes)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        return QuantizedTensor(self.format, self.shape, {k: v.to(device) for k, v in self.planes.items()})

    def select(self, index: Tensor | int | slice) -> QuantizedTensor:
        """Entries of the first axis: rows of an embedding [N, K], or an expert of [E, N, K]. Planes without rows are shared.

        Raises:
            FormatError: a vector; rows of a trellis that are not whole tiles in order (`rows` decodes any).
        """
        if len(self.shape) < 2:
            raise FormatError("a quantized vector has no rows to select")
        if self.format.trellis is not None:
            return self._select_tiles(index)
        planes = {n: p if _is_shared(self.format, n) else p[index] for n, p in self.planes.items()}
        shape = (*planes["codes"].shape[:-1], self.shape[-1])
        specs = self.format.planes(shape)
        return QuantizedTensor(self.format, shape, {n: _plain(p, specs[n].shape) for n, p in planes.items()})

    def _select_tiles(self, index: Tensor | int | slice) -> QuantizedTensor:
        fmt, r, k = self.format, math.prod(self.shape[:-1]), self.shape[-1]
        assert fmt.trellis is not None
        place = torch.arange(r, device="cpu").view(self.shape[:-1])[index if not isinstance(index, Tensor) else index.cpu()]
        wanted = place.reshape(-1)
        tiles = wanted[::TILE_ROWS] // TILE_ROWS
        stream, _ = trellis_codec.streams_of_tiles(fmt.trellis, self.planes["codes"], (r, k), tiles.to(self.device))
        whole = [torch.arange(t * TILE_ROWS, min(r, (t + 1) * TILE_ROWS), device="cpu") for t in tiles.tolist()]
        if len(wanted) == 0 or not torch.equal(torch.cat(whole), wanted) or (tiles[1:] <= tiles[:-1]).any():
            raise FormatError(
                f"{fmt.name} codes {TILE_ROWS} rows together, so only whole tiles can be taken out of it, in order; leave this "
                "tensor out when quantizing (--skip), or use another format for it"
            )
        planes = {n: p if n == "codes" or _is_shared(fmt, n) else p[index] for n, p in self.planes.items()}
        planes["codes"] = stream
        shape = (*place.shape, k)
        specs = fmt.planes(shape)
        return QuantizedTensor(fmt, shape, {n: _plain(p, specs[n].shape) for n, p in planes.items()})

    def rows(self, index: Tensor | int | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decoded entries of the first axis, as `select(index).dequantize(dtype)` but for any rows of any format."""
        fmt = self.format
        if fmt.trellis is None:
            return self.select(index).dequantize(dtype)
        r, k = math.prod(self.shape[:-1]), self.shape[-1]
        place = torch.arange(r, device=self.device).view(self.shape[:-1])[index]
        scale = self.planes["scale"].view(-1)
        weight = trellis_codec.decode_rows(fmt.trellis, self.planes["codes"], scale, (r, k), place.reshape(-1))
        if fmt.side:
            terms = {n: p if _is_shared(fmt, n) else p[index] for n, p in self.terms().items()}
            return restore(fmt.side, weight, terms, dtype).view(*place.shape, k)
        return weight.to(dtype).view(*place.shape, k)

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.planes["codes"].device

    def base(self) -> QuantizedTensor:
        """The codes and their parameters without the side terms: in rotated coordinates, where there is a rotation."""
        if not self.format.side:
            return self
        planes = {n: p for n, p in self.planes.items() if n not in SIDE_PLANES}
        return QuantizedTensor(self.format.base, self.shape, planes)

    def terms(self) -> dict[str, Tensor]:
        """The planes of the side terms."""
        return {n: p for n, p in self.planes.items() if n in SIDE_PLANES}

    def params(self) -> tuple[Tensor, Params]:
        """Unpack: (codes uint8 [R, K], parameters)."""
        k = self.shape[-1]
        codes = self.planes["codes"]
        if self.format.trellis is not None:
            return trellis_codec.unpack(self.format.trellis, codes, math.prod(self.shape[:-1]), k), self.parameters()
        return unpack_bits(codes.reshape(-1, codes.shape[-1]), self.format.bits, k), self.parameters()

    def parameters(self) -> Params:
        """Unpack all but the codes."""
        fmt, k = self.format, self.shape[-1]
        g = fmt.geometry(k)
        rows = math.prod(self.shape[:-1])

        def plane(name: str) -> Tensor | None:
            """The plane as [rows, width], or [1, 1] where the tensor has one value."""
            value = self.planes.get(name)
            if value is None:
                return None
            if name == "palette":
                return value
            if _is_shared(fmt, name):
                return value.view(1, 1)
            return value.reshape(rows, 1 if name == "parent" else value.shape[-1])

        def unpacked(name: str, bits: int, count: int) -> Tensor | None:
            value = plane(name)
            return value if value is None or _is_shared(fmt, name) else unpack_bits(value, bits, count)

        word = unpacked("scale", 6, g.blocks) if _six_bits(fmt) else plane("scale")
        scale, member = torch.ones((rows, 1), device=self.device), None
        if word is not None:
            scale, member = from_word(fmt.scale, word, fmt.spare)
        if "member" in self.planes:
            member = unpacked("member", fmt.member_bits, g.units)
        zero, parent, palette = unpacked("zero", fmt.bits, g.blocks), plane("parent"), plane("palette")
        levels = plane("levels")
        return Params(
            scale,
            None if parent is None else parent.float(),
            member,
            None if zero is None else zero.float(),
            None if palette is None else palette.long(),
            None if levels is None else levels.float(),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, side terms and all, computed in fp32 and rounded once to `dtype`; shape `self.shape`.

        Raises:
            FormatError: sparse corrections point out of the row.
        """
        codes, params = self.params()
        if self.format.side:
            weight = decode(self.format, codes, params)
            return restore(self.format.side, weight, self.terms(), dtype).view(self.shape)
        return decode(self.format, codes, params, dtype).view(self.shape)

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(1, math.prod(self.shape))
        return f"QuantizedTensor({self.format.name}, shape={tuple(self.shape)}, {bits:.4g} bits per weight)"


def _six_bits(fmt: Format) -> bool:
    """Whether scales lie as a stream of 6-bit words."""
    return STORES[fmt.scale.store].bits == 6 and not fmt.spare and fmt.block != "tensor"


def _is_shared(fmt: Format, plane: str) -> bool:
    """Whether a plane belongs to the tensor as a whole."""
    return (
        plane in ("palette", "lowrank_a")
        or (plane == "parent" and fmt.scale.parent == "tensor")
        or (plane == "member" and fmt.unit == "tensor")
        or (plane in ("scale", "zero") and fmt.block == "tensor")
    )


def _plain(plane: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A copy with standard strides and storage of its own: what a file format may rely on, and no more memory than it shows."""
    return torch.empty(shape, dtype=plane.dtype, device=plane.device).copy_(plane.reshape(shape))


def pack(
    fmt: Format, shape: tuple[int, ...], codes: Tensor, params: Params, terms: dict[str, Tensor] | None = None
) -> QuantizedTensor:
    """Lay codes [R, K] and parameters out as planes.

    Args:
        terms: of a format with side terms, what they need: `lowrank_b` [R, r] and `lowrank_a` [r, K] floats, `sparse_index`
            (distinct columns, ascending) and `sparse_value` [R, count]; all in rotated coordinates.

    Raises:
        FormatError: a term is missing or of another size.
    """
    specs = fmt.planes(shape)
    planes = {"codes": pack_bits(codes, fmt.bits) if fmt.trellis is None else trellis_codec.pack(fmt.trellis, codes)}
    if "scale" in specs:
        word = to_word(fmt.scale, params.scale, params.member, fmt.spare)
        planes["scale"] = pack_bits(word, 6) if _six_bits(fmt) else word
    if "member" in specs:
        assert params.member is not None
        planes["member"] = params.member if fmt.unit == "tensor" else pack_bits(params.member, fmt.member_bits)
    if "zero" in specs:
        assert params.zero is not None
        planes["zero"] = params.zero.to(torch.uint8) if fmt.block == "tensor" else pack_bits(params.zero, fmt.bits)
    if "parent" in specs:
        assert params.parent is not None
        planes["parent"] = params.parent.to(specs["parent"].dtype)
    if "levels" in specs:
        assert params.levels is not None
        planes["levels"] = params.levels.half()
    if "palette" in specs:
        assert params.palette is not None
        planes["palette"] = params.palette.to(torch.uint8)
    planes.update(to_planes(fmt.side, tuple(shape), terms or {}))
    return QuantizedTensor(fmt, tuple(shape), {n: _plain(planes[n], specs[n].shape) for n in specs})


def quantize_tensor(
    w: Tensor, format: Format | str, *, scale_rule: str = "mse", importance: Tensor | None = None
) -> QuantizedTensor:
    """Quantize one weight to the nearest levels of a format, without calibration.

    Args:
        w: fp16, bf16 or fp32 weights [..., K]; the last axis is the input dimension.
        format: a `Format` or its name.
        scale_rule: see `numfit.formats.fit.fit`.
        importance: weight of each input channel's squared error [K], before any rotation, or None.

    Raises:
        FormatError: a bad name or shape, an element type that is not a float, or NaN or Inf (the message says where).
    """
    fmt = named_format(format) if isinstance(format, str) else format
    if w.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise FormatError(f"weights must be fp16, bf16 or fp32, not {w.dtype}")
    fmt.check_shape(tuple(w.shape))
    k = w.shape[-1]
    flat = w.detach().reshape(-1, k)
    _check_finite(flat, tuple(w.shape))
    if importance is not None:
        if tuple(importance.shape) != (k,):
            raise FormatError(f"importance has shape {tuple(importance.shape)}, but the weight has {k} input channels")
        if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
            raise FormatError("importance must be finite and not negative")
    if fmt.side:
        rotation = fmt.side.rotation
        _check_range(fmt, flat if rotation is None else rotate(flat, rotation))
        return pack(fmt, tuple(w.shape), *split(fmt, flat, importance, scale_rule))
    _check_range(fmt, flat)
    params = fit(fmt, flat, importance, scale_rule)
    return pack(fmt, tuple(w.shape), encode(fmt, flat, params), params)


def _check_range(fmt: Format, flat: Tensor) -> None:
    """Refuse weights whose scales the format cannot store: they would be clipped to a fraction."""
    if flat.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(flat))
    largest = max(high, 0.0) - min(low, 0.0) if fmt.zero else max(high, -low)
    if largest > fmt.reach:
        raise FormatError(
            f"the weight spans {largest:.4g}, but the @{fmt.scale.store} scales of {fmt.name} end at {fmt.reach:.4g}; "
            "repair the source, skip this tensor, or use a wider scale type such as @bf16"
        )


def _check_finite(flat: Tensor, shape: tuple[int, ...]) -> None:
    if flat.numel() == 0 or bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(flat).all()):
        return  # a finite sum has finite terms: one cheap pass in the common case
    bad = ~torch.isfinite(flat)
    first = int(bad.flatten().int().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(first), shape)]
    value = flat.flatten()[first].item()
    raise FormatError(
        f"the weight holds {int(bad.sum())} values that are NaN or Inf, the first ({value}) at index {where}; "
        "no format can store them, so repair the source or skip this tensor"
    )
