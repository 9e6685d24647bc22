"""What both `plan` and `quantize` make of their arguments, and `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numfit.checkpoint.source import Source, open_source
from numfit.formats import Format
from numfit.pipeline.choice import plan_for
from numfit.pipeline.estimate import measure
from numfit.pipeline.linear import solver_options
from numfit.pipeline.options import as_format
from numfit.pipeline.planning import Plan
from numfit.pipeline.recipe import choose
from numfit.pipeline.results import Calibration, read_calibration
from numfit.threads import cpu_threads


def prepare(
    model: str | Path,
    format: str | Format | None,
    bits: float | None,
    given: Mapping[str, Any],
    calibration: str | Path | None,
    recipe: str | Path | None,
    statistics: str | Path | None,
    parts: Mapping[str, Any],
) -> tuple[Source, Plan, Calibration | None]:
    """The opened source, the plan, and the calibrated part of the run where there is a text.

    Args:
        given: options of `make_plan`; what is None is the recipe's, or else the default.
        bits, calibration, recipe, statistics, parts: as for `quantize`.

    Raises:
        NumfitError: whatever of it cannot be; nothing has been written then.
    """
    options, chosen = choose(recipe, parts, calibration is not None)
    options |= {key: value for key, value in given.items() if value is not None}
    format = format or options.pop("format", None)
    options.pop("format", None)
    source = open_source(model)
    plan = plan_for(source, format, bits, str(recipe) if recipe else None, calibration is not None, **options)
    if chosen is None:
        return source, plan, None
    assert calibration is not None
    settled = chosen.settled(as_format(plan.recipe["format"]))
    for fmt in {tensor.format for tensor in plan.quantized if tensor.format and tensor.role in ("linear", "experts")}:
        solver_options(fmt, settled)  # what cannot be shall be said before anything is read
    task = Calibration(settled, read_calibration(calibration), Path(statistics) if statistics else None)
    return source, replace(plan, recipe={**plan.recipe, **task.recipe}), task


def plan(
    model: str | Path,
    format: str | Format | None = None,
    *,
    bits: float | None = None,
    embedding: str | Format | None = None,
    rules: Sequence[str | tuple[str, str]] | None = None,
    skip: Sequence[str] | None = None,
    scale_rule: str | None = None,
    shard_size: str | int | None = None,
    threads: int | None = None,
    estimate: bool = True,
    calibration: str | Path | None = None,
    recipe: str | Path | None = None,
    statistics: str | Path | None = None,
    **parts: Any,
) -> Plan:
    """What `quantize` with the same arguments would do, with an estimate of its memory and time. Writes nothing.

    Args:
        model: a Hugging Face directory, a GGUF file or a hub name.
        format: of linear weights and experts; None takes a recipe file's, or else the best that fits (choice.py).
        bits: the linears may take, per weight, where the format is to be chosen (default 4.4).
        embedding: of embeddings and lm_head (int8-g32); "keep" leaves them.
        rules: "regex=format" (or pairs), searched in tensor names, the first match wins; "keep" is a format here.
        skip: regular expressions of tensors to keep; they win over rules.
        scale_rule: "mse" (the default) or "absmax"; formats with e8m0 scales also "floor" or "ceil" (others beside them use
            "mse").
        shard_size: largest output file, as "5GB" (the default), "500MB" or a number of bytes.
        threads: CPU threads; None leaves torch's setting.
        estimate: measure small pieces for memory and time, which takes a few seconds.
        calibration, recipe, statistics, parts: as for `quantize`.

    Raises:
        CheckpointError: the source is damaged. FormatError: an unknown format.
        OptionError: a pattern that matches nothing, a format that cannot hold a tensor, an already quantized source, parts that
            do not fit.
    """
    given = {"embedding": embedding, "rules": rules, "skip": skip, "scale_rule": scale_rule, "shard_size": shard_size}
    with cpu_threads(threads):
        source, result, task = prepare(model, format, bits, given, calibration, recipe, statistics, parts)
        return replace(result, estimate=measure(source, result, task)) if estimate else result
