"""Quality per bit: numfit's types and algorithms against llama.cpp with an importance matrix, at true bits, in one table.

    python benchmarks/quality.py --calibration CALIB.txt --text VALID.txt [--model smollm2|qwen-0.5b|qwen-1.5b|DIR]
                                 [--only REGEX] [--algorithms]
                                 [--windows 8] [--llama-cpp SITE_PACKAGES] [--work DIR] [--svg FILE] [--markdown FILE]

Each row is a checkpoint: quantized, written, read back, and compared with the original on `--windows` windows of 1024 tokens of
the text: perplexity, KL(original ‖ quantized) over the whole vocabulary, share of equal top tokens. Bits are the bytes of all
that is stored for the linears of the decoder layers, over their weights; embedding, head and norms stay as they are for
everybody. SmolLM2 is taken off the 4-bit grid that its weights come on (`transforms.degrid`): without that, types that
happen to contain the grid would win.

llama.cpp's rows are ggml's own C encoders with the mean squares of the same statistics as importance matrix, decoded by the
package `gguf`, each type used for all linears. K-quants hold rows of multiples of 256 only; where a model's rows are others
(SmolLM2's 576) they are padded with zeros and the *nominal* bits are charged, in llama.cpp's favour.

The gain of a row is the number of bits at which llama.cpp's curve has the same KL (log KL interpolated between its points),
less the row's own bits; beyond the ends of the curve there is none.

Rows are appended to results.jsonl in `--work` as they are finished and not measured again; statistics of the inputs are shared
by all rows there. The text must not be the calibration text.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama as peer
import numpy as np
import torch
from torch import Tensor

from numfit.calibration import load_statistics
from numfit.checkpoint import open_source
from numfit.checkpoint.plain_directory import staged_directory, write_tensors
from numfit.checkpoint.safetensors_file import Slot
from numfit.demo import models
from numfit.evaluation import Reference, evaluate
from numfit.evaluation.reference import release_memory
from numfit.formats import format as named_format
from numfit.pipeline import quantize
from numfit.pipeline.recipe import Parts, choose
from numfit.report import Column, Line, Point, frontier, markdown_table, scatter, text_table

CONTEXT = 1024
GGML = {  # type: its number in enum ggml_type, its nominal bits per weight
    "iq2_s": (22, 2.5625), "q2_K": (10, 2.625), "iq3_xxs": (18, 3.0625), "iq3_s": (21, 3.4375), "iq4_xs": (23, 4.25),
    "q4_K": (12, 4.5), "q5_K": (13, 5.5), "q6_K": (14, 6.5625),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: arguments of `numfit.quantize`, or a type of ggml."""

    name: str
    format: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ggml(self) -> str | None:
        return self.name.removeprefix("llama.cpp ") if self.name.startswith("llama.cpp ") else None


def numfit(fmt: str, recipe: str = "", data: bool = True, **options: Any) -> Row:
    shown = {key: " ".join(value) if isinstance(value, list) else value for key, value in options.items()}
    words = [fmt, recipe if data else "no data", *(f"{key}={value}" for key, value in shown.items())]
    return Row(" ".join(word for word in words if word), fmt, {"recipe": recipe or None, "data": data, **options})


