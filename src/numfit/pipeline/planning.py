"""The plan: which tensor gets which format, what that costs in bytes, and how the output files are laid out.

Everything in it follows from the headers of the source and the options, so it takes a moment even for a model of
hundreds of gigabytes, and the walk (walk.py) only carries it out. `plan` (prepare.py) adds an estimate of memory and time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from numfit.checkpoint.packed import plane_name
from numfit.checkpoint.safetensors_file import DTYPE_NAMES, Group, Shard, Slot, layout_shards, make_group
from numfit.checkpoint.source import DirectorySource, Source, natural_key
from numfit.errors import FormatError, OptionError
from numfit.formats import Format
from numfit.formats.fit import SCALE_RULES
from numfit.pipeline.model_config import checked_config, untie
from numfit.pipeline.options import (
    KEEP,
    Pattern,
    as_format,
    check_patterns,
    format_or_keep,
    parse_rule,
    parse_size,
    parse_skip,
)
from numfit.pipeline.roles import Role, role, rule_can_apply

SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and what becomes of it.

    Attributes:
        role: "linear", "experts", "embedding", "head" or "kept" (roles.py); what it is, not what is done.
        format: None where it is kept or dropped.
        why: the reason for keeping or dropping, or the rule that chose the format; empty for the ordinary.
        bytes_before, bytes_after: in the source's file and in ours; a dropped tensor takes none.
        dropped: a second copy of a tied weight, not written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    format: Format | None
    why: str
    bytes_before: int
    bytes_after: int
    dropped: bool = False

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float | None:
        """Bits per weight in our file; None for what has no weights there."""
        return None if self.dropped or not self.weights else 8 * self.bytes_after / self.weights


@dataclass(frozen=True)
class Estimate:
    """Expectations from small pieces of work on this machine.

    Attributes:
        peak_bytes: of host memory, pages of mapped files among it.
        seconds: of the whole.
        parts: of a calibrated run, seconds by part as `quantize` tells them ("spent"); the rest is reading, rounding what is
            in no decoder layer, writing and checking.
        state_bytes: of a calibrated run, hidden states in files beside the output; their pages can leave memory.
    """

    peak_bytes: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    state_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What `quantize` will do. `recipe` is the options in canonical form, as the manifest records them."""

    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    recipe: dict[str, Any]
    config: dict[str, Any]
    warnings: tuple[str, ...]
    estimate: Estimate | None = None

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.format)

    @property
    def kept(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if not tensor.format and not tensor.dropped)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def totals(self) -> dict[str, Any]:
        """Sizes of the whole: the linears' bits per weight never stand without the whole model's bytes."""
        linears = [tensor for tensor in self.quantized if tensor.role not in ("embedding", "head")]
        embeddings = [tensor for tensor in self.tensors if tensor.role in ("embedding", "head") and not tensor.dropped]
        stored = [tensor for tensor in self.tensors if not tensor.dropped]
        return {
            "bytes": sum(tensor.bytes_after for tensor in stored),
            "source_bytes": sum(tensor.bytes_before for tensor in self.tensors),
            "weights": sum(tensor.weights for tensor in stored),
            "bits_per_weight": _bits(stored),
            "linears": _total(linears),
            "embeddings": _total(embeddings),
            "kept": _total(tensor for tensor in self.kept if tensor.role not in ("embedding", "head")),
        }


def _total(tensors: Iterable[PlannedTensor]) -> dict[str, Any]:
    tensors = list(tensors)
    return {
        "tensors": len(tensors),
        "weights": sum(tensor.weights for tensor in tensors),
        "bytes": sum(tensor.bytes_after for tensor in tensors),
        "bits_per_weight": _bits(tensors),
    }


def _bits(tensors: Sequence[PlannedTensor]) -> float | None:
    weights = sum(tensor.weights for tensor in tensors)
    return round(8 * sum(tensor.bytes_after for tensor in tensors) / weights, 6) if weights else None


def rule_for(fmt: Format, scale_rule: str) -> str:
    """The scale rule of one format: "floor" and "ceil" are OCP's, for e8m0 scales; others beside them use "mse"."""
    return "mse" if scale_rule in ("floor", "ceil") and fmt.scale.store != "e8m0" else scale_rule


