"""numfit.json, the manifest of a numfit checkpoint: what was made from what, with which error, and every byte's hash.

config.json alone suffices to load a checkpoint; the manifest is for people, for `inspect`, and for `verify`. It holds
nothing that depends on time, place or machine, so equal inputs give equal manifests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numfit.checkpoint.source import read_json
from numfit.errors import CheckpointError

FORMAT_VERSION = 1  # of the checkpoint's layout: docs/format.md
MANIFEST = "numfit.json"
_SECTIONS = ("recipe", "source", "tensors", "kept", "files", "totals")


def canonical_json(content: dict[str, Any], sort: bool = True) -> bytes:
    """Our one spelling of JSON: indented by one, a newline at the end, keys sorted unless they are a user's."""
    # A user's config.json may hold Infinity (Mamba's time steps do); nothing of ours does.
    return (json.dumps(content, indent=1, sort_keys=sort, ensure_ascii=False, allow_nan=not sort) + "\n").encode()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a numfit checkpoint.

    Raises:
        CheckpointError: no such directory, not a numfit checkpoint, an unknown version, or a damaged manifest.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"'{directory}' is not a directory; give the directory of a numfit checkpoint")
    if not path.is_file():
        raise CheckpointError(f"'{directory}' is not a numfit checkpoint: it has no {MANIFEST}")
    manifest = read_json(path)
    check_version(manifest.get("format_version"), path)
    missing = [section for section in _SECTIONS if not isinstance(manifest.get(section), dict)]
    if missing:
        raise CheckpointError(f"'{path}' has no section '{missing[0]}'; the manifest is damaged, copy it again")
    return manifest


def check_version(version: object, path: Path) -> None:
    """Refuse a layout that this numfit does not know.

    Raises:
        CheckpointError: any version but ours.
    """
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format_version {version!r}, and this numfit reads version {FORMAT_VERSION}; "
            "use a newer numfit, or quantize the model again"
        )
