"""Tokens a second of whole models: numfit's native decoder against llama.cpp, taking turns in one process.

    python benchmarks/decode.py [--model smollm2|qwen-1.5b|DIR] [--gguf FILE] [--format mant4-g64,…] [--threads 1,2]
                                [--rounds 5] [--types Q4_0,…] [--transformers] [--json FILE] [--llama-cpp SITE_PACKAGES]
                                [--cache DIR]

The first run fetches the model and makes what is compared, in --cache: a numfit checkpoint of each format (int8 embedding and
head, as always), and GGUF files: Q4_0 or other --types, made by llama.cpp from the packaged file, and the packaged Q4_K_M if
there is one.
A directory of your own is compared with Q4_0 made from --gguf, or without it with nothing but the roof.
benchmarks/peers.py says how to build llama-cpp-python so that it is a fair peer.

Three figures for each number of threads: decoding 64 tokens after a prompt of 32, the same after 512, and reading a prompt of
512. The prompt is the same numbers for all, the choice is greedy, logits are of the last token alone. llama.cpp is tried in
each of its layouts of weights (benchmarks/llama.py) with and without flash attention; what is far from its best in every
figure leaves after the first round, and of the others the best one of each figure counts. A ratio is the median over rounds of
the ratio within a round. The roof is a plain read stream of as many bytes as a token reads weights, in the same rounds.
`--transformers` adds numfit's kernels under transformers' own code, without the native decoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama as peer
import torch

import numfit
from numfit import native
from numfit.demo import models, packages
from numfit.runtime import packed_bytes
from numfit.runtime.native_decoder import build
from numfit.threads import cpu_threads

NEW, SHORT, LONG = 64, 32, 512
DECODE, DECODE_LONG, PREFILL = FIGURES = ("decode", "decode after 512", "prefill 512")
NEAR = 1.3  # what takes longer than so many times the best one, in every figure, is not measured further
BARS = {  # (model, figure, peer): must, goal
    ("smollm2", DECODE, "Q4_0"): (0.7, 1.2), ("smollm2", PREFILL, "Q4_0"): (1.0, 2.0),
    ("qwen-1.5b", DECODE, "Q4_0"): (1.0, 1.3), ("qwen-1.5b", PREFILL, "Q4_0"): (1.0, 2.0),
    ("qwen-1.5b", DECODE, "Q4_K_M"): (1.0, 1.3), ("qwen-1.5b", PREFILL, "Q4_K_M"): (1.0, 2.0),
}  # fmt: skip

Seconds = dict[str, float]  # by figure, a token


def prepare(args: argparse.Namespace, llama: Any) -> tuple[dict[str, Path], dict[str, Path]]:
    """Numfit checkpoints by format and GGUF files by type, made where they are not there yet."""
    args.cache.mkdir(parents=True, exist_ok=True)
    name, files = Path(args.model).name, {}
    if args.model in ("smollm2", "qwen-1.5b"):
        small = args.model == "smollm2"
        source = models.smollm2_degrid() if small else models.qwen_1_5b()
        gguf = packages.fetch(packages.SMOLLM2 if small else packages.QWEN_1_5B)
        files = {} if small else {"Q4_K_M": gguf}
    else:
        source, gguf = Path(args.model), args.gguf
    if gguf:
        for kind in args.types.split(","):
            made = args.cache / f"{name}.{kind}.gguf"
            files |= {} if kind in files else {kind: peer.quantize(llama, gguf, made, kind, torch.get_num_threads())}
    if (source / "numfit.json").is_file():
        return {name: source}, files
    ours = {fmt: args.cache / f"{name}-{fmt}" for fmt in args.format.split(",")}
    for fmt, directory in ours.items():
        if not (directory / "numfit.json").is_file():
            rule = None if numfit.format(fmt).trellis else "absmax"  # the scales' values do not change the speed
            numfit.quantize(source, fmt, directory, scale_rule=rule)
    return ours, files


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def of_decoder(decoder: Any, tokens: list[int]) -> Seconds:
    def decode(start: int) -> None:
        token = tokens[start]
        for at in range(start, start + NEW):
            token = int(decoder.forward([token], at).numpy().argmax())

    out = {}
    for figure, start in ((DECODE, SHORT), (DECODE_LONG, LONG)):
        out[PREFILL] = timed(lambda start=start: decoder.forward(tokens[:start], 0)) / start
        out[figure] = timed(lambda start=start: decode(start)) / NEW
    return out


def of_transformers(model: Any, tokens: list[int], threads: int) -> Seconds:
    from transformers import DynamicCache

    def feed(ids: list[int], cache: Any) -> int:
        return int(model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())

    def decode(token: int, cache: Any) -> None:
        for _ in range(NEW):
            token = feed([token], cache)

    out = {}
    with cpu_threads(threads), torch.inference_mode():
        for figure, start in ((DECODE, SHORT), (DECODE_LONG, LONG)):
            cache = DynamicCache(config=model.config)
            out[PREFILL] = timed(lambda start=start, cache=cache: feed(tokens[:start], cache)) / start
            out[figure] = timed(lambda start=start, cache=cache: decode(tokens[start], cache)) / NEW
    return out


def of_llama(context: peer.Context, tokens: list[int]) -> Seconds:
    out = {}
    with context.turn():
        for figure, start in ((DECODE, SHORT), (DECODE_LONG, LONG)):
            context.clear()
            out[PREFILL] = timed(lambda start=start: context.feed(tokens[:start])) / start
            out[figure] = timed(lambda start=start: context.decode(tokens[start], NEW)) / NEW
    return out


def near_the_best(times: dict[str, Seconds]) -> set[str]:
    best = {f: min(t[f] for t in times.values()) for f in FIGURES}
    return {name for name, t in times.items() if any(t[f] <= NEAR * best[f] for f in FIGURES)}


class Roof:
    """A plain read of so many bytes, from huge pages, by as many threads as the kernels have."""

    def __init__(self, nbytes: int) -> None:
        library = native.library()
        assert library is not None
        self.library, self.nbytes = library, nbytes // 256 * 256
        self.arena = library.nf_arena(self.nbytes)

    def seconds(self) -> float:
        return statistics.median(timed(lambda: self.library.nf_read_stream(self.arena, self.nbytes)) for _ in range(5))

    def close(self) -> None:
        self.library.nf_arena_free(self.arena)


def run(args: argparse.Namespace, llama: Any, threads: int) -> dict[str, Any]:
    ours, files = prepare(args, llama)  # with all threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    takers: dict[str, Callable[[list[int]], Seconds]] = {}
    memory, roofs, weights, contexts = {}, {}, [], {}
    for fmt, directory in ours.items():
        model, _ = numfit.load(directory)
        decoder, reason = build(model)
        if decoder is None:
            raise SystemExit(f"numfit has no native decoder for this model: {reason}")
        vocabulary, memory[fmt] = decoder.vocabulary, packed_bytes(model)
        roofs[fmt] = Roof(memory[fmt])
        takers[fmt] = lambda tokens, decoder=decoder: of_decoder(decoder, tokens)
        if args.transformers:
            takers[f"{fmt} in transformers"] = lambda tokens, model=model: of_transformers(model, tokens, threads)
    for kind, file in files.items():
        # a file of mixed types crashes in a layout that one of them does not have: there llama.cpp chooses by itself
        choices = peer.layouts(llama)
        for layout, handle in choices.items() if kind == "Q4_0" else [("auto", choices["auto"])]:
            weights.append(peer.Weights(llama, file, handle))
            for flash, how in ((-1, "flash"), (0, "no flash")):
                contexts[f"{kind} {layout}, {how}"] = peer.Context(weights[-1], threads, 1024, flash)
    # ggml configures AMX's tiles once in each thread and relies on it for ever, while others configure and clear them for
    # themselves: it calls from a thread of its own
    home = ThreadPoolExecutor(1)
    takers |= {name: lambda tokens, one=one: home.submit(of_llama, one, tokens).result() for name, one in contexts.items()}
    torch.set_num_threads(1)  # its idle threads would spin; the decoder sets the number of the kernels itself
    tokens = torch.randint(100, vocabulary - 100, (LONG + 1,), generator=torch.Generator().manual_seed(1)).tolist()

    first = {name: take(tokens) for name, take in takers.items()}  # warms up, and shows who need not go on
    stay = {name for kind in files for name in near_the_best({n: t for n, t in first.items() if n.startswith(f"{kind} ")})}
    takers = {name: take for name, take in takers.items() if name not in contexts or name in stay}
    rounds, reads = [], []
    for _ in range(args.rounds):
        rounds.append({name: take(tokens) for name, take in takers.items()})
        native.set_threads(threads)
        reads.append({fmt: roof.seconds() for fmt, roof in roofs.items()})
    for closing in (*contexts.values(), *weights, *roofs.values()):
        closing.close()
    torch.set_num_threads(before)

    speeds = {name: {f: statistics.median(1 / r[name][f] for r in rounds) for f in FIGURES} for name in takers}
    sizes = {fmt: sum(f.stat().st_size for f in ours[fmt].glob("*.safetensors")) for fmt in ours}
    sizes |= {kind: file.stat().st_size for kind, file in files.items()}
    of_roof = {fmt: statistics.median(read[fmt] / r[fmt][DECODE] for r, read in zip(rounds, reads)) for fmt in ours}
    ratios = []
    for fmt in ours:
        for kind in files:
            for figure in FIGURES:
                best = max((n for n in stay if n.startswith(f"{kind} ")), key=lambda name: speeds[name][figure])
                ratio = statistics.median(r[best][figure] / r[fmt][figure] for r in rounds)
                ratios.append({"format": fmt, "figure": figure, "peer": kind, "peer_setting": best, "ratio": ratio})
    read = {fmt: memory[fmt] / statistics.median(r[fmt] for r in reads) / 1e9 for fmt in ours}
    result = {"threads": threads, "bytes": sizes, "memory": memory, "tokens_per_second": speeds, "ratios": ratios,
              "first_round_seconds": first, "of_roof": of_roof, "roof_gb_per_second": read, "rounds": rounds}  # fmt: skip
    show(args, result)
    return result


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    print(f"\n{args.model}, {result['threads']} thread(s), {args.rounds} rounds; tokens a second, medians; MB of weight files")
    print(f"  {'':34} {'MB':>8} " + " ".join(f"{figure:>17}" for figure in FIGURES) + f" {'decode ÷ roof':>14}")
    for name, speed in result["tokens_per_second"].items():
        ours = name.split(" in ")[0] in result["memory"]
        size = result["bytes"][name.split()[0]] / 1e6
        roof = f"{result['of_roof'][name]:14.2f}" if name in result["of_roof"] else ""
        label = ("numfit " if ours else "llama.cpp ") + name
        print(f"  {label:34} {size:8.1f} " + " ".join(f"{speed[f]:17.1f}" for f in FIGURES) + f" {roof}")
    for fmt, size in result["memory"].items():
        roof = f"{result['roof_gb_per_second'][fmt]:.1f} GB/s"
        print(f"  {fmt}: {size / 1e6:.1f} MB in memory, all read for a token; roof {roof}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen-1.5b, or a directory, plain or packed")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp, if --model is a directory")
    parser.add_argument("--format", default="mant4-g64", help="formats, separated by commas (default mant4-g64)")
    parser.add_argument("--types", default="Q4_0", metavar="TYPES", help="GGUF types that llama.cpp makes (default Q4_0)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, separated by commas (default 1,2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action="store_true", help="also without the native decoder")
    parser.add_argument("--llama-cpp", metavar="DIR", help="site-packages that hold llama-cpp-python, if these do not")
    parser.add_argument("--cache", type=Path, default=packages.cache_directory() / "benchmark", metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    llama = peer.api(args.llama_cpp)
    results = [run(args, llama, int(count)) for count in args.threads.split(",")]
    print(f"\n{'speed of numfit / llama.cpp at its best':72} {'threads':>7} {'must':>6} {'goal':>6} {'reached':>8}")
    for result in results:
        for row in result["ratios"]:
            must, goal = BARS.get((args.model, row["figure"], row["peer"]), ("", ""))
            what = f"{row['figure']}: {row['format']} / {row['peer_setting']}"
            print(f"{what:72} {result['threads']:7} {must:>6} {goal:>6} {row['ratio']:8.2f}")
    if args.json:
        content = {"model": args.model, "isa": native.isa(), "torch": torch.__version__, "runs": results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
