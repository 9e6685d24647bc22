"""What passes between steps: the problem of one linear, and codes with parameters and the loss of each row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from numfit.errors import FormatError, OptionError
from numfit.formats.codec import decode
from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.solvers.linalg import Factor, cholesky_inverse_upper, row_losses
from numfit.solvers.options import SolverOptions
from numfit.solvers.order import Plan, make_plan


@dataclass(frozen=True)
class Solution:
    """Codes and parameters of one weight.

    Attributes:
        codes: uint8 [N, K].
        params: as the format stores them.
        loss: tr((Q - W) H (Q - W)ᵀ), W being the retargeted weight where there is one; without H the squared error.
        start: the same for rounding to nearest with the same importance.
        notes: what a report should say: damping raised, inputs never on.
    """

    codes: Tensor
    params: Params
    loss: float
    start: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """Codes [N, K], parameters, and the loss of each row, fp64 [N]."""

    codes: Tensor
    params: Params
    losses: Tensor


@dataclass
class Problem:
    """One linear: its target w fp32 [N, K], second moment h fp32 [K, K], importance [K] or None, format and options."""

    w: Tensor
    h: Tensor
    fmt: Format
    options: SolverOptions
    importance: Tensor | None
    cross: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    _sweep: tuple[Plan, Factor] | None = None

    def sweep_plan(self) -> tuple[Plan, Factor]:
        """The order of the columns and U in that order; found once."""
        if self._sweep is None:
            o = self.options
            plan = make_plan(self.fmt, self.h.diagonal(), o.order, o.refit, o.panel)
            order = plan.order.to(self.h.device)
            factor = cholesky_inverse_upper(self.h[order][:, order], o.damp)
            self.notes.extend(factor.notes)
            self._sweep = plan, factor
        return self._sweep

    def state(self, codes: Tensor, params: Params) -> State:
        """Codes and parameters with their losses."""
        return State(codes, params, row_losses(decode(self.fmt, codes, params) - self.w, self.h))


def check_weight(w: Tensor, fmt: Format) -> Tensor:
    """The weight as fp32 [N, K].

    Raises:
        FormatError: not a matrix, a shape or a magnitude that the format cannot hold, or NaN or Inf.
    """
    if w.dim() != 2 or not w.is_floating_point():
        raise FormatError(f"a solver needs a floating-point matrix [outputs, inputs], not {w.dtype} of shape {tuple(w.shape)}")
    fmt.check_shape(tuple(w.shape))
    if not bool(torch.isfinite(w).all()):
        raise FormatError("the weight holds NaN or Inf, which no format can store: repair the source or skip this tensor")
    if w.numel() and float(w.abs().max()) > fmt.reach:
        raise FormatError(
            f"the weight reaches {float(w.abs().max()):.4g}, but the @{fmt.scale.store} scales of {fmt.name} end at "
            f"{fmt.reach:.4g}; repair the source, skip this tensor, or use a wider scale type such as @bf16"
        )
    return w.detach().float().contiguous()


def check_cross(cross: Tensor, k: int) -> None:
    """Refuse what is not the cross term of K inputs.

    Raises:
        OptionError: another shape, NaN or Inf.
    """
    if tuple(cross.shape) != (k, k) or not bool(torch.isfinite(cross).all()):
        raise OptionError(f"the cross term of {k} inputs is a finite {k} × {k} matrix; this one is {tuple(cross.shape)}")


def keep_better(fmt: Format, new: State, old: State) -> State:
    """Row by row the state of less loss; where a parameter that all rows share changed, all rows or none."""
    shared = [
        (new.params.scale, old.params.scale, fmt.block == "tensor"),
        (new.params.zero, old.params.zero, fmt.block == "tensor"),
        (new.params.parent, old.params.parent, fmt.scale.parent == "tensor"),
        (new.params.member, old.params.member, fmt.unit == "tensor"),
        (new.params.palette, old.params.palette, True),
        (new.params.levels, old.params.levels, False),
    ]
    better = new.losses < old.losses  # NaN loses
    if any(common and a is not None and b is not None and not torch.equal(a, b) for a, b, common in shared):
        return new if bool(torch.isfinite(new.losses).all()) and float(new.losses.sum()) < float(old.losses.sum()) else old
    pick = better[:, None]

    def rows(a: Tensor | None, b: Tensor | None, common: bool) -> Tensor | None:
        return b if a is None or b is None or common else torch.where(pick, a, b)

    scale, zero, parent, member, _, levels = (rows(*entry) for entry in shared)
    assert scale is not None
    params = replace(old.params, scale=scale, zero=zero, parent=parent, member=member, levels=levels)
    return State(torch.where(pick, new.codes, old.codes), params, torch.where(better, new.losses, old.losses))
