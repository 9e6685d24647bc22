"""What fast orthogonal maps of any size are made of: R = (DCT-II of m ⊗ Hadamard of n = 2^p / √n) · diag(random signs).

No entry of R is larger than √(2 / (m·n)), so R spreads an outlier over all channels; it costs m·n·(m + p) instead of (m·n)².
Sizes need not be powers of two: Hadamard matrices of other sizes exist for some, cosines for all. (QuIP#, QuaRot and SpinQuant
introduced such rotations.) formats/rotation.py turns inputs by R in fp32, in an order that is part of a format;
transforms/orthogonal.py rewrites weights by it in fp64.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def odd_and_power(size: int) -> tuple[int, int]:
    """(m, n): size = m·n, m odd and n a power of two."""
    n = size & -size
    return size // n, n


def splitmix64(seed: int, index: int) -> int:
    """Number `index` of the splitmix64 sequence that starts at `seed` (Steele, Lea, Flood 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@lru_cache(maxsize=64)
def signs(size: int, seed: int) -> Tensor:
    """fp32 ±1 [size]: −1 where the top bit of splitmix64(seed, i) is set. Shared with others, not to be written to."""
    values = [-1.0 if splitmix64(seed, i) >> 63 else 1.0 for i in range(size)]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=64)
def cosines(m: int) -> Tensor:
    """The orthonormal DCT-II: fp64 [m, m]; the first row is constant. Shared with others, not to be written to."""
    rows = [[math.sqrt((1 if c == 0 else 2) / m) * _cosine((2 * a + 1) * c, 4 * m) for a in range(m)] for c in range(m)]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _cosine(k: int, turns: int) -> float:
    """cos(2π·k / turns) for `turns` divisible by 4, from the first eighth or quarter, so that symmetric entries are equal."""
    k %= turns
    if 2 * k > turns:
        k = turns - k
    if 4 * k > turns:
        return -math.cos(2 * math.pi * (turns // 2 - k) / turns)
    return 0.0 if 4 * k == turns else math.cos(2 * math.pi * k / turns)


def butterflies(x: Tensor) -> Tensor:
    """x·H_n along the last axis, whose size n is a power of two: Sylvester's Hadamard matrix, not normalised.

    Butterflies (u, v) → (u + v, u − v) over entries h apart, for h = 1, 2, 4 … n/2; each sum rounded.
    """
    *lead, n = x.shape
    h = 1
    while h < n:
        pairs = x.reshape(*lead, n // (2 * h), 2, h)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((u + v, u - v), -2).reshape(*lead, n)
        h *= 2
    return x
