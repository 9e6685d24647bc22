"""Attention over a packed cache, block by block: no more than one block of keys and values is decoded at a time.

The softmax is computed online (Milakov and Gimelshein 2018; FlashAttention): a running maximum m, the sum l of exp(s − m), and
the sum of values under the same weights, rescaled when m grows. Keys in a rotated basis are met by rotated queries, and values
in a rotated basis are summed there and turned back once: no block is ever rotated.

This is the reference for the compiled kernel (native.py), which does the packed part of it for a few queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from numfit.kvcache import native
from numfit.kvcache.rotation import rotate, unrotate
from numfit.kvcache.store import Snapshot

_QUERIES = 256  # rows of scores at a time
_PLAIN = 512  # columns of scores at a time, where nothing is decoded


@dataclass(frozen=True)
class View:
    """What one forward pass of a layer attends to: the cache as it was before, and the pass's own tokens [B, H, T, D]."""

    keys: Snapshot
    values: Snapshot
    new_keys: Tensor
    new_values: Tensor

    @property
    def past(self) -> int:
        return self.keys.length

    @property
    def length(self) -> int:
        return self.past + self.new_keys.shape[2]

    @property
    def packed(self) -> bool:
        return self.keys.count > 0 or self.values.count > 0

    def read(self, values: bool, start: int, stop: int) -> Tensor:
        if start >= self.past:
            return (self.new_values if values else self.new_keys)[:, :, start - self.past : stop - self.past].float()
        return (self.values if values else self.keys).read(start, stop)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Runs of positions in which neither keys nor values cross a cut."""
        cuts = {*self.keys.cuts(), *self.values.cuts(), *range(self.past, self.length, _PLAIN), self.length}
        return pairwise(sorted(cuts))

    def materialize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H, length, D], decoded: what models get whose attention does not know this cache."""
        return _materialize(self.keys, self.new_keys, dtype), _materialize(self.values, self.new_values, dtype)


def _materialize(tokens: Snapshot, new: Tensor, dtype: torch.dtype) -> Tensor:
    matrix = tokens.stream.basis(tokens.dim, new.device)
    parts = []
    for a, b in pairwise(tokens.cuts()):
        if a == b:
            continue
        x = tokens.read(a, b)
        parts.append((unrotate(x, matrix) if matrix is not None and tokens.is_packed(a) else x).to(dtype))
    return torch.cat([*parts, new.to(dtype)], 2)


def attend(
    query: Tensor,
    view: View,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    compiled: bool = True,
) -> Tensor:
    """softmax(scaling · q · Kᵀ + mask) · V.

    Args:
        query: [B, Hq, T, D], the last T tokens of the view; Hq a multiple of the view's heads.
        mask: bool (True: look at it) or numbers to add, broadcastable to [B, Hq, T, length]; None is causal.
        softcap: scores become softcap · tanh(scores / softcap) before the mask.
        sinks: a logit of each head that takes weight and gives nothing [Hq] (gpt-oss).
        compiled: use the kernel where it applies.

    Returns:
        fp32 [B, Hq, T, Dv].
    """
    steps = range(0, query.shape[2], _QUERIES)
    if len(steps) <= 1:
        return _attend(query, view, scaling, mask, softcap, sinks, 0, compiled)
    parts = [_attend(query[:, :, i : i + _QUERIES], view, scaling, mask, softcap, sinks, i, compiled) for i in steps]
    return torch.cat(parts, 2)


def _attend(q: Tensor, view: View, scaling: float, mask: Tensor | None, softcap: float | None, sinks: Tensor | None,
            offset: int, compiled: bool) -> Tensor:  # fmt: skip
    """`attend` for queries `offset` … of the pass."""
    batch, heads, count, dim = q.shape
    shared = view.new_keys.shape[1]
    rows = heads // shared * count  # queries that share a head of keys
    x = (q.float() * scaling).reshape(batch, shared, rows, dim)
    key_basis = view.keys.stream.basis(view.keys.dim, q.device) if view.keys.count else None
    value_basis = view.values.stream.basis(view.values.dim, q.device) if view.values.count else None
    turned = x if key_basis is None else rotate(x, key_basis)
    width = view.new_values.shape[-1]
    top = x.new_full((batch, shared, rows, 1), -math.inf)  # m
    total = torch.zeros_like(top)  # l
    out = x.new_zeros((batch, shared, rows, width))
    turned_out = out if value_basis is None else torch.zeros_like(out)
    if sinks is not None:
        top = sinks.float().view(1, shared, -1, 1, 1).expand(batch, shared, heads // shared, count, 1).reshape(top.shape)
        total = torch.ones_like(total)
    first = view.past + offset  # position of the first query
    if mask is not None:
        mask = mask[:, :, offset : offset + count] if mask.shape[2] > 1 else mask
    skip = 0, 0  # positions done by the kernel
    if compiled and sinks is None and softcap is None:
        done = native.attend(turned, view.keys, view.values, mask)
        if done is not None:
            top, total, turned_out = done
            skip = view.keys.sink, view.keys.sink + min(view.keys.count, view.values.count)
            if value_basis is None:
                out = turned_out
    for a, b in view.ranges():
        if skip[0] <= a < skip[1]:
            continue
        if mask is None and a >= first + count:
            break  # later than every query
        score = (turned if key_basis is not None and view.keys.is_packed(a) else x) @ view.read(False, a, b).mT
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        score = _masked(score, mask, a, b, first, count)
        peak = torch.maximum(top, score.amax(-1, keepdim=True))
        safe = torch.where(peak == -math.inf, 0.0, peak)  # nothing seen yet
        weight = torch.exp(score - safe)
        shrink = torch.exp(top - safe)
        top, total = peak, total * shrink + weight.sum(-1, keepdim=True)
        part = weight @ view.read(True, a, b)
        same = turned_out is out
        out = out * shrink
        turned_out = out if same else turned_out * shrink
        if value_basis is not None and view.values.is_packed(a):
            turned_out = turned_out + part
        else:
            out = out + part
            turned_out = out if same else turned_out
    if value_basis is not None:
        out = out + unrotate(turned_out, value_basis)
    return (out / total.clamp_min(1e-30)).view(batch, heads, count, width)


def _masked(score: Tensor, mask: Tensor | None, a: int, b: int, first: int, count: int) -> Tensor:
    """Scores [B, H, rows, b − a] of positions a … b under a mask; queries first … first + count."""
    batch, shared, rows, n = score.shape
    if mask is None:
        if b - 1 <= first:
            return score  # every query may look at all of them
        mask = torch.arange(a, b, device=score.device) <= torch.arange(first, first + count, device=score.device)[:, None]
        mask = mask[None, None]
    else:
        mask = mask[..., a:b]
    wide = score.view(batch, shared, rows // count, count, n)
    if mask.shape[1] > 1:
        mask = mask.unflatten(1, (shared, -1))
    else:
        mask = mask.unsqueeze(2)
    if mask.dtype == torch.bool:
        return wide.masked_fill(~mask, -math.inf).view(score.shape)
    return (wide + mask.float()).view(score.shape)
