"""How fast packed matrices are applied, as ratios to the memory they read and to other people's kernels, all in one run.

    python benchmarks/kernels.py [--quick] [--only gemv,gemm] [--threads N] [--rotate MB] [--rounds N] [--json FILE]

Parts: `roof` (a plain read stream over sets of growing size), `gemv` (4096×14336, one token, 1 thread), `cache` (256×4096,
one token, 1 thread, weights that stay in the cache: what arithmetic alone takes), `gemm` (4096×4096, 512 tokens, 2 threads),
`fit` (4096×4096, 1 thread), `call` (what Python adds to a call). The last table sets what was reached beside what must be and
what is wished for.

How it measures. Everything of a part takes turns in one process: in each round, in an order drawn anew, each contestant is
called once untimed and then `TURN` times, each call on the next of its copies, which together fill `--rotate` megabytes;
before each turn the benchmark waits until no thread of the process runs, since others' pools spin. A ratio is the median over
rounds of the ratio of two contestants' medians in the round: both saw the same minute of a shared machine. Absolute times of
such a machine mean little; `p10`, the tenth percentile of all calls, is what it does when it is left alone.

The roof of a format is `nf_read_stream` over as many bytes as its kernel reads (`nf_linear_bytes`), from huge pages, with as
many threads, rotating like the rest. Virtual machines keep an unknown share of a last-level cache of hundreds of megabytes:
the part `roof` shows where the speed falls to that of memory, `--rotate` chooses a set beyond it. Ratios between formats and
peers "per call" include what a call does besides reading: quantizing the activations above all.

Peers: benchmarks/peers.py, where it says how they are built. Those that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peers
import torch
from peers import Absent, Peer
from torch import Tensor

import numfit
from numfit import native
from numfit.formats import encode, fit, format, pack
from numfit.kernels.packed import PackedLinear

TURN = 5  # timed calls of a contestant in a round
FORMATS = ("int4-g64", "nf4-g64", "mant4-g64", "mant4-g32@e3m3", "fp4.25", "fp5.33", "pot3-g64", "pot2-g64")
GGML = ("Q4_0", "Q4_K", "IQ4_NL", "Q3_K", "Q2_K", "Q8_0", "BF16")
PARTS = ("roof", "gemv", "cache", "gemm", "fit", "call")


@dataclass(frozen=True)
class Options:
    threads: int | None
    rotate: int  # bytes
    rounds: int
    quick: bool


@dataclass(frozen=True)
class Timing:
    """Seconds of every timed call of a contestant, by round."""

    peer: Peer
    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> list[float]:
        return sorted(t for one in self.rounds for t in one)

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def p10(self) -> float:
        return self.calls[len(self.calls) // 10]

    def over(self, other: Timing) -> float:
        """How many times as long as the other a call takes: the median over rounds."""
        pairs = zip(self.rounds, other.rounds)
        return statistics.median(statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs)


@dataclass(frozen=True)
class Goal:
    """A row of the last table; `most` says that less is better."""

    what: str
    must: float
    wish: float
    reached: float
    most: bool = False

    def verdict(self) -> str:
        good = [self.reached <= bar if self.most else self.reached >= bar for bar in (self.must, self.wish)]
        return "goal" if good[1] else "must" if good[0] else "MISSED"


def settle(limit: float = 0.2) -> None:
    """Wait until the threads of this process stand still, `limit` seconds at most."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0002:
            return


def contest(contestants: list[Peer], rounds: int) -> dict[str, Timing]:
    """Let them take turns; name → timing.

    Raises:
        RuntimeError: one no longer computes what it did at the start, disturbed by another.
    """
    position = {p.name: 0 for p in contestants}
    assert len(position) == len(contestants), "two contestants of one name"
    taken: dict[str, list[tuple[float, ...]]] = {p.name: [] for p in contestants}
    products = {p.name: p.product() for p in contestants}

    def turn(peer: Peer) -> tuple[float, ...]:
        times = []
        for _ in range(TURN + 1):
            i = position[peer.name]
            position[peer.name] = (i + 1) % peer.copies
            start = time.perf_counter()
            peer.call(i)
            times.append(time.perf_counter() - start)
        peer.park()
        return tuple(times[1:])

    for number in range(rounds):
        for peer in random.Random(number).sample(contestants, len(contestants)):
            settle()
            taken[peer.name].append(peer.there(lambda peer=peer: turn(peer)))
    for peer in contestants:
        if not torch.equal(peer.product(), products[peer.name]):
            raise RuntimeError(f"{peer.name} does not compute what it did before the others ran")
    return {p.name: Timing(p, tuple(taken[p.name])) for p in contestants}


