"""Orthogonal maps of any size (numfit/orthogonal.py) in fp64, for weights that are rewritten once and for all.

`fixing_mean` gives Mᵀ diag(signs) M with M = DCT ⊗ Hadamard and the first sign +1: it keeps the vector of ones, so it
commutes with a LayerNorm's subtraction of the mean, at twice the cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from numfit.orthogonal import butterflies, cosines, odd_and_power, signs


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of n channels, drawn from a seed."""

    n: int
    seed: int
    fixing_mean: bool = False

    def rotate(self, x: Tensor) -> Tensor:
        """R x along the last axis [..., n], computed in fp64 in slices; dtype and device of `x`."""
        return self._slices(x, inverse=False)

    def unrotate(self, x: Tensor) -> Tensor:
        """Rᵀ x along the last axis, the inverse of `rotate`."""
        return self._slices(x, inverse=True)

    def _slices(self, x: Tensor, inverse: bool) -> Tensor:
        flat = x.reshape(-1, self.n)
        s = signs(self.n, self.seed).to(x.device, torch.float64, copy=True)
        if self.fixing_mean:
            s[0] = 1
        out = torch.empty_like(flat)
        step = max(1, 2**22 // self.n)
        for start in range(0, len(flat), step):
            part = flat[start : start + step].double()
            if self.fixing_mean:  # symmetric: its own inverse
                part = _transposed(_mixed(part) * s)
            elif inverse:
                part = _transposed(part) * s
            else:
                part = _mixed(part * s)
            out[start : start + step] = part.to(x.dtype)
        return out.reshape(x.shape)


def _mixed(x: Tensor) -> Tensor:
    """(DCT ⊗ Hadamard) x along the last axis of [rows, n]."""
    m, n = odd_and_power(x.shape[1])
    return (cosines(m).to(x.device) @ butterflies(x.reshape(len(x), m, n)) / math.sqrt(n)).reshape(len(x), -1)


def _transposed(x: Tensor) -> Tensor:
    m, n = odd_and_power(x.shape[1])
    return butterflies(cosines(m).to(x.device).T @ x.reshape(len(x), m, n)).reshape(len(x), -1) / math.sqrt(n)
