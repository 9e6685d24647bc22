"""`numfit formats`: the one table of numeric types."""

from __future__ import annotations

import argparse
import json
from typing import Any

NAME = "formats"
HELP = "the numeric types, their parts, and their exact bits per weight"
EPILOG = """\
examples:
  numfit formats                          # every base with its default block
  numfit formats mant4-g32@e3m3 fp4.25    # these, with their levels
  numfit formats nf4-g64 --shape 576x1536 # exact bits and bytes of a tensor of that shape
  numfit formats --json | jq '.[].name'
  numfit formats --markdown               # the table of the README

A name reads base[-gN|-row|-tensor][@scale][+rot][+rankR][+sparseP]: -g64 shares a scale among 64 neighbours along the
input dimension, -row among a row, -tensor among all. Scales are stored as @fp16, @bf16, @e8m0, @e4m3 (under one fp32),
@u8 or @e3m3 (8 and 6 bits under one fp16 per row). After a + stand side terms: +rot rotates the input channels (+rot7:
by another seed), +rank16 adds a low-rank term, +sparse5 corrects 5 thousandths of each row's weights one by one. Any
eXmY float and any ams-eXmYkN (N neighbours share the last mantissa bit) exist too, and so do the trellis codes trellis2,
trellis3, trellis4 and trellis2-t8 … trellis4-t8 (smaller states), to be used with +rot: codes of several weights at once.
kmN and anyN learn 2**N levels for each row; they have no CPU kernel, so PyTorch decodes them.
Bits count everything that is stored: codes, members, scales, parents, zero points, palettes, learned levels, side terms.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="FORMAT", help="show these formats in detail (default: a table of all)")
    parser.add_argument("--shape", default="4096x4096", metavar="NxK", help="shape for the bits (default 4096x4096)")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of objects")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> int:
    from numfit.errors import OptionError
    from numfit.formats import bases, format
    from numfit.report import Column, markdown_table, text_table

    try:
        shape = tuple(int(n) for n in args.shape.lower().split("x"))
        if not shape or min(shape) < 1:
            raise ValueError
    except ValueError:
        raise OptionError(f"--shape takes sizes such as 4096x4096, not '{args.shape}'") from None
    about = {base.name: base.about for base in bases().values()}
    rows = [_row(format(name), about.get(name, ""), shape) for name in args.names or about]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    columns = [
        Column("name", "name", align="left"),
        Column("members", "members"),
        Column("unit", "unit"),
        Column("block", "block"),
        Column("scale", "scale", align="left"),
        Column("bits", "bits", ".4f"),
        Column("about", "", align="left"),
    ]
    print(markdown_table(rows, columns) if args.markdown else text_table(rows, columns))
    for row in rows if args.names else ():
        print(f"\n{row['name']}: {row['bytes']:,} bytes for {'x'.join(map(str, shape))}")
        for member in row["description"]["members"]:
            levels = " ".join(f"{v:.6g}" if isinstance(v, float) else v for v in member["levels"])
            print(f"  {member['name']}: {levels}")
    return 0


def _row(fmt: Any, about: str, shape: tuple[int, ...]) -> dict[str, Any]:
    scale = f"{fmt.scale.store} under {'fp32' if fmt.scale.parent == 'tensor' else 'fp16'} per {fmt.scale.parent}"
    unit = "row" if fmt.learned else "–" if fmt.member_count == 1 else fmt.block if fmt.unit == "block" else fmt.unit
    members = f"{fmt.palette} of {len(fmt.members)}" if fmt.palette else str(fmt.member_count)
    return {
        "name": fmt.name,
        "about": about,
        "members": "learned" if fmt.learned else members,
        "unit": str(unit),
        "block": str(fmt.block),
        "scale": "–" if not fmt.scaled else scale if fmt.scale.parent else fmt.scale.store,
        "zero": fmt.zero,
        "bits": fmt.bits_per_weight(shape),
        "bytes": fmt.nbytes(shape),
        "description": fmt.to_json(),
    }
