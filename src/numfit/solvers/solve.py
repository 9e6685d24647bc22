"""The one entry: a weight, what is known of its inputs, a format and a chain of steps → codes and parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from numfit.errors import OptionError
from numfit.formats.codec import decode, encode
from numfit.formats.fit import fit
from numfit.formats.format import Format
from numfit.formats.params import Params
from numfit.solvers.alternate import alternate
from numfit.solvers.blocks import blocks
from numfit.solvers.descent import descent
from numfit.solvers.gptq import gptq
from numfit.solvers.linalg import alive, check_moment, row_losses
from numfit.solvers.nearest import nearest
from numfit.solvers.options import SolverOptions
from numfit.solvers.pot import pot
from numfit.solvers.refit import refit
from numfit.solvers.retarget import retarget
from numfit.solvers.state import Problem, Solution, State, check_cross, check_weight
from numfit.solvers.trellis import solve_trellis

STEPS: dict[str, Callable[[Problem, State], State]] = {
    "gptq": gptq, "alternate": alternate, "refit": refit, "blocks": blocks, "descent": descent, "pot": pot,
}  # fmt: skip


def solve(
    w: Tensor, h: Tensor | None, fmt: Format, options: SolverOptions | str = SolverOptions(), cross: Tensor | None = None  # noqa: B008
) -> Solution:
    """Quantize one linear.

    Args:
        w: weights [N, K], any float type.
        h: second moment of the inputs H = 2/T·X Xᵀ [K, K] in any units, or None, with which only `nearest` is possible.
        fmt: any format.
        options: the chain, or its text (`gptq+alternate+descent`).
        cross: D = 2/T·(X̃ - X) Xᵀ [K, K] in the units of h, where an option needs it.

    Raises:
        OptionError: a step or option that cannot apply here, or an h or cross that cannot be used.
        FormatError: a weight that the format cannot hold.
    """
    options = SolverOptions.parse(options) if isinstance(options, str) else options
    options.check(fmt)
    w = check_weight(w, fmt)
    k = w.shape[1]
    if h is None and options.needs_statistics:
        raise OptionError(
            f"the chain '{'+'.join(options.steps)}' needs the second moment of the inputs: calibrate on a text, "
            "or use 'nearest', which needs none"
        )
    if h is not None:
        check_moment(h, k)
        if options.needs_cross and cross is None:
            raise OptionError("beta and gptaq need the cross term with the full-precision inputs: collect it, or set them to 0")
        if cross is not None:
            check_cross(cross, k)
    if fmt.trellis is not None:
        return _solve_trellis(w, h, fmt, options, cross)
    if h is None:
        params = fit(fmt, w, None, options.scale_rule)
        codes = encode(fmt, w, params)
        loss = float((decode(fmt, codes, params) - w).double().square().sum())
        return Solution(codes, params, loss, loss)
    h = h.detach().to(w.device).float().contiguous()
    notes = []
    dead = k - int(alive(h).sum())
    if dead:
        notes.append(f"{dead} of {k} inputs were never on: their weights are rounded to nearest")
    if options.beta > 0 and cross is not None:
        w = retarget(w, h, cross.to(w.device), options.beta)
        notes.append(f"retargeted with beta {options.beta:g}")
    if options.ridge > 0 and dead < k:
        h = h.clone()
        h.diagonal().add_(options.ridge * float(h.diagonal().double().mean()))
    importance = h.diagonal().clone() if options.importance else None
    problem = Problem(w, h, fmt, options, importance, None if cross is None else cross.to(w.device), notes)
    state = nearest(problem)
    start = float(state.losses.sum())
    for step in options.steps:
        if step != "nearest":
            state = STEPS[step](problem, state)
    return Solution(state.codes, state.params, float(state.losses.sum()), start, tuple(problem.notes))


def _solve_trellis(w: Tensor, h: Tensor | None, fmt: Format, options: SolverOptions, cross: Tensor | None) -> Solution:
    """A trellis has one solver, a sweep with feedback; of the chain it takes whether to use `h` and whether to repeat it.

    `nearest` looks at the weights alone, `gptq` is the sweep, `alternate` and `descent` behind it stand for a second one. What
    rounding alone would have lost (`start`) is then not known: to find out costs as much again.
    """
    assert fmt.trellis is not None
    if h is not None:
        h = h.detach().to(w.device).float()
        if options.beta > 0 and cross is not None:
            w = retarget(w, h, cross.to(w.device), options.beta)
    again = any(step in ("alternate", "descent") for step in options.steps)
    blind = options.steps == ("nearest",)
    found = solve_trellis(w, None if blind else h, fmt.trellis, damping=options.damp, sweeps=int(again))
    error = w - found.weight()
    loss = float(error.double().square().sum() if h is None else row_losses(error, h).sum())
    return Solution(found.symbols, Params(found.scale.float()[:, None]), loss, loss)
