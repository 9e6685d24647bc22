"""How big a model is on disk: the bytes of its weight files, and the bits per weight of what numfit quantized in it.

Both are read from the directory, never from what somebody meant to write. "Bits per weight" counts codes, scales and
all other planes of the quantized decoder weights and says nothing about the rest; embeddings have a format of their own
and can be half of a small model, so whole-model bytes stand beside it everywhere.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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
    path = directory / "numfit.json"
    if not path.is_file():
        return None
    try:
        tensors: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        parts = [(name, 8 * int(t["bytes"]), math.prod(t["shape"])) for name, t in tensors.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a numfit manifest ({error}): copy it again from the checkpoint") from None
    if not parts:
        return None
    linears = [p for p in parts if ".layers." in f".{p[0]}"] or parts
    return sum(bits for _, bits, _ in linears) / sum(count for _, _, count in linears)
