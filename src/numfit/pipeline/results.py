"""What a calibrated run is asked to do, and the files in which finished layers wait for the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numfit.checkpoint.packed import plane_name
from numfit.pipeline.planning import PlannedTensor
from numfit.pipeline.recipe import Parts, as_recipe
from numfit.text import read_dataset, read_text


@dataclass(frozen=True)
class Calibration:
    """The calibrated part of a run: what is done on which text, where statistics are kept (if they are), where layers run."""

    parts: Parts
    text: str
    statistics: Path | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a value)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the recipe says of it."""
        sha256 = hashlib.sha256(self.text.encode("utf-8", errors="surrogatepass")).hexdigest()
        return {**as_recipe(self.parts), "calibration": f"text of sha256 {sha256}"}


def read_calibration(text: str | Path) -> str:
    """The calibration text: of a file, of a data set ("hub:NAME[:CONFIG[:SPLIT]]"), or the text itself.

    Raises:
        NumfitError: the file cannot be used.
    """
    name = str(text)
    if name.startswith("hub:"):
        return read_dataset(name.removeprefix("hub:"))
    return read_text(text) if isinstance(text, Path) or os.path.isfile(name) else name


class Results:
    """The solved tensors of finished layers, read from their files when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home: dict[str, Path] = {}
        self.errors: dict[str, float] = {}
        self.notes: list[str] = []
        self.tokens = 0
        self.seconds = {"statistics": 0.0, "solving": 0.0, "learning": 0.0}  # of this run

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time inside as that of a part."""
        started = time.monotonic()
        yield
        self.seconds[part] += time.monotonic() - started

    @property
    def account(self) -> dict[str, Any]:
        """What the manifest says of the calibration."""
        return {"tokens": self.tokens, "layers": len(set(self.home.values())), "notes": self.notes}

    def take_up(self, k: int) -> dict[str, Any] | None:
        """Learn of layer k's file; returns what it says of itself, or None where it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.directory / f"{k:05d}.safetensors"
        try:
            with safe_open(str(path), "pt") as file:
                said: dict[str, Any] = json.loads(file.metadata()["layer"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        self.errors |= said["errors"]
        self.home |= dict.fromkeys([*said["errors"], *said["rewritten"]], path)
        self.notes += said["notes"]
        return said

    def write(self, k: int, planes: Mapping[str, Tensor], said: dict[str, Any]) -> None:
        """Write layer k's file in one step."""
        from safetensors.torch import save_file

        path = self.directory / f"{k:05d}.safetensors"
        part = path.with_name(path.name + ".part")
        save_file({n: t.contiguous() for n, t in planes.items()}, str(part), metadata={"layer": json.dumps(said)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)

    def read(self, tensor: PlannedTensor) -> dict[str, Tensor] | None:
        """What the checkpoint will hold of a tensor, by the names of its slots; None where it was not solved here."""
        from safetensors import safe_open

        if tensor.name not in self.home:
            return None
        names = [plane_name(tensor.name, p) for p in tensor.format.planes(tensor.shape)] if tensor.format else [tensor.name]
        with safe_open(str(self.home[tensor.name]), "pt") as file:
            return {name: file.get_tensor(name) for name in names}
