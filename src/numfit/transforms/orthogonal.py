"""Fast orthogonal maps of any size: R = (DCT-II of m ⊗ Hadamard of 2^p) · diag(random signs), n = m 2^p with m odd.

No entry of R is larger than sqrt(2 / n), so R spreads an outlier over all channels; it costs n (m + p) instead of n².
Sizes need not be powers of two (Hadamard matrices of other sizes exist for some, cosines for all).

`fixing_mean` gives Mᵀ diag(signs) M with M = DCT ⊗ Hadamard and the first sign +1: it keeps the vector of ones, so it
commutes with a LayerNorm's subtraction of the mean, at twice the cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of n channels, drawn from a seed."""

    n: int
    seed: int
    fixing_mean: bool = False

    def signs(self) -> Tensor:
        """±1 [n], fp64, from a CPU generator."""
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.n,), generator=generator).double() * 2 - 1
        if self.fixing_mean:
            signs[0] = 1
        return signs

    def rotate(self, x: Tensor) -> Tensor:
        """R x along the last axis [..., n], computed in fp64 in slices; dtype and device of `x`."""
        return self._slices(x, inverse=False)

    def unrotate(self, x: Tensor) -> Tensor:
        """Rᵀ x along the last axis, the inverse of `rotate`."""
        return self._slices(x, inverse=True)

    def _slices(self, x: Tensor, inverse: bool) -> Tensor:
        flat = x.reshape(-1, self.n)
        signs = self.signs().to(x.device)
        out = torch.empty_like(flat)
        step = max(1, 2**22 // self.n)
        for start in range(0, len(flat), step):
            part = flat[start : start + step].double()
            if self.fixing_mean:  # symmetric: its own inverse
                part = _transposed(_mixed(part) * signs)
            elif inverse:
                part = _transposed(part) * signs
            else:
                part = _mixed(part * signs)
            out[start : start + step] = part.to(x.dtype)
        return out.reshape(x.shape)


def _mixed(x: Tensor) -> Tensor:
    """(DCT ⊗ Hadamard) x along the last axis of [rows, n]."""
    m = x.shape[1] // _power(x.shape[1])
    return (cosines(m).to(x.device) @ hadamard(x.reshape(len(x), m, -1))).reshape(len(x), -1)


def _transposed(x: Tensor) -> Tensor:
    m = x.shape[1] // _power(x.shape[1])
    return hadamard(cosines(m).to(x.device).T @ x.reshape(len(x), m, -1)).reshape(len(x), -1)


def _power(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


@cache
def cosines(m: int) -> Tensor:
    """The orthonormal DCT-II: [m, m], fp64; the first row is constant."""
    k = torch.arange(m, dtype=torch.float64)
    matrix = torch.cos(math.pi / m * torch.outer(k, k + 0.5)) * math.sqrt(2 / m)
    matrix[0] = 1 / math.sqrt(m)
    return matrix


def hadamard(x: Tensor) -> Tensor:
    """Normalised Walsh-Hadamard transform (Sylvester order) along the last axis, whose size is a power of two."""
    n = x.shape[-1]
    shape, half = x.shape, 1
    while half < n:
        pairs = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2).reshape(shape)
        half *= 2
    return x / math.sqrt(n)
