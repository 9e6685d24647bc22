"""Rotations of the input channels: an orthogonal matrix that turns any row of weights into nearly Gaussian numbers.

    R = (C_m ⊗ H_n / √n) · diag(s),   K = m·n,  n = 2^p the largest power of two in K

C_m is the orthonormal DCT-II of size m, H_n Sylvester's Hadamard matrix, s are random signs. Rotated weights W·Rᵀ go with
rotated inputs R·x: (W·Rᵀ)·(R·x) = W·x. Nothing is stored: the signs follow from K and a seed, so all layers that read the same
K inputs share one rotation. It costs K·(log2 n + m) operations a token.

The arithmetic is fp32 in a fixed order of elementwise steps, so that results are the same bits everywhere:
    1. x_i · s_i;
    2. seen as [m, n]: butterflies (u, v) → (u + v, u − v) over columns h apart, for h = 1, 2, 4 … n/2;
    3. y_c = Σ_a D[c, a]·x_a over the m rows, a ascending, each product and each sum rounded; D = fp32 of C_m / √n.
The inverse runs backwards with Dᵀ: 3. (sums over c ascending), 2. the same butterflies, 1. the signs.
fp64 inputs are computed in fp64 with the same constants. On a CPU a compiled function (kernels/cpu/rotate.h) does the same
steps; `turn_reference` is what it is tested against, bit by bit. (QuIP#, QuaRot and SpinQuant introduced such rotations.)
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from numfit.errors import FormatError, NumfitError
from numfit.native import ERROR_BYTES, declare, library, refusal
from numfit.orthogonal import butterflies, cosines, odd_and_power, signs

declare("nf_rotate", c_int, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int, c_void_p, c_char_p)

KINDS = ("hadamard",)
MAX_ODD = 512  # the odd factor of K costs so many multiplications an element
_CHUNK = 1 << 18  # elements at a time: the passes stay in cache


@dataclass(frozen=True)
class Rotation:
    """Which rotation: its kind, and the seed of its signs."""

    seed: int = 0
    kind: str = "hadamard"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"rotations are of the kind {', '.join(KINDS)}, not '{self.kind}'; a newer numfit is needed")
        if not 0 <= self.seed < 1 << 32:
            raise FormatError(f"the seed of a rotation is a number from 0 to 2**32 - 1, not {self.seed}")


def factors(columns: int) -> tuple[int, int]:
    """(m, n): the odd factor and the power of two.

    Raises:
        FormatError: there is no column, or the odd factor is too large.
    """
    if columns < 1:
        raise FormatError("a row without weights cannot be rotated")
    m, n = odd_and_power(columns)
    if m > MAX_ODD:
        raise FormatError(
            f"rows of {columns} = {m}·{n} weights cannot be rotated: the odd factor may be at most {MAX_ODD}; "
            "leave +rot away for this tensor"
        )
    return m, n


def constants(columns: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """What the compiled functions take: signs fp32 [K] and D fp32 [m, m], shared with others, not to be written to.

    Raises:
        FormatError: K cannot be rotated.
    """
    return signs(columns, rotation.seed), _mixing(columns)


@lru_cache(maxsize=64)
def _mixing(columns: int) -> Tensor:
    """D, fp32 [m, m]: the orthonormal DCT-II over √n, each entry rounded once from fp64."""
    m, n = factors(columns)
    return (cosines(m) / math.sqrt(n)).float()


def _on(t: Tensor, like: Tensor) -> Tensor:
    return t.to(device=like.device, dtype=like.dtype)


def _mix(x: Tensor, d: Tensor) -> Tensor:
    """y[:, c] = Σ_a d[c, a]·x[:, a], a ascending: x [r, m, n]."""
    out = d[:, 0].view(1, -1, 1) * x[:, :1]
    for a in range(1, d.shape[1]):
        out = out + d[:, a].view(1, -1, 1) * x[:, a : a + 1]
    return out


def turn_reference(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    """The steps in PyTorch: x [r, K] fp32 or fp64, `back` for the inverse."""
    m, n = factors(x.shape[1])
    s, d = _on(signs(x.shape[1], rotation.seed), x), _on(_mixing(x.shape[1]), x)
    if back:
        y = _mix(x.reshape(-1, m, n), d.T)
        return butterflies(y).view(x.shape) * s
    y = butterflies((x * s).view(-1, m, n))
    return _mix(y, d).reshape(x.shape)


def turn_native(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    """The same bits by the compiled function: x [r, K] fp32 or bf16 on a CPU, contiguous → fp32.

    Raises:
        OutOfMemoryError: not enough memory.
    """
    lib = library()
    assert lib is not None
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        raise NumfitError(f"rows to rotate are fp32 or bf16 on the CPU here, not {x.dtype} on '{x.device}'")
    x = x.contiguous()
    rows, k = x.shape
    s, d = constants(k, rotation)
    out = torch.empty_like(x, dtype=torch.float32)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    lib.nf_set_threads(torch.get_num_threads())
    kind = int(x.dtype == torch.bfloat16)
    if failed := lib.nf_rotate(x.data_ptr(), kind, rows, k, s.data_ptr(), d.data_ptr(), len(d), back, out.data_ptr(), error):
        raise refusal(failed, error)
    return out


def _turn(x: Tensor, rotation: Rotation, back: bool) -> Tensor:
    k = x.shape[-1]
    factors(k)
    flat = x.detach().reshape(-1, k)
    if x.device.type == "cpu" and x.dtype != torch.float64 and library() is not None:
        short = flat if flat.dtype in (torch.float32, torch.bfloat16) else flat.float()
        return turn_native(short.contiguous(), rotation, back).to(x.dtype).view(x.shape)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    step = max(1, _CHUNK // k) if x.device.type == "cpu" else max(1, len(flat))
    parts = [turn_reference(flat[i : i + step], rotation, back) for i in range(0, len(flat), step)]
    out = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else flat.clone()
    return out.to(x.dtype).view(x.shape)


class _Turn(torch.autograd.Function):
    """R is orthogonal: the gradient turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, back: bool) -> Tensor:
        ctx.rotation, ctx.back = rotation, back
        return _turn(x, rotation, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Turn.apply(grads[0], ctx.rotation, not ctx.back), None, None


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x·Rᵀ along the last axis: inputs, or the rows of a weight. A second moment H becomes rotate(rotate(H).T).

    Args:
        x: [..., K], any float type and device; computed in fp32 (fp64 for fp64), returned in the type of `x`.

    Raises:
        FormatError: K cannot be rotated.
    """
    return _Turn.apply(x, rotation, False)


def unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of `rotate`: x·R."""
    return _Turn.apply(x, rotation, True)


def rotate_importance(importance: Tensor, rotation: Rotation) -> Tensor:
    """The diagonal of R·diag(importance)·Rᵀ: what is known of rotated channels when only a diagonal was. fp32 [K].

    The signs do not matter, and each of the n columns of a Hadamard matrix has all inputs in equal parts.
    """
    m, n = factors(importance.shape[0])
    d = _mixing(importance.shape[0]).double().to(importance.device)
    shares = d.square() @ importance.double().view(m, n).sum(1)  # [m]; D holds the 1/√n
    return shares.repeat_interleave(n).float()