TYPES = ("mant4-g32@e3m3", "mantsv4-g32@e3m3", "uint4-g64", "nf4-g64", "bitmod3-g64", "pot3-g128", "fp4.25", "fp5.33")
SMOLLM2 = [
    numfit("mant4-g32@e3m3", "fast"),  # makes the statistics that the others use
    *(Row(f"llama.cpp {kind}") for kind in GGML),
    # types, each with GPTQ
    *(numfit(fmt, "balanced") for fmt in TYPES),
    *(numfit(f"lm{k}-row+rot", "balanced") for k in (2, 3, 4, 6)),
    numfit("lm5-row+rot", "balanced", rules=["down_proj=lm6-row+rot"]),
    *(numfit(f"{fmt}+rot", "balanced") for fmt in ("trellis2", "trellis3", "trellis3-t8", "trellis4")),
    *(numfit(f"trellis{k}+rot", "balanced", rules=[f"gate_proj|down_proj=trellis{k + 1}+rot"]) for k in (2, 3)),
    # recipes
    numfit("mant4-g32@e3m3", data=False),
    numfit("mant4-g32@e3m3", "quality"),
    numfit("mant4-g32@e3m3+rank8", "balanced"),
    numfit("int4-g128", "fast"),
    numfit("int4-g128", "balanced"),
    numfit("int4-g128", "balanced", transform="awq"),
    numfit("km4-row", "balanced"),
    numfit("any4-g128", "balanced"),
    numfit("int3-g128", "balanced"),
    # whole layers learned: slow
    *(numfit(fmt, "extreme") for fmt in ("int3-g128", "trellis2+rot", "trellis3+rot")),
]  # fmt: skip
QUANTIZED: dict[str, Any] = {"propagate": "quantized"}
ALGORITHMS = [  # one at a time, for the second table
    *(numfit("int4-g128", "balanced", solver=f"gptq+{step}") for step in ("alternate", "descent")),
    *(numfit("int4-g128", "balanced", transform=name) for name in ("smooth", "osplus", "fold")),
    numfit("int4-g128+sparse10", "balanced"),
    numfit("int4-g128", "balanced", **QUANTIZED),
    numfit("int4-g128", "balanced", **QUANTIZED, gptaq=0.25),
    numfit("int4-g128", "balanced", **QUANTIZED, rescomp=0.25),
    numfit("int4-g128", "balanced", **QUANTIZED, retarget=0.5),
    numfit("int4-g128", "balanced", **QUANTIZED, retarget=1.0, hold_out=8),
    numfit("int3-g128", "extreme", span=2),
    numfit("trellis3+rot", "quality"),
    numfit("trellis4+rot", "extreme"),
]
FIVE = (("mant4-g32@e3m3", "balanced"), ("lm4-row+rot", "balanced"), ("fp5.33", "balanced"), ("trellis4+rot", "balanced"),
        ("trellis3+rot", "balanced"))  # fmt: skip