# contestants -----------------------------------------------------------------------------------------------------------


def ours(name: str, w: Tensor, x: Tensor, rotate: int) -> Peer:
    """A format's kernel on int8 activations, called as directly as Python can."""
    quantized = numfit.quantize_tensor(w, name, scale_rule="absmax")
    first = PackedLinear.pack(quantized)
    copies = peers.copies_of(first.nbytes, rotate)
    packed = [first, *(PackedLinear.pack(quantized) for _ in range(copies - 1))]
    (n, k), m = w.shape, x.shape[0]
    y, error = torch.empty(m, n), ctypes.create_string_buffer(native.ERROR_BYTES)
    apply, handles = native.library().nf_apply, [p.handle for p in packed]
    source, target = x.data_ptr(), y.data_ptr()

    def call(i: int, keep: object = (packed, x)) -> None:
        if apply(handles[i], source, m, k, target, n, None, 0, error):
            raise RuntimeError(error.value.decode())

    peer = Peer(name, first.nbytes, copies, call, lambda: y, note=first.kernel)
    return replace(peers.checked(peer, x, w, quantized.dequantize()), stored=quantized.nbytes)


class Arena:
    """Memory to be read: in huge pages, as the kernels' own, or in ordinary ones, as everybody else's."""

    def __init__(self, size: int, huge: bool = True) -> None:
        self.size, self.huge, self.position = size, huge, 0
        if huge:
            self.address = native.library().nf_arena(size)
            ctypes.memset(self.address, 1, size)
        else:
            self.memory = torch.ones(size + 64, dtype=torch.uint8)
            self.address = -(-self.memory.data_ptr() // 64) * 64

    def __del__(self) -> None:
        if self.huge:
            native.library().nf_arena_free(self.address)

    def stream(self, name: str, size: int) -> Peer:
        """A read of the next `size` bytes; streams on one arena go on where the last one stopped."""
        size = min(size, self.size)
        read = native.library().nf_read_stream

        def call(i: int) -> None:
            if self.position + size > self.size:
                self.position = 0
            read(self.address + self.position, size)
            self.position += -(-size // 4096) * 4096

        return Peer(name, size, 1, call, lambda: torch.empty(0))


def others(w: Tensor, x: Tensor, threads: int, rotate: int, kinds: tuple[str, ...], rounds: int) -> list[Peer]:
    """All peers that can run here, ggml's types each in their fastest buffer, and in the fastest without AMX too."""
    found: list[Peer] = []
    try:
        ggml = peers.Ggml(threads)
        for kind in kinds:
            found += fastest(peers.ggml_candidates(ggml, w, x, kind, rotate), rounds)
    except Absent as reason:
        print(f"left out: ggml ({reason})")
    for make in (peers.torch_bf16, peers.torch_int4, peers.onnx_matmul, peers.bitsandbytes_nf4):
        try:
            found.append(make(w, x, rotate) if make is not peers.onnx_matmul else peers.onnx_matmul(w, x, rotate, threads))
        except Absent as reason:
            print(f"left out: {make.__name__} ({reason})")
    return found


def fastest(candidates: list[Peer], rounds: int) -> list[Peer]:
    """The candidate of the least tenth percentile; where that one uses AMX, the best of the others as well."""
    timings = contest([replace(c, name=c.note) for c in candidates], rounds)
    order = sorted(candidates, key=lambda c: timings[c.note].p10)
    print(f"{order[0].name:12} " + ", ".join(f"{c.note} {timings[c.note].p10 * 1e3:.2f} ms" for c in order))
    second = [replace(c, name=f"{c.name} without AMX") for c in order[1:] if order[0].note == "AMX"]
    return [order[0], *second[:1]]


def matrices(n: int, k: int, m: int) -> tuple[Tensor, Tensor]:
    """Weights [n, k] and activations [m, k]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator) * 0.02, torch.randn(m, k, generator=generator)


def use_threads(count: int) -> None:
    torch.set_num_threads(count)
    native.set_threads(count)


# parts -----------------------------------------------------------------------------------------------------------------


def part_roof(options: Options) -> tuple[list[dict[str, Any]], list[Goal]]:
    """GB/s of the read stream by the size of the set that it goes round in."""
    rows = []
    most = options.threads or 2
    print(f"\nread stream, GB/s (median of rounds): set in MB, huge and ordinary pages, 1 and {most} threads")
    for megabytes in (1, 4, 32, 128, 512) if options.quick else (1, 4, 32, 128, 512, 2048):
        row: dict[str, Any] = {"set_mb": megabytes}
        for huge in (True, False):
            arena = Arena(megabytes << 20, huge)
            stream = arena.stream("stream", 32 << 20)
            for threads in (1, most):
                use_threads(threads)
                for _ in range(-(-arena.size // stream.bytes)):
                    stream.call(0)
                timing = contest([stream], options.rounds)["stream"]
                row[f"{'huge' if huge else 'ordinary'}_{threads}"] = stream.bytes / timing.median / 1e9
            del arena, stream
        rows.append(row)
        print("  ".join(f"{key} {value:7.1f}" if key != "set_mb" else f"{value:5} MB" for key, value in row.items()))
    return rows, []


def part_gemv(options: Options) -> tuple[list[dict[str, Any]], list[Goal]]:
    """One token: bound by memory, or it should be."""
    threads = options.threads or 1
    use_threads(threads)
    n, k = (1024, 4096) if options.quick else (4096, 14336)
    w, x = matrices(n, k, 1)
    print(f"\none token × {n}×{k}, {threads} thread(s), copies of {options.rotate >> 20} MB in turn")
    rivals = others(w, x, threads, options.rotate, GGML, min(options.rounds, 4))
    own = [ours(name, w, x, options.rotate) for name in FORMATS]
    arena = Arena(options.rotate)
    streams = [arena.stream(f"roof of {p.name}", p.bytes) for p in own] + [arena.stream("bf16 read stream", n * k * 2)]
    t = contest([*own, *rivals, *streams], options.rounds)
    show(t, [p.name for p in [*own, *rivals]], "us", 1e6)
    rows = [row(t, p) for p in [*own, *rivals, *streams]]

    def roof(name: str) -> float:
        return t[f"roof of {name}"].over(t[name])

    goals = [Goal(f"{f} ÷ roof of its bytes", 0.80, 0.92, roof(f)) for f in ("int4-g64", "nf4-g64", "mant4-g64", "fp4.25")]
    goals += [Goal(f"{f} ÷ roof of its bytes", 0.72, 0.88, roof(f)) for f in ("fp5.33", "pot3-g64")]
    goals += [Goal("pot2-g64 ÷ roof of its bytes", 0.65, 0.85, roof("pot2-g64"))]
    for mine, theirs, must, wish in (
        ("mant4-g64", "ggml Q4_0", 1.35, 1.6), ("fp4.25", "ggml Q4_0", 1.35, 1.6), ("pot3-g64", "ggml Q3_K", 2, 2.5),
        ("pot2-g64", "ggml Q2_K", 1.8, 2.3), ("fp4.25", "torch bf16 linear", 7, 9), ("fp5.33", "torch bf16 linear", 5, 6),
        ("fp4.25", "bf16 read stream", 3.2, 3.5), ("fp5.33", "bf16 read stream", 2.3, 2.8),
    ):  # fmt: skip
        if theirs in t:
            goals.append(Goal(f"{mine} against {theirs}", must, wish, t[theirs].over(t[mine])))
    plain, two_level = t["mant4-g64"], t["mant4-g32@e3m3"]
    per_byte = plain.over(two_level) * two_level.peer.stored / plain.peer.stored
    return rows, [*goals, Goal("mant4-g32@e3m3 against mant4-g64, per stored byte", 0.9, 1.0, per_byte)]


def part_cache(options: Options) -> tuple[list[dict[str, Any]], list[Goal]]:
    """One token and a matrix that stays in the second-level cache: arithmetic alone, with int8 and with exact activations."""
    use_threads(1)
    n, k = 256, 4096
    w, x = matrices(n, k, 1)
    y, error = torch.empty(1, n), ctypes.create_string_buffer(native.ERROR_BYTES)
    apply, stream = native.library().nf_apply, Arena(64 << 20).stream("memory", 64 << 20)
    memory = stream.bytes / min(timed(lambda: stream.call(0)) for _ in range(7))
    print(f"\none token × {n}×{k}, 1 thread: ns for 1024 weights (tenth percentile); memory reads {memory / 1e9:.1f} GB/s")
    print(f"{'':16}{'int8':>8}{'exact':>8}{'exact/int8':>12}{'memory':>8}")
    rows = []
    for name in FORMATS:
        packed = PackedLinear.pack(numfit.quantize_tensor(w, name, scale_rule="absmax"))
        times = []
        for mode in (0, 1):
            arguments = (packed.handle, x.data_ptr(), 1, k, y.data_ptr(), n, None, mode, error)
            calls = sorted(timed(lambda arguments=arguments: apply(*arguments)) for _ in range(50 if options.quick else 500))
            times.append(calls[len(calls) // 10] * 1e9 * 1024 / (n * k))
        bound = packed.nbytes / memory * 1e9 * 1024 / (n * k)
        rows.append({"format": name, "int8_ns": times[0], "exact_ns": times[1], "memory_ns": bound})
        print(f"{name:16}{times[0]:8.1f}{times[1]:8.1f}{times[1] / times[0]:12.1f}{bound:8.1f}")
    return rows, []


def part_gemm(options: Options) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Many tokens: bound by arithmetic. Weights rotate over less, since that matters little here."""
    threads = options.threads or 2
    use_threads(threads)
    n, k, m = (1024, 1024, 128) if options.quick else (4096, 4096, 512)
    w, x = matrices(n, k, m)
    rotate = min(options.rotate, 64 << 20)
    print(f"\n{m} tokens × {n}×{k}, {threads} thread(s), copies of {rotate >> 20} MB in turn")
    rivals = others(w, x, threads, rotate, ("Q4_0", "Q4_K", "Q8_0", "BF16"), 1)
    own = [ours(name, w, x, rotate) for name in FORMATS]
    t = contest([*own, *rivals], options.rounds)
    show(t, list(t), "ms", 1e3, 2 * n * k * m)
    goals = []
    for name in ("int4-g64", "nf4-g64", "fp4.25"):
        for theirs, must, wish in (("ggml Q4_0", 2.3, 2.7), ("torch bf16 linear", 1.5, 2.0)):
            if theirs in t:
                goals.append(Goal(f"{name}, {m} tokens, against {theirs}", must, wish, t[theirs].over(t[name])))
    if "ggml Q4_0" in t:
        goals.append(Goal(f"mant4-g64, {m} tokens, against ggml Q4_0", 1.3, 1.5, t["ggml Q4_0"].over(t["mant4-g64"])))
    return [row(t, p) for p in [*own, *rivals]], goals


def part_fit(options: Options) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Seconds to find scales and members, and to have the planes of a file."""
    use_threads(options.threads or 1)
    size = 1024 if options.quick else 4096
    w, _ = matrices(size, size, 1)
    rows, goals = [], []
    print(f"\nfit {size}×{size}, rule absmax, {options.threads or 1} thread(s): seconds, median of {options.rounds}")
    for name, must, wish in (("mant4-g64", 0.25, 0.1), ("fp4.25", 0.05, 0.015), ("fp5.33", 0.05, 0.015)):
        fmt = format(name)

        def whole(fmt: Any = fmt) -> None:
            params = fit(fmt, w, None, "absmax")
            pack(fmt, tuple(w.shape), encode(fmt, w, params), params)

        whole()
        fits, wholes = [], []
        for _ in range(options.rounds):
            fits.append(timed(lambda fmt=fmt: fit(fmt, w, None, "absmax")))
            wholes.append(timed(whole))
        rows.append(
            {"format": name, "fit_s": statistics.median(fits), "whole_s": statistics.median(wholes), "least_s": min(fits)}
        )
        print(f"{name:12} fit {rows[-1]['fit_s']:.4f} (least {min(fits):.4f}), fit + encode + pack {rows[-1]['whole_s']:.4f}")
        scale = (4096 / size) ** 2
        goals.append(Goal(f"fit of {name}, 4096×4096, seconds", must, wish, statistics.median(fits) * scale, most=True))
    return rows, goals


def part_call(options: Options) -> tuple[list[dict[str, Any]], list[Goal]]:
    """What Python adds: the least matrix, applied directly, through `PackedLinear.apply`, and torch's own linear layer."""
    use_threads(1)
    w, x = matrices(64, 64, 1)
    direct = ours("nf4-g64", w, x, 1)
    layer = PackedLinear.pack(numfit.quantize_tensor(w, "nf4-g64", scale_rule="absmax"))
    works: dict[str, Callable[[], object]] = {
        "nf_apply through ctypes": lambda: direct.call(0),
        "PackedLinear.apply": lambda: layer.apply(x, activations="int8"),
        "torch F.linear": lambda: torch.nn.functional.linear(x, w),
    }
    rows = []
    print("\na call on a 64×64 matrix, µs (median)")
    for name, work in works.items():
        rows.append({"what": name, "us": statistics.median(timed(work) for _ in range(5000)) * 1e6})
        print(f"{name:26} {rows[-1]['us']:6.2f}")
    return rows, []


# output ----------------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row(t: dict[str, Timing], peer: Peer) -> dict[str, Any]:
    one = t[peer.name]
    about = {key: getattr(peer, key) for key in ("name", "bytes", "stored", "copies", "note", "error", "loss")}
    return {**about, "median_s": one.median, "p10_s": one.p10, "rounds_s": one.rounds}


def show(t: dict[str, Timing], names: list[str], unit: str, factor: float, operations: int = 0) -> None:
    """A line for each contestant; "×" is how many times as fast it is as the peer named there."""
    against = [name for name in ("ggml Q4_0", "ggml Q4_0 without AMX", "torch bf16 linear") if name in t]
    speed = "GOP/s" if operations else "GB/s"
    head = "".join(f"{'× ' + name:>24}" for name in against)
    print(f"{'':28}{unit:>9}{'p10':>9}{speed:>8}{'MB':>8}{'÷ roof':>8}{head}   error   loss  how")
    for name in names:
        one, roof = t[name], t.get(f"roof of {name}")
        rate = (operations or one.peer.bytes) / one.median / 1e9
        share = f"{roof.over(one):8.2f}" if roof else " " * 8
        times = "".join(f"{t[other].over(one):24.2f}" for other in against)
        print(
            f"{name:28}{one.median * factor:9.1f}{one.p10 * factor:9.1f}{rate:8.1f}{one.peer.bytes / 1e6:8.2f}{share}{times}"
            f"  {one.peer.error:.1e} {one.peer.loss:.3f}  {one.peer.note}"
        )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument("--threads", type=int, help="for every part, in place of its own number")
    parser.add_argument("--rotate", type=int, metavar="MB", help="over which copies of a matrix rotate (512; 64 with --quick)")
    parser.add_argument("--rounds", type=int, help=f"rounds of {TURN} calls (12; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small matrices: whether it runs, not how fast")
    parser.add_argument("--library", metavar="FILE", help="a build of the library under test, in place of the package's own")
    parser.add_argument("--isa", help="an instruction set, in place of the best")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only does not know {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if args.library:
        native.load(args.library)
    if native.library() is None:
        parser.error("numfit's CPU kernels are not in this installation, so there is nothing to measure")
    if args.isa:
        native.set_isa(args.isa)
    rotate = (args.rotate or (64 if args.quick else 512)) << 20
    options = Options(args.threads, rotate, args.rounds or (3 if args.quick else 12), args.quick)
    print(f"{processor()}, kernels for {native.isa()}, torch {torch.__version__}, {options.rounds} rounds of {TURN} calls")
    results: dict[str, Any] = {"processor": processor(), "isa": native.isa(), "torch": torch.__version__, "turn": TURN,
                               "threads": args.threads, "rotate": rotate, "quick": args.quick, "parts": {}}  # fmt: skip
    goals: list[Goal] = []
    parts = {"roof": part_roof, "gemv": part_gemv, "cache": part_cache, "gemm": part_gemm, "fit": part_fit, "call": part_call}
    for name, part in parts.items():
        if name in chosen:
            results["parts"][name], reached = part(options)
            goals += reached
    print(f"\n{'what':56} {'must':>7} {'goal':>7} {'reached':>8}")
    for goal in goals:
        bound = "≤" if goal.most else "≥"
        print(f"{goal.what:56} {bound}{goal.must:6.3g} {bound}{goal.wish:6.3g} {goal.reached:8.3g}  {goal.verdict()}")
    results["goals"] = [{**goal.__dict__, "verdict": goal.verdict()} for goal in goals]
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
