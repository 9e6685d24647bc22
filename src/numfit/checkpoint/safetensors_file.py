"""One safetensors file: validate it, read single tensors out of it, lay out and write a new one.

Reading goes through the safetensors library for the judgement (is this file sound?) and through plain reads at byte
offsets for the data: a memory map of a 5 GB shard counts towards a process' resident memory as it is walked over, a
read of one tensor does not. Writing is our own because the library wants all tensors at once, while the walk has one at
a time: sizes are known beforehand, so the header is written first and tensors are appended in its order.

The format is the library's, byte for byte in spirit: 8 bytes little-endian header length, JSON padded with spaces to a
multiple of 8, then the tensors back to back without holes. Because holes are not allowed, tensors are ordered so that
each starts at a multiple of its element size wherever that is possible (see `order_groups`); the exceptions are
matrices with an odd number of bytes in all, which no real model has.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from numfit.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # the library's own limit
CHUNK = 1 << 23  # bytes read at a time while hashing


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `dtype` in safetensors' spelling ("F32", "BF16"), `start` in bytes into the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int
    start: int = 0


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Validate a safetensors file with the library and return its tensors in the order in which they lie.

    Raises:
        CheckpointError: missing, truncated, corrupt, or announcing absurd sizes; names the file and what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt"):
            pass  # opening validates: header length, JSON, offsets without holes or overlaps, sizes against the file
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"the file '{path}' is missing; copy or download it again") from None
    except PermissionError:
        raise CheckpointError(f"no permission to read '{path}'; change the file's permissions") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"'{path}' is not a sound safetensors file: {_diagnose(path) or error}; copy or download it again"
        ) from None
    header.pop("__metadata__", None)
    begin = 8 + length
    infos = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        infos.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path.name, end - start, begin + start))
    return {info.name: info for info in sorted(infos, key=lambda info: (info.start, info.nbytes))}


def _diagnose(path: Path) -> str | None:
    """Say in a user's words what the library's error code means, or None if this does not see it either."""
    size = path.stat().st_size if path.is_file() else 0
    if size < 8:
        return f"it has only {size} bytes, so even the header is cut off"
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER:
            return f"it announces a header of {length} bytes, which is absurd (at most {MAX_HEADER} are allowed)"
        if 8 + length > size:
            return f"it is truncated: the header alone should have {length} bytes, the whole file has {size}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "its header is not the JSON that safetensors prescribes"
    if expected > size:
        return f"it is truncated: its header promises {expected} bytes, the file has {size}"
    if expected < size:
        return f"it has {size - expected} bytes more than its header promises"
    return None


def read_tensor(directory: Path, info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own. Shape `info.shape`; only its own bytes are touched.

    Raises:
        CheckpointError: a dtype PyTorch does not have, a file that cannot be read or became shorter.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{info.name}' in '{info.file}' has the type {info.dtype}, which this numfit cannot read"
        )
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    read_into(directory, info, 0, buffer.numpy().data)
    return buffer.view(DTYPES[info.dtype]).reshape(info.shape)


def read_into(directory: Path, info: TensorInfo, offset: int, view: memoryview) -> None:
    """Fill `view` with the tensor's bytes from `offset` on. Errors as `read_tensor`."""
    done = 0
    try:
        with (directory / info.file).open("rb", buffering=0) as file:
            file.seek(info.start + offset)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"'{directory / info.file}' ended inside tensor '{info.name}'; copy it again")
                done += got
    except OSError as error:
        raise CheckpointError(
            f"'{directory / info.file}' cannot be read ({error.strerror}); check its permissions and the disk"
        ) from None


def same_bytes(directory: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same values, bit for bit; compared in chunks."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for offset in range(0, one.nbytes, CHUNK):
        a, b = (bytearray(min(CHUNK, one.nbytes - offset)) for _ in range(2))
        read_into(directory, one, offset, memoryview(a))
        read_into(directory, other, offset, memoryview(b))
        if a != b:
            return False
    return True


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's little-endian bytes in row-major order, without a copy where it is contiguous on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256_file(path: Path) -> str:
    """The file's sha256 as hex, streamed."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Slot:
    """One tensor of an output file, known by size before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Group:
    """What belongs together in one file: all planes of one quantized tensor, or one kept tensor."""

    name: str
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


def make_group(name: str, slots: Iterable[Slot]) -> Group:
    """Order a group's slots by falling element size, so that each plane is aligned when the group's start is."""
    return Group(name, tuple(sorted(slots, key=lambda slot: -DTYPES[slot.dtype].itemsize)))


def order_groups(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Order groups by the alignment that their length preserves (8, 4, 2, 1 bytes), otherwise as given.

    After all groups whose length is a multiple of 8 the offset still is one; those of 4 follow, and so on. A group is
    thus aligned to its widest element unless its own length is no multiple of that.
    """
    return tuple(sorted(groups, key=lambda group: -math.gcd(group.nbytes, 8) if group.nbytes else -8))


@dataclass(frozen=True)
class Shard:
    """The layout of one output file: its name and groups in file order. Everything about it is known before writing."""

    file: str
    groups: tuple[Group, ...]

    @cached_property
    def header(self) -> bytes:
        """The 8 length bytes and the padded JSON."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for slot in self.slots:
            end = offset + slot.nbytes
            entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for group in self.groups for slot in group.slots)

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(group.nbytes for group in self.groups)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Where each slot will lie, as `read_header` would say it of the finished file."""
        infos, start = {}, len(self.header)
        for slot in self.slots:
            infos[slot.name] = TensorInfo(slot.name, slot.dtype, slot.shape, self.file, slot.nbytes, start)
            start += slot.nbytes
        return infos


def layout_shards(groups: Iterable[Group], limit: int) -> tuple[Shard, ...]:
    """Distribute groups, in order, over files of at most `limit` bytes; a group larger than that has a file alone.

    One file is called `model.safetensors`, several `model-00001-of-0000N.safetensors`, as everywhere else.
    """
    bins: list[list[Group]] = []
    used = 0
    for group in groups:
        entry = sum(len(slot.name.encode()) + 120 for slot in group.slots)  # no header entry is longer than this
        if not bins or used + group.nbytes + entry > limit:
            bins.append([])
            used = 128
        bins[-1].append(group)
        used += group.nbytes + entry
    count = len(bins)
    names = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    return tuple(Shard(name, order_groups(bin)) for name, bin in zip(names, bins))


def index_json(shards: Iterable[Shard]) -> dict:
    """The content of `model.safetensors.index.json`; needed only where there are several shards."""
    slots = {slot.name: (shard.file, slot.nbytes) for shard in shards for slot in shard.slots}
    return {
        "metadata": {"total_size": sum(nbytes for _, nbytes in slots.values())},
        "weight_map": {name: slots[name][0] for name in sorted(slots)},
    }