QWEN = [
    numfit("mant4-g32@e3m3", "fast"), *(Row(f"llama.cpp {kind}") for kind in GGML), *(numfit(*row) for row in FIVE),
]  # fmt: skip


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def ggml_round_trip(llama: Any, kind: str, w: Tensor, importance: Tensor) -> Tensor:
    """What a ggml type makes of a weight [N, K], with an importance of each input channel [K]."""
    import gguf

    number, _ = GGML[kind]
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)][0]
    n, k = w.shape
    pad = -k % block
    x = np.ascontiguousarray(torch.nn.functional.pad(w, (0, pad)).numpy())
    h = np.ascontiguousarray(torch.nn.functional.pad(importance, (0, pad), value=float(importance.mean())).float().numpy())
    library = llama._lib
    library.ggml_quantize_init(number)
    library.ggml_row_size.restype, library.ggml_row_size.argtypes = ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)
    row = library.ggml_row_size(number, k + pad)
    out = np.zeros((n, row), dtype=np.uint8)
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
    step = -(-n // torch.get_num_threads())

    def part(first: int) -> int:
        rows = min(step, n - first)
        return int(chunk(number, x.ctypes.data, out.ctypes.data, first * (k + pad), rows, k + pad, h.ctypes.data))

    with ThreadPoolExecutor() as pool:
        written = sum(pool.map(part, range(0, n, step)))
    assert written == out.nbytes
    return torch.from_numpy(gguf.dequantize(out, gguf.GGMLQuantizationType(number)).reshape(n, k + pad)[:, :k].copy())


def ggml_directory(llama: Any, kind: str, model: Path, statistics: Path, out: Path) -> None:
    """A plain model directory with every linear of the decoder layers as a ggml type has it."""
    source = open_source(model)
    importance: dict[str, Tensor] = {}
    for file in sorted(statistics.glob("*.safetensors")):
        importance |= {name: stats.mean_square for (name, _), stats in load_statistics(file).items()}
    names = source.names()

    def read(name: str) -> Tensor:
        weight = source.read(name).float()
        return ggml_round_trip(llama, kind, weight, importance[name]) if name in importance else weight

    with staged_directory(out) as stage:
        for path in source.aux_files():
            shutil.copyfile(path, stage / path.name)
        config = {**source.config(), "dtype": "float32"}
        config.pop("torch_dtype", None)
        (stage / "config.json").write_text(json.dumps(config))
        write_tensors(stage, [Slot(name, "F32", source.info(name).shape) for name in names], read, None)


# -- rows -------------------------------------------------------------------------------------------------------------


def takes_original_inputs(fmt: str, options: dict[str, Any]) -> bool:
    """Whether statistics of the original model serve a row; others gather their own, layer after layer."""
    known = {name.name for name in dataclasses.fields(Parts)}
    _, parts = choose(options["recipe"], {key: value for key, value in options.items() if key in known}, True)
    assert parts is not None
    return parts.settled(named_format(fmt)).propagate != "quantized"


def measure(row: Row, args: argparse.Namespace, model: Path, reference: Reference, llama: Any) -> dict[str, Any]:
    """One line of the table."""
    started = time.monotonic()
    statistics = args.work / "statistics"
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        out = Path(temporary) / "checkpoint"
        notes: list[str] = []
        if row.ggml:
            ggml_directory(llama, row.ggml, model, statistics, out)
            bits = GGML[row.ggml][1]
        else:
            options = dict(row.options)
            if options.pop("data"):
                options = {"windows": 32, "context": 1024, "device": args.device} | options  # the same text on every device
                options |= {"calibration": args.calibration}
                if takes_original_inputs(row.format, options):
                    options["statistics"] = statistics
            made = quantize(model, row.format, out, embedding="keep", progress=not args.quiet, **options)
            bits, notes = made["totals"]["linears"]["bits_per_weight"], made["warnings"]
        minutes = (time.monotonic() - started) / 60
        result = evaluate(
            out, args.text, reference=reference, activations="exact", device=args.device, progress=not args.quiet
        )
        release_memory()
    keys = ("ppl", "kl_mean", "kl_se", "kl_median", "kl_p99", "top1")
    return {"row": row.name, "bits": bits, **{key: result[key] for key in keys}, "minutes": minutes, "notes": notes}


def curve(results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """llama.cpp's points (bits, KL), by bits, those that another point beats in both left out."""
    points = sorted((r["bits"], r["kl_mean"]) for r in results if r["row"].removeprefix("llama.cpp ") in GGML)
    return [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]


def gain(bits: float, kl: float, points: list[tuple[float, float]]) -> float | None:
    """Bits that llama.cpp needs for the same KL, less `bits`; None beyond its points."""
    for (b0, k0), (b1, k1) in pairwise(points):
        if k1 <= kl <= k0:
            share = (math.log(k0) - math.log(kl)) / (math.log(k0) - math.log(k1))
            return b0 + share * (b1 - b0) - bits
    return None


COLUMNS = [
    Column("bits", "bits", ".3f"), Column("row", "type and recipe", align="left"), Column("ppl", "PPL", ".2f"),
    Column("kl_mean", "KL mean", ".4f"), Column("kl_se", "±", ".4f"), Column("kl_median", "median", ".4f"),
    Column("kl_p99", "p99", ".2f"), Column("top1", "top-1 %", lambda v: f"{100 * v:.1f}"),
    Column("gain", "gain, bits", "+.2f"), Column("minutes", "min", ".1f"),
]  # fmt: skip


def with_gains(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = [{**r, "bits": round(r["bits"], 3)} for r in results]  # as shown: rows of one type are of one size
    points = curve(results)
    rows = [{**r, "gain": gain(r["bits"], r["kl_mean"], points)} for r in results]
    return sorted(rows, key=lambda r: (r["bits"], r["kl_mean"]))


def picture(rows: list[dict[str, Any]], title: str) -> str:
    """KL against bits: numfit's rows and their front, llama.cpp's points and curve."""
    ours = [Point(r["bits"], r["kl_mean"], "", "numfit") for r in rows if not r["row"].startswith("llama.cpp ")]
    front = frontier(ours)
    best = {point: r["row"] for r in rows for point in front.points if (r["bits"], r["kl_mean"]) == point}
    ours = [Point(p.x, p.y, best.get((p.x, p.y), ""), "numfit") for p in ours]
    theirs = [
        Point(r["bits"], r["kl_mean"], r["row"].removeprefix("llama.cpp "), "llama.cpp with imatrix")
        for r in rows if r["row"].startswith("llama.cpp ")
    ]  # fmt: skip
    return scatter(
        [*theirs, *ours], title=title, x_label="bits per weight of the linears, everything counted",
        y_label="KL(original ‖ quantized), nats", lines=[front, Line(tuple(curve(rows)))],
    )  # fmt: skip


def rows_of(args: argparse.Namespace) -> tuple[Path, list[Row]]:
    if args.model == "smollm2":
        return models.smollm2_degrid(), SMOLLM2
    if args.model == "qwen-0.5b":
        return models.qwen_half_b_degrid(), QWEN
    if args.model == "qwen-1.5b":
        return models.qwen_1_5b_degrid(), QWEN
    return Path(args.model), QWEN


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), qwen-0.5b, qwen-1.5b, or a directory")
    parser.add_argument("--calibration", required=True, type=Path, metavar="FILE", help="calibration text")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="text to measure on")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="of the text, 1024 tokens each (default 8)")
    parser.add_argument("--only", metavar="REGEX", help="rows whose name matches, and no others")
    parser.add_argument("--row", action="append", default=[], metavar="JSON", help='more rows, as {"fmt": …, "recipe": …}')
    parser.add_argument("--algorithms", action="store_true", help="also what single algorithms do, as a second table")
    parser.add_argument("--llama-cpp", metavar="DIR", help="site-packages that hold llama-cpp-python, if these do not")
    parser.add_argument("--work", type=Path, metavar="DIR", help="results and statistics (default: beside the model)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the front")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--device", metavar="DEVICE", help="where layers run, are learned and are measured (default: the CPU)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    model, rows = rows_of(args)
    rows = rows + [numfit(**json.loads(row)) for row in args.row]
    if args.algorithms:
        rows = rows + ALGORITHMS
    args.work = args.work or model.with_name(f"{model.name}-quality")
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "results.jsonl"
    done = {result["row"] for result in read_results(path)}
    wanted = [row for row in rows if row.name not in done and (not args.only or re.search(args.only, row.name))]
    if wanted:
        llama = peer.api(args.llama_cpp) if any(row.ggml for row in wanted) else None
        with Reference(
            model, args.text, windows=args.windows, context=CONTEXT, device=args.device, directory=args.work / "reference",
            noise_floor=False,
        ) as reference:
            print(f"the original: perplexity {reference.summary['ppl']:.4f}", flush=True)
            for row in wanted:
                result = measure(row, args, model, reference, llama)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                shown = with_gains(list(read_results(path)))
                print(text_table([r for r in shown if r["row"] == row.name], COLUMNS).splitlines()[-1], flush=True)
    shown, single = with_gains(list(read_results(path))), {row.name for row in ALGORITHMS}
    tables = [[row for row in shown if (row["row"] in single) == second] for second in (False, True)]
    print("\n\n".join(text_table(table, COLUMNS) for table in tables if table))
    if args.markdown:
        text = "\n\n".join(markdown_table(table, COLUMNS) for table in tables if table)
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.svg:
        args.svg.write_text(picture(shown, f"Quality per bit, {args.model}") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