def make_plan(
    source: Source,
    format: str | Format,
    *,
    embedding: str | Format = "int8-g32",
    rules: Sequence[str | tuple[str, str]] = (),
    skip: Sequence[str] = (),
    scale_rule: str = "mse",
    shard_size: str | int = SHARD_SIZE,
) -> Plan:
    """`plan` for an opened source, without calibration and estimate. The arguments and errors are those of `plan`."""
    if format == KEEP:
        raise OptionError("the format of the linears cannot be 'keep'; to quantize a few tensors only, use --skip")
    main, table = as_format(format), format_or_keep(embedding)
    parsed, skips = [parse_rule(rule) for rule in rules], [parse_skip(pattern) for pattern in skip]
    limit = parse_size(shard_size)
    if scale_rule not in SCALE_RULES or rule_for(main, scale_rule) != scale_rule:
        allowed = ", ".join(rule for rule in SCALE_RULES if rule_for(main, rule) == rule)
        raise OptionError(f"the scale rule '{scale_rule}' does not apply to {main.name}; choose one of {allowed}")
    config, warnings = checked_config(source)
    config, dropped, tie_warning = untie(source, config)
    warnings += tie_warning

    check_patterns(source, parsed, skips)
    tensors = []
    for name in sorted(source.names(), key=natural_key):  # the same order for GGUF and directories
        info = source.info(name)
        judged = role(info)
        if name in dropped:
            tensors.append(PlannedTensor(name, info.dtype, info.shape, judged.kind, None, dropped[name], info.nbytes, 0, True))
            continue
        fmt, why = _choose(judged, rule_can_apply(info), name, main, table, parsed, skips)
        if fmt is not None:
            _check_fit(fmt, name, info.shape, judged)
        after = fmt.nbytes(info.shape) if fmt else info.nbytes
        tensors.append(PlannedTensor(name, info.dtype, info.shape, judged.kind, fmt, why, info.nbytes, after))
    if not any(tensor.format for tensor in tensors):
        raise OptionError("nothing is left to quantize: every tensor is kept; see numfit plan for the reasons")
    if isinstance(source, DirectorySource) and not source.has_tokenizer:
        warnings.append("the source has no tokenizer; the result can be inspected and converted, but eval and run need one")
    recipe = {
        "format": main.name,
        "embedding": table.name if table else KEEP,
        "rules": [[rule.text, rule.format.name if rule.format else KEEP] for rule in parsed],
        "skip": list(skip),
        "scale_rule": scale_rule,
        "shard_size": limit,
    }
    groups = [_group(tensor) for tensor in tensors if not tensor.dropped]
    return Plan(tuple(tensors), layout_shards(groups, limit), recipe, config, tuple(warnings))


def _group(tensor: PlannedTensor) -> Group:
    if tensor.format is None:
        return make_group(tensor.name, [Slot(tensor.name, tensor.dtype, tensor.shape)])
    planes = tensor.format.planes(tensor.shape).items()
    return make_group(tensor.name, [Slot(plane_name(tensor.name, p), DTYPE_NAMES[s.dtype], s.shape) for p, s in planes])


def _choose(
    judged: Role, can: bool, name: str, main: Format, table: Format | None, rules: list[Pattern], skips: list[Pattern]
) -> tuple[Format | None, str]:
    """The format of one tensor (None: kept) and the reason, if there is one to tell."""
    skipped = next((skip for skip in skips if skip.matches(name)), None)
    if skipped:
        return None, judged.why or f"--skip '{skipped.text}'"
    rule = next((rule for rule in rules if can and rule.matches(name)), None)
    if rule:
        return rule.format, f"--rule '{rule.text}'"
    if judged.kind == "kept":
        return None, judged.why
    if judged.kind in ("embedding", "head"):
        return table, "" if table else "--embedding keep"
    return main, ""


def _check_fit(fmt: Format, name: str, shape: tuple[int, ...], judged: Role) -> None:
    try:
        fmt.check_shape(shape)
    except FormatError as error:
        option = "--embedding FORMAT, " if judged.kind in ("embedding", "head") else ""
        raise OptionError(
            f"tensor '{name}' cannot be stored as {fmt.name}: {error}; give it another format "
            f"({option}--rule '{re.escape(name)}=FORMAT') or keep it (--skip '{re.escape(name)}')"
        ) from None
