"""Searches and trains the tables of src/numfit/formats/trellis_tables.py, which are what this script prints.

    python benchmarks/trellis_tables.py [--draws N] [--only NAME] [--check]

A code is a linear hash over GF(2) of the state into sorted levels. Row b < k of its matrix holds bit k − 1 − b of the newest
symbol and none of its other bits, so that the 2**k branches of a state fall into the 2**k ranges of levels; everything else
is drawn at random. Levels start as centroids of equally probable ranges of a Gaussian and are trained by Lloyd's algorithm:
encode samples, replace each level by the mean of what it encoded. Level i and its complement stay negatives of each other. Of
many draws, each trained for a few rounds, the best few are trained on, rounded to int8 and measured on samples of their own.
For a table the hash has as many rows as the state has bits; its trained levels, in the order of states, are the table. Every
row then holds the oldest bit of the state, so that this bit is the sign of a level and kernels need no hash to find it (that
costs 1 % of the error at four bits).

--check measures the shipped tables instead (Gaussian, unit variance, circles of 256, 2**20 samples), as well as what the
rate-distortion bound and the best scalar quantizer reach. All samples and draws come from numpy's frozen RandomState.
"""

from __future__ import annotations

import argparse
import ctypes
import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from numfit.formats.trellis import Trellis, hash_states, names, trellis
from numfit.formats.trellis_codec import _Code
from numfit.formats.trellis_viterbi import UNIT, circle_states, tiles_of
from numfit.native import ERROR_BYTES, library

SCALAR = {2: 0.1175, 3: 0.0345, 4: 0.0095}  # mean squared error of Lloyd-Max quantizers
# name: k, L, bits of the index (0: a table)
PLANS = {
    "trellis2": (2, 12, 6), "trellis3": (3, 12, 7), "trellis4": (4, 12, 8),
    "trellis2-t8": (2, 8, 0), "trellis3-t8": (3, 8, 0), "trellis4-t8": (4, 8, 0),
}  # fmt: skip


def gaussian(circles: int, seed: int) -> Tensor:
    """Samples as tiles: fp32 [64 · circles, 4]."""
    return torch.from_numpy(numpy.random.RandomState(seed).standard_normal((64 * circles, 4)).astype(numpy.float32))


def paths(k: int, levels: Tensor, w: Tensor) -> Tensor:
    """States of the best paths: levels by state [2**L] in standard deviations → int32 [circles, 256]."""
    bits = levels.numel().bit_length() - 1
    table = (levels.double() * UNIT).round().clamp(-32767, 32767).to(torch.int16)
    code = _Code(k, bits, table.data_ptr(), None)
    inverse, symbols = torch.full((len(w),), UNIT), torch.empty(w.shape, dtype=torch.uint8)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    where = (w.data_ptr(), len(w), 4, 4, inverse.data_ptr(), symbols.data_ptr(), None, 4)
    if library().nf_trellis_encode(ctypes.byref(code), *where, error):
        raise RuntimeError(error.value.decode())
    return circle_states(tiles_of(symbols, 64, 4)[:, 0], k, bits)


def quantiles(count: int) -> Tensor:
    """Means of `count` equally probable ranges of a Gaussian, ascending."""
    edges = torch.special.ndtri(torch.arange(1, count, dtype=torch.float64) / count)
    density = torch.cat([torch.zeros(1), torch.exp(-edges * edges / 2) / math.sqrt(2 * math.pi), torch.zeros(1)])
    return ((density[:-1] - density[1:]) * count).float()


@dataclass
class Candidate:
    k: int
    index: Tensor  # of each state
    masks: tuple[int, ...]
    levels: Tensor  # by index
    error: float = math.inf

    def train(self, w: Tensor, rounds: int) -> Candidate:
        """Rounds of Lloyd's algorithm; `error` is measured before the last one."""
        samples = tiles_of(w, 64, 4)[:, 0]
        levels = self.levels
        error = self.error
        for _ in range(rounds):
            chosen = self.index[paths(self.k, levels[self.index], w).long()].flatten()
            error = float((levels[chosen] - samples.flatten()).square().mean())
            total = torch.bincount(chosen, samples.flatten().double(), len(levels))
            count = torch.bincount(chosen, minlength=len(levels))
            total, count = total - total.flip(0), count + count.flip(0)  # antisymmetric under the complement of the index
            levels = torch.where(count > 0, (total / count.clamp_min(1)).float(), levels)
        return Candidate(self.k, self.index, self.masks, levels, error)

    def rounded(self) -> tuple[Tensor, float]:
        """int8 levels by index and what one of them is worth."""
        unit = float(self.levels.abs().max()) / 127
        return (self.levels / unit).round(), unit


