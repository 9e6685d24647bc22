"""A format: the frozen description of how numbers become bits, and what that costs.

    ŵ[e] = (scale · parent)[block(e)] · ( grid[ member[unit(e)] ][ code[e] ] − zero[block(e)] )

A format may have side terms on top (side.py): a rotation of the input channels, a low-rank term, sparse corrections.

Blocks share a scale, units share a member of the family; both are runs of neighbours along the input dimension (the last
axis), and a unit never straddles a block. This file holds the value and its arithmetic of sizes; the verbs are in
fit.py (fit), codec.py (encode, decode) and tensor.py (pack, unpack).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from numfit.errors import FormatError
from numfit.formats.grid import Grid, ranked
from numfit.formats.packing import packed_bytes
from numfit.formats.rotation import factors
from numfit.formats.scale import FP16_MAX, SEARCHES, STORES, Scale, word_dtype
from numfit.formats.side import Side
from numfit.formats.trellis import TILE_ROWS, Trellis

JSON_VERSION = 1
SIDE_VERSION = 2  # of formats with side terms: a reader that does not know them must not take them for formats without
TRELLIS_VERSION = 3  # of formats with a trellis, for the same reason
LEARNED_VERSION = 4  # of formats whose rows have levels of their own


class PlaneSpec(NamedTuple):
    """Element type and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Geometry(NamedTuple):
    """How one row of `row` weights splits into blocks and units."""

    row: int
    block: int  # weights of a whole block
    blocks: int  # blocks of a row, the last may be short
    unit: int  # weights of a whole unit; a unit larger than a block counts as the block
    units: int  # units of a row


