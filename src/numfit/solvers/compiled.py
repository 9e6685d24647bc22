"""Panels of sweeps and runs of coordinate descent in compiled code (kernels/cpu/sweep.h), for matrices on a CPU.

sweep.py and descent.py are the reference: every step here is the same fp32 operation in the same order, so results are the same
bits, whatever the number of threads and the instruction set.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numfit.formats.learned import NATIVE_ROWS
from numfit.formats.params import row_chunks
from numfit.native import call, declare, library, require_fit
from numfit.solvers.rounding import Rounder

if TYPE_CHECKING:
    from numfit.solvers.descent import Run
    from numfit.solvers.sweep import Panel


class _Lattice(ctypes.Structure):
    """`nf_lattice`"""

    _fields_ = (
        ("rows", c_int64), ("blocks", c_int64), ("units", c_int64), ("members", c_int32), ("entries", c_int32),
        ("thresholds", c_void_p), ("levels", c_void_p), ("codes", c_void_p), ("scale", c_void_p), ("zero", c_void_p),
        ("member", c_void_p), ("one_scale", c_int32), ("one_member", c_int32), ("choose", c_int32), ("reserved", c_int32),
    )  # fmt: skip


class _Panel(ctypes.Structure):
    """`nf_panel`"""

    _fields_ = (
        ("width", c_int64), ("start", c_int64), ("stop", c_int64), ("w", c_void_p), ("ldw", c_int64), ("u", c_void_p),
        ("p", c_void_p), ("r", c_void_p), ("ldu", c_int64), ("ldp", c_int64), ("ldr", c_int64), ("original", c_void_p),
        ("block", c_void_p), ("unit", c_void_p), ("codes", c_void_p), ("ldc", c_int64), ("error", c_void_p),
        ("before", c_void_p),
    )  # fmt: skip


class _Run(ctypes.Structure):
    """`nf_run`"""

    _fields_ = (
        ("width", c_int64), ("h", c_void_p), ("ldh", c_int64), ("gradient", c_void_p), ("w", c_void_p), ("q", c_void_p),
        ("ldw", c_int64), ("block", c_void_p), ("unit", c_void_p), ("codes", c_void_p), ("ldc", c_int64), ("margin", c_float),
    )  # fmt: skip


declare("nf_sweep", c_int, POINTER(_Lattice), POINTER(_Panel), c_char_p)
declare("nf_descend", c_int, POINTER(_Lattice), POINTER(_Run), c_char_p)


def usable(device: torch.device) -> bool:
    """Whether tensors on `device` can be worked on here."""
    return device.type == "cpu" and library() is not None


def compiled_panel(panel: Panel, start: int, stop: int, rounder: Rounder, choose: bool) -> None:
    """As `sweep.eager_panel`."""
    n, width = panel.error.shape
    if n == 0:
        return
    if rounder.own is not None:
        for s in row_chunks(n, 1, NATIVE_ROWS):
            original, before = (None if t is None else t[s] for t in (panel.original, panel.before))
            rows = panel._replace(w=panel.w[s], original=original, codes=panel.codes[s], error=panel.error[s], before=before)
            compiled_panel(rows, start, stop, rounder.part(s), choose)
        return
    p, r = panel.terms
    for t, count in ((panel.w, n), (panel.u, width), (p, width), (r, width)):
        require_fit(t is None or _in_rows(t, (count, width)), "an array is not fp32 rows of the panel's width")
    for t in (panel.original, panel.error, panel.before):
        there = t is None or (_in_rows(t, (n, width)) and t.is_contiguous())
        require_fit(there, "what belongs to columns is not fp32 rows of the panel's width, one behind the other")
    require_fit(_in_rows(panel.codes, (n, width), torch.uint8), "codes are not a byte each of the panel's columns")
    require_fit(_of_columns(panel.block, width) and _of_columns(panel.unit, width), "blocks or units are not those of columns")
    lattice, kept = _lattice(rounder, n, choose)
    request = _Panel(
        width, start, stop, panel.w.data_ptr(), panel.w.stride(0), panel.u.data_ptr(), _address(p), _address(r),
        panel.u.stride(0), _stride(p), _stride(r), _address(panel.original), panel.block.data_ptr(), panel.unit.data_ptr(),
        panel.codes.data_ptr(), panel.codes.stride(0), panel.error.data_ptr(), _address(panel.before),
    )  # fmt: skip
    call("nf_sweep", byref(lattice), byref(request))
    del kept


def compiled_run(run: Run, rounder: Rounder, choose: bool) -> None:
    """As `descent.eager_run`."""
    from numfit.solvers.descent import MARGIN

    n, width = run.gradient.shape
    if n == 0:
        return
    if rounder.own is not None:
        for s in row_chunks(n, 1, NATIVE_ROWS):
            part = run._replace(gradient=run.gradient[s], w=run.w[s], q=run.q[s], codes=run.codes[s])
            compiled_run(part, rounder.part(s), choose)
        return
    gradient = run.gradient.contiguous()
    for t, count in ((gradient, n), (run.h, width), (run.w, n), (run.q, n)):
        require_fit(_in_rows(t, (count, width)), "an array is not fp32 rows of the run's width")
    require_fit(run.w.stride() == run.q.stride(), "weights and values lie at different distances")
    require_fit(_in_rows(run.codes, (n, width), torch.uint8), "codes are not a byte each of the run's columns")
    require_fit(_of_columns(run.block, width) and _of_columns(run.unit, width), "blocks or units are not those of columns")
    lattice, kept = _lattice(rounder, n, choose)
    request = _Run(
        width, run.h.data_ptr(), run.h.stride(0), gradient.data_ptr(), run.w.data_ptr(), run.q.data_ptr(), run.q.stride(0),
        run.block.data_ptr(), run.unit.data_ptr(), run.codes.data_ptr(), run.codes.stride(0), MARGIN,
    )  # fmt: skip
    call("nf_descend", byref(lattice), byref(request))
    del kept


def _lattice(rounder: Rounder, n: int, choose: bool) -> tuple[_Lattice, list[Tensor]]:
    """The request, and the tensors that it points to. The rounder's members are changed in place."""
    members, ranks = rounder.levels.shape
    g = rounder.geometry
    entries = 1 << max(0, math.ceil(math.log2(ranks)))

    def padded(t: Tensor, fill: Tensor) -> Tensor:
        return torch.cat([t.float(), fill.float().expand(members, entries - t.shape[1])], 1).contiguous()

    infinite = torch.tensor([[math.inf]], dtype=torch.float32, device="cpu")
    kept = [padded(rounder.thresholds, infinite), padded(rounder.levels, rounder.levels[:, -1:]),
            padded(rounder.codes, rounder.codes[:, -1:]), rounder.scale.float().contiguous()]  # fmt: skip
    zero = None if rounder.zero is None else rounder.zero.float().contiguous()
    member = rounder.member
    for part in (*kept, zero):
        require_fit(part is None or part.device.type == "cpu", "what columns are rounded with is not on the CPU")
    require_fit(rounder.scale.shape in ((n, g.blocks), (1, 1)), "scales are not those of its rows and blocks")
    require_fit(zero is None or zero.shape == rounder.scale.shape, "zero points are not as many as scales")
    if member is not None:
        require_fit(_plain(member, torch.uint8) and member.is_contiguous(), "members are not a byte each, one behind the other")
        one = member.numel() == 1 and not choose
        require_fit(one or member.shape == (n, g.units), "members are not those of its rows and units")
    require_fit(member is not None or not choose, "there are no members to choose from")
    kept += [t for t in (zero, member) if t is not None]
    thresholds, levels, codes, scale = (t.data_ptr() for t in kept[:4])
    one_scale = rounder.scale.shape[1] == 1 and len(rounder.scale) == 1
    one_member = member is not None and member.numel() == 1
    request = _Lattice(
        n, g.blocks, g.units, members, entries, thresholds, levels, codes, scale, _address(zero),
        _address(member), one_scale, one_member and not choose, choose, 0,
    )  # fmt: skip
    return request, kept


def _plain(t: Tensor, dtype: torch.dtype) -> bool:
    return t.dtype == dtype and t.device.type == "cpu"


def _in_rows(t: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> bool:
    """Whether it is a matrix of this shape whose rows lie in one piece each."""
    return _plain(t, dtype) and t.shape == shape and (t.stride(1) == 1 or shape[1] == 1)


def _of_columns(t: Tensor, width: int) -> bool:
    return _plain(t, torch.int64) and t.shape == (width,) and t.is_contiguous()


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)
