"""How a block's scale is stored: the short float types of scales, their parents, and their spare bits.

A scale of a block is `stored · parent`: `stored` is a number of a short type, `parent` (only for e4m3, u8, e3m3) is shared
by a row (fp16) or a tensor (fp32). In memory a scale is always the fp32 value of `stored`; the words below exist on disk only.
Bits of the word that the value never uses (the sign; the low mantissa bit where given up; two bits beside a 6-bit e3m3)
may carry the block's member index: pack and unpack merge them, nothing else knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FP16_MIN, FP16_MAX = 1e-7, 65504.0  # the least scale used: a block of zeros gets it (ams-pot-formats.md section 6)
PARENT_MIN = 2.0**-24  # the least fp16 above zero


@dataclass(frozen=True)
class Store:
    """A storage type of scales: word width, default parent span, largest stored value under a parent, spare bits."""

    bits: int
    parent: str | None
    cap: float
    spare: int


STORES = {
    "fp16": Store(16, None, FP16_MAX, 2),
    "bf16": Store(16, None, 3.3e38, 2),
    "e8m0": Store(8, None, 2.0**127, 0),
    "e4m3": Store(8, "tensor", 448.0, 1),
    "u8": Store(8, "row", 255.0, 0),
    "e3m3": Store(6, "row", 30.0, 2),
}
SEARCHES = ("grid", "fine", "nv", "pot", "e8m0")


@dataclass(frozen=True)
class Scale:
    """The scale of a format.

    Attributes:
        store: a key of `STORES`.
        parent: None, "row" (fp16 per row) or "tensor" (fp32 per tensor).
        cap: largest stored value that the parent is chosen for (448 for NVFP4, 256 for four-over-six, 28 for RaZeR).
        tries: multiples of the absmax scale among which the `absmax` rule takes the best (four-over-six: 1 and 1.5).
        search: candidates of the `mse` rule: "grid" (ams-pot-formats.md 7.1), "nv", "pot" (2.1) or "e8m0" (3.1); "fine" is for
            levels in units of the root mean square, whose best scale is sharp and far below absmax in long rows.
    """

    store: str = "fp16"
    parent: str | None = None
    cap: float = FP16_MAX
    tries: tuple[float, ...] = (1.0,)
    search: str = "grid"

    def multipliers(self) -> list[float]:
        """Multiples of the absmax scale that the `mse` rule tries, from large to small."""
        if self.search == "pot":  # s0 = amax / 2**(qmax-1) is twice the absmax scale; b = 0.01 … 2.00
            return [2.0 * 0.01 * i for i in range(200, 0, -1)]
        if self.search == "nv":
            return sorted({2.0 ** (i / 16) for i in range(-8, 9)} | set(self.tries), reverse=True)
        if self.search == "fine":
            return [2.0 ** ((24 - j) / 48) for j in range(336)]
        return [2.0 ** ((8 - j) / 16) for j in range(80)]


def clear_low_bit(words: Tensor) -> Tensor:
    """Round 16-bit float patterns (as int16, positive) to the nearest with a zero last bit; ties go up."""
    return (words + 1) & ~1


def to_stored(scale: Scale, value: Tensor, parent: Tensor | None, spare: int = 0) -> Tensor:
    """Round wanted scales to what the file can hold.

    Args:
        value: wanted `stored · parent`, fp32, any shape, not negative.
        parent: broadcastable to `value`, or None.
        spare: bits of the word that the member index takes (0 to 2).

    Returns:
        The stored part, fp32, positive, as a new tensor.
    """
    if scale.store in ("fp16", "bf16"):
        dtype = torch.float16 if scale.store == "fp16" else torch.bfloat16
        stored = value.clamp(FP16_MIN, scale.cap).to(dtype)
        if spare > 1:
            last = int(torch.tensor(scale.cap, dtype=dtype).view(torch.int16)) & ~1  # rounding up must not reach Inf
            stored = clear_low_bit(stored.view(torch.int16)).clamp(2, last).view(dtype)
        return stored.float()
    if scale.store == "e8m0":
        mantissa, exponent = torch.frexp(value.clamp_min(2.0**-126))
        exponent = torch.where(mantissa >= 0.70710678, exponent, exponent - 1)  # nearest in the log domain
        return exp2i(exponent.clamp(-127, 127))
    assert parent is not None
    ratio = value / parent
    top = min(scale.cap * max(scale.tries), STORES[scale.store].cap)
    if scale.store == "e4m3":
        return ratio.clamp(2.0**-9, top).to(torch.float8_e4m3fn).float()
    if scale.store == "u8":
        return ratio.clamp(1, top).round()
    return round_e3m3(ratio.clamp(2.0**-5, top))


def exp2i(exponent: Tensor) -> Tensor:
    """2**exponent as exact fp32 for integers -149 … 127."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.float())