@dataclass(frozen=True)
class Format:
    """A numeric format. Equal parts make equal formats, whatever the name says.

    Attributes:
        name: the short name.
        bits: width of a stored code.
        members: the family, one grid per member; with `palette`, the candidates of which a tensor keeps some.
        palette: how many candidates a tensor keeps; 0 means that the family is fixed.
        unit: weights that share a member, or "block", or "tensor".
        block: weights that share a scale, or "row", or "tensor".
        scale: how scales are stored.
        zero: whether each block has an integer zero point of `bits` bits.
        rounding: what happens between levels: "down" (nearest, ties to the lower level), "even" (nearest, ties to the
            even code, as MX and NV ask), "log" (thresholds at geometric means, PoTPTQ).
        member_home: "plane", or "scale" where the index lives in spare bits of the scale word.
        trellis: what codes are symbols of; they then mean nothing one by one, `members` only counts them, and nothing but
            one fp16 scale a row goes with it.
        learned: whether each row has levels of its own, in fp16 (learned.py). The one member counts the codes and is what
            scales are first fitted to. Levels of a row hold its scale: where the block is the row, none is stored.
        side: what is stored or done beside the codes. The verbs fit, encode and decode do not look at it: they see weights that
            are rotated already, and give back what the terms are added to; `quantize_tensor` and `QuantizedTensor` do it all.
    """

    name: str = field(compare=False)
    bits: int
    members: tuple[Grid, ...]
    palette: int = 0
    unit: int | str = "block"
    block: int | str = 128
    scale: Scale = field(default_factory=Scale)
    zero: bool = False
    rounding: str = "down"
    member_home: str = "plane"
    side: Side = field(default_factory=Side)
    trellis: Trellis | None = None
    learned: bool = False

    # -- derived numbers ------------------------------------------------------------------------------------------

    @property
    def base(self) -> Format:
        """The format without its side terms."""
        return replace(self, name=self.name.removesuffix(self.side.suffix), side=Side()) if self.side else self

    def with_side(self, side: Side) -> Format:
        """This base under other side terms."""
        base = self.base
        return replace(base, name=base.name + side.suffix, side=side)

    @property
    def member_count(self) -> int:
        """Members a unit chooses among."""
        return self.palette or len(self.members)

    @property
    def member_bits(self) -> int:
        """Bits of one stored member index."""
        return max(0, (self.member_count - 1).bit_length())

    @property
    def spare(self) -> int:
        """Bits of each scale word that carry the member index."""
        return self.member_bits if self.member_home == "scale" else 0

    @property
    def scaled(self) -> bool:
        """Whether scales are stored."""
        return not (self.learned and self.block == "row")

    @property
    def max_level(self) -> float:
        """Largest magnitude of any member."""
        if self.trellis is not None:
            return self.trellis.max_level
        return max(grid.max_level for grid in self.members)

    @property
    def reach(self) -> float:
        """Largest weight whose scale can be stored (and whose squared errors fp32 can sum)."""
        if self.trellis is not None:
            return FP16_MAX  # its scales are smaller than its deviation
        if self.scale.store == "fp16":
            return self.max_level * FP16_MAX
        return self.max_level * (FP16_MAX * self.scale.cap if self.scale.parent == "row" else 2.0**50)

    @property
    def parent_span(self) -> str | None:
        """What must be complete before a block can be encoded: None, "row" or "tensor"."""
        spans = (self.block, self.unit, self.scale.parent, "tensor" if self.palette else None, "row" if self.learned else None)
        return next((span for span in ("tensor", "row") if span in spans), None)

    def geometry(self, row: int) -> Geometry:
        """Blocks and units of a row of `row` weights."""
        block = row if isinstance(self.block, str) else min(self.block, row)
        blocks = -(-row // block)
        unit = block if isinstance(self.unit, str) else min(self.unit, block)
        tail = row - (blocks - 1) * block
        return Geometry(row, block, blocks, unit, (blocks - 1) * -(-block // unit) + -(-tail // unit))

    # -- sizes ----------------------------------------------------------------------------------------------------

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape that this format cannot hold.

        Raises:
            FormatError: no axis, an empty row, a block larger than the row, or a row that cannot be rotated.
        """
        if len(shape) == 0 or shape[-1] == 0:
            raise FormatError(f"{self.name} needs rows of at least one weight, not the shape {tuple(shape)}")
        if isinstance(self.block, int) and self.block > shape[-1]:
            raise FormatError(
                f"{self.name} has blocks of {self.block} weights, but a row of this tensor {tuple(shape)} has only "
                f"{shape[-1]}; use a smaller block such as '-g{1 << (shape[-1].bit_length() - 1)}', or '-row'"
            )
        if self.trellis is not None and len(shape) > 2 and shape[-2] % TILE_ROWS:
            raise FormatError(
                f"{self.name} stacks matrices whose rows fill tiles of {TILE_ROWS}, which {shape[-2]} rows do not; skip this "
                "tensor or use another format for it"
            )
        if self.side.rotation is not None:
            factors(shape[-1])

    @property
    def plane_names(self) -> tuple[str, ...]:
        """Names of the stored tensors, the same for every shape, in file order."""
        return tuple(self._planes((1, self.block if isinstance(self.block, int) else 1)))

    def planes(self, shape: tuple[int, ...]) -> dict[str, PlaneSpec]:
        """The stored tensors of a weight of `shape` [..., K], in file order."""
        self.check_shape(shape)
        return self._planes(shape)

    def _planes(self, shape: tuple[int, ...]) -> dict[str, PlaneSpec]:
        *lead, row = shape
        rows = tuple(lead)
        g = self.geometry(row)
        byte = torch.uint8
        out = {"codes": PlaneSpec(byte, (*rows, packed_bytes(row, self.bits)))}
        if self.trellis is not None:  # a stream of tiles, over all rows
            out["codes"] = PlaneSpec(byte, (self.trellis.stream_bytes(math.prod(rows), row),))
        word = word_dtype(self.scale, self.spare)
        width = STORES[self.scale.store].bits
        if not self.scaled:
            pass
        elif self.block == "tensor":
            out["scale"] = PlaneSpec(word, (1,))
        elif width == 6 and not self.spare:
            out["scale"] = PlaneSpec(byte, (*rows, packed_bytes(g.blocks, 6)))
        else:
            out["scale"] = PlaneSpec(word, (*rows, g.blocks))
        if self.member_bits and not self.spare:
            if self.unit == "tensor":
                out["member"] = PlaneSpec(byte, (1,))
            else:
                out["member"] = PlaneSpec(byte, (*rows, packed_bytes(g.units, self.member_bits)))
        if self.zero:
            zeros = (1,) if self.block == "tensor" else (*rows, packed_bytes(g.blocks, self.bits))
            out["zero"] = PlaneSpec(byte, zeros)
        if self.scale.parent == "row":
            out["parent"] = PlaneSpec(torch.float16, rows or (1,))
        elif self.scale.parent == "tensor":
            out["parent"] = PlaneSpec(torch.float32, (1,))
        if self.learned:
            out["levels"] = PlaneSpec(torch.float16, (*rows, 1 << self.bits))
        if self.palette:
            out["palette"] = PlaneSpec(byte, (self.palette,))
        out.update({name: PlaneSpec(*spec) for name, spec in self.side.planes(shape).items()})
        return out

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight of `shape` takes in the file."""
        return sum(plane.nbytes for plane in self.planes(shape).values())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits over weights, everything counted.

        Raises:
            FormatError: the shape holds no weight.
        """
        count = math.prod(shape)
        if count == 0:
            raise FormatError(f"a tensor of shape {tuple(shape)} has no weights, so bits per weight mean nothing")
        return 8 * self.nbytes(shape) / count

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A self-contained description: a reader needs no catalogue, only `docs/format.md`."""
        side = {"side": self.side.to_json()} if self.side else {}
        trellis = {"trellis": self.trellis.to_json()} if self.trellis is not None else {}
        learned = {"learned": True} if self.learned else {}
        return {
            "version": _version(learned, trellis, side),
            "name": self.name,
            "bits": self.bits,
            "members": [
                {"name": g.name, "levels": [v if math.isfinite(v) else str(v) for v in g.levels], "never": sorted(g.never)}
                for g in self.members
            ],
            "palette": self.palette,
            "unit": self.unit,
            "block": self.block,
            "scale": {**asdict(self.scale), "tries": list(self.scale.tries)},
            "zero": self.zero,
            "rounding": self.rounding,
            "member_home": self.member_home,
            **side,
            **trellis,
            **learned,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Format:
        """Rebuild a format from `to_json`.

        Raises:
            FormatError: the version is unknown, or a part is missing or impossible.
        """
        name = data.get("name", "?") if isinstance(data, dict) else "?"
        has = data if isinstance(data, dict) else {}
        reads = _version(has.get("learned"), has.get("trellis"), has.get("side") is not None)
        if not isinstance(data, dict) or data.get("version") != reads:
            version = data.get("version") if isinstance(data, dict) else data
            raise FormatError(
                f"the description of format '{name}' has version {version!r}, and this numfit reads {reads}; "
                "a newer numfit is needed"
            )
        try:
            return Format(
                name=str(name),
                bits=int(data["bits"]),
                members=tuple(
                    Grid(str(g["name"]), tuple(float(v) for v in g["levels"]), frozenset(int(c) for c in g["never"]))
                    for g in data["members"]
                ),
                palette=int(data["palette"]),
                unit=data["unit"],
                block=data["block"],
                scale=Scale(**{**data["scale"], "tries": tuple(float(v) for v in data["scale"]["tries"])}),
                zero=bool(data["zero"]),
                rounding=str(data["rounding"]),
                member_home=str(data["member_home"]),
                side=Side.from_json(data.get("side")),
                trellis=Trellis.from_json(data["trellis"]) if data.get("trellis") is not None else None,
                learned=bool(data.get("learned", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the description of format '{name}' is damaged: {error!r}") from None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise FormatError(f"{self.name}: {problem}")


def _version(learned: object, trellis: object, side: object) -> int:
    """The version of a description with these parts."""
    return LEARNED_VERSION if learned else TRELLIS_VERSION if trellis else SIDE_VERSION if side else JSON_VERSION


def _problem(f: Format) -> str | None:
    """Why the parts cannot form a format, or None."""
    if f.trellis is not None and (f.block != "row" or f.scale.store != "fp16"):
        return "a trellis has one fp16 scale a row and no other blocks or scales"
    if f.trellis is not None and (f.bits != f.trellis.bits or len(f.members) != 1 or f.zero or f.palette or f.unit != "block"):
        return "a trellis has neither members nor zero points"
    if f.learned and (f.trellis is not None or len(f.members) != 1 or f.zero or f.palette or f.unit != "block"):
        return "learned levels go with neither members nor zero points nor a trellis"
    if f.learned and f.rounding != "down":
        return f"learned levels are rounded to the nearest, not '{f.rounding}'"
    if f.learned and f.block == "tensor":
        return "learned levels hold the scale of their row, so one for the tensor says nothing; use -row, or -g128, say"
    if f.learned and f.block == "row" and f.scale.store != "fp16":
        return f"learned levels of a row need no scale, so @{f.scale.store} says nothing; leave it away, or use -g128, say"
    if not 1 <= f.bits <= 8:
        return f"codes have 1 to 8 bits, not {f.bits}"
    if not f.members:
        return "a family needs at least one member"
    wrong = [g.name for g in f.members if len(g.levels) != 1 << f.bits]
    if wrong:
        return f"members {', '.join(wrong)} do not have 2**{f.bits} levels"
    mute = [g.name for g in f.members if not ranked(g) or g.max_level == 0]
    if mute:
        return f"member {mute[0]} has no level but zero that an encoder may emit"
    if f.scale.store not in STORES:
        return f"scales are stored as one of {', '.join(STORES)}, not '{f.scale.store}'"
    for what, value, words in (("block", f.block, ("row", "tensor")), ("unit", f.unit, ("block", "tensor"))):
        if value not in words and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            return f"a {what} is a positive count or one of {', '.join(words)}, not {value!r}"
    if not (isinstance(f.scale.cap, float | int) and 0 < f.scale.cap < math.inf):
        return f"the cap of scales is a positive number, not {f.scale.cap!r}"
    if not f.scale.tries or not all(0 < t < math.inf for t in f.scale.tries):
        return f"the multiples tried by absmax are positive numbers, not {f.scale.tries!r}"
    if f.scale.search not in SEARCHES:
        return f"the search is one of {', '.join(SEARCHES)}, not {f.scale.search!r}"
    if f.palette and not 1 <= f.palette <= len(f.members) <= 256:
        return f"a palette of {f.palette} cannot be chosen from {len(f.members)} candidates"
    if isinstance(f.unit, int) and isinstance(f.block, int) and f.unit > f.block:
        return f"a unit of {f.unit} weights would straddle blocks of {f.block}"
    if f.scale.parent not in (None, "row", "tensor"):
        return f"the parent of scales is a row or the tensor, not {f.scale.parent!r}"
    if f.scale.parent == "row" and isinstance(f.block, str):
        return f"@{f.scale.store} scales hang under one fp16 per row, which needs blocks smaller than a row (-g64, say)"
    if (STORES[f.scale.store].parent is None) != (f.scale.parent is None):
        return f"@{f.scale.store} scales have {'no' if f.scale.parent else 'a'} parent"
    if f.block == "tensor" and (f.scale.parent or (f.unit == "block" and f.member_count > 1)):
        return "one scale for the tensor needs neither a parent scale nor a member per block"
    if f.unit == "tensor" and f.member_count > 1 and f.scale.parent == "row":
        return f"a member per tensor cannot use @{f.scale.store} scales, which hang under one fp16 per row; use @fp16 or @e4m3"
    if f.rounding not in ("down", "even", "log"):
        return f"rounding is down, even or log, not {f.rounding!r}"
    if f.member_home not in ("plane", "scale"):
        return f"a member index lives in a plane or in the scale, not in {f.member_home!r}"
    if f.member_home == "scale" and (f.member_bits > STORES[f.scale.store].spare or f.unit != "block"):
        return f"@{f.scale.store} scales have no room for a {f.member_bits}-bit member index per unit {f.unit!r}"
    if f.zero and len(f.members) > 1:
        return "a zero point and a family of several members exclude each other"
    if f.zero and f.members[0].levels != tuple(float(i) for i in range(1 << f.bits)):
        return f"a zero point needs the levels 0 … {(1 << f.bits) - 1}, in code order"
    return None
