"""What both `plan` and `quantize` make of their arguments, and `plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from numfit.checkpoint.source import Source, open_source
from numfit.devices import as_device
from numfit.errors import OptionError
from numfit.formats import Format
from numfit.pipeline.choice import plan_for
from numfit.pipeline.estimate import measure
from numfit.pipeline.linear import solver_options
from numfit.pipeline.options import as_format
from numfit.pipeline.planning import Plan, PlannedTensor
from numfit.pipeline.recipe import FAST_CONTEXT, Parts, choose
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
    device: torch.device | str | None = None,
) -> tuple[Source, Plan, Calibration | None]:
    """The opened source, the plan, and the calibrated part of the run where there is a text.

    Args:
        given: options of `make_plan`; what is None is the recipe's, or else the default.
        bits, calibration, recipe, statistics, parts, device: as for `quantize`.

    Raises:
        NumfitError: whatever of it cannot be; nothing has been written then.
    """
    place = as_device(device or "cpu")
    source = open_source(model)
    options, chosen = choose(recipe, parts, calibration is not None, None if place.type == "cpu" else _positions(source))
    options |= {key: value for key, value in given.items() if value is not None}
    options |= {key: [options[key]] for key in ("rules", "skip") if isinstance(options.get(key), str)}
    format = format or options.get("format")
    recorded = options.pop("calibration", None)
    options.pop("format", None)
    plan = plan_for(source, format, bits, str(recipe) if recipe else None, calibration is not None, **options)
    if chosen is None:
        if statistics:
            raise OptionError("--statistics keeps what a text does to the inputs of linears: pass one with --calibration FILE")
        if device:
            raise OptionError(
                "--device says where layers run on a text, and rounding without one needs the CPU alone: pass --calibration "
                "FILE, or leave it out"
            )
        return source, plan, None
    assert calibration is not None
    settled = chosen.settled(as_format(plan.recipe["format"]))
    if statistics and settled.propagate == "quantized":
        raise OptionError(
            "--statistics keeps inputs in the original model, and this recipe takes those in the model quantized so far "
            "(propagate quantized, retarget, gptaq and progressive reconstruction do, and so does the recipe extreme): "
            "leave it out"
        )
    expert = next((t.name for t in plan.quantized if "experts" in (t.role, *t.name.split("."))), None)
    if settled.needs_cross and expert:
        raise OptionError(
            "--retarget, --gptaq and --rescomp compare each token's input in two streams, which may send it to different "
            f"experts ('{expert}'); leave them out for models with experts"
        )
    for tensor in plan.quantized:  # what cannot be shall be said before anything is read
        if tensor.format and tensor.role in ("linear", "experts"):
            check_solvable(tensor, settled, plan.recipe["scale_rule"])
    task = Calibration(settled, read_calibration(calibration), Path(statistics) if statistics else None, place)
    warnings = plan.warnings
    if recorded not in (None, task.recipe["calibration"]):
        now = task.recipe["calibration"]
        warnings += (f"the recipe was recorded with '{recorded}' and this is '{now}': the result will not be the same",)
    return source, replace(plan, recipe={**plan.recipe, **task.recipe}, warnings=warnings), task


def _positions(source: Source) -> int:
    """How many tokens a window can hold."""
    config = source.config()
    return int(config.get("text_config", config).get("max_position_embeddings") or FAST_CONTEXT)


def check_solvable(tensor: PlannedTensor, parts: Parts, rule: str) -> None:
    """Refuse what the calibrated walk cannot do to a tensor that is to be quantized.

    Raises:
        OptionError: naming the tensor.
    """
    assert tensor.format is not None
    try:
        solver_options(tensor.format, parts, rule)
    except OptionError as error:
        raise OptionError(f"tensor '{tensor.name}': {error}") from None
    if tensor.format.trellis is not None and parts.reconstruct in ("signround", "adaround"):
        raise OptionError(
            f"--reconstruct {parts.reconstruct} moves codes one by one, and those of {tensor.format.name} depend on each "
            "other; tune and progressive work with every format"
        )
    if len(tensor.shape) == 3 and tensor.format.parent_span == "tensor":
        raise OptionError(
            f"'{tensor.name}' holds experts, which are solved one by one, and {tensor.format.name} chooses something for a "
            f"whole tensor; give it another format (--rule '{re.escape(tensor.name)}=FORMAT'), or leave --calibration out"
        )


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
    device: torch.device | str | None = None,
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
        calibration, recipe, statistics, device, parts: as for `quantize`.

    Raises:
        CheckpointError: the source is damaged. FormatError: an unknown format.
        OptionError: a pattern that matches nothing, a format that cannot hold a tensor, an already quantized source, parts that
            do not fit.
    """
    given = {"embedding": embedding, "rules": rules, "skip": skip, "scale_rule": scale_rule, "shard_size": shard_size}
    with cpu_threads(threads):
        source, result, task = prepare(model, format, bits, given, calibration, recipe, statistics, parts, device)
        return replace(result, estimate=measure(source, result, task)) if estimate else result
