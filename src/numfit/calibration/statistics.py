"""What a linear's inputs look like, gathered while they stream by: second moment, mean, largest magnitude.

    H = 2/T · X Xᵀ   [K, K]      D = 2/T · (X̃ − X) Xᵀ   [K, K], where two streams are compared

X are the inputs in the stream that is calibrated on, X̃ those of the same tokens in the full-precision model
(GPTQ; GPTAQ, QEP for D). Linears that are fed the same tensor share one set of statistics.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from numfit.errors import CheckpointError


@dataclass(frozen=True)
class Statistics:
    """Statistics of the inputs [T, K] of one or more linears.

    Attributes:
        tokens: T.
        h: 2/T · Σ x xᵀ, fp32 [K, K], symmetric.
        mean: [K]. minimum, maximum: [K].
        mean_abs: mean magnitude [K].
        cross: 2/T · Σ (x̃ − x) xᵀ, fp32 [K, K], or None.
    """

    tokens: int
    h: Tensor
    mean: Tensor
    mean_abs: Tensor
    minimum: Tensor
    maximum: Tensor
    cross: Tensor | None = None

    @property
    def mean_square(self) -> Tensor:
        """E[x²] per channel [K]: the importance of a channel's weights."""
        return self.h.diagonal() / 2

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude per channel [K]."""
        return torch.maximum(self.maximum, -self.minimum)


class Accumulator:
    """Sums over a stream of inputs; `add` as often as needed, then `finish`."""

    def __init__(self, k: int, device: torch.device, *, double: bool = False, cross: bool = False) -> None:
        kind = torch.float64 if double else torch.float32
        self.tokens = 0
        self.moment = torch.zeros(k, k, dtype=kind, device=device)
        self.cross = torch.zeros(k, k, dtype=kind, device=device) if cross else None
        self.sums = torch.zeros(2, k, dtype=torch.float64, device=device)  # of x, of |x|
        self.minimum = torch.full((k,), torch.inf, device=device)
        self.maximum = torch.full((k,), -torch.inf, device=device)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Take in inputs [..., K]; `original` are those of the full-precision stream, of the same shape."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.moment.dtype)
        self.tokens += len(x)
        if not len(x):
            return
        self.moment.addmm_(x.T, x)
        if self.cross is not None:
            assert original is not None
            difference = original.detach().reshape(x.shape).to(x.dtype) - x
            self.cross.addmm_(difference.T, x)
        self.sums[0] += x.sum(0, dtype=torch.float64)
        self.sums[1] += x.abs().sum(0, dtype=torch.float64)
        self.minimum = torch.minimum(self.minimum, x.amin(0).float())
        self.maximum = torch.maximum(self.maximum, x.amax(0).float())

    def finish(self) -> Statistics:
        """The statistics so far, in the memory of the CPU, where they are solved with and kept."""
        scale = 2 / max(1, self.tokens)
        mean = (self.sums / max(1, self.tokens)).float().cpu()
        cross = None if self.cross is None else (self.cross * scale).float().cpu()
        h, low, high = (self.moment * scale).float().cpu(), self.minimum.cpu(), self.maximum.cpu()
        return Statistics(self.tokens, h, mean[0], mean[1], low, high, cross)


Key = tuple[str, int | None]  # a parameter of the model, and which expert of it


def save_statistics(path: Path, statistics: Mapping[Key, Statistics]) -> None:
    """Write a layer's statistics to a safetensors file in one step; what several linears share is written once."""
    from safetensors.torch import save_file

    shared: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    uses = []
    for (name, expert), stats in statistics.items():
        number = shared.setdefault(id(stats), len(shared))
        uses.append([name, expert, number])
        for field in ("h", "mean", "mean_abs", "minimum", "maximum", "cross"):
            value = getattr(stats, field)
            if value is not None:
                tensors[f"{number}.{field}"] = value.cpu().contiguous()
        tensors[f"{number}.tokens"] = torch.tensor([stats.tokens])
    part = path.with_name(path.name + ".part")
    save_file(tensors, str(part), metadata={"uses": json.dumps(uses)})
    os.replace(part, path)


def load_statistics(path: Path) -> dict[Key, Statistics]:
    """Read what `save_statistics` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            uses = json.loads(file.metadata()["uses"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        groups: dict[int, Statistics] = {}
        out: dict[Key, Statistics] = {}
        for name, expert, number in uses:
            if number not in groups:
                fields = {f: tensors.get(f"{number}.{f}") for f in ("h", "mean", "mean_abs", "minimum", "maximum", "cross")}
                groups[number] = Statistics(int(tensors[f"{number}.tokens"]), **fields)  # type: ignore[arg-type]
            out[(name, expert)] = groups[number]
        return out
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the statistics in '{path}' are damaged ({error}); delete that directory") from None
