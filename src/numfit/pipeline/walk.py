"""The model-free walk: every tensor is read, quantized, written, read back and checked before the next one.

Memory is one tensor's working set plus a constant. Sizes are known from the plan, so each file's header is written
first and tensors are appended in its order; a run killed at any point goes on where it stopped (partial.py) and ends
with the same bytes. The error in the manifest is that of what was *read back from the file*. Nothing that depends on
time, place, machine or the number of threads goes into the checkpoint: sums are made in numpy, in one thread, over
chunks of fixed size, and recorded with six digits.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from numfit.checkpoint.manifest import read_manifest
from numfit.checkpoint.packed import plane_name
from numfit.checkpoint.safetensors_file import (
    Group,
    Shard,
    TensorInfo,
    read_tensor,
    tensor_bytes,
)
from numfit.checkpoint.source import DirectorySource, Source
from numfit.errors import CheckpointError, FormatError
from numfit.formats import Format, QuantizedTensor, quantize_tensor
from numfit.pipeline import partial as unfinished
from numfit.pipeline.finish import already_there, finish
from numfit.pipeline.layers import solve_layers
from numfit.pipeline.memory import peak_bytes
from numfit.pipeline.partial import Journal, Record
from numfit.pipeline.planning import Plan, PlannedTensor, rule_for
from numfit.pipeline.prepare import prepare
from numfit.pipeline.progress import Progress
from numfit.pipeline.results import Calibration, Results
from numfit.threads import cpu_threads
from numfit.version import VERSION

CHECK_WEIGHTS = 1 << 22  # weights decoded at a time while checking


def quantize(
    model: str | Path,
    format: str | Format | None,
    out: str | Path,
    *,
    bits: float | None = None,
    embedding: str | Format | None = None,
    rules: Sequence[str | tuple[str, str]] | None = None,
    skip: Sequence[str] | None = None,
    scale_rule: str | None = None,
    shard_size: str | int | None = None,
    threads: int | None = None,
    progress: bool = True,
    calibration: str | Path | None = None,
    recipe: str | Path | None = None,
    statistics: str | Path | None = None,
    device: torch.device | str | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """Quantize a model to a packed checkpoint. A run that was killed is resumed by the same call.

    Args:
        model, format, bits, embedding, rules, skip, scale_rule, shard_size, threads: as for `plan`; None takes the recipe's, or
            else the default.
        out: directory to make; must not exist or be empty, or be this very checkpoint (then nothing is done).
            Unfinished work lies in `<out>.partial`.
        progress: show it on standard error.
        calibration: a text file (or the text itself), or "hub:DATASET[:CONFIG[:SPLIT]]"; None rounds without data.
        recipe: "fast", "balanced", "quality", "extreme", or the path of a recipe.yaml.
        statistics: keep the statistics of the linears' inputs in this directory, for other runs on the same text.
        device: where layers run on the text and are learned, for instance "cuda"; None is the CPU, which does all else. With
            another one, 128 windows of 2048 tokens are taken unless `windows` and `context` or a recipe's file say otherwise.
        parts: fields of `recipe.Parts`, each of which wins over the recipe.

    Returns:
        {"status": "written" or "already there", "out", "tensors", "kept", "resumed", "seconds", "spent": of a calibrated
        run, seconds by part, "peak_memory_bytes", "file_bytes", "totals": see `Plan.totals`, "worst": [[tensor, relative
        squared error], …], "warnings"}.

    Raises:
        CheckpointError: the source is damaged or holds NaN or Inf, or the output cannot be written.
        FormatError: an unknown format. OptionError: options that do not fit, or differ from those of unfinished work.
    """
    given = {"embedding": embedding, "rules": rules, "skip": skip, "scale_rule": scale_rule, "shard_size": shard_size}
    with cpu_threads(threads):
        source, plan, task = prepare(model, format, bits, given, calibration, recipe, statistics, parts, device)
        return _carry_out(source, plan, out, progress, task)


def _carry_out(source: Source, plan: Plan, out: str | Path, progress: bool, task: Calibration | None) -> dict[str, Any]:
    """Make `plan` real at `out`, unless it is already; see `quantize`."""
    started = time.monotonic()
    formats = {tensor.format.name: tensor.format.to_json() for tensor in plan.quantized if tensor.format}
    out = Path(out).expanduser().resolve()
    identity = {
        "numfit_version": VERSION,
        "recipe": plan.recipe,
        "formats": formats,
        "source": _fingerprint(source, progress),
    }
    partial = out.with_name(f"{out.name}.partial")
    resumed, spent = 0, dict[str, float]()
    with _write_errors(out, partial):
        if already_there(out, identity):
            status = "already there"
            if partial.is_dir() and not (partial / unfinished.STAGE).exists():
                with unfinished.locked(partial):  # left by a run that was killed after its last step but one
                    unfinished.remove(partial)
        else:
            status = "written"
            with unfinished.locked(partial):
                unfinished.check_identity(partial, identity)
                resumed, spent = _walk(source, plan, identity, partial, progress, task)
                os.rename(partial / unfinished.STAGE, out)
                unfinished.remove(partial)
    manifest = read_manifest(out)
    errors = {name: entry["error"] for name, entry in manifest["tensors"].items()}
    return {
        "status": status,
        "out": str(out),
        "tensors": len(plan.quantized),
        "kept": len(plan.kept),
        "resumed": resumed,
        "seconds": round(time.monotonic() - started, 3),
        "spent": {part: round(seconds, 3) for part, seconds in spent.items()},
        "peak_memory_bytes": peak_bytes(),
        "file_bytes": plan.file_bytes,
        "totals": plan.totals(),
        "worst": sorted(([name, error] for name, error in errors.items()), key=lambda item: -item[1])[:5],
        "warnings": [*plan.warnings, *manifest.get("calibration", {}).get("notes", [])],
    }


def _fingerprint(source: Source, shown: bool) -> dict[str, Any]:
    if not isinstance(source, DirectorySource):
        return source.fingerprint()
    total = sum((source.path / file).stat().st_size for file in source.files)
    with Progress("hashing the source", total, shown=shown) as bar:
        return source.fingerprint(progress=bar.add)


@contextmanager
def _write_errors(out: Path, partial: Path) -> Iterator[None]:
    """Say in a sentence why the output cannot be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        again = (
            "what is finished is kept there, and the same command goes on with it"
            if partial.exists()
            else "nothing was written"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = f"no space left for '{error.filename or partial}' ({error.strerror}); make room and run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = f"no permission to write '{error.filename or out}' ({error.strerror}); choose another output"
        else:
            what = f"cannot write '{error.filename or partial}': {error.strerror or error}"
        raise CheckpointError(f"{what}; {again}") from error


# -- the walk ----------------------------------------------------------------------------------------------------------


def _walk(
    source: Source, plan: Plan, identity: dict[str, Any], partial: Path, shown: bool, task: Calibration | None
) -> tuple[int, dict[str, float]]:
    """Fill `partial`'s stage with the finished checkpoint.

    Returns:
        How many tensors an earlier run had done, and the seconds that parts of a calibrated run took.
    """
    stage = partial / unfinished.STAGE
    stage.mkdir(exist_ok=True)
    _check_space(stage, plan)
    solved = solve_layers(source, plan, task, partial, shown) if task else None
    found = unfinished.recover(partial, plan.shards)
    if shown and found.damaged:
        print(f"the unfinished work is damaged at '{found.damaged}'; going on from there", file=sys.stderr, flush=True)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    done = sum(planned[record.tensor].bytes_before for record in found.records)
    records = list(found.records)
    journal = Journal(partial / unfinished.JOURNAL, found.journal_bytes)
    try:
        with Progress(
            "quantizing", sum(tensor.bytes_before for tensor in plan.tensors if not tensor.dropped), done, shown
        ) as bar:
            skip = len(found.records)
            for shard in plan.shards:
                if skip >= len(shard.groups):
                    skip -= len(shard.groups)
                    continue
                records += _write_shard(source, stage, shard, skip, planned, plan.recipe["scale_rule"], solved, journal, bar)
                skip = 0
    finally:
        journal.close()
    finish(source, plan, identity, stage, {record.tensor: record for record in records}, solved.account if solved else None)
    return len(found.records), solved.seconds if solved else {}


def _check_space(stage: Path, plan: Plan) -> None:
    """Say now, not after hours, that the disk is too small."""
    free = shutil.disk_usage(stage).free + sum(file.stat().st_size for file in stage.iterdir() if file.is_file())
    if plan.file_bytes > free:
        sizes = f"{plan.file_bytes / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, sizes, str(stage))


def _write_shard(
    source: Source, stage: Path, shard: Shard, skip: int, planned: dict[str, PlannedTensor], rule: str,
    solved: Results | None, journal: Journal, bar: Progress,
) -> list[Record]:  # fmt: skip
    """Append the groups after the first `skip` to one file; truncates what stands behind those."""
    path = stage / shard.file
    records = []
    with path.open("r+b" if skip else "w+b", buffering=0) as file:
        if skip:
            file.truncate(len(shard.header) + sum(group.nbytes for group in shard.groups[:skip]))
            file.seek(0, os.SEEK_END)
        else:
            unfinished.write_all(file, shard.header)
        for group in shard.groups[skip:]:
            tensor = planned[group.name]
            bar.at(tensor.name)
            record = _write_tensor(source, stage, shard, group, tensor, rule, solved, file)
            journal.append(record, file)
            records.append(record)
            bar.add(tensor.name, tensor.bytes_before)
        journal.sync(file)
    return records


def _write_tensor(
    source: Source, stage: Path, shard: Shard, group: Group, tensor: PlannedTensor, rule: str, solved: Results | None,
    file: BinaryIO,
) -> Record:  # fmt: skip
    """Read, quantize (or take what the calibrated walk has solved), append, read back and check one tensor."""
    weight = source.read(tensor.name)
    _check_finite(weight, source.info(tensor.name), source.path)
    slots = solved.read(tensor) if solved else None
    sha256 = _append(_encode(weight, tensor, rule) if slots is None else slots, group, file)
    again = {slot.name: read_tensor(stage, shard.infos[slot.name]) for slot in group.slots}
    for name, value in again.items():
        if hashlib.sha256(tensor_bytes(value)).hexdigest() != sha256[name]:
            raise CheckpointError(
                f"'{stage / shard.file}': '{name}' was read back differently than it was written; check the disk"
            )
    if tensor.format is None:
        return Record(tensor.name, sha256, None)
    planes = {plane: again[plane_name(tensor.name, plane)] for plane in tensor.format.planes(tensor.shape)}
    known = solved.errors.get(tensor.name) if solved else None  # measured against what the codes stand for
    lost = known
    if lost is None:
        lost = relative_error(weight, QuantizedTensor.from_planes(tensor.format, tensor.shape, planes, name=f"'{tensor.name}'"))
    if not lost < 1:
        raise FormatError(
            f"tensor '{tensor.name}' as {tensor.format.name} would keep nothing of the weights (relative squared error "
            f"{lost:.3g}); give it another format (--rule) or keep it (--skip)"
        )
    return Record(tensor.name, sha256, lost)


def _encode(weight: Tensor, tensor: PlannedTensor, rule: str) -> dict[str, Tensor]:
    """What the file will hold of one tensor, by the names of its slots."""
    if tensor.format is None:
        return {tensor.name: weight}
    try:
        packed = quantize_tensor(weight, tensor.format, scale_rule=rule_for(tensor.format, rule))
    except FormatError as error:
        raise FormatError(f"tensor '{tensor.name}': {error}") from None
    return {plane_name(tensor.name, plane): value for plane, value in packed.state_dict().items()}


def _append(slots: dict[str, Tensor], group: Group, file: BinaryIO) -> dict[str, str]:
    """Write a group's tensors at the end of the file; returns their sha256."""
    sha256 = {}
    for slot in group.slots:
        data = tensor_bytes(slots[slot.name])
        if len(data) != slot.nbytes:  # a bug of numfit's own, which would shift everything behind it
            raise AssertionError(f"{slot.name} has {len(data)} bytes, planned were {slot.nbytes}")
        unfinished.write_all(file, data)
        sha256[slot.name] = hashlib.sha256(data).hexdigest()
    return sha256


def _check_finite(weight: Tensor, info: TensorInfo, path: Path) -> None:
    """Refuse NaN and Inf in parameters. Buffers, such as masks, may hold them: they are copied as they are."""
    parameter = weight.dim() >= 2 or info.name.rpartition(".")[2] in ("weight", "bias")
    if not (parameter and weight.is_floating_point()):
        return
    flat = weight.reshape(-1)
    for start in range(0, len(flat), CHECK_WEIGHTS):
        piece = flat[start : start + CHECK_WEIGHTS]
        bad = (~torch.isfinite(piece)).nonzero()
        if len(bad):
            first = start + int(bad[0])
            where = [int(i) for i in np.unravel_index(first, tuple(weight.shape))]
            count = int((~torch.isfinite(flat)).sum())
            more = f" and {count - 1} more such values" if count > 1 else ""
            file = path / info.file if path.is_dir() else path
            raise CheckpointError(
                f"'{file}': tensor '{info.name}' holds {float(flat[first])} at {where}{more}; "
                "the model is damaged, get a sound copy"
            )


def relative_error(weight: Tensor, packed: QuantizedTensor) -> float:
    """Σ(w − ŵ)² / Σw² with six digits, ŵ in fp32; the same for any number of threads. inf where ŵ is not finite."""
    difference = total = 0.0
    rows = weight.shape[0]
    step = max(1, CHECK_WEIGHTS * rows // max(1, weight.numel()))
    for start in range(0, rows, step):
        w = weight[start : start + step].float().cpu().numpy()
        w_hat = packed.rows(slice(start, start + step)).cpu().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            difference += float(np.square(w - w_hat, dtype=np.float64).sum())
        total += float(np.square(w, dtype=np.float64).sum())
    if not np.isfinite(difference):
        return float("inf")
    if total == 0:  # a type without a zero level stores a tensor of zeros as its least scale
        return 0.0 if difference <= 1e-12 * weight.numel() else float("inf")
    return float(f"{difference / total:.6g}")
