"""A recipe: every choice that calibrated quantization makes, as one flat value that can be named, saved and replayed.

`fast`, `balanced`, `quality` and `extreme` are starting points; whatever is chosen in the end is what the checkpoint's
recipe.yaml says, and replaying that file on the same text gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from numfit.errors import OptionError, require
from numfit.formats import Format

RECIPE = "recipe.yaml"
TRANSFORMS = ("none", "smooth", "awq", "osplus", "permute", "fold")
RECONSTRUCTIONS = ("none", "auto", "signround", "adaround", "tune", "progressive")
_KINDS: dict[type, str] = {str: "a word", float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Parts:
    """How the codes of linears are found once there is a text.

    Attributes:
        solver: steps joined by "+": nearest or gptq first, then what improves on it (alternate, refit, blocks, descent, pot);
            best: the chain that suits each tensor's format.
        order: of gptq's columns: static, none, act, group.
        damp: gptq's damping, as a share of the mean of H's diagonal.
        ridge: added to H for good, as a share of its mean diagonal: what few tokens say of an input is trusted less.
        importance: weight errors by the mean square of each input when scales and members are chosen.
        transform: a function-preserving rewrite of each layer before: none, smooth, awq, osplus, permute or fold.
        bias_correction: add what rounding takes from a linear's mean output to its bias, where it has one.
        reconstruct: what is learned of each layer as a whole: none, signround or adaround (codes and scales), tune (scales), or
            progressive (weights that are not solved yet, while the others are solved in turn); auto: progressive for
            rotated types, whose codes depend on each other too much to be learned, signround for others.
        iterations: of `reconstruct`, where there is one; 0: 40 for progressive, which takes them for every group of linears,
            150 for others.
        span: how many neighbouring layers `reconstruct` learns as one (CBQ); 1: each for itself.
        propagate: whether a layer's inputs are those of the original model, or of the model quantized so far.
        retarget: share of the upstream error that each linear compensates for (QEP), 0 to 1.
        hold_out: the last windows of the text, which serve for nothing else than choosing each layer's own share, `retarget`
            being the most; 0: `retarget` is the share of all.
        gptaq: factor of GPTAQ's term in the sweep, which does so column by column, 0 to 1 (its authors take 0.25).
        rescomp: factor of ResComp's term in the sweep, 0 to 1 (its authors take 0.25).
        windows, context: of the calibration text.
    """

    solver: str = "nearest"
    order: str = "static"
    damp: float = 0.01
    ridge: float = 0.0
    importance: bool = True
    transform: str = "none"
    bias_correction: bool = False
    reconstruct: str = "none"
    iterations: int = 0
    span: int = 1
    propagate: str = "original"
    retarget: float = 0.0
    hold_out: int = 0
    gptaq: float = 0.0
    rescomp: float = 0.0
    windows: int = 32
    context: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            sound = isinstance(value, int | float if kind is float else kind)
            if not sound or isinstance(value, bool) != (kind is bool):
                raise OptionError(f"'{field.name}' is {_KINDS[kind]}, not {value!r}")
        if self.propagate not in ("original", "quantized"):
            raise OptionError(f"--propagate is original or quantized, not '{self.propagate}'")
        if self.transform not in TRANSFORMS:
            raise OptionError(f"--transform is one of {', '.join(TRANSFORMS)}, not '{self.transform}'")
        if self.reconstruct not in RECONSTRUCTIONS:
            raise OptionError(f"--reconstruct is one of {', '.join(RECONSTRUCTIONS)}, not '{self.reconstruct}'")
        for name in ("retarget", "gptaq", "rescomp"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"--{name} is a share between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.hold_out < self.windows:
            raise OptionError(f"--hold-out is less than the number of windows, {self.windows}, and not {self.hold_out}")
        if self.hold_out and not self.retarget:
            raise OptionError("--hold-out chooses how much of --retarget each layer takes: say the most, as in --retarget 1")
        if not 0 < self.damp < 100:
            raise OptionError(f"--damp is a positive share of H's mean diagonal, usually 0.01, not {self.damp}")
        if self.span < 1:
            raise OptionError(f"--span is at least 1 layer, not {self.span}")
        if self.iterations < 0:
            raise OptionError(f"--iterations is at least 1, not {self.iterations}")

    def settled(self, fmt: Format) -> Parts:
        """The parts with everything said that was left to be chosen, for linears of a format."""
        how = self.reconstruct
        if how == "auto":
            how = "progressive" if fmt.side.rotation is not None or fmt.trellis is not None else "signround"
        if self.span > 1 and how in ("none", "progressive"):
            raise OptionError(
                f"--span {self.span} has neighbouring layers learned as one, which --reconstruct signround, adaround and tune "
                f"can do; here it is {how}"
            )
        if self.hold_out and how == "progressive":
            raise OptionError("--hold-out does not go with --reconstruct progressive, which solves a layer's linears in turn")
        if self.span > 1 and self.bias_correction:
            raise OptionError("--bias-correction does not go with --span: means are those before a span's layers are learned")
        steps = {"none": self.iterations, "progressive": self.iterations or 40}.get(how, self.iterations or 150)
        stream = "quantized" if self.needs_cross or how == "progressive" else self.propagate  # they take that one
        return replace(self, reconstruct=how, iterations=steps, propagate=stream)

    @property
    def needs_quantized(self) -> bool:
        """Whether the hidden states of the model quantized so far are needed."""
        return self.propagate == "quantized" or self.reconstruct != "none" or self.needs_cross

    @property
    def needs_cross(self) -> bool:
        """Whether the two streams, of the original model and of the one quantized so far, are to be compared at each input."""
        return self.retarget > 0 or self.gptaq > 0 or (self.rescomp > 0 and self.propagate == "quantized")


PRESETS = {
    "fast": Parts(),
    "balanced": Parts(solver="gptq"),
    "quality": Parts(solver="best"),
    "extreme": Parts(solver="gptq", reconstruct="auto", propagate="quantized"),
}
FAST_WINDOWS, FAST_CONTEXT = 128, 2048  # of the text, by default, where layers run on an accelerator
# What a recipe file says beside the parts: the options of `quantize` that need no text.
COMMON = ("format", "embedding", "rules", "skip", "scale_rule", "shard_size")


def read_recipe(name: str | Path) -> tuple[dict[str, Any], Parts]:
    """A recipe by its name or from a file: (options of `quantize`, parts).

    Raises:
        OptionError: neither a name nor a file, or a file that is no recipe.
    """
    if str(name) in PRESETS:
        return {}, PRESETS[str(name)]
    path = Path(name)
    if path.is_dir():
        path = path / RECIPE
    try:
        content = require("yaml", "hf").safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise OptionError(
            f"--recipe '{name}' is neither one of {', '.join(PRESETS)} nor a file that can be read"
        ) from None
    except (ValueError, require("yaml", "hf").YAMLError) as error:
        raise OptionError(f"the recipe '{path}' is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise OptionError(f"the recipe '{path}' should be lines like 'format: mant4-g64'")
    known = {field.name for field in fields(Parts)}
    strange = sorted(content.keys() - known - set(COMMON) - {"calibration"})
    if strange:
        raise OptionError(f"the recipe '{path}' says '{strange[0]}', which is no part of a recipe")
    said = {key: value for key, value in content.items() if value is not None}
    options = {key: said[key] for key in (*COMMON, "calibration") if key in said}
    options["rules"] = [tuple(rule) if isinstance(rule, list) else rule for rule in _listed(options.get("rules", []))]
    if "skip" in options:
        options["skip"] = _listed(options["skip"])
    for key, value in options.items():
        if not _sound(key, value):
            raise OptionError(f"the recipe '{path}' has a value of a wrong kind: {key}: {value!r}")
    try:
        return options, Parts(**{key: said[key] for key in known if key in said})
    except OptionError as error:
        raise OptionError(f"the recipe '{path}' cannot be used: {error}") from None


def _listed(value: Any) -> list[Any]:
    """A list, also of a single value."""
    return value if isinstance(value, list) else [value]


def _sound(key: str, value: Any) -> bool:
    """Whether a value is of the kind that an option takes."""

    def words(values: Any) -> bool:
        return isinstance(values, list | tuple) and all(isinstance(word, str) for word in values)

    if key == "rules":  # "regex=format", or the two of them
        return all(isinstance(rule, str) or (words(rule) and len(rule) == 2) for rule in value)
    if key == "skip":
        return words(value)
    return isinstance(value, str) or (key == "shard_size" and type(value) is int)


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe, as the manifest has it, for people and for `read_recipe`."""
    text = require("yaml", "hf").safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    path.write_text(f"# numfit quantize MODEL --recipe THIS_FILE --calibration TEXT -o OUT\n{text}", encoding="utf-8")


