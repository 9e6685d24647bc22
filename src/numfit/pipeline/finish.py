"""The end of a walk: configuration, index, tokenizer and manifest around the weights; and: is it done already?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from numfit.checkpoint.manifest import FORMAT_VERSION, MANIFEST, canonical_json, read_manifest
from numfit.checkpoint.packed import plane_name
from numfit.checkpoint.safetensors_file import index_json, sha256_file
from numfit.checkpoint.source import INDEX_FILE, Source
from numfit.errors import OptionError
from numfit.pipeline.partial import Record, describe_difference
from numfit.pipeline.planning import Plan, PlannedTensor
from numfit.pipeline.recipe import RECIPE, write_recipe


def already_there(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` is the finished checkpoint; False if there is nothing.

    Raises:
        OptionError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise OptionError(f"'{out}' is a file; choose a directory that does not exist yet")
    if not (out / MANIFEST).is_file():
        raise OptionError(f"'{out}' is not empty and not a numfit checkpoint; choose another output or remove it")
    manifest = read_manifest(out)
    difference = describe_difference({key: manifest.get(key) for key in identity}, identity)
    if difference:
        raise OptionError(
            f"'{out}' is a numfit checkpoint made with another setting: {difference}; choose another output or remove it"
        )
    broken = [
        file for file, entry in manifest["files"].items()
        if not (out / file).is_file() or (out / file).stat().st_size != entry["bytes"]
    ]  # fmt: skip
    if broken:
        raise OptionError(
            f"'{out}' is this checkpoint, but its file '{broken[0]}' is missing or cut off; remove the directory and run again"
        )
    return True


def finish(
    source: Source, plan: Plan, identity: dict[str, Any], stage: Path, records: dict[str, Record],
    calibration: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Write everything but the weights: configuration, index, tokenizer, recipe and, last, the manifest."""
    if hasattr(source, "save_tokenizer"):
        source.save_tokenizer(stage)
    for path in source.aux_files():
        shutil.copyfile(path, stage / path.name)
    quantization = {
        "quant_method": "numfit",
        "format_version": FORMAT_VERSION,
        "formats": identity["formats"],
        "tensors": {tensor.name: tensor.format.name for tensor in plan.quantized if tensor.format},
    }
    (stage / "config.json").write_bytes(canonical_json({**plan.config, "quantization_config": quantization}, sort=False))
    if calibration is not None:
        write_recipe(stage / RECIPE, plan.recipe)
    if len(plan.shards) > 1:
        (stage / INDEX_FILE).write_bytes(canonical_json(index_json(plan.shards), sort=False))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(stage.iterdir()) if path.name != MANIFEST
    }  # fmt: skip
    place = {group.name: shard.file for shard in plan.shards for group in shard.groups}

    def common(tensor: PlannedTensor) -> dict[str, Any]:
        return {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": place[tensor.name],
            "bytes": tensor.bytes_after,
            "role": tensor.role,
        }

    tensors, kept = {}, {}
    for tensor in plan.tensors:
        if tensor.dropped:
            continue
        record = records[tensor.name]
        if tensor.format is None:
            kept[tensor.name] = {**common(tensor), "sha256": record.sha256[tensor.name], "reason": tensor.why}
        else:
            hashes = {p: record.sha256[plane_name(tensor.name, p)] for p in tensor.format.planes(tensor.shape)}
            tensors[tensor.name] = {
                **common(tensor), "format": tensor.format.name, "error": record.error, "planes": hashes,
            }  # fmt: skip
    dropped = {tensor.name: tensor.why for tensor in plan.tensors if tensor.dropped}
    manifest = {
        "format_version": FORMAT_VERSION, **identity, "tensors": tensors, "kept": kept, "dropped": dropped,
        "files": files, "totals": plan.totals(), **({"calibration": calibration} if calibration else {}),
    }  # fmt: skip
    path = stage / MANIFEST
    path.write_bytes(canonical_json(manifest))
    for file in stage.iterdir():
        _sync(file)
    _sync(stage)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
