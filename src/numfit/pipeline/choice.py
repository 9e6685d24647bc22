"""Which type, where only bits or a recipe are said: the best one that fits, by what docs/quality.md measured.

Three ladders, each of falling error. Trellis codes are for those who asked for quality and whose processor decodes them at the
speed of memory; fixed levels behind a rotation and adaptive types for everybody with a text; types that lose little when they
are rounded for those without. Gives up: judging a model by itself; the order was found on one model, and `numfit eval` tells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numfit import native
from numfit.checkpoint.source import Source
from numfit.errors import FormatError, OptionError
from numfit.formats import Format
from numfit.pipeline.planning import Plan, make_plan

BITS = 4.4  # per weight of the linears, where nothing is said
NATIVE_TRELLIS = ("avx512", "amx")  # instruction sets whose kernels decode a trellis as fast as a table

Step = tuple[str, tuple[str, ...]]  # a format, and rules beside it
_HALF = "gate_proj|down_proj"  # about half of the weights, those that gain most from a bit more
_LARGE: tuple[Step, ...] = (("lm5-row+rot", ("down_proj=lm6-row+rot",)), ("lm6-row+rot", ()), ("int8-g64", ()))
TRELLIS: tuple[Step, ...] = (
    ("trellis2+rot", ()), ("trellis2+rot", (f"{_HALF}=trellis3+rot",)),
    ("trellis3+rot", ()), ("trellis3+rot", (f"{_HALF}=trellis4+rot",)), ("trellis4+rot", ()), *_LARGE,
)  # fmt: skip
SCALAR: tuple[Step, ...] = (
    ("lm2-row+rot", ()), ("lm3-row+rot", ()), ("lm4-row+rot", ()), ("mant4-g32@e3m3", ()), *_LARGE,
)  # fmt: skip
WITHOUT_TEXT: tuple[Step, ...] = (("bitmod3-g64", ()), ("mant4-g32@e3m3", ()), ("fp5.33", ()), ("int8-g64", ()))


def ladder(recipe: str | None, with_text: bool) -> tuple[tuple[Step, ...], str]:
    """Formats of rising bits for a recipe, and why these."""
    if not with_text:
        return WITHOUT_TEXT, "the best that needs no calibration text"
    if recipe not in ("quality", "extreme"):
        return SCALAR, f"the best scalar type for the recipe {recipe or 'balanced'}; quality and extreme take trellis codes"
    if native.isa() in NATIVE_TRELLIS:
        return TRELLIS, f"trellis codes, for the recipe {recipe}: this machine decodes them at full speed"
    return SCALAR, (
        "the best scalar type: this machine has no fast kernels for trellis codes (AVX-512 with VBMI, GFNI and VNNI), "
        "-f trellis4+rot runs, slowly"
    )


def plan_for(
    source: Source, format: str | Format | None, bits: float | None, recipe: str | None, with_text: bool, **options: Any
) -> Plan:
    """The plan for a format; or where there is none, of the most precise one that fits into `bits`, which its notes name.

    Args:
        bits: that the linears take a weight at most, all metadata counted; None for 4.4.
        recipe: by name, if it has one.
        options: as for `planning.make_plan`; given rules win over those of a choice.

    Raises:
        OptionError: a format and bits, nothing as small as that, or options that do not fit.
    """
    if format is not None:
        if bits is not None:
            raise OptionError("--bits chooses a format and there is one already: pass --bits or --format, not both")
        return make_plan(source, format, **options)
    rules = options.pop("rules", ())
    steps, why = ladder(recipe, with_text)
    limit = BITS if bits is None else bits
    smallest, failure = None, None
    for name, more in reversed(steps):
        try:
            plan = make_plan(source, name, rules=[*rules, *more], **options)
        except (OptionError, FormatError) as error:  # rows that cannot be rotated, a model without these names
            failure = failure or error
            continue
        smallest = plan.totals()["linears"]["bits_per_weight"] or 0.0
        if smallest <= limit:
            words = " and ".join((name, *(f"{rule.rpartition('=')[2]} for {rule.rpartition('=')[0]}" for rule in more)))
            return replace(plan, warnings=(f"chosen: {words}, {smallest:.3f} bits a weight ({why})", *plan.warnings))
    if smallest is None:
        assert failure is not None
        raise failure
    hint = "" if with_text else "; with a calibration text there are smaller ones"
    raise OptionError(f"--bits {limit:g} cannot be met: the smallest choice here takes {smallest:.3f} bits a weight{hint}")

