"""What a solver is asked to do: a chain of steps and their numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise

from numfit.errors import OptionError
from numfit.formats.format import Format

STARTS = ("nearest", "gptq")
REFINEMENTS = ("alternate", "refit", "blocks", "descent", "pot")
ORDERS = ("static", "none", "act", "group")


@dataclass(frozen=True)
class SolverOptions:
    """A chain of steps, each of which starts from what the one before left and never makes a row worse.

    Attributes:
        steps: the first makes codes (`nearest`, `gptq`), the others improve them (`alternate`, `refit`,
            `blocks`, `descent`, `pot`).
        order: in which gptq visits the columns. `static`: by falling diag H, parameters fitted beforehand. `act`: the same
            order, a block's parameters fitted when the sweep reaches its first column. `group`: whole blocks by their largest
            diag H, columns by falling diag H inside a block. `none`: from left to right.
        damp: what is added to diag H, in units of its mean, before H is inverted.
        ridge: H + ridge · mean(diag H) · I takes the place of H in every step and in the losses, which keeps weights near where
            the text says little. Few tokens overfit: with H of 8192 tokens, down_proj layers of SmolLM2-135M (1536 inputs) lose
            on other text 1.2 to 1.4 times what rounding to nearest loses after plain gptq, and 0.8 to 0.95 times with ridge 1;
            layers of 576 inputs are best near 0.05 to 0.2.
        scale_rule: how scales are found (formats/fit.py); steps that find scales of least error themselves go with "mse" only.
        importance: fit parameters under what H says of the inputs rather than under equal weights.
        refit: fit a block's parameters again, on the compensated weights, when the sweep reaches it (orders none, act, group).
        alternations: rounds of `alternate`, `blocks` and `pot`.
        sweeps: passes of `descent` over all columns.
        beta: retarget W to W + beta W D (H + λI)^-1 first; needs the cross term D (QEP, arXiv 2504.09629).
        gptaq: factor of GPTAQ's term, 0 for none (the published code ships 0.25); needs the cross term.
        rescomp: factor of ResComp's term, 0 for none (arXiv 2604.07955 ships 0.25).
        panel: columns swept between two updates of all that follow.
    """

    steps: tuple[str, ...] = ("nearest",)
    order: str = "static"
    damp: float = 0.01
    ridge: float = 0.0
    scale_rule: str = "mse"
    importance: bool = True
    refit: bool = True
    alternations: int = 2
    sweeps: int = 2
    beta: float = 0.0
    gptaq: float = 0.0
    rescomp: float = 0.0
    panel: int = 128

    @staticmethod
    def parse(text: str, **numbers: object) -> SolverOptions:
        """Options of a chain such as `gptq+alternate+descent`.

        Raises:
            OptionError: an unknown step or option, a chain that cannot work, or a number out of its range.
        """
        known = [f.name for f in fields(SolverOptions) if f.name != "steps"]
        for name in numbers:
            if name not in known:
                raise OptionError(f"unknown solver option '{name}'; the options are: {', '.join(known)}")
        steps = tuple(part.strip().lower() for part in text.split("+"))
        return replace(SolverOptions(steps=steps), **numbers)  # type: ignore[arg-type]

    @property
    def needs_statistics(self) -> bool:
        """Whether H must be known."""
        return self.steps != ("nearest",) or self.beta > 0

    @property
    def needs_cross(self) -> bool:
        """Whether the cross term D must be known."""
        return self.beta > 0 or self.gptaq > 0

    def __post_init__(self) -> None:
        known = (*STARTS, *REFINEMENTS)
        for step in self.steps:
            if step not in known:
                chain = ", ".join(known)
                raise OptionError(f"unknown solver step '{step}'; a chain such as 'gptq+descent' is made of: {chain}")
        if not self.steps or self.steps[0] not in STARTS or any(step in STARTS for step in self.steps[1:]):
            raise OptionError(
                f"the solver chain '{'+'.join(self.steps)}' must begin with {' or '.join(STARTS)}, once, and go on with "
                f"{', '.join(REFINEMENTS)}"
            )
        if self.order not in ORDERS:
            raise OptionError(f"the order '{self.order}' is unknown; choose one of {', '.join(ORDERS)}")
        for name in ("damp", "ridge", "beta", "gptaq", "rescomp"):
            value, low, high = getattr(self, name), 0.0, 1e3 if name in ("damp", "ridge") else 1.0
            if not isinstance(value, float | int) or not low <= value <= high:
                raise OptionError(f"{name} is a number from {low:g} to {high:g}, not {value!r}")
        for name, least in (("alternations", 1), ("sweeps", 1), ("panel", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{name} is a whole number of at least {least}, not {value!r}")
        if (self.gptaq > 0 or self.rescomp > 0) and "gptq" not in self.steps:
            raise OptionError("gptaq and rescomp are terms of the gptq step: use a chain that begins with gptq")

    def check(self, fmt: Format) -> None:
        """Refuse steps and options that do not apply to a format.

        Raises:
            OptionError: naming what does.
        """
        if fmt.trellis is not None:
            self._check_trellis(fmt)
        finders = [step for step in self.steps if step in ("alternate", "refit", "blocks", "pot")]
        if self.scale_rule != "mse" and finders:
            raise OptionError(
                f"the scale rule '{self.scale_rule}' does not go with the step '{finders[0]}', which finds scales of least "
                "error; use the rule mse, or a chain of nearest, gptq and descent"
            )
        if "pot" in self.steps and not _powers_of_two(fmt):
            raise OptionError(
                f"the step 'pot' is for powers of two (pot2, pot3, pot4 and their -log forms), not {fmt.name}; "
                "these steps apply to every format: nearest, gptq, alternate, refit, descent"
            )
        if "blocks" in self.steps and isinstance(fmt.block, str):
            raise OptionError(
                f"the step 'blocks' is for formats whose blocks are smaller than a row (-g64, say), not {fmt.name}; "
                "these steps apply to every format: nearest, gptq, alternate, refit, descent"
            )

    def _check_trellis(self, fmt: Format) -> None:
        """A trellis has a sweep of its own, which takes few of the options (solve.py).

        Raises:
            OptionError: one that it does not take is not at its default.
        """
        if self.steps != ("nearest",) and ("gptq" not in self.steps or {"refit", "blocks", "pot"} & {*self.steps}):
            raise OptionError(
                f"the chain '{'+'.join(self.steps)}' does not apply to {fmt.name}; these do: nearest, gptq, gptq+alternate, "
                "gptq+descent"
            )
        default = SolverOptions()
        for name in ("order", "ridge", "importance", "gptaq", "rescomp", "scale_rule"):
            if getattr(self, name) != getattr(default, name):
                raise OptionError(
                    f"{name} ({getattr(self, name)}) does not apply to {fmt.name}, whose sweep has no such choice; leave it at "
                    f"{getattr(default, name)}, or take a scalar format"
                )


def _powers_of_two(fmt: Format) -> bool:
    """One member, whose levels are ± powers of two without zero."""
    halves = {abs(v) for v in fmt.members[0].levels}
    ordered = sorted(halves)
    return len(fmt.members) == 1 and 0.0 not in halves and all(b == 2 * a for a, b in pairwise(ordered))
