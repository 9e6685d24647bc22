"""A second opinion on what the CPU kernels compute: numpy, float64, and no code in common with them.

Weights are what the format defines (`QuantizedTensor.dequantize`). Int8 activations are quantized here again, from the
definition in `layout.h`, so that what is left between a kernel and this file is the order of fp32 sums and, for types
whose levels are not int8 numbers, the rounding that the kernel states. Both have rigorous bounds; tests assert those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from numfit.formats import Format, Params, QuantizedTensor, pack

U = 2.0**-24  # unit roundoff of fp32
TINY = 2.0**-149  # least fp32: what a product that underflows may lose
LEAST = np.float32(2.0**-120)  # activations below are zero for int8
KINDS = ("plain", "pow2", "extreme")


def unit_of_column(fmt: Format, k: int) -> np.ndarray:
    """Index of each column's unit, int [K]; units restart at every block."""
    g = fmt.geometry(k)
    starts = [s + u for s in range(0, k, g.block) for u in range(0, min(g.block, k - s), g.unit)]
    return np.searchsorted(starts, np.arange(k), side="right") - 1


# -- tensors ----------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, values: list[float], shape: tuple[int, ...]) -> np.ndarray:
    return np.array(values, dtype=np.float64)[rng.integers(0, len(values), shape)]


def _e3m3(words: np.ndarray) -> np.ndarray:
    exponent, mantissa = words >> 3, words & 7
    return np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 3), mantissa / 32)