def draw(k: int, bits: int, rows: int, seed: int) -> Candidate | None:
    """A random hash; None where its rows are dependent."""
    random = numpy.random.RandomState(seed)
    masks = []
    for b in range(rows):
        high = int(random.randint(0, 1 << (bits - k))) << k
        low = 1 << (k - 1 - b) if b < k else int(random.randint(0, 1 << k))
        if rows == bits:
            high |= 1 << (bits - 1)
        masks.append(high | low)
    span = {0}
    for mask in masks:
        if mask in span:
            return None
        span |= {mask ^ other for other in span}
    return Candidate(k, hash_states(tuple(masks), bits), tuple(masks), quantiles(1 << rows))


def search(name: str, draws: int) -> Trellis:
    """The best of many draws."""
    k, bits, rows = PLANS[name]
    few, more, many, test = gaussian(96, 1), gaussian(512, 2), gaussian(2048, 3), gaussian(2048, 4)
    found = []
    for seed in range(draws if rows else 3 * draws):  # of tables, which must be invertible, two thirds are nothing
        start = draw(k, bits, rows or bits, 1000 * bits + 7919 * seed)
        if start:
            found.append(start.train(few, 4))
    found.sort(key=lambda c: c.error)
    better = sorted((c.train(more, 4) for c in found[:48]), key=lambda c: c.error)
    best: tuple[float, Trellis] | None = None
    for candidate in better[:6]:
        candidate = candidate.train(many, 6)
        levels, unit = candidate.rounded()
        chosen = candidate.index[paths(k, (levels * unit)[candidate.index], test).long()]
        error = float(((levels * unit)[chosen] - tiles_of(test, 64, 4)[:, 0]).square().mean())
        by_state = levels[candidate.index] if rows == 0 else levels
        code = Trellis(name, k, bits, candidate.masks if rows else (), tuple(int(v) for v in by_state), round(1 / unit, 4))
        print(f"# {name}: {error:.5f} (first {candidate.error:.5f})", flush=True)
        if best is None or error < best[0]:
            best = (error, code)
    assert best is not None
    print(f"# {name}: of {len(found)} draws from {found[0].error:.5f} to {found[-1].error:.5f}; chosen {best[0]:.5f}")
    return best[1]


def measure(code: Trellis, seed: int = 5, circles: int = 4096) -> float:
    """Mean squared error per unit-variance Gaussian sample, in circles of 256."""
    w = gaussian(circles, seed)
    levels = code.table.float() / code.deviation
    return float((levels[paths(code.bits, levels, w).long()] - tiles_of(w, 64, 4)[:, 0]).square().mean())


def show(code: Trellis) -> str:
    """An entry of the table of constants."""
    lines = [f'    "{code.name}": {{']
    lines += [f'        "bits": {code.bits}, "state_bits": {code.state_bits}, "deviation": {code.deviation},']
    lines += ['        "masks": (' + ", ".join(f"{m:#05x}" for m in code.masks) + "),", '        "levels": (']
    row = "           "
    for v in code.levels:
        if len(row) + len(f" {v},") > 126:
            lines.append(row)
            row = "           "
        row += f" {v},"
    return "\n".join([*lines, row, "        ),", "    },"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--only", choices=PLANS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        for name in names():
            code = trellis(name)
            bound = 4.0**-code.bits
            print(f"{name:12} {measure(code):.5f}   bound {bound:.5f}   scalar {SCALAR[code.bits]:.5f}")
        return
    for name in [options.only] if options.only else PLANS:
        print(show(search(name, options.draws)), flush=True)


if __name__ == "__main__":
    main()
