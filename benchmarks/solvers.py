"""How fast a linear is solved, as ratios to the plain eager column loop, in one run.

    python benchmarks/solvers.py [--size 4096] [--formats int4-g128,mant4-g64] [--threads N] [--rounds N]
        [--clock wall|cpu] [--json FILE]

One layer of `size` × `size` with H given, drawn from a model of real inputs: a spectrum that falls as a power, a few channels
that are much larger than the rest. Contestants take turns:

- `plain`: the sweep of GPTQ as it is usually written, blocks of 128 columns in a Python loop over columns (sweep.eager_panel);
- `ours`: the same sweep with compiled panels; its codes must be the same bits, which is checked;
- `floor`: the matrix products alone that update what follows each panel, N K² operations with the library's own sgemm.

A ratio is the median over rounds of the ratio of the round's two times. The table then sets the parts of a whole `solve` beside
one another: the factor of H (2/3 K³ operations), fitting, the sweep, the losses that guard it (a product w @ h, 2 N K²
operations), a pass of descent (the same product in pieces), and a refit. `--clock cpu` counts the processor time of the process
instead of the time on the wall: on a machine that others use, with one thread, that is the steadier measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numfit import native
from numfit.formats import fit, format
from numfit.solvers import SolverOptions, solve
from numfit.solvers.compiled import compiled_panel
from numfit.solvers.descent import descent
from numfit.solvers.linalg import cholesky_inverse_upper, row_losses
from numfit.solvers.order import make_plan
from numfit.solvers.refit import refit
from numfit.solvers.state import Problem
from numfit.solvers.sweep import eager_panel, sweep

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = time.perf_counter
MUST = {"int4-g128": 5.0, "mant4-g64": 3.0}


def layer(size: int) -> tuple[Tensor, Tensor]:
    """Weights [size, size] and a second moment whose spectrum falls as i^-1.2, with 1 % of the channels ten times larger."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g)).Q
    x = torch.randn(2 * size, size, generator=g) * torch.arange(1, size + 1) ** -0.6 @ basis.T
    x *= torch.exp(0.5 * torch.randn(size, generator=g))
    x[:, torch.randperm(size, generator=g)[: size // 100]] *= 10
    return torch.randn(size, size, generator=g) * size**-0.5, x.T @ x / size


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    start = _clock()
    result = run()
    return _clock() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--formats", default="int4-g128,mant4-g64")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    global _clock
    _clock = CLOCKS[options.clock]
    if options.threads:
        torch.set_num_threads(options.threads)
    n = k = options.size
    w, h = layer(n)
    print(f"{n} × {k}, {torch.get_num_threads()} threads, {native.isa() or 'no compiled kernels'}")
    report: dict[str, Any] = {"size": n, "threads": torch.get_num_threads(), "isa": native.isa(), "formats": {}}
    diagonal = h.diagonal()
    permutation = make_plan(format("int4-g128"), diagonal, "static", False, 128).order
    seconds, factor = timed(lambda: cholesky_inverse_upper(h[permutation][:, permutation], 0.01))
    print(f"factor of H {seconds:.2f} s ({2 / 3 * k**3 / seconds / 1e9:.0f} GFLOP/s)")
    report["factor"] = seconds
    for name in options.formats.split(","):
        report["formats"][name] = one_format(name, w, h, factor.u, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def one_format(name: str, w: Tensor, h: Tensor, u: Tensor, rounds: int) -> dict[str, Any]:
    fmt, (n, k) = format(name), w.shape
    plan = make_plan(fmt, h.diagonal(), "static", False, 128)
    fitting, params = timed(lambda: fit(fmt, w, h.diagonal()))

    def floor() -> None:
        rest = torch.zeros_like(w)
        error = torch.zeros(n, 128)
        for a in range(0, k - 128, 128):
            rest[:, a + 128 :].addmm_(error, u[a : a + 128, a + 128 :], alpha=-1)

    sweep(fmt, w[:64], u, plan, fit(fmt, w[:64]), panel_sweep=compiled_panel)  # everything is loaded
    times: dict[str, list[float]] = {"plain": [], "ours": [], "floor": []}
    for i in range(rounds):
        times["floor"].append(timed(floor)[0])
        seconds, ours = timed(lambda: sweep(fmt, w, u, plan, params, panel_sweep=compiled_panel))
        times["ours"].append(seconds)
        if i < max(1, rounds - 1):
            seconds, plain = timed(lambda: sweep(fmt, w, u, plan, params, panel_sweep=eager_panel))
            times["plain"].append(seconds)
            assert torch.equal(ours.codes, plain.codes), "compiled and plain sweeps differ"
    faster = statistics.median(a / b for a, b in zip(times["plain"], times["ours"]))
    over = statistics.median(a / b for a, b in zip(times["ours"], times["floor"]))
    low = {what: min(values) for what, values in times.items()}
    rate = n * k * k / low["floor"] / 1e9
    must = f" (must be {MUST[name]:g}×)" if name in MUST else ""
    print(f"\n{name}: plain {low['plain']:.2f} s, ours {low['ours']:.2f} s, floor {low['floor']:.2f} s ({rate:.0f} GFLOP/s)")
    print(f"  {faster:.1f}× faster than the plain loop{must}, {over:.2f} times the floor")

    problem = Problem(w, h, fmt, SolverOptions.parse("gptq+descent", sweeps=1), h.diagonal())
    losses, _ = timed(lambda: row_losses(w, h))
    state = problem.state(sweep(fmt, w, u, plan, params).codes, params)
    descending, after = timed(lambda: descent(problem, state))
    refitting, _ = timed(lambda: refit(problem, after))
    product, _ = timed(lambda: w @ h)
    whole, solution = timed(lambda: solve(w, h, fmt, "gptq"))
    parts = {"fit": fitting, "losses": losses, "descent": descending, "w @ h": product, "refit": refitting, "solve gptq": whole}
    print("  " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in parts.items()))
    print(f"  loss {solution.loss / solution.start:.3f} of nearest")
    return {"times": times, "faster": faster, "over_floor": over, "parts": parts}


if __name__ == "__main__":
    main()
