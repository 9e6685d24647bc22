"""How fast data-free quantization is, as ratios to bitsandbytes' NF4 on the same matrix in the same run.

    python benchmarks/fit.py [--size 4096] [--rounds 7] [--threads N] [--device cuda] [--json FILE]

Rounds are interleaved (peer, ours, peer, ours …) and medians compared, since absolute times mean little on shared machines.
Two figures per format: `fit` (scales and members) and `all` (fit, encode, pack: what a file needs, and what the peer does).

Floor of the M-ANT search at `absmax`, per weight and member: 7 compares and 7 blends for the ladder, 5 more operations for
scaling, error and sum, 16 lanes of AVX-512 at one such operation a cycle → 1.2 cycles; 4096² weights × 16 members at
3.7 GHz on one core: 0.087 s. A plain read of the matrix (67 MB at 20-35 GB/s) is 0.003 s: the search is bound by
arithmetic, not by memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from numfit.formats import encode, fit, format, pack

CASES = (
    ("mant4-g64", "absmax", 4.0), ("fp4.25", "absmax", 3.0), ("fp5.33", "absmax", 3.0), ("nf4-g64", "absmax", None),
    ("int4-g128", "absmax", None), ("mant4-g64", "mse", None), ("mant4-g32@e3m3", "mse", None), ("fp4.25", "mse", None),
    ("pot3-g128", "mse", None), ("nvfp4", "mse", None),
)  # fmt: skip


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call, the device's queue drained."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    w = (torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)) * 0.02).to(args.device)
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        peer, peer_name = (lambda: w.abs().view(-1, 64).amax(1)), "a block-maximum pass (bitsandbytes is not installed)"
    else:
        peer, peer_name = (lambda: quantize_4bit(w, blocksize=64, quant_type="nf4")), "bitsandbytes NF4"
    print(f"{args.size}×{args.size} fp32 on {args.device}, {torch.get_num_threads()} threads; ratios to {peer_name}")
    print(f"{'format':18} {'rule':7} {'fit':>8} {'all':>8} {'bar':>5}   seconds: peer, fit, all")
    rows = []
    for name, rule, bar in CASES:
        fmt = format(name)

        def whole(fmt: Any = fmt, rule: str = rule) -> None:
            params = fit(fmt, w, None, rule)
            pack(fmt, tuple(w.shape), encode(fmt, w, params), params)

        whole()  # compiles
        peer()
        times = [(timed(peer), timed(lambda f=fmt, r=rule: fit(f, w, None, r)), timed(whole)) for _ in range(args.rounds)]
        base, fitted, everything = (statistics.median(column) for column in zip(*times))
        ratios = [statistics.median(t[i] / t[0] for t in times) for i in (1, 2)]
        rows.append({"format": name, "rule": rule, "bar": bar, "fit_ratio": ratios[0], "all_ratio": ratios[1],
                     "peer_s": base, "fit_s": fitted, "all_s": everything})  # fmt: skip
        seconds = ", ".join(f"{t:.3f}" for t in (base, fitted, everything))
        print(f"{name:18} {rule:7} {ratios[0]:8.2f} {ratios[1]:8.2f} {bar or '':>5}   {seconds}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"size": args.size, "device": args.device, "threads": torch.get_num_threads(), "peer": peer_name,
                       "rows": rows}, file, indent=1)  # fmt: skip


if __name__ == "__main__":
    main()
