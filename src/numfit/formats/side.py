"""Side terms: what a format may store, or do, beside the codes of a weight.

    ŵ = (decode(codes) + B·A + S)·R

R is a fixed rotation of the input channels (rotation.py; nothing of it is stored), B·A a low-rank term in fp16, S a few weights
of each row corrected one by one. Everything that is stored lives in the rotated coordinates, so that a linear layer is

    y = (decode(codes) + B·A + S)·(R x)

The terms belong to the whole tensor as one matrix [rows, K]: stacked experts share A. Each term costs bits, and they are
counted like any other plane. This file holds the value, its names and its arithmetic; terms.py finds the terms from the weights
alone, corrections/ with statistics of the inputs.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numfit.errors import FormatError
from numfit.formats.rotation import Rotation, unrotate

PLANES = ("lowrank_b", "lowrank_a", "sparse_index", "sparse_value")
MAX_RANK = 4096
GRAMMAR = "[+rot[SEED]][+rankR][+sparseP]"
_WORDS = ("rot", "rank", "sparse")


@dataclass(frozen=True)
class Side:
    """The side terms of a format; by default there are none, and the value is false.

    Attributes:
        rotation: of the input channels, or None.
        rank: of the low-rank term; 0: there is none.
        sparse: corrected weights, in thousandths of a row (at least one a row); 0: there are none.
    """

    rotation: Rotation | None = None
    rank: int = 0
    sparse: int = 0

    def __bool__(self) -> bool:
        return self.rotation is not None or self.rank > 0 or self.sparse > 0

    @property
    def stored(self) -> bool:
        """Whether it adds planes."""
        return self.rank > 0 or self.sparse > 0

    @property
    def suffix(self) -> str:
        """As part of a short name; empty where there is nothing."""
        parts = []
        if self.rotation is not None:
            parts.append(f"+rot{self.rotation.seed or ''}")
        if self.rank:
            parts.append(f"+rank{self.rank}")
        if self.sparse:
            parts.append(f"+sparse{self.sparse}")
        return "".join(parts)

    def outliers(self, columns: int) -> int:
        """Corrected weights of a row of so many."""
        return min(columns, max(1, round(self.sparse * columns / 1000))) if self.sparse else 0

    def planes(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Stored tensors beside a weight of `shape` [..., K], in file order: name → (element type, shape)."""
        *rows, k = shape
        out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.rank:
            out["lowrank_b"] = torch.float16, (*rows, self.rank)
            out["lowrank_a"] = torch.float16, (self.rank, k)
        if self.sparse:
            count = self.outliers(k)
            out["sparse_index"] = torch.int16 if k <= 1 << 15 else torch.int32, (*rows, count)
            out["sparse_value"] = torch.float16, (*rows, count)
        return out

    def to_json(self) -> dict[str, Any]:
        rotation = None if self.rotation is None else {"kind": self.rotation.kind, "seed": self.rotation.seed}
        return {"rotation": rotation, "rank": self.rank, "sparse_per_mille": self.sparse}

    @staticmethod
    def from_json(data: dict[str, Any] | None) -> Side:
        """Raises KeyError, TypeError or ValueError where parts are missing, FormatError where they are impossible."""
        if data is None:
            return Side()
        rotation = data["rotation"]
        turned = None if rotation is None else Rotation(int(rotation["seed"]), str(rotation["kind"]))
        return Side(turned, int(data["rank"]), int(data["sparse_per_mille"]))

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= MAX_RANK:
            raise FormatError(f"a low-rank term has a rank of 1 to {MAX_RANK}, not {self.rank}")
        if not 0 <= self.sparse <= 500:
            raise FormatError(f"sparse corrections take 1 to 500 thousandths of a row, not {self.sparse}")


def parse(parts: list[str], name: str) -> Side:
    """The side terms of the `+` suffixes of a name, in any order.

    Raises:
        FormatError: an unknown suffix, one without its number, or one twice.
    """
    found: dict[str, int | None] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]*)(\d{0,9})", part)
        word = match[1] if match else part
        if match is None or word not in _WORDS:
            near = difflib.get_close_matches(word, _WORDS, 1, 0.5)
            hint = f" (did you mean '+{near[0]}'?)" if near else ""
            raise FormatError(f"unknown suffix '+{part}' in '{name}'{hint}; after the base and its scales may stand {GRAMMAR}")
        if word in found:
            raise FormatError(f"'{name}' says '+{word}' twice")
        number = int(match[2]) if match[2] else None
        if word != "rot" and not number:
            what = "a rank, such as +rank16" if word == "rank" else "thousandths of a row, such as +sparse5"
            raise FormatError(f"'+{part}' in '{name}' needs {what}")
        found[word] = number
    try:
        rotation = Rotation(found["rot"] or 0) if "rot" in found else None
        return Side(rotation, found.get("rank") or 0, found.get("sparse") or 0)
    except FormatError as error:
        raise FormatError(f"'{name}' is not possible: {error}") from None


def check_index(index: Tensor, columns: int) -> None:
    """Refuse a plane of indices that point out of the row.

    Raises:
        FormatError: it does.
    """
    if index.numel():
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= columns:
            raise FormatError(f"the plane 'sparse_index' points to columns {low} … {high} of rows of {columns}; it is damaged")


def add_terms(side: Side, weight: Tensor, planes: dict[str, Tensor]) -> Tensor:
    """decode + B·A + S, in place: first the columns of B one after the other, then S; each operation rounded to fp32.

    Args:
        weight: decoded base [R, K], fp32, whose memory may be written to.
        planes: the stored planes of these rows, `lowrank_a` whole.
    """
    rows, k = weight.shape
    if side.rank:
        b, a = planes["lowrank_b"].reshape(rows, side.rank).float(), planes["lowrank_a"].float()
        term = torch.empty_like(weight)
        for j in range(side.rank):
            weight += torch.mul(b[:, j : j + 1], a[j], out=term)
    if side.sparse:
        index = planes["sparse_index"].reshape(rows, -1)
        check_index(index, k)
        weight.scatter_add_(1, index.long(), planes["sparse_value"].reshape(rows, -1).float())
    return weight


def restore(side: Side, weight: Tensor, planes: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight that counts, from its decoded base [R, K] (fp32, may be overwritten): computed in fp32, rounded once."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, k = weight.shape
    step = max(1, (1 << 18) // max(1, k))
    for start in range(0, rows, step):
        run = slice(start, min(start + step, rows))
        part = {n: p if n == "lowrank_a" else p.reshape(rows, -1)[run] for n, p in planes.items()}
        whole = add_terms(side, weight[run], part)
        out[run] = whole if side.rotation is None else unrotate(whole, side.rotation)
    return out


def to_planes(side: Side, shape: tuple[int, ...], terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms in any float or integer type → planes as they are stored.

    Args:
        shape: of the weight [..., K], R rows in all.
        terms: `lowrank_b` [R, r], `lowrank_a` [r, K], `sparse_index` [R, c], `sparse_value` [R, c], as the side has them.

    Raises:
        FormatError: one is missing or of another size.
    """
    out = {}
    for name, (dtype, size) in side.planes(shape).items():
        term = terms.get(name)
        if term is None or term.numel() != math.prod(size):
            have = "it is missing" if term is None else f"it is {tuple(term.shape)}"
            raise FormatError(f"the term '{name}' of a weight {tuple(shape)} has the shape {size}, but {have}")
        if dtype == torch.float16:
            term = term.float().clamp(-65504.0, 65504.0)
        out[name] = term.to(dtype).reshape(size)
    return out