def ocp_exponent(amax: Tensor, max_level: float, rule: str) -> Tensor:
    """E8M0 exponents of the OCP floor rule, or of the ceil rule that never clips (ams-pot-formats.md 3.1).

    Args:
        amax: largest magnitude per block, fp32.
        max_level: the largest level of the grid.
        rule: "floor" or "ceil".

    Returns:
        int32, clamped to [-127, 127]; blocks of zeros get -127.
    """
    tiny = amax.clamp_min(2.0**-126)
    if rule == "ceil":
        mantissa, exponent = torch.frexp(tiny / max_level)  # value = mantissa · 2**exponent, mantissa in [0.5, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    else:
        exponent = torch.frexp(tiny)[1] - math.frexp(max_level)[1]
    return torch.where(amax > 0, exponent, torch.full_like(exponent, -127)).clamp(-127, 127)


def round_e3m3(value: Tensor) -> Tensor:
    """Nearest unsigned e3m3 number: 2**(e-3)·(1 + m/8), subnormals m·2**-5; ties to even."""
    exponent = (torch.frexp(value)[1] - 1).clamp_min(-2)
    quantum = exp2i(exponent - 3)
    return (value / quantum).round() * quantum


def _e3m3_word(value: Tensor) -> Tensor:
    exponent = (torch.frexp(value)[1] - 1).clamp_min(-2)
    mantissa = (value / exp2i(exponent - 3)).to(torch.int32)  # 0 … 15; 8 … 15 where normal
    return torch.where(mantissa >= 8, ((exponent + 3) << 3) + mantissa - 8, mantissa)


def _e3m3_value(word: Tensor) -> Tensor:
    exponent, mantissa = word >> 3, word & 7
    normal = (8 + mantissa) * exp2i(exponent - 6)
    return torch.where(exponent > 0, normal, mantissa * 2.0**-5)


def to_word(scale: Scale, stored: Tensor, member: Tensor | None, spare: int) -> Tensor:
    """Stored scales (fp32) → words as the file has them, the member index merged into `spare` bits.

    Returns:
        A float16, bfloat16 or float8_e4m3fn tensor where nothing is merged and the type has a name; else uint8 or int16.
    """
    index = None if spare == 0 or member is None else member.to(torch.int32)
    if scale.store in ("fp16", "bf16"):
        half = stored.to(torch.float16 if scale.store == "fp16" else torch.bfloat16)
        if index is None:
            return half
        sign = (index >> (spare - 1)) & 1
        low = index & 1 if spare > 1 else torch.zeros_like(index)
        return ((half.view(torch.int16).to(torch.int32) | low) - (sign << 15)).to(torch.int16)
    if scale.store == "e4m3":
        byte = stored.to(torch.float8_e4m3fn)
        return byte if index is None else (byte.view(torch.uint8).to(torch.int32) | (index << 7)).to(torch.uint8)
    if scale.store == "e8m0":
        return (torch.frexp(stored)[1] - 1 + 127).to(torch.uint8)
    if scale.store == "u8":
        return stored.to(torch.uint8)
    word = _e3m3_word(stored)
    return (word if index is None else word | (index << 6)).to(torch.uint8)


def from_word(scale: Scale, word: Tensor, spare: int) -> tuple[Tensor, Tensor | None]:
    """Inverse of `to_word`: (stored fp32, member uint8 or None)."""
    member = None
    if scale.store in ("fp16", "bf16"):
        dtype = torch.float16 if scale.store == "fp16" else torch.bfloat16
        if spare == 0:
            return word.float(), None
        bits = word.to(torch.int32)
        member = (bits < 0).to(torch.int32)
        if spare > 1:
            member = (member << 1) | (bits & 1)
        value = (bits & (0x7FFE if spare > 1 else 0x7FFF)).to(torch.int16).view(dtype).float()
        return value, member.to(torch.uint8)
    if scale.store == "e4m3":
        if spare == 0:
            return word.float(), None
        return (word & 0x7F).view(torch.float8_e4m3fn).float(), word >> 7
    if scale.store == "e8m0":
        value = exp2i(word.to(torch.int32) - 127)
        return torch.where(word == 255, torch.full_like(value, torch.nan), value), None
    if scale.store == "u8":
        return word.float(), None
    if spare:
        member = word >> 6
    return _e3m3_value((word & 63).to(torch.int32)), member


def word_dtype(scale: Scale, spare: int) -> torch.dtype:
    """Element type of the scale plane."""
    if spare:
        return torch.int16 if STORES[scale.store].bits == 16 else torch.uint8
    named = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
    return named.get(scale.store, torch.uint8)
