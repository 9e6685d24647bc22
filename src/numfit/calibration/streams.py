"""The hidden states of all windows between two layers, in files: memory holds what the system can spare.

A stream is one file a layer, mapped into memory. The states that enter layer k+1 are written beside those that entered
layer k, which go only when layer k is finished for good; so a killed run finds what it needs to go on.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 1 << 24


class Stream:
    """Hidden states fp32 [n, T, C] before each layer of a model."""

    def __init__(self, directory: Path, name: str, shape: tuple[int, int, int]) -> None:
        self.directory, self.name, self.shape = directory, name, shape

    def path(self, k: int) -> Path:
        """The file of the states that enter layer k."""
        return self.directory / f"{self.name}-{k:05d}.f32"

    def open(self, k: int, *, new: bool = False) -> Tensor:
        """The states that enter layer k, as a tensor backed by the file."""
        path, size = self.path(k), math.prod(self.shape)
        if new:
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, 4 * size))  # a full disk shall fail here, not as a signal
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(self.shape)

    def seal(self, k: int) -> str:
        """Bring the states that enter layer k safely to the disk; returns their sha256."""
        digest = hashlib.sha256()
        with self.path(k).open("rb+", buffering=0) as file:
            os.fsync(file.fileno())
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def drop_before(self, k: int) -> None:
        """Remove the states that entered layers before k."""
        for path in self.directory.glob(f"{self.name}-*.f32"):
            if path.stem.rpartition("-")[2].isdigit() and int(path.stem.rpartition("-")[2]) < k:
                path.unlink()
