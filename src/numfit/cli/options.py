"""The arguments that `numfit plan` and `numfit quantize` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that plan and quantize share."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory, a GGUF file, or a hub name")
    parser.add_argument(
        "-f", "--format", metavar="FORMAT",
        help="of the linear weights; 'numfit formats' lists them",
    )  # fmt: skip
    parser.add_argument(
        "-b", "--bits", type=float, metavar="X",
        help="instead of -f: the best type whose linears take at most X bits a weight (default 4.4); --recipe quality and "
        "extreme choose trellis codes where this machine decodes them fast, and all choose by whether there is a text",
    )  # fmt: skip
    parser.add_argument(
        "--embedding", metavar="FORMAT",
        help="of embeddings and lm_head (default int8-g32); 'keep' leaves them as they are",
    )  # fmt: skip
    parser.add_argument(
        "--rule", action="append", metavar="REGEX=FORMAT", dest="rules",
        help="another format (or 'keep') for the tensors whose name matches; repeatable, the first match wins",
    )  # fmt: skip
    parser.add_argument(
        "--skip", action="append", metavar="REGEX", help="keep the tensors whose name matches; repeatable"
    )
    parser.add_argument(
        "--scale-rule", metavar="RULE",
        help="mse: search the scale of least error (default); absmax: no search; floor, ceil: OCP's, for mx formats",
    )  # fmt: skip
    parser.add_argument("--shard-size", metavar="SIZE", help="largest output file (default 5GB)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
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
        help="nearest or gptq, then '+alternate', '+refit', '+blocks', '+descent', '+pot' (powers of two); or best",
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
    group.add_argument("--span", type=int, metavar="N", help="neighbouring layers that --reconstruct learns as one (default 1)")
    group.add_argument(
        "--propagate", metavar="STREAM", help="inputs of a layer: of the original model (default), or the quantized so far"
    )
    group.add_argument("--retarget", type=float, metavar="X", help="share of upstream error to compensate (default 0)")
    group.add_argument(
        "--hold-out", type=int, metavar="N",
        help="choose each layer's share, --retarget being the most, on the last N windows (default 0: it is X for all)",
    )  # fmt: skip
    group.add_argument("--gptaq", type=float, metavar="X", help="the same inside gptq's sweep (default 0, often 0.25)")
    group.add_argument("--rescomp", type=float, metavar="X", help="of ResComp's term in gptq's sweep (default 0, often 0.25)")
    group.add_argument("--windows", type=int, metavar="N", help="of the calibration text (default 32; 128 on a GPU)")
    group.add_argument("--context", type=int, metavar="N", help="tokens a window (default 1024; 2048 on a GPU)")
    group.add_argument(
        "--device", metavar="DEVICE",
        help="where layers run on the text and are learned, for instance cuda (default: the CPU, which does all else)",
    )  # fmt: skip
    group.add_argument("--statistics", metavar="DIR", help="keep the statistics there, for other runs on the same text")


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_recipe_arguments` that were given, as those of `numfit.plan` and `numfit.quantize`."""
    names = (
        "bits", "embedding", "rules", "skip", "scale_rule", "shard_size", "threads", "calibration", "recipe", "solver", "order",
        "damp", "ridge", "importance", "transform", "bias_correction", "reconstruct", "iterations", "span", "propagate",
        "retarget", "hold_out", "gptaq", "rescomp", "windows", "context", "statistics", "device",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not given.get("calibration", "hub:").startswith("hub:"):
        given["calibration"] = Path(given["calibration"])
    return given
