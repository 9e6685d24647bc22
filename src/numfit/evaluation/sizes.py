"""How big a model is on disk: the bytes of its weight files, and the bits per weight of what numfit quantized in it.

Both are read from the directory, never from what somebody meant to write. "Bits per weight" counts codes, scales and
all other planes of the quantized decoder weights and says nothing about the rest; embeddings have a format of their own
and can be half of a small model, so whole-model bytes stand beside it everywhere.
"""

from __future__ import annotations

from pathlib import Path

from numfit.checkpoint.manifest import MANIFEST, read_manifest
from numfit.errors import CheckpointError

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def model_bytes(directory: Path) -> int | None:
    """Bytes of all weight files directly in `directory` (safetensors where there are any), None when it has none."""
    files = [f for f in directory.iterdir() if f.is_file() and f.suffix in _WEIGHT_FILES and f.name not in _NOT_WEIGHTS]
    files = [f for f in files if f.suffix == ".safetensors"] or files
    return sum(f.stat().st_size for f in files) or None


def bits_per_weight(directory: Path) -> float | None:
    """8·(packed bytes)/(weights) of the quantized decoder weights of a numfit checkpoint; None for any other directory.

    Raises:
        CheckpointError: numfit.json is there but is not a manifest.
    """
    if not (directory / MANIFEST).is_file():
        return None
    try:
        linears = read_manifest(directory)["totals"]["linears"]
        return 8 * linears["bytes"] / linears["weights"] if linears["weights"] else None
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{directory / MANIFEST}' has no totals of the linears ({error}); copy it again"
        ) from None
