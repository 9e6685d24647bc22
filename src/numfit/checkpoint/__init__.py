"""Checkpoints in and out: sources to read from, the packed checkpoint and its manifest, the files themselves."""

from numfit.checkpoint.manifest import FORMAT_VERSION, MANIFEST, read_manifest
from numfit.checkpoint.packed import Checkpoint, open_checkpoint, read_quantized, verify
from numfit.checkpoint.source import Source, open_source, resolve_model

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Checkpoint",
    "Source",
    "open_checkpoint",
    "open_source",
    "read_manifest",
    "read_quantized",
    "resolve_model",
    "verify",
]
