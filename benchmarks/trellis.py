"""How fast trellis codes are applied and encoded, against ggml's types of as many bits, all in one run.

    python benchmarks/trellis.py [--only gemv,encode] [--threads 1,2] [--size N] [--rotate MB] [--rounds N] [--turn N]
                                 [--json FILE]

gemv    one token × N×N (4096), threads as given, int8 activations, what a call does included but for the rotation of the
        activations (which layers share); weights are random streams, which decode as fast as any. Against ggml Q4_0, Q3_K and
        Q2_K in their fastest buffers, and nibble and 8-bit tables of our own. Turns, copies and ratios as in kernels.py.
        Long turns (--turn 60) come back to each copy within a turn: who reads pages of 4 KiB then finds their addresses warm,
        and a large outer cache may hold part of the copies. Short ones (5) are nearer to a model too large for any cache.
encode  core-seconds for 10^6 Gaussian weights, tail-biting, one thread: the least of several runs.

Peers: benchmarks/peers.py, where it says how they are built. Without them the ratios are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernels
import peers
import torch
from peers import Absent, Peer
from torch import Tensor

from numfit import native
from numfit.formats import QuantizedTensor, format
from numfit.formats.trellis import names, trellis
from numfit.formats.trellis_codec import encode, start_scale
from numfit.kernels.packed import PackedLinear

RIVALS = {4: "Q4_0", 3: "Q3_K", 2: "Q2_K"}
BARS = {4: (1.1, 1.3), 3: (1.4, 1.8), 2: (1.0, 1.3)}  # against these: what must be, what is wished for
COSTS = {"t8": 0.15, "gf2": 0.4}


def ours(name: str, n: int, k: int, x: Tensor, rotate: int) -> Peer:
    """A trellis of random symbols."""
    fmt = format(name)
    generator = torch.Generator().manual_seed(0)
    specs = fmt.planes((n, k))
    planes = {
        "codes": torch.randint(0, 256, specs["codes"].shape, dtype=torch.uint8, generator=generator),
        "scale": torch.full(specs["scale"].shape, 0.02, dtype=torch.float16),
    }
    weight = QuantizedTensor(fmt, (n, k), planes)
    first = PackedLinear.pack(weight)
    copies = peers.copies_of(first.nbytes, rotate)
    packed = [first, *(PackedLinear.pack(weight) for _ in range(copies - 1))]
    y, error = torch.empty(1, n), ctypes.create_string_buffer(native.ERROR_BYTES)
    apply, handles = native.library().nf_apply, [p.handle for p in packed]
    source, target = x.data_ptr(), y.data_ptr()

    def call(i: int, keep: object = (packed, x)) -> None:
        if apply(handles[i], source, 1, k, target, n, None, 0, error):
            raise RuntimeError(error.value.decode())

    decoded = weight.dequantize()
    peer = Peer(name, first.nbytes, copies, call, lambda: y, note=first.kernel)
    return replace(peers.checked(peer, x, decoded, decoded), stored=weight.nbytes)


def part_gemv(options: argparse.Namespace, threads: int) -> tuple[list[dict[str, Any]], list[kernels.Goal]]:
    kernels.use_threads(threads)
    n = k = options.size
    w, x = kernels.matrices(n, k, 1)
    rotate = options.rotate << 20
    print(f"\none token × {n}×{k}, {threads} thread(s), copies of {options.rotate} MB in turn")
    rivals: list[Peer] = []
    try:
        ggml = peers.Ggml(threads)
        for kind in RIVALS.values():
            rivals += kernels.fastest(peers.ggml_candidates(ggml, w, x, kind, rotate), min(options.rounds, 4))
    except Absent as reason:
        print(f"left out: ggml ({reason})")
    own = [ours(name, n, k, x, rotate) for name in names()]
    scalar = [kernels.ours(name, w, x, rotate) for name in ("nf4-g64", "pot2-g64")]
    arena = kernels.Arena(rotate)
    streams = [arena.stream(f"roof of {p.name}", p.bytes) for p in own]
    t = kernels.contest([*own, *scalar, *rivals, *streams], options.rounds)
    kernels.show(t, [p.name for p in [*own, *scalar, *rivals]], "us", 1e6)
    goals = []
    for peer in own:
        bits = trellis(peer.name).bits
        theirs = f"ggml {RIVALS[bits]}"
        if theirs in t:
            what = f"{peer.name} against {theirs}, {threads} thread(s)"
            goals.append(kernels.Goal(what, *BARS[bits], t[theirs].over(t[peer.name])))
        goals.append(kernels.Goal(f"{peer.name} ÷ roof of its bytes", 0, 1, t[f"roof of {peer.name}"].over(t[peer.name])))
    everybody = {p.name: t[p.name] for p in [*own, *scalar, *rivals, *streams]}
    rows = [
        {"name": name, "threads": threads, "bytes": one.peer.bytes, "median_us": one.median * 1e6, "p10_us": one.p10 * 1e6}
        for name, one in everybody.items()
    ]
    return rows, goals


def part_encode(rounds: int) -> tuple[list[dict[str, Any]], list[kernels.Goal]]:
    kernels.use_threads(1)
    w = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    rows, goals = [], []
    print("\nencoding, core-seconds for 10^6 weights (least of the runs)")
    for name in names():
        code = trellis(name)
        scale, best = start_scale(code, w), float("inf")
        for _ in range(rounds):
            start = time.process_time()
            encode(code, w, scale)
            best = min(best, time.process_time() - start)
        cost = best / w.numel() * 1e6
        rows.append({"name": name, "core_seconds": cost})
        print(f"{name:16}{cost:8.3f}")
        limit = COSTS["gf2" if code.masks else "t8"]
        goals.append(kernels.Goal(f"{name}: core-seconds for 10^6 weights", limit, limit / 2, cost, most=True))
    return rows, goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gemv,encode")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rotate", type=int, default=256, help="megabytes that the copies of each contestant fill")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=int, default=kernels.TURN, help="timed calls of a contestant in a round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kernels.TURN = options.turn
    found: dict[str, Any] = {"isa": native.isa(), "gemv": [], "encode": []}
    goals: list[kernels.Goal] = []
    if "gemv" in options.only:
        for threads in map(int, options.threads.split(",")):
            rows, more = part_gemv(options, threads)
            found["gemv"] += rows
            goals += more
    if "encode" in options.only:
        found["encode"], more = part_encode(options.rounds)
        goals += more
    print(f"\n{'':60}{'must':>8}{'goal':>8}{'reached':>9}")
    for goal in goals:
        print(f"{goal.what:60}{goal.must:8.2f}{goal.wish:8.2f}{goal.reached:9.2f}  {goal.verdict()}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
