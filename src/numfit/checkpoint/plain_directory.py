"""Write a plain Hugging Face directory tensor by tensor: what `convert` and the exact rewrites of a model put out.

The directory is built under a temporary name beside its place and renamed when it is whole, so that what carries the
final name is always complete. The headers are laid out first (sizes are known), the tensors follow one at a time:
memory is one tensor's, whatever the size of the model. Gives up resuming: a killed run begins again (quantizing, which
takes longer, has its own walk that resumes).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from numfit.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    Slot,
    index_json,
    layout_shards,
    make_group,
    tensor_bytes,
)
from numfit.errors import CheckpointError

SHARD_LIMIT = 5 * 10**9  # bytes


@contextmanager
def staged_directory(out_dir: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `out_dir` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: `out_dir` exists and is not an empty directory, or the disk is full or may not be written.
    """
    out_dir = Path(out_dir).absolute()
    if (out_dir.is_dir() and any(out_dir.iterdir())) or out_dir.is_file():
        raise CheckpointError(f"{out_dir} exists and is not an empty directory; choose another name or remove it")
    try:
        with temporary_sibling(out_dir) as stage:
            yield stage
            os.replace(stage, out_dir)
    except OSError as error:
        raise CheckpointError(f"cannot write {out_dir}: {error.strerror or error}") from error


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A directory beside `path` to build it in; removed at the end, as are those that killed runs left."""
    stage = path.parent / f".{path.name}.partial-{os.getpid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(stage)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_abandoned(stage: Path) -> None:
    """Remove what killed runs left: partial directories of the same place whose process is gone."""
    for other in stage.parent.glob(stage.name.rpartition("-")[0] + "-*"):
        pid = other.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(other, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_tensors(
    directory: Path, slots: Iterable[Slot], read: Callable[[str], Tensor], progress: str | None = None
) -> None:
    """Write safetensors shards (with an index where there are several) of the tensors in `slots`.

    Args:
        read: called once a name, in the order of the file; must return the slot's shape and dtype.
        progress: the label of a progress bar (shown on terminals only), or None.
    """
    shards = layout_shards([make_group(slot.name, [slot]) for slot in slots], SHARD_LIMIT)
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    with tqdm(total=total, unit="B", unit_scale=True, desc=progress, disable=None if progress else True) as bar:
        for shard in shards:
            with open(directory / shard.file, "wb") as file:
                file.write(shard.header)
                for slot in shard.slots:
                    tensor = read(slot.name)
                    if tuple(tensor.shape) != slot.shape or DTYPE_NAMES[tensor.dtype] != slot.dtype:
                        raise CheckpointError(
                            f"tensor '{slot.name}' came out as {DTYPE_NAMES[tensor.dtype]} {tuple(tensor.shape)} "
                            f"where {slot.dtype} {slot.shape} was announced; the source changed meanwhile"
                        )
                    file.write(tensor_bytes(tensor))
                    bar.update(slot.nbytes)
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", index_json(shards))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with a newline at the end; the same bytes on every system."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