def choose(
    recipe: str | Path | None, given: Mapping[str, Any], with_text: bool, fast: int | None = None
) -> tuple[dict[str, Any], Parts | None]:
    """The recipe's common options and the parts that hold in the end.

    Args:
        recipe: a name, a file, or None for "balanced" where there is a text.
        given: parts that were chosen one by one; they win over the recipe.
        with_text: whether there is a calibration text.
        fast: layers run on something faster than a CPU, so that more of the text is affordable, unless a number is given: in
            windows of no more than so many tokens.

    Raises:
        OptionError: parts that need a text where there is none.
    """
    options, parts = read_recipe(recipe) if recipe else ({}, PRESETS["balanced" if with_text else "fast"])
    chosen = {key: value for key, value in given.items() if value is not None}
    if fast and not options:  # a recipe's file says how much text it takes
        parts = replace(parts, windows=FAST_WINDOWS, context=min(fast, FAST_CONTEXT))
    parts = replace(parts, **chosen)
    if with_text:
        return options, parts
    plain = replace(parts, importance=True, hold_out=0, windows=Parts.windows, context=Parts.context)
    if chosen or parts.hold_out or plain != Parts():
        what = f"--{next(iter(chosen)).replace('_', '-')}" if chosen else f"the recipe '{recipe}'"
        raise OptionError(f"{what} works on what a text does to the model: pass one with --calibration FILE")
    return options, None


def as_recipe(parts: Parts) -> dict[str, Any]:
    """The parts as plain data."""
    return asdict(parts)