def stored_scales(fmt: Format, shape: tuple[int, ...], rng: np.random.Generator, kind: str) -> np.ndarray:
    """Stored parts of scales that the words of `fmt` can hold exactly, fp32 [shape]."""
    if kind == "extreme" and len(shape) == 2:  # even rows repeat one scale, so that small ones are not lost beside large ones
        mixed = stored_scales(fmt, (shape[0] * shape[1],), rng, kind).reshape(shape)
        return np.where(np.arange(shape[0])[:, None] % 2 == 0, mixed[:, :1], mixed)
    store = fmt.scale.store
    if kind == "pow2":
        powers = [1.0, 2.0, 4.0] if store == "u8" else [0.5, 1.0, 2.0]
        return _pick(rng, powers, shape).astype(np.float32)
    if store in ("fp16", "bf16"):
        if kind == "plain":
            value = np.exp(rng.uniform(-7, -2, shape))
        elif store == "fp16":
            value = _pick(rng, [2.0**-24, 2.0**-23, 1023 * 2.0**-24, 2.0**-14, 65504, 65472, 1.0, 0.1], shape)
        else:
            value = _pick(rng, [2.0**-133, 2.0**-127, 2.0**-126, 2.0**-100, 2.0**100, 1.0, 0.1], shape)
        half = torch.from_numpy(value).to(torch.float16 if store == "fp16" else torch.bfloat16)
        if fmt.spare > 1:  # the last bit belongs to the member
            half = (half.view(torch.int16) & ~1).clamp_min(2).view(half.dtype)
        return half.float().numpy()
    if store == "e8m0":
        exponents = rng.integers(-9, -3, shape) if kind == "plain" else _pick(rng, [-127, -126, -60, 0, 60, 120], shape)
        return np.ldexp(1.0, exponents.astype(int)).astype(np.float32)
    words = {"e4m3": (1, 127), "u8": (1, 256), "e3m3": (1, 64)}[store]
    if kind == "extreme" and store == "e4m3":
        words = (1, 9)  # subnormals
    word = rng.integers(*words, shape)
    if store == "e4m3":
        return torch.from_numpy(word.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    return (word if store == "u8" else _e3m3(word)).astype(np.float32)


def sample(fmt: Format, rows: int, k: int, seed: int = 0, kind: str = "plain", mute_codes: bool = False) -> QuantizedTensor:
    """A tensor of random planes: any code, any member, any zero point, scales of `kind` (one of KINDS).

    Codes that stand for no number (Inf, NaN) appear only with `mute_codes`.
    """
    rng = np.random.default_rng(seed)
    g = fmt.geometry(k)
    members = fmt.member_count
    palette = rng.permutation(len(fmt.members))[: fmt.palette] if fmt.palette else None
    grids = fmt.members if palette is None else [fmt.members[i] for i in palette]
    one_member = fmt.unit == "tensor"
    member = rng.integers(0, members, (1, 1) if one_member else (rows, g.units))
    unit_of = np.zeros(k, dtype=int) if one_member else unit_of_column(fmt, k)
    per_weight = np.broadcast_to(member[:, unit_of], (rows, k))
    codes = np.zeros((rows, k), dtype=np.int64)
    for m, grid in enumerate(grids):
        allowed = [c for c, v in enumerate(grid.levels) if mute_codes or math.isfinite(v)]
        here = per_weight == m
        codes[here] = rng.choice(allowed, int(here.sum()))
    blocks = (1, 1) if fmt.block == "tensor" else (rows, g.blocks)
    parent = None
    if fmt.scale.parent == "row":
        parent = {
            "plain": np.exp(rng.uniform(-8, -5, (rows, 1))),
            "pow2": _pick(rng, [0.25, 0.5, 1], (rows, 1)),
            "extreme": _pick(rng, [2.0**-24, 2.0**-15, 200.0, 1.0], (rows, 1)),
        }[kind].astype(np.float16)
    elif fmt.scale.parent == "tensor":
        parent = np.array([[{"plain": 0.00371, "pow2": 0.5, "extreme": [2.0**-100, 1e20, 1.0][seed % 3]}[kind]]])
    zero = rng.integers(0, 1 << fmt.bits, blocks) if fmt.zero else None
    params = Params(
        torch.from_numpy(stored_scales(fmt, blocks, rng, kind)),
        None if parent is None else torch.from_numpy(parent.astype(np.float32)),
        torch.from_numpy(member.astype(np.uint8)) if members > 1 else None,
        None if zero is None else torch.from_numpy(zero.astype(np.float32)),
        None if palette is None else torch.from_numpy(palette),
    )
    return pack(fmt, (rows, k), torch.from_numpy(codes.astype(np.uint8)), params)


def dense(q: QuantizedTensor) -> np.ndarray:
    """The weight in float64 [N, K]."""
    return q.dequantize().double().numpy()


def scale_of_weight(q: QuantizedTensor) -> np.ndarray:
    """scale · parent of each weight, float64 [N, K]."""
    _, params = q.params()
    rows, k = q.shape
    block_of = np.arange(k) // q.format.geometry(k).block
    effective = params.effective_scale().double().numpy()
    return np.broadcast_to(effective[:, block_of] if effective.shape[1] > 1 else effective, (rows, k))


def max_level(fmt: Format) -> float:
    """Largest finite magnitude that any code stands for, emitted or not."""
    return max(abs(v) for grid in fmt.members for v in grid.levels if math.isfinite(v))


def quantum(fmt: Format) -> float:
    """The largest power of two of which every level is a whole multiple."""
    return 1 / max(v.as_integer_ratio()[1] for grid in fmt.members for v in grid.levels if math.isfinite(v))


# -- int8 activations ---------------------------------------------------------------------------------------------------


def _span(fmt: Format, k: int) -> tuple[int, int]:
    """(columns of a span, group size): a span shares its scale and, where members belong to longer runs, its member."""
    g = fmt.geometry(k)
    members = 1 if fmt.unit == "tensor" else fmt.member_count
    if members == 1:
        return g.block, 64
    if members == 2 and g.unit == 3 and fmt.bits == 5 and g.block >= 48:
        return g.block, 48
    if members == 2 and g.unit == 4 and 2 <= fmt.bits <= 5:
        return g.block, 64
    return (g.unit if g.unit >= 16 and fmt.bits not in (1, 7) else g.block), 64


def group_of_column(fmt: Format, k: int) -> np.ndarray:
    """Which activation scale each column uses, int [K], ascending: runs of 64 (48) columns that restart at every span."""
    block = fmt.geometry(k).block
    span, size = _span(fmt, k)
    column = np.arange(k)
    inside = column % block
    start = column - inside + inside // span * span + inside % span // size * size  # first column of the group
    return np.cumsum(np.diff(start, prepend=0) > 0)


@dataclass(frozen=True)
class Quantized:
    """Int8 activations: codes [M, K], and the scale of each column's group [M, K] (fp32 values)."""

    codes: np.ndarray
    scale: np.ndarray

    @property
    def value(self) -> np.ndarray:
        """What the kernel multiplies with, float64 [M, K]."""
        return self.codes * self.scale


def quantize(x: np.ndarray, group: np.ndarray) -> Quantized:
    """Codes round(x · (127 / absmax)), ties to even, and scale absmax / 127 in fp32, by token and group.

    A group whose absmax is below 2**-120 counts as zero.
    """
    x = x.astype(np.float32)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(group))))
    absmax = np.maximum.reduceat(np.abs(x), starts, axis=1) if x.size else np.zeros((len(x), len(starts)), np.float32)
    absmax = np.where(absmax < LEAST, np.float32(0), absmax)
    scale = absmax / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(absmax > 0, np.float32(127) / absmax, np.float32(0)).astype(np.float32)
    codes = np.rint(x * inverse[:, run]).astype(np.float64)
    return Quantized(codes, scale[:, run].astype(np.float64))


