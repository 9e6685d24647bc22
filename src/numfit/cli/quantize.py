"""`numfit quantize`: a model → a packed checkpoint."""

from __future__ import annotations

import argparse
import json
import sys

from numfit.cli.options import add_recipe_arguments, recipe
from numfit.cli.plan import duration, summary

NAME = "quantize"
HELP = "quantize a model to a packed checkpoint, tensor by tensor; a killed run goes on where it stopped"
EPILOG = """\
examples:
  numfit quantize my-model -f mant4-g32@e3m3 -o my-model-mant4        # the quality default, 4.34 bits
  numfit quantize model.gguf -f fp5.33 -o my-model-fp5                # straight from a GGUF file
  numfit quantize my-model -f int4-g128 --embedding keep -o out       # embedding and lm_head as they are
  numfit quantize my-model -f int4-g128 --rule 'down_proj=int8-g128' --skip '\\.0\\.self_attn' -o out
  numfit quantize my-model -f mxfp4 --scale-rule floor -o out         # OCP's own rule for shared exponents
  numfit quantize my-model -f nf4-g64 -o out --json | jq .totals

with a text, which halves the loss of most formats and more (a few hundred kilobytes of what the model will read):
  numfit quantize my-model -f mant4-g32@e3m3 --calibration text.txt -o out                  # GPTQ, importance-aware
  numfit quantize my-model -f lm4-row+rot --calibration text.txt --recipe quality -o out    # rotated, 4.02 bits
  numfit quantize my-model -f int2-g64@e3m3 --calibration text.txt --recipe extreme -o out  # learned rounding: slow
  numfit quantize my-model --bits 3.1 --calibration text.txt --recipe quality -o out        # chooses: trellis3+rot here
  numfit quantize my-model --recipe out/recipe.yaml --calibration text.txt -o again         # the same bytes once more

See 'numfit plan' for what will happen. Unfinished work lies in OUT.partial: after a kill, a full disk or Ctrl-C the
same command goes on and ends with the same bytes; with other options it refuses. OUT appears only when it is complete.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="directory to make; must not exist or be empty"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of a table")


def run(args: argparse.Namespace) -> int:
    from numfit.pipeline import quantize

    result = quantize(args.model, args.format, args.out, progress=not args.quiet, **recipe(args))
    for warning in result["warnings"]:
        print(f"note: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(summary(result["totals"]))
    if result["worst"]:
        worst = ", ".join(f"{name} {error:.3g}" for name, error in result["worst"][:3])
        print(f"largest relative squared errors: {worst}")
    if result["status"] == "already there":
        print(f"{result['out']} is this very checkpoint already; nothing to do")
        return 0
    resumed = f", {result['resumed']} tensors taken over from an earlier run" if result["resumed"] else ""
    print(
        f"{result['out']}: {result['file_bytes'] / 1e6:.2f} MB of weights in {duration(result['seconds'])}, "
        f"peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB{resumed}"
    )
    if result["spent"]:
        print("of which " + ", ".join(f"{part} {duration(seconds)}" for part, seconds in result["spent"].items() if seconds))
    return 0
