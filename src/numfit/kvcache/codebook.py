"""Levels of least squared error for the densities that rotated vectors have, found once and kept.

A unit vector of R^n in a random orthonormal basis has coordinates y/√n with density ∝ (1 − y²/n)^((n−3)/2) on |y| < √n (the
marginal of the sphere; N(0, 1) as n grows). Lloyd's iteration on a fine grid gives their quantizer; the results agree with
the published tables of Max (1960) and TurboQuant (2025), and the tests hold them to 2e-3. Everything here is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_POINTS = 20_001  # of the grid on which densities are integrated
_SWEEPS = 6000
_SETTLED = 1e-8  # largest move of a level in the last sweep; Lloyd's iteration gains a factor a sweep


def _lloyd(density: Callable[[Tensor], Tensor], low: float, high: float, count: int) -> Tensor:
    """Levels fp64 [count], ascending, of least mean squared error under a density on (low, high)."""
    y = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu")
    mass = density(y)
    integrals = []  # of the density and of its first moment up to each point, trapezoids
    for f in (mass, mass * y):
        integrals.append(torch.nn.functional.pad(((f[1:] + f[:-1]) / 2).cumsum(0), (1, 0)))
    table = torch.stack(integrals)  # [2, points]
    wanted = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count * table[0, -1]
    levels = y[torch.searchsorted(table[0], wanted).clamp_max(_POINTS - 1)]
    ends = table[:, [0, -1]]
    for _ in range(_SWEEPS):
        place = ((levels[1:] + levels[:-1]) / 2 - low) * ((_POINTS - 1) / (high - low))
        left = place.long().clamp(0, _POINTS - 2)
        inner = table[:, left] + (table[:, left + 1] - table[:, left]) * (place - left)
        weight, moment = torch.cat([ends[:, :1], inner, ends[:, 1:]], 1).diff(dim=1)
        new = moment / weight.clamp_min(1e-300)
        moved = float((new - levels).abs().max())
        levels = new
        if moved < _SETTLED:
            break
    return levels


def _symmetric(levels: Tensor) -> Tensor:
    return ((levels - levels.flip(0)) / 2).float()


@lru_cache(maxsize=64)
def normal(count: int) -> Tensor:
    """Levels for N(0, 1): fp32 [count], ascending."""
    return _symmetric(_lloyd(lambda y: torch.exp(-y.square() / 2), -9.0, 9.0, count))


@lru_cache(maxsize=64)
def sphere(count: int, n: int) -> Tensor:
    """Levels for √n times a coordinate of a random unit vector of R^n: fp32 [count], ascending. N(0, 1) for n < 4."""
    if n < 4:
        return normal(count)
    reach = min(9.0, math.sqrt(n))
    return _symmetric(_lloyd(lambda y: (1 - y.square() / n).clamp_min(0).pow((n - 3) / 2), -reach, reach, count))


@lru_cache(maxsize=8)
def octahedral(count: int) -> Tensor:
    """Levels for either coordinate of a uniform direction of R^3 on the unfolded octahedron: fp32 [count], ascending.

    The projection p = t / |t|₁ spreads the sphere unevenly; the density of one unfolded coordinate ξ is found by integrating
    the Jacobian |p|₂⁻³ over the other, upper and lower half together.
    """
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64, device="cpu")
    xi, eta = torch.meshgrid(grid, grid, indexing="ij")
    z = 1 - xi.abs() - eta.abs()
    x = torch.where(z >= 0, xi.abs(), 1 - eta.abs())
    y = torch.where(z >= 0, eta.abs(), 1 - xi.abs())
    marginal = (x.square() + y.square() + z.square()).pow(-1.5).sum(1)

    def density(at: Tensor) -> Tensor:
        place = (at + 1) / 2 * (len(grid) - 1)
        left = place.floor().long().clamp(0, len(grid) - 2)
        share = place - left
        return marginal[left] * (1 - share) + marginal[left + 1] * share

    return _symmetric(_lloyd(density, -1.0, 1.0, count))


@lru_cache(maxsize=32)
def radius(count: int, n: int) -> Tensor:
    """Levels for the length of three coordinates of √n times a random unit vector of R^n: fp32 [count], ascending.

    ρ²/n ~ Beta(3/2, (n − 3)/2).
    """
    density = lambda y: y.square() * (1 - y.square() / n).clamp_min(0).pow((n - 5) / 2)  # noqa: E731
    return _lloyd(density, 0.0, min(9.0, math.sqrt(n)), count).float()


@lru_cache(maxsize=4)
def vectors(count: int = 256, width: int = 4) -> Tensor:
    """Code words for N(0, I) in R^width by k-means on seeded draws: fp32 [count, width]."""
    generator = torch.Generator().manual_seed(20250428)
    draws = torch.randn((1 << 15, width), generator=generator)
    words = draws[:count].clone()
    for _ in range(40):
        nearest = nearest_word(draws, words)
        total = torch.zeros_like(words).index_add_(0, nearest, draws)
        hits = torch.bincount(nearest, minlength=count)
        words = torch.where(hits[:, None] > 0, total / hits[:, None].clamp_min(1), words)
    return words


def nearest_word(x: Tensor, words: Tensor) -> Tensor:
    """Index of the closest of words [count, width] to each of x [N, width]: int64 [N]."""
    half = words.square().sum(1) / 2
    return torch.cat([(half - part @ words.T).argmin(1) for part in x.split(1 << 14)])