# -- expected results and their bounds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """float64 result [M, N] and the largest error allowed; infinite where fp32 may overflow."""

    value: np.ndarray
    bound: np.ndarray

    def check(self, y: np.ndarray, what: object = "") -> None:
        """Assert that y [m, N], the first m tokens, lies within the bound."""
        m = len(y)
        with np.errstate(invalid="ignore"):
            error = np.abs(y.astype(np.float64) - self.value[:m])
        bad = ~(error <= self.bound[:m]) & np.isfinite(self.bound[:m])
        if bad.any():
            i, j = (int(v) for v in np.argwhere(bad)[0])
            worst = float(np.max(error[bad] / np.maximum(self.bound[:m][bad], 1e-300)))
            raise AssertionError(
                f"{what}: {bad.sum()} of {bad.size} outputs beyond the bound, the first at {i, j}: {y[i, j]!r}, "
                f"expected {self.value[i, j]:.9g} ± {self.bound[i, j]:.3g}; the worst is {worst:.3g} bounds away"
            )


def expected_int8(q: QuantizedTensor, x: np.ndarray, bias: np.ndarray | None, rounding: float) -> Expected:
    """x · Wᵀ + bias with int8 activations.

    The integer sums of a group are exact. The result is a chain of fused multiply-adds over the groups, each product of
    few roundings, so its error is at most (groups + 8) u Σ|terms|; levels off by up to rounding · largest level add
    Σ |x| scale rounding level; products that underflow add multiples of the least fp32 number.
    """
    group = group_of_column(q.format, q.shape[1])
    acts = quantize(x, group)
    value = acts.value
    w = dense(q)
    slack = rounding * max_level(q.format) * (np.abs(value) @ scale_of_weight(q).T)
    y = value @ w.T
    size = np.abs(value) @ np.abs(w).T + slack
    groups = group[-1] + 1
    parent = q.params()[1].parent
    outer = 1.0 if parent is None else float(parent.abs().max()) * 4096  # what sums are multiplied by at the end
    under = TINY * (
        2.0**21 * groups * max(1.0, outer * max_level(q.format)) + np.abs(value).sum(1, keepdims=True) * max_level(q.format)
    )
    return _with_bias(y, size, (groups + 8) * U, slack + under, bias)


def expected_exact(q: QuantizedTensor, x: np.ndarray, bias: np.ndarray | None) -> Expected:
    """x · Wᵀ + bias in fp32 of any order of summation: at most (K + 8) u Σ|terms|."""
    x = x.astype(np.float64)
    w = dense(q)
    k = q.shape[1]
    under = TINY * (k + np.abs(x).sum(1, keepdims=True) * (1 + max_level(q.format)))
    return _with_bias(x @ w.T, np.abs(x) @ np.abs(w).T, (k + 8) * U, under, bias)


def _with_bias(y: np.ndarray, size: np.ndarray, unit: float, slack: np.ndarray, bias: np.ndarray | None) -> Expected:
    if bias is not None:
        y, size = y + bias.astype(np.float64), size + np.abs(bias.astype(np.float64))
    bound = 1.01 * unit * size + slack
    # integer sums are multiplied by the step of the levels at the end: results near the end of fp32 may overflow before that
    return Expected(y, np.where(size < 2.0**110, bound, np.inf))


def int8_step(q: QuantizedTensor, x: np.ndarray) -> np.ndarray:
    """How far int8 activations may move a result from that of x itself: half a step of each group, times |W|."""
    acts = quantize(x, group_of_column(q.format, q.shape[1]))
    return (0.5001 * acts.scale + float(LEAST) * (acts.scale == 0)) @ np.abs(dense(q)).T


def as_bf16(bits_or_values: np.ndarray) -> np.ndarray:
    """fp32 values rounded to bf16, as fp32."""
    return torch.from_numpy(np.ascontiguousarray(bits_or_values, dtype=np.float32)).bfloat16().float().numpy()
