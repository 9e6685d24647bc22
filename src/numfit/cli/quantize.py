"""`numfit quantize`: a model → a packed checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from numfit.cli.plan import add_recipe_arguments, duration, recipe, summary

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
    add_recipe_arguments(parser, format_needed=False)
    parser.add_argument(
        "-b", "--bits", type=float, metavar="X",
        help="instead of -f: the best type whose linears take at most X bits a weight (default 4.4); --recipe quality and "
        "extreme choose trellis codes where this machine decodes them fast, and all choose by whether there is a text",
    )  # fmt: skip
    group = parser.add_argument_group("calibration", "what a text does to the model, and what is made of it")
    group.add_argument(
        "--calibration", metavar="TEXT", help="a UTF-8 text file, or hub:DATASET[:CONFIG[:SPLIT]] (needs the extra 'data')"
    )
    group.add_argument(
        "--recipe", metavar="NAME|FILE",
        help="fast: importance-aware rounding; balanced (default with a text): and GPTQ; quality: and refitted scales, "
        "coordinate descent; extreme: and learned rounding of whole layers; or a recipe.yaml. Options below win over it",
    )  # fmt: skip
    group.add_argument(
        "--solver", metavar="STEPS",
        help="nearest or gptq, then '+alternate', '+refit', '+blocks', '+descent'; or best",
    )  # fmt: skip
    group.add_argument("--order", metavar="ORDER", help="of gptq's columns: static (default), none, act, group")
    group.add_argument("--damp", type=float, metavar="X", help="gptq's damping, of H's mean diagonal (default 0.01)")
    group.add_argument("--ridge", type=float, metavar="X", help="added to H, of its mean diagonal (default 0)")
    group.add_argument(
        "--no-importance", dest="importance", action="store_false", default=None,
        help="do not weight errors by the inputs' mean squares when scales are chosen",
    )  # fmt: skip
    group.add_argument(
        "--transform", metavar="NAME",
        help="a function-preserving rewrite before: none (default), smooth, awq, osplus, permute, fold",
    )  # fmt: skip
    group.add_argument(
        "--bias-correction", action="store_true", default=None,
        help="give mean outputs back through biases, where there are any",
    )  # fmt: skip
    group.add_argument(
        "--reconstruct", metavar="HOW", help="learn a layer as a whole: none, signround, adaround, tune, progressive, auto"
    )
    group.add_argument("--iterations", type=int, metavar="N", help="of --reconstruct (default 150; 40 for progressive)")
    group.add_argument(
        "--propagate", metavar="STREAM", help="inputs of a layer: of the original model (default), or the quantized so far"
    )
    group.add_argument("--retarget", type=float, metavar="X", help="share of upstream error to compensate (default 0)")
    group.add_argument("--gptaq", type=float, metavar="X", help="the same inside gptq's sweep (default 0, often 0.25)")
    group.add_argument("--rescomp", type=float, metavar="X", help="of ResComp's term in gptq's sweep (default 0, often 0.25)")
    group.add_argument("--windows", type=int, metavar="N", help="of the calibration text (default 32)")
    group.add_argument("--context", type=int, metavar="N", help="tokens a window (default 1024)")
    group.add_argument("--statistics", metavar="DIR", help="keep the statistics there, for other runs on the same text")
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="directory to make; must not exist or be empty"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of a table")


def calibration(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of calibration that were given, as those of `numfit.quantize`."""
    names = (
        "calibration", "recipe", "solver", "order", "damp", "ridge", "importance", "transform", "bias_correction",
        "reconstruct", "iterations", "propagate", "retarget", "gptaq", "rescomp", "windows", "context", "statistics",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not given.get("calibration", "hub:").startswith("hub:"):
        given["calibration"] = Path(given["calibration"])
    return given


def run(args: argparse.Namespace) -> int:
    from numfit.pipeline import quantize

    result = quantize(
        args.model, args.format, args.out, bits=args.bits, progress=not args.quiet, **recipe(args), **calibration(args)
    )
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
