"""The `numfit` command: one verb a file, this one only hands over and turns errors into sentences."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from numfit import __version__
from numfit.errors import NumfitError

VERBS = ("formats", "plan", "quantize", "eval", "inspect", "run", "convert", "demo")

EPILOG = """\
the usual way through:
  numfit formats                                    # which numeric types there are, and what they cost
  numfit plan my-model -f mant4-g32@e3m3            # what would happen, how large, how long
  numfit quantize my-model -f mant4-g32@e3m3 -o my-model-mant4
  numfit eval my-model-mant4 --text valid.txt --reference my-model
  numfit run my-model-mant4 --prompt "The planet Mars is"

MODEL is a Hugging Face directory, a GGUF file, or a hub name. 'numfit VERB --help' teaches each verb by example.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports every verb but nothing heavy."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="numfit",
        description="Fit the number type to the numbers: low-bit numeric types for language models.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"numfit {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = import_module(f"numfit.cli.{name}")
        sub = verbs.add_parser(
            verb.NAME, help=verb.HELP, description=verb.HELP, epilog=verb.EPILOG, formatter_class=raw, allow_abbrev=False
        )
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 where a check failed; 2 for an error that a sentence on stderr explains; 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return int(code)
    except NumfitError as error:
        print(f"numfit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("numfit: interrupted; what was written stays, and the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (`numfit formats | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
