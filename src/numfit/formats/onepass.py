"""Fitting and encoding as one compiled pass over the weights (kernels/cpu/encode.h), for weights on a CPU.

fit.py, search.py and codec.py are the reference: every step here is the same fp32 operation, so codes, and the members of units
smaller than a block, are the same bits. Only the squares of a block are summed in an order of their own, the same for all
instruction sets and numbers of threads; errors that are closer than those sums are exact may therefore order differently.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from numfit.formats.nearest import Ladder, Tables
from numfit.formats.scale import FP16_MIN, PARENT_MIN, STORES, Scale
from numfit.native import call, declare, library, require_fit

_FREE, _FLOAT, _POWER, _OCP_FLOOR, _OCP_CEIL = range(5)  # enum nf_rounding
# mantissa bits of stored scales, and their least distance
_FLOATS = {"fp16": (10, 2.0**-24), "bf16": (7, 0.0), "e4m3": (3, 2.0**-9), "u8": (23, 1.0), "e3m3": (3, 2.0**-5)}


class _Search(ctypes.Structure):
    """`nf_search`"""

    _fields_ = (
        ("members", c_int32), ("ranks", c_int32), ("levels", c_void_p), ("thresholds", c_void_p), ("tops", c_void_p),
        ("mirrored", c_int32), ("affine", c_int32), ("step", c_float), ("each", c_int32), ("block", c_int64), ("unit", c_int64),
        ("rounding", c_int32), ("mantissa", c_int32), ("even", c_int32), ("quantum", c_float), ("low", c_float),
        ("high", c_float), ("least", c_float), ("most", c_float), ("factors", c_void_p), ("candidates", c_int32),
        ("promising", c_int32), ("unpruned", c_int32),
    )  # fmt: skip


class _Codes(ctypes.Structure):
    """`nf_codes`"""

    _fields_ = (
        ("members", c_int32), ("ranks", c_int32), ("thresholds", c_void_p), ("codes", c_void_p), ("block", c_int64),
        ("unit", c_int64), ("scale", c_void_p), ("zero", c_void_p), ("member", c_void_p), ("one_scale", c_int32),
        ("one_member", c_int32),
    )  # fmt: skip


_matrix = (c_void_p, c_int64, c_int64)  # weights, rows, columns
declare("nf_fit", c_int, POINTER(_Search), *_matrix, *[c_void_p] * 6, c_char_p)
declare("nf_row_errors", c_int, POINTER(_Search), *_matrix, *[c_void_p] * 4, c_char_p)
declare("nf_encode", c_int, POINTER(_Codes), *_matrix, c_void_p, c_char_p)


def usable(device: torch.device) -> bool:
    """Whether tensors on `device` can be worked on here."""
    return device.type == "cpu" and library() is not None


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _units(k: int, block: int, unit: int) -> int:
    """Units of a row."""
    whole, tail = divmod(k, block)
    return whole * -(-block // unit) + -(-tail // unit)


def _plain(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return t.detach().to(dtype).contiguous()


class Search:
    """What to try on every block of a tensor: grids, candidate scales and how these are stored.

    Args:
        ladder: levels by rank; not looked at where `zero`.
        tops: largest magnitude of each member fp32 [M], or [1] where units are smaller than a block; the largest code where
            `zero`.
        unit: weights that choose a member under their block's scale; 0 where whole blocks do.
        zero: asymmetric integers.
        scale, spare: how scales are stored.
        factors: candidates, descending: multiples of the absmax scale, or exponents to add to the OCP one (e8m0).
        ceil: whether OCP exponents are rounded up.
    """

    def __init__(self, ladder: Ladder, tops: Tensor, *, unit: int, zero: bool, scale: Scale, spare: int, factors: list[float],
                 ceil: bool) -> None:  # fmt: skip
        self.unit, self.zero = unit, zero
        self.members = 1 if zero else ladder.levels.shape[0]
        row = torch.tensor(factors, dtype=torch.float32, device="cpu")
        self._kept = [_plain(t) for t in (ladder.levels, ladder.thresholds, tops, row)]  # what `_parts` points to
        likely = 0.0 if scale.store == "e8m0" and not zero else 0.9
        at_levels, at_thresholds, at_tops, at_factors = (t.data_ptr() for t in self._kept)
        parts = {"members": self.members, "ranks": ladder.levels.shape[1], "levels": at_levels, "thresholds": at_thresholds,
                 "tops": at_tops, "mirrored": ladder.mirrored and not zero, "affine": zero, "step": ladder.step or 0.0,
                 "unit": unit, "factors": at_factors, "candidates": len(factors),
                 "promising": min(range(len(factors)), key=lambda c: abs(factors[c] - likely))}  # fmt: skip
        if scale.store == "e8m0":
            parts["rounding"] = _POWER if zero else _OCP_CEIL if ceil else _OCP_FLOOR
        else:
            mantissa, quantum = _FLOATS[scale.store]
            named = scale.store in ("fp16", "bf16")
            high = scale.cap if named else min(scale.cap * max(scale.tries), STORES[scale.store].cap)
            low = FP16_MIN if named else quantum
            parts |= {"rounding": _FLOAT, "mantissa": mantissa, "quantum": quantum, "low": low, "high": high}
            if spare > 1 and named:  # words with a zero last bit, above 0 and below Inf
                dtype = torch.float16 if scale.store == "fp16" else torch.bfloat16
                last = int(torch.tensor(scale.cap, dtype=dtype, device="cpu").view(torch.int16)) & ~1
                least, most = torch.tensor([2, last], dtype=torch.int16, device="cpu").view(dtype).tolist()
                parts |= {"even": 1, "least": least, "most": most}
        self._parts = parts

    def _request(self, block: int, **changes: object) -> _Search:
        return _Search(**(self._parts | {"block": block} | changes))

    def fit(
        self, w: Tensor, h: Tensor | None, parent: Tensor | None, block: int, unpruned: int, *, free: bool = False,
        each: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Best parameters of every block.

        Args:
            w: [R, K] fp32.
            h: importance [K] or None.
            parent: [R, 1] or [1, 1] or None.
            block: weights of a whole block.
            unpruned: candidates tried before any is ruled out by what it clips.
            free: leave scales unrounded, to find the parents of rows.
            each: find the best scale of every member.

        Returns:
            (stored scale [R, blocks], member uint8 [R, units] or None, zero [R, blocks] or None, None), or, for `each`,
            (scale [R, blocks, M], None, None, error [R, blocks, M]).
        """
        w = _plain(w)
        rows, k = w.shape
        blocks = -(-k // block)
        shape = (rows, blocks, self.members) if each else (rows, blocks)
        scale = w.new_empty(shape)
        error = w.new_empty(shape) if each else None
        member = None
        if (self.members > 1 or self.unit) and not each:
            units = _units(k, block, self.unit) if self.unit else blocks
            member = w.new_empty((rows, units), dtype=torch.uint8)
        zero = w.new_empty(shape) if self.zero else None
        changes = {"rounding": _FREE, "low": PARENT_MIN} if free else {}
        request = self._request(block, each=each, unpruned=unpruned, **changes)
        self._fit(request, w, h, None if parent is None or free else parent, scale, error, member, zero)
        return scale, member, zero, error

    def choose(self, w: Tensor, h: Tensor | None, scale: float) -> Tensor:
        """Best members of the units of w [R, K] under one scale: uint8 [R, units]."""
        w = _plain(w)
        rows, k = w.shape
        member = w.new_empty((rows, _units(k, k, self.unit)), dtype=torch.uint8)
        request = self._request(k, candidates=0)
        self._fit(request, w, h, None, w.new_full((rows, 1), scale), None, member, None)
        return member

    def row_errors(self, w: Tensor, h: Tensor | None, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Errors of whole rows w [R, K] under scales (and zeros) [M, C], or [1, C], that all share: fp32 [R, M, C]."""
        w, scale, zero = _plain(w), _plain(scale), None if zero is None else _plain(zero)
        sets = 1 if self.unit else self.members
        require_fit(scale.shape[:-1] == (sets,), f"scales {tuple(scale.shape)} are not of {sets} members")
        require_fit(zero is None or zero.shape == scale.shape, "zero points are not as many as scales")
        require_fit(h is None or h.shape == w.shape[1:], "importance is not of its columns")
        out = w.new_empty((len(w), *scale.shape))
        request = self._request(w.shape[1], candidates=scale.shape[1])
        h = None if h is None else _plain(h)
        request_and_weights = (byref(request), w.data_ptr(), *w.shape)
        call("nf_row_errors", *request_and_weights, _address(h), scale.data_ptr(), _address(zero), out.data_ptr())
        return out

    @staticmethod
    def _fit(request: _Search, w: Tensor, h: Tensor | None, parent: Tensor | None, scale: Tensor, error: Tensor | None,
             member: Tensor | None, zero: Tensor | None) -> None:  # fmt: skip
        require_fit(h is None or h.shape == w.shape[1:], "importance is not of its columns")
        h = None if h is None else _plain(h)
        parent = None if parent is None else _plain(parent.expand(len(w), 1))
        call("nf_fit", byref(request), w.data_ptr(), *w.shape, *map(_address, (h, parent, scale, error, member, zero)))


def encode(
    tables: Tables, w: Tensor, block: int, unit: int, scale: Tensor, zero: Tensor | None, member: Tensor | None
) -> Tensor:
    """Nearest codes of w [R, K] fp32: uint8 [R, K].

    Args:
        tables: of the family.
        block, unit: weights of whole ones.
        scale: effective [R, blocks], or [1, 1] for all; zero: the same, or None.
        member: uint8 [R, units], or of one element for all, or None for the first.
    """
    w, scale = _plain(w), _plain(scale)
    zero = None if zero is None else _plain(zero)
    member = None if member is None else _plain(member, torch.uint8)
    thresholds, codes = _plain(tables.thresholds), _plain(tables.codes, torch.uint8)
    (rows, k), (members, ranks) = w.shape, codes.shape
    require_fit(thresholds.shape == (members, ranks - 1), f"thresholds {tuple(thresholds.shape)} are not of {ranks} codes")
    require_fit(scale.numel() in (1, rows * -(-k // block)), f"scales {tuple(scale.shape)} are not those of its blocks")
    require_fit(zero is None or zero.numel() == scale.numel(), "zero points are not as many as scales")
    counts = (1, rows * _units(k, block, unit))
    require_fit(member is None or member.numel() in counts, "members are not those of its units")
    out = torch.empty_like(w, dtype=torch.uint8)
    request = _Codes(
        members, ranks, thresholds.data_ptr(), codes.data_ptr(), block, unit, scale.data_ptr(), _address(zero),
        _address(member), scale.numel() == 1, member is not None and member.numel() == 1,
    )  # fmt: skip
    call("nf_encode", byref(request), w.data_ptr(), *w.shape, out.data_ptr())
    return out
