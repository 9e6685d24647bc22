"""`numfit inspect`: what is in a checkpoint, and whether every byte is what it should be."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numfit.checkpoint import Checkpoint
    from numfit.formats import Format

NAME = "inspect"
HELP = "what is in a numfit checkpoint: formats, sizes, errors; --verify re-reads every byte"
EPILOG = """\
examples:
  numfit inspect my-model-mant4
  numfit inspect my-model-mant4 --verify               # compare every byte with the manifest's hashes
  numfit inspect my-model-mant4 --tensors              # one line a tensor
  numfit inspect my-model-mant4 --json | jq .formats

Errors are relative squared errors, sum (w - w')^2 / sum w^2, of what was read back from the file against its source.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a numfit checkpoint")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with the manifest")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    from numfit.checkpoint import open_checkpoint, read_manifest, verify
    from numfit.pipeline.progress import Progress

    directory = Path(args.model)
    verified = None
    if args.verify:
        total = sum(entry["bytes"] for entry in read_manifest(directory)["files"].values())
        with Progress("verifying", 2 * total) as bar:  # files, then the tensors in them
            verified = verify(directory, bar.add)
    result = describe(open_checkpoint(directory))
    if args.json:
        print(json.dumps({**result, "verified": verified}, indent=1))
        return 0
    _print(directory, result, args.tensors)
    if verified:
        print(
            f"verified: {verified['files']} files with {verified['bytes']:,} bytes, {verified['tensors']} quantized "
            f"and {verified['kept']} kept tensors are as numfit.json says"
        )
    else:
        print("names, types and shapes are consistent; --verify compares every byte", file=sys.stderr)
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as the numbers that people ask for."""
    manifest = checkpoint.manifest
    by_name = {fmt.name: fmt for fmt in checkpoint.formats.values()}
    tensors, kept = manifest["tensors"], manifest["kept"]
    by_format: dict[str, list[dict[str, Any]]] = {}
    for entry in tensors.values():
        by_format.setdefault(entry["format"], []).append(entry)
    errors = sorted(((name, entry["error"]) for name, entry in tensors.items()), key=lambda item: -item[1])
    reasons: dict[str, list[dict[str, Any]]] = {}
    for entry in kept.values():
        reasons.setdefault(entry["reason"], []).append(entry)
    return {
        "format_version": manifest["format_version"],
        "numfit_version": manifest["numfit_version"],
        "recipe": manifest["recipe"],
        "formats": {
            name: {**_total(entries), "mean_error": sum(entry["error"] for entry in entries) / len(entries)}
            for name, entries in sorted(by_format.items())
        },
        "kernels": {name: _kernel(by_name[name], entries[0]["shape"][-1]) for name, entries in sorted(by_format.items())},
        "embeddings": _total(e for e in [*tensors.values(), *kept.values()] if e["role"] in ("embedding", "head")),
        "kept": {reason: _total(entries) for reason, entries in sorted(reasons.items())},
        "dropped": manifest["dropped"],
        "totals": manifest["totals"],
        "weight_file_bytes": sum(e["bytes"] for name, e in manifest["files"].items() if name.endswith(".safetensors")),
        "worst": [[name, error] for name, error in errors[:5]],
        "tensors": {
            name: {
                "format": entry.get("format"),
                "shape": entry["shape"],
                "bytes": entry["bytes"],
                "error": entry.get("error"),
            }
            for name, entry in sorted([*tensors.items(), *kept.items()])
        },
    }


def _kernel(fmt: Format, columns: int) -> dict[str, Any]:
    """What would compute a format on this machine's CPU, and the largest rounding of a level to int8 there."""
    from numfit import native
    from numfit.errors import NumfitError
    from numfit.kernels import kernel_of

    try:
        kernel, rounding = kernel_of(fmt, columns)
    except NumfitError as error:
        return {"kernel": None, "reason": str(error), "isa": native.isa(), "rounding": None}
    return {"kernel": kernel, "isa": native.isa(), "rounding": rounding}


def _total(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    entries = list(entries)
    weights = sum(math.prod(entry["shape"]) for entry in entries)
    size = sum(entry["bytes"] for entry in entries)
    return {
        "tensors": len(entries),
        "weights": weights,
        "bytes": size,
        "bits_per_weight": 8 * size / weights if weights else None,
    }


def _print(directory: Path, result: dict[str, Any], every: bool) -> None:
    from numfit.cli.plan import summary
    from numfit.report import Column, text_table

    recipe = result["recipe"]
    options = [f"embedding {recipe['embedding']}", f"scale rule {recipe['scale_rule']}"]
    options += [f"rule {text}={name}" for text, name in recipe["rules"]] + [f"skip {text}" for text in recipe["skip"]]
    print(f"{directory}: {recipe['format']}, {', '.join(options)}; made by numfit {result['numfit_version']}\n")
    rows = [{"what": name, **entry} for name, entry in result["formats"].items()]
    rows += [{"what": f"kept: {reason}", **entry} for reason, entry in result["kept"].items()]
    megabytes = Column("bytes", "MB", lambda value: f"{value / 1e6:.2f}")
    columns = [
        Column("what", "format", align="left"), Column("tensors", "tensors", ",d"), Column("weights", "weights", ",d"),
        Column("bits_per_weight", "bits/weight", ".4f"), megabytes, Column("mean_error", "mean error", ".3g"),
    ]  # fmt: skip
    print(text_table(rows, columns), summary(result["totals"]), sep="\n\n", end="\n\n")
    for name, entry in result["kernels"].items():
        exact = "levels exact" if entry["rounding"] == 0 else f"levels within {entry['rounding'] or 0:.2%} of the largest"
        how = (
            f"{entry['kernel']}, on {entry['isa']}, {exact} in int8"
            if entry["kernel"]
            else f"PyTorch, because {entry['reason']}"
        )
        print(f"{name} runs here by: {how}")
    for name, why in result["dropped"].items():
        print(f"not written: {name} ({why})")
    if every:
        rows = [{"name": n, **e, "shape": "×".join(map(str, e["shape"]))} for n, e in result["tensors"].items()]
        columns = [
            Column("name", "tensor", align="left"), Column("shape", "shape", align="left"),
            Column("format", "format", align="left"), Column("bytes", "bytes", ",d"), Column("error", "error", ".6f"),
        ]  # fmt: skip
        print(text_table(rows, columns), end="\n\n")
    print("largest errors: " + ", ".join(f"{name} {error:.3g}" for name, error in result["worst"]))
