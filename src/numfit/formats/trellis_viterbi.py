"""The encoder of trellis codes in PyTorch: slow, on any device, and bit for bit what the native one does.

Costs of paths are integers: weights and levels as int16 at 8000 to a standard deviation, a difference clamped to int16, doubled
and clamped k − 2 times (small errors must not vanish at more bits), squared as (d² + 2**14) >> 15. Sums saturate at 65535; of
each step's costs the least of the step before is taken away. The first of equal candidates wins.

A tile's stream is circular. The exact search would be one Viterbi pass for every state in which the circle may close. Here the
cheapest free path over the weights on both sides of the seam decides that state, and one pass starts and ends in it, which
costs less than 1 % of the squared error. Streams of a few bits, no longer than what neighbouring states share, are searched
exhaustively.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 8000.0  # of a standard deviation, in costs
EXHAUSTIVE = 12  # bits of the longest stream of which every one is tried; no less than neighbouring states share
_CLAMP = 32767
_CHUNK = 1 << 24  # costs held at a time


def costs_table(levels: Tensor, deviation: float) -> Tensor:
    """Levels by state [2**L] in the unit of costs: int16."""
    return (levels.double() * (UNIT / deviation)).round().clamp(-_CLAMP, _CLAMP).to(torch.int16)


def encode_circles(table: Tensor, k: int, v: Tensor) -> Tensor:
    """Best symbols of sequences of weights, each circular in itself.

    Args:
        table: int16 [2**L], see `costs_table`.
        k: bits of a symbol.
        v: weights in the unit of costs, int16 [circles, n], in the order of positions (time runs backwards).

    Returns:
        uint8 [circles, n].
    """
    bits = table.numel().bit_length() - 1
    count, n = v.shape
    if n * k <= EXHAUSTIVE:
        return _exhaust(table, k, v)
    out = torch.empty((count, n), dtype=torch.uint8, device=v.device)
    step = max(1, _CHUNK // ((n + 1) << (bits - k)))
    for start in range(0, count, step):
        time = v[start : start + step].flip(1).int()
        h = (48 + k - 1) // k + 8
        seam = time[:, torch.arange(-h, h, device=v.device) % n]  # short circles several times over
        free = torch.zeros((len(time), 1 << (bits - k)), dtype=torch.int32, device=v.device)
        closing = _walk(table, k, seam, free, None)[:, h]
        fixed = torch.full_like(free, 65535).scatter_(1, closing[:, None], 0)
        path = _walk(table, k, time, fixed, closing)
        out[start : start + step] = (path[:, 1:] & ((1 << k) - 1)).flip(1).to(torch.uint8)
    return out


def circle_states(symbols: Tensor, k: int, bits: int) -> Tensor:
    """States of circular sequences of symbols [..., n]: int32 [..., n]."""
    state = torch.zeros(symbols.shape, dtype=torch.int32, device=symbols.device)
    for i in range(-(-bits // k)):
        state |= symbols.int().roll(-i, -1) << (i * k)
    return state & ((1 << bits) - 1)


def _cost(w: Tensor, level: Tensor, k: int) -> Tensor:
    d = (w - level).clamp(-32768, 32767)
    for _ in range(k - 2):
        d = (2 * d).clamp(-32768, 32767)
    return (d * d + 16384) >> 15


def _walk(table: Tensor, k: int, w: Tensor, first: Tensor, end: Tensor | None) -> Tensor:
    """Overlaps (last L − k bits) along the cheapest paths: w int32 [c, steps], first [c, overlaps] → int64 [c, steps + 1]."""
    overlaps, fan = first.shape[1], 1 << k
    levels = table.int().view(fan, overlaps)  # by oldest symbol and the rest of the state
    x = torch.arange(overlaps, device=w.device)
    before = torch.arange(fan, device=w.device)[:, None] * (overlaps >> k) + (x >> k)  # [fan, overlaps]
    costs = [first]
    taken = torch.zeros((len(w), 1), dtype=torch.int32, device=w.device)
    for t in range(w.shape[1]):
        candidates = (costs[-1][:, before] + _cost(w[:, t, None, None], levels, k)).clamp_max(65535)
        best = (candidates.amin(1) - taken).clamp_min(0)
        taken = best.amin(1, keepdim=True)
        costs.append(best)
    if end is None:
        end = _first_least(costs[-1])
    path = [end]
    row = torch.arange(len(w), device=w.device)[:, None]
    for t in range(w.shape[1] - 1, -1, -1):
        came = before.T[path[-1]]  # [c, fan]
        candidates = (costs[t][row, came] + _cost(w[:, t, None], levels.T[path[-1]], k)).clamp_max(65535)
        path.append(came.gather(1, _first_least(candidates)[:, None])[:, 0])
    return torch.stack(path[::-1], 1)


def _first_least(costs: Tensor) -> Tensor:
    """Index of the first least entry of each row (argmin promises no order)."""
    at = torch.arange(costs.shape[1], device=costs.device)
    return torch.where(costs == costs.amin(1, keepdim=True), at, costs.shape[1]).amin(1)


def _exhaust(table: Tensor, k: int, v: Tensor) -> Tensor:
    bits, n = table.numel().bit_length() - 1, v.shape[1]
    everything = torch.arange(1 << (n * k), device=v.device)
    symbols = torch.stack([everything >> (p * k) & ((1 << k) - 1) for p in range(n)], 1)  # [2**(n k), n]
    levels = table.int()[circle_states(symbols, k, bits)]
    best = [_first_least(_cost(part.int()[:, None], levels, k).sum(-1)) for part in v.split(64)]  # costs [64, 2**(n k)]
    return symbols[torch.cat(best)].to(torch.uint8)


def tiles_of(x: Tensor, rows: int, cols: int) -> Tensor:
    """A matrix [a · rows, b · cols] as its tiles: [a, b, rows · cols]."""
    a, b = x.shape[0] // rows, x.shape[1] // cols
    return x.reshape(a, rows, b, cols).transpose(1, 2).reshape(a, b, rows * cols)


def untile(tiles: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `tiles_of`."""
    a, b = tiles.shape[:2]
    return tiles.reshape(a, b, rows, cols).transpose(1, 2).reshape(a * rows, b * cols)
