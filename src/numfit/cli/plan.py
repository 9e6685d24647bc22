"""`numfit plan`: what quantizing would do to every tensor, and what it would cost."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from numfit.cli.options import add_recipe_arguments, recipe

if TYPE_CHECKING:
    from numfit.pipeline import Plan
    from numfit.pipeline.planning import Estimate

NAME = "plan"
HELP = "show what quantizing would do to every tensor, its size, memory and time; writes nothing"
EPILOG = """\
examples:
  numfit plan my-model -f mant4-g64
  numfit plan my-model -f mant4-g32@e3m3 --embedding int8-g32     # the embedding has a format of its own
  numfit plan my-model -f int4-g128 --rule 'down_proj=int8-g128' --rule '\\.0\\.self_attn=fp6-g128'
  numfit plan my-model -f nf4-g64 --skip 'layers\\.(0|29)\\.'       # keep the first and the last layer as they are
  numfit plan my-model -f fp4.25 --json | jq .totals
  numfit plan my-model -f mant4-g64 --calibration text.txt --recipe quality   # the time of each part, and memory

Rules and skips are regular expressions searched in tensor names; --skip wins over --rule, the first matching rule wins
over the rest, and a pattern that matches nothing is an error. Norms, biases, routers and whatever is not clearly a
matrix of weights is kept. Bits per weight count codes, scales, members and zero points. Sizes are exact; memory and time
are estimates from small pieces of the same work on this machine, and can be wrong by a factor of two.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--no-estimate", action="store_true", help="do not measure small pieces for memory and time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from numfit.pipeline import plan

    result = plan(args.model, args.format, estimate=not args.no_estimate, **recipe(args))
    if args.json:
        print(json.dumps(as_json(result), indent=1))
        return 0
    print(table(result))
    print()
    print(summary(result.totals()))
    if result.estimate:
        print(f"\n{expected(result.estimate)}")
    for warning in result.warnings:
        print(f"note: {warning}", file=sys.stderr)
    return 0


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    tensors = [
        {
            "name": t.name, "role": t.role, "dtype": t.dtype, "shape": list(t.shape),
            "format": t.format.name if t.format else None, "bits": t.bits, "bytes_before": t.bytes_before,
            "bytes_after": t.bytes_after, "why": t.why,
        }
        for t in plan.tensors
    ]  # fmt: skip
    estimate = asdict(plan.estimate) if plan.estimate else None
    return {
        "recipe": plan.recipe, "tensors": tensors, "totals": plan.totals(), "file_bytes": plan.file_bytes,
        "files": [shard.file for shard in plan.shards], "estimate": estimate, "warnings": list(plan.warnings),
    }  # fmt: skip


def table(plan: Plan) -> str:
    """One line a tensor."""
    from numfit.report import Column, text_table

    rows = [
        {
            "name": t.name,
            "shape": f"{t.dtype} {'×'.join(map(str, t.shape)) or 'scalar'}",
            "format": t.format.name if t.format else "dropped" if t.dropped else "kept",
            "bits": t.bits, "before": t.bytes_before, "after": t.bytes_after, "why": t.why,
        }
        for t in plan.tensors
    ]  # fmt: skip
    columns = [
        Column("name", "tensor", align="left"), Column("shape", "shape", align="left"),
        Column("format", "format", align="left"), Column("bits", "bits", ".4g"), Column("before", "bytes before", ",d"),
        Column("after", "after", ",d"), Column("why", "why", align="left"),
    ]  # fmt: skip
    return text_table(rows, columns)


def summary(totals: dict[str, Any]) -> str:
    """Sizes by kind of tensor and of the whole model, as lines."""
    from numfit.report import Column, text_table

    rows = [
        {"what": what, **totals[key]}
        for what, key in (("linears", "linears"), ("embeddings", "embeddings"), ("kept", "kept"))
    ]
    rows.append({
        "what": "whole model", "tensors": sum(row["tensors"] for row in rows), "weights": totals["weights"],
        "bytes": totals["bytes"], "bits_per_weight": totals["bits_per_weight"],
    })  # fmt: skip
    columns = [
        Column("what", "", align="left"), Column("tensors", "tensors", ",d"), Column("weights", "weights", ",d"),
        Column("bits_per_weight", "bits/weight", ".4f"), Column("bytes", "MB", lambda value: f"{value / 1e6:.2f}"),
    ]  # fmt: skip
    before = totals["source_bytes"]
    ratio = f"the source has {before / 1e6:.2f} MB, {before / max(1, totals['bytes']):.2f} times as much"
    return f"{text_table(rows, columns)}\n{ratio}"


def expected(estimate: Estimate) -> str:
    """An estimate in words."""
    lines = [
        f"expected on this machine (an estimate from small pieces of the work): peak memory about "
        f"{estimate.peak_bytes / 1e6:.0f} MB, about {duration(estimate.seconds)}"
    ]
    if estimate.parts:
        parts = {part: seconds for part, seconds in estimate.parts.items() if seconds}
        parts["the rest"] = estimate.seconds - sum(parts.values())
        lines.append("of which " + ", ".join(f"{part} {duration(seconds)}" for part, seconds in parts.items()))
        lines.append(
            f"hidden states: {estimate.state_bytes / 1e6:.0f} MB in files beside the output (OUT.partial/layers); their pages "
            "are counted in the peak, and leave memory where others need it"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min 20 s", "2 h 5 min"."""
    whole = max(1, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
