"""The values that pass in and out of reconstruction, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numfit.errors import OptionError
from numfit.formats.format import Format
from numfit.formats.params import Params

METHODS = ("signround", "adaround", "tune")
LOSSES = ("mse", "relative")


@dataclass(frozen=True, eq=False)
class State:
    """One quantized linear of a block.

    Attributes:
        name: the key under which `run` takes its weight.
        fmt: the base format.
        codes: uint8 [N, K].
        params: scales and the rest.
        w: fp32 [N, K], what the codes stand for, in their coordinates (rotated, say).
        effective: differentiable map from the decoded weight to the one that the module multiplies with (un-rotation); None
            where they are the same.
        low_rank: (B [N, r], A [r, K]) added to the decoded weight before `effective`, or None.
    """

    name: str
    fmt: Format
    codes: Tensor
    params: Params
    w: Tensor
    effective: Callable[[Tensor], Tensor] | None = None
    low_rank: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Options:
    """How to reconstruct.

    Attributes:
        method: "signround" (signed gradient steps on rounding), "adaround" (soft rounding, hardened step by step) or
            "tune" (codes stay; scales and what else is trainable move: decoupleQ's block step).
        iterations: optimizer steps.
        batch: windows per step.
        lr: step of the rounding parameters; None: 1 / iterations for signround (so that V travels at most ½), 0.2 for adaround.
        momentum: of signround's gradient, 0 for none.
        trust: see `cells.cells`; less than 1 for starts that error compensation made, lest its work be undone.
        scale_lr: step of the scales in parts of themselves, 0 to keep them.
        scale_range: least and largest multiple of a start scale.
        tune_parents: move fp16 row parents too.
        tune_low_rank: move low-rank factors too (stored as fp16).
        extra_lr: step of extra tensors (norm gains) in parts of their root mean square.
        loss: "mse", or "relative": each token's error over its target's mean square, as the next norm sees it.
        drop: fraction of a step's elements with the largest |error| that are left out (SignRoundV2: 0.001).
        holdout: windows, taken at even distances, that no step sees and that choose the best step; None: an eighth of them
            where there are at least 8, else none, and the training windows choose.
        checks: how often the true loss is looked at, the last time at the end.
        bf16: forward and backward in bf16 (parameters stay fp32); None: where the device has fast bf16.
        seed: of the order of windows.
    """

    method: str = "signround"
    iterations: int = 100
    batch: int = 1
    lr: float | None = None
    momentum: float = 0.0
    trust: float = 0.8
    scale_lr: float = 0.005
    scale_range: tuple[float, float] = (0.5, 1.5)
    tune_parents: bool = False
    tune_low_rank: bool = False
    extra_lr: float = 1e-3
    loss: str = "mse"
    drop: float = 0.0
    holdout: int | None = None
    checks: int = 4
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise OptionError(problem)


@dataclass(frozen=True)
class Report:
    """What happened.

    Attributes:
        start, end: true loss (stored parameters, fp32 arithmetic) before and after, on the windows that chose.
        kept: step whose solution was kept; 0 where the start was not beaten.
        checks: (step, loss) of each look.
        flipped: linear → fraction of codes that changed.
        seconds: time in "forward", "backward", "update" and "checks".
        extra: final values of the extra tensors.
    """

    start: float
    end: float
    kept: int
    checks: tuple[tuple[int, float], ...]
    flipped: dict[str, float]
    seconds: dict[str, float]
    extra: dict[str, Tensor] = field(default_factory=dict)


def _problem(o: Options) -> str | None:
    if o.method not in METHODS:
        return f"the reconstruction method is one of {', '.join(METHODS)}, not '{o.method}'"
    if o.loss not in LOSSES:
        return f"the reconstruction loss is one of {', '.join(LOSSES)}, not '{o.loss}'"
    for name in ("iterations", "batch", "checks"):
        if getattr(o, name) < 1:
            return f"reconstruction needs at least one of '{name}', not {getattr(o, name)}"
    if o.lr is not None and not 0 < o.lr <= 1:
        return f"the learning rate of rounding lies in (0, 1], not {o.lr}"
    if o.method == "signround" and o.lr is not None and o.lr * o.iterations / 2 > 1:
        return (
            f"{o.iterations} steps of at most {o.lr} would carry weights across a whole level; use a learning rate of at most "
            f"{2 / o.iterations:.3g}"
        )
    if not 0 <= o.momentum < 1:
        return f"momentum lies in [0, 1), not {o.momentum}"
    if not 0 < o.trust <= 1:
        return f"trust lies in (0, 1], not {o.trust}"
    if not 0 <= o.drop < 1:
        return f"the fraction of dropped errors lies in [0, 1), not {o.drop}"
    if o.scale_lr < 0 or o.extra_lr < 0:
        return "learning rates are not negative"
    if not 0 < o.scale_range[0] <= 1 <= o.scale_range[1]:
        return f"the range of scale multiples must contain 1, and {o.scale_range} does not"
    if o.holdout is not None and o.holdout < 0:
        return f"the number of held-out windows is not negative, and {o.holdout} is"
    return None


def check_windows(inputs: Tensor, targets: Tensor) -> None:
    """Refuse activations that cannot be learned from.

    Raises:
        OptionError: shapes that differ or are no [S, T, C], no window, or numbers that are not finite.
    """
    if inputs.ndim != 3 or inputs.shape[:2] != targets.shape[:2] or targets.ndim != 3 or inputs.numel() == 0:
        raise OptionError(
            f"reconstruction takes inputs and targets of the same windows [S, T, C], not {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    for what, x in (("inputs", inputs), ("targets", targets)):
        bad = [i for i in range(len(x)) if not bool(torch.isfinite(x[i]).all())]
        if bad:
            raise OptionError(
                f"the {what} of this block hold NaN or Inf in {len(bad)} of {len(x)} windows, the first in window {bad[0]}; "
                "check the layers before it, or leave those windows out"
            )


def check_states(states: Mapping[str, State]) -> None:
    """Refuse states that do not fit together.

    Raises:
        OptionError: no state, a weight that is not finite, or shapes that differ.
    """
    if not states:
        raise OptionError("reconstruction needs at least one quantized linear")
    for name, state in states.items():
        if state.codes.shape != state.w.shape or state.w.ndim != 2:
            raise OptionError(f"'{name}' has codes of shape {tuple(state.codes.shape)} for a weight {tuple(state.w.shape)}")
        if not bool(torch.isfinite(state.w).all()):
            raise OptionError(f"the weight of '{name}' holds NaN or Inf; repair the source or skip this tensor")
        if not bool((state.params.effective_scale() > 0).all()):
            raise OptionError(f"'{name}' has scales that are not positive numbers; solve it again")
