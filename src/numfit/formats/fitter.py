"""Fitting the blocks of some rows: the best candidate scale of the best member, by the compiled pass or by the eager one.

What looks at a whole tensor (its parent scale, its one member, its palette) is in fit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from numfit.formats.format import Format
from numfit.formats.nearest import Ladder, ladder
from numfit.formats.onepass import Search, usable
from numfit.formats.params import Params
from numfit.formats.scale import PARENT_MIN, exp2i, ocp_exponent, to_stored
from numfit.formats.search import BATCH, COMPILE_FROM, affine_errors, errors, unit_choice, unit_errors


class Fitter:
    """Fits chunks of rows; holds what all chunks of a tensor share."""

    def __init__(self, fmt: Format, h: Tensor | None, rule: str, device: torch.device, weights: int) -> None:
        self.fmt, self.h, self.rule = fmt, h, rule
        self.ladder: Ladder = ladder(fmt.members, fmt.rounding, device)
        tried = 20 if rule == "mse" else 1  # what pruning leaves, roughly
        ranks = 8 if self.ladder.step is not None or fmt.zero else max(8, self.ladder.levels.shape[1])
        self.compiled = weights * len(fmt.members) * tried * ranks >= COMPILE_FROM
        tops = [fmt.max_level] if self.small_units else [g.max_level for g in fmt.members]
        self.tops = torch.tensor(tops, dtype=torch.float32, device=device)  # [M]; one where units are small
        if fmt.scale.store == "e8m0":
            count = 3 if rule == "mse" else 1
        elif rule == "mse":
            count = 40 if fmt.zero else len(fmt.scale.multipliers())
        else:
            count = len(fmt.scale.tries)
        self.candidates = count
        self.native = self._search() if usable(device) else None

    def _search(self) -> Search:
        """What the compiled pass needs to do the same."""
        fmt, mse = self.fmt, self.rule == "mse"
        if fmt.zero:
            tops = torch.tensor([(1 << fmt.bits) - 1], dtype=torch.float32, device="cpu")
            factors = shrink_factors(self.rule, self.tops.device).tolist()
        elif fmt.scale.store == "e8m0":
            tops, factors = self.tops, [1.0, 0.0, -1.0] if mse else [0.0]
        else:
            tops, factors = self.tops, fmt.scale.multipliers() if mse else list(fmt.scale.tries)
        unit = int(fmt.unit) if self.small_units else 0
        return Search(self.ladder, tops, unit=unit, zero=fmt.zero, scale=fmt.scale, spare=fmt.spare, factors=factors,
                      ceil=self.rule == "ceil")  # fmt: skip

    @property
    def small_units(self) -> bool:
        return isinstance(self.fmt.unit, int) and self.fmt.member_count > 1

    # -- candidates -----------------------------------------------------------------------------------------------

    def wanted(self, amax: Tensor, first: int, last: int) -> Tensor:
        """Candidate scales `first` … `last` before rounding to storage, descending: amax [B] → [B, M, C]."""
        if self.fmt.scale.store == "e8m0":
            base = torch.stack([ocp_exponent(amax, top, self.rule) for top in self.tops.tolist()], 1)  # [B, M]
            shift = [1, 0, -1] if self.rule == "mse" else [0]
            offsets = torch.tensor(shift[first:last], device=amax.device, dtype=base.dtype)
            return exp2i((base[..., None] + offsets).clamp(-127, 127))
        factors = self.fmt.scale.multipliers() if self.rule == "mse" else list(self.fmt.scale.tries)
        row = torch.tensor(factors[first:last], dtype=torch.float32, device=amax.device)
        return (amax[:, None] / self.tops)[..., None] * row

    def stored(self, wanted: Tensor, parent: Tensor | None, free: bool) -> tuple[Tensor, Tensor]:
        """(stored, effective) of wanted scales; `free` keeps them unrounded, to find a row's parent."""
        if free:
            value = wanted.clamp_min(PARENT_MIN)
            return value, value
        if self.fmt.scale.store == "e8m0" and not self.fmt.zero:
            return wanted, wanted
        value = to_stored(self.fmt.scale, wanted, parent, self.fmt.spare)
        return value, value if parent is None else value * parent

    # -- one chunk ------------------------------------------------------------------------------------------------

    def chunk(self, w: Tensor, parent: Tensor | None) -> Params:
        """Fit rows w [r, K] fp32 whose blocks choose for themselves."""
        if self.fmt.scale.parent == "row":
            free, _, _ = self.blocks(w, None, free=True)
            parent = (free.amax(1, keepdim=True) / self.fmt.scale.cap).clamp(PARENT_MIN, 65504.0).half().float()
        scale, member, zero = self.blocks(w, parent, free=False)
        return Params(scale, parent if self.fmt.scale.parent == "row" else None, member, zero)

    def blocks(self, w: Tensor, parent: Tensor | None, *, free: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.native is not None:
            block = self.fmt.geometry(w.shape[1]).block
            return self.native.fit(w, self.h, parent, block, 2 * BATCH, free=free)[:3]
        scales, members, zeros = [], [], []
        for x, h, p in self.pieces(w, parent):
            n_rows = w.shape[0]
            if self.fmt.zero:
                scale, zero = self._affine(x, h, p, free)
                zeros.append(zero.view(n_rows, -1))
            elif self.small_units:
                scale, choice = self._units(x, h, p, free)
                members.append(choice.view(n_rows, -1))
            else:
                err, best = self.per_member(x, h, p, free=free, each=False)
                choice = err.argmin(1, keepdim=True)  # ties: the lower index
                scale = best.gather(1, choice)
                if self.fmt.member_count > 1:
                    members.append(choice.view(n_rows, -1).to(torch.uint8))
            scales.append(scale.view(n_rows, -1))
        join: Callable[[list[Tensor]], Tensor | None] = lambda parts: torch.cat(parts, 1) if parts else None  # noqa: E731
        joined = join(scales)
        assert joined is not None
        return joined, join(members), join(zeros)

    def pieces(self, w: Tensor, parent: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Split rows into whole blocks and the short tail block: (x [B, n], h [B, n] | None, parent [B, 1, 1] | None)."""
        rows, k = w.shape
        block = self.fmt.geometry(k).block
        whole = k // block
        for start, count, n in ((0, whole, block), (whole * block, 1, k - whole * block)):
            if n == 0 or count == 0:
                continue
            x = w[:, start : start + count * n].reshape(rows * count, n)
            h = None
            if self.h is not None:
                h = self.h[start : start + count * n].view(1, count, n).expand(rows, count, n).reshape(rows * count, n)
            p = None
            if parent is not None:
                p = parent.expand(rows, 1).repeat_interleave(count, 0).view(-1, 1, 1)
            yield x, h, p

    def each_member(self, w: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor]:
        """(error, stored scale) of the best scale of every member for rows w [r, K]: [r, blocks, M] each."""
        if self.native is not None:
            block = self.fmt.geometry(w.shape[1]).block
            scale, _, _, error = self.native.fit(w, self.h, parent, block, 2 * BATCH, each=True)
            assert error is not None
            return error, scale
        parts = [self.per_member(x, h, p, free=False, each=True) for x, h, p in self.pieces(w, parent)]
        errors_, scales = (torch.cat([part[i].view(len(w), -1, len(self.tops)) for part in parts], 1) for i in (0, 1))
        return errors_, scales

    def row_errors(self, w: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Errors of rows w [r, K] under scales [M, C] ([1, C] for small units and zero points) that all share: [r, M, C]."""
        if self.native is not None:
            return self.native.row_errors(w, self.h, scale, zero)
        h = None if self.h is None else self.h.expand_as(w)
        wide = scale.expand(len(w), -1, -1)  # [r, M, C]
        if zero is not None:
            pairs = torch.cat([scale, zero]).expand(len(w), -1, -1)
            return affine_errors(w, h, pairs, float((1 << self.fmt.bits) - 1), compiled=self.compiled)[:, None]
        if self.small_units:
            return unit_errors(*self.slots(w, h), wide[:, 0], self.ladder, compiled=self.compiled)[:, None]
        return errors(w.abs() if self.ladder.mirrored else w, h, wide, self.ladder, compiled=self.compiled)

    def choose(self, w: Tensor, scale: Tensor) -> Tensor:
        """Best members of small units of rows w [r, K] under the tensor's scale [1, 1]: uint8 [r, units]."""
        if self.native is not None:
            return self.native.choose(w, self.h, float(scale))
        xs, hs = self.slots(w, None if self.h is None else self.h.expand_as(w))
        return unit_choice(xs, hs, scale.expand(len(w), 1), self.ladder, compiled=self.compiled)

    def per_member(
        self, x: Tensor, h: Tensor | None, parent: Tensor | None, *, free: bool, each: bool
    ) -> tuple[Tensor, Tensor]:
        """Best scale of every member for every block.

        Args:
            x, h: [B, n]; parent: [B, 1, 1] or None.
            each: whether the best of *each* member must be exact (a member per tensor), or only that of the winner.

        Returns:
            (error [B, M], stored scale [B, M]).
        """
        magnitude = x.abs()
        amax, where = magnitude.max(1)
        top_h = None if h is None else h.gather(1, where[:, None])[:, 0]
        if self.ladder.mirrored:
            x = magnitude
        best_err = torch.full((len(x), len(self.tops)), torch.inf, dtype=torch.float32, device=x.device)
        best = torch.zeros_like(best_err)
        alive = None  # indices of blocks still searched; None means all
        first = 0
        while first < self.candidates:
            last = min(self.candidates, first + (BATCH if first else 3 * BATCH))
            stored, scale = self.stored(self.wanted(amax, first, last), parent, free)  # [B, M, C]
            if first:
                clip = (scale[..., 0] * self.tops).amax(1)
                bound = (amax - clip).clamp_min(0).square() * (1 - 1e-5)
                bound = bound if top_h is None else bound * top_h
                known = best_err if alive is None else best_err[alive]
                keep = bound < (known.amax(1) if each else known.amin(1))
                if not bool(keep.all()):
                    picked = keep.nonzero()[:, 0]
                    if len(picked) == 0:
                        break
                    alive = picked if alive is None else alive[picked]
                    x, amax, stored, scale = x[picked], amax[picked], stored[picked], scale[picked]
                    h = None if h is None else h[picked]
                    top_h = None if top_h is None else top_h[picked]
                    parent = None if parent is None else parent[picked]
            err, index = errors(x, h, scale, self.ladder, compiled=self.compiled).min(-1)
            value = stored.gather(2, index[..., None])[..., 0]
            if alive is None:
                better = err < best_err
                best_err, best = torch.where(better, err, best_err), torch.where(better, value, best)
            else:
                old_err, old = best_err[alive], best[alive]
                better = err < old_err
                best_err[alive], best[alive] = torch.where(better, err, old_err), torch.where(better, value, old)
            first = last
        return best_err, best

    def _units(self, x: Tensor, h: Tensor | None, parent: Tensor | None, free: bool) -> tuple[Tensor, Tensor]:
        """AMS-like blocks: best common scale [B, 1], then a member per unit [B, units]."""
        amax = x.abs().amax(1)
        xs, hs = self.slots(x, h)
        best_err = torch.full((len(x), 1), torch.inf, dtype=torch.float32, device=x.device)
        best = best_scale = torch.ones_like(best_err)
        for first in range(0, self.candidates, 2 * BATCH):
            stored, scale = self.stored(self.wanted(amax, first, first + 2 * BATCH), parent, free)
            stored, scale = stored[:, 0], scale[:, 0]  # [B, C]
            clip = scale[:, :1] * self.tops
            if first and h is None and bool(((amax[:, None] - clip).clamp_min(0).square() * (1 - 1e-5) >= best_err).all()):
                break
            err, index = unit_errors(xs, hs, scale, self.ladder, compiled=self.compiled).min(1, keepdim=True)
            better = err < best_err
            best_err = torch.where(better, err, best_err)
            best = torch.where(better, stored.gather(1, index), best)
            best_scale = torch.where(better, scale.gather(1, index), best_scale)
        choice = unit_choice(xs, hs, best_scale, self.ladder, compiled=self.compiled)
        return best, choice

    def slots(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, n] → [unit, B, units], short units padded with weights of no importance."""
        unit = int(self.fmt.unit)
        pad = -x.shape[1] % unit
        if pad and h is None:
            h = torch.ones_like(x)
        x = x.abs() if self.ladder.mirrored else x
        out = [None if t is None else torch.nn.functional.pad(t, (0, pad)) for t in (x, h)]
        xs, hs = (None if t is None else t.view(len(t), -1, unit).permute(2, 0, 1).contiguous() for t in out)
        assert xs is not None
        return xs, hs

    def _affine(self, x: Tensor, h: Tensor | None, parent: Tensor | None, free: bool) -> tuple[Tensor, Tensor]:
        """Asymmetric integers: both ends shrink together (ams-pot-formats.md 7.1) → stored scale, zero [B, 1]."""
        low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
        top = float((1 << self.fmt.bits) - 1)
        shrink = shrink_factors(self.rule, x.device)
        wanted = ((high - low) / top)[:, None] * shrink  # [B, C]
        stored, scale = self.stored(wanted, None if parent is None else parent[..., 0], free)
        zero = (-low[:, None] * shrink / scale).round().clamp(0, top)
        err = affine_errors(x, h, torch.stack([scale, zero], 1), top, compiled=self.compiled)
        index = err.argmin(1, keepdim=True)
        return stored.gather(1, index), zero.gather(1, index)


def shrink_factors(rule: str, device: torch.device) -> Tensor:
    """Factors on both ends of asymmetric blocks, from large to small."""
    factors = [2.0 ** (-j / 16) for j in range(40 if rule == "mse" else 1)]
    return torch.tensor(factors, dtype=torch.float32, device=device)
