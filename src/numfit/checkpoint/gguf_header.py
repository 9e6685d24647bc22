"""The header of a GGUF file: metadata and tensor table, read with every count and offset checked before it is believed.

A GGUF file is: magic, version, two counts, key/value metadata, a tensor table, then the tensors' bytes. The `gguf`
package has a reader too, but it trusts the header: a damaged count makes it loop for hours, a damaged length is
silently cut short, a truncated file surfaces as a numpy error. So this file walks the header itself, within the file's
real size, and leaves to the `gguf` package what it is the authority on: the block types and their dequantization.

Gives up: big-endian files, version 1, nested arrays (no model file uses them), files split into several parts.
Layout: the GGUF specification of the ggml project, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numfit.errors import CheckpointError, require

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL = 7
MAX_DIMENSIONS = 4
SMALLEST_PAIR = 8 + 4 + 1  # bytes: key length, value type, a one-byte value
SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: name length, rank, one dimension, type, offset


@dataclass(frozen=True)
class GGUFTensor:
    """One line of the tensor table: `shape` in torch order (rows first), `offset` from the start of the file."""

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the tensors' bytes."""

    path: Path
    size: int  # bytes of the whole file
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The metadata value of `key`, or `default`; CheckpointError when it is there with another type than `kind`."""
        found = self.metadata.get(key, default)
        if found is not default and (not isinstance(found, kind) or (isinstance(found, bool) and kind is int)):
            raise damaged(self.path, f"metadata '{key}' has an unexpected type ({type(found).__name__})")
        return found

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The metadata value of `key`; CheckpointError when it is missing or has another type than `kind`."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the GGUF metadata lacks '{key}', without which it cannot be read")
        return self.value(key, kind)


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: the GGUF file is damaged: {what}; fetch or convert it again")


class _Walk:
    """A cursor over the mapped file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > len(self.data) - self.at:
            raise damaged(
                self.path, f"{what} needs {nbytes} bytes at byte {self.at}, but the file ends at {len(self.data)}"
            )
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"{what} is not valid UTF-8") from None

    def room_for(self, count: int, smallest: int, what: str) -> int:
        """`count`, once it is plain that the rest of the file can hold so many items of `smallest` bytes or more."""
        if count * smallest > len(self.data) - self.at:
            raise damaged(
                self.path, f"the header claims {count} {what}, more than the {len(self.data)}-byte file can hold"
            )
        return count

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            number = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
            return bool(number) if kind == BOOL else number
        if kind != ARRAY:
            raise damaged(self.path, f"{what} has the unknown value type {kind}")
        item, count = self.u32(what), self.u64(what)
        if item == STRING:
            return [self.string(what) for _ in range(self.room_for(count, 8, f"strings in {what}"))]
        if item not in SCALARS:
            raise damaged(self.path, f"{what} is an array of the unknown or unsupported value type {item}")
        dtype = np.dtype(SCALARS[item])
        count = self.room_for(count, dtype.itemsize, f"numbers in {what}")
        numbers = np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
        return [bool(n) for n in numbers] if item == BOOL else numbers


def read_header(path: str | Path) -> GGUFHeader:
    """Read and check the header of the GGUF file at `path`; of the tensors only position and extent are looked at.

    Raises:
        CheckpointError: missing, no GGUF, of an unsupported version, truncated, or claiming what it cannot hold.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise damaged(path, "it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _walk(path, _Walk(path, data), len(data))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the GGUF file: {error.strerror or error}") from None


def _walk(path: Path, walk: _Walk, size: int) -> GGUFHeader:
    if walk.data[:4] != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
    walk.at = 4
    version = walk.u32("the version")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path}: GGUF version {version} is not supported, only little-endian versions 2 and 3 are"
        )
    tensor_count = walk.u64("the tensor count")
    pair_count = walk.room_for(walk.u64("the metadata count"), SMALLEST_PAIR, "metadata entries")
    walk.room_for(tensor_count, SMALLEST_TENSOR, "tensors")
    metadata: dict[str, Any] = {}
    for index in range(pair_count):
        key = walk.string(f"the name of metadata entry {index}")
        if key in metadata:
            raise damaged(path, f"metadata '{key}' occurs twice")
        metadata[key] = walk.value(walk.u32(f"metadata '{key}'"), f"metadata '{key}'")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: this is one part of a split GGUF; join the parts first (llama-gguf-split --merge)"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise damaged(path, f"metadata 'general.alignment' is {alignment!r}, not a power of two")
    lines = [_tensor_line(path, walk, index) for index in range(tensor_count)]
    begin = -(-walk.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in lines:
        if name in tensors:
            raise damaged(path, f"tensor '{name}' occurs twice")
        type_name, nbytes = _extent(path, name, shape, type_id)
        if begin + offset + nbytes > size:
            raise damaged(
                path, f"tensor '{name}' ends at byte {begin + offset + nbytes}, but the file has {size} (truncated?)"
            )
        tensors[name] = GGUFTensor(name, type_id, type_name, shape, begin + offset, nbytes)
    if not tensors:
        raise CheckpointError(f"{path}: the GGUF file holds no tensors (a vocabulary-only file?)")
    return GGUFHeader(path, size, metadata, tensors)


def _tensor_line(path: Path, walk: _Walk, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = walk.string(f"the name of tensor {index}")
    rank = walk.u32(f"tensor '{name}'")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise damaged(path, f"tensor '{name}' claims {rank} dimensions")
    shape = struct.unpack(f"<{rank}Q", walk.take(8 * rank, f"tensor '{name}'"))
    return name, tuple(reversed(shape)), walk.u32(f"tensor '{name}'"), walk.u64(f"tensor '{name}'")


def _extent(path: Path, name: str, shape: tuple[int, ...], type_id: int) -> tuple[str, int]:
    """Name of the ggml type and bytes of a tensor; the sizes of the block types are the `gguf` package's."""
    gguf = require("gguf", "gguf")
    try:
        kind = gguf.GGMLQuantizationType(type_id)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path}: tensor '{name}' has the ggml type {type_id}, which the installed 'gguf' package does not know; "
            "upgrade it, or check the file"
        ) from None
    if min(shape) < 1:
        raise damaged(path, f"tensor '{name}' has the impossible shape {shape}")
    if shape[-1] % block:
        raise damaged(
            path, f"tensor '{name}' has rows of {shape[-1]}, not a multiple of the {kind.name} block of {block}"
        )
    return kind.name, math.prod(shape) // block * nbytes
