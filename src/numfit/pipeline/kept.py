"""A directory of statistics that runs on the same model and text share (`--statistics`)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from numfit.checkpoint.manifest import canonical_json
from numfit.checkpoint.source import Source
from numfit.errors import CheckpointError, OptionError


def claim(directory: Path, source: Source, text: str, windows: Tensor) -> None:
    """Make sure that a directory of kept statistics is of this model and these windows.

    Raises:
        OptionError: it is of others. CheckpointError: it is damaged.
    """
    mine = {
        "model": hashlib.sha256(canonical_json({"config": source.config(), **source.fingerprint()})).hexdigest(),
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "text": text,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "statistics.json"
    if not path.is_file():
        part = path.with_name(path.name + ".part")
        part.write_bytes(canonical_json(mine))
        os.replace(part, path)
        return
    try:
        said = json.loads(path.read_bytes())
    except ValueError:
        raise CheckpointError(f"'{path}' is damaged; delete that directory, or pass another one to --statistics") from None
    if said != mine:
        raise OptionError(f"--statistics '{directory}' holds those of another model, text or windows; pass another directory")
