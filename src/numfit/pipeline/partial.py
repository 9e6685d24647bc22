"""The partial directory of an unfinished run, and how the next run goes on from it.

    OUT.partial/
        lock            held (flock) by the run that writes
        identity.json   options, source hashes, numfit version: what must be equal to go on
        journal.jsonl   one line a finished tensor, in file order
        layers/         of a calibrated run: finished layers, hidden states (layers.py)
    checkpoint/     what will be OUT, renamed in one step at the end

A line is appended to the journal after its tensor was written, read back and checked. Data and journal are flushed to
the disk together once a second and at the end of each file, not for every tensor: a killed process loses nothing by
that, and after a power failure the next run notices: it reads the recorded prefix again, compares every hash, cuts
everything behind the last sound tensor off and goes on there. Same bytes, whatever happened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numfit.checkpoint.manifest import canonical_json
from numfit.checkpoint.safetensors_file import CHUNK, Group, Shard
from numfit.errors import OptionError

IDENTITY, JOURNAL, LOCK, STAGE = "identity.json", "journal.jsonl", "lock", "checkpoint"
LAYERS = "layers"
SYNC_EVERY = 1.0  # seconds


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Create the partial directory if need be and hold its lock; the kernel releases it even when we are killed.

    Raises:
        OptionError: another run holds it, or something else of that name exists.
    """
    if partial.exists() and not partial.is_dir():
        raise OptionError(f"'{partial}', where the unfinished work would go, is a file; move it away")
    partial.mkdir(parents=True, exist_ok=True)
    strange = sorted(
        path.name for path in partial.iterdir() if path.name not in (IDENTITY, JOURNAL, LOCK, STAGE, LAYERS, f"{IDENTITY}.new")
    )
    if strange:
        raise OptionError(
            f"'{partial}', where the unfinished work would go, holds '{strange[0]}', which is not numfit's; "
            "move the directory away or choose another output"
        )
    busy = f"another numfit run is writing '{partial}' right now; wait for it, or choose another output"
    try:
        file = (partial / LOCK).open("a")
    except FileNotFoundError:
        raise OptionError(busy) from None  # removed since we looked: that run is just finishing
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(file.fileno()).st_ino == (partial / LOCK).stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:  # also when the holder finished and removed the file between our two steps
            raise OptionError(busy)
        yield


def check_identity(partial: Path, identity: dict[str, Any]) -> None:
    """Record what this run is made of, or compare it with what the unfinished one was made of.

    Raises:
        OptionError: they differ; names the first difference. Nothing is touched.
    """
    path = partial / IDENTITY
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        difference = describe_difference(before, identity)
        if difference:
            raise OptionError(
                f"'{partial}' holds unfinished work with another setting: {difference}; go on with the same setting, "
                "remove that directory to begin again, or choose another output"
            )
        return
    new = path.with_name(f"{IDENTITY}.new")
    with new.open("wb") as file:
        file.write(canonical_json(identity))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def describe_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference of two identities in words, or None: {"numfit_version", "recipe", "formats", "source"}."""
    if before.get("numfit_version") != now["numfit_version"]:
        return f"it was made by numfit {before.get('numfit_version')}, this is numfit {now['numfit_version']}"
    old, new = before.get("recipe") or {}, now["recipe"]
    for option in sorted(old.keys() | new.keys()):
        if old.get(option) != new.get(option):
            flag = "--rule" if option == "rules" else f"--{option.replace('_', '-')}"
            return f"{flag} was {_words(old.get(option))} and is now {_words(new.get(option))}"
    old, new = before.get("formats") or {}, now["formats"]
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            return f"the format '{name}' is not defined as it was"
    old, new = (before.get("source") or {}).get("files") or {}, now["source"]["files"]
    for file in sorted(old.keys() | new.keys()):
        if old.get(file) != new.get(file):
            what = "is gone" if file not in new else "is new" if file not in old else "has changed"
            return f"the source is not the same, its file '{file}' {what}"
    return None if before == now else "its record is damaged"


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join("=".join(map(str, item)) if isinstance(item, list) else str(item) for item in value) or "not given"
    return "not given" if value is None else str(value)


@dataclass(frozen=True)
class Record:
    """One line of the journal.

    Attributes:
        tensor: name in the source.
        sha256: of each slot, by its name in the file.
        error: relative squared error of what was read back; None for a kept tensor.
    """

    tensor: str
    sha256: dict[str, str]
    error: float | None

    def line(self) -> bytes:
        return (
            json.dumps({"tensor": self.tensor, "sha256": self.sha256, "error": self.error}, ensure_ascii=False) + "\n"
        ).encode()


class Journal:
    """The open journal and output file. Use `append` after a tensor is in the file and checked."""

    def __init__(self, path: Path, size: int) -> None:
        self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.file.truncate(size)
        self.file.seek(size)
        self.synced = time.monotonic()

    def append(self, record: Record, data: BinaryIO) -> None:
        """Record a finished tensor; `data` is the file it was written to."""
        write_all(self.file, record.line())
        if time.monotonic() - self.synced >= SYNC_EVERY:
            self.sync(data)

    def sync(self, data: BinaryIO) -> None:
        """Bring data, then journal, safely to the disk."""
        os.fsync(data.fileno())
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def close(self) -> None:
        self.file.close()


@dataclass(frozen=True)
class Resumed:
    """What of an earlier run is still sound.

    Attributes:
        records: the finished tensors, a prefix of the plan's order.
        journal_bytes: length of the journal that records them.
        damaged: the recorded tensor whose bytes were not as recorded, if there was one.
    """

    records: tuple[Record, ...]
    journal_bytes: int
    damaged: str | None = None


def recover(partial: Path, shards: Sequence[Shard], progress: Callable[[str, int], None] | None = None) -> Resumed:
    """Find the longest prefix of finished tensors whose bytes are in the files exactly as the journal says."""
    path = partial / JOURNAL
    order = [(shard, group) for shard in shards for group in shard.groups]
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records: list[Record] = []
    size = 0
    for line, (shard, group) in zip(lines, order):
        record = _parse(line)
        if record is None or record.tensor != group.name:
            break  # a line cut off by the kill; nothing after it can be meant
        if not _sound(partial / STAGE / shard.file, shard, group, record):
            return Resumed(tuple(records), size, group.name)
        records.append(record)
        size += len(line)
        if progress:
            progress(group.name, group.nbytes)
    return Resumed(tuple(records), size)


def _parse(line: bytes) -> Record | None:
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
        return Record(content["tensor"], dict(content["sha256"]), content["error"]) if content else None
    except (ValueError, KeyError, TypeError):
        return None


def _sound(path: Path, shard: Shard, group: Group, record: Record) -> bool:
    """Whether a recorded tensor is in its file as recorded (and, for the first of a file, the header too)."""
    if not path.is_file():
        return False
    with path.open("rb", buffering=0) as file:
        if group is shard.groups[0] and file.read(len(shard.header)) != shard.header:
            return False
        for slot in group.slots:
            file.seek(shard.infos[slot.name].start)
            digest, left = hashlib.sha256(), slot.nbytes
            while left and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            if left or digest.hexdigest() != record.sha256.get(slot.name):
                return False
    return True


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write everything; an unbuffered file may take less at a time."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def remove(partial: Path) -> None:
    """Remove the partial directory, the lock last."""
    for name in (JOURNAL, IDENTITY, f"{IDENTITY}.new"):
        (partial / name).unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
