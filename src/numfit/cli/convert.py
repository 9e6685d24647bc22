"""`numfit convert`: a GGUF file or a numfit checkpoint → a plain Hugging Face directory."""

from __future__ import annotations

import argparse
import sys

NAME = "convert"
HELP = "turn a GGUF file, or a numfit checkpoint, into a plain Hugging Face directory"
EPILOG = """\
examples:
  numfit convert model.Q4_1.gguf -o my-model                   # weights, config and tokenizer; exact in float32
  numfit convert model.Q8_0.gguf -o my-model --dtype bfloat16  # half the size, rounded
  numfit convert my-model-mant4 -o my-model-plain              # the way out: dequantized, for any other tool

Quantizing a GGUF file needs no conversion: 'numfit quantize model.gguf …' reads it directly.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GGUF file or a numfit checkpoint")
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="directory to make; must not exist or be empty"
    )
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help="float32 (default, exact), bfloat16 or float16"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run(args: argparse.Namespace) -> int:
    from numfit.checkpoint import MANIFEST, resolve_model
    from numfit.checkpoint.gguf import convert_gguf
    from numfit.checkpoint.unpack import convert_packed
    from numfit.errors import OptionError
    from numfit.threads import cpu_threads

    model = resolve_model(args.model)
    if model.is_dir() and not (model / MANIFEST).is_file():
        raise OptionError(
            f"'{model}' is neither a GGUF file nor a numfit checkpoint; a plain model needs no conversion"
        )
    with cpu_threads(args.threads):
        convert = convert_packed if model.is_dir() else convert_gguf
        convert(model, args.out, args.dtype, progress=not args.quiet)
    print(f"{args.out} is written in {args.dtype}", file=sys.stderr)
    return 0
