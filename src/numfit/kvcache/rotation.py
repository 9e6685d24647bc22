"""Orthonormal bases that spread a vector's energy evenly, so that one table of levels fits all of its coordinates.

"haar": Q of a seeded Gaussian matrix, any size. "hadamard": two rounds of random signs and Walsh-Hadamard, powers of two; one
round leaves sparse vectors with few distinct coordinates (a one-hot vector becomes ±1/√n everywhere, which no table for
Gaussians fits), two do not. Both are stored as the dense matrix they are: heads have at most 256 dimensions.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.orthogonal import butterflies
from numfit.threads import cpu_threads

KINDS = ("haar", "hadamard")


@lru_cache(maxsize=32)
def basis(kind: str, n: int, seed: int, device: torch.device) -> Tensor:
    """Orthonormal fp64 [n, n] whose row i is basis vector i.

    Raises:
        OptionError: an unknown kind, or "hadamard" of a size that is not a power of two.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "haar":
        with cpu_threads(1):  # the same bits for every number of threads
            q, r = torch.linalg.qr(torch.randn((n, n), generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).to(device)  # positive diagonal: uniform over all bases
    if kind == "hadamard":
        if n & (n - 1):
            raise OptionError(f"a Hadamard rotation needs heads of a power of two, not {n} dimensions; use haar")
        h = butterflies(torch.eye(n, dtype=torch.float64)) / math.sqrt(n)
        first, second = ((torch.randint(0, 2, (n,), generator=generator) * 2 - 1).double() for _ in range(2))
        return (h * second @ (h * first)).to(device)  # H D₂ H D₁
    raise OptionError(f"unknown rotation '{kind}'; choose from: {', '.join(KINDS)}")


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Coordinates of x [..., n] in a basis, fp32.

    Computed in fp64: whatever order the sums run in, which depends on the number of rows, the fp32 results are the same but for
    one in 10⁸, so that codes do not depend on how many tokens were encoded at once.
    """
    return (x.double() @ matrix.T).float()


def unrotate(y: Tensor, matrix: Tensor) -> Tensor:
    """The vectors whose coordinates are y [..., n], fp32."""
    return y @ matrix.float()
